"""ShadowSDXLPipeline: steps in closed form, pictures of any shape in and out, compositing, error texts."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL, DDIMScheduler, FlowMatchEulerDiscreteScheduler
from PIL import Image, ImageDraw

from backlot.codecs import PixelCodec
from data_prep.shadows.dataset import ShadowDataset
from pipelines.shadow_sdxl import ShadowSDXLPipeline, ShadowUNet, composite, create_scheduler
from pipelines.shadow_sdxl.pipeline import prepare

SIDE = 16  # pixels: latents of 8 x 8, two pixels each way
CONFIG = {
    "sample_size": 8,
    "latent_channels": 12,
    "block_out_channels": (16, 16, 16),
    "layers_per_block": 1,
    "transformer_layers_per_block": 1,
    "attention_head_dim": (1, 1, 1),
    "norm_num_groups": 8,
}


def build(**overrides) -> ShadowSDXLPipeline:
    """A small pipeline whose network listens to all it is told."""
    torch.manual_seed(0)
    unet = ShadowUNet(**{**CONFIG, **overrides}).eval()
    with torch.no_grad():
        for parameter in unet.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    return quiet(ShadowSDXLPipeline(unet, PixelCodec(block_size=2), create_scheduler(unet.config.prediction_type)))


def quiet(pipeline: ShadowSDXLPipeline) -> ShadowSDXLPipeline:
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


@pytest.fixture
def pipeline():
    return build()


class Network:
    """Takes the place of a network's forward and keeps what it was told."""

    def __init__(self, pipeline: ShadowSDXLPipeline, answer):
        self.answer, self.calls = answer, []
        pipeline.unet.forward = self

    def __call__(self, sample, timestep, object_latents, mask, light, step_size=None):
        call = {"sample": sample, "timestep": timestep, "object_latents": object_latents, "mask": mask}
        self.calls.append(call | {"light": light, "step_size": step_size})
        return type("Output", (), {"sample": self.answer(**self.calls[-1])})


def picture(size=(SIDE, SIDE), box=(5, 5, 10, 12), colour=(220, 60, 30), seed=0) -> Image.Image:
    """A box of one colour on noise that only its alpha channel tells from it."""
    noise = np.random.default_rng(seed).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    image, alpha = Image.fromarray(noise), Image.new("L", size)
    ImageDraw.Draw(image).rectangle(box, colour)
    ImageDraw.Draw(alpha).rectangle(box, 255)
    image.putalpha(alpha)
    return image


def noise(count: int = 1, channels: int = 12, seed: int = 0) -> torch.Tensor:
    return torch.randn(count, channels, 8, 8, generator=torch.Generator().manual_seed(seed))


def generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def pixels(image: Image.Image) -> np.ndarray:
    return np.asarray(image, np.float32) / 255


# --- steps ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("steps", [1, 2, 4, 20])
def test_steps_are_eulers_and_those_of_the_stock_scheduler(pipeline, steps):
    told = Network(pipeline, ShadowUNet.forward.__get__(pipeline.unet))
    told.answer = lambda forward=told.answer, **call: forward(**call).sample
    settings = {"theta": 20, "phi": 200, "size": 3, "latents": noise(), "num_inference_steps": steps}
    result = pipeline(picture(), **settings, output_type="latent").images
    given = {name: told.calls[0][name] for name in ("object_latents", "mask", "light")}
    assert given["light"].tolist() == [[20, 200, 3]]
    del pipeline.unet.forward

    scheduler = FlowMatchEulerDiscreteScheduler(shift=1.0)
    scheduler.set_timesteps(sigmas=np.linspace(1, 1 / steps, steps))
    by_hand = by_scheduler = noise()
    times = torch.linspace(1, 0, steps + 1)
    with torch.no_grad():
        for i in range(steps):
            output = pipeline.unet(by_hand, 1000 * times[i : i + 1], **given).sample
            by_hand = by_hand - (times[i] - times[i + 1]) * output
            output = pipeline.unet(by_scheduler, scheduler.timesteps[i : i + 1], **given).sample
            by_scheduler = scheduler.step(output, scheduler.timesteps[i], by_scheduler).prev_sample
    torch.testing.assert_close(result, by_hand, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(result, by_scheduler, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(
        torch.stack([call["timestep"][0] for call in told.calls]), 1000 * times[:-1], atol=1e-3, rtol=0
    )


def test_steps_of_any_length(pipeline):
    network = Network(pipeline, lambda sample, timestep, **_: sample * timestep[0] / 1000)
    sigmas = [1.0, 0.7, 0.1]
    result = pipeline(picture(), latents=noise(), sigmas=sigmas, output_type="latent").images
    expected = noise()
    for sigma, following in ((1.0, 0.7), (0.7, 0.1), (0.1, 0.0)):
        expected = expected - (sigma - following) * expected * sigma
    torch.testing.assert_close(result, expected)
    assert [float(call["timestep"][0]) for call in network.calls] == pytest.approx([1000, 700, 100])
    assert all(call["step_size"] is None for call in network.calls)


def test_a_network_that_knows_step_sizes_is_told_them():
    pipeline = build(knows_step_size=True, smallest_step=1 / 128)
    network = Network(pipeline, lambda sample, **_: sample * 0)
    pipeline(picture(), phi=[0, 90], num_inference_steps=4)
    pipeline(picture(), phi=[0, 90], sigmas=[1, 0.75, 0.2])
    sizes = [call["step_size"].tolist() for call in network.calls]
    assert all(a == b for a, b in sizes)
    assert [a for a, _ in sizes] == pytest.approx([0.25] * 4 + [0.25, 0.55, 0.2])
    assert [call["timestep"].tolist()[1] for call in network.calls] == pytest.approx(
        [1000, 750, 500, 250, 1000, 750, 200]
    )
    # ... and the real one takes them
    del pipeline.unet.forward
    one, four = (pipeline(picture(), latents=noise(), num_inference_steps=n, output_type="pt").images for n in (1, 4))
    assert (one - four).abs().max() > 1e-3


@pytest.mark.parametrize("steps", [1, 2, 7, 20])
def test_the_true_velocity_leads_to_the_shadow(pipeline, steps):
    shadow = torch.rand(1, 1, SIDE, SIDE, generator=generator(3))
    clean = pipeline.encode(shadow.expand(-1, 3, -1, -1) * 2 - 1)
    Network(pipeline, lambda **_: noise() - clean)
    result = pipeline(picture(), latents=noise(), num_inference_steps=steps, output_type="pt").images
    torch.testing.assert_close(result, shadow, atol=1e-5, rtol=0)


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction", "sample"])
@pytest.mark.parametrize("steps", [1, 4, 20])
def test_the_true_denoiser_leads_to_the_shadow(prediction_type, steps):
    pipeline = build(prediction_type=prediction_type)
    assert isinstance(pipeline.scheduler, DDIMScheduler)
    shadow = torch.rand(1, 1, SIDE, SIDE, generator=generator(3))
    clean = pipeline.encode(shadow.expand(-1, 3, -1, -1) * 2 - 1)
    betas = torch.linspace(0.00085**0.5, 0.012**0.5, 1000) ** 2  # SDXL's schedule
    squares = torch.cumprod(1 - betas, dim=0)

    def answer(sample, timestep, **_):
        alpha, sigma = squares[timestep[0]].sqrt(), (1 - squares[timestep[0]]).sqrt()
        epsilon = (sample - alpha * clean) / sigma
        return {"epsilon": epsilon, "v_prediction": alpha * epsilon - sigma * clean, "sample": clean}[prediction_type]

    network = Network(pipeline, answer)
    result = pipeline(picture(), latents=noise(), num_inference_steps=steps, output_type="pt").images
    torch.testing.assert_close(result, shadow, atol=1e-4, rtol=0)
    assert [int(call["timestep"][0]) for call in network.calls] == [999 - i * 1000 // steps for i in range(steps)]
    # ... wherever its latents lie
    clean = 3 * noise(seed=7)
    result = pipeline(picture(), latents=noise(), num_inference_steps=steps, output_type="latent").images
    torch.testing.assert_close(result, clean, atol=1e-3, rtol=0)
    del pipeline.unet.forward
    assert pipeline(picture(), num_inference_steps=steps, output_type="pt").images.isfinite().all()


def test_each_light_has_its_shadow_and_a_full_turn_none_of_its_own(pipeline):
    settings = {"latents": noise(6), "output_type": "pt"}
    settings["latents"][:] = settings["latents"][:1]
    maps = pipeline(picture(), phi=[0, 360, 90, 450, -270, 180], **settings).images
    torch.testing.assert_close(maps[1], maps[0], atol=1e-5, rtol=0)
    torch.testing.assert_close(maps[3], maps[2], atol=1e-5, rtol=0)
    torch.testing.assert_close(maps[4], maps[2], atol=1e-5, rtol=0)
    assert (maps[2] - maps[0]).abs().max() > 1e-3
    assert (maps[5] - maps[0]).abs().max() > 1e-3
    network = Network(pipeline, lambda sample, **_: sample)
    pipeline(picture(), phi=[0, 360, -90, 500])
    assert network.calls[0]["light"][:, 1].tolist() == [0, 360, 270, 140]  # what the network was trained on


# --- batches ----------------------------------------------------------------------------------------


def encoded_rows(pipeline) -> list[int]:
    """How many pictures each call of the VAE's encoder gets."""
    rows, encode = [], pipeline.vae.encode
    pipeline.vae.encode = lambda x, *args, **kwargs: (rows.append(len(x)), encode(x, *args, **kwargs))[1]
    return rows


def test_many_lights_give_what_each_gives_and_encode_the_object_once(pipeline):
    lights = {"theta": [0, 15, 30, 45], "phi": [0, 120, 240, 300], "size": [2, 4, 6, 8]}
    rows = encoded_rows(pipeline)
    together = pipeline(picture(), **lights, latents=noise(4), num_inference_steps=2, output_type="pt").images
    assert rows == [1]
    for i in range(4):
        light = {name: values[i] for name, values in lights.items()}
        alone = pipeline(picture(), **light, latents=noise(4)[i : i + 1], num_inference_steps=2, output_type="pt")
        torch.testing.assert_close(together[i : i + 1], alone.images, atol=1e-5, rtol=0)
    assert len({float(x.sum()) for x in together}) == 4


def test_lists_are_paired_and_singles_serve_all(pipeline):
    network = Network(pipeline, lambda sample, object_latents, **_: sample - object_latents)
    first, second = picture(), picture(box=(1, 2, 8, 4), colour=(10, 90, 200))
    rows = encoded_rows(pipeline)
    a, b = (pipeline(x, output_type="np").images[0] for x in (first, second))
    assert np.abs(a - b).max() > 0.1
    both = pipeline([first, second], theta=[10, 20], size=3, output_type="np").images
    np.testing.assert_allclose(both, [a, b], atol=1e-6)
    assert network.calls[-1]["light"].tolist() == [[10, 45, 3], [20, 45, 3]]
    assert rows == [1, 1, 2]
    same = pipeline([first], phi=[0, 90, 180], theta=[5], output_type="np").images
    np.testing.assert_allclose(same, [a, a, a], atol=1e-6)
    assert network.calls[-1]["light"].tolist() == [[5, 0, 4], [5, 90, 4], [5, 180, 4]]
    # masks go with their images, also where only some have one
    mixed = pipeline([first, second.convert("RGB")], [None, second.getchannel("A")], output_type="np").images
    np.testing.assert_allclose(mixed, [a, b], atol=1e-6)


def test_adding_a_map_never_changes_the_others(pipeline):
    lights = [0, 50, 100, 150]
    settings = {"output_type": "pt", "num_inference_steps": 2}
    two, four = (
        pipeline(picture(), phi=lights[:n], generator=[generator(i) for i in range(n)], **settings).images
        for n in (2, 4)
    )
    torch.testing.assert_close(four[:2], two, atol=1e-5, rtol=0)
    one = pipeline(picture(), phi=lights[3], generator=generator(3), **settings).images
    torch.testing.assert_close(four[3:], one, atol=1e-5, rtol=0)
    assert torch.equal(one, pipeline(picture(), phi=lights[3], generator=generator(3), **settings).images)
    assert not torch.equal(one, pipeline(picture(), phi=lights[3], generator=generator(4), **settings).images)


# --- pictures ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", ["RGBA", "LA", "P"])
def test_an_alpha_channel_is_the_mask(pipeline, mode, caplog):
    network = Network(pipeline, lambda sample, **_: sample)
    image = picture(colour=(120, 120, 120))
    image = image.quantize(8) if mode == "P" else image.convert(mode)  # a palette may have a transparent colour
    assert image.mode == mode
    alpha = image.convert("RGBA").getchannel("A")
    pipeline(image)
    pipeline(image.convert("RGB"), alpha)
    pipeline(image, alpha)
    by_alpha, by_mask, by_both = network.calls
    for name in ("object_latents", "mask"):
        assert torch.equal(by_alpha[name], by_mask[name])
        assert torch.equal(by_alpha[name], by_both[name])
    assert 0.1 < by_alpha["mask"].mean() < 0.3
    assert not caplog.records


def test_what_lies_behind_the_object_has_no_influence():
    for fill in (0.5, 0.0, 0.8):
        pipeline = build(fill=fill)
        network = Network(pipeline, lambda sample, object_latents, **_: sample - object_latents)
        one, two = (pipeline(picture(seed=s), latents=noise(), output_type="np").images[0] for s in (1, 2))
        assert np.array_equal(one, two)
        assert network.calls[0]["mask"].unique().numel() > 2  # soft where the box cuts a latent
        np.testing.assert_allclose(one[0], fill, atol=1e-6)
        np.testing.assert_allclose(one[5:13, 5:11], np.mean([220, 60, 30]) / 255, atol=1e-6)


def test_soft_masks_stay_soft(pipeline):
    network = Network(pipeline, lambda sample, object_latents, **_: sample - object_latents)
    image, mask = Image.new("RGB", (SIDE, SIDE), "white"), Image.new("L", (SIDE, SIDE), 51)
    result = pipeline(image, mask, output_type="np").images
    torch.testing.assert_close(network.calls[0]["mask"], torch.full((1, 1, 8, 8), 0.2))
    np.testing.assert_allclose(result, 0.2 + 0.8 * 0.5, atol=1e-6)
    # a line one pixel thin is no more than half of the latents it crosses, and no less
    mask = Image.new("L", (SIDE, SIDE))
    mask.paste(255, (0, 3, SIDE, 4))
    pipeline(image, mask)
    assert network.calls[1]["mask"][0, 0, :, 0].tolist() == [0, 0.5, 0, 0, 0, 0, 0, 0]


def test_a_missing_mask_is_guessed_with_a_warning(pipeline, caplog):
    network = Network(pipeline, lambda sample, **_: sample)
    image = Image.new("RGB", (SIDE, SIDE), (30, 200, 30))
    image.paste((200, 40, 40), (4, 4, 12, 10))
    pipeline(image)
    assert [record.levelname for record in caplog.records] == ["WARNING"]
    assert "neither mask nor alpha" in caplog.text
    expected = torch.zeros(8, 8)
    expected[2:5, 2:6] = 1
    assert torch.equal(network.calls[0]["mask"][0, 0], expected)


@pytest.mark.parametrize("size", [(32, 20), (20, 32), (21, 16), (16, 9), (13, 13), (40, 6), (300, 7)])
def test_training_and_inference_see_the_same_square(pipeline, tmp_path, size):
    """A file that the data set reads and a picture that a user gives become the same tensors."""
    image = picture(size, (2, 2, size[0] // 2, size[1] // 2))
    ramp = np.linspace(0, 255, size[0] * size[1]).reshape(size[::-1]).astype(np.uint8)
    image.putalpha(Image.fromarray(ramp))  # soft edges, too
    for folder, file in {"objects": image, "masks": image.getchannel("A"), "shadows": Image.new("L", size)}.items():
        (tmp_path / folder).mkdir()
        file.save(tmp_path / folder / "a.png")
    (tmp_path / "metadata.json").write_text(json.dumps({"a": {"theta": 20, "phi": 200, "size": 3}}))
    fill = pipeline.unet.config.fill
    item = ShadowDataset(tmp_path, split="all", image_size=SIDE, fill=fill)[0]
    prepared = prepare(image, None, SIDE, fill)
    assert torch.equal(prepared.pixel_values, item["object_image"])
    assert torch.equal(prepared.mask, item["mask"])
    assert torch.equal(prepare(image, image.getchannel("A"), SIDE, fill).pixel_values, item["object_image"])


@pytest.mark.parametrize("size", [(16, 9), (9, 16), (16, 15), (16, 5)])
def test_a_picture_of_any_shape_is_one_padded_to_a_square(pipeline, size):
    image = picture(size, (2, 2, size[0] // 2, size[1] // 2))
    side = max(size)
    left, top = (side - size[0]) // 2, (side - size[1]) // 2
    padded = Image.new("RGBA", (side, side), (255, 0, 255, 0))
    padded.paste(image, (left, top))
    settings = {"latents": noise(), "output_type": "np"}
    shadow, square = pipeline(image, **settings).images, pipeline(padded, **settings).images
    assert shadow.shape == (1, size[1], size[0])
    assert square.shape == (1, side, side)
    assert np.array_equal(shadow[0], square[0, top : top + size[1], left : left + size[0]])
    assert pipeline(image).images[0].size == size


@pytest.mark.parametrize("size", [(64, 32), (32, 64), (16, 10), (9, 16)])
def test_shapes_keep_their_aspect_and_place(pipeline, size):
    network = Network(pipeline, lambda sample, object_latents, **_: sample - object_latents)
    image = Image.new("RGBA", size)
    disc = np.array([[size[0] * 0.25, size[1] * 0.25], [0, 0]])
    disc[1] = disc[0] + min(size) / 2
    ImageDraw.Draw(image).ellipse(disc.ravel().tolist(), (255, 255, 255, 255))
    shadow = pipeline(image, output_type="np").images[0]
    alpha = pixels(image.getchannel("A"))
    assert shadow.shape == alpha.shape
    if SIDE in size:  # no resampling: what goes in comes out
        np.testing.assert_allclose(shadow, 0.5 + 0.5 * alpha, atol=1e-6)
    weight = shadow - 0.5
    for axis in (0, 1):
        place, spread = (moments(x.sum(axis)) for x in (weight, alpha))
        assert place == pytest.approx(spread, abs=0.6)
    # the bars hold nothing but what resampling smears over their edge
    call = network.calls[0]
    grey = pipeline.decode(call["object_latents"])[0, 0] - 0.5
    mask = call["mask"][0, 0].repeat_interleave(2, 0).repeat_interleave(2, 1)
    bar = (SIDE - min(size) * SIDE // max(size)) // 2 - 1
    for square in (grey, mask):
        square = square if size[0] > size[1] else square.T
        assert square[: bar - 1].abs().max() < 1e-6
        assert square[1 - bar :].abs().max() < 1e-6
        assert square.abs().max() > 0.4


def moments(profile) -> tuple[float, float]:
    place = np.arange(len(profile)) + 0.5
    mean = float((profile * place).sum() / profile.sum())
    return mean, math.sqrt(float((profile * (place - mean) ** 2).sum() / profile.sum()))


def test_fine_patterns_become_their_mean_and_not_some_of_their_pixels(pipeline):
    network = Network(pipeline, lambda sample, object_latents, **_: sample - object_latents)
    pattern = np.indices((4 * SIDE, 4 * SIDE)).sum(0) % 2 * 255
    image = Image.fromarray(pattern.astype(np.uint8)).convert("RGB")
    inside = pipeline(image, Image.fromarray(pattern.astype(np.uint8)), output_type="np").images[0, 16:-16, 16:-16]
    np.testing.assert_allclose(inside, 0.75, atol=0.02)  # white on grey, half of each
    torch.testing.assert_close(network.calls[0]["mask"], torch.full((1, 1, 8, 8), 0.5))


def test_maps_of_small_pictures_are_means_too(pipeline):
    columns = (torch.arange(SIDE) % 4 == 0).float().expand(1, 3, SIDE, SIDE)
    clean = pipeline.encode(columns * 2 - 1)
    Network(pipeline, lambda sample, **_: sample - clean)
    inside = pipeline(picture((4, 4), (1, 1, 2, 2)), output_type="np").images[0, :, 1:-1]
    np.testing.assert_allclose(inside, 0.25, atol=0.02)


def test_tensors_are_taken_as_they_are(pipeline):
    image, mask = torch.rand(3, SIDE, SIDE) * 2 - 1, torch.rand(1, SIDE, SIDE).round()
    network = Network(pipeline, lambda sample, **_: sample)
    shadow = pipeline([image, -image], [mask, 1 - mask], output_type="pt").images
    assert shadow.shape == (2, 1, SIDE, SIDE)
    torch.testing.assert_close(pipeline.decode(network.calls[0]["object_latents"])[0, 0], (image.mean(0) + 1) / 2)
    pooled = torch.nn.functional.avg_pool2d(mask, 2)
    torch.testing.assert_close(network.calls[0]["mask"], torch.stack([pooled, 1 - pooled]))


def test_another_resolution(pipeline):
    network = Network(pipeline, lambda sample, **_: sample)
    assert pipeline.resolution == SIDE
    assert pipeline(picture((20, 30)), resolution=32, output_type="np").images.shape == (1, 30, 20)
    assert network.calls[0]["sample"].shape == (1, 12, 16, 16)
    del pipeline.unet.forward
    assert pipeline(picture((20, 30)), resolution=24)[0][0].size == (20, 30)


def constant(pipeline, value: float):
    """Makes the pipeline's shadow `value` everywhere."""
    Network(pipeline, lambda sample, **_: sample - (2 * value - 1))


def test_intensity_scales_and_clips(pipeline):
    def cast(**settings):
        values = pipeline(picture(), output_type="np", **settings).images
        assert np.ptp(values) < 1e-6
        return float(values.mean())

    constant(pipeline, 0.6)
    assert cast() == pytest.approx(0.6)
    assert cast(intensity=0.5) == pytest.approx(0.3)
    assert cast(intensity=0) == 0
    assert cast(intensity=2) == 1
    constant(pipeline, 1.4)  # a network overshoots: that is full shadow, of half the strength
    assert cast() == 1
    assert cast(intensity=0.5) == pytest.approx(0.5)
    constant(pipeline, -0.4)
    assert cast(intensity=3) == 0


def test_output_types_and_tuple(pipeline):
    settings = {"phi": [0, 90], "latents": noise(2)}
    image = picture((SIDE, 12))
    array = pipeline(image, output_type="np", **settings).images
    assert array.shape == (2, 12, SIDE)
    assert array.dtype == np.float32
    tensor = pipeline(image, output_type="pt", **settings).images
    assert tensor.shape == (2, 1, 12, SIDE)
    np.testing.assert_array_equal(tensor[:, 0].numpy(), array)
    images = pipeline(image, **settings).images
    assert [x.mode for x in images] == ["L", "L"]
    np.testing.assert_array_equal(np.stack([np.asarray(x) for x in images]), (array * 255).round())
    latents = pipeline(image, output_type="latent", **settings, return_dict=False)[0]
    assert latents.shape == (2, 12, 8, 8)
    np.testing.assert_allclose(pipeline.decode(latents).clamp(0, 1)[:, 0, 2:14].numpy(), array, atol=1e-6)
    sizes = [x.size for x in pipeline([image, picture((10, 20))]).images]
    assert sizes == [(SIDE, 12), (10, 20)]


def test_the_callback_sees_and_may_change_every_step(pipeline):
    seen = []

    def callback(pipe, index, timestep, tensors):
        seen.append((pipe, index, float(timestep), list(tensors)))
        return {"latents": torch.full_like(tensors["latents"], index)}

    result = pipeline(picture(), num_inference_steps=4, callback_on_step_end=callback, output_type="latent").images
    assert seen == [(pipeline, i, 1000 - 250 * i, ["latents"]) for i in range(4)]
    assert torch.equal(result, torch.full_like(result, 3))
    untouched = pipeline(picture(), latents=noise(), callback_on_step_end=lambda *_: {}, output_type="latent").images
    assert torch.equal(untouched, pipeline(picture(), latents=noise(), output_type="latent").images)


# --- VAE, precision, files --------------------------------------------------------------------------


def test_a_real_vae_is_used_with_its_own_scaling_factor():
    torch.manual_seed(0)
    vae = AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        block_out_channels=(8, 8),
        norm_num_groups=4,
        latent_channels=4,
        scaling_factor=0.3,
        shift_factor=0.1,
    ).eval()
    unet = ShadowUNet(**{**CONFIG, "latent_channels": 4})
    pipeline = quiet(ShadowSDXLPipeline(unet, vae, create_scheduler("flow")))
    assert pipeline.resolution == SIDE
    clean = noise(channels=4, seed=5)
    network = Network(pipeline, lambda sample, **_: sample - clean)
    image, mask = torch.rand(3, SIDE, SIDE) * 2 - 1, torch.ones(1, SIDE, SIDE)
    shadow = pipeline(image, mask, phi=[0, 10], output_type="pt").images
    with torch.no_grad():
        mode = vae.encode(image[None]).latent_dist.mode()
        decoded = vae.decode(clean / 0.3 + 0.1).sample.mean(1, keepdim=True)
    torch.testing.assert_close(network.calls[0]["object_latents"], ((mode - 0.1) * 0.3).expand(2, -1, -1, -1))
    torch.testing.assert_close(shadow, (decoded / 2 + 0.5).clamp(0, 1).expand(2, -1, -1, -1))
    # the mode and not a draw: nothing random but the noise
    del unet.forward
    one, two = (pipeline(picture(), latents=noise(channels=4), output_type="pt").images for _ in range(2))
    assert torch.equal(one, two)


def test_a_half_precision_vae_that_would_overflow_is_used_in_float32():
    vae = AutoencoderKL(block_out_channels=(8,), norm_num_groups=4, force_upcast=True)
    pipeline = quiet(ShadowSDXLPipeline(ShadowUNet(**{**CONFIG, "latent_channels": 4}), vae, create_scheduler("flow")))
    vae.to(torch.float16)
    Network(pipeline, lambda sample, **_: sample)
    assert pipeline(torch.zeros(3, 8, 8), torch.ones(1, 8, 8), output_type="pt").images.isfinite().all()
    assert vae.dtype == torch.float32


@pytest.mark.parametrize("overrides", [{}, {"raw_output": "sample"}, {"light_conditioning": "blob"}])
def test_bf16_works(overrides):
    pipeline = build(**overrides)
    expected = pipeline(picture(), latents=noise(), output_type="np", num_inference_steps=2).images
    halved = pipeline.to(torch.bfloat16)
    assert halved.unet.dtype == torch.bfloat16
    images = halved(picture(), latents=noise(), output_type="np", num_inference_steps=2).images
    assert images.dtype == np.float32
    assert np.abs(images - expected).mean() < 0.05
    assert halved(picture(), phi=[0, 90], generator=[generator(i) for i in range(2)]).images[1].size == (SIDE, SIDE)


def test_every_network_has_its_turn_when_offloaded(pipeline):
    turns = pipeline.model_cpu_offload_seq.split("->")
    assert set(turns) == {name for name, part in pipeline.components.items() if isinstance(part, torch.nn.Module)}


@pytest.mark.parametrize("overrides", [{}, {"knows_step_size": True}, {"prediction_type": "v_prediction"}])
def test_saving_and_loading_gives_the_same_shadows(overrides, tmp_path):
    pipeline = build(**overrides)
    pipeline.save_pretrained(tmp_path)
    index = json.loads((tmp_path / "model_index.json").read_text())
    assert index["_class_name"] == "ShadowSDXLPipeline"
    assert index["unet"] == ["pipelines.shadow_sdxl.unet", "ShadowUNet"]
    assert index["vae"] == ["backlot.codecs", "PixelCodec"]
    assert index["scheduler"][0] == "diffusers"
    loaded = quiet(ShadowSDXLPipeline.from_pretrained(tmp_path))
    assert type(loaded.unet) is ShadowUNet
    assert dict(loaded.scheduler.config).items() >= {"num_train_timesteps": 1000}.items()
    for steps in (1, 4):
        settings = {"num_inference_steps": steps, "output_type": "pt", "phi": [0, 200]}
        ours, theirs = (p(picture(), generator=generator(0), **settings).images for p in (pipeline, loaded))
        torch.testing.assert_close(theirs, ours, atol=1e-6, rtol=0)


# --- errors -----------------------------------------------------------------------------------------

RGB = Image.new("RGB", (SIDE, SIDE), "white")
SQUARE = torch.zeros(3, SIDE, SIDE)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"theta": 46}, r"`theta` must be in \[0, 45\], got 46"),
        ({"theta": [10, -1]}, r"`theta` must be in \[0, 45\], got -1"),
        ({"theta": math.nan}, r"`theta` must be in \[0, 45\], got nan"),
        ({"size": 1}, r"`size` must be in \[2, 8\], got 1"),
        ({"size": 8.5}, r"`size` must be in \[2, 8\], got 8.5"),
        ({"phi": math.inf}, "`phi` must be a finite angle in degrees, got inf"),
        ({"image": np.zeros((8, 8, 3))}, "`image` must be PIL images or tensors, got ndarray"),
        ({"image": "object.png"}, "`image` must be PIL images or tensors, got str"),
        ({"image": torch.zeros(3, 8, 8)}, r"`image` must be \(3, 16, 16\) as a tensor, got \(3, 8, 8\)"),
        ({"image": SQUARE[None]}, r"`image` must be \(3, 16, 16\) as a tensor, got \(1, 3, 16, 16\)"),
        ({"image": SQUARE}, r"`mask` must be a tensor \(1, 16, 16\) like its image"),
        ({"image": SQUARE, "mask": torch.zeros(16, 16)}, r"`mask` must be a tensor \(1, 16, 16\)"),
        ({"mask": torch.zeros(1, 16, 16)}, "`mask` must be PIL images like `image`, got Tensor"),
        ({"mask": Image.new("L", (15, 16))}, r"`mask` must have the size of its image, \(16, 16\), got \(15, 16\)"),
        ({"image": [RGB, RGB], "mask": Image.new("L", (16, 16))}, "`mask` must be one per image, got 1 for 2"),
        ({"mask": [Image.new("L", (16, 16))] * 2}, "`mask` must be one per image, got 2 for 1"),
        ({"image": []}, "must not be empty lists"),
        ({"phi": []}, "must not be empty lists"),
        ({"phi": [0, 1, 2], "theta": [0, 1]}, "`theta` must be single or a list of 3, .* got 2"),
        ({"image": [RGB] * 2, "phi": [0, 1, 2]}, "`image` must be single or a list of 3, .* got 2"),
        ({"intensity": -0.1}, r"`intensity` must be in \[0, 10\], got -0.1"),
        ({"intensity": math.nan}, r"`intensity` must be in \[0, 10\], got nan"),
        ({"num_inference_steps": 0}, "`num_inference_steps` must be at least 1, got 0"),
        ({"sigmas": []}, r"`sigmas` must fall from 1 and stay above 0 .* got \[\]"),
        ({"sigmas": [0.9, 0.5]}, "`sigmas` must fall from 1"),
        ({"sigmas": [1.0, 1.0]}, "`sigmas` must fall from 1"),
        ({"sigmas": [1.0, 0.2, 0.4]}, "`sigmas` must fall from 1"),
        ({"sigmas": [1.0, 0.0]}, "`sigmas` must fall from 1 and stay above 0"),
        ({"resolution": 12}, "`resolution` must be a multiple of 8, got 12"),
        ({"resolution": 0}, "`resolution` must be a multiple of 8, got 0"),
        ({"output_type": "jpg"}, "`output_type` must be 'pil', 'np', 'pt' or 'latent', got 'jpg'"),
        ({"image": [RGB, RGB.resize((8, 16))], "output_type": "np"}, "`output_type` 'np' needs images of one size"),
        ({"callback_on_step_end_tensor_inputs": ["noise"]}, r"among \['latents'\], got \['noise'\]"),
        ({"latents": torch.zeros(2, 12, 8, 8)}, r"`latents` must have shape \(1, 12, 8, 8\), got \(2, 12, 8, 8\)"),
        ({"phi": [0, 1, 2], "generator": [generator(0)] * 2}, "`generator` must be one, or one per map: 3, got 2"),
    ],
)
def test_wrong_arguments_are_named(pipeline, arguments, message):
    with pytest.raises(ValueError, match=message) as error:
        pipeline(**{"image": RGB, **arguments})
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"sigmas": [1.0, 0.5]}, "`sigmas` are for flow models, this one predicts epsilon"),
        ({"num_inference_steps": 7}, "`num_inference_steps` must divide 1000 in a diffusion, got 7"),
        ({"num_inference_steps": 2000}, "`num_inference_steps` must divide 1000 in a diffusion, got 2000"),
    ],
)
def test_a_diffusion_steps_on_its_own_schedule(arguments, message):
    with pytest.raises(ValueError, match=message):
        build(prediction_type="epsilon")(RGB, **arguments)


# --- compositing ------------------------------------------------------------------------------------


def test_without_a_shadow_the_background_is_unchanged():
    background = Image.fromarray(np.random.default_rng(0).integers(0, 256, (SIDE, SIDE, 3), dtype=np.uint8))
    image = picture()
    result = np.asarray(composite(image, Image.new("L", image.size), background))
    inside = np.asarray(image.getchannel("A")) > 0
    np.testing.assert_array_equal(result[~inside], np.asarray(background)[~inside])
    np.testing.assert_array_equal(result[inside], np.asarray(image.convert("RGB"))[inside])
    # no intensity is no shadow, and a black one changes nothing outside the shadow
    dark = Image.new("L", image.size)
    dark.paste(200, (0, 0, SIDE, 3))
    assert (
        composite(image, dark, background, intensity=0).tobytes()
        == composite(image, Image.new("L", image.size), background).tobytes()
    )
    np.testing.assert_array_equal(np.asarray(composite(image, dark, background))[3:], result[3:])


def test_shadows_multiply_the_background_and_may_be_tinted():
    image = Image.new("RGBA", (2, 1))  # transparent: only ground
    shadow = Image.fromarray(np.array([[51, 255]], np.uint8))
    background = Image.new("RGB", (2, 1), (200, 100, 50))

    def colours(**settings):
        return np.asarray(composite(image, shadow, background, **settings))[0].tolist()

    assert colours() == [[160, 80, 40], [0, 0, 0]]
    assert colours(intensity=0.5) == [[180, 90, 45], [100, 50, 25]]
    assert colours(intensity=3)[1] == [0, 0, 0]
    assert colours(intensity=3)[0] == [80, 40, 20]
    assert colours(tint=(0, 0, 100)) == [[160, 80, 60], [0, 0, 100]]
    assert colours(tint="#000064") == colours(tint=(0, 0, 100))
    assert np.asarray(composite(image, shadow, "white"))[0].tolist() == [[204, 204, 204], [0, 0, 0]]


def test_soft_alpha_mixes_object_and_ground():
    image = Image.new("RGBA", (1, 1), (200, 0, 0, 51))
    half, background = Image.new("L", (1, 1), 255), Image.new("RGB", (1, 1), (0, 100, 0))
    assert composite(image, Image.new("L", (1, 1)), background).getpixel((0, 0)) == (40, 80, 0)
    assert composite(image, half, background).getpixel((0, 0)) == (40, 0, 0)
    solid = Image.new("L", (1, 1), 255)  # a mask takes the place of the alpha channel
    assert composite(image, half, background, mask=solid).getpixel((0, 0)) == (200, 0, 0)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"shadow": Image.new("L", (8, 8))}, r"`shadow` must have the image's size \(16, 16\), got \(8, 8\)"),
        ({"background": Image.new("RGB", (16, 8))}, r"`background` must have the image's size .* got \(16, 8\)"),
        ({"mask": Image.new("L", (1, 1))}, r"`mask` must have the image's size .* got \(1, 1\)"),
        ({"intensity": -1}, "`intensity` must be at least 0, got -1"),
        ({"background": "no colour"}, "unknown color specifier: 'no colour'"),
    ],
)
def test_composites_of_what_does_not_fit_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        composite(**{"image": picture(), "shadow": Image.new("L", (SIDE, SIDE)), **arguments})
