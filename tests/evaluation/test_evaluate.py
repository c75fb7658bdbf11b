"""The evaluation of shortcut models: samples by index, the loss by level and time, and the program."""

from __future__ import annotations

import json
import sys

import numpy as np
import pytest
import torch
import yaml
from diffusers.models.modeling_outputs import Transformer2DModelOutput
from PIL import Image
from torch import Tensor, nn

from backlot.codecs import PixelCodec
from data_prep.images.digits import load_digits
from evaluation.shortcut.__main__ import main
from evaluation.shortcut.measure import DigitsReference, draw_samples, loss_by_level_and_time, sample_noise
from evaluation.shortcut.metrics import InceptionFeatures, frechet_distance, to_uint8
from evaluation.shortcut.report import to_images, to_model_space
from objectives.rectified_flow import interpolate, squared_error
from objectives.settings import ObjectiveConfig
from pipelines.shortcut import OFFICIAL, ShortcutDiT, ShortcutPipeline, ShortcutScheduler

CONFIG = {"sample_size": 8, "in_channels": 1, "num_classes": 10, "hidden_size": 32, "num_layers": 2}


def build(**overrides) -> ShortcutDiT:
    """A small network with every layer awake (zero-initialised ones would hide faults)."""
    torch.manual_seed(0)
    model = ShortcutDiT.from_size("tiny", **{**CONFIG, **overrides}).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    return model


class StandIn(nn.Module):
    """Called like the Inception-v3 file."""

    def forward(self, images: Tensor, return_features: bool = False) -> Tensor:
        return images.to(torch.float32).flatten(1)[:, :4] if return_features else images.to(torch.float32)


class StraightFlow(ShortcutDiT):
    """The exact network for data that is one constant: every step's mean velocity is (0.5 - x) / (1 - t)."""

    def forward(self, sample, timestep, step_size, class_labels, return_dict=True):
        return Transformer2DModelOutput(sample=(0.5 - sample) / (1 - timestep).reshape(-1, 1, 1, 1))


def record(model: nn.Module) -> list[tuple[Tensor, ...]]:
    """The list that will hold every query of the network: (sample, t, step_size, class_labels)."""
    queries = []
    model.register_forward_pre_hook(
        lambda _, args, kwargs: queries.append((*args, *kwargs.values())[:4]), with_kwargs=True
    )
    return queries


# --- samples --------------------------------------------------------------------------------------


def test_noise_is_a_function_of_seed_and_index():
    whole = sample_noise(0, 300, (1, 4, 4))
    assert whole.shape == (300, 1, 4, 4)
    assert torch.equal(sample_noise(70, 100, (1, 4, 4)), whole[70:170])
    assert torch.equal(sample_noise(64, 1, (1, 4, 4)), whole[64:65])
    assert len(whole.flatten(1).unique(dim=0)) == 300
    assert not torch.equal(sample_noise(0, 300, (1, 4, 4), seed=1), whole)
    assert abs(whole.mean()) < 0.05
    assert abs(whole.std() - 1) < 0.05


def test_samples_do_not_depend_on_batches_or_processes():
    pipeline = ShortcutPipeline(build(), ShortcutScheduler())
    queries = record(pipeline.transformer)

    def draw(count: int, **arguments) -> tuple[Tensor, Tensor, Tensor]:
        queries.clear()
        images = draw_samples(pipeline, count, num_inference_steps=1, **arguments)
        return images, torch.cat([query[0] for query in queries]), torch.cat([query[3] for query in queries])

    images, noise, labels = draw(75)
    in_sevens, noise_in_sevens, labels_in_sevens = draw(75, batch_size=7)
    assert images.shape == (75, 1, 8, 8)  # the remainder is kept
    assert torch.equal(noise, noise_in_sevens)
    assert torch.equal(labels, labels_in_sevens)
    assert torch.equal(labels, torch.arange(75) % 10)
    assert torch.allclose(images, in_sevens, atol=1e-5)

    share, noise_of_share, labels_of_share = draw(12, first=63)
    assert torch.equal(noise_of_share, noise[63:])
    assert torch.equal(labels_of_share, labels[63:])
    assert torch.allclose(share, images[63:], atol=1e-5)


def test_every_argument_of_the_sampling_arrives():
    pipeline = ShortcutPipeline(build(), ShortcutScheduler())
    images = draw_samples(pipeline, 6, num_inference_steps=2)
    latents = sample_noise(0, 6, (1, 8, 8))
    expected = pipeline(list(range(6)), 2, latents=latents, output_type="pt").images * 2 - 1
    assert torch.equal(images, expected)
    assert images.abs().max() <= 1
    others = [{"num_inference_steps": 2, **changed} for changed in ({"mode": "flow"}, {"guidance_scale": 3.0})]
    others += [{"num_inference_steps": 2, "seed": 1}, {"step_sizes": [0.7, 0.3]}]
    assert not any(torch.allclose(draw_samples(pipeline, 6, **arguments), images, atol=1e-4) for arguments in others)


def test_unconditional_samples_have_no_class():
    pipeline = ShortcutPipeline(build(), ShortcutScheduler())
    queries = record(pipeline.transformer)
    draw_samples(pipeline, 5, num_inference_steps=2, unconditional=True)
    assert all((labels == 10).all() for *_, labels in queries)


def test_samples_are_decoded():
    pipeline = ShortcutPipeline(build(in_channels=4), ShortcutScheduler(), PixelCodec(in_channels=1, block_size=2))
    assert draw_samples(pipeline, 3).shape == (3, 1, 16, 16)


def test_fresh_noise_of_consistency_steps_belongs_to_the_sample():
    pipeline = ShortcutPipeline(build(), ShortcutScheduler(method="consistency"))
    images = draw_samples(pipeline, 9, num_inference_steps=4)
    assert torch.allclose(images, draw_samples(pipeline, 9, num_inference_steps=4, batch_size=2), atol=1e-5)
    assert not torch.allclose(images, draw_samples(pipeline, 9, num_inference_steps=4, seed=1), atol=1e-2)


def test_sampling_refuses_what_is_no_size():
    pipeline = ShortcutPipeline(build(), ShortcutScheduler())
    with pytest.raises(ValueError, match="`batch_size` must be at least 1, got 5 and 0"):
        draw_samples(pipeline, 5, batch_size=0)


# --- digits ---------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def digits():
    return DigitsReference()


def test_the_digits_classifier_is_good_and_real_digits_score_best(digits):
    assert digits.images.shape == (1797, 1, 8, 8)
    assert digits.accuracy >= 0.97
    floor = digits.floor()
    assert abs(floor["energy_distance"]) < 0.02
    assert 0 < floor["frechet"] < 15  # 360 images: small, not 0
    itself = digits.measure(digits.images)
    assert abs(itself["energy_distance"]) < 0.01
    assert abs(itself["frechet"]) < 1e-6


def test_worse_digits_are_further_away(digits):
    noise = torch.randn(digits.images.shape, generator=torch.Generator().manual_seed(0))
    slightly, badly = (digits.measure((digits.images + s * noise).clamp(-1, 1)) for s in (0.2, 1.0))
    assert all(digits.floor()[key] < slightly[key] < badly[key] for key in ("energy_distance", "frechet"))


# --- loss by level and time -----------------------------------------------------------------------


@pytest.mark.parametrize("preset", ["mixture", "official", "continuous"])
def test_the_loss_never_leaves_the_domain_and_changes_nothing(preset):
    official = preset == "official"
    model = build(**(OFFICIAL if official else {})).train()
    objective = ObjectiveConfig(preset=preset, denoise_timesteps=16)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    data = torch.rand(5, 1, 8, 8)
    state, queries = torch.get_rng_state(), record(model)
    curves = loss_by_level_and_time(model, data, torch.arange(5), objective, num_time_bins=12, batch_size=3)
    assert model.training
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert all(parameter.grad is None for parameter in model.parameters())

    for _, t, d, _ in queries:
        assert (t + d <= 1 + 1e-6).all()
        assert ((d >= 1 / 16 - 1e-7) | (d == objective.flow_step_size)).all()
        if official:  # a log2 network knows d = 2^-k at multiples of d
            assert torch.allclose(t / d, (t / d).round(), atol=1e-4)
    assert [level["step_size"] for level in curves["levels"]] == [1, 1 / 2, 1 / 4, 1 / 8]
    for level in curves["levels"]:
        for t, loss in zip(curves["times"], level["loss"], strict=True):
            on_lattice = (t / level["step_size"]) % 1 == 0
            assert (loss is not None) == (t + level["step_size"] <= 1 and (on_lattice or not official)), (level, t)
    assert curves["levels"][0]["loss"][0] > 0
    assert curves["flow"][0] > 0


def test_the_exact_flow_has_no_loss_anywhere():
    model = StraightFlow.from_size("tiny", **CONFIG)
    objective = ObjectiveConfig(denoise_timesteps=16, target_clip=None)
    curves = loss_by_level_and_time(model, torch.full((4, 1, 8, 8), 0.5), None, objective, num_time_bins=8)
    losses = [curves["flow"], *(level["loss"] for level in curves["levels"])]
    assert all(loss < 1e-8 for row in losses for loss in row if loss is not None)
    wrong = loss_by_level_and_time(model, torch.full((4, 1, 8, 8), 0.6), None, objective, num_time_bins=8)
    assert all(loss > 1e-3 for loss in wrong["flow"])


@torch.no_grad()
def test_the_loss_is_the_one_of_the_equation():
    model, data, labels = build(dropout=0.5).train(), torch.rand(5, 1, 8, 8) * 2 - 1, torch.arange(5)
    objective = ObjectiveConfig(denoise_timesteps=16, target_clip=None)
    curves = loss_by_level_and_time(model, data, labels, objective, num_time_bins=4, batch_size=2, seed=3)
    model.eval()
    noise, t = sample_noise(0, 5, (1, 8, 8), 3), torch.full((5,), 0.25)

    def velocity(x: Tensor, t: Tensor, d: float) -> Tensor:
        return model(x, t, torch.full_like(t, d), labels).sample

    x = interpolate(noise, data, t)
    first = velocity(x, t, 0.25)
    target = (first + velocity(x + 0.25 * first, t + 0.25, 0.25)) / 2
    expected = squared_error(velocity(x, t, 0.5), target).mean().item()
    assert curves["levels"][1]["loss"][1] == pytest.approx(expected, rel=1e-4)
    expected = squared_error(velocity(x, t, 0.0), data - noise).mean().item()
    assert curves["flow"][1] == pytest.approx(expected, rel=1e-4)


def test_only_shortcut_models_have_levels():
    objective = ObjectiveConfig(name="flow_matching", denoise_timesteps=16)
    curves = loss_by_level_and_time(build(), torch.rand(2, 1, 8, 8), None, objective, num_time_bins=4)
    assert curves["levels"] == []
    assert None not in curves["flow"]


# --- the program ----------------------------------------------------------------------------------


def save_pipeline(folder, scheduler: ShortcutScheduler | None = None, **overrides):
    ShortcutPipeline(build(**overrides), scheduler or ShortcutScheduler(denoise_timesteps=16)).save_pretrained(folder)
    return folder


def save_pictures(folder, count: int = 12):
    """Two classes of 8x8 RGB pictures."""
    rng = np.random.default_rng(0)
    for split in ("train", "validation"):
        for name in ("cat", "dog"):
            (folder / split / name).mkdir(parents=True)
            for i in range(count):
                pixels = rng.integers(0, 256, (8, 8, 3), dtype=np.uint8)
                Image.fromarray(pixels).save(folder / split / name / f"{i}.png")
    return folder


def read_rows(folder) -> list[dict]:
    return [json.loads(line) for line in (folder / "results.jsonl").read_text().splitlines()]


def test_the_program_measures_digits(tmp_path, capsys):
    scheduler = ShortcutScheduler(denoise_timesteps=16, smallest_step="lattice", dyadic_only=True)
    model = save_pipeline(tmp_path / "model", scheduler, **OFFICIAL)
    weights = tmp_path / "stand-in.pt"
    torch.jit.script(StandIn()).save(str(weights))
    main(
        f"{model} --num_samples 40 --batch_size 16 --steps 1 3 4 --step_sizes 0.5 0.25 0.25 --loss_samples 8"
        f" --num_time_bins 4 --inception_weights {weights} --device cpu".split()
    )
    rows = read_rows(model / "evaluation")
    assert [row["num_inference_steps"] for row in rows] == [1, 4, None]
    assert rows[2]["step_sizes"] == [0.5, 0.25, 0.25]
    for row in rows:
        assert row["num_samples"] == 40
        assert row["weights"] == "exported (EMA unless the run was trained without it)"
        assert (row["mode"], row["guidance_scale"], row["seed"], row["dataset_name"]) == ("shortcut", 1, 0, "digits")
        assert row["digits_classifier_accuracy"] >= 0.97
        assert row["energy_distance"] > row["floor"]["energy_distance"]
        assert row["frechet"] > row["floor"]["frechet"]
        assert row["fid"] > 0
        assert row["kid_subset_size"] == 40
        assert row["inception_sha256"] == InceptionFeatures(weights).sha256
    samples = draw_samples(ShortcutPipeline.from_pretrained(model), 40, num_inference_steps=4)
    features = [InceptionFeatures(weights)(to_uint8(images)) for images in (load_digits("all")[0], samples)]
    assert rows[1]["fid"] == pytest.approx(frechet_distance(*features), rel=1e-3)
    curves = json.loads((model / "evaluation" / "loss_by_level_and_time.json").read_text())
    assert len(curves["levels"]) == 4
    assert curves["objective"] == "shortcut"
    width, height = Image.open(model / "evaluation" / "grid.png").size
    assert (width > 10 * 64, 3 * 64 < height < 4 * 64) == (True, True)  # ten classes, three settings
    out = capsys.readouterr().out
    assert "skipped 3 steps: this network was trained on steps of 2^-k" in out
    assert "real digits, train against held-out" in out
    assert "FID and KID are skipped" not in out


def test_the_program_measures_pictures_without_weights_and_reads_the_runs_configuration(tmp_path, capsys):
    model = save_pipeline(tmp_path / "model", in_channels=3, num_classes=2)
    run = {"training": {"use_ema": False}, "objective": {"condition_dropout_prob": 1.0, "denoise_timesteps": 8}}
    (model / "config.yaml").write_text(yaml.safe_dump(run))
    arguments = ["--dataset_name", "imagefolder", "--path", str(save_pictures(tmp_path / "pictures"))]
    arguments += ["--output_dir", str(tmp_path / "out"), "--mode", "shortcut", "flow", "--guidance_scale", "1", "2"]
    arguments += ["--num_samples", "20", "--steps", "2", "--loss_samples", "4", "--num_time_bins", "4"]
    main([str(model), *arguments])
    rows = read_rows(tmp_path / "out")
    settings = [(row["mode"], row["guidance_scale"]) for row in rows]
    assert settings == [("shortcut", 1), ("flow", 1), ("shortcut", 2), ("flow", 2)]
    for row in rows:
        assert row["weights"] == "exported (raw, trained without EMA)"
        assert row["unconditional"] is True
        assert row["inception_sha256"] is None
        assert "fid" not in row
        assert row["energy_distance"] > 0.1
    assert rows[0]["energy_distance"] == pytest.approx(rows[2]["energy_distance"])  # nothing to guide
    assert len(json.loads((tmp_path / "out" / "loss_by_level_and_time.json").read_text())["levels"]) == 3
    assert "FID and KID are skipped: give --inception_weights FILE" in capsys.readouterr().out


def test_latent_models_are_measured_on_decoded_pictures(tmp_path):
    vae = PixelCodec(in_channels=3, block_size=2, scaling_factor=0.5, shift_factor=0.1)
    pipeline = ShortcutPipeline(build(sample_size=4, in_channels=12, num_classes=2), ShortcutScheduler(16), vae)
    pipeline.save_pretrained(tmp_path / "model")
    arguments = ["--dataset_name", "imagefolder", "--path", str(save_pictures(tmp_path / "pictures"))]
    arguments += ["--num_samples", "8", "--steps", "1", "--loss_samples", "4", "--num_time_bins", "2"]
    main([str(tmp_path / "model"), *arguments])
    assert read_rows(tmp_path / "model" / "evaluation")[0]["energy_distance"] > 0.1
    curves = json.loads((tmp_path / "model" / "evaluation" / "loss_by_level_and_time.json").read_text())
    assert curves["flow"][0] > 0
    batch = {"pixel_values": torch.rand(2, 3, 8, 8)}
    decoded = to_images(pipeline, {"latents": to_model_space(pipeline, batch)})
    assert torch.allclose(decoded, batch["pixel_values"], atol=1e-6)


def test_without_torchmetrics_the_program_says_so_and_goes_on(tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "torchmetrics.image.fid", None)
    model = save_pipeline(tmp_path / "model", in_channels=3, num_classes=2)
    torch.jit.script(StandIn()).save(str(tmp_path / "stand-in.pt"))
    arguments = ["--dataset_name", "imagefolder", "--path", str(save_pictures(tmp_path / "pictures", count=2))]
    arguments += ["--inception_weights", str(tmp_path / "stand-in.pt"), "--num_samples", "4", "--steps", "1"]
    main([str(model), *arguments, "--loss_samples", "2", "--num_time_bins", "2"])
    assert "FID and KID are skipped: torchmetrics is not installed: pip install" in capsys.readouterr().out
    assert read_rows(model / "evaluation")[0]["inception_sha256"] is None


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return save_pipeline(tmp_path_factory.mktemp("model"))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("--steps 0", "--steps 0: input should be greater than or equal to 1"),
        ("--steps many", "--steps many: input should be a valid integer"),
        ("--num_samples 1", "--num_samples 1: input should be greater than or equal to 2"),
        ("--guidance_scale nan", "--guidance_scale nan: input should be a finite number"),
        ("--mode jump", "--mode jump: input should be 'shortcut' or 'flow'"),
        ("--step 1", "unknown key --step; did you mean --steps?"),
        ("--device abacus", "cannot be loaded on abacus"),
        ("--steps 1 --dataset_name imagefolder", "`path` must be given for 'imagefolder'"),
        ("--dataset_name imagefolder --path PICTURES", "shape (1, 8, 8), those of imagefolder are (3, 8, 8)"),
        ("--path here", "digits come with scikit-learn"),
        ("--split none", "`split` of the digits must be one of"),
        ("--inception_weights none.pt", "--inception_weights: there is no file none.pt"),
    ],
)
def test_a_wrong_argument_is_one_line_and_exit_code_2(model, tmp_path, arguments, message, capsys):
    if "PICTURES" in arguments:
        arguments = arguments.replace("PICTURES", str(save_pictures(tmp_path, count=1)))
    with pytest.raises(SystemExit) as stop:
        main([str(model), *arguments.split()])
    assert stop.value.code == 2
    (line,) = [line for line in capsys.readouterr().err.splitlines() if "error" in line]
    assert line.startswith("error: ")
    assert message in line
    assert not (model / "evaluation").exists()


def test_a_folder_without_a_pipeline_and_steps_that_are_all_refused(model, tmp_path, capsys):
    with pytest.raises(SystemExit, match="2"):
        main([str(tmp_path)])
    assert "holds no exported pipeline" in capsys.readouterr().err
    (tmp_path / "model_index.json").write_text('{"_class_name": "FluxPipeline"}')
    with pytest.raises(SystemExit, match="2"):
        main([str(tmp_path)])
    assert "holds a FluxPipeline, not a ShortcutPipeline" in capsys.readouterr().err
    scheduler = ShortcutScheduler(denoise_timesteps=16, smallest_step="lattice", dyadic_only=True)
    dyadic = save_pipeline(tmp_path / "dyadic", scheduler, **OFFICIAL)
    with pytest.raises(SystemExit, match="2"):
        main([str(dyadic), "--steps", "3", "5"])
    printed = capsys.readouterr()
    assert printed.out.count("skipped") == 2
    assert "no steps are left to measure" in printed.err


def test_a_model_that_has_diverged_is_named(tmp_path, capsys):
    folder = tmp_path / "model"
    network = build(in_channels=3, num_classes=2)
    with torch.no_grad():
        network.proj_out.bias.fill_(torch.nan)
    ShortcutPipeline(network, ShortcutScheduler(16)).save_pretrained(folder)
    pictures = save_pictures(tmp_path / "pictures", count=2)
    with pytest.raises(SystemExit, match="2"):
        main([str(folder), "--dataset_name", "imagefolder", "--path", str(pictures), "--num_samples", "4"])
    assert "error: the samples of 1 step are not finite, this model has diverged\n" in capsys.readouterr().err
