"""Which sample comes when, as arithmetic: a position decides the sample, and (seed, epoch, index) its augmentation."""

from __future__ import annotations

import hashlib
import os

import numpy as np
import torch

VALIDATION_PERCENT = 5


def is_validation(relative_path: str) -> bool:
    digest = hashlib.sha256(os.fsencode(relative_path)).digest()
    return int.from_bytes(digest[:8], "big") % 100 < VALIDATION_PERCENT


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
