"""metrics.jsonl is complete whatever the trackers do, and trackers cost the run nothing."""

from __future__ import annotations

import json
import resource
import sys
import threading
import time
from contextlib import contextmanager

import numpy as np
import pytest
import runs
import torch
from PIL import Image

from trainers.common import tracking
from trainers.common.tracking import TensorBoard, Tracking, WandB, check_trackers, read_rows

HANG = threading.Event()  # never set


class Recorder:
    """A tracker that works."""

    rows: list = []

    def __init__(self, run_dir, step, hyperparameters):
        self.rows.clear()

    def log(self, step, scalars, pictures, histograms):
        self.rows.append((step, scalars, threading.current_thread()))

    def close(self):
        self.rows.append("closed")


class Silent:
    """A tracker that does nothing."""

    def __init__(self, run_dir, step, hyperparameters):
        pass

    def log(self, step, scalars, pictures, histograms):
        pass

    def close(self):
        pass


class FailsAtCreation(Silent):
    def __init__(self, run_dir, step, hyperparameters):
        raise ConnectionError("no network")


class FailsAtTheSecondRow(Silent):
    def log(self, step, scalars, pictures, histograms):
        if step == 2:
            raise TimeoutError("lost the server")


class FailsAtTheEnd(Silent):
    def close(self):
        raise OSError("disk quota")


class HangsAtCreation(Silent):
    def __init__(self, run_dir, step, hyperparameters):
        HANG.wait(60)


class HangsAtTheSecondRow(Silent):
    def log(self, step, scalars, pictures, histograms):
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


WANDB = """
import json, pathlib
def Image(picture): return ["picture", *picture.size]
def Histogram(values): return ["histogram", len(values)]
class Run:
    def __init__(self, dir): self.file = pathlib.Path(dir) / "wandb.jsonl"
    def write(self, row):
        with self.file.open("a") as file: file.write(json.dumps(row) + "\\n")
    def log(self, row, step): self.write([step, row])
    def finish(self): self.write("finished")
def init(dir, **settings):
    run = Run(dir)
    run.write(settings)
    return run
"""


@pytest.fixture
def wandb(tmp_path, monkeypatch):
    """A package of that name that writes down what it is told; the real one wants an account."""
    (tmp_path / "packages").mkdir()
    (tmp_path / "packages/wandb.py").write_text(WANDB)
    monkeypatch.syspath_prepend(tmp_path / "packages")
    monkeypatch.delitem(sys.modules, "wandb", raising=False)
    yield lambda run_dir: [json.loads(line) for line in (run_dir / "wandb.jsonl").read_text().splitlines()]
    sys.modules.pop("wandb", None)


@pytest.mark.usefixtures("wandb")
@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
@pytest.mark.parametrize("broken", BROKEN, ids=lambda tracker: tracker.__name__)
def test_a_broken_tracker_never_stops_or_slows_a_run(tmp_path, monkeypatch, caplog, broken):
    monkeypatch.setattr(tracking, "SECONDS_TO_FINISH", 0.2)
    monkeypatch.setitem(tracking.TRACKERS, "wandb", broken)
    monkeypatch.setitem(tracking.TRACKERS, "tensorboard", Recorder)
    began = time.monotonic()
    runs.train(tmp_path / "run", max_train_steps=4, logging_steps=1, report_to=["wandb", "tensorboard"])
    assert time.monotonic() - began < 10
    assert row_steps(tmp_path / "run") == [1, 2, 3, 4]
    assert f"tracker-{broken.__name__}" in caplog.text
    assert ("hangs" in caplog.text) == broken.__name__.startswith("Hangs")
    # the other one got everything, in a thread of its own
    assert [row[0] for row in Recorder.rows[:-1]] == [1, 2, 3, 4]
    assert Recorder.rows[-1] == "closed"
    assert Recorder.rows[0][2] is not threading.current_thread()
    assert (tmp_path / "run/model_index.json").exists()


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
    monkeypatch.setitem(sys.modules, "wandb", None)
    log = Tracking(tmp_path, 0, [WandB])
    log.log(1, {"loss": 1.0})
    log.close()
    assert "tracker-WandB failed" in caplog.text
    assert row_steps(tmp_path) == [1]


def test_what_a_tracker_lacks_is_named_beforehand(monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", None)
    check_trackers(["tensorboard"])
    with pytest.raises(ValueError, match=r"`report_to` wandb: .* \(pip install 'backlot\[wandb\]'\)"):
        check_trackers(["tensorboard", "wandb"])


def test_an_installed_tracker_passes_without_being_loaded(wandb):
    check_trackers(["tensorboard", "wandb"])
    assert "wandb" not in sys.modules


def track(run_dir, step: int, **hyperparameters) -> None:
    """A process of a run: two rows with W&B."""
    run_dir.mkdir(parents=True, exist_ok=True)
    log = Tracking(run_dir, step, [WandB], hyperparameters)
    log.log(step + 1, {"loss": 1.0}, {"samples": Image.new("RGB", (4, 3))}, {"t": torch.rand(5)})
    log.close()


def test_wandb_continues_a_resumed_run_and_no_other_of_the_same_name(tmp_path, wandb):
    run, namesake = tmp_path / "a/run", tmp_path / "b/run"
    track(run, 0, seed=1)
    track(run, 5, seed=1)
    track(namesake, 0)
    (first, row, _), (second, _, finished) = wandb(run)[:3], wandb(run)[3:]
    assert first["id"] == second["id"] == json.loads((run / "tracking.json").read_text())["wandb_run_id"]
    assert (first["name"], first["resume"], first["config"]) == ("run", "allow", {"seed": 1})
    assert row == [1, {"loss": 1.0, "samples": ["picture", 4, 3], "t": ["histogram", 5]}]
    assert finished == "finished"
    other = wandb(namesake)[0]
    assert other["name"] == "run"
    assert other["id"] != first["id"]
    track(run, 0)  # begun anew in the folder of an attempt that reached no checkpoint
    assert wandb(run)[-3]["id"] != first["id"]


def test_tensorboard_has_hyperparameters_and_histograms(tmp_path, caplog):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    log = Tracking(tmp_path, 0, [TensorBoard], {"training": {"learning_rate": 1e-4}})
    values = torch.tensor([1.0, 2.0, float("nan"), 3.0, float("inf")], dtype=torch.bfloat16, requires_grad=True)
    log.log(1, {"loss": 1.0}, histograms={"t": values, "empty": np.zeros(0), "all bad": np.full(3, np.nan)})
    log.log(2, {"loss": 1.0}, histograms={"t": np.array([4.0, 6.0])})
    log.close()
    assert "failed" not in caplog.text
    events = EventAccumulator(str(tmp_path / "tensorboard"), size_guidance={"histograms": 0, "tensors": 0}).Reload()
    assert events.Tags()["histograms"] == ["t"]
    assert [event.histogram_value.sum for event in events.Histograms("t")] == [6.0, 10.0]
    assert b'"learning_rate": 0.0001' in events.Tensors("hyperparameters/text_summary")[0].tensor_proto.string_val[0]
    assert len(list((tmp_path / "tensorboard").iterdir())) == 1  # no second run beside it
    assert json.loads((tmp_path / "metrics.jsonl").read_text().splitlines()[0]) == {"step": 1, "loss": 1.0}


def test_a_histogram_is_what_it_was_when_logged(tmp_path, monkeypatch):
    seen, release = [], threading.Event()

    class Slow(Silent):
        def log(self, step, scalars, pictures, histograms):
            release.wait(10)
            seen.append(histograms["weights"].sum())

    log = Tracking(tmp_path, 0, [Slow])
    weights = torch.ones(4)
    log.log(1, {}, histograms={"weights": weights})
    weights.zero_()  # the next update
    release.set()
    log.close()
    assert seen == [4.0]


@contextmanager
def no_file_larger_than(size: int):
    """A disk without room, for this process: a write ends in the middle of a row with an OSError."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_rows_wait_for_room_on_the_disk(tmp_path, caplog):
    log = Tracking(tmp_path, 0, [])
    log.log(1, {"loss": 1.0})
    with no_file_larger_than(30):
        log.log(2, {"loss": 2.0})
        log.log(3, {"loss": 3.0})
    torn = (tmp_path / "metrics.jsonl").read_text()
    assert len(torn) == 30
    assert [row["step"] for row in read_rows(tmp_path)] == [1]
    assert caplog.text.count("wait in memory") == 1
    log.log(4, {"loss": 4.0})
    assert (tmp_path / "metrics.jsonl").read_text() == "".join(
        json.dumps({"step": step, "loss": float(step)}) + "\n" for step in (1, 2, 3, 4)
    )
    log.close()


def test_rows_that_wait_are_written_or_counted_at_the_end(tmp_path, caplog):
    log = Tracking(tmp_path, 0, [])
    with no_file_larger_than(10):
        log.log(1, {"loss": 1.0})
        log.log(2, {"loss": 1.0})
        log.close()
    assert "2 rows of" in caplog.text
    log.close()
    assert row_steps(tmp_path) == [1, 2]


def test_a_picture_without_room_is_left_out(tmp_path, caplog):
    noise = Image.fromarray(np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8))
    log = Tracking(tmp_path, 0, [])
    with no_file_larger_than(1000):
        log.log(1, {"loss": 1.0}, {"samples": noise})
        log.log(2, {"loss": 1.0}, {"samples": noise})
    assert list((tmp_path / "samples").iterdir()) == []
    assert caplog.text.count("left out") == 1
    log.log(3, {"loss": 1.0}, {"validation/samples": noise})
    assert (tmp_path / "samples/validation/samples-000003.png").exists()
    assert row_steps(tmp_path) == [1, 2, 3]


def test_rows_are_read_past_torn_lines(tmp_path):
    assert read_rows(tmp_path) == []
    (tmp_path / "metrics.jsonl").write_bytes(b'{"step": 1, "loss": 1.5}\n{"step": 2, "lo\n[]\n\xff\n{"step": 3}\n{"st')
    assert read_rows(tmp_path) == [{"step": 1, "loss": 1.5}, {"step": 3}]
