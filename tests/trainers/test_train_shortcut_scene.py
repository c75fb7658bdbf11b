"""The real command for scenes: exact resume, accumulation, modes, conditions, the guide's names, refusals."""

from __future__ import annotations

from functools import partial
from pathlib import Path

import pytest
import runs
import torch
from scene_samples import change_tensors, write_scenes

from backlot.config import load_config
from pipelines.shortcut_scene import ShortcutScenePipeline
from trainers import train_shortcut_scene

train = partial(runs.train, system="shortcut_scene")
LOSSES = [9.465008, 7.904522, 3.910464, 4.564957]
VALIDATED = "--validation.validation_steps=2"


@pytest.fixture(scope="module")
def root(tmp_path_factory) -> Path:
    """Ten scenes of two to four objects: six updates of four pass the end of an epoch."""
    return write_scenes(tmp_path_factory.mktemp("scenes"), {"train": 10, "val": 3}, stats=True)


@pytest.fixture(scope="module")
def data(root) -> str:
    return f"--data.data_root={root}"


@pytest.mark.parametrize(
    ("workers", "accumulation", "others"),
    [(0, 1, []), (2, 2, ["--shortcut.pairing=hungarian"]), (0, 2, ["--shortcut.mode=object"])],
    ids=["scene", "paired", "object"],
)
def test_three_updates_and_three_after_a_resume_are_six(tmp_path, data, workers, accumulation, others):
    """Bit for bit, in the middle of an epoch, of a log interval and of the flow-only phase."""
    settings = {"gradient_accumulation_steps": accumulation, "dataloader_num_workers": workers}
    others = [data, "--shortcut.fm_warmup_steps=4", *others]
    runs.resume_in_the_middle(tmp_path, *others, system="shortcut_scene", **settings)


def test_two_updates_then_four_and_a_pipeline_of_the_ema(tmp_path, data):
    settings = {"logging_steps": 1, "checkpoints_total_limit": None}
    train(tmp_path / "run", data, **settings, max_train_steps=2)
    assert (tmp_path / "run/model_index.json").exists()
    train(tmp_path / "run", data, **settings, max_train_steps=4, resume_from_checkpoint="latest")
    ema = runs.tensors_of(tmp_path / "run/checkpoint-4")
    for name, value in ShortcutScenePipeline.from_pretrained(tmp_path / "run").transformer.state_dict().items():
        assert torch.equal(value, ema[f"ema/{name}"]), name


def test_micro_batches_of_any_size_give_the_same_gradient(tmp_path, monkeypatch):
    """8x1 = 4x2 = 2x4, where noise and time belong to the sample: the gradient's norm, to rounding."""
    root = write_scenes(tmp_path / "scenes", {"train": 8, "val": 1}, num_objects=(3, 3), stats=True)

    def loss(run, batch, config):
        data, conditions = train_shortcut_scene.split_batch(batch)
        error = 0
        for i in range(len(batch["object_mask"])):
            row = {k: v[i : i + 1] for k, v in data.items()}
            # an item's objects come in the order of its epoch, and so does its noise
            noise = {k: torch.randn(v.shape, generator=torch.Generator().manual_seed(0)) for k, v in row.items()}
            t = row["translation"].abs().mean().clamp(0.1, 0.9).reshape(1)
            noisy = {k: (1 - t) * noise[k] + t * row[k] for k in row}
            velocity = run.model(noisy, t, 0 * t, **{k: v[i : i + 1] for k, v in conditions.items()}).sample
            error = error + sum((velocity[k] - row[k] + noise[k]).square().mean() for k in row)
        return error / len(batch["object_mask"]), {}

    monkeypatch.setattr(train_shortcut_scene, "compute_loss", loss)
    rows = []
    for size in (8, 4, 2):
        settings = {"train_batch_size": size, "gradient_accumulation_steps": 8 // size, "logging_steps": 1}
        train(tmp_path / str(size), f"--data.data_root={root}", **settings, max_train_steps=2)
        rows.append(runs.rows_of(tmp_path / str(size)))
    for other in rows[1:]:
        for a, b in zip(rows[0], other, strict=True):
            assert b["loss"] == pytest.approx(a["loss"], rel=1e-5)
            assert b["grad_norm"] == pytest.approx(a["grad_norm"], rel=1e-4)


def test_objects_weigh_alike_however_the_scenes_are_batched(tmp_path, monkeypatch):
    """Scenes of one to four objects: `reduction object` is a mean over all objects of the update. The loss is ours."""
    root = write_scenes(tmp_path / "scenes", {"train": 8, "val": 1}, num_objects=(1, 4), stats=True)

    def draw(batch, object_mask, config, step, generator=None):
        """Noise that belongs to the sample: what does not depend on how samples are batched."""
        seeds = [int(row[0].abs().sum() * 1e4) for row in batch["translation"]]
        generators = [torch.Generator().manual_seed(seed) for seed in seeds]
        noise = {k: torch.zeros_like(v) for k, v in batch.items()}
        for i, mask in enumerate(object_mask):  # padding differs from batch to batch
            for k, v in batch.items():
                noise[k][i, mask] = torch.randn(v[i, mask].shape, generator=generators[i])
        return grid_draws(batch, config, 0.4, noise=noise)

    grid_draws = train_shortcut_scene.objectives.scene.grid_draws
    monkeypatch.setattr(train_shortcut_scene.objectives.scene, "draw", draw)
    others = [f"--data.data_root={root}", "--shortcut.reduction=object", "--shortcut.self_consistency_prob=0"]
    rows = []
    for size in (8, 4, 1):
        settings = {"train_batch_size": size, "gradient_accumulation_steps": 8 // size, "logging_steps": 1}
        train(tmp_path / str(size), *others, **settings, max_train_steps=2)
        rows.append(runs.rows_of(tmp_path / str(size)))
    for other in rows[1:]:
        for a, b in zip(rows[0], other, strict=True):
            assert b["loss"] == pytest.approx(a["loss"], rel=1e-4)
            assert b["grad_norm"] == pytest.approx(a["grad_norm"], rel=1e-3)


@pytest.mark.parametrize(
    "others",
    [
        [],
        ["--shortcut.mode=object", "--model.attention_scope=[object]"],
        ["--model.condition=none"],
        ["--model.condition=tokens"],
        ["--model.object_condition=mask", "--model.use_pointmap=false"],
        ["--model.object_condition=slot", "--shortcut.independent_t=true"],
        ["--shortcut.self_consistency_prob=0", "--model.use_shortcut=false"],
        ["--shortcut.pairing=hungarian", "--shortcut.reduction=object"],
    ],
    ids=["image", "object", "none", "tokens", "mask", "slot", "flow", "paired"],
)
def test_every_kind_of_run_validates_and_generates(tmp_path, data, others):
    train(tmp_path / "run", data, VALIDATED, *others, max_train_steps=2)
    row = runs.rows_of(tmp_path / "run")[-1]
    assert "validation/loss/t=0,D=0" in row
    assert ("validation/loss/t=0.5,D=0.25" in row) == ("--model.use_shortcut=false" not in others)
    assert list((tmp_path / "run/samples").glob("scenes-000002.png"))
    pipeline = ShortcutScenePipeline.from_pretrained(tmp_path / "run")
    assert pipeline.codec.config.mode == "zscore"
    if pipeline.transformer.config.condition == "none":
        shortcut = pipeline.transformer.config.use_shortcut
        made = pipeline(num_objects=3, num_inference_steps=2, use_shortcut=shortcut)
        assert len(made.poses[0]) == 3


def test_loss_is_logged_by_kind_modality_step_size_and_time(tmp_path, data):
    train(tmp_path / "run", data, "--shortcut.fm_warmup_steps=4", max_train_steps=12, logging_steps=4)
    first, *_, last = runs.rows_of(tmp_path / "run")
    assert "self_consistency_loss" not in first  # there was none: no zero that was never measured
    names = {"self_consistency_loss", "flow_matching_loss/shape", "self_consistency_loss/translation"}
    assert names <= last.keys()
    assert any(name.startswith("self_consistency_loss/D=") for name in last)
    assert sum(name.startswith("flow_matching_loss/t=") for name in last) >= 3
    parts = sum(
        first[f"flow_matching_loss/{k}"] * w
        for k, w in load_tiny().shortcut.loss_weights.items()
        if k != "translation_scale"
    )
    assert first["flow_matching_loss"] == pytest.approx(parts, rel=1e-5)
    assert first["loss"] == pytest.approx(first["flow_matching_loss"], rel=1e-5)


def load_tiny(*others: str) -> train_shortcut_scene.Config:
    path = runs.ROOT / "configs/shortcut_scene/tiny.yaml"
    return load_config(train_shortcut_scene.Config, ["--config", str(path), *others])


def test_every_name_of_the_guide_is_understood(tmp_path, data):
    line = "--data_root r --output_dir o --max_objects_per_scene 7 --num_workers 3 --self_consistency_prob 0.3"
    line += " --shortcut_loss_weight 2 --cfg_strength 2.5 --ratio_cfg_samples 0.1 --fm_in_shortcut_target_prob 0.2"
    line += " --fm_eps_max 0.05 --num_epochs 9 --learning_rate 3e-4 --weight_decay 0.05 --grad_clip 0 --log_interval 11"
    config = load_tiny(*line.split(), "--save_interval", "5", "--batch_mode", "false")
    shortcut, training = config.shortcut, config.training
    assert (config.data.data_root, config.data.max_objects_per_scene, training.output_dir.name) == ("r", 7, "o")
    assert (shortcut.self_consistency_prob, shortcut.shortcut_loss_weight, shortcut.guidance_scale) == (0.3, 2, 3.5)
    assert (shortcut.ratio_cfg_samples, shortcut.fm_in_shortcut_target_prob, shortcut.fm_eps_max) == (0.1, 0.2, 0.05)
    assert (training.dataloader_num_workers, training.adam_weight_decay, training.logging_steps) == (3, 0.05, 11)
    assert (training.max_grad_norm, training.learning_rate, shortcut.mode) == (0, 3e-4, "object")
    # ten scenes in batches of four: three passes are eight updates
    train(tmp_path / "run", data, "--num_epochs=3", "--save_interval=1", checkpoints_total_limit=None)
    assert runs.rows_of(tmp_path / "run")[-1]["step"] == 8 or (tmp_path / "run/checkpoint-8").is_dir()
    assert (tmp_path / "run/checkpoint-3").is_dir()


def test_a_scene_model_starts_from_an_object_model(tmp_path, data):
    objects = ["--shortcut.mode=object", "--model.attention_scope=[object]", "--model.use_shortcut=false"]
    train(tmp_path / "objects", data, *objects, "--self_consistency_prob=0", max_train_steps=2)
    train(tmp_path / "scenes", data, f"--model.init_from={tmp_path / 'objects'}", max_train_steps=1, learning_rate=1e-9)
    start = ShortcutScenePipeline.from_pretrained(tmp_path / "objects").transformer.state_dict()
    end = ShortcutScenePipeline.from_pretrained(tmp_path / "scenes").transformer.state_dict()
    assert any("scene_attention" in name for name in end)
    for name, value in start.items():
        torch.testing.assert_close(end[name], value, rtol=0, atol=1e-6)


def test_scene_mode_without_scene_scope_is_warned_of(tmp_path, data, caplog):
    train(tmp_path / "run", data, "--model.attention_scope=[object]", max_train_steps=1)
    assert "objects stay independent" in caplog.text


def test_validation_repeats_bit_for_bit_and_leaves_the_run_alone(tmp_path, data):
    for name, every in (("with", "1"), ("without", "null")):
        train(
            tmp_path / name,
            data,
            f"--validation.validation_steps={every}",
            max_train_steps=3,
            logging_steps=1,
            learning_rate=1e-30,
        )
    ends = [runs.tensors_of(tmp_path / name / "checkpoint-3") for name in ("with", "without")]
    assert runs.differing(*ends) == []
    rows = [{k: v for k, v in row.items() if k.startswith("validation/")} for row in runs.rows_of(tmp_path / "with")]
    rows = [row for row in rows if row]
    assert rows == [rows[0]] * 3


def test_gradient_checkpointing_changes_nothing(tmp_path, data):
    for name in ("false", "true"):
        train(tmp_path / name, data, f"--gradient_checkpointing={name}", max_train_steps=2)
    on, off = (runs.tensors_of(tmp_path / name / "checkpoint-2") for name in ("true", "false"))
    for name, value in off.items():
        torch.testing.assert_close(on[name], value, rtol=1e-4, atol=1e-6)


def test_the_loss_curve_is_the_one_we_know(tmp_path, data):
    """Pinned on CPU in float32; a change means that every run changes. Tolerance: other CPUs add in other orders."""
    train(tmp_path / "run", data, max_train_steps=4, logging_steps=1)
    losses = [row["loss"] for row in runs.rows_of(tmp_path / "run")]
    assert losses == pytest.approx(LOSSES, rel=1e-3)


def test_two_ranks_with_scenes_of_different_size(tmp_path, root):
    """Equal coins, different noise, equal weights, and no rank waits for ever."""
    root = write_scenes(tmp_path / "scenes", {"train": 9, "val": 2}, num_objects=(1, 5), stats=True)
    arguments = runs.command_line(
        tmp_path / "run", f"--data.data_root={root}", "--shortcut.fm_warmup_steps=1", "--shortcut.reduction=object",
        system="shortcut_scene", expected_processes=2, max_train_steps=4, train_batch_size=2,
    )  # fmt: skip
    first, second = runs.launch_two(Path(__file__).parent / "two_scene_ranks.py", tmp_path, *arguments)
    assert first["weights"] == second["weights"]
    assert first["objects"] != second["objects"]
    assert len(set(first["noise"] + second["noise"])) == 8
    for a, b in zip(first["coins"], second["coins"], strict=True):
        assert a == b


@pytest.mark.parametrize(
    ("others", "message"),
    [
        (["--model.use_shortcut=false"], "`model.use_shortcut` is false: set shortcut.self_consistency_prob to 0"),
        (["--use_ema=false"], "`training.use_ema` is false, but shortcut.teacher is ema"),
        (["--model.object_condition=mask", "--model.condition=tokens"], "mask needs model.condition image"),
        (["--shortcut.pairing=hungarian", "--model.object_condition=mask"], "would tie the noise to conditions"),
        (["--model.image_encoder=dino"], "`model.image_encoder` makes tokens: set model.condition to tokens"),
        (["--shortcut.mode=object", "--shortcut.pairing=hungarian"], "an object alone has one slot"),
        (["--shortcut.cfg_modalities=[form]"], "`cfg_modalities` names form"),
        (["--shortcut.self_consistency_probability=1"], "did you mean shortcut.self_consistency_prob"),
    ],
)
def test_settings_that_do_not_fit_together_are_refused(tmp_path, data, capsys, others, message):
    with pytest.raises(SystemExit) as exit_:
        train(tmp_path / "run", data, *others)
    assert exit_.value.code == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_what_is_wrong_with_data_or_model_is_one_line(tmp_path, data):
    with runs.refused(r"^data: .*none"):
        train(tmp_path / "none-run", f"--data.data_root={tmp_path / 'none'}", "--data.pose_codec=identity")
    with runs.refused(r"^data: .*stats.json"):
        train(tmp_path / "no-stats", f"--data.data_root={write_scenes(tmp_path / 'raw')}")
    with runs.refused(r"^model: .*patch_size"):
        train(tmp_path / "patch", data, "--model.patch_size=5")
    with runs.refused(r"^model: "):
        train(tmp_path / "vae", data, f"--model.vae={tmp_path / 'nothing'}")
    bad = write_scenes(tmp_path / "bad", stats=True)
    scene = sorted((bad / "train").iterdir())[1]
    change_tensors(scene, translation=torch.full((3, 1, 3), torch.nan))
    with runs.refused(rf"^data: .*{scene.name}.*translation"):
        train(tmp_path / "nan", f"--data.data_root={bad}")


def test_every_configuration_of_the_house_loads():
    for path in sorted((runs.ROOT / "configs/shortcut_scene").glob("*.yaml")):
        config = load_config(train_shortcut_scene.Config, ["--config", str(path)])
        assert config.training.output_dir.parts[0] == "outputs", path
