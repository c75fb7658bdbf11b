"""The real command: exact resume, extension, what a run leaves behind, refusals."""

from __future__ import annotations

import json
import shutil

import numpy as np
import pytest
import runs
import torch
from PIL import Image

from backlot.config import load_config
from pipelines.shortcut import ShortcutPipeline
from trainers import train_shortcut


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    """Twenty pictures in two classes: six updates of eight pass two ends of an epoch; half of them are mirrored."""
    root = tmp_path_factory.mktemp("pictures")
    noise = np.random.default_rng(0)
    for split, count in (("train", 20), ("validation", 4)):
        for i in range(count):
            path = root / split / f"class{i % 2}" / f"{i}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(noise.integers(0, 256, (8, 8, 3), np.uint8)).save(path)
    return [
        "--data.dataset_name=imagefolder",
        f"--data.path={root}",
        "--data.image_size=8",
        "--data.horizontal_flip=true",
        "--model.dropout=0.1",
    ]


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("accumulation", [1, 2])
def test_three_updates_and_three_after_a_resume_are_six(tmp_path, pictures, workers, accumulation):
    """Bit for bit, in the middle of an epoch and of a log interval, with dropout and mirrored pictures."""
    settings = {"gradient_accumulation_steps": accumulation, "dataloader_num_workers": workers}
    straight, broken = runs.resume_in_the_middle(tmp_path, *pictures, **settings)
    states = [json.loads((path / "run_state.json").read_text()) for path in (straight, broken)]
    for state in states:
        del state["config"]  # differs in folder and intervals
    assert states[0] == states[1]
    assert states[0]["consumed_samples"] == 6 * 8 * accumulation


def test_samples_do_not_depend_on_the_number_of_workers(tmp_path, pictures):
    for workers in (0, 2):
        runs.train(tmp_path / str(workers), *pictures, max_train_steps=4, dataloader_num_workers=workers)
    results = [runs.tensors_of(tmp_path / name / "checkpoint-4") for name in ("0", "2")]
    assert runs.differing(*results) == []


def test_two_updates_then_more_by_raising_max_train_steps(tmp_path):
    settings = {"logging_steps": 1, "checkpoints_total_limit": None}
    runs.train(tmp_path / "straight", **settings, max_train_steps=4)
    runs.train(tmp_path / "extended", **settings, max_train_steps=2)
    assert (tmp_path / "extended/model_index.json").exists()
    runs.train(tmp_path / "extended", **settings, max_train_steps=4, resume_from_checkpoint="latest")
    straight, extended = (runs.tensors_of(tmp_path / name / "checkpoint-4") for name in ("straight", "extended"))
    assert runs.differing(straight, extended) == []
    assert runs.rows_of(tmp_path / "straight") == runs.rows_of(tmp_path / "extended")
    ema = runs.tensors_of(tmp_path / "extended/checkpoint-4")
    pipeline = ShortcutPipeline.from_pretrained(tmp_path / "extended")
    for name, value in pipeline.transformer.state_dict().items():
        assert torch.equal(value, ema[f"ema/{name}"]), name


def test_resuming_a_finished_run_changes_nothing(tmp_path, finished_run):
    run_dir = shutil.copytree(finished_run, tmp_path / "run")
    before = (runs.tensors_of(run_dir / "checkpoint-6"), runs.rows_of(run_dir))
    runs.train(run_dir, max_train_steps=6, logging_steps=2, resume_from_checkpoint="latest")
    assert runs.differing(before[0], runs.tensors_of(run_dir / "checkpoint-6")) == []
    assert runs.rows_of(run_dir) == before[1]


def test_the_configuration_rules_after_a_resume(tmp_path, finished_run):
    """A new learning rate or weight decay takes effect; the one of the interrupted run does not come back."""
    run_dir = shutil.copytree(finished_run, tmp_path / "run")
    runs.train(run_dir, max_train_steps=7, logging_steps=1, learning_rate=5e-4, resume_from_checkpoint="latest")
    assert runs.rows_of(run_dir)[-1]["learning_rate"] == 5e-4


def test_another_seed_or_dataset_cannot_continue_a_run(tmp_path, finished_run, capsys):
    run_dir = shutil.copytree(finished_run, tmp_path / "run")
    with pytest.raises(SystemExit) as exit_:
        runs.train(run_dir, max_train_steps=8, seed=1, resume_from_checkpoint="latest")
    assert exit_.value.code == 2
    assert "another training.seed: 0, now 1" in capsys.readouterr().err


def test_a_run_leaves_its_description_and_a_pipeline(finished_run):
    names = {path.name for path in finished_run.iterdir()}
    assert names >= {"config.yaml", "environment.json", "metrics.jsonl", "model_index.json", "transformer", "scheduler"}
    environment = json.loads((finished_run / "environment.json").read_text())
    assert environment["packages"]["torch"] == torch.__version__
    assert environment["num_processes"] == 1
    config = load_config(train_shortcut.Config, ["--config", str(finished_run / "config.yaml")])
    assert config.training.max_train_steps == 6
    assert not list(finished_run.glob("*.tmp"))


def test_the_exported_pipeline_draws_pictures(finished_run):
    pipeline = ShortcutPipeline.from_pretrained(finished_run)
    pipeline.set_progress_bar_config(disable=True)
    images = pipeline([3, 4], num_inference_steps=1, generator=torch.Generator().manual_seed(0)).images
    assert [image.size for image in images] == [(8, 8), (8, 8)]


def test_rows_hold_rates_and_means(finished_run):
    rows = [json.loads(line) for line in (finished_run / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == [2, 4, 6]
    for row in rows:
        assert {"loss", "grad_norm", "learning_rate", "epoch", "loss_flow", "perf/samples_per_second"} <= row.keys()
        assert 0 <= row["perf/data_wait_share"] <= 1
        assert row["perf/memory_gib"] > 0
    assert rows[-1]["epoch"] == pytest.approx(48 / 1437)


def test_an_unreadable_data_folder_is_one_line(tmp_path):
    with runs.refused(r"data: .*not a folder"):
        runs.train(
            tmp_path / "run", f"--data.path={tmp_path / 'none'}", "--data.dataset_name=imagefolder", max_train_steps=1
        )


def test_the_loss_curve_is_the_one_we_know(tmp_path):
    """Pinned on CPU in float32; a change means that every run changes. Tolerance: other CPUs add in other orders."""
    runs.train(tmp_path / "run", max_train_steps=4, logging_steps=1)
    losses = [row["loss"] for row in runs.rows_of(tmp_path / "run")]
    assert losses == pytest.approx([1.297118, 1.208150, 1.385682, 1.213734], rel=1e-4)


@pytest.mark.parametrize(
    "name", ["flow_matching", "live_reflow", "consistency", "consistency_distillation", "progressive"]
)
def test_every_baseline_trains_validates_and_samples(tmp_path, name):
    others = ["--validation.validation_steps=4", f"--objective.name={name}", "--objective.denoise_timesteps=4"]
    if name in ("consistency", "consistency_distillation", "progressive"):
        others.append("--model.use_shortcut=false")
    if name in ("consistency_distillation", "progressive"):
        flow = ["--objective.name=flow_matching", "--model.use_shortcut=false"]
        runs.train(tmp_path / "teacher", *flow, max_train_steps=2)
        others.append(f"--objective.teacher_model={tmp_path / 'teacher'}")
    runs.train(tmp_path / "run", *others, max_train_steps=8, checkpointing_steps=4, checkpoints_total_limit=None)
    rows = runs.rows_of(tmp_path / "run")
    assert [row["step"] for row in rows if any(key.startswith("validation/") for key in row)] == [4, 8]
    # ... and in the middle, where a progressive teacher changes, it resumes exactly
    shutil.copytree(tmp_path / "run", tmp_path / "resumed")
    shutil.rmtree(tmp_path / "resumed" / "checkpoint-8")
    runs.train(tmp_path / "resumed", *others, max_train_steps=8, resume_from_checkpoint="latest")
    ends = [runs.tensors_of(tmp_path / folder / "checkpoint-8") for folder in ("run", "resumed")]
    assert runs.differing(*ends) == []
    images = ShortcutPipeline.from_pretrained(tmp_path / "run")([3, 7], num_inference_steps=2).images
    assert len(images) == 2


@pytest.mark.parametrize(
    ("others", "message"),
    [
        (["--objective.name=consistency"], "`model.use_shortcut` must be false: consistency trains no step sizes"),
        (["--model.use_shortcut=false"], "a shortcut model has to know its step size"),
        (["--training.train_batch_size=1"], "`training.train_batch_size` must be at least 2"),
        (["--training.use_ema=false"], "`training.use_ema` is false, but shortcut learns from the EMA"),
        (["--model.official=true"], "set objective.smallest_step to lattice"),
        (["--data.dataset_name=imagefolder"], "`data.path` is required for imagefolder"),
        (["--data.dataset_name=latents", "--data.path=x"], "`data.vae` names the VAE of a latents dataset"),
    ],
)
def test_settings_that_do_not_fit_together_are_refused(tmp_path, capsys, others, message):
    with pytest.raises(SystemExit) as exit_:
        runs.train(tmp_path / "run", *others)
    assert exit_.value.code == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_validation_steps_the_network_cannot_make_are_refused_at_the_start(tmp_path):
    others = ["--objective.preset=official", "--model.official=true", "--validation.num_inference_steps=[3]"]
    with runs.refused(r"validation.num_inference_steps: this network was trained on steps of 2\^-k"):
        runs.train(tmp_path / "run", *others)
