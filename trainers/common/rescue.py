"""What is saved when a run ends by an error that is not its own: the last update, if its state is sound."""

from __future__ import annotations

import logging
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Protocol

import torch
from safetensors import SafetensorError

from backlot.command_line import EXIT_CRASH, EXIT_RESUME
from trainers.common.loader import abandon_workers
from trainers.common.processes import Processes
from trainers.common.run_dir import RunFolder
from trainers.common.signals import StopRequested, StopSignal

logger = logging.getLogger(__name__)


class Savable(Protocol):
    """What a rescue needs of a `TrainingRun`."""

    step: int
    is_sharded: bool
    stop: StopSignal
    processes: Processes
    folder: RunFolder

    def end_saving(self) -> None: ...

    def save_alone(self) -> None: ...


class Rescue:
    """Around everything that may fail between two updates: `with run.rescue: ...`.

    One bad sample, a full disk, an exhausted memory end a run, with their own error and exit code; but first the last
    complete update is written, by the main process alone, because the others may be anywhere.
    """

    def __init__(self, run: Savable):
        self.run = run
        self._is_sound = True

    def __enter__(self) -> None:
        return None

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _) -> None:
        if kind is None or issubclass(kind, SystemExit | GeneratorExit | StopRequested | KeyboardInterrupt):
            return
        why = f"{kind.__name__}: {error}"
        fails_together = issubclass(kind, RuntimeError) and not issubclass(kind, torch.OutOfMemoryError)
        if fails_together and self.run.stop.requested and self.run.processes.count > 1:
            self.leave_alone(why)  # another process has left, and this one's call to it failed
        self.run.folder.write_exit(EXIT_CRASH)
        self._save(why)

    @contextmanager
    def unsound(self) -> Iterator[None]:
        """Inside, weights, moments and averages are not of one update."""
        self._is_sound = False
        yield
        self._is_sound = True

    def leave_alone(self, why: str) -> None:
        """Save what this process can save by itself, and end it with exit code 75; 1 if that failed."""
        code = EXIT_RESUME if self._save(why) else EXIT_CRASH
        self.run.folder.write_exit(code)
        abandon_workers()
        sys.stderr.flush()
        os._exit(code)  # not SystemExit: taking a process group apart waits for the others

    def _save(self, why: str) -> bool:
        """False if what this process should save could not be saved."""
        run = self.run
        # what ends the run is said by its own error; these are only logged
        errors = (OSError, ValueError, RuntimeError, SafetensorError)
        try:
            run.end_saving()  # a share that others wait for, too
        except errors as error:
            logger.error("the save under way failed: %s", error)
        if not run.processes.is_main or run.is_sharded:
            return True
        try:
            if self._is_sound and run.step > 0:
                run.save_alone()
                logger.error("%s; checkpoint-%d is written", why, run.step)
        except errors as error:
            logger.error("%s; checkpoint-%d is not written: %s", why, run.step, error)
            return False
        return True
