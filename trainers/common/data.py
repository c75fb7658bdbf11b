"""Data order as arithmetic: a global position decides the sample, so the state of the data is one integer."""

from __future__ import annotations

import multiprocessing
import signal
from collections.abc import Iterator

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset, Sampler


def derive_seed(*parts: int) -> int:
    """One 63-bit seed from several integers; different parts give unrelated seeds."""
    # The count and a fixed width for each: a bare SeedSequence does not tell (1, 2) from (1, 2, 0).
    words = np.array([len(parts), *parts], np.uint64).view(np.uint32)
    return int(np.random.SeedSequence(words).generate_state(1, np.uint64)[0] >> np.uint64(1))


class SampleKey(int):
    """The index of a sample, which also knows the seed of its augmentation in this epoch.

    A dataset without randomness uses it as the integer it is; one that augments draws from `key.generator()` only,
    and is then independent of workers, batches and interruptions.
    """

    def __new__(cls, index: int, epoch: int = 0, seed: int = 0):
        key = super().__new__(cls, index)
        key.epoch, key.seed = epoch, seed
        return key

    def __getnewargs__(self) -> tuple[int, int, int]:
        return int(self), self.epoch, self.seed

    def generator(self) -> torch.Generator:
        """A fresh CPU generator, seeded from (seed, epoch, index)."""
        return torch.Generator().manual_seed(derive_seed(self.seed, self.epoch, int(self)))


class DataOrder:
    """Position p is item `permutation(seed, epoch)[p % N]` of epoch `p // N`."""

    def __init__(self, num_samples: int, seed: int):
        if num_samples < 1:
            raise ValueError("the dataset is empty")
        self.num_samples, self.seed = num_samples, seed
        self._epoch, self._permutation = -1, np.empty(0, np.int64)

    def keys(self, start: int, count: int) -> list[SampleKey]:
        """The samples at positions start ... start + count - 1, across epochs."""
        keys = []
        for position in range(start, start + count):
            epoch, offset = divmod(position, self.num_samples)
            if epoch != self._epoch:
                generator = torch.Generator().manual_seed(derive_seed(self.seed, epoch))
                self._epoch, self._permutation = epoch, torch.randperm(self.num_samples, generator=generator).numpy()
            keys.append(SampleKey(self._permutation[offset], epoch, self.seed))
        return keys


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
