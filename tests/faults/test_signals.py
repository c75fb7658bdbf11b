"""Asked to stop in any phase, a run saves and exits with 75; started again, it ends as if nothing had been.

Each child is the real command with one slow place, in which it says where it is and the signal reaches it.
"""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path

import pytest
import runs
import torch

from trainers.common import checkpoints

SETTINGS = {"max_train_steps": 4, "logging_steps": 2, "checkpoints_total_limit": None}
VALIDATION = ["--validation.validation_steps=2", "--validation.num_samples=8"]


def linger(marker: Path, seconds: float) -> None:
    """Say that the phase has been reached, once, and stay in it."""
    if not marker.exists():
        marker.touch()
        time.sleep(seconds)


class SlowDataset(torch.utils.data.Dataset):
    """A dataset that hangs at its n-th item (of one loader process)."""

    def __init__(self, dataset, marker: Path, item: int, seconds: float):
        self.dataset, self.marker, self.item, self.seconds, self.read = dataset, marker, item, seconds, 0
        self.num_classes = dataset.num_classes

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, key):
        self.read += 1
        if self.read == self.item:
            linger(self.marker, self.seconds)
        return self.dataset[key]


def slow_start(marker: Path, arguments: list[str]) -> None:
    from trainers import train_shortcut

    open_split = train_shortcut.open_split

    def slow(config, split):
        linger(marker, 0.3)
        return open_split(config, split)

    train_shortcut.open_split = slow
    train_shortcut.main(arguments)


def slow_imports(marker: Path, arguments: list[str]) -> None:
    """Before there is a run that could answer: torch and Accelerate are still being loaded."""
    from trainers import common, train_shortcut

    create_accelerator = common.create_accelerator

    def slow(config):
        linger(marker, 0.3)
        return create_accelerator(config)

    common.create_accelerator = slow
    train_shortcut.main(arguments)


def slow_data(marker: Path, arguments: list[str], item: int) -> None:
    from trainers import train_shortcut

    open_split = train_shortcut.open_split

    def slow(config, split):
        dataset = open_split(config, split)
        return SlowDataset(dataset, marker, item, seconds=60) if split == "train" else dataset

    train_shortcut.open_split = slow
    train_shortcut.main(arguments)


def slow_update(marker: Path, arguments: list[str], micro_batch: int) -> None:
    from trainers import train_shortcut

    compute_loss, calls = train_shortcut.compute_loss, []

    def slow(*arguments_):
        calls.append(1)
        if len(calls) == micro_batch:
            linger(marker, 0.3)
        return compute_loss(*arguments_)

    train_shortcut.compute_loss = slow
    train_shortcut.main(arguments)


def slow_save(marker: Path, arguments: list[str]) -> None:
    from trainers import train_shortcut
    from trainers.common import checkpoints

    commit = checkpoints.commit

    def slow(temporary):
        linger(marker, 0.3)
        return commit(temporary)

    checkpoints.commit = slow
    train_shortcut.main(arguments)


def slow_validation(marker: Path, arguments: list[str]) -> None:
    from trainers import train_shortcut

    validate = train_shortcut.validate

    def slow(*arguments_):
        linger(marker, 60)
        return validate(*arguments_)

    train_shortcut.validate = slow
    train_shortcut.main(arguments)


@pytest.fixture(scope="module")
def straight(tmp_path_factory):
    """Tensors and rows of an undisturbed run, by accumulation."""
    results = {}
    for accumulation in (1, 2):
        run_dir = tmp_path_factory.mktemp("straight")
        runs.train(run_dir, *VALIDATION, **SETTINGS, gradient_accumulation_steps=accumulation)
        results[accumulation] = runs.tensors_of(run_dir / "checkpoint-4"), runs.rows_of(run_dir)
    return results


PHASES = {
    # name: child, its further arguments, settings, updates at which it may stop
    "imports": (slow_imports, (), {}, {0}),
    "start-up": (slow_start, (), {}, {0}),
    "data wait": (slow_data, (20,), {}, {2}),
    "data wait, workers": (slow_data, (12,), {"dataloader_num_workers": 2}, {2, 3}),
    "data wait inside an update": (slow_data, (28,), {"gradient_accumulation_steps": 2}, {1}),
    "update": (slow_update, (2,), {}, {2}),
    # the update that was begun is not counted; its micro-batches are drawn again
    "micro-batch": (slow_update, (3,), {"gradient_accumulation_steps": 2}, {1}),
    "last micro-batch": (slow_update, (4,), {"gradient_accumulation_steps": 2}, {2}),
    "save": (slow_save, (), {"checkpointing_steps": 2}, {2}),
    "validation": (slow_validation, (), {}, {2}),
}


@pytest.mark.parametrize("phase", PHASES)
def test_a_signal_leads_to_a_checkpoint_and_exit_code_75(tmp_path, phase, straight):
    child, further, settings, stops_at = PHASES[phase]
    number = signal.SIGUSR1 if phase == "update" else signal.SIGTERM
    run_dir, log, marker = tmp_path / "run", tmp_path / "log", tmp_path / "marker"
    arguments = runs.command_line(run_dir, *VALIDATION, **SETTINGS | settings)
    process = runs.start(log, child, marker, arguments, *further)
    assert runs.wait_for(marker.exists, process), log.read_text()
    if "workers" in phase:  # they are ahead of the trainer
        assert runs.wait_for((run_dir / "metrics.jsonl").exists, process), log.read_text()
    time.sleep(0.05)
    began = time.monotonic()
    os.kill(process.pid, number)
    assert runs.end(process) == 75, log.read_text()
    assert time.monotonic() - began < 15  # a dataset that hangs for a minute is not waited for
    newest = checkpoints.list_checkpoints(run_dir)[0]
    step = checkpoints.step_of(newest)
    assert step in stops_at
    assert checkpoints.verify(newest) == []
    assert f"stopped at update {step}; continue with --resume_from_checkpoint latest" in log.read_text()
    assert not list(run_dir.glob("*.tmp"))

    runs.train(run_dir, *VALIDATION, **SETTINGS | settings, resume_from_checkpoint="latest")
    tensors, rows = straight[settings.get("gradient_accumulation_steps", 1)]
    assert runs.differing(tensors, runs.tensors_of(run_dir / "checkpoint-4")) == []
    assert runs.rows_of(run_dir) == rows  # those of validation among them


def test_a_second_signal_inside_the_save_changes_nothing(tmp_path):
    run_dir, log, marker = tmp_path / "run", tmp_path / "log", tmp_path / "marker"
    arguments = runs.command_line(run_dir, **SETTINGS, checkpointing_steps=2)
    process = runs.start(log, slow_save, marker, arguments)
    assert runs.wait_for(marker.exists, process), log.read_text()
    for _ in range(5):
        os.kill(process.pid, signal.SIGTERM)
        time.sleep(0.02)
    assert runs.end(process) == 75, log.read_text()
    assert checkpoints.verify(run_dir / "checkpoint-2") == []


def test_a_first_interrupt_saves_and_a_second_leaves_at_once(tmp_path):
    run_dir, log, marker = tmp_path / "run", tmp_path / "log", tmp_path / "marker"
    process = runs.start(log, slow_update, marker, runs.command_line(run_dir, **SETTINGS), 2)
    assert runs.wait_for(marker.exists, process), log.read_text()
    os.kill(process.pid, signal.SIGINT)
    assert runs.end(process) == 75, log.read_text()
    assert checkpoints.verify(run_dir / "checkpoint-2") == []

    process = runs.start(log, slow_update, tmp_path / "second", runs.command_line(tmp_path / "other", **SETTINGS), 2)
    assert runs.wait_for((tmp_path / "second").exists, process), log.read_text()
    os.kill(process.pid, signal.SIGINT)
    time.sleep(0.05)
    os.kill(process.pid, signal.SIGINT)
    assert runs.end(process) not in (0, 75)
    assert "KeyboardInterrupt" in log.read_text()


def test_a_signal_after_the_last_update_finishes_the_run(tmp_path):
    """What is left is the final save and the export: the run is done, not to be continued."""
    run_dir, log, marker = tmp_path / "run", tmp_path / "log", tmp_path / "marker"
    process = runs.start(log, slow_save, marker, runs.command_line(run_dir, **SETTINGS))  # saves once, at its end
    assert runs.wait_for(marker.exists, process), log.read_text()
    os.kill(process.pid, signal.SIGTERM)
    assert runs.end(process) == 0, log.read_text()
    assert checkpoints.verify(run_dir / "checkpoint-4") == []
    assert (run_dir / "model_index.json").exists()


def test_the_signals_are_given_back_after_a_run(tmp_path):
    runs.train(tmp_path / "run", max_train_steps=1)
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL
    assert signal.getsignal(signal.SIGINT) == signal.default_int_handler
