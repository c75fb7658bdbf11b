"""Being asked to stop: SIGTERM, SIGUSR1 (a scheduler's warning), the first Ctrl-C, and a launcher that has gone."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from contextlib import contextmanager

import torch
import torch.distributed as dist

from trainers.common import startup
from trainers.common.processes import Processes

GRACE = 5.0
"""Seconds that a wait for data may still take when several processes are asked to stop; launchers kill after 30."""


class StopRequested(BaseException):
    """Raised by the signal handler where waiting would only lose time: in a data wait, in validation."""


class StopSignal:
    """Notices the signals from the moment it is made. Processes agree through `agreed`, so that all save together."""

    def __init__(self, processes: Processes):
        self.requested, startup.asked_to_stop = startup.asked_to_stop, False
        self.group = processes.group  # votes travel on the CPU: agreeing costs the accelerator nothing
        self._grace: float | None = None
        self._vote: tuple[dist.Work, torch.Tensor] | None = None
        for number in startup.SIGNALS:
            signal.signal(number, self._handle)

    def _handle(self, number: int, frame) -> None:
        if number == signal.SIGINT and self.requested:
            raise KeyboardInterrupt  # a second Ctrl-C leaves at once
        self.requested = True
        self._interrupt()

    def _interrupt(self) -> None:
        grace, self._grace = self._grace, None
        if grace == 0:
            raise StopRequested
        if grace is not None:
            signal.signal(signal.SIGALRM, self._give_up)
            signal.setitimer(signal.ITIMER_REAL, grace)

    def _give_up(self, number: int, frame) -> None:
        raise StopRequested

    @contextmanager
    def interruptible(self, grace: float = 0.0) -> Iterator[None]:
        """Inside, a signal raises `StopRequested` after `grace` seconds (from entry, if it came before)."""
        self._grace = grace
        try:
            if self.requested:
                self._interrupt()
            yield
        finally:
            self._grace = None
            signal.setitimer(signal.ITIMER_REAL, 0)

    def agreed(self) -> bool:
        """Whether any process was asked to stop. Call it on every process, once per update.

        With several processes the answer is that of the call before: its vote travelled during the update.
        """
        if self.group is None:
            return self.requested
        answer = False
        if self._vote is not None:
            work, flag = self._vote
            work.wait()
            answer = bool(flag)
        flag = torch.tensor(int(self.requested))
        self._vote = dist.all_reduce(flag, dist.ReduceOp.MAX, self.group, async_op=True), flag
        return answer

    def release(self) -> None:
        """Give the signals back and let the vote under way end, so that no process waits for another's."""
        if self._vote is not None:
            self._vote[0].wait()
            self._vote = None
        for number in (signal.SIGTERM, signal.SIGUSR1):
            signal.signal(number, signal.SIG_DFL)
        signal.signal(signal.SIGINT, signal.default_int_handler)
