"""What a run tells the world: metrics.jsonl always, TensorBoard and W&B when they work, never at the run's expense."""

from __future__ import annotations

import json
import logging
import os
import queue
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Protocol

import numpy as np
from PIL import Image

logger = logging.getLogger(__name__)
SECONDS_TO_FINISH = 10.0


class Tracker(Protocol):
    """Somewhere else to send metrics; made, called and closed in a thread of its own."""

    def log(self, step: int, scalars: dict[str, float], pictures: dict[str, Image.Image]) -> None: ...

    def close(self) -> None: ...


class TensorBoard:
    """Event files in `<run>/tensorboard`; rows after `step`, left by a killed process, are hidden."""

    def __init__(self, run_dir: Path, step: int):
        from torch.utils.tensorboard import SummaryWriter

        self.writer = SummaryWriter(run_dir / "tensorboard", purge_step=step + 1)

    def log(self, step: int, scalars: dict[str, float], pictures: dict[str, Image.Image]) -> None:
        for name, value in scalars.items():
            self.writer.add_scalar(name, value, step)
        for name, picture in pictures.items():
            self.writer.add_image(name, np.asarray(picture.convert("RGB")), step, dataformats="HWC")
        self.writer.flush()

    def close(self) -> None:
        self.writer.close()


class WandB:
    """Weights and Biases; project, mode and key come from its own environment variables."""

    def __init__(self, run_dir: Path, step: int):
        import wandb

        self.wandb = wandb
        self.run = wandb.init(dir=run_dir, name=run_dir.name, resume="allow", id=run_dir.resolve().name)

    def log(self, step: int, scalars: dict[str, float], pictures: dict[str, Image.Image]) -> None:
        self.run.log({**scalars, **{name: self.wandb.Image(p) for name, p in pictures.items()}}, step=step)

    def close(self) -> None:
        self.run.finish()


TRACKERS: dict[str, Callable[[Path, int], Tracker]] = {"tensorboard": TensorBoard, "wandb": WandB}


class Tracking:
    """Writes rows of metrics and pictures; only metrics.jsonl and the pictures on disk are in the training's way.

    Args:
        run_dir: the run's folder.
        step: updates already done; later rows in metrics.jsonl are leftovers of a killed process and removed.
        trackers: makes each tracker from (run_dir, step); one that fails is given up with a warning.
    """

    def __init__(self, run_dir: Path, step: int, trackers: list[Callable[[Path, int], Tracker]], hyperparameters=None):
        self.run_dir, self.path = run_dir, run_dir / "metrics.jsonl"
        if self.path.exists():
            lines = self.path.read_text(encoding="utf-8", errors="replace").splitlines()
            kept = [line for line in lines if _step_of(line) <= step]
            temporary = self.path.with_suffix(".tmp")
            temporary.write_text("".join(line + "\n" for line in kept), encoding="utf-8")
            temporary.rename(self.path)
        self.threads = [_TrackerThread(tracker, run_dir, step) for tracker in trackers]

    def log(
        self, step: int, scalars: dict[str, float], pictures: dict[str, Image.Image] | None = None, histograms=None
    ) -> None:
        """One row. Pictures go to `samples/<name>-<step>.png` as well."""
        pictures = pictures or {}
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps({"step": step, **scalars}) + "\n")
        for name, picture in pictures.items():
            path = self.run_dir / "samples" / f"{name}-{step:06d}.png"
            path.parent.mkdir(exist_ok=True)
            picture.save(path)
        for thread in self.threads:
            thread.send((step, scalars, pictures))

    def close(self) -> None:
        """Let the trackers finish, for a bounded time."""
        for thread in self.threads:
            thread.finish()


class _TrackerThread(threading.Thread):
    """Feeds one tracker. Whatever it raises, and if it hangs for ever, the run does not notice."""

    def __init__(self, create: Callable[[Path, int], Tracker], run_dir: Path, step: int):
        super().__init__(daemon=True, name=f"tracker-{create.__name__}")
        self.create, self.arguments = create, (run_dir, step)
        self.rows: queue.Queue = queue.Queue(maxsize=1000)
        self.start()

    def run(self) -> None:
        finished = False
        try:
            tracker = self.create(*self.arguments)
            while (row := self.rows.get()) is not None:
                tracker.log(*row)
            tracker.close()
            finished = True
        finally:
            if not finished:
                logger.warning("%s failed (the reason follows); metrics.jsonl goes on", self.name)

    def send(self, row: tuple | None) -> None:
        if self.is_alive():
            try:
                self.rows.put_nowait(row)
            except queue.Full:
                logger.warning("%s does not keep up; a row was dropped", self.name)

    def finish(self) -> None:
        self.send(None)
        self.join(SECONDS_TO_FINISH)
        if self.is_alive():
            logger.warning("%s hangs; leaving without it", self.name)


def check_trackers(names):
    pass


def read_rows(run_dir):
    path = run_dir / "metrics.jsonl"
    lines = path.read_text(errors="replace").splitlines() if path.exists() else []
    return [json.loads(x) for x in lines if _step_of(x) < float("inf")]


def _step_of(line: str) -> float:
    try:
        return float(json.loads(line)["step"])
    except (ValueError, TypeError, KeyError):
        return float("inf")  # torn by a kill in the middle of a write


def resident_memory_gib() -> float:
    """Resident memory of this process."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE") / 2**30
