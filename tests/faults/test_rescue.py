"""An error that ends a run costs no update: the last complete one is saved, and the error is the run's own."""

from __future__ import annotations

import errno
import json
import os
import shutil
import signal
from collections import namedtuple

import pytest
import runs
import torch
from PIL import Image

from trainers.common import checkpoints, saving

SETTINGS = {"max_train_steps": 6, "logging_steps": 2, "lr_scheduler": "cosine"}


def exit_code(run_dir) -> int:
    return json.loads((run_dir / "exit.json").read_text())["code"]


class Failing(torch.utils.data.Dataset):
    """Raises at its n-th item, once."""

    def __init__(self, dataset, item: int, error: BaseException):
        self.dataset, self.item, self.error, self.read = dataset, item, error, 0

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, key):
        self.read += 1
        if self.read == self.item:
            raise self.error
        return self.dataset[key]


@pytest.fixture(scope="module")
def straight(tmp_path_factory):
    """Six updates without an error: tensors and rows, by micro-batches per update."""
    from flow_samples import Flows

    results = {}
    for accumulation in (1, 2):
        folder = tmp_path_factory.mktemp("straight")
        run = runs.open_run(folder, Flows(), gradient_accumulation_steps=accumulation, **SETTINGS)
        train(run, flow_losses())
        runs.save_and_close(run)
        results[accumulation] = runs.tensors_of(folder / "checkpoint-6"), runs.rows_of(folder)
    return results


def flow_losses(fails_at: int | None = None, error: BaseException | None = None):
    """The loss of runs.flow_loss, which raises at its n-th call (counted from 1)."""
    calls = []

    def loss(run, batch):
        calls.append(1)
        if len(calls) == fails_at:
            raise error
        return runs.flow_loss(run, batch)

    return loss


def measure(model):
    """A validation with a picture."""
    return {"norm": float(model.proj_out.bias.norm())}, {"grey": Image.new("L", (4, 4), 128)}


def train(run, loss, function=measure, score=None, every: int = 2) -> None:
    check = run.validation(every, function, score)
    for batch in run.batches():
        with run.accumulate():
            run.update(*loss(run, batch))
        check()


@pytest.mark.parametrize("accumulation", [1, 2])
@pytest.mark.parametrize(
    "error",
    [
        ValueError("this sample is bad"),
        MemoryError(),
        RuntimeError("CUDA out of memory. Tried to allocate 2.00 GiB"),
        torch.OutOfMemoryError("CUDA out of memory"),
        OSError(errno.EMFILE, "Too many open files"),
    ],
    ids=lambda error: type(error).__name__,
)
@pytest.mark.parametrize("place", ["data", "loss"])
def test_the_last_update_is_saved_and_the_error_is_the_runs_own(
    tmp_path, flows, caplog, straight, place, error, accumulation
):
    """After three updates, in the middle of the fourth where it has two micro-batches."""
    fails_at = 3 * accumulation + accumulation
    settings = SETTINGS | {"gradient_accumulation_steps": accumulation}
    dataset = Failing(flows, 4 * fails_at, error) if place == "data" else flows
    run = runs.open_run(tmp_path, dataset, **settings)
    with pytest.raises(type(error)) as raised:
        train(run, flow_losses(fails_at if place == "loss" else None, error))
    assert raised.value is error
    assert exit_code(tmp_path) == 1
    assert [path.name for path in checkpoints.list_checkpoints(tmp_path)] == ["checkpoint-3"]
    assert checkpoints.verify(tmp_path / "checkpoint-3") == []
    assert "checkpoint-3 is written" in caplog.text
    run.folder.release()

    again = runs.open_run(tmp_path, flows, resume_from_checkpoint="latest", **settings)
    assert not (tmp_path / "exit.json").exists()
    train(again, flow_losses())
    runs.save_and_close(again)
    tensors, rows = straight[accumulation]
    assert runs.differing(tensors, runs.tensors_of(tmp_path / "checkpoint-6")) == []
    assert runs.rows_of(tmp_path) == rows


@pytest.mark.parametrize(
    "error",
    [MemoryError(), RuntimeError("CUDA out of memory"), OSError(errno.ENOSPC, "No space left on device")],
    ids=lambda error: type(error).__name__,
)
@pytest.mark.parametrize("place", ["function", "score"])
def test_an_error_in_validation_saves_the_update_before_it(tmp_path, flows, error, place):
    run = runs.open_run(tmp_path, flows, **SETTINGS)

    def fail(*_):
        raise error

    function, score = (fail, None) if place == "function" else (measure, fail)
    with pytest.raises(type(error)) as raised:
        train(run, flow_losses(), function, score, every=3)
    assert raised.value is error
    assert exit_code(tmp_path) == 1
    assert checkpoints.verify(tmp_path / "checkpoint-3") == []


def test_rows_and_pictures_that_find_no_room_end_no_run(tmp_path, flows, straight, caplog):
    (tmp_path / "samples").touch()  # a file in place of the pictures' folder
    run = runs.open_run(tmp_path, flows, **SETTINGS)
    (tmp_path / "metrics.jsonl").symlink_to("/dev/full")
    train(run, flow_losses())
    runs.save_and_close(run)
    assert exit_code(tmp_path) == 0
    assert runs.differing(straight[1][0], runs.tensors_of(tmp_path / "checkpoint-6")) == []
    assert "pictures that cannot be written are left out" in caplog.text
    assert "3 rows" in caplog.text or "rows of metrics wait in memory" in caplog.text


@pytest.mark.parametrize("place", ["optimizer", "schedule", "average"])
def test_an_error_inside_the_optimiser_step_saves_nothing(tmp_path, flows, monkeypatch, caplog, place):
    """Weights, moments and averages are then of no update: what is left is the checkpoint before."""
    run = runs.open_run(tmp_path, flows, checkpointing_steps=2, **SETTINGS)
    owner, name = {
        "optimizer": (run.optimizer, "step"),
        "schedule": (run.lr_scheduler, "step"),
        "average": (run.ema, "update"),
    }[place]
    original = getattr(owner, name)

    def fail(*arguments):
        if run.step == 3:
            raise RuntimeError("CUDA error: an illegal memory access was encountered")
        return original(*arguments)

    monkeypatch.setattr(owner, name, fail)
    with pytest.raises(RuntimeError, match="illegal memory access"):
        train(run, flow_losses())
    assert exit_code(tmp_path) == 1
    assert [path.name for path in checkpoints.list_checkpoints(tmp_path)] == ["checkpoint-2"]
    assert "is written" not in caplog.text


def test_what_cannot_be_saved_does_not_hide_the_error(tmp_path, flows, monkeypatch, caplog):
    """A disk that is full when a bad sample ends the run: the bad sample is what is raised."""
    usage = namedtuple("usage", "total used free")
    run = runs.open_run(tmp_path, flows, **SETTINGS)
    monkeypatch.setattr(saving.shutil, "disk_usage", lambda path: usage(10**9, 10**9, 0))
    with pytest.raises(ValueError, match="this sample is bad"):
        train(run, flow_losses(4, ValueError("this sample is bad")))
    assert checkpoints.list_checkpoints(tmp_path) == []
    assert "checkpoint-3 is not written" in caplog.text
    assert "checkpoint-3 is written" not in caplog.text


def test_weights_that_are_not_finite_are_not_saved_after_an_error_either(tmp_path, flows, caplog):
    run = runs.open_run(tmp_path, flows, **SETTINGS)

    def spoil(model):
        with torch.no_grad():
            run.network.proj_out.bias[0] = torch.nan
        raise ValueError("this sample is bad")

    with pytest.raises(ValueError, match="this sample is bad"):
        train(run, flow_losses(), spoil)
    assert checkpoints.list_checkpoints(tmp_path) == []
    assert "checkpoint-2 is not written: model not finite" in caplog.text
    assert exit_code(tmp_path) == 1


def test_a_full_disk_is_said_in_figures_and_leaves_the_checkpoints_before(tmp_path, flows, monkeypatch):
    usage = namedtuple("usage", "total used free")
    run = runs.open_run(tmp_path, flows, checkpointing_steps=2, **SETTINGS)
    size = checkpoints.size_of

    def nearly_full(path):
        return usage(10**9, 10**9, 2**19 if run.step > 2 else 10**9)

    monkeypatch.setattr(saving.shutil, "disk_usage", nearly_full)
    monkeypatch.setattr(saving.Snapshot, "nbytes", 3 * 2**19)
    with pytest.raises(OSError, match=r"needs 1\.5 MiB, 0\.5 MiB are free; the checkpoints before") as raised:
        train(run, flow_losses())
    assert raised.value.errno == errno.ENOSPC
    assert exit_code(tmp_path) == 1
    assert [path.name for path in checkpoints.list_checkpoints(tmp_path)] == ["checkpoint-2"]
    assert checkpoints.verify(tmp_path / "checkpoint-2") == []
    assert size(tmp_path / "checkpoint-2") > 0


@pytest.mark.skipif(os.geteuid() != 0, reason="mounting a file system needs root")
def test_a_file_system_without_room(tmp_path):
    """A real one of 1 MiB: a checkpoint or two, then the error in figures, then room again and on it goes."""
    mounted = tmp_path / "small"
    mounted.mkdir()
    if os.system(f"mount -t tmpfs -o size=1m tmpfs {mounted} 2>/dev/null"):
        pytest.skip("no file system can be mounted here")
    try:
        run_dir, log = mounted / "run", tmp_path / "log"
        settings = {"max_train_steps": 4, "checkpointing_steps": 1, "checkpoints_total_limit": None}
        process = runs.start(log, runs.train_in_child, runs.command_line(run_dir, **settings))
        assert runs.end(process) == 1, log.read_text()
        assert "MiB are free; the checkpoints before it are intact" in log.read_text()
        found = checkpoints.list_checkpoints(run_dir)
        assert found
        assert [checkpoints.verify(path) for path in found] == [[]] * len(found)
        newest, moved = checkpoints.step_of(found[0]), shutil.copytree(run_dir, tmp_path / "moved")
        runs.train(moved, **settings | {"max_train_steps": newest + 1}, resume_from_checkpoint="latest")
        assert checkpoints.verify(moved / f"checkpoint-{newest + 1}") == []
    finally:
        os.system(f"umount {mounted}")


def test_a_stop_after_an_error_in_saving_is_no_success(tmp_path, flows, monkeypatch):
    """What says 75 has a checkpoint to continue from."""
    run = runs.open_run(tmp_path, flows, **SETTINGS)

    def fail(path, *_):
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(saving.checkpoints, "commit", fail)

    def stop_in_the_third(run_, batch):
        if run.step == 2:
            os.kill(os.getpid(), signal.SIGTERM)
        return runs.flow_loss(run_, batch)

    with pytest.raises(OSError, match="Input/output error"):
        train(run, stop_in_the_third)
    assert exit_code(tmp_path) == 1
