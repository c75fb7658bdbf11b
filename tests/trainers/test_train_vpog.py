"""The real command for poses: exact resume, accumulation, two ranks, validation, sources, refusals, preflight."""

from __future__ import annotations

import shutil
import subprocess
import sys
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import runs
import torch
from torch.utils.data import default_collate

from backlot.config import load_config
from data_prep import bop
from data_prep.bop.models import read_models
from data_prep.bop.query_scenes import SceneSettings, make_dataset
from data_prep.bop.render_templates import render_all
from objectives import pose_labels
from pipelines.vpog import TemplateSet, VPOGPipeline
from trainers import train_vpog

train = partial(runs.train, system="vpog")
LOSSES = [5.017523, 5.213293, 3.721036, 3.678770]
PICTURES = SceneSettings(
    image_size=(96, 72), images_per_scene=3, num_objects=(2, 2), in_plane_degrees=30, shadows=False, supersample=1
)


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    """Three objects in six pictures, twelve samples; two others for validation; templates of all."""
    root = tmp_path_factory.mktemp("bop")
    make_dataset(root / "train", 0, 3, 6, num_symmetric=1, settings=PICTURES, num_workers=1)
    make_dataset(root / "test", 1, 2, 3, split="test", settings=PICTURES, num_workers=1)
    for name in ("train", "test"):
        models = read_models(root / name / "models")
        render_all(models, root / name / "templates", views=42, size=64, supersample=1, num_workers=1)
    return root


@pytest.fixture(scope="module")
def data(root):
    return [f"--data.path={root / 'train/train'}", f"--data.templates={root / 'train/templates'}"]


@pytest.fixture(scope="module")
def unseen(root):
    section = f'{{"path": "{root / "test/test"}", "templates": "{root / "test/templates"}"}}'
    return ["--validation.validation_steps=2", "--validation.num_samples=2", f"--data.validation={section}"]


@pytest.mark.parametrize(
    ("workers", "accumulation", "others"), [(0, 1, []), (2, 2, ["--epropnp.enabled=true", "--epropnp.min_points=4"])]
)
def test_three_updates_and_three_after_a_resume_are_six(tmp_path, data, workers, accumulation, others):
    """Bit for bit, past the end of an epoch, with jittered masks, other colours, and the pose loss's own draws."""
    settings = {"gradient_accumulation_steps": accumulation, "dataloader_num_workers": workers}
    runs.resume_in_the_middle(tmp_path, *data, *others, system="vpog", **settings)


def test_two_updates_then_four_and_a_pipeline_that_answers(tmp_path, root, data, unseen):
    settings = {"logging_steps": 1, "checkpoints_total_limit": None}
    train(tmp_path / "run", *data, *unseen, **settings, max_train_steps=2)
    train(tmp_path / "run", *data, *unseen, **settings, max_train_steps=4, resume_from_checkpoint="latest")
    row = runs.rows_of(tmp_path / "run")[-1]
    assert {"validation/median_rotation_deg", "validation/mssd_recall", "validation/within_one"} <= row.keys()
    samples = {path.name for path in (tmp_path / "run/samples").iterdir()}
    assert "matches-000004.png" in samples
    pipeline = VPOGPipeline.from_pretrained(tmp_path / "run")
    ema = runs.tensors_of(tmp_path / "run/checkpoint-4")
    for name, value in pipeline.model.state_dict().items():
        assert torch.equal(value, ema[f"ema/{name}"]), name
    sample = bop.PoseSource(root / "train/train").read(0)
    templates = TemplateSet.load(root / f"train/templates/{sample.object_id:06d}.safetensors")
    (estimate,) = pipeline(sample.rgb, sample.K, templates, mask=sample.mask).estimates
    assert np.isfinite(estimate.camera_from_object).all()


def test_micro_batches_of_any_size_give_the_same_update(tmp_path, data):
    """4x1 = 2x2 = 1x4 with our own losses, whose terms have other numbers of valid entries in every sample."""
    rows = []
    for size in (4, 2, 1):
        settings = {"train_batch_size": size, "gradient_accumulation_steps": 4 // size, "logging_steps": 1}
        train(tmp_path / str(size), *data, **settings, max_train_steps=2, adam_epsilon=1e-3)
        rows.append(runs.rows_of(tmp_path / str(size)))
    for other in rows[1:]:
        for a, b in zip(rows[0], other, strict=True):
            assert b["loss"] == pytest.approx(a["loss"], rel=1e-4)
            assert b["grad_norm"] == pytest.approx(a["grad_norm"], rel=1e-3)


def test_gradients_reach_every_parameter(tmp_path, data):
    train(tmp_path / "run", *data, max_train_steps=1)
    config = load_config(train_vpog.Config, ["--config", str(tmp_path / "run/config.yaml")])
    model, before = train_vpog.create_model(config), train_vpog.create_model(config).state_dict()
    after = runs.tensors_of(tmp_path / "run/checkpoint-1")
    still = [name for name, _ in model.named_parameters() if torch.equal(after[f"model/{name}"], before[name])]
    assert still == []


def test_the_loss_curve_is_the_one_we_know(tmp_path, data):
    """Pinned on CPU in float32; a change means that every run changes. Tolerance: other CPUs add in other orders."""
    train(tmp_path / "run", *data, max_train_steps=4, logging_steps=1)
    losses = [row["loss"] for row in runs.rows_of(tmp_path / "run")]
    assert losses == pytest.approx(LOSSES, rel=2e-3)


def test_the_warm_up_runs(tmp_path, data):
    settings = {"lr_scheduler": "constant_with_warmup", "lr_warmup_steps": 4, "learning_rate": 1e-3}
    train(tmp_path / "run", *data, **settings, logging_steps=1, max_train_steps=6)
    rates = [row["learning_rate"] for row in runs.rows_of(tmp_path / "run")]
    assert rates[0] < rates[1] < rates[2] < rates[4] == rates[5] == pytest.approx(1e-3)


def test_the_encoder_has_its_own_rate(tmp_path, data):
    """With a factor of nearly 0 it stays what it was, and the rest learns."""
    train(tmp_path / "run", *data, '--training.learning_rate_factors={"encoder.": 1e-12}', max_train_steps=2)
    config = load_config(train_vpog.Config, ["--config", str(tmp_path / "run/config.yaml")])
    before, after = train_vpog.create_model(config).state_dict(), runs.tensors_of(tmp_path / "run/checkpoint-2")
    moved = {name for name, value in before.items() if (after[f"model/{name}"] - value).abs().max() > 1e-6}
    assert moved
    assert not any(name.startswith("encoder.") for name in moved)


def test_passes_become_updates_and_the_guide_s_names_are_known(tmp_path, data):
    """12 samples in batches of 2: two passes are 12 updates."""
    arguments = runs.command_line(tmp_path / "run", *data, system="vpog")
    train_vpog.main([*arguments, "--training.max_train_steps=null", "--max_epochs=2", "--batch_size=2"])
    assert (tmp_path / "run/checkpoint-12").is_dir()


@pytest.mark.parametrize(("number", "weights", "share"), [(0, (1, 1), 0.0), (1, (1, 1), 1.0), (2, (3, 1), 0.25)])
def test_sources_come_in_their_shares(root, tmp_path, data, number, weights, share):
    second = f'{{"path": "{root / "test/test"}", "templates": "{root / "test/templates"}", "weight": {weights[1]}}}'
    others = [f"--data.second={second}", f"--data.train_dataset_id={number}", f"--data.weight={weights[0]}"]
    arguments = runs.command_line(tmp_path / "run", *data, *others, system="vpog")
    config = load_config(train_vpog.Config, arguments)
    dataset, order, *_ = train_vpog.open_data(config, 64, None)
    names = [dataset[int(key)]["sample_id"] for key in order.keys(0, 12)]
    assert len(dataset.sources) == (2 if number == 2 else 1)
    if number == 2:
        counts = [int(key) >= len(dataset.sources[0]) for key in order.keys(0, 1000)]
        assert np.mean(counts) == pytest.approx(share, abs=0.01)
    else:
        assert len(set(names)) == min(12, len(dataset))


PROGRAM = Path(__file__).parent / "two_vpog_ranks.py"


def test_two_ranks_see_other_samples_hold_equal_weights_and_resume(tmp_path, data, monkeypatch):
    """Also where one of them has no pairs at all: it must not wait for ever, nor give gradients of its own."""
    monkeypatch.setenv("NO_PAIRS", "1")
    training = {"expected_processes": 2, "checkpointing_steps": 2, "checkpoints_total_limit": None}
    line = partial(runs.command_line, system="vpog", max_train_steps=4, **training)
    first, second = runs.launch_two(PROGRAM, tmp_path, *line(tmp_path / "run", *data))
    assert first["weights"] == second["weights"]
    assert not set(first["samples"][:6]) & set(second["samples"][:6])
    shutil.copytree(tmp_path / "run", tmp_path / "broken")
    shutil.rmtree(tmp_path / "broken/checkpoint-4")
    runs.launch_two(PROGRAM, tmp_path, *line(tmp_path / "broken", *data, resume_from_checkpoint="latest"))
    ends = [runs.tensors_of(tmp_path / name / "checkpoint-4") for name in ("run", "broken")]
    assert runs.differing(*ends) == []


def test_a_sheet_shows_labels_and_flow(root, data, tmp_path):
    """True matches drawn twice are alike; other classes are not."""
    from types import SimpleNamespace

    from evaluation.vpog import draw_batch

    config = load_config(train_vpog.Config, runs.command_line(tmp_path, *data, system="vpog"))
    dataset, *_ = train_vpog.open_data(config, 64, None)
    batch = default_collate([dataset[0], dataset[1]])
    labels = pose_labels.build_labels(batch, 8, config.labels)
    said = torch.nn.functional.one_hot(labels.patch_cls.clamp(min=0), 65).float()
    sheet = np.asarray(draw_batch(batch, labels, SimpleNamespace(logits=said, flow=labels.dense_flow), cell=64))
    height = (sheet.shape[0] - 8) // 6
    rows = [sheet[8 + k * height : 8 + (k + 1) * height, 80:] for k in range(6)]
    assert np.array_equal(rows[2], rows[3])
    assert np.array_equal(rows[4], rows[5])
    other = torch.nn.functional.one_hot((labels.patch_cls.clamp(min=0) + 3) % 65, 65).float()
    changed = np.asarray(draw_batch(batch, labels, SimpleNamespace(logits=other, flow=labels.dense_flow), cell=64))
    assert not np.array_equal(changed, sheet)


@pytest.mark.parametrize(
    ("others", "message"),
    [
        (["--data.train_dataset_id=2"], "`data.train_dataset_id` is 2, but there is no `data.second`"),
        (["--losses.cls=0", "--losses.dense=0", "--losses.center=0"], "nothing would be learned"),
        (["--epropnp.enabled=true", "--losses.dense=0"], "`epropnp.enabled` needs `losses.dense`"),
        (["--data.mask_querry=gt"], "did you mean data.mask_query"),
        (["--model.preset=huge"], "tiny, small, base"),
    ],
)
def test_settings_that_do_not_fit_together_are_refused(tmp_path, data, capsys, others, message):
    with pytest.raises(SystemExit) as exit_:
        train(tmp_path / "run", *data, *others)
    assert exit_.value.code == 2
    assert message.split(",")[0] in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_what_is_wrong_with_data_or_model_is_one_line(tmp_path, root, data):
    with runs.refused(r"^data: .*none"):
        train(tmp_path / "run", f"--data.path={tmp_path / 'none'}", data[1])
    with runs.refused(r"^data: .*render_templates"):
        train(tmp_path / "run", data[0], f"--data.templates={tmp_path}")
    with runs.refused(r"^model: `image_size` \(60\) must be a multiple of the patch size \(8\)"):
        train(tmp_path / "run", *data, "--model.image_size=60")
    with runs.refused(r"^data: .*64"):
        train(tmp_path / "run", *data, "--model.image_size=128")
    with runs.refused(r"^model: .*window_size"):
        train(tmp_path / "run", *data, "--model.window_size=7")


def test_every_configuration_of_the_house_loads():
    for path in sorted((runs.ROOT / "configs/vpog").glob("*.yaml")):
        config = load_config(train_vpog.Config, ["--config", str(path)])
        assert config.training.output_dir.parts[0] == "outputs", path


def preflight(*arguments: str) -> subprocess.CompletedProcess:
    command = [sys.executable, "-m", "trainers.preflight", "trainers/train_vpog.py", *arguments]
    return subprocess.run(command, cwd=runs.ROOT, capture_output=True, text=True)


def test_the_preflight_names_its_five_checks(data):
    ended = preflight("--config", "configs/vpog/tiny.yaml", *data)
    assert ended.returncode == 0, ended.stderr
    checks = [line.split() for line in ended.stdout.splitlines()]
    assert checks == [[name, "ok"] for name in ("configuration", "model", "data", "update", "checkpoint")]


@pytest.mark.parametrize(
    ("key", "failed"), [("--model.preset=huge", "configuration"), ("--model.window_size=7", "model"), (None, "data")]
)
def test_the_preflight_says_which_check_failed(data, tmp_path, key, failed):
    others = [*data, key] if key else [f"--data.path={tmp_path}", data[1]]
    ended = preflight("--config", "configs/vpog/tiny.yaml", *others)
    assert ended.returncode == 2
    assert ended.stderr.split()[:2] == [failed, "failed"]
    assert "Traceback" not in ended.stderr
