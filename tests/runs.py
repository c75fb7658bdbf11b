"""Runs of a script's tiny.yaml for tests: in this process, or in a child that can be signalled and killed."""

from __future__ import annotations

import importlib
import io
import json
import multiprocessing
import os
import random
import re
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stderr
from multiprocessing.process import BaseProcess
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
TINY = ROOT / "configs/shortcut/tiny.yaml"
# What a child needs is imported once, by the server it is forked from: a child starts in a fraction of a second.
PRELOAD = [
    "torch.optim",
    "accelerate",
    "accelerate.checkpointing",
    "sklearn.datasets",
    "pytest",
    "trainers.common.run",
    "backlot.pictures",
    "objectives.shortcut",
    "objectives.rectified_flow",
    "backlot.codecs",
    "pipelines.shortcut.pipeline",
    "pipelines.shortcut.scheduler",
    "pipelines.shortcut.transformer",
    "data_prep.images.dataset",
    "trainers.train_shortcut",
]


# ---- the command, here ----


def command_line(run_dir: Path, *others: str, system: str = "shortcut", name: str = "tiny", **training) -> list[str]:
    """Arguments of train_<system>.py: <name>.yaml, no validation, then keys of the training section."""
    values = {"output_dir": run_dir, **training}
    written = [f"--training.{key}={json.dumps(v) if not isinstance(v, Path) else v}" for key, v in values.items()]
    return [
        "--config",
        str(ROOT / "configs" / system / f"{name}.yaml"),
        "--validation.validation_steps=null",
        *(w.replace('"', "") for w in written),
        *others,
    ]


def train(run_dir: Path, *others: str, system: str = "shortcut", **training) -> None:
    """`python trainers/train_<system>.py ...` in this process."""
    reset_accelerate()
    script = importlib.import_module(f"trainers.train_{system}")
    script.main(command_line(run_dir, *others, system=system, **training))


@contextmanager
def refused(pattern: str) -> Iterator[None]:
    """Inside, a program finds its input wrong: exit code 2, and a line on stderr that matches."""
    import pytest

    errors = io.StringIO()
    with pytest.raises(SystemExit) as exit_, redirect_stderr(errors):
        yield
    assert exit_.value.code == 2, errors.getvalue()
    assert re.search(pattern, errors.getvalue(), re.MULTILINE), errors.getvalue()


EXACT = {"lr_scheduler": "cosine", "lr_warmup_steps": 2, "ema_ramp": True, "checkpoints_total_limit": None}


def resume_in_the_middle(folder: Path, *others: str, system: str = "shortcut", **training) -> tuple[Path, Path]:
    """Six updates at a stretch, and three and three after a resume; their last checkpoints, found bit-equal.

    The resume lies in the middle of a log interval.
    """
    import torch

    settings = EXACT | {"max_train_steps": 6, "logging_steps": 2} | training
    train(folder / "straight", *others, system=system, **settings, checkpointing_steps=100)
    train(folder / "broken", *others, system=system, **settings, checkpointing_steps=3)
    shutil.rmtree(folder / "broken/checkpoint-6")  # as if the run had ended between updates 3 and 6
    torch.manual_seed(random.randrange(2**32))  # whatever the process did before
    train(folder / "broken", *others, system=system, **settings, resume_from_checkpoint="latest")
    straight, broken = (folder / name / "checkpoint-6" for name in ("straight", "broken"))
    assert differing(tensors_of(straight), tensors_of(broken)) == []
    assert [row["step"] for row in rows_of(folder / "straight") if "loss" in row] == [2, 4, 6]
    assert rows_of(folder / "broken") == rows_of(folder / "straight")
    return straight, broken


def launch_two(program: Path, folder: Path, *arguments: str) -> list[dict]:
    """A program on two processes with gloo; what each wrote to folder/rank-<rank>.json."""
    command = [sys.executable, "-m", "accelerate.commands.launch", "--main_process_port", "0", "--config_file"]
    command += [str(ROOT / "accelerate_configs/cpu_2proc.yaml"), str(program), str(folder), *arguments]
    settings = {"OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true", "PYTHONPATH": str(ROOT)}
    result = subprocess.run(
        command, cwd=ROOT, env=os.environ | settings, capture_output=True, text=True, timeout=200, check=False
    )
    assert result.returncode == 0, result.stdout + result.stderr
    return [json.loads((folder / f"rank-{rank}.json").read_text()) for rank in (0, 1)]


def reset_accelerate() -> None:
    """Accelerate's state lives in classes; a second run in the same process needs new ones."""
    if "accelerate" in sys.modules:
        from accelerate.state import AcceleratorState, GradientState

        AcceleratorState._reset_state(True)
        GradientState._reset_state()


def tensors_of(checkpoint: Path) -> dict:
    """Weights, EMA and optimiser state of a checkpoint."""
    from safetensors.torch import load_file

    return {
        f"{file.stem}/{key}": value.clone()  # it is a view of the file
        for file in sorted(checkpoint.glob("*.safetensors"))
        for key, value in load_file(file).items()
    }


def differing(a: dict, b: dict) -> list[str]:
    """Names of what is not equal bit for bit in two results of `tensors_of`."""
    import torch

    return sorted(a.keys() ^ b.keys()) + [name for name in a.keys() & b.keys() if not torch.equal(a[name], b[name])]


def rows_of(run_dir: Path) -> list[dict]:
    """metrics.jsonl without what depends on the clock."""
    rows = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    return [{key: value for key, value in row.items() if not key.startswith("perf/")} for row in rows]


# ---- a run of a test's own loop ----


def open_run(run_dir: Path, dataset, model=None, *, trained=None, order=None, **training):
    """A TrainingRun of a tiny network, or of `model`, resumed and ready for `batches`."""
    import torch

    from pipelines.shortcut import ShortcutDiT
    from trainers.common import TrainingRun, create_accelerator
    from trainers.common.config import RunConfig

    reset_accelerate()
    defaults = {"output_dir": run_dir, "max_train_steps": 4, "train_batch_size": 4, "report_to": []}
    config = RunConfig(training={**defaults, **training})
    accelerator = create_accelerator(config)
    if model is None:
        torch.manual_seed(0)
        model = ShortcutDiT(8, 1, 2, hidden_size=16, num_layers=1, num_attention_heads=2, num_classes=10)
    run = TrainingRun(accelerator, config, model=model, dataset=dataset, trained=trained, order=order)
    run.resume()
    return run


def flow_loss(run, batch: dict):
    """Flow matching where noise and time belong to the sample: the same for every way to batch it."""
    from objectives.rectified_flow import flow_matching_loss

    def network(sample, t, step_size, conditions):
        return run.model(sample, t, step_size, **conditions).sample

    conditions = {"class_labels": batch["class_labels"]}
    return flow_matching_loss(
        network, batch["noise"], batch["pixel_values"], batch["t"], conditions, step_size=0.0, path_eps=0.0
    )


def train_on(run, loss=flow_loss) -> None:
    """The loop of every script, without its end."""
    for batch in run.batches():
        with run.accumulate():
            run.update(*loss(run, batch))


def save_and_close(run) -> None:
    """The end of a run that exports nothing."""
    run.save_checkpoint()
    run._close(0)


# ---- the command, in a child ----


def start(log: Path, function: Callable[..., None], *arguments) -> BaseProcess:
    """Call a module's function in a new process; what it prints goes to `log`."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PRELOAD)
    paths = [str(ROOT), str(ROOT / "tests"), os.environ.get("PYTHONPATH", "")]
    with environment(OMP_NUM_THREADS="1", ACCELERATE_USE_CPU="true", PYTHONPATH=os.pathsep.join(filter(None, paths))):
        process = context.Process(target=_child, args=(log, function, arguments))
        process.start()
    return process


def _child(log: Path, function: Callable[..., None], arguments: tuple) -> None:
    import torch
    from tqdm import tqdm

    multiprocessing.set_start_method("fork", force=True)  # of its loader processes, as in a process from a shell
    tqdm.set_lock(threading.RLock())  # its own is a semaphore that a killed process would leave behind
    descriptor = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)
    torch.set_num_threads(1)
    function(*arguments)


def train_in_child(arguments: list[str]) -> None:
    """The child's side of a run; `arguments` from `command_line`."""
    from trainers import train_shortcut

    train_shortcut.main(arguments)


@contextmanager
def environment(**values: str) -> Iterator[None]:
    before = {name: os.environ.get(name) for name in values}
    os.environ.update(values)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value


def wait_for(condition: Callable[[], bool], process: BaseProcess, seconds: float = 60, pause: float = 0.002) -> bool:
    """Wait until the condition holds; false if the process ends first."""
    give_up = time.monotonic() + seconds
    while not condition():
        if not process.is_alive():
            return condition()
        if time.monotonic() > give_up:
            process.kill()
            raise TimeoutError(f"{seconds} s have passed")
        time.sleep(pause)
    return True


def end(process: BaseProcess, seconds: float = 60) -> int:
    """The exit code of a process that ends by itself."""
    process.join(seconds)
    if process.is_alive():
        process.kill()
        process.join()
        raise TimeoutError(f"the process did not end in {seconds} s")
    return process.exitcode
