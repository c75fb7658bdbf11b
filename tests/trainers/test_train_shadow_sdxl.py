"""The real command for shadows: exact resume, accumulation, every objective, the best checkpoint, latents, refusals."""

from __future__ import annotations

import json
import shutil
from functools import partial
from pathlib import Path

import pytest
import runs
import torch
from diffusers import AutoencoderKL
from sdxl_checkpoint import write_sdxl
from shadow_samples import write_folder, write_tar

from backlot.config import load_config
from pipelines.shadow_sdxl import ShadowSDXLPipeline
from trainers import train_shadow_sdxl

train = partial(runs.train, system="shadow_sdxl")
LOSSES = [1.140939, 0.997558, 0.903740, 0.665939]
VALIDATED = "--validation.validation_steps=2"


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """Ten objects under two lights and two for validation: six updates of four pass the end of an epoch."""
    root = tmp_path_factory.mktemp("shadows")
    write_folder(root / "train", num_objects=10, lights=2, image_size=16, seed=0)
    write_folder(root / "validation", num_objects=2, lights=2, image_size=16, seed=1)
    return [f"--data.path={root / 'train'}", f"--data.validation_path={root / 'validation'}"]


@pytest.fixture(scope="module")
def vae(tmp_path_factory):
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("vae")
    AutoencoderKL(
        block_out_channels=(8, 8),
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        latent_channels=4,
        norm_num_groups=4,
        scaling_factor=0.7,
    ).save_pretrained(folder)
    return folder


@pytest.mark.parametrize(("workers", "accumulation", "objective"), [(0, 1, "flow"), (2, 2, "flow"), (0, 2, "shortcut")])
def test_three_updates_and_three_after_a_resume_are_six(tmp_path, data, workers, accumulation, objective):
    """Bit for bit, in the middle of an epoch and of a log interval, with mirrored samples."""
    settings = {"gradient_accumulation_steps": accumulation, "dataloader_num_workers": workers}
    others = [*data, f"--objective.name={objective}"]
    runs.resume_in_the_middle(tmp_path, *others, system="shadow_sdxl", **settings)


def test_two_updates_then_four_and_a_pipeline_of_the_ema(tmp_path, data):
    settings = {"logging_steps": 1, "checkpoints_total_limit": None}
    train(tmp_path / "run", *data, **settings, max_train_steps=2)
    assert (tmp_path / "run/model_index.json").exists()
    train(tmp_path / "run", *data, **settings, max_train_steps=4, resume_from_checkpoint="latest")
    ema = runs.tensors_of(tmp_path / "run/checkpoint-4")
    for name, value in ShadowSDXLPipeline.from_pretrained(tmp_path / "run").unet.state_dict().items():
        assert torch.equal(value, ema[f"ema/{name}"]), name


def test_micro_batches_of_any_size_give_the_same_gradient(tmp_path, data, monkeypatch):
    """8x1 = 4x2 = 2x4, where noise and level belong to the sample: the gradient's norm, to rounding."""

    def loss(run, batch, config, pipeline, model=None):
        shadow, conditions = train_shadow_sdxl.encode(batch, pipeline)
        generators = [torch.Generator().manual_seed(int(1000 * phi)) for phi in batch["phi"]]
        noise = torch.stack([torch.randn(shadow.shape[1:], generator=g) for g in generators])
        sigmas = torch.stack([0.1 + 0.9 * torch.rand((), generator=g) for g in generators])
        noisy = (1 - sigmas[:, None, None, None]) * shadow + sigmas[:, None, None, None] * noise
        output = run.model(noisy, 1000 * sigmas, **conditions).sample
        return (output - (noise - shadow)).square().mean(), {}

    monkeypatch.setattr(train_shadow_sdxl, "compute_loss", loss)
    rows = []
    for size in (8, 4, 2):
        settings = {"train_batch_size": size, "gradient_accumulation_steps": 8 // size, "logging_steps": 1}
        train(tmp_path / str(size), *data, **settings, max_train_steps=2)
        rows.append(runs.rows_of(tmp_path / str(size)))
    for other in rows[1:]:
        for a, b in zip(rows[0], other, strict=True):
            assert b["loss"] == pytest.approx(a["loss"], rel=1e-5)
            assert b["grad_norm"] == pytest.approx(a["grad_norm"], rel=1e-4)


@pytest.mark.parametrize("objective", ["flow", "shortcut", "epsilon", "v_prediction", "sample"])
def test_every_objective_trains_validates_and_casts(tmp_path, data, objective):
    raw = "sample" if objective in ("flow", "shortcut") else "velocity"
    others = [*data, VALIDATED, f"--objective.name={objective}", f"--model.raw_output={raw}"]
    train(tmp_path / "run", *others, max_train_steps=2)
    row = runs.rows_of(tmp_path / "run")[-1]
    assert {"validation/iou/1", "validation/zncc/4", "validation/rmse/1"} <= row.keys()
    assert list((tmp_path / "run/samples").glob("shadows-000002.png"))
    pipeline = ShadowSDXLPipeline.from_pretrained(tmp_path / "run")
    assert pipeline.unet.config.knows_step_size == (objective == "shortcut")
    image, mask = torch.zeros(3, 16, 16), torch.zeros(1, 16, 16)
    images = pipeline([image], [mask], phi=[0.0, 90.0], num_inference_steps=2, output_type="pt").images
    assert images.shape == (2, 1, 16, 16)
    assert images.isfinite().all()


@pytest.mark.parametrize("light", ["periodic", "sdxl", "blob"])
def test_every_way_to_tell_the_light_is_learnt(tmp_path, data, light):
    train(tmp_path / "run", *data, f"--model.light_conditioning={light}", max_train_steps=2, learning_rate=1e-2)
    pipeline = ShadowSDXLPipeline.from_pretrained(tmp_path / "run")
    assert pipeline.unet.config.light_conditioning == light
    image, mask = torch.zeros(3, 16, 16), torch.zeros(1, 16, 16)
    noise = torch.randn(1, 12, 8, 8).expand(2, -1, -1, -1)
    maps = pipeline([image], [mask], phi=[0.0, 180.0], latents=noise, output_type="latent").images
    assert not torch.allclose(maps[0], maps[1], atol=1e-7)


def test_the_pixel_loss_is_that_of_the_decoded_map(tmp_path, data):
    rows = {}
    for weight in (0, 3):
        train(tmp_path / str(weight), *data, f"--objective.pixel_weight={weight}", max_train_steps=1, logging_steps=1)
        rows[weight] = runs.rows_of(tmp_path / str(weight))[0]
    assert "loss_pixels" not in rows[0]
    assert rows[3]["loss_latents"] == pytest.approx(rows[0]["loss"])
    assert rows[3]["loss"] == pytest.approx(rows[3]["loss_latents"] + 3 * rows[3]["loss_pixels"])
    assert rows[3]["grad_norm"] != pytest.approx(rows[0]["grad_norm"], rel=1e-3)


def test_the_best_checkpoint_stays(tmp_path, data, monkeypatch):
    """Scores by step; every checkpoint but the newest and the best so far is deleted."""
    scores = {1: 0.2, 2: 0.5, 3: 0.1, 4: 0.4, 5: 0.3, 6: 0.5}
    monkeypatch.setattr(train_shadow_sdxl, "validate", lambda model, run, *_: ({"iou/1": scores[run.step]}, {}))
    settings = {"checkpointing_steps": 3, "checkpoints_total_limit": 1}
    train(tmp_path / "run", *data, "--validation.validation_steps=1", **settings, max_train_steps=6)
    assert json.loads((tmp_path / "run/best.json").read_text()) == {"step": 2, "score": 0.5}
    assert {path.name for path in (tmp_path / "run").glob("checkpoint-*")} == {"checkpoint-2", "checkpoint-6"}
    # a later run goes on comparing with it
    settings |= {"max_train_steps": 8, "resume_from_checkpoint": "latest"}
    scores |= {7: 0.4, 8: 0.6}
    train(tmp_path / "run", *data, "--validation.validation_steps=1", **settings)
    assert json.loads((tmp_path / "run/best.json").read_text()) == {"step": 8, "score": 0.6}


def test_training_from_an_sdxl_checkpoint_on_cached_latents(tmp_path, data):
    checkpoint = tmp_path / "sdxl"
    write_sdxl(checkpoint)
    folder = Path(data[0].partition("=")[2])
    others = [*data, VALIDATED, f"--model.pretrained_model={checkpoint}", f"--model.vae={checkpoint / 'vae'}"]
    others += ["--model.raw_output=velocity", "--model.resnet_time_scale_shift=default", "--data.image_size=32"]
    train(tmp_path / "run", *others, max_train_steps=2)
    caches = list((folder / "latents").iterdir())
    assert [cache.name.rpartition("-")[0] for cache in caches] == ["all-32"]
    encoded = {file: file.stat().st_mtime_ns for file in caches[0].iterdir()}
    train(tmp_path / "again", *others, max_train_steps=2)
    assert {file: file.stat().st_mtime_ns for file in caches[0].iterdir()} == encoded
    ends = [runs.tensors_of(tmp_path / name / "checkpoint-2") for name in ("run", "again")]
    assert runs.differing(*ends) == []
    pipeline = ShadowSDXLPipeline.from_pretrained(tmp_path / "run")
    assert pipeline.vae.config.scaling_factor != 0.18215
    assert pipeline.resolution == 32  # what it was trained on, not the checkpoint's 16


def test_cached_latents_train_like_pictures_encoded_on_the_way(tmp_path, data, vae):
    rows = []
    for cached in ("true", "false"):
        others = [*data, f"--model.vae={vae}", f"--data.cache_latents={cached}", "--objective.pixel_weight=1"]
        train(tmp_path / cached, *others, max_train_steps=2, logging_steps=1)
        rows.append(runs.rows_of(tmp_path / cached))
    for a, b in zip(*rows, strict=True):  # the cache is in float16
        assert a["loss"] == pytest.approx(b["loss"], rel=1e-2)


def test_gradient_checkpointing_changes_nothing(tmp_path, data):
    for name in ("false", "true"):
        train(tmp_path / name, *data, f"--gradient_checkpointing={name}", max_train_steps=2)
    on, off = (runs.tensors_of(tmp_path / name / "checkpoint-2") for name in ("true", "false"))
    for name, value in off.items():
        torch.testing.assert_close(on[name], value, rtol=1e-4, atol=1e-6)


def test_the_loss_curve_is_the_one_we_know(tmp_path, data):
    """Pinned on CPU in float32; a change means that every run changes. Tolerance: other CPUs add in other orders."""
    train(tmp_path / "run", *data, max_train_steps=4, logging_steps=1)
    losses = [row["loss"] for row in runs.rows_of(tmp_path / "run")]
    assert losses == pytest.approx(LOSSES, rel=1e-3)


PROGRAM = Path(__file__).parent / "two_shadow_ranks.py"


def test_two_ranks_draw_different_noise_hold_equal_weights_and_resume(tmp_path, data):
    """Every update is a checkpoint and validated: the ranks must agree on which one is the best, too."""
    training = {"expected_processes": 2, "checkpointing_steps": 1, "checkpoints_total_limit": None}
    start = [*data, "--validation.validation_steps=1"]
    line = partial(runs.command_line, system="shadow_sdxl", **training)
    first, second = runs.launch_two(PROGRAM, tmp_path, *line(tmp_path / "run", *start, max_train_steps=4))
    assert first["weights"] == second["weights"]
    assert len(set(first["noise"] + second["noise"])) == 8
    assert (tmp_path / "run/best.json").exists()

    shutil.copytree(tmp_path / "run", tmp_path / "broken")
    for step in (3, 4):
        shutil.rmtree(tmp_path / f"broken/checkpoint-{step}")
    runs.launch_two(
        PROGRAM, tmp_path, *line(tmp_path / "broken", *start, max_train_steps=4, resume_from_checkpoint="latest")
    )
    ends = [runs.tensors_of(tmp_path / name / "checkpoint-4") for name in ("run", "broken")]
    assert runs.differing(*ends) == []


@pytest.mark.parametrize(
    ("others", "message"),
    [
        (["--model.vae=null", "--model.pretrained_model=x"], "`model.vae` is null, but a pretrained SDXL works on"),
        (["--objective.name=epsilon"], "`model.raw_output` must be velocity: epsilon defines the output itself"),
        (["--objective.name=shortcut", "--objective.pixel_weight=1"], "`objective.pixel_weight` must be 0"),
        (["--objective.name=shortcut", "--train_batch_size=1"], "`training.train_batch_size` must be at least 2"),
        (["--objective.name=shortcut", "--use_ema=false"], "`training.use_ema` is false, but shortcut.teacher is ema"),
        (["--shortcut.condition_dropout_prob=0.1"], "shortcut.condition_dropout_prob"),
        (["--objective.noise_levels.discrete_sigmas=[0,1]"], "`discrete_sigmas` must lie in"),
        (["--model.light_harmonic=2"], "did you mean model.light_harmonics"),
    ],
)
def test_settings_that_do_not_fit_together_are_refused(tmp_path, data, capsys, others, message):
    with pytest.raises(SystemExit) as exit_:
        train(tmp_path / "run", *data, *others)
    assert exit_.value.code == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_what_is_wrong_with_data_or_model_is_one_line(tmp_path, data):
    same = [data[0], f"--data.validation_path={data[0].partition('=')[2]}"]
    with runs.refused(r"^data: .* share 10 objects"):
        train(tmp_path / "run", *same)
    with runs.refused(r"^data: .*none"):
        train(tmp_path / "run", f"--data.path={tmp_path / 'none'}")
    for key, message in {
        "model.norm_num_groups=7": "num_channels",
        "data.image_size=15": "data.image_size 15 is no multiple",
        "data.image_size=12": "`sample_size` 6 cannot be halved 2 times",
    }.items():
        with runs.refused(f"^model: .*{message}"):
            train(tmp_path / key[:8], *data, f"--{key}")
    benchmark = write_tar(tmp_path / "benchmark.tar", "softness_control_", num_objects=3)
    with runs.refused(r"^data: .*evaluation data \(softness_control\), never to be trained on"):
        train(tmp_path / "run", f"--data.path={benchmark}")


def test_an_attention_backend_that_would_be_ignored_is_refused(tmp_path, data, capsys):
    """A UNet's attention calls torch directly."""
    with pytest.raises(SystemExit):
        train(tmp_path / "run", *data, attention_backend="_native_math")
    assert "no attention of this network can be switched" in capsys.readouterr().err


def test_every_configuration_of_the_house_loads():
    for path in sorted((runs.ROOT / "configs/shadow_sdxl").glob("*.yaml")):
        config = load_config(train_shadow_sdxl.Config, ["--config", str(path)])
        assert config.training.output_dir.parts[0] == "outputs", path
