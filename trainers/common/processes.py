"""What the processes of a run tell one another, on the CPU and with patience."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import TypeVar

import torch
import torch.distributed as dist
from accelerate import Accelerator

PATIENCE = timedelta(days=7)
"""One process may validate or encode for hours while the others wait; NCCL would give up after ten minutes."""
T = TypeVar("T")


class Processes:
    """A group of its own for control: waiting costs the accelerator nothing and never times out in a long validation.

    With one process every call returns at once.
    """

    def __init__(self, accelerator: Accelerator):
        self.count, self.rank = accelerator.num_processes, accelerator.process_index
        self.is_main = self.rank == 0
        self.group = dist.new_group(backend="gloo", timeout=PATIENCE) if self.count > 1 else None

    def wait(self) -> None:
        """Until all processes are here."""
        if self.group is not None:
            dist.barrier(self.group)

    def share(self, value: T) -> T:
        """The main process's value, on all of them."""
        if self.group is None:
            return value
        values = [value]
        dist.broadcast_object_list(values, src=0, group=self.group)
        return values[0]

    def any(self, flag: bool) -> bool:
        """Whether it holds on any process."""
        if self.group is None:
            return flag
        vote = torch.tensor(int(flag))
        dist.all_reduce(vote, dist.ReduceOp.MAX, self.group)
        return bool(vote)

    @contextmanager
    def main_first(self) -> Iterator[None]:
        """Inside, the main process goes first and the others find its work done."""
        if not self.is_main:
            self.wait()
        yield
        if self.is_main:
            self.wait()
