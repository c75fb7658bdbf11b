"""DeepSpeed's ZeRO-2 and ZeRO-3 on two processes: DDP's numbers, the ordinary checkpoint, and what is refused."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import runs
import torch
import yaml

from trainers.common import checkpoints
from trainers.common.config import TrainingConfig
from trainers.common.launch import read_request
from trainers.common.zero import Zero, read_zero

pytest.importorskip("deepspeed", reason="DeepSpeed is not installed (pip install 'backlot[deepspeed]')")
PROGRAM = Path(__file__).parent / "two_zero_ranks.py"
# An average that the shortcut objective calls as a teacher, a validation, and a decay that differs by group.
SETTINGS = {"max_train_steps": 6, "gradient_accumulation_steps": 2, "logging_steps": 1, "checkpointing_steps": 3}
SETTINGS |= {"checkpoints_total_limit": None, "lr_scheduler": "cosine", "max_grad_norm": 0.5}
STAGES = pytest.mark.parametrize("stage", [2, 3])


def launch(folder: Path, stage: int | None, *command: str | Path) -> subprocess.CompletedProcess:
    """Two processes on the CPU, with ZeRO or, without a stage, DDP."""
    file, settings = runs.ROOT / "accelerate_configs/cpu_2proc.yaml", {"ACCELERATE_USE_CPU": "true"}
    if stage is not None:
        section = {"zero_stage": stage, "zero3_init_flag": False}
        section |= {"offload_optimizer_device": "none", "offload_param_device": "none"}
        values = {"distributed_type": "DEEPSPEED", "deepspeed_config": section, "num_processes": 2, "num_machines": 1}
        values |= {"compute_environment": "LOCAL_MACHINE", "use_cpu": False, "mixed_precision": "no"}
        file, settings = folder / f"zero{stage}.yaml", {}
        file.write_text(yaml.safe_dump(values))
    environment = {name: value for name, value in os.environ.items() if name != "ACCELERATE_USE_CPU"}
    launcher = [sys.executable, "-m", "accelerate.commands.launch", "--config_file", file, "--main_process_port", "0"]
    return subprocess.run(
        [str(word) for word in (*launcher, *command)],
        cwd=runs.ROOT,
        env=environment | settings | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(runs.ROOT)},
        capture_output=True,
        text=True,
        timeout=250,
        check=False,
    )


def train(run_dir: Path, stage: int | None, *others: str, **training) -> dict:
    """The shortcut command; the tensors of its last checkpoint."""
    # what is recomputed has to be gathered a second time
    settings = SETTINGS | {"gradient_checkpointing": stage is not None} | training
    arguments = runs.command_line(run_dir, "--validation.validation_steps=3", *others, **settings)
    result = launch(run_dir.parent, stage, "trainers/train_shortcut.py", *arguments)
    assert result.returncode == 0, result.stdout + result.stderr
    return runs.tensors_of(run_dir / "checkpoint-6")


def distance(a: dict, b: dict, part: str) -> float:
    """Norm of the difference, relative to the norm of `a`."""
    assert a.keys() == b.keys()
    names = [name for name in a if name.startswith(part)]
    assert names
    ours, theirs = (torch.cat([tensors[name].double().reshape(-1) for name in names]) for tensors in (a, b))
    return float((ours - theirs).norm() / ours.norm())


def continue_(source: Path, run_dir: Path, stage: int | None) -> dict:
    """The tensors after updates 4 to 6, from another run's third checkpoint."""
    resume = f"--training.resume_from_checkpoint={source / 'checkpoint-3'}"
    return train(run_dir, stage, resume)


@pytest.fixture(scope="module")
def straight(tmp_path_factory):
    """Six updates of DDP and of each stage: (folder, tensors by stage, None for DDP)."""
    folder = tmp_path_factory.mktemp("zero")
    return folder, {stage: train(folder / f"{stage}", stage) for stage in (None, 2, 3)}


@STAGES
def test_it_is_ddp(straight, stage):
    """To the last bits of float32: DeepSpeed adds up gradients in another order."""
    folder, tensors = straight
    for part, bound in {"model": 1e-6, "ema": 1e-6, "optimizer": 1e-5}.items():
        assert distance(tensors[None], tensors[stage], part) < bound, part
    ddp, zero = runs.rows_of(folder / "None"), runs.rows_of(folder / f"{stage}")
    assert [row["step"] for row in zero] == [row["step"] for row in ddp] == [1, 2, 3, 3, 4, 5, 6, 6]
    for mine, theirs in zip(zero, ddp, strict=True):
        assert mine == pytest.approx(theirs, rel=1e-6, abs=1e-9)
    assert max(row.get("grad_norm", 0) for row in zero) > SETTINGS["max_grad_norm"]  # it was clipped


@STAGES
def test_the_checkpoint_is_the_ordinary_one(straight, stage):
    folder, tensors = straight
    for checkpoint in checkpoints.list_checkpoints(folder / f"{stage}"):
        assert checkpoints.verify(checkpoint) == []
        names = {path.name for path in checkpoint.iterdir()}
        assert names == {path.name for path in (folder / "None" / checkpoint.name).iterdir()}
        assert {Path(name).suffix for name in names} == {".json", ".safetensors"}
    assert {n: (t.shape, t.dtype) for n, t in tensors[stage].items()} == {
        n: (t.shape, t.dtype) for n, t in tensors[None].items()
    }
    assert {float(t) for n, t in tensors[stage].items() if n.endswith("/step")} == {6.0}


@STAGES
def test_three_and_three_are_six(straight, stage, tmp_path):
    """Bit for bit: nothing that a process holds is left out of the checkpoint."""
    folder, tensors = straight
    shutil.copytree(folder / f"{stage}", tmp_path / "broken", ignore=shutil.ignore_patterns("checkpoint-6", "lock"))
    rows = (tmp_path / "broken/metrics.jsonl").read_text().splitlines()
    (tmp_path / "broken/metrics.jsonl").write_text("".join(f"{row}\n" for row in rows[:4]))
    broken = train(tmp_path / "broken", stage, "--training.resume_from_checkpoint=latest")
    assert runs.differing(tensors[stage], broken) == []
    assert runs.rows_of(tmp_path / "broken") == runs.rows_of(folder / f"{stage}")


@pytest.mark.parametrize(("first", "then"), [(2, None), (3, None), (None, 3), (3, 2)])
def test_another_mode_continues_it(straight, tmp_path, first, then):
    folder, tensors = straight
    continued = continue_(folder / f"{first}", tmp_path / "run", then)
    for part, bound in {"model": 1e-6, "ema": 1e-6, "optimizer": 1e-5}.items():
        assert distance(tensors[None], continued, part) < bound, part


@STAGES
def test_the_export_is_the_average(straight, stage):
    from pipelines.shortcut import ShortcutDiT

    folder, tensors = straight
    network = ShortcutDiT.from_pretrained(folder / f"{stage}", subfolder="transformer")
    averages = {name.removeprefix("ema/"): t for name, t in tensors[stage].items() if name.startswith("ema/")}
    assert runs.differing(averages, dict(network.named_parameters())) == []


def test_a_validation_leaves_stage_3_as_it_was(tmp_path):
    """No average that it has gathered is taken for a weight afterwards; only validation calls the average here."""
    often, never = (
        train(tmp_path / f"{every}", 3, "--objective.name=flow_matching", f"--validation.validation_steps={every}")
        for every in (1, "null")
    )
    assert runs.differing(often, never) == []


@STAGES
def test_nan_on_one_process_reaches_no_weight(tmp_path, stage):
    """The first is left out, the second ends the run; between them lies a sound checkpoint."""
    settings = SETTINGS | {"on_nonfinite": "skip", "max_nonfinite_skips": 1}
    arguments = runs.command_line(tmp_path / "run", **settings)
    result = launch(tmp_path, stage, PROGRAM, "nan", *arguments)
    output = result.stdout + result.stderr
    assert result.returncode != 0, output
    assert "non-finite loss or gradient in update 2" in output, output
    assert "skipped (1 so far)" in output
    assert "non-finite loss or gradient in update 4" in output
    assert json.loads((tmp_path / "run/exit.json").read_text()) == {"code": 3}
    assert [path.name for path in checkpoints.list_checkpoints(tmp_path / "run")] == ["checkpoint-3"]
    tensors = runs.tensors_of(tmp_path / "run/checkpoint-3")
    assert all(tensor.isfinite().all() for tensor in tensors.values())
    assert {float(t) for n, t in tensors.items() if n.endswith("/step")} == {2.0}


@STAGES
def test_an_adapter_in_bfloat16_with_weighted_rows(tmp_path, stage):
    """A frozen base outside the checkpoint, weights that differ between processes, weights no process has half of."""
    keys = {"train_batch_size": 1, "gradient_accumulation_steps": 2, "max_train_steps": 4, "logging_steps": 1}
    keys |= {"mixed_precision": "bf16", "ema_decay": 0.5, "learning_rate": 0.05, "report_to": []}
    for mode in (None, stage):
        arguments = [f"--training.{k}={v}" for k, v in (keys | {"output_dir": tmp_path / f"{mode}"}).items()]
        result = launch(tmp_path, mode, PROGRAM, "adapter", *arguments)
        assert result.returncode == 0, result.stdout + result.stderr
    ddp, zero = (runs.tensors_of(tmp_path / f"{mode}/checkpoint-4") for mode in (None, stage))
    assert {name for name in zero if name.startswith("model/")} == {
        f"model/{name}" for name in ("down.weight", "up.weight", "up.bias", "offset")
    }
    for part, bound in {"model": 1e-6, "ema": 1e-6, "optimizer": 1e-5}.items():
        assert distance(ddp, zero, part) < bound, part


@STAGES
def test_a_signal_to_one_process_stops_both_with_one_checkpoint(tmp_path, stage):
    arguments = runs.command_line(tmp_path / "run", **{**SETTINGS, "max_train_steps": 12, "checkpointing_steps": 100})
    result = launch(tmp_path, stage, PROGRAM.with_name("two_ranks.py"), tmp_path, "2", *arguments)
    ranks = [json.loads((tmp_path / f"2-ranks-{rank}.json").read_text()) for rank in (0, 1)]
    assert [rank["code"] for rank in ranks] == [75, 75], result.stdout + result.stderr
    assert 3 <= ranks[0]["steps"] == ranks[1]["steps"] <= 5
    (checkpoint,) = checkpoints.list_checkpoints(tmp_path / "run")
    assert checkpoints.step_of(checkpoint) == ranks[0]["steps"]
    assert checkpoints.verify(checkpoint) == []


# ---- what is refused ----

ENVIRONMENT = {"ACCELERATE_USE_DEEPSPEED": "true", "ACCELERATE_DEEPSPEED_ZERO_STAGE": "3", "WORLD_SIZE": "2"}


def read(file: dict | None = None, folder: Path | None = None, environment: dict | None = None, **training) -> Zero:
    values = {"output_dir": "run", "max_train_steps": 1, "train_batch_size": 4, **training}
    environment = ENVIRONMENT | (environment or {})
    if file is not None:
        path = folder / "deepspeed.json"
        path.write_text(json.dumps(file))
        environment["ACCELERATE_DEEPSPEED_CONFIG_FILE"] = str(path)
    return read_zero(environment, TrainingConfig(**values), values.get("mixed_precision", "no"))


def test_the_launch_configuration_says_how(tmp_path):
    assert read() == Zero(3)
    assert read(environment={"ACCELERATE_GRADIENT_CLIPPING": "1.0"}) == Zero(3)
    section = {"stage": 2, "overlap_comm": False, "reduce_bucket_size": 1000, "allgather_bucket_size": "auto"}
    file = {"zero_optimization": section, "bf16": {"enabled": "auto"}, "gradient_clipping": "auto"}
    file |= {"train_batch_size": 8, "steps_per_print": 10}
    assert read(file, tmp_path) == Zero(2, {"overlap_comm": False, "reduce_bucket_size": 1000})


@pytest.mark.parametrize(
    ("file", "message"),
    [
        ({"bf16": {"enabled": True}}, "bf16 is not supported: set mixed_precision"),
        ({"fp16": {}}, "fp16 is not supported"),
        ({"torch_autocast": {"enabled": True}}, "torch_autocast is not supported"),
        ({"optimizer": {"type": "AdamW"}}, "optimizer is not supported: the training section"),
        ({"scheduler": {"type": "WarmupLR"}}, "scheduler is not supported: set training.lr_scheduler"),
        ({"gradient_clipping": 0.5}, "gradient_clipping is 0.5, the run's 1.0"),
        ({"train_batch_size": 64}, "train_batch_size is 64, the run's 8"),
        ({"gradient_accumulation_steps": 3}, "gradient_accumulation_steps is 3, the run's 1"),
        ({"zero_optimization": {"stage": 1}}, "stage 1 is not supported"),
        ({"zero_optimization": {"stage": 3, "offload_optimizer": {"device": "cpu"}}}, "offload_optimizer .* FSDP2"),
        ({"zero_optimization": {"stage": 3, "zero_quantized_weights": True}}, "zero_quantized_weights is not supp"),
        ({"zero_optimization": 3}, "no section zero_optimization"),
    ],
)
def test_a_file_that_contradicts_the_run_is_refused(tmp_path, file, message):
    with pytest.raises(ValueError, match=message):
        read({"zero_optimization": {"stage": 2}} | file, tmp_path)


@pytest.mark.parametrize(
    ("environment", "training", "message"),
    [
        ({"ACCELERATE_DEEPSPEED_OFFLOAD_PARAM_DEVICE": "cpu"}, {}, "offload_param_device cpu: use FSDP2"),
        ({"ACCELERATE_DEEPSPEED_ZERO3_INIT": "true"}, {}, "zero3_init true: leave it out"),
        ({"ACCELERATE_GRADIENT_CLIPPING": "0.3"}, {}, "gradient_clipping is 0.3"),
        ({"ACCELERATE_DEEPSPEED_CONFIG_FILE": "nowhere.json"}, {}, "nowhere.json cannot be read"),
        ({}, {"mixed_precision": "fp16"}, "fp16: use bf16"),
        ({}, {"use_8bit_adam": True}, "use_8bit_adam does not go with ZeRO"),
        ({}, {"torch_compile": True}, "torch_compile does not go with ZeRO"),
    ],
)
def test_what_does_not_go_with_zero_is_refused(environment, training, message):
    with pytest.raises(ValueError, match=message):
        read(environment=environment, **training)


def test_one_process_is_refused():
    config = TrainingConfig(output_dir="run", max_train_steps=1, train_batch_size=4)
    with pytest.raises(ValueError, match="DeepSpeed needs at least two processes"):
        read_request(ENVIRONMENT | {"WORLD_SIZE": "1"}, config)
