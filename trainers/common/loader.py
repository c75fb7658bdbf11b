"""Data order as arithmetic: a global position decides the sample, so the state of the data is one integer."""

from __future__ import annotations

import multiprocessing
import signal
from collections.abc import Iterator

import torch
from torch.utils.data import DataLoader, Dataset, Sampler

from backlot.samples import DataOrder, SampleKey


class StreamSampler(Sampler[list[SampleKey]]):
    """This rank's micro-batches from a position on, without end.

    The processes take turns: micro-batch m of rank r starts at `start + (m * num_processes + r) * batch_size`.
    """

    def __init__(self, order: DataOrder, batch_size: int, start: int = 0, rank: int = 0, num_processes: int = 1):
        self.order, self.batch_size, self.start = order, batch_size, start
        self.rank, self.num_processes = rank, num_processes

    def __iter__(self) -> Iterator[list[SampleKey]]:
        position = self.start + self.rank * self.batch_size
        while True:
            yield self.order.keys(position, self.batch_size)
            position += self.batch_size * self.num_processes


def create_loader(dataset: Dataset, sampler: StreamSampler, num_workers: int, pin_memory: bool) -> DataLoader:
    """A loader over this rank's stream. It never goes through `accelerator.prepare`: the sampler already shares out."""
    return DataLoader(
        dataset,
        batch_sampler=sampler,
        num_workers=num_workers,
        pin_memory=pin_memory,
        worker_init_fn=_leave_signals_to_the_trainer,
        generator=torch.Generator(),  # else making an iterator would draw from the global one
    )


def abandon_workers() -> None:
    """End the loader's processes at once, just before this one: a dataset that hangs would keep it from ending."""
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)  # torch would report their end as an error
    for worker in multiprocessing.active_children():
        worker.kill()  # they ignore the SIGTERM of Python's own clean-up, and it would wait for them


def _leave_signals_to_the_trainer(worker: int) -> None:
    # A scheduler signals the whole process group; the loader has to go on until the trainer has saved.
    for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT):
        signal.signal(number, signal.SIG_IGN)
