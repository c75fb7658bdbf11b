"""metrics.jsonl is complete whatever the trackers do, and trackers cost the run nothing."""

from __future__ import annotations

import json
import threading
import time

import numpy as np
import pytest
import runs
import torch
from PIL import Image

from trainers.common import run as run_module
from trainers.common import tracking
from trainers.common.tracking import TensorBoard, Tracking

HANG = threading.Event()  # never set


class Recorder:
    """A tracker that works."""

    rows: list = []

    def __init__(self, run_dir, step):
        self.rows.clear()

    def log(self, step, scalars, pictures):
        self.rows.append((step, scalars, threading.current_thread()))

    def close(self):
        self.rows.append("closed")


class Silent:
    """A tracker that does nothing."""

    def __init__(self, run_dir, step):
        pass

    def log(self, step, scalars, pictures):
        pass

    def close(self):
        pass


class FailsAtCreation(Silent):
    def __init__(self, run_dir, step):
        raise ConnectionError("no network")


class FailsAtTheSecondRow(Silent):
    def log(self, step, scalars, pictures):
        if step == 2:
            raise TimeoutError("lost the server")


class FailsAtTheEnd(Silent):
    def close(self):
        raise OSError("disk quota")


class HangsAtCreation(Silent):
    def __init__(self, run_dir, step):
        HANG.wait(60)


class HangsAtTheSecondRow(Silent):
    def log(self, step, scalars, pictures):
        if step == 2:
            HANG.wait(60)


class HangsAtTheEnd(Silent):
    def close(self):
        HANG.wait(60)


BROKEN = [
    FailsAtCreation, FailsAtTheSecondRow, FailsAtTheEnd, HangsAtCreation, HangsAtTheSecondRow, HangsAtTheEnd,
]  # fmt: skip


def row_steps(run_dir) -> list[int]:
    return [json.loads(line)["step"] for line in (run_dir / "metrics.jsonl").read_text().splitlines()]


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
@pytest.mark.parametrize("broken", BROKEN, ids=lambda tracker: tracker.__name__)
def test_a_broken_tracker_never_stops_or_slows_a_run(tmp_path, monkeypatch, caplog, broken):
    monkeypatch.setattr(tracking, "SECONDS_TO_FINISH", 0.2)
    monkeypatch.setitem(run_module.TRACKERS, "wandb", broken)
    monkeypatch.setitem(run_module.TRACKERS, "tensorboard", Recorder)
    began = time.monotonic()
    runs.train(tmp_path, max_train_steps=4, logging_steps=1, report_to=["wandb", "tensorboard"])
    assert time.monotonic() - began < 10
    assert row_steps(tmp_path) == [1, 2, 3, 4]
    assert f"tracker-{broken.__name__}" in caplog.text
    assert ("hangs" in caplog.text) == broken.__name__.startswith("Hangs")
    # the other one got everything, in a thread of its own
    assert [row[0] for row in Recorder.rows[:-1]] == [1, 2, 3, 4]
    assert Recorder.rows[-1] == "closed"
    assert Recorder.rows[0][2] is not threading.current_thread()
    assert (tmp_path / "model_index.json").exists()


def test_logging_does_not_wait_for_a_tracker(tmp_path, monkeypatch, caplog):
    monkeypatch.setattr(tracking, "SECONDS_TO_FINISH", 0.05)
    log = Tracking(tmp_path, 0, [HangsAtCreation])
    began = time.monotonic()
    for step in range(1, 1101):  # more than its queue holds
        log.log(step, {"loss": 1.0})
    assert time.monotonic() - began < 5
    log.close()
    assert time.monotonic() - began < 6
    assert len(row_steps(tmp_path)) == 1100
    assert "does not keep up" in caplog.text
    assert "hangs; leaving without it" in caplog.text


def test_rows_after_the_resumed_step_and_a_torn_line_are_dropped(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1, "loss": 1}\n{"step": 2, "loss": 2}\n{"step": 3, "loss": 3}\n{"step": 2, "los')
    Tracking(tmp_path, 2, []).log(3, {"loss": 4.0})
    assert [json.loads(line) for line in path.read_text().splitlines()] == [
        {"step": 1, "loss": 1}, {"step": 2, "loss": 2}, {"step": 3, "loss": 4.0},
    ]  # fmt: skip
    assert not path.with_suffix(".tmp").exists()


@pytest.mark.parametrize("torn", [b"7", b"[1]", b"null", b"{}", b'{"step"', b'{"step": "x"}', b"\0\0", b"\xff"])
def test_a_line_torn_to_something_else_is_dropped(tmp_path, torn):
    (tmp_path / "metrics.jsonl").write_bytes(b'{"step": 1}\n' + torn)
    Tracking(tmp_path, 5, [])
    assert (tmp_path / "metrics.jsonl").read_text() == '{"step": 1}\n'


def test_pictures_are_written_beside_the_rows(tmp_path):
    log = Tracking(tmp_path, 0, [])
    log.log(20, {"validation/loss": 1.0}, {"samples": Image.new("RGB", (4, 4), (255, 0, 0))})
    with Image.open(tmp_path / "samples/samples-000020.png") as picture:
        assert picture.getpixel((0, 0)) == (255, 0, 0)
    log.close()


def test_tensorboard_scalars_and_pictures_read_back(tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    log = Tracking(tmp_path, 0, [TensorBoard])
    values = [float(value) for value in torch.rand(20)]
    for step, value in enumerate(values, start=1):
        log.log(step, {"loss": value}, {"samples": Image.new("RGB", (4, 4))} if step % 10 == 0 else None)
    log.close()
    # A process killed after row 20 had its checkpoint at 15: its later rows disappear.
    log = Tracking(tmp_path, 15, [TensorBoard])
    log.log(16, {"loss": 7.0})
    log.close()
    events = EventAccumulator(str(tmp_path / "tensorboard"), size_guidance={"scalars": 0, "images": 0}).Reload()
    scalars = events.Scalars("loss")
    assert [event.step for event in scalars] == list(range(1, 17))
    np.testing.assert_allclose([event.value for event in scalars], [*values[:15], 7.0], rtol=1e-6)
    assert [event.step for event in events.Images("samples")] == [10]


def test_the_command_writes_tensorboard_by_its_real_name(tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    runs.train(tmp_path, max_train_steps=4, logging_steps=2, report_to=["tensorboard"])
    events = EventAccumulator(str(tmp_path / "tensorboard"), size_guidance={"scalars": 0}).Reload()
    expected = [row["loss"] for row in runs.rows_of(tmp_path)]
    assert [event.value for event in events.Scalars("loss")] == pytest.approx(expected, rel=1e-6)


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_a_tracker_that_is_not_installed_is_given_up(tmp_path, monkeypatch, caplog):
    monkeypatch.setitem(__import__("sys").modules, "wandb", None)
    runs.train(tmp_path, max_train_steps=2, logging_steps=1, report_to=["wandb"])
    assert "tracker-WandB failed" in caplog.text
    assert row_steps(tmp_path) == [1, 2]
