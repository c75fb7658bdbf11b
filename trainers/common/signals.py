"""Being asked to stop: SIGTERM, SIGUSR1 (a scheduler's warning) and the first Ctrl-C."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from contextlib import contextmanager

import torch
import torch.distributed as dist

EXIT_RESUME = 75  # EX_TEMPFAIL: a checkpoint is written, start the same command again


class StopRequested(BaseException):
    """Raised by the signal handler where waiting would only lose time: in a data wait, in validation."""


class StopSignal:
    """Notices the signals from the moment it is made. Processes agree through `agreed`, so that all save together."""

    def __init__(self, num_processes: int):
        self.requested = False
        self.num_processes = num_processes
        self._interruptible = False
        # Votes travel on the CPU: agreeing costs the accelerator nothing.
        self._group = dist.new_group(backend="gloo") if num_processes > 1 else None
        self._vote: tuple[dist.Work, torch.Tensor] | None = None
        for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT):
            signal.signal(number, self._handle)

    def _handle(self, number: int, frame) -> None:
        if number == signal.SIGINT and self.requested:
            raise KeyboardInterrupt  # a second Ctrl-C leaves at once
        self.requested = True
        if self._interruptible:
            self._interruptible = False
            raise StopRequested

    @contextmanager
    def interruptible(self) -> Iterator[None]:
        """Inside, a signal raises `StopRequested` at once (at entry, if it came before)."""
        self._interruptible = True
        try:
            if self.requested:
                raise StopRequested
            yield
        finally:
            self._interruptible = False

    def agreed(self) -> bool:
        """Whether any process was asked to stop. Call it on every process, once per update.

        With several processes the answer is that of the call before: its vote travelled during the update.
        """
        if self._group is None:
            return self.requested
        answer = False
        if self._vote is not None:
            work, flag = self._vote
            work.wait()
            answer = bool(flag)
        flag = torch.tensor(int(self.requested))
        self._vote = dist.all_reduce(flag, dist.ReduceOp.MAX, self._group, async_op=True), flag
        return answer

    def release(self) -> None:
        """Give the signals back and let the vote under way end, so that no process waits for another's."""
        if self._vote is not None:
            self._vote[0].wait()
            self._vote = None
        for number in (signal.SIGTERM, signal.SIGUSR1):
            signal.signal(number, signal.SIG_DFL)
        signal.signal(signal.SIGINT, signal.default_int_handler)
