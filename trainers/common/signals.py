"""Being asked to stop: SIGTERM, SIGUSR1 (a scheduler's warning), the first Ctrl-C, and a launcher that has gone."""

from __future__ import annotations

import ctypes
import os
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
import torch.distributed as dist

from backlot.command_line import EXIT_RESUME, leave
from trainers.common.processes import Processes

PR_SET_PDEATHSIG = 1
GRACE = 5.0
"""Seconds that a wait for data may still take when several processes are asked to stop; launchers kill after 30."""
LAUNCHERS = ("accelerate", "torchrun", "torch.distributed.run", "torch/distributed/run.py", "deepspeed")
ADOPTERS = ("systemd", "init", "tini", "docker-init", "dumb-init", "catatonit", "slurmstepd", "conmon")
"""Programs that become the parent of what a dead one leaves behind, besides process 1."""


class StopRequested(BaseException):
    """Raised by the signal handler where waiting would only lose time: in a data wait, in validation."""


def follow_launcher() -> None:
    """Ask the kernel for SIGTERM when the launcher ends: `accelerate launch` does not pass its own signals on.

    Without a launcher (a script started from a shell) nothing changes: that shell may well end before the run.
    """
    if "ACCELERATE_MIXED_PRECISION" not in os.environ and "TORCHELASTIC_RUN_ID" not in os.environ:
        return
    parent = os.getppid()
    if any(name in _about(parent, "cmdline") for name in LAUNCHERS):
        ctypes.CDLL(None, use_errno=True).prctl(PR_SET_PDEATHSIG, signal.SIGTERM)
        has_gone = os.getppid() != parent  # before the kernel was asked
    else:
        has_gone = parent == 1 or _about(parent, "comm").strip() in ADOPTERS
    if has_gone:
        raise leave(EXIT_RESUME, "the launcher has ended; nothing was begun")


def _about(pid: int, what: str) -> str:
    try:
        return Path(f"/proc/{pid}/{what}").read_bytes().decode(errors="replace")
    except OSError:
        return ""


class StopSignal:
    """Notices the signals from the moment it is made. Processes agree through `agreed`, so that all save together."""

    def __init__(self, processes: Processes):
        self.requested = False
        self.group = processes.group  # votes travel on the CPU: agreeing costs the accelerator nothing
        self._grace: float | None = None
        self._vote: tuple[dist.Work, torch.Tensor] | None = None
        for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT):
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
