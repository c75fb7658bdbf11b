"""Checkpoints written beside the training: who needs one waits for it, and a failed one is never taken for whole."""

from __future__ import annotations

import errno
import json
import math
import os
import signal
import threading
import time

import pytest
import runs

from trainers.common import checkpoints

SETTINGS = {"max_train_steps": 4, "logging_steps": 1, "checkpointing_steps": 2, "async_checkpoints": True}
SECONDS = 0.3


class Commits:
    """The real `commit`, slow, and failing for one step; says when each was done."""

    def __init__(self, monkeypatch, fails_at: int | None = None):
        self.fails_at, self.begun, self.done = fails_at, [], []
        self.held: threading.Event | None = None
        self._commit = checkpoints.commit
        monkeypatch.setattr(checkpoints, "commit", self)

    def __call__(self, temporary):
        step = int(temporary.stem.rpartition("-")[2])
        self.begun.append(step)
        if self.held is None:
            time.sleep(SECONDS)
        elif not self.held.wait(30):
            raise TimeoutError("training did not go on")
        if step == self.fails_at:
            raise OSError(errno.EIO, "Input/output error")
        path = self._commit(temporary)
        self.done.append(step)
        return path


def exit_code(run_dir) -> int:
    return json.loads((run_dir / "exit.json").read_text())["code"]


def test_training_goes_on_during_a_save_and_the_state_saved_is_that_of_its_update(tmp_path, flows, monkeypatch):
    for name, beside in (("with", True), ("without", False)):
        run = runs.open_run(tmp_path / name, flows, **SETTINGS | {"async_checkpoints": beside})
        with monkeypatch.context() as patched:
            if beside:
                commits = Commits(patched)
                commits.held = threading.Event()
            for batch in run.batches():
                with run.accumulate():
                    run.update(*runs.flow_loss(run, batch))
                if beside and run.step == 3:
                    assert commits.done == []
                    commits.held.set()  # a save that does not let training go on waits for this in vain
            runs.save_and_close(run)
    for step in (2, 4):
        one, other = (runs.tensors_of(tmp_path / name / f"checkpoint-{step}") for name in ("with", "without"))
        assert runs.differing(one, other) == []


def save_again(run) -> None:
    for batch in run.batches():
        with run.accumulate():
            run.update(*runs.flow_loss(run, batch))
    runs.save_and_close(run)


def stop(run) -> None:
    for batch in run.batches():
        with run.accumulate():
            run.update(*runs.flow_loss(run, batch))
        if run.step == 2:
            os.kill(os.getpid(), signal.SIGTERM)


def stop_later(run) -> None:
    """The stop itself makes a save."""
    for batch in run.batches():
        with run.accumulate():
            run.update(*runs.flow_loss(run, batch))
        if run.step == 3:
            os.kill(os.getpid(), signal.SIGTERM)


def keep_best(run) -> None:
    check = run.validation(2, lambda model: ({}, {}), score=lambda scalars: -run.step)
    for batch in run.batches():
        with run.accumulate():
            run.update(*runs.flow_loss(run, batch))
        check()
        if run.step == 2:
            assert checkpoints.verify(run.run_dir / "checkpoint-2") == []
            assert json.loads((run.run_dir / "best.json").read_text()) == {"step": 2, "score": -2.0}
    runs.save_and_close(run)


def not_finite(run) -> None:
    for batch in run.batches():
        with run.accumulate():
            loss, metrics = runs.flow_loss(run, batch)
            run.update(loss * (math.nan if run.step == 2 else 1), metrics)


def finish(run) -> None:
    for batch in run.batches():
        with run.accumulate():
            run.update(*runs.flow_loss(run, batch))
    run.finish(run.inference_model)
    assert checkpoints.verify(run.run_dir / "checkpoint-4") == []


def bad_sample(run) -> None:
    for batch in run.batches():
        with run.accumulate():
            if run.step == 2:
                raise KeyError("a bad sample")
            run.update(*runs.flow_loss(run, batch))


# who needs the checkpoint, the exit code, the steps that are written at the end
NEEDS = {
    "the next save": (save_again, None, [4, 2]),
    "a stop": (stop, 75, [2]),
    "a later stop": (stop_later, 75, [3, 2]),
    "the best": (keep_best, None, [4, 2]),
    "a non-finite end": (not_finite, 3, [2]),
    "the end": (finish, None, [4, 2]),
    "an error": (bad_sample, KeyError, [2]),
}


@pytest.mark.parametrize("who", NEEDS)
def test_whoever_needs_a_save_waits_for_it(tmp_path, flows, monkeypatch, who):
    function, ends, steps = NEEDS[who]
    commits = Commits(monkeypatch)
    run = runs.open_run(tmp_path, flows, **SETTINGS)
    if ends is None:
        function(run)
    else:
        with pytest.raises(ends if ends is KeyError else SystemExit) as raised:
            function(run)
        assert ends is KeyError or raised.value.code == ends
    assert commits.done == sorted(steps)
    found = checkpoints.list_checkpoints(tmp_path)
    assert [checkpoints.step_of(path) for path in found] == steps
    assert [checkpoints.verify(path) for path in found] == [[]] * len(found)
    assert exit_code(tmp_path) == {None: 0, KeyError: 1}.get(ends, ends)
    assert not list(tmp_path.glob("*.tmp"))


@pytest.mark.parametrize("who", NEEDS)
def test_the_error_of_a_save_is_raised_where_it_is_needed(tmp_path, flows, monkeypatch, capsys, who):
    """A failed save is never taken for a checkpoint; an error that ends the run anyway stays the one that is raised."""
    function, ends, _ = NEEDS[who]
    # at the end, it is the last save that fails: the ones before have told by then
    commits = Commits(monkeypatch, fails_at=4 if who == "the end" else 2)
    run = runs.open_run(tmp_path, flows, **SETTINGS)
    with pytest.raises(KeyError if ends is KeyError else OSError) as raised:
        function(run)
    assert ends is KeyError or "Input/output error" in str(raised.value)
    assert "the checkpoints before it are intact" in str(raised.value) or ends is KeyError
    assert 2 in commits.begun
    found = checkpoints.list_checkpoints(tmp_path)
    assert [checkpoints.verify(path) for path in found] == [[]] * len(found)
    assert (tmp_path / "checkpoint-2" in found) == (who == "the end")
    assert exit_code(tmp_path) == 1


def test_the_old_checkpoint_goes_only_when_the_new_one_has_its_name(tmp_path, flows, monkeypatch):
    rotate, seen = checkpoints.rotate, []

    def watch(run_dir, *arguments, **settings):
        seen.append([path.name for path in checkpoints.list_checkpoints(run_dir)])
        rotate(run_dir, *arguments, **settings)

    monkeypatch.setattr(checkpoints, "rotate", watch)
    Commits(monkeypatch)
    run = runs.open_run(tmp_path, flows, **SETTINGS | {"checkpoints_total_limit": 1, "max_train_steps": 6})
    for batch in run.batches():
        if run.step in (3, 5):  # a save is under way
            before = tmp_path / f"checkpoint-{run.step - 3}"
            assert before.exists() or run.step == 3
        with run.accumulate():
            run.update(*runs.flow_loss(run, batch))
    runs.save_and_close(run)
    assert seen == [["checkpoint-2"], ["checkpoint-4", "checkpoint-2"], ["checkpoint-6", "checkpoint-4"]]
    assert [path.name for path in checkpoints.list_checkpoints(tmp_path)] == ["checkpoint-6"]
