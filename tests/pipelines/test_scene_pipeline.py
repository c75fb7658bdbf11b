"""ShortcutScenePipeline: steps in closed form and as in the reference, batches, completion, files, error texts."""

from __future__ import annotations

import json
import logging
from pathlib import Path

import numpy as np
import pytest
import torch
import trimesh
from diffusers import FlowMapEulerDiscreteScheduler, ModelMixin
from diffusers.configuration_utils import ConfigMixin, register_to_config
from PIL import Image
from torch import Tensor, nn
from transformers import AutoModel, BitImageProcessor, Dinov2Config, Dinov2Model

from backlot.rendering import mesh_colors
from pipelines.shortcut_scene import (
    OccupancyVAE,
    PoseCodec,
    SceneShortcutTransformer,
    ShortcutScenePipeline,
    load_scene,
    rotation_6d,
    rotation_matrix,
)
from pipelines.shortcut_scene.inputs import object_rows
from pipelines.shortcut_scene.pipeline import guide

FIXTURES = Path(__file__).parents[1] / "fixtures"
SIDE = 8  # pixels
CONFIG = {
    "shape_tokens": 8,
    "shape_channels": 4,
    "hidden_size": 32,
    "num_layers": 2,
    "num_attention_heads": 2,
    "scene_attention": "full",
    "condition": "image",
    "condition_channels": 3,
    "image_size": SIDE,
    "patch_size": 4,
}


def awake(network: nn.Module, seed: int = 0) -> nn.Module:
    """Every layer of it has a say."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
    return network.eval()


def codec(**settings) -> PoseCodec:
    """Statistics by which something would go wrong if they were left out."""
    sizes = {"shape": 4, "6drotation_normalized": 6, "scale": 3, "translation": 3}
    mean = {name: [0.1 * i - 0.2 for i in range(size)] for name, size in sizes.items()} | {"scale": [-1, -0.8, -1.2]}
    return PoseCodec(
        "zscore", mean, {name: [0.3 + 0.1 * i for i in range(size)] for name, size in sizes.items()}, **settings
    )


def small_vae() -> OccupancyVAE:
    torch.manual_seed(0)
    vae = OccupancyVAE(
        sample_size=8, latent_channels=4, block_out_channels=(8, 8), layers_per_block=1, mid_layers=1, patch_size=2
    )
    return awake(vae)


def quiet(pipeline: ShortcutScenePipeline) -> ShortcutScenePipeline:
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def build(vae: OccupancyVAE | None = None, **overrides) -> ShortcutScenePipeline:
    torch.manual_seed(0)
    network = awake(SceneShortcutTransformer(**CONFIG | overrides))
    return quiet(ShortcutScenePipeline(network, FlowMapEulerDiscreteScheduler(), codec(), vae))


@pytest.fixture(scope="module")
def pipeline():
    return build()


@pytest.fixture(scope="module")
def pipeline_with_vae():
    return build(small_vae())


class StandIn(ModelMixin, ConfigMixin):
    """A network that answers what it is told to, and keeps what it was asked."""

    @register_to_config
    def __init__(
        self,
        shape_tokens: int = 8,
        shape_channels: int = 4,
        condition: str = "none",
        condition_channels: int = 3,
        image_size: int = SIDE,
        object_condition: str = "shared",
        max_slots: int = 32,
        independent_t: bool = False,
        translation_scale: bool = False,
        use_shortcut: bool = True,
    ):
        super().__init__()
        self.anchor = nn.Parameter(torch.zeros(()))
        self.calls: list[dict] = []

    def forward(self, sample, timestep, step_size, object_mask=None, unconditional=None, **conditions):
        call = {"sample": sample, "t": timestep, "d": step_size, "unconditional": unconditional} | conditions
        self.calls.append(call | {"object_mask": object_mask})
        return type("Output", (), {"sample": self.answer(**self.calls[-1])})


def stand_in(answer, own_codec: PoseCodec | None = None, **config) -> ShortcutScenePipeline:
    network = StandIn(**config)
    network.answer = answer
    return quiet(ShortcutScenePipeline(network, FlowMapEulerDiscreteScheduler(), own_codec or PoseCodec()))


def constant(value: float):
    return lambda sample, **_: {name: torch.full_like(x, value) for name, x in sample.items()}


def generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def picture(seed: int = 0, side: int = SIDE) -> Tensor:
    return torch.rand(3, side, side, generator=generator(seed)) * 2 - 1


def noise(pipeline: ShortcutScenePipeline, batch: int = 1, count: int = 3, seed: int = 0) -> dict[str, Tensor]:
    source = generator(seed)
    return {name: torch.randn(batch, count, *size, generator=source) for name, size in pipeline.modalities.items()}


def assert_close(a: dict[str, Tensor], b: dict[str, Tensor], **tolerances) -> None:
    assert a.keys() == b.keys()
    for name in a:
        torch.testing.assert_close(a[name], b[name], **tolerances, msg=lambda text, name=name: f"{name}: {text}")


def own_addresses(loaded: ShortcutScenePipeline, saved: ShortcutScenePipeline) -> ShortcutScenePipeline:
    """Weights mapped from a file lie at other addresses, where BLAS may round differently; here not a bit differs."""
    for name, part in loaded.components.items():
        if isinstance(part, nn.Module):
            weights, others = saved.components[name].state_dict(), part.state_dict()
            assert all(torch.equal(weights[key], others[key]) for key in weights)
            part.load_state_dict(weights, assign=True)
    return quiet(loaded)


def warnings_of(caplog) -> list[str]:
    return [record.message for record in caplog.records if record.name == "pipelines.shortcut_scene.pipeline"]


# --- steps ------------------------------------------------------------------------------------------


def test_one_step_adds_the_velocity_at_noise():
    pipeline = stand_in(
        lambda sample, t, d, **_: {k: 2 * x + 3 + t.view(-1, 1, 1, 1) + d.view(-1, 1, 1, 1) for k, x in sample.items()}
    )
    start = noise(pipeline)
    result = pipeline(num_objects=3, num_inference_steps=1, latents=start, output_type="latent").latents
    assert_close(result, {name: x + (2 * x + 3 + 0 + 1) for name, x in start.items()})


def test_the_true_velocity_leads_to_the_data_in_any_number_of_steps():
    pipeline = stand_in(None, codec())
    start, data = noise(pipeline), noise(pipeline, seed=1)
    pipeline.transformer.answer = lambda **_: {name: data[name] - start[name] for name in data}
    for steps in (1, 2, 5, 8):
        result = pipeline(
            num_objects=3, num_inference_steps=steps, use_shortcut=False, latents=start, output_type="latent"
        ).latents
        assert_close(result, pipeline.codec.decode(data), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("shift", [1.0, 3.0, 0.5])
@pytest.mark.parametrize("steps", [1, 4, 7])
def test_times_and_step_sizes_are_those_of_the_schedule(steps, shift):
    pipeline = stand_in(constant(1))
    pipeline(num_objects=2, num_inference_steps=steps, shift=shift, output_type="latent")
    times = torch.stack([call["t"] for call in pipeline.transformer.calls])[:, 0]
    sizes = torch.stack([call["d"] for call in pipeline.transformer.calls])[:, 0]
    regular = torch.arange(steps + 1) / steps
    expected = regular / (1 + (shift - 1) * (1 - regular))  # the reference's rescale_t
    torch.testing.assert_close(times, expected[:-1])
    torch.testing.assert_close(sizes, expected.diff())
    assert sizes.sum() == pytest.approx(1, abs=1e-6)
    pipeline.transformer.calls.clear()
    pipeline(num_objects=2, num_inference_steps=steps, shift=shift, use_shortcut=False, output_type="latent")
    assert [call["d"].tolist() for call in pipeline.transformer.calls] == [[0.0]] * steps


def test_the_schedulers_own_shift_comes_on_top():
    pipeline = stand_in(constant(1))
    pipeline.register_modules(scheduler=FlowMapEulerDiscreteScheduler(shift=2.0))
    pipeline(num_objects=1, num_inference_steps=4, shift=1.5, use_shortcut=False, output_type="latent")
    times = [float(call["t"]) for call in pipeline.transformer.calls]
    assert times == pytest.approx([t / (1 + 2 * (1 - t)) for t in (0, 0.25, 0.5, 0.75)])


def test_steps_are_eulers(pipeline):
    start, told = noise(pipeline), {"image": picture()[None]}
    result = pipeline(picture(), num_objects=3, num_inference_steps=4, latents=start, output_type="latent").latents
    state = start
    with torch.no_grad():
        for i in range(4):
            velocity = pipeline.transformer(state, torch.tensor([i / 4]), torch.tensor([1 / 4]), **told).sample
            state = {name: x + velocity[name] / 4 for name, x in state.items()}
    assert_close(result, pipeline.codec.decode(state), atol=1e-5, rtol=1e-5)
    # ... and the network is told their length
    flow = pipeline(
        picture(), num_objects=3, num_inference_steps=4, latents=start, use_shortcut=False, output_type="latent"
    ).latents
    assert (flow["translation"] - result["translation"]).abs().max() > 1e-3


@pytest.mark.parametrize(
    ("setting", "arguments"),
    [("euler_s4_sc_rt1_fwd", {}), ("euler_s4_fm_rt3_fwd", {"use_shortcut": False, "shift": 3.0})],
)
def test_sampling_is_that_of_the_reference(setting, arguments):
    """Figures of SAM 3D Objects' own sampler with a toy network, in float64."""
    values = np.load(FIXTURES / "scene_sampling.npz")
    weights = {name: torch.from_numpy(x) for name, x in np.load(FIXTURES / "scene_weights.npz").items()}
    names = ("6drotation_normalized", "scale", "shape", "translation")
    cond = torch.from_numpy(values["cond"])

    def toy(sample, t, d, **_):
        t, d = ((1000 * x).float() for x in (t, d))  # as it does
        velocity = {}
        for name, x in sample.items():
            a, m, o, along_t, along_d, p = (weights[f"{name}/{letter}"] for letter in "AMOabP")
            mean = x.mean(2, keepdim=True)
            h = x @ a + 0.3 * mean @ m + 0.2 * mean.mean(1, keepdim=True) @ o
            velocity[name] = torch.tanh(h) + torch.sin(t / 1000) * along_t + d / 1000 * along_d + cond @ p
        return velocity

    pipeline = stand_in(toy, shape_tokens=5, shape_channels=4)
    pipeline.transformer.double()
    start = {name: torch.from_numpy(values[f"x0/{name}"])[None] for name in names}
    result = pipeline(num_objects=4, num_inference_steps=4, latents=start, output_type="latent", **arguments).latents
    expected = {name: torch.from_numpy(values[f"{setting}/y/{name}"])[None] for name in names}
    assert_close(result, expected, atol=1e-9, rtol=0)


def test_steps_off_the_ladder_are_told_of_once(caplog):
    pipeline = stand_in(constant(1))
    for steps in (1, 2, 4, 64):
        pipeline(num_objects=1, num_inference_steps=steps, output_type="latent")
    pipeline(num_objects=1, num_inference_steps=25, use_shortcut=False, output_type="latent")
    assert warnings_of(caplog) == []
    for _ in range(2):
        pipeline(num_objects=1, num_inference_steps=25, output_type="latent")
    assert len(warnings_of(caplog)) == 1
    assert "0.04 is none of them" in warnings_of(caplog)[0]
    pipeline(num_objects=1, num_inference_steps=4, shift=3, output_type="latent")
    assert len(warnings_of(caplog)) == 2


# --- guidance ---------------------------------------------------------------------------------------


def guided(scale: float = 4.0, **arguments) -> ShortcutScenePipeline:
    """Ran with a network whose velocity is 1 with its condition and 0 without."""

    def answer(sample, unconditional, **_):
        known = torch.ones(len(sample["shape"])) if unconditional is None else (~unconditional).float()
        return {name: torch.ones_like(x) * known.view(-1, 1, 1, 1) for name, x in sample.items()}

    pipeline = stand_in(answer, condition="image")
    pipeline.start = noise(pipeline)
    pipeline.result = pipeline(
        picture(),
        num_objects=3,
        num_inference_steps=4,
        guidance_scale=scale,
        latents=pipeline.start,
        output_type="latent",
        **{"use_shortcut": False, **arguments},
    ).latents
    return pipeline


@pytest.mark.parametrize(
    ("interval", "steps"),
    [((0, 1000), 4), ((0, 500), 3), ((250, 500), 2), ((0, 499), 2), ((900, 1000), 0), ((250, 250), 1)],
)
def test_guidance_acts_inside_its_interval(interval, steps):
    pipeline = guided(4.0, guidance_interval=interval)
    asked = [call["unconditional"] for call in pipeline.transformer.calls]
    assert [x is not None for x in asked].count(True) == steps
    assert all(x.tolist() == [False, True] for x in asked if x is not None)
    moved = (4 * steps + (4 - steps)) / 4  # u + 4 (c - u) where guided, c elsewhere
    assert_close(pipeline.result, {name: x + moved for name, x in pipeline.start.items()})


def test_without_guidance_nothing_is_asked_twice():
    pipeline = guided(1.0)
    assert all(len(call["t"]) == 1 and call["unconditional"] is None for call in pipeline.transformer.calls)
    assert_close(guided(0.0, guidance_interval=(0, 1000)).result, pipeline.start)  # 0 ignores the condition


def test_guidance_of_the_real_network(pipeline):
    start = noise(pipeline)
    settings = {"num_objects": 3, "num_inference_steps": 1, "latents": start, "output_type": "latent"}
    result = pipeline(picture(), guidance_scale=3, **settings).latents
    arguments = start, torch.zeros(1), torch.ones(1)
    with torch.no_grad():
        told = pipeline.transformer(*arguments, image=picture()[None]).sample
        null = pipeline.transformer(*arguments, image=picture()[None], unconditional=torch.tensor([True])).sample
    expected = {name: start[name] + null[name] + 3 * (told[name] - null[name]) for name in start}
    assert_close(result, pipeline.codec.decode(expected), atol=1e-5, rtol=1e-5)


def test_rescaled_guidance_has_the_deviation_of_the_condition():
    c, u = torch.randn(2, 3, 5, 4, 2, generator=generator(0)).unbind()
    mask = object_rows([5, 3, 1])
    weight = mask[..., None, None].float()
    full, none, half = (guide(c * weight, u * weight, mask, 4.0, r) for r in (1.0, 0.0, 0.5))
    torch.testing.assert_close(none, (u + 4 * (c - u)) * weight)
    for row, count in enumerate((5, 3, 1)):
        assert full[row, :count].std(correction=0) == pytest.approx(float(c[row, :count].std(correction=0)), rel=1e-5)
        assert full[row, :count].std() < none[row, :count].std()
    torch.testing.assert_close(half, (full + none) / 2)


def test_guidance_with_shortcuts_is_told_of_once(caplog):
    guided(4.0)
    guided(1.0, use_shortcut=True)
    assert warnings_of(caplog) == []
    pipeline = guided(4.0, use_shortcut=True)
    assert len(warnings_of(caplog)) == 1
    pipeline(picture(), num_objects=1, guidance_scale=4, output_type="latent")
    assert len(warnings_of(caplog)) == 1
    assert "guidance_scale 4 with use_shortcut" in warnings_of(caplog)[0]


# --- batches ----------------------------------------------------------------------------------------


def test_a_batch_gives_what_its_scenes_give_one_by_one(pipeline_with_vae):
    counts = [2, 5, 1]
    images = [picture(seed) for seed in range(3)]
    together = pipeline_with_vae(
        images, num_objects=counts, generator=[generator(7 + i) for i in range(3)], output_type="np"
    )
    for i, count in enumerate(counts):
        alone = pipeline_with_vae(images[i], num_objects=count, generator=generator(7 + i), output_type="np")
        for name, values in alone.latents.items():
            torch.testing.assert_close(together.latents[name][i, :count], values[0], atol=1e-5, rtol=1e-5)
            assert (together.latents[name][i, count:] == 0).all()
        for name, values in alone.scenes[0].items():
            assert len(together.scenes[i][name]) == count
            np.testing.assert_allclose(together.scenes[i][name], values, atol=1e-3, rtol=1e-4)
        assert len(together.poses[i]) == count


def test_one_generator_serves_scene_after_scene(pipeline):
    source = generator(3)
    together = pipeline([picture(0), picture(1)], num_objects=[1, 4], generator=source, output_type="latent").latents
    source = generator(3)
    for i, count in enumerate((1, 4)):
        alone = pipeline(picture(i), num_objects=count, generator=source, output_type="latent").latents
        torch.testing.assert_close(together["translation"][i, :count], alone["translation"][0], atol=1e-5, rtol=1e-5)


def test_what_is_single_serves_all(pipeline):
    sources = [generator(i) for i in range(2)]
    by_list = pipeline([picture(), picture()], num_objects=[2, 3], generator=sources, output_type="latent").latents
    sources = [generator(i) for i in range(2)]
    by_one = pipeline(picture(), num_objects=[2, 3], generator=sources, output_type="latent").latents
    assert_close(by_list, by_one)
    sources = [generator(i) for i in range(2)]
    stacked = torch.stack([picture(), picture()])
    assert pipeline(stacked, num_objects=2, generator=sources, output_type="latent").latents["shape"].shape[:2] == (
        2,
        2,
    )


def test_several_scenes_of_one_picture(pipeline):
    images = [picture(0), picture(1)]
    sources = [generator(i) for i in range(4)]
    several = pipeline(images, num_objects=[2, 3], scenes_per_image=2, generator=sources, output_type="latent").latents
    assert (several["translation"][:2, 2:] == 0).all()
    assert (several["translation"][2:, 2:] != 0).all()
    last = pipeline(images[1], num_objects=3, generator=generator(3), output_type="latent").latents
    torch.testing.assert_close(several["translation"][3], last["translation"][0], atol=1e-5, rtol=1e-5)


def test_the_same_seed_gives_the_same_scene(pipeline):
    a, b, c = (
        pipeline(picture(), num_objects=3, generator=generator(seed), output_type="latent").latents
        for seed in (1, 1, 2)
    )
    assert_close(a, b, atol=0, rtol=0)
    assert (a["translation"] - c["translation"]).abs().min() > 0


# --- pictures ---------------------------------------------------------------------------------------


def test_pictures_of_all_kinds_and_sizes(pipeline):
    pixels = np.random.default_rng(0).integers(0, 256, (SIDE, SIDE, 3), dtype=np.uint8)
    floats = torch.from_numpy(pixels).permute(2, 0, 1) / 127.5 - 1
    large = Image.fromarray(pixels).resize((64, 64), Image.Resampling.NEAREST)

    def run(image) -> Tensor:
        return pipeline(image, num_objects=2, generator=generator(0), output_type="latent").latents["shape"]

    torch.testing.assert_close(run(Image.fromarray(pixels)), run(floats))
    torch.testing.assert_close(run(pixels), run(floats))
    torch.testing.assert_close(run(floats.numpy()), run(floats))
    torch.testing.assert_close(run(Image.fromarray(pixels).convert("RGBA")), run(floats))
    assert (run(large) - run(floats)).abs().max() < (run(picture(5)) - run(floats)).abs().max()


def test_masks_give_the_number_of_objects_and_reach_the_network():
    pipeline = stand_in(constant(0), condition="image", object_condition="mask", condition_channels=6)
    masks = torch.zeros(3, 32, 32)
    masks[1, 16:] = 255
    pointmap = torch.full((3, 32, 32), torch.nan)
    pointmap[:, :16] = 2.0
    few = torch.ones(1, 32, 32, dtype=torch.bool)
    result = pipeline(picture(), masks=[masks, few], pointmap=pointmap, num_inference_steps=1, output_type="latent")
    assert [len(poses) for poses in result.poses] == [3, 1]
    told = pipeline.transformer.calls[0]
    assert told["masks"].shape == (2, 3, SIDE, SIDE)
    assert told["masks"][0, 1].unique_consecutive(dim=0).tolist() == [[0.0] * SIDE, [1.0] * SIDE]
    assert told["masks"][1].sum((1, 2)).tolist() == [SIDE**2, 0, 0]
    assert told["pointmap"][0, 0].unique_consecutive(dim=0).tolist() == [[2.0] * SIDE, [0.0] * SIDE]
    assert told["object_mask"].tolist() == [[True, True, True], [True, False, False]]


def test_masks_and_pointmaps_work_with_the_real_network():
    pipeline = build(object_condition="mask", condition_channels=6)
    masks = torch.rand(3, SIDE, SIDE, generator=generator(1)) > 0.5
    settings = {"pointmap": picture(3), "output_type": "latent"}
    a = pipeline(picture(), masks=masks, generator=generator(0), **settings).latents["translation"]
    b = pipeline(picture(), masks=masks.flip(0), generator=generator(0), **settings).latents["translation"]
    assert (a - b).abs().max() > 1e-4


def test_tokens_of_an_encoder_shared_or_for_each_object():
    pipeline = build(condition="tokens", condition_channels=5)
    tokens = [torch.randn(length, 5, generator=generator(length)) for length in (4, 7)]
    together = pipeline(
        cond_tokens=tokens, num_objects=[2, 3], generator=[generator(0), generator(1)], output_type="latent"
    ).latents
    for i, count in enumerate((2, 3)):
        alone = pipeline(cond_tokens=tokens[i], num_objects=count, generator=generator(i), output_type="latent").latents
        torch.testing.assert_close(together["shape"][i, :count], alone["shape"][0], atol=1e-5, rtol=1e-5)
    repeated = pipeline(
        cond_tokens=tokens[0].expand(2, -1, -1), num_objects=2, generator=generator(0), output_type="latent"
    ).latents
    torch.testing.assert_close(together["shape"][0, :2], repeated["shape"][0], atol=1e-5, rtol=1e-5)


@pytest.fixture(scope="module")
def encoder_parts():
    torch.manual_seed(0)
    config = Dinov2Config(
        hidden_size=16, num_hidden_layers=1, num_attention_heads=2, image_size=28, patch_size=14, mlp_ratio=2
    )
    processor = BitImageProcessor(size={"shortest_edge": 28}, crop_size={"height": 28, "width": 28})
    return {"image_encoder": Dinov2Model(config).eval(), "image_processor": processor}


def test_a_picture_goes_through_the_encoder(encoder_parts, tmp_path):
    pipeline = build(condition="tokens", condition_channels=16)
    with pytest.raises(ValueError, match="`image` must be None: this pipeline has no `image_encoder`"):
        pipeline(picture(), num_objects=1)
    pipeline.register_modules(**encoder_parts)
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (40, 60, 3), dtype=np.uint8))
    result = pipeline(image, num_objects=2, generator=generator(0), output_type="latent").latents
    pixels = encoder_parts["image_processor"]([image], return_tensors="pt")["pixel_values"]
    tokens = encoder_parts["image_encoder"](pixels).last_hidden_state
    assert tokens.shape == (1, 5, 16)
    told = pipeline(cond_tokens=tokens[0], num_objects=2, generator=generator(0), output_type="latent").latents
    assert_close(result, told, atol=1e-6, rtol=1e-6)

    pipeline.save_pretrained(tmp_path)
    loaded = own_addresses(ShortcutScenePipeline.from_pretrained(tmp_path), pipeline)
    assert isinstance(AutoModel.from_pretrained(tmp_path / "image_encoder"), Dinov2Model)
    again = loaded(image, num_objects=2, generator=generator(0), output_type="latent").latents
    assert_close(result, again, atol=0, rtol=0)


# --- completion -------------------------------------------------------------------------------------

POSE = {"translation": [0.5, -0.25, 0.125], "rotation": np.diag([-1.0, -1.0, 1.0]), "size": [0.5, 0.25, 2.0]}


def test_given_objects_are_kept_exactly(pipeline_with_vae):
    given = {1: {**POSE, "shape": torch.randn(8, 4, generator=generator(5))}}
    settings = {"num_objects": 3, "generator": generator(0), "num_inference_steps": 4}
    result = pipeline_with_vae(picture(), given=given, output_type="np", **settings)
    pose = result.poses[0][1]
    np.testing.assert_array_equal(pose["translation"], np.float32(POSE["translation"]))
    np.testing.assert_allclose(pose["rotation"], POSE["rotation"], atol=1e-7)
    np.testing.assert_allclose(pose["size"], POSE["size"], rtol=1e-6)
    assert torch.equal(result.latents["shape"][0, 1], given[1]["shape"])
    # the others are new, and know of it
    free = pipeline_with_vae(picture(), output_type="np", **settings | {"generator": generator(0)})
    assert (result.latents["translation"][0, 0] - free.latents["translation"][0, 0]).abs().max() > 1e-4


def test_a_given_object_is_on_its_path_at_every_step():
    own = codec()
    pipeline = stand_in(constant(1), own)
    start = noise(pipeline)
    seen = []

    def keep(_, index, timestep, tensors):
        seen.append((1 - float(timestep) / 1000, {k: x.clone() for k, x in tensors["latents"].items()}))
        return {}

    pipeline(
        num_objects=3,
        num_inference_steps=4,
        latents=start,
        given={2: POSE},
        callback_on_step_end=keep,
        output_type="latent",
    )
    data = own.encode({"translation": torch.tensor(POSE["translation"])})["translation"]
    for call in pipeline.transformer.calls:
        t = float(call["t"])
        torch.testing.assert_close(
            call["sample"]["translation"][0, 2, 0], (1 - t) * start["translation"][0, 2, 0] + t * data
        )
        torch.testing.assert_close(call["sample"]["translation"][0, 0], start["translation"][0, 0] + t)
        torch.testing.assert_close(call["sample"]["shape"][0, 2], start["shape"][0, 2] + t)  # was not given
    assert [t for t, _ in seen] == pytest.approx([0, 0.25, 0.5, 0.75])
    torch.testing.assert_close(seen[-1][1]["translation"][0, 2, 0], data)


def test_a_network_with_times_of_its_own_for_objects_sees_given_ones_as_data():
    own = codec()
    pipeline = stand_in(constant(1), own, independent_t=True)
    shape = torch.randn(8, 4, generator=generator(5))
    given = {0: {**POSE, "shape": shape}, 1: POSE}  # of object 1 the shape is to be found
    pipeline(num_objects=3, num_inference_steps=2, given=given, output_type="latent")
    first, second = pipeline.transformer.calls
    assert first["t"].tolist() == [[1.0, 0.0, 0.0]]
    assert second["t"].tolist() == [[1.0, 0.5, 0.5]]
    assert first["d"].tolist() == [[0.0, 0.5, 0.5]]
    torch.testing.assert_close(first["sample"]["shape"][0, 0], own.encode({"shape": shape})["shape"])


def test_the_real_network_completes_with_times_of_their_own():
    pipeline = build(independent_t=True)
    shape = torch.randn(8, 4, generator=generator(5))
    settings = {"num_objects": 2, "output_type": "latent"}
    results = [
        pipeline(
            picture(), given={0: {**POSE, "translation": [x, 0, 0], "shape": shape}}, generator=generator(0), **settings
        ).latents
        for x in (0.0, 1.0)
    ]
    assert results[1]["translation"][0, 0, 0].tolist() == [1, 0, 0]
    assert (results[0]["translation"][0, 1] - results[1]["translation"][0, 1]).abs().max() > 1e-4


def test_an_output_can_be_completed(pipeline):
    first = pipeline(picture(), num_objects=[3, 2], generator=generator(0), output_type="latent").latents
    known = torch.tensor([[True, False, True], [False, True, False]])
    second = pipeline(
        picture(), num_objects=[3, 2], generator=generator(1), given=(first, known), output_type="latent"
    ).latents
    for name in first:
        assert torch.equal(second[name][known], first[name][known])
        assert (second[name][0, 1] != first[name][0, 1]).all()


def test_an_occupancy_grid_can_be_given(pipeline_with_vae):
    grid = np.zeros((8, 8, 8), bool)
    grid[2:6, 2:6, :4] = True
    vae = pipeline_with_vae.vae
    result = pipeline_with_vae(picture(), num_objects=2, given={0: {"shape": grid}}, output_type="np")
    with torch.no_grad():
        latents = vae.encode(torch.from_numpy(grid).float()[None, None]).latent_dist.mode()
        expected = vae.decode(latents).sample[0, 0]
    torch.testing.assert_close(torch.from_numpy(result.scenes[0]["logits"][0]), expected, atol=1e-5, rtol=1e-5)


# --- outputs ----------------------------------------------------------------------------------------


def test_poses_are_those_of_the_latents(pipeline):
    result = pipeline(picture(), num_objects=2, generator=generator(0), output_type="latent")
    assert result.scenes is None
    for i, pose in enumerate(result.poses[0]):
        np.testing.assert_allclose(pose["translation"], result.latents["translation"][0, i, 0])
        np.testing.assert_allclose(pose["size"], result.latents["scale"][0, i, 0].exp(), rtol=1e-6)
        six = torch.from_numpy(pose["rotation"])
        torch.testing.assert_close(rotation_matrix(rotation_6d(six)), six, atol=1e-6, rtol=0)
        torch.testing.assert_close(rotation_matrix(result.latents["6drotation_normalized"][0, i, 0]), six)


def test_the_mesh_of_an_object_lies_where_its_pose_says(pipeline_with_vae):
    result = pipeline_with_vae(picture(), num_objects=3, generator=generator(0))
    scene, poses = result.scenes[0], result.poses[0]
    names = sorted(scene.graph.nodes_geometry)
    assert names == ["object_0", "object_1", "object_2"]
    colours = set()
    for i, name in enumerate(names):
        transform, geometry = scene.graph[name]
        points = trimesh.transform_points(scene.geometry[geometry].vertices, transform)
        canonical = (points - poses[i]["translation"]) @ poses[i]["rotation"] / poses[i]["size"]
        assert np.abs(canonical).max() <= 0.5 + 1e-4
        assert np.ptp(canonical, axis=0).min() > 0.1
        colours.add(tuple(np.ravel(mesh_colors(scene.geometry[geometry]))[:3]))
    assert len(colours) == 3


def test_without_a_vae_objects_are_boxes(pipeline):
    result = pipeline(picture(), num_objects=2, generator=generator(0))
    volume = [scene.to_mesh().volume for scene in result.scenes]
    assert volume == pytest.approx([sum(np.prod(pose["size"]) for pose in result.poses[0])], rel=1e-4)
    arrays = pipeline(picture(), num_objects=2, output_type="np").scenes[0]
    assert {name: x.shape for name, x in arrays.items()} == {
        "translation": (2, 3),
        "rotation": (2, 3, 3),
        "size": (2, 3),
    }


def test_an_exported_scene_loads_again(pipeline_with_vae, tmp_path):
    scene = pipeline_with_vae(picture(), num_objects=3, generator=generator(0)).scenes[0]
    pipeline_with_vae.export(scene, tmp_path / "scene.glb")
    loaded = load_scene(tmp_path / "scene.glb")
    assert sorted(loaded.graph.nodes_geometry) == ["object_0", "object_1", "object_2"]
    np.testing.assert_allclose(loaded.bounds, scene.bounds, atol=1e-5)
    for name in scene.graph.nodes_geometry:
        np.testing.assert_allclose(loaded.graph[name][0], scene.graph[name][0], atol=1e-5)
    pipeline_with_vae.export(scene, tmp_path / "more" / "scene.glb", per_object_obj=True)
    assert len(list((tmp_path / "more").rglob("*.obj"))) == 3


def test_a_preview_shows_picture_and_two_views(pipeline):
    scene = pipeline(picture(), num_objects=2, generator=generator(0)).scenes[0]
    two, three = pipeline.preview(scene, size=32), pipeline.preview(scene, picture(), size=32)
    assert three.width > two.width
    assert three.height == two.height
    assert len(np.unique(np.asarray(two).reshape(-1, 3), axis=0)) > 5


def test_a_tuple_has_the_same_fields(pipeline):
    settings = {"num_objects": 2, "output_type": "latent"}
    by_name = pipeline(picture(), generator=generator(0), **settings)
    scenes, latents, poses = pipeline(picture(), generator=generator(0), return_dict=False, **settings)
    assert scenes is None
    assert_close(latents, by_name.latents)
    assert len(poses[0]) == 2


def test_a_callback_can_change_the_state():
    pipeline = stand_in(constant(1))

    def reset(_, index, timestep, tensors):
        return {"latents": {name: torch.zeros_like(x) for name, x in tensors["latents"].items()}} if index == 1 else {}

    result = pipeline(num_objects=2, num_inference_steps=4, callback_on_step_end=reset, output_type="latent").latents
    assert_close(result, {name: torch.full_like(x, 0.5) for name, x in result.items()})
    assert pipeline.scheduler.step_index == 4


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_keeps_poses_in_float32(dtype):
    full = build(small_vae())
    expected = full(picture(), num_objects=2, generator=generator(0), output_type="latent").latents
    half = quiet(full.to(dtype))
    result = half(picture(), num_objects=2, generator=generator(0), output_type="np")
    assert all(x.dtype == torch.float32 for x in result.latents.values())
    assert result.scenes[0]["logits"].dtype == np.float32
    torch.testing.assert_close(result.latents["translation"], expected["translation"], atol=0.1, rtol=0.1)
    steady = stand_in(constant(1 / 3))
    steady.transformer.to(dtype)
    start = noise(steady)
    moved = steady(num_objects=3, num_inference_steps=64, latents=start, output_type="latent").latents
    third = float(torch.tensor(1 / 3, dtype=dtype))
    assert_close(moved, {name: x + third for name, x in start.items()}, atol=1e-5, rtol=1e-5)


# --- files ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("has_vae", [True, False])
def test_a_saved_pipeline_gives_the_same_scenes(tmp_path, has_vae):
    pipeline = build(small_vae() if has_vae else None)
    pipeline.save_pretrained(tmp_path)
    index = json.loads((tmp_path / "model_index.json").read_text())
    assert index["transformer"] == ["pipelines.shortcut_scene.transformer", "SceneShortcutTransformer"]
    assert index["codec"] == ["pipelines.shortcut_scene.codec", "PoseCodec"]
    assert index["image_encoder"] == [None, None]
    assert (tmp_path / "codec" / "stats.json").is_file()
    loaded = own_addresses(ShortcutScenePipeline.from_pretrained(tmp_path), pipeline)
    assert (loaded.vae is not None) == has_vae
    a, b = (p(picture(), num_objects=3, generator=generator(0), output_type="np") for p in (pipeline, loaded))
    assert_close(a.latents, b.latents, atol=0, rtol=0)
    assert a.scenes[0].keys() == b.scenes[0].keys()
    assert all((x == b.scenes[0][name]).all() for name, x in a.scenes[0].items())


# --- errors -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"num_inference_steps": 0}, "`num_inference_steps` must be at least 1, got 0"),
        ({"guidance_scale": -1}, "`guidance_scale` must be at least 0, got -1"),
        ({"guidance_interval": (500, 100)}, r"`guidance_interval` must be two rising numbers in \[0, 1000\], got"),
        ({"guidance_rescale": 2}, r"`guidance_rescale` must be in \[0, 1\], got 2"),
        ({"shift": 0}, "`shift` must be above 0, got 0"),
        ({"scenes_per_image": 0}, "`scenes_per_image` must be at least 1, got 0"),
        ({"output_type": "glb"}, "`output_type` must be 'trimesh', 'latent' or 'np', got 'glb'"),
        ({"callback_on_step_end_tensor_inputs": ["x"]}, r"must be among \['latents'\], got \['x'\]"),
        ({"image": None}, "`image` must be given: this network was trained with it, got None"),
        ({"image": []}, "`image` must not be an empty list"),
        ({"image": "a.png"}, "`image` must be PIL, uint8 .* got str"),
        ({"image": torch.zeros(1, 8, 8)}, r"`image` must be PIL, uint8 .* got float32 \(1, 8, 8\)"),
        ({"image": Image.new("RGB", (8, 6))}, "`image` must be square, as in training, got 8 x 6"),
        ({"pointmap": torch.zeros(3, 8, 8)}, "`pointmap` must be None: this network was trained on pictures alone"),
        ({"cond_tokens": torch.zeros(4, 3)}, "`cond_tokens` must be None: the condition of this network is 'image'"),
        ({"num_objects": None}, "`num_objects` must be given where there are no `masks`, got None"),
        ({"num_objects": 0}, "`num_objects` must be integers in .* got 0"),
        ({"num_objects": 2.5}, "`num_objects` must be integers in .* got 2.5"),
        (
            {"num_objects": [2, 3], "image": [picture()] * 3},
            "`num_objects` must have one entry, or one per scene: 3, got 2",
        ),
        ({"masks": torch.ones(3, 8, 8)}, "`num_objects` must agree with `masks`, got 2 and 3"),
        ({"masks": torch.ones(8, 8)}, r"`masks` must be \(N, H, W\), got float32 \(8, 8\)"),
        ({"generator": [generator(0)] * 2}, "`generator` must be one, or one per scene: 1, got 2"),
        ({"latents": torch.zeros(1)}, r"`latents` must be a dict of \[.*'shape'.*\], got Tensor"),
        ({"given": {2: POSE}}, r"`given` must name objects in \[0, 1\], got 2"),
        ({"given": {0: {}}}, r"`given` must have for object 0 some of translation, .* got \[\]"),
        ({"given": {0: {"pose": 1}}}, r"some of translation, rotation, size, shape, got \['pose'\]"),
        ({"given": {0: {"size": [1, -1, 1]}}}, r"`given` must have for object 0 a `size` above 0, got \[1, -1, 1\]"),
        ({"given": {0: {"size": "big"}}}, "`given` must have for object 0 arrays of numbers, got"),
        ({"given": {1: {"translation": [0.0]}}}, r"object 1 3 numbers as `translation`, got float32 \(1,\)"),
        ({"given": {1: {"translation": [0, 0, np.nan]}}}, "object 1 finite numbers as `translation`, got"),
        ({"given": {1: {"rotation": np.eye(3) * 2}}}, "a `rotation` that is orthonormal and no reflection, got"),
        (
            {"given": {1: {"rotation": np.diag([1.0, 1, -1])}}},
            "a `rotation` that is orthonormal and no reflection, got",
        ),
        ({"given": {1: {"rotation": [1.0, 0, 0, 2, 0, 0]}}}, "a `rotation` whose halves are not parallel, got"),
        ({"given": {1: {"rotation": np.eye(2)}}}, r"a \(3, 3\) or 6D `rotation`, got float64|float32 \(2, 2\)"),
        ({"given": {1: {"shape": torch.zeros(3, 3)}}}, r"as `shape` latents \(8, 4\), got float32 \(3, 3\)"),
        ({"given": [3]}, "`given` must be a dict of objects for each scene, got int"),
        ({"given": ({}, torch.ones(1, 2))}, r"`given` must tell which objects are known, bool \(1, 2\), got float32"),
        (
            {"given": ({"scale": torch.zeros(1, 2, 3)}, torch.ones(1, 2, dtype=torch.bool))},
            r"`given` must have modalities of .* got scale \(1, 2, 3\)",
        ),
    ],
)
def test_wrong_arguments_are_named(pipeline, arguments, message):
    with pytest.raises(ValueError, match=message) as error:
        pipeline(**{"image": picture(), "num_objects": 2, **arguments})
    assert "\n" not in str(error.value)


def test_latents_of_another_shape_are_refused(pipeline):
    wrong = noise(pipeline, count=2)
    with pytest.raises(ValueError, match=r"`latents` must have .* of shape \(1, 3, 1, 6\), got \(1, 2, 1, 6\)"):
        pipeline(picture(), num_objects=3, latents=wrong)


def test_what_a_network_cannot_do_is_refused():
    with pytest.raises(ValueError, match="`use_shortcut` must be False: this network was trained without step sizes"):
        build(use_shortcut=False)(picture(), num_objects=1)
    unconditional = build(condition="none")
    with pytest.raises(ValueError, match="`image` must be None: this network is unconditional"):
        unconditional(picture(), num_objects=1)
    with pytest.raises(ValueError, match="`guidance_scale` must be 1: this network has no condition, got 2"):
        unconditional(num_objects=1, guidance_scale=2)
    assert len(unconditional(num_objects=[2, 1], output_type="latent").poses) == 2
    tokens = build(condition="tokens", condition_channels=5, object_condition="slot", max_slots=3)
    with pytest.raises(ValueError, match="exactly one of `image` and `cond_tokens` must be given, got neither"):
        tokens(num_objects=1)
    with pytest.raises(ValueError, match=r"`cond_tokens` must be \(L, 5\) or \(N, L, 5\) for all scenes, got"):
        tokens(cond_tokens=torch.zeros(4, 6), num_objects=1)
    with pytest.raises(ValueError, match=r"`num_objects` must be integers in \[1, 3\], got 4"):
        tokens(cond_tokens=torch.zeros(4, 5), num_objects=4)


def test_the_log_is_quiet_where_nothing_is_wrong(pipeline, caplog):
    with caplog.at_level(logging.INFO):
        pipeline(picture(), num_objects=2, num_inference_steps=8)
    assert warnings_of(caplog) == []
