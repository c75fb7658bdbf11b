"""What a run tells the world: metrics.jsonl always, TensorBoard and W&B when they work, never at the run's expense."""

from __future__ import annotations

import importlib.util
import json
import logging
import os
import queue
import secrets
import threading
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

import numpy as np
from PIL import Image

from backlot.files import read_json, write_file, write_json

if TYPE_CHECKING:
    from torch import Tensor

logger = logging.getLogger(__name__)
SECONDS_TO_FINISH = 10.0


class Tracker(Protocol):
    """Somewhere else to send metrics; made, called and closed in a thread of its own."""

    def log(
        self,
        step: int,
        scalars: dict[str, float],
        pictures: dict[str, Image.Image],
        histograms: dict[str, np.ndarray],
    ) -> None: ...

    def close(self) -> None: ...


CreateTracker = Callable[[Path, int, dict], Tracker]


class TensorBoard:
    """Event files in `<run>/tensorboard`; rows after `step`, left by a killed process, are hidden."""

    def __init__(self, run_dir: Path, step: int, hyperparameters: dict):
        from torch.utils.tensorboard import SummaryWriter

        self.writer = SummaryWriter(run_dir / "tensorboard", purge_step=step + 1)
        if hyperparameters:  # add_hparams would make a second run
            written = json.dumps(hyperparameters, indent=2, default=str)
            self.writer.add_text("hyperparameters", f"```json\n{written}\n```", step)

    def log(
        self,
        step: int,
        scalars: dict[str, float],
        pictures: dict[str, Image.Image],
        histograms: dict[str, np.ndarray],
    ) -> None:
        for name, value in scalars.items():
            self.writer.add_scalar(name, value, step)
        for name, picture in pictures.items():
            self.writer.add_image(name, np.asarray(picture.convert("RGB")), step, dataformats="HWC")
        for name, values in histograms.items():
            self.writer.add_histogram(name, values, step)
        self.writer.flush()

    def close(self) -> None:
        self.writer.close()


class WandB:
    """Weights and Biases; project, mode and key come from its own environment variables.

    The identity of the run is drawn at random and kept in `<run>/tracking.json`: a resumed run goes on under it, and no
    other run, whatever its folder is called, has it.
    """

    def __init__(self, run_dir: Path, step: int, hyperparameters: dict):
        import wandb

        self.wandb = wandb
        place = run_dir / "tracking.json"
        if step == 0 or not place.exists():
            write_json(place, {"wandb_run_id": secrets.token_hex(8)})
        self.run = wandb.init(
            dir=run_dir,
            name=run_dir.resolve().name,
            id=read_json(place)["wandb_run_id"],
            resume="allow",
            config=hyperparameters,
            allow_val_change=True,  # a resumed run may have a longer plan
        )

    def log(
        self,
        step: int,
        scalars: dict[str, float],
        pictures: dict[str, Image.Image],
        histograms: dict[str, np.ndarray],
    ) -> None:
        media = {name: self.wandb.Image(picture) for name, picture in pictures.items()}
        media |= {name: self.wandb.Histogram(values) for name, values in histograms.items()}
        self.run.log({**scalars, **media}, step=step)

    def close(self) -> None:
        self.run.finish()


TRACKERS: dict[str, CreateTracker] = {"tensorboard": TensorBoard, "wandb": WandB}
INSTALLED_BY = {"tensorboard": "pip install tensorboard", "wandb": "pip install 'backlot[wandb]'"}


def check_trackers(names: Iterable[str]) -> None:
    """Look whether the packages of these trackers are there, without loading them.

    Raises:
        ValueError: one is not; the message says how to install it.
    """
    for name in names:
        if importlib.util.find_spec(name) is None:
            raise ValueError(f"`report_to` {name}: the package is not installed ({INSTALLED_BY[name]})")


def read_rows(run_dir: Path) -> list[dict]:
    """The rows of metrics.jsonl in their order; what a kill or a full disk has torn is left out."""
    path = run_dir / "metrics.jsonl"
    lines = path.read_text(encoding="utf-8", errors="replace").splitlines() if path.exists() else []
    return [row for row in map(_parse_row, lines) if row is not None]


def _parse_row(line: str) -> dict | None:
    try:
        row = json.loads(line)
    except (ValueError, RecursionError):
        return None  # torn in the middle of a write
    return row if isinstance(row, dict) and isinstance(row.get("step"), int | float) else None


class Tracking:
    """Writes rows of metrics and pictures; only metrics.jsonl and the pictures on disk are in the training's way.

    A disk without room costs no update: rows wait in memory until they can be written, pictures are left out.

    Args:
        run_dir: the run's folder.
        step: updates already done; later rows in metrics.jsonl are leftovers of a killed process and removed.
        trackers: makes each tracker from (run_dir, step, hyperparameters); one that fails is given up with a warning.
        hyperparameters: the run's configuration, for the trackers.
    """

    def __init__(self, run_dir: Path, step: int, trackers: list[CreateTracker], hyperparameters: dict | None = None):
        self.run_dir, self.path = run_dir, run_dir / "metrics.jsonl"
        self._waiting: list[str] = []
        self._warned: set[str] = set()
        self._size = 0
        if self.path.exists():
            kept = "".join(json.dumps(row) + "\n" for row in read_rows(run_dir) if row["step"] <= step).encode()
            if kept != self.path.read_bytes():
                write_file(self.path, kept)
            self._size = len(kept)
        self.threads = [_TrackerThread(tracker, run_dir, step, hyperparameters or {}) for tracker in trackers]

    def log(
        self,
        step: int,
        scalars: dict[str, float],
        pictures: dict[str, Image.Image] | None = None,
        histograms: dict[str, np.ndarray | Tensor] | None = None,
    ) -> None:
        """One row. Pictures go to `samples/<name>-<step>.png` as well.

        Args:
            histograms: name -> 1-D values; trackers get the finite ones, metrics.jsonl none.
        """
        pictures = pictures or {}
        self._waiting.append(json.dumps({"step": step, **scalars}) + "\n")
        self._write_rows()
        for name, picture in pictures.items():
            self._write_picture(self.run_dir / "samples" / f"{name}-{step:06d}.png", picture)
        if self.threads:
            finite = {name: _finite_copy(values) for name, values in (histograms or {}).items()}
            finite = {name: values for name, values in finite.items() if values.size}
            for thread in self.threads:
                thread.send((step, scalars, pictures, finite))

    def close(self) -> None:
        """Let the trackers finish, for a bounded time."""
        if self._waiting and not self._write_rows():
            logger.warning("%d rows of %s were never written", len(self._waiting), self.path)
        for thread in self.threads:
            thread.finish()

    def _write_rows(self) -> bool:
        """Append the rows that wait, behind the last whole one."""
        try:
            with self.path.open("ab") as file:
                if file.tell() > self._size:  # the beginning of a row that found no room
                    file.truncate(self._size)
                file.write("".join(self._waiting).encode())
                file.flush()
                size = os.fstat(file.fileno()).st_size
        except OSError as error:
            self._warn_once("rows of metrics wait in memory until they can be written", error)
            return False
        self._size = size
        self._waiting.clear()
        return True

    def _write_picture(self, path: Path, picture: Image.Image) -> None:
        temporary = path.with_suffix(".tmp")
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            picture.save(temporary, format="PNG")
            temporary.replace(path)
        except OSError as error:
            self._warn_once("pictures that cannot be written are left out", error)

    def _warn_once(self, consequence: str, error: OSError) -> None:
        if consequence not in self._warned:
            self._warned.add(consequence)
            logger.warning("%s: %s", consequence, error)


def _finite_copy(values: np.ndarray | Tensor) -> np.ndarray:
    """On the host, independent of what training does to the original; trackers cannot draw NaN or infinity."""
    import torch

    values = torch.as_tensor(values).detach().flatten().to("cpu", torch.float32)
    return values[torch.isfinite(values)].numpy()  # indexing copies


class _TrackerThread(threading.Thread):
    """Feeds one tracker. Whatever it raises, and if it hangs for ever, the run does not notice."""

    def __init__(self, create: CreateTracker, run_dir: Path, step: int, hyperparameters: dict):
        super().__init__(daemon=True, name=f"tracker-{create.__name__}")
        self.create, self.arguments = create, (run_dir, step, hyperparameters)
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


def resident_memory_gib() -> float:
    """Resident memory of this process."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE") / 2**30
