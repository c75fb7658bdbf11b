"""ShadowUNet: what is left of SDXL's UNet, what it is told about the light, and the weights it starts from."""

from __future__ import annotations

import logging

import pytest
import torch
from diffusers import UNet2DConditionModel
from diffusers.utils import logging as diffusers_logging
from sdxl_checkpoint import PICTURE_SIZE, write_sdxl

from pipelines.shadow_sdxl import ShadowUNet, blob_map, embed_light

CONFIG = {
    "sample_size": 8,
    "latent_channels": 4,
    "block_out_channels": (16, 16, 16),
    "layers_per_block": 1,
    "transformer_layers_per_block": 1,
    "attention_head_dim": (1, 2, 2),
    "norm_num_groups": 8,
}


def build(seed: int = 0, **overrides) -> ShadowUNet:
    """A small network with every layer awake (zero-initialised ones would hide faults)."""
    model = fresh(seed, **overrides)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    return model


def fresh(seed: int = 0, **overrides) -> ShadowUNet:
    torch.manual_seed(seed)
    return ShadowUNet(**{**CONFIG, **overrides}).eval()


def make_inputs(batch: int = 2, channels: int = 4, seed: int = 1) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    angles = torch.rand(batch, 3, generator=generator) * torch.tensor([45.0, 360.0, 6.0])
    return {
        "sample": torch.randn(batch, channels, 8, 8, generator=generator),
        "timestep": 1000 * torch.rand(batch, generator=generator),
        "object_latents": torch.randn(batch, channels, 8, 8, generator=generator),
        "mask": torch.rand(batch, 1, 8, 8, generator=generator),
        "light": angles + torch.tensor([0.0, 0.0, 2.0]),
    }


@torch.no_grad()
def predict(model: ShadowUNet, inputs: dict, **changed) -> torch.Tensor:
    return model(**{**inputs, **changed}).sample


# --- the network ------------------------------------------------------------------------------------


def test_the_full_network_has_sdxls_parameters_less_text():
    with torch.device("meta"):
        model = ShadowUNet()
    assert sum(p.numel() for p in model.parameters()) == 2_019_019_844
    assert model.unet.conv_in.weight.shape == (320, 9, 3, 3)
    assert model.light_embedding.linear_1.weight.shape == (1280, 768)
    assert model.light_embedding.linear_2.weight.shape == (1280, 1280)
    names = [name for name, _ in model.named_parameters()]
    assert not [name for name in names if "attn2" in name or ("norm2." in name and "transformer" in name)]
    assert len({name.split(".attn1")[0] for name in names if ".attn1." in name}) == 70


def test_text_attention_is_gone_and_not_merely_silent():
    model, inputs = build(), make_inputs()
    assert not [name for name in model.state_dict() if "attn2" in name or "transformer_blocks.0.norm2" in name]

    # Two networks with text attention and the same weights: one whose attention adds nothing, one with a processor
    # that returns what it gets, which is no removal.
    reference = UNet2DConditionModel(**{**dict(model.unet.config), "cross_attention_dim": (16, 16, 16)}).eval()
    unmatched = reference.load_state_dict(model.unet.state_dict(), strict=False)
    assert not unmatched.unexpected_keys
    assert all(".attn2." in name or ".norm2." in name for name in unmatched.missing_keys)
    assert unmatched.missing_keys

    def answer(unet):
        light = model.light_embedding(embed_light(inputs["light"], "periodic"))
        stacked = torch.cat([inputs["sample"], inputs["mask"], inputs["object_latents"]], dim=1)
        return unet(stacked, inputs["timestep"], None, class_labels=light).sample

    class NoOp:
        def __call__(self, attn, hidden_states, *args, **kwargs):
            return hidden_states

    ours = predict(model, inputs)
    with torch.no_grad():
        keep = reference.attn_processors
        reference.set_attn_processor({name: NoOp() if ".attn2." in name else p for name, p in keep.items()})
        no_op = answer(reference)
        reference.set_attn_processor(keep)
        for name, parameter in reference.named_parameters():
            if ".attn2.to_out." in name:
                parameter.zero_()
        torch.testing.assert_close(answer(reference), ours)
    assert (no_op - ours).norm() > 0.05 * ours.norm()


def test_the_input_is_noisy_shadow_then_mask_then_object():
    model, inputs = build(), make_inputs()
    seen = []
    model.unet.conv_in.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    predict(model, inputs)
    assert torch.equal(seen[0], torch.cat([inputs["sample"], inputs["mask"], inputs["object_latents"]], dim=1))


@pytest.mark.parametrize("changed", ["sample", "timestep", "object_latents", "mask", "light", "step_size"])
@pytest.mark.parametrize("kind", ["periodic", "sdxl", "blob"])
def test_the_network_listens_to_each_of_its_inputs_row_by_row(kind, changed):
    model = build(light_conditioning=kind, knows_step_size=True)
    inputs = make_inputs() | {"step_size": torch.tensor([0.5, 0.25])}
    other = inputs[changed].clone()
    other[0] = other[0] * 0.5
    difference = (predict(model, inputs) - predict(model, inputs, **{changed: other})).abs().amax(dim=(1, 2, 3))
    assert difference[0] > 1e-5
    assert difference[1] == 0


def test_a_batch_gives_what_its_items_give_and_the_same_every_time():
    for overrides in ({}, {"raw_output": "sample"}, {"light_conditioning": "blob"}):
        model, inputs = build(**overrides), make_inputs(3)
        together = predict(model, inputs)
        alone = [predict(model, {name: x[i : i + 1] for name, x in inputs.items()}) for i in range(3)]
        torch.testing.assert_close(together, torch.cat(alone), atol=1e-5, rtol=1e-5)
        assert torch.equal(together, predict(build(**overrides), inputs))


def test_timesteps_are_told_on_a_scale_of_1000():
    model, inputs = build(), make_inputs()
    told = []
    model.unet.time_embedding.register_forward_pre_hook(lambda module, args: told.append(args[0]))

    def closeness(start, end):
        told.clear()
        for time in (start, end):
            predict(model, inputs, timestep=torch.tensor([time, time]))
        return float(torch.cosine_similarity(told[0][0], told[1][0], dim=0))

    # 16 channels here, 320 in SDXL: the defect of telling sigma itself shows all the same
    assert closeness(0.0, 1.0) > 0.85
    assert closeness(0.0, 1000.0) < 0.5
    # ... fractions of a step count
    assert closeness(500.0, 500.5) < 1 - 1e-3


def test_gradients_reach_every_parameter_after_one_update():
    for overrides in ({}, {"knows_step_size": True}, {"light_conditioning": "blob"}, {"light_conditioning": "sdxl"}):
        model, inputs = fresh(**overrides).train(), make_inputs()
        if overrides.get("knows_step_size"):
            inputs["step_size"] = torch.tensor([1.0, 0.25])
        optimizer = torch.optim.AdamW(model.parameters(), 1e-3)

        def without_gradient(model=model, inputs=inputs, optimizer=optimizer):
            optimizer.zero_grad()
            model(**inputs).sample.square().mean().backward()
            names = {n for n, p in model.named_parameters() if p.grad is None or not p.grad.abs().sum() > 0}
            optimizer.step()
            return names

        embeddings = [n for n in ("light_embedding", "step_embedding") if getattr(model, n) is not None]
        # behind a layer of zeros, for one update
        assert without_gradient() == {f"{n}.linear_1.{p}" for n in embeddings for p in ("weight", "bias")}
        assert without_gradient() == set()


def test_gradient_checkpointing_changes_nothing():
    grads = []
    for checkpointing in (False, True):
        model = build(knows_step_size=True).train()
        if checkpointing:
            model.enable_gradient_checkpointing()
            assert model.is_gradient_checkpointing
        model(**make_inputs(), step_size=torch.tensor([0.5, 1.0])).sample.square().sum().backward()
        grads.append([p.grad.clone() for p in model.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*grads, strict=True))


# --- light ------------------------------------------------------------------------------------------


def lights(*rows) -> torch.Tensor:
    return torch.tensor(rows, dtype=torch.float32)


def test_periodic_embedding_has_no_seam():
    start, end, beyond = embed_light(lights([30, 0, 4], [30, 360, 4], [30, 405, 4]), "periodic")
    assert torch.equal(start, end)
    torch.testing.assert_close(beyond, embed_light(lights([30, 45, 4]), "periodic")[0])
    before, after = embed_light(lights([30, 359.9, 4], [30, 0.1, 4]), "periodic")
    assert (before - after).abs().max() < 0.02
    # ... while SDXL's embedding of bare degrees has one
    start, end, near = embed_light(lights([30, 0, 4], [30, 360, 4], [30, 359, 4]), "sdxl")[:, 256:512]
    assert float(torch.cosine_similarity(start, end, dim=0)) == pytest.approx(0.31, abs=0.01)
    assert float(torch.cosine_similarity(near, end, dim=0)) == pytest.approx(0.97, abs=0.01)


@pytest.mark.parametrize("kind", ["periodic", "sdxl"])
def test_embeddings_tell_lights_apart_and_are_finite(kind):
    corners = lights(*([theta, phi, size] for theta in (0, 22, 45) for phi in (0, 90, 200) for size in (2, 5, 8)))
    features = embed_light(corners, kind)
    assert features.shape == (27, 768)
    assert features.dtype == torch.float32
    assert features.isfinite().all()
    assert features.abs().max() <= 1 + 1e-6
    assert torch.pdist(features).min() > 0.1


def test_periodic_embedding_in_numbers():
    theta, phi, size = embed_light(lights([45, 90, 5]), "periodic", harmonics=2)[0].split(256)
    root = 0.5**0.5
    # cos, sin of q and 2q with q = theta/45 * 90 degrees; of phi, then the direction on the ground; of q = 45 degrees
    torch.testing.assert_close(theta[:4], torch.tensor([0.0, -1.0, 1.0, 0.0]), atol=1e-6, rtol=0)
    torch.testing.assert_close(phi[:6], torch.tensor([0.0, -1.0, 1.0, 0.0, 0.0, root]), atol=1e-6, rtol=0)
    torch.testing.assert_close(size[:4], torch.tensor([root, 0.0, root, 1.0]), atol=1e-6, rtol=0)
    assert not theta[4:].any()
    assert not phi[6:].any()
    assert not size[4:].any()
    # an overhead light comes from nowhere on the ground, whatever phi says
    assert embed_light(lights([0, 70, 5]), "periodic", 2)[0, 256 + 4 : 256 + 6].abs().max() == 0


def test_a_trained_network_has_no_seam():
    inputs = make_inputs(1)
    start, end = lights([30, 0, 4]), lights([30, 360, 4])
    for kind, seam in (("periodic", 1e-5), ("blob", 1e-5)):
        model = build(light_conditioning=kind)
        assert (predict(model, inputs, light=start) - predict(model, inputs, light=end)).abs().max() < seam
        assert (predict(model, inputs, light=start) - predict(model, inputs, light=start + 90)).abs().max() > 1e-3
        assert predict(model, inputs, light=lights([0, 0, 2])).isfinite().all()
    model = build(light_conditioning="sdxl")
    assert (predict(model, inputs, light=start) - predict(model, inputs, light=end)).abs().max() > 1e-3


def test_light_has_no_effect_until_it_is_learnt_and_then_it_has():
    for kind in ("periodic", "sdxl"):
        model, inputs = fresh(light_conditioning=kind), make_inputs()
        other = inputs["light"] + torch.tensor([1.0, 40.0, 0.5])
        assert torch.equal(predict(model, inputs), predict(model, inputs, light=other))
        with torch.no_grad():
            model.light_embedding.linear_2.weight.normal_(std=0.1)
        assert (predict(model, inputs) - predict(model, inputs, light=other)).abs().max() > 1e-4


def test_the_blob_hangs_where_the_light_does():
    def centre(*light, size=64):
        blob = blob_map(lights(light), size, size)[0, 0]
        weights = blob / blob.sum()
        pixel = torch.arange(size) + 0.5
        return float((weights.sum(0) * pixel).sum()) - size / 2, size / 2 - float((weights.sum(1) * pixel).sum())

    away = 8 * 0.5 * 64 / 16  # r sin(30 degrees) world units, 16 across 64 pixels
    for phi, (right, up) in {0: (away, 0), 90: (0, away), 180: (-away, 0), 270: (0, -away)}.items():
        assert centre(30, phi, 2) == pytest.approx((right, up), abs=0.05)
    assert centre(0, 123, 4) == pytest.approx((0, 0), abs=1e-3)
    assert centre(45, 0, 2)[0] == pytest.approx(8 * 0.5**0.5 * 4, abs=0.05)  # the farthest still fits

    shapes = blob_map(lights([0, 0, 2], [0, 0, 4], [0, 0, 8]), 32, 64)
    assert shapes.shape == (3, 1, 32, 64)
    assert shapes.isfinite().all()
    assert shapes.min() >= 0
    assert shapes.max() <= 1
    assert (shapes.sum(dim=(1, 2, 3)).diff() > 0).all()
    # the deviation is that of a uniform square of the light's side, in either direction
    blob = blob_map(lights([0, 0, 4]), 256, 256)[0, 0]
    for axis in (0, 1):
        profile = blob.sum(axis) / blob.sum()
        world = (torch.arange(256) + 0.5) / 16 - 8
        assert float((profile * world.square()).sum().sqrt()) == pytest.approx(4 / 12**0.5, abs=0.01)


def test_the_blob_is_the_last_input_channel():
    model, inputs = build(light_conditioning="blob"), make_inputs()
    assert model.light_embedding is None
    assert model.unet.conv_in.in_channels == 10
    seen = []
    model.unet.conv_in.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    predict(model, inputs)
    assert torch.equal(seen[0][:, 9:], blob_map(inputs["light"], 8, 8))


# --- step sizes and outputs -------------------------------------------------------------------------


def test_step_size_has_no_effect_until_it_is_learnt():
    model, inputs = fresh(knows_step_size=True), make_inputs()
    whole, half = torch.ones(2), torch.full((2,), 0.5)
    assert torch.equal(predict(model, inputs, step_size=whole), predict(model, inputs, step_size=half))
    # ... nor does having it change what the network computes
    plain = fresh()
    plain.load_state_dict({n: x for n, x in model.state_dict().items() if "step" not in n})
    assert torch.equal(predict(model, inputs, step_size=whole), predict(plain, inputs))
    model(**inputs, step_size=half).sample.square().mean().backward()
    assert model.step_embedding.linear_2.weight.grad.abs().max() > 0


def test_small_steps_are_told_as_the_flows_own():
    model, inputs = build(knows_step_size=True, smallest_step=1 / 128), make_inputs()
    told = []
    model.step_embedding.register_forward_pre_hook(lambda module, args: told.append(args[0]))

    def tell(step):
        predict(model, inputs, step_size=torch.tensor([step, 1.0]))
        return told.pop()[0]

    zero = tell(0.0)
    for small in (1 / 256, 1 / 128, 0.0078126, 1 - 127 / 128):  # sigmas subtract with rounding errors
        assert torch.equal(tell(small), zero)
    assert not torch.equal(tell(1 / 64), zero)
    assert float(torch.cosine_similarity(tell(1.0), zero, dim=0)) < 0.6  # on the scale of timesteps, not as 0..1


def test_step_size_is_asked_of_those_who_know_it():
    inputs = make_inputs()
    with pytest.raises(ValueError, match="`step_size` must be given: see knows_step_size"):
        build(knows_step_size=True)(**inputs)
    with pytest.raises(ValueError, match="`step_size` must be None: see knows_step_size"):
        build()(**inputs, step_size=torch.ones(2))


def test_a_raw_sample_becomes_the_velocity_that_leads_to_it():
    raw, velocity = build(raw_output="sample"), build()
    velocity.load_state_dict(raw.state_dict())
    inputs = make_inputs(3) | {"timestep": torch.tensor([1000.0, 250.0, 10.0])}
    sample, sigma = inputs["sample"], torch.tensor([1.0, 0.25, 0.01]).reshape(-1, 1, 1, 1)
    clean = predict(velocity, inputs, sample=(1 - sigma) * sample)  # the same blocks, fed with less of the noise
    output = predict(raw, inputs)
    sigma = sigma.clamp(min=0.05)
    torch.testing.assert_close(output, (sample - clean) / sigma)
    # a step to sigma = 0 arrives there
    torch.testing.assert_close((sample - sigma * output)[:2], clean[:2], atol=1e-5, rtol=1e-5)
    # ... from noise alone always at the same place
    there = sample - predict(raw, inputs, sample=sample, timestep=torch.full((3,), 1000.0))
    again = 2 * sample - predict(raw, inputs, sample=2 * sample, timestep=torch.full((3,), 1000.0))
    torch.testing.assert_close(there, again, atol=1e-5, rtol=0)


def test_output_as_tuple_and_in_half_precision():
    model, inputs = build(), make_inputs()
    assert torch.equal(model(**inputs, return_dict=False)[0], model(**inputs).sample)
    floats = {"sample", "object_latents", "mask"}
    for overrides in ({}, {"raw_output": "sample"}, {"light_conditioning": "blob"}):
        model = build(**overrides)
        half = {name: x.bfloat16() if name in floats else x for name, x in inputs.items()}
        expected, output = predict(model, inputs), predict(model.to(torch.bfloat16), half)
        assert output.dtype == torch.bfloat16
        assert (output.float() - expected).norm() < 0.1 * expected.norm()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"light_conditioning": "text"}, "`light_conditioning` must be 'periodic', 'sdxl' or 'blob', got 'text'"),
        ({"raw_output": "noise"}, "`raw_output` must be 'velocity' or 'sample', got 'noise'"),
        ({"prediction_type": "v"}, "`prediction_type` must be 'flow', 'epsilon', .* got 'v'"),
        ({"prediction_type": "epsilon", "knows_step_size": True}, "`prediction_type` 'epsilon' has no step sizes"),
        ({"prediction_type": "sample", "raw_output": "sample"}, "'sample' has no .* `raw_output` of its own"),
    ],
)
def test_settings_that_make_no_network_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        fresh(**arguments)


# --- files ------------------------------------------------------------------------------------------


@pytest.fixture
def diffusers_warnings(caplog):
    """What diffusers warns of: its logger keeps to itself otherwise."""
    diffusers_logging.enable_propagation()
    yield lambda: [r.getMessage() for r in caplog.records if r.levelno >= logging.WARNING]
    diffusers_logging.disable_propagation()


def as_lists(config) -> dict:
    return {
        name: list(value) if isinstance(value, (list, tuple)) else value
        for name, value in config.items()
        if not name.startswith("_")
    }


@pytest.mark.parametrize(
    "overrides",
    [
        {},
        {"light_conditioning": "blob", "fill": 1.0},
        {"knows_step_size": True, "smallest_step": 1 / 64, "raw_output": "sample", "light_harmonics": 5},
        {"prediction_type": "v_prediction", "light_conditioning": "sdxl"},
    ],
)
def test_saving_and_loading_gives_the_same_network(overrides, tmp_path, diffusers_warnings):
    model, inputs = build(**overrides), make_inputs()
    if model.config.knows_step_size:
        inputs["step_size"] = torch.tensor([0.5, 1.0])
    model.save_pretrained(tmp_path)
    loaded, report = ShadowUNet.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(report.values()), report
    assert diffusers_warnings() == []
    assert as_lists(loaded.config) == as_lists(model.config)
    weights, others = model.state_dict(), loaded.state_dict()
    assert list(weights) == list(others)
    assert all(torch.equal(weights[name], others[name]) for name in weights)
    # Weights mapped from a file lie at other addresses, where BLAS may round differently; at these, not a bit differs.
    loaded.load_state_dict(weights, assign=True)
    assert torch.equal(predict(model, inputs), predict(loaded, inputs))


@pytest.fixture(scope="module")
def sdxl(tmp_path_factory):
    """A tiny checkpoint in the official layout, and its UNet."""
    folder = tmp_path_factory.mktemp("sdxl")
    return folder, write_sdxl(folder)


def test_an_sdxl_checkpoint_is_copied_tensor_by_tensor(sdxl, diffusers_warnings):
    folder, source = sdxl
    model = ShadowUNet.from_sdxl(folder)
    assert diffusers_warnings() == []
    assert as_lists(model.config)["transformer_layers_per_block"] == [1, 2, 3]
    assert model.config.latent_channels == 4
    ours, theirs = model.unet.state_dict(), source.state_dict()
    for name, tensor in ours.items():
        if name != "conv_in.weight":
            assert torch.equal(tensor, theirs[name]), name
    left_out = {name for name in theirs if name not in ours}
    assert all(".attn2." in name or ".norm2." in name or name.startswith("add_embedding.") for name in left_out)
    assert sum(".attn2.to_q." in name for name in left_out) == sum(".attn1.to_q." in name for name in theirs) > 0

    assert model.unet.conv_in.weight.shape[1] == 9
    assert torch.equal(model.unet.conv_in.weight[:, :4], source.conv_in.weight)
    assert not model.unet.conv_in.weight[:, 4:].any()
    assert torch.equal(model.unet.conv_in.bias, source.conv_in.bias)
    assert all(p.requires_grad and p.dtype == torch.float32 for p in model.parameters())
    assert not any("attn2" in name or "add_embedding" in name for name, _ in model.named_parameters())


def test_the_first_prediction_is_sdxls_without_text(sdxl):
    folder, source = sdxl
    model, inputs = ShadowUNet.from_sdxl(folder, knows_step_size=True), make_inputs()
    inputs["step_size"] = torch.ones(2)
    output = predict(model, inputs)
    changes = {
        "light": lights([0, 0, 2], [45, 300, 8]),
        "mask": 1 - inputs["mask"],
        "object_latents": inputs["object_latents"].flip(0),
        "step_size": torch.tensor([0.5, 0.0]),
    }
    for name, value in changes.items():
        assert torch.equal(predict(model, inputs, **{name: value}), output), name
    assert not torch.equal(predict(model, inputs, sample=inputs["sample"].flip(0)), output)

    # the checkpoint's own arithmetic: no text, a picture of PICTURE_SIZE, and text attention that adds nothing
    sizes = torch.tensor([[PICTURE_SIZE, PICTURE_SIZE, 0.0, 0.0, PICTURE_SIZE, PICTURE_SIZE]])
    added = {"text_embeds": torch.zeros(1, 10), "time_ids": sizes}
    with torch.no_grad():
        bias = source.get_aug_embed(torch.zeros(1, 32), None, added)[0]
        torch.testing.assert_close(model.light_embedding.linear_2.bias, bias)
        assert not model.light_embedding.linear_2.weight.any()
        assert model.light_embedding.linear_1.weight.any()
        assert not model.step_embedding.linear_2.bias.any()
        reference = UNet2DConditionModel.from_pretrained(folder / "unet")
        for name, parameter in reference.named_parameters():
            if ".attn2.to_out." in name:
                parameter.zero_()
        added = {name: x.expand(2, -1) for name, x in added.items()}
        expected = reference(inputs["sample"], inputs["timestep"], torch.randn(2, 3, 12), added_cond_kwargs=added)
    torch.testing.assert_close(output, expected.sample, atol=1e-4, rtol=1e-4)


def test_gradients_reach_the_new_parts_of_a_copied_network(sdxl):
    model = ShadowUNet.from_sdxl(sdxl[0]).train()
    optimizer = torch.optim.AdamW(model.parameters(), 1e-3)
    for _ in range(2):
        optimizer.zero_grad()
        model(**make_inputs()).sample.square().mean().backward()
        optimizer.step()
    assert [name for name, p in model.named_parameters() if p.grad is None or not p.grad.any()] == []
    assert model.unet.conv_in.weight[:, 4:].any()


def test_new_parts_are_settings_and_survive_saving(sdxl, tmp_path):
    settings = {"light_conditioning": "blob", "knows_step_size": True, "raw_output": "sample", "fill": 0.2}
    model, inputs = ShadowUNet.from_sdxl(sdxl[0], **settings), make_inputs()
    assert {name: model.config[name] for name in settings} == settings
    assert model.unet.conv_in.weight.shape[1] == 10
    assert not model.unet.conv_in.weight[:, 4:].any()
    model.save_pretrained(tmp_path)
    loaded = ShadowUNet.from_pretrained(tmp_path)
    assert loaded.config.attention_head_dim == [1, 2, 4]
    loaded.load_state_dict(model.state_dict(), assign=True)
    inputs["step_size"] = torch.ones(2)
    assert torch.equal(predict(model, inputs), predict(loaded, inputs))


def test_a_half_precision_checkpoint_becomes_single_precision(tmp_path):
    source = write_sdxl(tmp_path, torch.float16)
    model = ShadowUNet.from_sdxl(tmp_path)
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    assert torch.equal(model.unet.mid_block.resnets[0].conv1.weight, source.mid_block.resnets[0].conv1.weight)
    assert predict(model, make_inputs()).isfinite().all()


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ({"addition_embed_type": None}, "is not an SDXL checkpoint: its UNet has no embedding of text"),
        ({"in_channels": 9}, "is not an SDXL base checkpoint: its UNet maps 9 channels to 4"),
    ],
)
def test_other_checkpoints_are_refused_in_one_line(tmp_path, overrides, message):
    write_sdxl(tmp_path, **overrides)
    with pytest.raises(ValueError, match=message) as error:
        ShadowUNet.from_sdxl(tmp_path)
    assert "\n" not in str(error.value)
    assert str(tmp_path) in str(error.value)


def test_the_shape_of_a_checkpoint_cannot_be_set(sdxl):
    for setting in ({"norm_num_groups": 2}, {"latent_channels": 16}, {"block_out_channels": (8, 8, 8)}):
        with pytest.raises(ValueError, match=f"`{next(iter(setting))}` is the checkpoint's: only new parts can be set"):
            ShadowUNet.from_sdxl(sdxl[0], **setting)
