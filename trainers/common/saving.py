"""Writing checkpoints, in the way of the training or beside it.

What is saved is first copied to host memory; from there a thread writes, hashes and flushes it while the next updates
are made. That memory is kept for the next save. At most one save is under way, and whoever needs it done waits for it
and hears of its error.
"""

from __future__ import annotations

import errno
import json
import logging
import shutil
import threading
import time
from dataclasses import dataclass, field
from pathlib import Path

from safetensors import SafetensorError
from torch import Tensor

from backlot.files import write_file
from trainers.common import checkpoints
from trainers.common.config import TrainingConfig
from trainers.common.processes import Processes
from trainers.common.sharding import local
from trainers.common.state import Rows, snapshot, write

STATE_NAME = "run_state.json"
WORTH_A_THREAD = 64 * 2**20
"""Bytes of state from which on a save beside the training pays."""
PATIENCE = 3600.0
"""Seconds that the main process waits for the shares of the others."""
logger = logging.getLogger(__name__)


@dataclass
class Snapshot:
    """A state in host memory: tensors by part (model, ema, optimizer, ...), and what goes into run_state.json."""

    step: int
    parts: dict[str, dict[str, Rows]]
    state: dict
    kept: set[Path] = field(default_factory=set)
    """Checkpoints that the retention limit does not touch."""

    @property
    def nbytes(self) -> int:
        return sum(piece.nbytes for part in self.parts.values() for piece in part.values())


class Saver:
    """Writes the checkpoints of one run.

    Args:
        run_dir: the run's folder.
        processes: they write together where the network is sharded, else the main one alone.
        sharded: whether each process has a share of its own.
        training: retention, and whether to write beside the training.
    """

    def __init__(self, run_dir: Path, processes: Processes, sharded: bool, training: TrainingConfig):
        self.run_dir, self.processes, self.training = run_dir, processes, training
        self.writers = processes.count if sharded else 1
        self.beside = training.async_checkpoints
        self.saved: set[Path] = set()
        """Written, or verified, by this process: not read again."""
        self._memory: dict[str, dict[str, Tensor]] = {}
        self._under_way: Path | None = None
        self._thread: threading.Thread | None = None
        self._error: BaseException | None = None

    def copy(self, tensors: dict[str, dict[str, Tensor]], alone: bool = False) -> dict[str, dict[str, Rows]]:
        """Host copies of this process's share of each part, for a `Snapshot`; called as `save` is, which comes next.

        Raises:
            OSError: the save before this one failed.
        """
        self.wait()  # it is written from the same memory
        if self.beside is None and not alone:
            nbytes = sum(tensor.nbytes for part in tensors.values() for tensor in local(part.values()))
            self.beside = self.processes.any(nbytes >= WORTH_A_THREAD)
        is_main = self.processes.is_main
        return {
            part: snapshot(named, is_main, self._memory.setdefault(part, {}) if self.beside else None)
            for part, named in tensors.items()
        }

    def save(self, snapshot: Snapshot, alone: bool = False) -> None:
        """Make `checkpoint-<step>` of a snapshot; called by all processes, or by the main one `alone` in an emergency.

        Raises:
            OSError: the disk is full or failing; the message says how much is needed.
        """
        self.wait()
        if self.processes.is_main:
            self._check_space(snapshot)
            checkpoints.begin(self.run_dir, snapshot.step)
        if not alone:
            self.processes.wait()
        if self.beside and not alone:
            self._under_way = self.run_dir / f"checkpoint-{snapshot.step}"
            self._thread = threading.Thread(target=self._write_in_thread, args=(snapshot,), name="checkpoint")
            self._thread.start()
            return
        self._write(snapshot)
        if not alone:
            self.processes.wait()

    def has(self, step: int) -> bool:
        """Whether the checkpoint of a step is written, or on its way."""
        path = self.run_dir / f"checkpoint-{step}"
        return path in self.saved or path == self._under_way

    def wait(self) -> None:
        """Until no save of this process is under way; its error, if it had one, is raised here."""
        if self._thread is not None:
            self._thread.join()
            self._thread = self._under_way = None
        if self._error is not None:
            error, self._error = self._error, None
            raise error

    def _write_in_thread(self, snapshot: Snapshot) -> None:
        failed = True
        try:
            self._write(snapshot)
            failed = False
        except OSError as error:
            self._error = error
        finally:
            if failed and self._error is None:
                self._error = RuntimeError(f"the thread that wrote checkpoint-{snapshot.step} ended with an error")

    def _write(self, snapshot: Snapshot) -> None:
        rank, is_main = self.processes.rank, self.processes.is_main
        if is_main or self.writers > 1:
            self._write_share(snapshot, rank, is_main)
        self.saved.add(self.run_dir / f"checkpoint-{snapshot.step}")
        if is_main:
            training = self.training
            limit, milestones = training.checkpoints_total_limit, training.keep_every_n_steps
            checkpoints.rotate(self.run_dir, limit, milestones, trusted=set(self.saved), kept=snapshot.kept)

    def _write_share(self, snapshot: Snapshot, rank: int, is_main: bool) -> None:
        temporary = self.run_dir / f"checkpoint-{snapshot.step}.tmp"
        try:
            for part, pieces in snapshot.parts.items():
                write(temporary, part, pieces, rank, self.writers)
            if self.writers > 1:
                note = json.dumps({"parts": sorted(snapshot.parts)})  # gone as soon as it is read: never flushed
                write_file(temporary / f"share-{rank}.json", note, durable=False)
            if is_main:
                self._await_shares(temporary)
                (temporary / STATE_NAME).write_text(json.dumps(snapshot.state, indent=1) + "\n", encoding="utf-8")
                checkpoints.commit(temporary)
        except (OSError, SafetensorError) as error:
            raise self._explained(snapshot, error) from error

    def _await_shares(self, temporary: Path) -> None:
        """Until every process has written its share; then its note of that is no longer needed."""
        if self.writers == 1:
            return
        notes = [temporary / f"share-{rank}.json" for rank in range(self.writers)]
        give_up = time.monotonic() + PATIENCE
        while not all(note.exists() for note in notes):
            if time.monotonic() > give_up:
                raise OSError(errno.ETIMEDOUT, f"not all processes wrote their share of {temporary.name}")
            time.sleep(0.01)
        for note in notes:
            note.unlink()

    def _check_space(self, snapshot: Snapshot) -> None:
        needed, free = snapshot.nbytes * self.writers, shutil.disk_usage(self.run_dir).free
        if free < needed:
            raise self._explained(snapshot, OSError(errno.ENOSPC, "no space left"))

    def _explained(self, snapshot: Snapshot, error: Exception) -> OSError:
        needed, free = snapshot.nbytes * self.writers / 2**20, shutil.disk_usage(self.run_dir).free / 2**20
        return OSError(
            getattr(error, "errno", None) or errno.EIO,
            f"checkpoint-{snapshot.step} could not be written to {self.run_dir} ({error}): it needs {needed:.1f} MiB, "
            f"{free:.1f} MiB are free; the checkpoints before it are intact",
        )
