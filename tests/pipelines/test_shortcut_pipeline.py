"""ShortcutDiT, its scheduler and pipeline: shapes, closed forms, round trips, error texts."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL

from backlot.codecs import PixelCodec, load_vae
from pipelines.shortcut import OFFICIAL, ShortcutDiT, ShortcutPipeline, ShortcutScheduler

CONFIG = {"sample_size": 8, "in_channels": 1, "num_classes": 10, "hidden_size": 32, "num_layers": 2}


def build(seed: int = 0, **overrides) -> ShortcutDiT:
    """A small network with every layer awake (zero-initialised ones would hide faults)."""
    torch.manual_seed(seed)
    model = ShortcutDiT.from_size("tiny", **{**CONFIG, **overrides}).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    return model


@pytest.fixture
def pipeline():
    made = ShortcutPipeline(build(), ShortcutScheduler())
    made.set_progress_bar_config(disable=True)
    return made


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@pytest.mark.parametrize(
    ("size", "count"), [("S", 33_105_680), ("B", 131_091_728), ("L", 459_137_296), ("XL", 676_440_848)]
)
def test_parameter_counts_are_the_papers_less_its_dead_table(size, count):
    with torch.device("meta"):
        model = ShortcutDiT.from_size(size, **OFFICIAL)
    assert sum(p.numel() for p in model.parameters()) == count - 256


def test_the_first_prediction_is_zero_and_every_parameter_gets_a_gradient_soon():
    torch.manual_seed(0)
    model = ShortcutDiT.from_size("tiny", **CONFIG)
    x, t, d, y = torch.randn(4, 1, 8, 8), torch.rand(4), torch.rand(4), torch.arange(4)
    assert not model(x, t, d, y).sample.any()
    optimizer = torch.optim.AdamW(model.parameters(), 1e-2)
    for _ in range(4):
        optimizer.zero_grad()
        (model(x, t, d, y).sample - x).square().mean().backward()
        optimizer.step()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in model.parameters())


@pytest.mark.parametrize("changed", ["timestep", "step_size", "class_labels"])
def test_the_network_listens_to_each_of_its_inputs(changed):
    model = build()
    inputs = {"sample": torch.randn(2, 1, 8, 8), "timestep": torch.tensor([0.1, 0.5])}
    inputs |= {"step_size": torch.tensor([0.5, 0.25]), "class_labels": torch.tensor([3, 7])}
    other = inputs | {changed: {"timestep": torch.tensor([0.2, 0.5]), "step_size": torch.tensor([0.25, 0.25]),
                                "class_labels": torch.tensor([4, 7])}[changed]}  # fmt: skip
    difference = (model(**inputs).sample - model(**other).sample).abs().amax(dim=(1, 2, 3))
    assert difference[0] > 1e-5
    assert difference[1] == 0
    if changed == "step_size":
        model = build(use_shortcut=False)
        assert torch.equal(model(**inputs).sample, model(**other).sample)


def test_neighbouring_times_differ_in_bf16():
    model = build().to(torch.bfloat16)
    times = torch.arange(128) / 128
    embedded = model.time_embedder(times * model.config.time_scale)
    assert len(torch.unique(embedded, dim=0)) == 128


def test_log2_embedding_sees_levels():
    model = build(**OFFICIAL)
    seen = []
    model.step_embedder.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    model(torch.randn(3, 1, 8, 8), torch.zeros(3), torch.tensor([1, 0.5, 1 / 128]), torch.zeros(3, dtype=torch.long))
    assert seen[0].tolist() == [0.0, 1.0, 7.0]


def test_a_patch_lands_where_it_came_from():
    model = build()
    x = torch.zeros(1, 1, 8, 8)
    arguments = (torch.zeros(1), torch.zeros(1), torch.zeros(1, dtype=torch.long))
    with torch.no_grad():
        for block in model.blocks:  # no mixing between tokens: only the patch that changed may answer
            block.modulation.weight.zero_()
            block.modulation.bias.zero_()
        before = model(x, *arguments).sample
        x[0, 0, 2:4, 6:8] = 1.0
        changed = (model(x, *arguments).sample - before)[0, 0] != 0
    expected = torch.zeros(8, 8, dtype=torch.bool)
    expected[2:4, 6:8] = True
    assert torch.equal(changed, expected)


def test_pixels_of_a_patch_are_in_row_column_channel_order():
    model = build(in_channels=3)
    with torch.no_grad():
        model.proj_out.weight.zero_()
        model.proj_out.bias.copy_(torch.arange(12.0))
        patch = model(torch.randn(1, 3, 8, 8), torch.zeros(1), torch.zeros(1), torch.zeros(1, dtype=torch.long)).sample
    assert patch[0, :, 0:2, 0:2].tolist() == [[[0, 3], [6, 9]], [[1, 4], [7, 10]], [[2, 5], [8, 11]]]


def test_gradient_checkpointing_changes_nothing():
    grads = []
    for checkpointing in (False, True):
        model = build()
        if checkpointing:
            model.enable_gradient_checkpointing()
        torch.manual_seed(1)
        model(torch.randn(2, 1, 8, 8), torch.rand(2), torch.rand(2), torch.arange(2)).sample.square().sum().backward()
        grads.append([p.grad.clone() for p in model.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*grads, strict=True))


def test_regular_and_irregular_steps():
    scheduler = ShortcutScheduler()
    scheduler.set_timesteps(4)
    assert scheduler.timesteps == [0, 0.25, 0.5, 0.75]
    scheduler.set_timesteps(step_sizes=[0.5, 0.3, 0.2])
    assert scheduler.timesteps == pytest.approx([0, 0.5, 0.8])
    scheduler.set_timesteps(step_sizes=[0.1] * 10)
    scheduler.set_timesteps(step_sizes=[0.5], allow_partial=True)
    # a data prediction moves straight: x + (1 - t) v at every length
    sample = torch.randn(2, 3)
    for steps in ([1.0], [0.25] * 4, [0.5, 0.3, 0.15, 0.05]):
        scheduler.set_timesteps(step_sizes=steps)
        x = sample
        for i, t in enumerate(scheduler.timesteps):
            x = scheduler.step((0.7 - x) / (1 - t), i, x).prev_sample
        torch.testing.assert_close(x, torch.full_like(x, 0.7))


def test_what_the_network_is_told():
    def told(steps, mode="shortcut", **config):
        scheduler = ShortcutScheduler(**config)
        scheduler.set_timesteps(step_sizes=steps, mode=mode)
        return scheduler.queried_step_sizes

    irregular = [0.5, 0.5 - 1 / 128, 1 / 128]
    assert told(irregular) == [0.5, 0.5 - 1 / 128, 0.0]
    assert told(irregular, smallest_step="lattice") == [0.5, 0.5 - 1 / 128, 1 / 128]
    assert told(irregular, smallest_step="none") == irregular
    assert told(irregular, mode="flow") == [0.0, 0.0, 0.0]
    assert told(irregular, mode="flow", smallest_step="lattice") == [1 / 128] * 3
    assert told(irregular, larger_steps="smallest") == [0.0, 0.0, 0.0]
    assert told(irregular, larger_steps="one_step") == [1.0, 1.0, 0.0]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({}, "exactly one of `num_inference_steps` and `step_sizes`"),
        ({"num_inference_steps": 2, "step_sizes": [1.0]}, "exactly one of"),
        ({"num_inference_steps": 0}, "`num_inference_steps` must be at least 1, got 0"),
        ({"step_sizes": [0.5, 0.4]}, r"`step_sizes` must add up to 1, got 0\.9"),
        ({"step_sizes": [1.5, -0.5]}, "`step_sizes` must be positive"),
        ({"step_sizes": [0.7, 0.7]}, "add up to 1, got 1.4"),
        ({"num_inference_steps": 2, "mode": "fast"}, "`mode` must be 'shortcut' or 'flow', not 'fast'"),
    ],
)
def test_steps_that_are_no_schedule_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        ShortcutScheduler().set_timesteps(**arguments)


def test_a_log2_network_takes_only_steps_it_was_trained_on():
    scheduler = ShortcutScheduler(dyadic_only=True, smallest_step="lattice")
    for steps in (1, 2, 64, 128):
        scheduler.set_timesteps(steps)
    scheduler.set_timesteps(step_sizes=[0.5, 0.25, 0.25])
    for arguments in ({"num_inference_steps": 3}, {"num_inference_steps": 256}, {"step_sizes": [0.25, 0.5, 0.25]}):
        with pytest.raises(ValueError, match=r"trained on steps of 2\^-k"):
            scheduler.set_timesteps(**arguments)


def test_consistency_steps_add_fresh_noise_until_the_end():
    scheduler = ShortcutScheduler(method="consistency")
    scheduler.set_timesteps(2)
    x = torch.zeros(1000)
    x = scheduler.step(torch.ones(1000), 0, x, generator()).prev_sample
    assert float(x.mean()) == pytest.approx(0.5, abs=0.06)
    assert float(x.std()) == pytest.approx(0.5, abs=0.06)
    last = scheduler.step((2 - x) / 0.5, 1, x, generator()).prev_sample
    torch.testing.assert_close(last, torch.full((1000,), 2.0))


def test_saving_and_loading_gives_the_same_pictures(pipeline, tmp_path):
    pipeline.save_pretrained(tmp_path)
    loaded = ShortcutPipeline.from_pretrained(tmp_path)
    loaded.set_progress_bar_config(disable=True)
    weights, others = pipeline.transformer.state_dict(), loaded.transformer.state_dict()
    assert all(torch.equal(weights[name], others[name]) for name in weights)
    # Weights mapped from a file lie at other addresses, where BLAS may round differently; at these, not a bit differs.
    loaded.transformer.load_state_dict(weights, assign=True)
    for arguments in ({"num_inference_steps": 2}, {"step_sizes": [0.5, 0.3, 0.2]}, {"guidance_scale": 2.0}):
        ours, theirs = (
            p([3, 7], generator=generator(), output_type="pt", **arguments).images for p in (pipeline, loaded)
        )
        assert torch.equal(ours, theirs)
    assert loaded.vae is None


def test_a_batch_gives_what_its_items_give(pipeline):
    latents = torch.randn(3, 1, 8, 8, generator=generator())
    for scale in (1.0, 0.0, 2.5):
        settings = {"num_inference_steps": 2, "guidance_scale": scale, "output_type": "pt"}
        together = pipeline([1, 2, 3], latents=latents, **settings).images
        alone = [pipeline([y], latents=latents[i : i + 1], **settings).images for i, y in enumerate([1, 2, 3])]
        torch.testing.assert_close(together, torch.cat(alone), atol=1e-6, rtol=0)
    many = pipeline([4, 5], num_images_per_label=2, generator=[generator(i) for i in range(4)], output_type="pt").images
    one = pipeline([5], generator=generator(3), output_type="pt").images
    torch.testing.assert_close(many[3:], one, atol=1e-6, rtol=0)


def test_guidance_mixes_both_predictions(pipeline):
    latents = torch.randn(2, 1, 8, 8, generator=generator())

    def final(scale, labels=(3, 4)):
        return pipeline(list(labels), latents=latents, guidance_scale=scale, output_type="latent").images

    conditional, null = final(1.0), final(0.0)
    torch.testing.assert_close(final(3.0), null + 3.0 * (conditional - null), atol=1e-5, rtol=0)
    assert torch.equal(null, final(1.0, (None, None)))
    assert (conditional - null).abs().max() > 1e-4


def test_output_types_and_tuple(pipeline):
    picture = pipeline(3, generator=generator()).images[0]
    assert picture.size == (8, 8)
    assert picture.mode == "L"
    array = pipeline(3, generator=generator(), output_type="np").images
    assert array.shape == (1, 8, 8, 1)
    np.testing.assert_allclose(np.asarray(picture), (array[0, ..., 0] * 255).round(), atol=1)
    assert pipeline(3, return_dict=False, output_type="latent")[0].shape == (1, 1, 8, 8)


def test_the_callback_sees_and_may_change_every_step(pipeline):
    seen = []

    def callback(pipe, index, t, tensors):
        seen.append((index, t, sorted(tensors)))
        return {"latents": tensors["latents"] * 0 + index}

    names = ["latents", "class_labels"]
    out = pipeline([1], 4, callback_on_step_end=callback, callback_on_step_end_tensor_inputs=names,
                   output_type="latent").images  # fmt: skip
    assert seen == [(i, i / 4, sorted(names)) for i in range(4)]
    assert torch.equal(out, torch.full_like(out, 3.0))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"class_labels": [10]}, r"`class_labels` must be in \[0, 9\] .* got 10"),
        ({"class_labels": ["3"]}, "`class_labels` must be in .* got '3'"),
        ({"class_labels": 1, "guidance_scale": -1}, "`guidance_scale` must be at least 0, got -1"),
        ({"class_labels": 1, "num_images_per_label": 0}, "`num_images_per_label` must be at least 1"),
        ({"class_labels": 1, "output_type": "jpg"}, "`output_type` must be 'pil', 'np', 'pt' or 'latent', got 'jpg'"),
        ({"class_labels": [1, 2], "latents": torch.zeros(1, 1, 8, 8)}, r"`latents` must have shape \(2, 1, 8, 8\)"),
        ({"class_labels": 1, "callback_on_step_end_tensor_inputs": ["noise"]}, r"got \['noise'\]"),
    ],
)
def test_wrong_arguments_are_named(pipeline, arguments, message):
    with pytest.raises(ValueError, match=message):
        pipeline(**arguments)


def test_bf16_and_a_moved_pipeline_work(pipeline):
    images = pipeline.to(torch.bfloat16)([1], 2, generator=generator(), output_type="np").images
    assert np.isfinite(images).all()


def test_pixel_codec_loses_nothing_and_stands_in_for_a_vae(tmp_path):
    codec = PixelCodec(in_channels=3, block_size=2, scaling_factor=0.5, shift_factor=0.1)
    images = torch.rand(2, 3, 8, 8) * 2 - 1
    latents = codec.encode(images).latent_dist.sample()
    assert latents.shape == (2, codec.latent_channels, 4, 4)
    assert torch.equal(codec.decode(latents).sample, images)

    made = ShortcutPipeline(build(sample_size=4, in_channels=12), ShortcutScheduler(), codec)
    made.save_pretrained(tmp_path)
    loaded = ShortcutPipeline.from_pretrained(tmp_path)
    assert isinstance(loaded.vae, PixelCodec)
    ours, theirs = (p([1], generator=generator(), output_type="pt").images for p in (made, loaded))
    torch.testing.assert_close(ours, theirs, atol=1e-6, rtol=0)
    assert ours.shape == (1, 3, 8, 8)
    latents = made([1], generator=generator(), output_type="latent").images
    decoded = codec.decode(latents / 0.5 + 0.1).sample / 2 + 0.5
    torch.testing.assert_close(ours, decoded.clamp(0, 1), atol=1e-6, rtol=0)


def test_a_real_vae_decodes_with_its_own_scaling_factor(tmp_path):
    vae = AutoencoderKL(
        block_out_channels=(8,), norm_num_groups=4, latent_channels=4, sample_size=8, scaling_factor=0.3
    )
    vae.save_pretrained(tmp_path / "vae")
    vae = load_vae(tmp_path / "vae").eval()
    made = ShortcutPipeline(build(sample_size=8, in_channels=4), ShortcutScheduler(), vae)
    latents = made([1], generator=generator(), output_type="latent").images
    images = made([1], generator=generator(), output_type="pt").images
    with torch.no_grad():
        expected = (vae.decode(latents / 0.3).sample / 2 + 0.5).clamp(0, 1)
    torch.testing.assert_close(images, expected)


def test_wrong_shapes_and_sizes_are_refused():
    with pytest.raises(ValueError, match=r"`sample_size` \(9\) must be a multiple of `patch_size` \(2\)"):
        build(sample_size=9)
    with pytest.raises(ValueError, match="`size` must be one of tiny, S, B, L, XL, not 'M'"):
        ShortcutDiT.from_size("M")
    with pytest.raises(ValueError, match="`step_embedding` must be"):
        build(step_embedding="fourier")
