"""The real command for layouts: what each stage trains, hand-over, resume, tags, pictures, refusals."""

from __future__ import annotations

import json
import os
import random
import re
import shutil
import subprocess
from pathlib import Path

import pytest
import runs
import torch
import yaml
from diffusers import FluxPipeline
from layout_data import locations, write_data
from safetensors.torch import load_file

from backlot.config import load_config
from objectives.layout_settings import DropoutConfig
from pipelines.layout_flux import FluxLayoutAdapter, load_adapter
from trainers import train_layout_flux

CONFIGS = runs.ROOT / "configs/layout_flux"
PARTS = {
    "stage1": {"alpha_predictor", "instance_encoder", "layout_head", "assemble_attn_lora"},
    "stage2": {"alpha_predictor", "instance_encoder", "layout_head", "assemble_attn_lora", "modulation_head"},
    "stage3": {"feedback_bridge"},
}
STAGES = list(PARTS)
TINY = '{"modulation_head": 1e-12}'
LOSSES = [1.771648, 2.604401, 0.626372, 4.670137]


class World:
    """A folder with tiny models, prepared scenes, and runs of each stage upon one another."""

    def __init__(self, root: Path):
        self.root = root

    def arguments(self, stage: str, run_dir: Path, *others: str, **training) -> list[str]:
        values = {"output_dir": run_dir, "logging_steps": 1, "max_train_steps": 3, **training}
        given = locations(self.root / "data", None if stage == "base" else self.root / "base")
        given += [f"--logging_dir={run_dir.parent / 'logs'}", "--validation_steps=null"]
        given += [f"--training.{key}={'null' if value is None else value}" for key, value in values.items()]
        return ["--config", str(CONFIGS / f"tiny_{stage}.yaml"), *given, *others]

    def train(self, stage: str, run_dir: Path, *others: str, **training) -> Path:
        runs.reset_accelerate()
        train_layout_flux.main(self.arguments(stage, run_dir, *others, **training))
        return run_dir

    def start_of(self, stage: str) -> list[str]:
        """Where a stage of a test's own starts."""
        before = {"stage2": "stage1", "stage3": "stage2"}.get(stage)
        return [f"--init_from={self.root / before}"] if before else []


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    world = World(tmp_path_factory.mktemp("layout"))
    write_data(world.root / "data")
    # its gates begin closed, and what lies behind a closed gate has no gradient
    world.train("base", world.root / "base", max_train_steps=8, learning_rate=1e-2)
    for stage in STAGES:
        world.train(stage, world.root / stage, checkpointing_steps=1, checkpoints_total_limit=None)
    return world


def parts_of(names) -> set[str]:
    """The parts that parameters of an adapter belong to."""
    prefixes = {"alpha_predictor.": "alpha_predictor", "instance_encoder.": "instance_encoder"}
    prefixes |= {"modulation_head.": "modulation_head", "bridges.": "feedback_bridge"}
    found = {part for name in names for prefix, part in prefixes.items() if name.startswith(prefix)}
    found |= {"assemble_attn_lora" for name in names if ".lora." in name}
    return found | {"layout_head" for name in names if ".zero_out." in name}


# ---- what trains ----


@pytest.mark.parametrize("stage", STAGES)
def test_gradients_reach_all_that_trains_within_two_updates_and_the_rest_never_moves(world, stage):
    """What trains has moments; every one of them is alive after the third pass, and all else is as it was."""
    weights = load_file(world.root / stage / "checkpoint-3/model.safetensors")
    moments = load_file(world.root / stage / "checkpoint-3/optimizer.safetensors")
    trained = {key.rpartition("/")[0] for key in moments}
    assert parts_of(trained) == PARTS[stage]
    assert [name for name in trained if not moments[f"{name}/exp_avg"].any()] == []
    assert parts_of(weights) == set().union(*(PARTS[each] for each in STAGES[: STAGES.index(stage) + 1]))
    before = load_file(world.root / stage / "checkpoint-1/model.safetensors")
    moved = {name for name in weights if not torch.equal(weights[name], before[name])}
    assert moved == trained
    if stage != "stage1":
        given = load_file(world.root / STAGES[STAGES.index(stage) - 1] / "checkpoint-3/ema.safetensors")
        assert [name for name in given.keys() - trained if not torch.equal(given[name], weights[name])] == []


def test_gates_of_the_bridge_have_a_gradient_at_once_and_its_projections_at_the_second_update(world):
    first, second = (load_file(world.root / f"stage3/checkpoint-{n}/optimizer.safetensors") for n in (1, 2))
    for name in (key for key in first if key.endswith("/exp_avg")):
        assert bool(first[name].any()) == (".gate." in name), name
        assert second[name].any(), name


def test_the_base_learns_whole_and_is_exported_as_flux(world, tmp_path):
    """Its gates begin closed, so gradients reach the blocks some updates late."""
    base = world.train("base", tmp_path / "base", max_train_steps=5)
    moments = load_file(base / "checkpoint-5/optimizer.safetensors")
    assert [key for key in moments if key.endswith("/exp_avg") and not moments[key].any()] == []
    pipeline = FluxPipeline.from_pretrained(base)
    assert json.loads((base / "model_index.json").read_text())["_class_name"] == "FluxPipeline"
    average = load_file(base / "checkpoint-5/ema.safetensors")
    for name, value in pipeline.transformer.state_dict().items():
        assert torch.equal(value, average[name]), name
    assert pipeline("a red disc", num_inference_steps=1, height=32, width=32, output_type="np").images.shape[1] == 32


def test_without_the_flag_there_is_no_lora_and_a_later_stage_does_not_mind(world, tmp_path):
    flag = "--trainable.assemble_attn_lora=false"
    world.train("stage1", tmp_path / "stage1", flag, max_train_steps=1)
    world.train("stage2", tmp_path / "stage2", flag, max_train_steps=1)
    for stage in ("stage1", "stage2"):
        adapter = FluxLayoutAdapter.from_pretrained(tmp_path / stage)
        assert adapter.parts()["assemble_attn_lora"] == []
        assert adapter.config.lora_rank is None


# ---- checkpoints, resume, hand-over ----


@pytest.mark.parametrize(("stage", "workers", "accumulation"), [("base", 0, 1), ("stage2", 2, 2), ("stage3", 0, 1)])
def test_three_updates_and_three_after_a_resume_are_six(world, tmp_path, stage, workers, accumulation):
    """Bit for bit, in the middle of an epoch and of a log interval."""
    given = runs.EXACT | {"logging_steps": 2, "dataloader_num_workers": workers, "max_train_steps": 6}
    given["gradient_accumulation_steps"] = accumulation
    start = world.start_of(stage)
    straight = world.train(stage, tmp_path / "straight", *start, **given, checkpointing_steps=100)
    broken = world.train(stage, tmp_path / "broken", *start, **given, checkpointing_steps=3)
    shutil.rmtree(broken / "checkpoint-6")
    torch.manual_seed(random.randrange(2**32))
    world.train(stage, broken, *start, **given, checkpointing_steps=3, resume_from_checkpoint="latest")
    assert runs.differing(*(runs.tensors_of(each / "checkpoint-6") for each in (straight, broken))) == []
    assert runs.rows_of(broken) == runs.rows_of(straight)
    assert len(list((tmp_path / "logs").iterdir())) == 2  # a resumed run goes on in its log


@pytest.mark.parametrize("stage", STAGES)
def test_a_checkpoint_holds_the_whole_average_and_what_it_is_made_of(world, stage):
    checkpoint = world.root / stage / "checkpoint-3"
    held, average = (load_file(checkpoint / f"{name}.safetensors") for name in ("layout_adapter", "ema"))
    assert runs.differing(held, average) == []
    config = json.loads((checkpoint / "run_state.json").read_text())["config"]
    adapter = FluxLayoutAdapter(**config["adapter"])
    adapter.load_state_dict(held)
    assert config["stage"] == stage[-1]
    exported = FluxLayoutAdapter.from_pretrained(world.root / stage)
    assert runs.differing(exported.state_dict(), adapter.state_dict()) == []
    for place in (checkpoint, world.root / stage / "checkpoint_3/model.pt", world.root / stage):
        assert runs.differing(load_adapter(place).state_dict(), adapter.state_dict()) == []


def spellings(stage1: Path) -> dict[str, Path]:
    return {
        "run": stage1,
        "checkpoint": stage1 / "checkpoint-3",
        "guide": stage1 / "checkpoint_3",
        "guide's file": stage1 / "checkpoint_3/model.pt",
        "export": stage1 / "diffusion_pytorch_model.safetensors",
    }


@pytest.mark.parametrize("spelling", ["run", "checkpoint", "guide", "guide's file", "export", "beside it", "resume"])
def test_a_stage_starts_from_the_weights_of_the_one_before_at_step_0(world, tmp_path, spelling):
    if spelling == "beside it":
        shutil.copytree(world.root / "stage1", tmp_path / "stage1")
        given = []
    elif spelling == "resume":  # a checkpoint of another stage is no run to go on with
        given = [f"--resume_from_checkpoint={world.root / 'stage1/checkpoint_3/model.pt'}"]
    else:
        given = [f"--init_from={spellings(world.root / 'stage1')[spelling]}"]
    run = world.train("stage2", tmp_path / "stage2", *given, max_train_steps=1, learning_rate=1e-12, lr_groups=TINY)
    state = json.loads((run / "checkpoint-1/run_state.json").read_text())
    assert state["step"] == 1
    average = load_file(world.root / "stage1/checkpoint-3/ema.safetensors")
    weights = load_file(run / "checkpoint-1/model.safetensors")
    for name, value in average.items():
        torch.testing.assert_close(weights[name], value, rtol=0, atol=1e-9)
    assert weights["modulation_head.shared.weight"].abs().max() < 1e-9


def test_a_damaged_checkpoint_is_passed_over(world, tmp_path, caplog):
    shutil.copytree(world.root / "stage1", tmp_path / "stage1")
    newest = tmp_path / "stage1/checkpoint-3/model.safetensors"
    newest.write_bytes(newest.read_bytes()[:-10])
    run = world.train("stage2", tmp_path / "stage2", max_train_steps=1, learning_rate=1e-12, lr_groups=TINY)
    weights = load_file(run / "checkpoint-1/model.safetensors")
    for name, value in load_file(tmp_path / "stage1/checkpoint-2/ema.safetensors").items():
        torch.testing.assert_close(weights[name], value, rtol=0, atol=1e-9)
    assert "checkpoint-3 is damaged (model.safetensors" in caplog.text


def test_what_a_stage_cannot_start_from_is_one_line(world, tmp_path):
    with runs.refused(r"^init_from .*stage1: no such folder"):
        world.train("stage2", tmp_path / "stage2")
    with runs.refused(r"^init_from .*does not fit: .*of another shape: .*lora"):
        world.train("stage2", tmp_path / "a", "--lora.rank=2", *world.start_of("stage2"))
    with runs.refused(r"^init_from .*`bridge_rank` without `modulation_hidden`"):
        world.train("stage3", tmp_path / "b", f"--init_from={world.root / 'stage1'}")
    with runs.refused(r"another experiment .*stage: '1' then, '2' now"):
        shutil.copytree(world.root / "stage1", tmp_path / "c")
        world.train("stage2", tmp_path / "c", resume_from_checkpoint="latest")


def test_a_run_that_was_interrupted_wins_over_where_it_started(world, tmp_path):
    """The same command again: scripts/layout_flux/train_stage2.sh CHECKPOINT."""
    line = [*world.start_of("stage2"), "--resume_from_checkpoint=auto"]
    world.train("stage2", tmp_path / "run", *line, max_train_steps=1)
    world.train("stage2", tmp_path / "run", *line, max_train_steps=2)
    assert [row["step"] for row in runs.rows_of(tmp_path / "run") if "loss" in row] == [1, 2]


# ---- losses ----


def test_micro_batches_of_any_size_give_the_same_update(world, tmp_path, monkeypatch):
    """8x1 = 4x2 = 2x4 of stage 1's own loss, where noise and level belong to the sample."""
    levels, kept, noise = {}, train_layout_flux.objectives.layout.draw_kept, {}

    def of_sample(batch: dict) -> list[int]:
        return [int(1e4 * value) for value in batch["latents"].flatten(1)[:, 0].abs()]

    own = train_layout_flux.compute_loss

    def loss(run, batch, config, task, model=None):
        generators = [torch.Generator().manual_seed(number) for number in of_sample(batch)]
        levels["now"] = torch.stack([0.1 + 0.8 * torch.rand((), generator=g) for g in generators])
        noise["now"] = torch.stack([torch.randn(batch["latents"].shape[1:], generator=g) for g in generators])
        return own(run, batch, config, task, model)

    layout = train_layout_flux.objectives.layout
    none = DropoutConfig(layout=0, instance=0, instance_text=0, clip=0, dino=0, prompt=0)
    monkeypatch.setattr(train_layout_flux, "compute_loss", loss)
    monkeypatch.setattr(layout, "draw_sigmas", lambda *_: levels["now"])
    monkeypatch.setattr(layout, "draw_kept", lambda pictures, objects, _: kept(pictures, objects, none))
    monkeypatch.setattr(torch, "randn_like", lambda _: noise["now"])
    rows = []
    for size in (8, 4, 2):
        run = world.train("stage1", tmp_path / str(size), train_batch_size=size, gradient_accumulation_steps=8 // size)
        rows.append([row for row in runs.rows_of(run) if "loss" in row])
    for other in rows[1:]:
        for a, b in zip(rows[0], other, strict=True):
            assert b["loss"] == pytest.approx(a["loss"], rel=1e-5)
            assert b["grad_norm"] == pytest.approx(a["grad_norm"], rel=1e-3)


@pytest.mark.parametrize("stage", ["stage2", "stage3"])
def test_the_identity_loss_alone_reaches_what_carries_identity(world, tmp_path, stage):
    """Every weight but its own is 0; it is the modulation that moves in stage 2, and the bridge in stage 3."""
    alone = ["--loss_weights.flow_matching=0", "--loss_weights.alpha_prior=0", "--dino.p_low=1", *world.start_of(stage)]
    run = world.train(stage, tmp_path / "run", *alone, max_train_steps=4)
    row = [row for row in runs.rows_of(run) if "loss" in row][-1]
    assert 0 < row["loss/dino_identity"] < 2
    assert -1 <= row["metrics/dino_similarity_mean"] <= 1
    moments = load_file(run / "checkpoint-4/optimizer.safetensors")
    prefix = "modulation_head" if stage == "stage2" else "bridges"
    assert [k for k in moments if k.startswith(prefix) and k.endswith("/exp_avg") and not moments[k].any()] == []


def test_where_nothing_is_foreground_the_identity_loss_is_nothing(world, tmp_path):
    given = [*world.start_of("stage2"), "--dino.min_box_px=1000"]
    row = runs.rows_of(world.train("stage2", tmp_path / "run", *given, max_train_steps=1))[0]
    assert "loss/dino_identity" not in row  # a mean over nothing
    assert row["loss/total"] == pytest.approx(row["loss/flow_matching"] + 0.02 * row["loss/alpha_prior"])


def test_region_preservation_is_drawn_and_weighed(world, tmp_path):
    given = ["--loss_weights.region_preservation=10", "--region_preservation.probability=1"]
    start = f"--init_from={world.root / 'stage2'}"
    run = world.train("stage2", tmp_path / "run", *given, start, max_train_steps=1)
    row = runs.rows_of(run)[0]
    assert row["loss/region_preservation"] > 0
    rest = row["loss/flow_matching"] + 0.02 * row["loss/alpha_prior"] + 10 * row["loss/region_preservation"]
    assert row["loss/total"] == pytest.approx(rest + 10 / 5 * row.get("loss/dino_identity", 0), rel=1e-5)


def test_gradient_checkpointing_changes_nothing(world, tmp_path):
    start = f"--init_from={world.root / 'stage2'}"
    found = []
    for on in ("true", "false"):
        found.append(world.train("stage2", tmp_path / on, start, gradient_checkpointing=on, max_train_steps=2))
    on, off = (runs.tensors_of(run / "checkpoint-2") for run in found)
    for name, value in off.items():
        torch.testing.assert_close(on[name], value, rtol=1e-4, atol=1e-6)


def test_in_bf16_the_base_is_held_so_and_the_adapter_in_float32(world, tmp_path):
    run = world.train("stage2", tmp_path / "run", *world.start_of("stage2"), max_train_steps=2, mixed_precision="bf16")
    assert {value.dtype for value in load_file(run / "checkpoint-2/model.safetensors").values()} == {torch.float32}
    plain = runs.rows_of(world.root / "stage2")[0]
    row = runs.rows_of(run)[0]
    assert row["loss/flow_matching"] == pytest.approx(plain["loss/flow_matching"], rel=0.02)
    assert row["loss/flow_matching"] != plain["loss/flow_matching"]


def test_the_loss_curve_is_the_one_we_know(world, tmp_path):
    """Pinned on CPU in float32; a change means that every run changes. Tolerance: other CPUs add in other orders."""
    run = world.train("stage2", tmp_path / "run", *world.start_of("stage2"), max_train_steps=4)
    losses = [row["loss"] for row in runs.rows_of(run) if "loss" in row]
    assert losses == pytest.approx(LOSSES, rel=1e-3)


# ---- what is told ----

SCALARS = {"loss/total", "loss/reconstruction", "loss/flow_matching", "metrics/learning_rate", "metrics/timestep_mean"}
OF_LAYOUTS = {"loss/alpha_prior", "metrics/alpha_mean", "metrics/alpha_fg_ratio"}
OF_IDENTITY = {"loss/dino_identity", "metrics/dino_similarity_mean", "metrics/dino_gradient_ratio"}
TAGS = {
    "base": SCALARS,
    "stage1": SCALARS | OF_LAYOUTS,
    "stage2": SCALARS | OF_LAYOUTS | OF_IDENTITY,
    "stage3": SCALARS | OF_LAYOUTS | OF_IDENTITY | {"metrics/feedback_magnitude"},
}


@pytest.mark.parametrize("stage", TAGS)
def test_every_promised_tag_is_in_the_log_of_its_stage(world, tmp_path, stage):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    shown = ["--validation_steps=2", "--num_validation_images=2", '--report_to=["tensorboard"]', *world.start_of(stage)]
    run = world.train(stage, tmp_path / "run", *shown, max_train_steps=2, train_batch_size=8)
    (link,) = (tmp_path / "logs").iterdir()
    assert re.fullmatch(rf"{stage}_\d{{8}}_\d{{6}}", link.name)
    events = EventAccumulator(str(link)).Reload()
    tags = events.Tags()
    assert TAGS[stage] <= set(tags["scalars"])
    assert {tag for tag in tags["scalars"] if tag.startswith(("loss/", "metrics/"))} == TAGS[stage]
    pictures = {"inference/ground_truth", "inference/predicted"}
    assert set(tags["images"]) == pictures | {f"inference/comparison_sample_{i}" for i in (0, 1)}
    alphas = {"metrics/alpha_distribution", "inference/alpha_sample_0", "inference/alpha_sample_1"}
    assert set(tags["histograms"]) == {"metrics/timesteps"} | (alphas if stage != "base" else set())
    if stage == "stage3":
        assert events.Scalars("metrics/feedback_magnitude")[-1].value > 0
    assert (run / "samples/inference/predicted-000002.png").exists()


def test_no_pictures_unless_they_are_asked_for(world, tmp_path):
    given = ["--inference.enabled=false", "--validation_steps=1"]
    run = world.train("stage1", tmp_path / "run", *given, max_train_steps=1)
    assert not (run / "samples").exists()


# ---- configuration ----


def test_every_configuration_of_the_house_loads():
    for path in sorted(CONFIGS.glob("*.yaml")):
        config = load_config(train_layout_flux.Config, ["--config", str(path)])
        stage = path.stem.removeprefix("tiny_").removeprefix("demo_").removeprefix("stage")
        assert config.stage == stage, path
        assert config.training.output_dir.name in (f"stage{stage}", stage)
        if stage != "base":
            assert config.trainable.names == PARTS[f"stage{stage}"]


def test_the_stages_have_the_values_of_the_guide():
    found = {}
    for stage in STAGES:
        config = load_config(train_layout_flux.Config, ["--config", str(CONFIGS / f"{stage}.yaml")])
        training, weights = config.training, config.loss_weights
        found[stage] = training.max_train_steps, training.learning_rate, weights.flow_matching, weights.dino_identity
        assert (training.train_batch_size, training.gradient_accumulation_steps) == (2, 4)
        assert (training.checkpointing_steps, training.checkpoints_total_limit, training.logging_steps) == (100, 5, 100)
        assert (config.validation.validation_steps, config.validation.num_validation_images) == (500, 4)
        assert (config.lora.rank, config.lora.alpha) == (128, 128)
    assert found == {
        "stage1": (70_000, 1e-4, 1, 0),
        "stage2": (150_000, 5e-6, 1, 10),
        "stage3": (10_000, 1e-5, 1, 10),
    }


GUIDE = """
stage: 1
seed: 7
model: {flux_model_name: some/flux}
trainable: {instance_fusion_mlp: true, assemble_attn_lora: false}
training: {num_iterations: 1000, batch_size: 3, weight_decay: 0.1, lr_scheduler: cosine}
scheduler: {num_warmup_steps: 10}
checkpointing: {output_dir: runs/x, save_every_n_steps: 20, keep_last_n_checkpoints: 4, keep_every_n_steps: 40}
logging: {log_dir: logs, log_every_n_steps: 30}
inference: {enabled: true, every_n_steps: 50, num_samples: 2, num_inference_steps: 9}
"""


def test_the_spellings_of_the_guide_are_understood(tmp_path):
    (tmp_path / "guide.yaml").write_text(GUIDE)
    config = load_config(train_layout_flux.Config, ["--config", str(tmp_path / "guide.yaml")])
    training, validation = config.training, config.validation
    assert (training.seed, training.max_train_steps, training.train_batch_size) == (7, 1000, 3)
    assert training.lr_warmup_steps == 10
    assert (training.adam_weight_decay, training.output_dir, training.checkpointing_steps) == (0.1, Path("runs/x"), 20)
    assert (training.checkpoints_total_limit, training.keep_every_n_steps, training.logging_steps) == (4, 40, 30)
    assert (config.logging_dir, config.model.pretrained_model_name_or_path) == (Path("logs"), "some/flux")
    assert (validation.validation_steps, validation.num_validation_images, validation.num_inference_steps) == (50, 2, 9)
    assert config.trainable.names == PARTS["stage1"] - {"assemble_attn_lora"}
    with runs.refused(r"max_train_steps.*num_iterations.*are the same key"):
        both = yaml.safe_load(GUIDE)
        both["training"]["max_train_steps"] = 50
        (tmp_path / "both.yaml").write_text(yaml.safe_dump(both))
        load_config(train_layout_flux.Config, ["--config", str(tmp_path / "both.yaml")])


def test_counts_of_micro_batches_become_counts_of_updates(world, tmp_path):
    given = {"gradient_accumulation_steps": 4, "max_train_steps": 70, "checkpointing_steps": 9, "logging_steps": 8}
    config = load_config(
        train_layout_flux.Config,
        [*world.arguments("stage2", tmp_path, **given), "--iteration_unit=micro", "--validation_steps=20"],
    ).in_updates(100, 1)
    training = config.training
    assert (training.max_train_steps, training.checkpointing_steps, training.logging_steps) == (18, 3, 2)
    assert (config.validation.validation_steps, config.dino.ramp_steps, training.iteration_unit) == (5, 2, "optimizer")
    assert config.in_updates(100, 1) == config


def test_learning_rates_of_parts(world):
    """tiny_stage2.yaml: the modulation head learns ten times as fast."""
    config = yaml.safe_load((world.root / "stage2/config.yaml").read_text())
    assert config["training"]["learning_rate_factors"] == {"modulation_head.": pytest.approx(10)}
    from pipelines.layout_flux.stages import rate_factors

    adapter = FluxLayoutAdapter.from_pretrained(world.root / "stage2")
    factors = rate_factors(adapter, {"assemble_attn_lora": 1e-3, "layout_head": 1e-5}, 1e-4)
    assert factors == pytest.approx(
        {f"layout_heads.{n}.{part}.": factor for n in (0, 1) for part, factor in (("lora", 10), ("zero_out", 0.1))}
    )


@pytest.mark.parametrize(
    ("stage", "others", "message"),
    [
        ("stage1", ["--loss_weights.dino_identity=1"], "must be 0 before stage 2"),
        (
            "stage1",
            ['--lr_groups={"modulation_head": 1}'],
            "`training.lr_groups` names modulation_head",
        ),
        ("stage3", ["--trainable.feedback_bridge=false"], "`trainable` names no part"),
        ("stage1", ["--iteration_unit=micro", "--num_epochs=2"], "does not go with `num_epochs`"),
        ("stage1", ["--trainable.modulation=true"], "did you mean trainable.modulation_head"),
        ("stage1", ["--lora.target_modules=[to_x]"], "lora.target_modules"),
        ("stage1", ["--stage=4"], "stage"),
    ],
)
def test_settings_that_do_not_fit_together_are_refused(world, tmp_path, capsys, stage, others, message):
    with pytest.raises(SystemExit) as exit_:
        world.train(stage, tmp_path / "run", *others)
    assert exit_.value.code == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_what_is_wrong_with_data_or_models_is_one_line(world, tmp_path):
    for key, message in {
        f"data.output_dir={tmp_path / 'none'}": "^data: .*none",
        f"model.pretrained_model_name_or_path={tmp_path / 'none'}": "^model: .*none",
        "training.resolution=64": "^model: `training.resolution` is 64, the data were prepared at 32 x 32",
        "model.layout_double_blocks=[7]": r"^init_from .*`layout_blocks` must ascend within 0 \.\.\. 1",
    }.items():
        with runs.refused(message):
            world.train("stage1", tmp_path / key[:8], f"--{key}")
    with runs.refused("^dino: `crop_size` must be a multiple of DINOv2's patches of 8 pixels, not 57"):
        world.train("stage2", tmp_path / "dino", "--dino.crop_size=57", *world.start_of("stage2"))


# ---- scripts ----


@pytest.mark.parametrize(
    ("script", "arguments", "expected"),
    [
        ("train_stage1.sh", ["--seed", "1"], ["stage1.yaml", "--resume_from_checkpoint", "auto", "--seed", "1"]),
        ("train_stage2.sh", [], ["stage2.yaml", "--resume_from_checkpoint", "auto"]),
        ("train_stage2.sh", ["x/checkpoint_5", "--seed", "1"], ["--init_from", "x/checkpoint_5", "--seed", "1"]),
        ("train_stage3.sh", ["x/checkpoint_5"], ["stage3.yaml", "auto", "--init_from", "x/checkpoint_5"]),
        ("train.sh", ["--seed", "1"], ["stage1.yaml", "--seed", "1", "stage2.yaml", "stage3.yaml", "--seed", "1"]),
    ],
)
def test_scripts_start_the_command(tmp_path, script, arguments, expected):
    """A relative checkpoint is one of the folder they are called in."""
    launcher = tmp_path / "bin/accelerate"
    launcher.parent.mkdir()
    launcher.write_text('#!/bin/sh\nprintf "%s\\n" "$@"\n')
    launcher.chmod(0o755)
    environment = os.environ | {"PATH": f"{launcher.parent}:{os.environ['PATH']}"}
    command = [str(runs.ROOT / "scripts/layout_flux" / script), *arguments]
    result = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=True)
    words = iter(result.stdout.replace(f"{tmp_path}/", "").replace("configs/layout_flux/", "").split("\n"))
    assert all(word in words for word in expected), result.stdout


def test_a_stage_that_fails_ends_the_script(tmp_path):
    (tmp_path / "accelerate").write_text("#!/bin/sh\necho started; exit 3\n")
    (tmp_path / "accelerate").chmod(0o755)
    environment = os.environ | {"PATH": f"{tmp_path}:{os.environ['PATH']}"}
    script = str(runs.ROOT / "scripts/layout_flux/train.sh")
    result = subprocess.run([script], env=environment, capture_output=True, text=True, check=False)
    assert (result.returncode, result.stdout) == (3, "started\n")
