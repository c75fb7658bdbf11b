"""The first lines of every script, before torch: signals are noticed from here on, and the configuration is read."""

from __future__ import annotations

import ctypes
import os
import signal
from pathlib import Path
from typing import TypeVar

from backlot import config as configuration
from backlot.command_line import EXIT_RESUME, leave
from trainers.common.config import RunConfig

SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)
PR_SET_PDEATHSIG = 1
LAUNCHERS = ("accelerate", "torchrun", "torch.distributed.run", "torch/distributed/run.py", "deepspeed")
ADOPTERS = ("systemd", "init", "tini", "docker-init", "dumb-init", "catatonit", "slurmstepd", "conmon")
"""Programs that become the parent of what a dead one leaves behind, besides process 1."""
ConfigT = TypeVar("ConfigT", bound=RunConfig)
asked_to_stop = False
"""Whether a signal came before the run could answer it."""


def load_config(config_class: type[ConfigT], argv: list[str] | None = None) -> ConfigT:
    """`backlot.config.load_config`, with signals remembered from now on: the run answers them at its first update.

    A container's first process would otherwise not even end: the kernel keeps a signal from it that nobody handles.
    """
    config = configuration.load_config(config_class, argv)
    global asked_to_stop
    asked_to_stop = False
    for number in SIGNALS:
        signal.signal(number, _remember)
    follow_launcher()
    return config


def _remember(number: int, frame) -> None:
    global asked_to_stop
    if number == signal.SIGINT and asked_to_stop:
        raise KeyboardInterrupt  # a second Ctrl-C leaves at once
    asked_to_stop = True


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
