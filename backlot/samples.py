"""Which sample comes when, as arithmetic: a position decides the sample, and (seed, epoch, index) its augmentation."""

from __future__ import annotations

import hashlib
import math
import os
from collections.abc import Sequence
from fractions import Fraction
from typing import Protocol

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

    def __sub__(self, origin: int) -> SampleKey:
        """The same sample counted from `origin`: what torch's ConcatDataset hands to one of its parts."""
        return SampleKey(int(self) - int(origin), self.epoch, self.seed)

    def generator(self) -> torch.Generator:
        """A fresh CPU generator, seeded from (seed, epoch, index)."""
        return torch.Generator().manual_seed(derive_seed(self.seed, self.epoch, int(self)))


class Order(Protocol):
    """Which sample comes at which position, for ever; its whole state is the position.

    Attributes:
        num_samples: positions of one epoch.
        seed: what the order and the augmentation of its samples are functions of.
    """

    num_samples: int
    seed: int

    def keys(self, start: int, count: int) -> list[SampleKey]:
        """The samples at positions start ... start + count - 1, across epochs."""
        ...


class DataOrder:
    """One shuffled set: position p is item `permutation(seed, epoch)[p % N]` of epoch `p // N`.

    Raises:
        ValueError: the set is empty.
    """

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
                self._epoch, self._permutation = epoch, _permutation(self.num_samples, self.seed, epoch)
            keys.append(SampleKey(self._permutation[offset], epoch, self.seed))
        return keys


class WeightedMixture:
    """Several sets in fixed shares; the samples are those of their ConcatDataset.

    Every `block` positions hold each source exactly as often as its share says (rounded by largest remainder), arranged
    by a permutation of (seed, block). Each source is walked through in shuffled epochs of its own: what the mixture
    takes of it is its `DataOrder` in order, and a key has the epoch and the seed of its source.

    Args:
        sizes: samples of each source; one epoch of the mixture has as many as those of positive weight together.
        weights: at least 0, in any unit; a source of weight 0 is left out.
        block: positions after which the shares are met.

    Raises:
        ValueError: sizes and weights do not fit, or a weight is too small to get a place in a block.
    """

    def __init__(self, sizes: Sequence[int], weights: Sequence[float], seed: int, block: int = 1000):
        if len(sizes) != len(weights):
            raise ValueError(f"{len(sizes)} sizes, but {len(weights)} weights")
        if any(not math.isfinite(weight) or weight < 0 for weight in weights) or not any(weights):
            raise ValueError(f"weights must be finite, at least 0 and not all 0, got {list(weights)}")
        for source, (size, weight) in enumerate(zip(sizes, weights, strict=True)):
            if size < 1 and weight:
                raise ValueError(f"source {source} is empty, but has weight {weight:g}")
        self.seed, self.block = seed, block
        self.num_samples = sum(size for size, weight in zip(sizes, weights, strict=True) if weight)
        self.counts = _apportion(weights, block)
        self._own_seed = derive_seed(seed)
        self._offsets = [sum(sizes[:source]) for source in range(len(sizes))]
        self._orders = {
            source: DataOrder(sizes[source], derive_seed(self._own_seed, source))
            for source, count in enumerate(self.counts)
            if count
        }
        self._current, self._arrangement, self._ranks = -1, np.empty(0, np.int64), np.empty(0, np.int64)

    def keys(self, start: int, count: int) -> list[SampleKey]:
        """The samples at positions start ... start + count - 1, across epochs."""
        keys = []
        for position in range(start, start + count):
            block, place = divmod(position, self.block)
            if block != self._current:
                self._arrange(block)
            source = int(self._arrangement[place])
            [key] = self._orders[source].keys(block * self.counts[source] + int(self._ranks[place]), 1)
            keys.append(SampleKey(self._offsets[source] + key, key.epoch, key.seed))
        return keys

    def _arrange(self, block: int) -> None:
        """Which source each place of the block belongs to, and how many of that source come before it there."""
        sources = np.repeat(np.arange(len(self.counts)), self.counts)
        self._arrangement = sources[_permutation(self.block, self._own_seed, 0, block)]
        firsts = np.cumsum([0, *self.counts[:-1]])
        self._ranks = np.empty(self.block, np.int64)
        self._ranks[np.argsort(self._arrangement, kind="stable")] = np.arange(self.block) - firsts[sources]
        self._current = block


class BlockShuffle:
    """Samples of shards (tar files), shuffled so that reading stays local.

    In each epoch the shards come in a permuted order, and samples are shuffled within windows of consecutive ones:
    `shards_in_window` files are read at a time, and each is read in one stretch.

    Args:
        shard_sizes: samples of each shard; indices count through the shards as they are given here.
        shards_in_window: at least 1; with all of them the order is as random as that of one set.

    Raises:
        ValueError: there is no sample, or no shard in a window.
    """

    def __init__(self, shard_sizes: Sequence[int], seed: int, shards_in_window: int):
        if shards_in_window < 1:
            raise ValueError(f"a window must have at least 1 shard, got {shards_in_window}")
        self._sizes = np.array(shard_sizes, np.int64)
        if (self._sizes < 0).any():
            raise ValueError("a shard cannot have fewer than 0 samples")
        self._firsts = np.cumsum(self._sizes) - self._sizes
        self.num_samples, self.seed, self.shards_in_window = int(self._sizes.sum()), seed, shards_in_window
        if self.num_samples < 1:
            raise ValueError("the dataset is empty")
        self._own_seed = derive_seed(seed)
        self._epoch, self._window = -1, -1
        self._shards = self._window_ends = self._items = np.empty(0, np.int64)

    def keys(self, start: int, count: int) -> list[SampleKey]:
        """The samples at positions start ... start + count - 1, across epochs."""
        keys = []
        for position in range(start, start + count):
            epoch, offset = divmod(position, self.num_samples)
            if epoch != self._epoch:
                self._open_epoch(epoch)
            window = int(np.searchsorted(self._window_ends, offset, side="right"))
            if window != self._window:
                self._open_window(window)
            # counted from the window's end, where its last item lies
            keys.append(SampleKey(self._items[offset - self._window_ends[window]], epoch, self.seed))
        return keys

    def _open_epoch(self, epoch: int) -> None:
        self._epoch, self._window = epoch, -1
        self._shards = _permutation(len(self._sizes), self._own_seed, epoch)
        ends = np.cumsum(self._sizes[self._shards])
        lasts = np.arange(self.shards_in_window, len(ends) + self.shards_in_window, self.shards_in_window) - 1
        self._window_ends = ends[np.minimum(lasts, len(ends) - 1)]

    def _open_window(self, window: int) -> None:
        first = window * self.shards_in_window
        shards = self._shards[first : first + self.shards_in_window]
        items = np.concatenate([np.arange(self._sizes[shard]) + self._firsts[shard] for shard in shards])
        self._items = items[_permutation(len(items), self._own_seed, self._epoch, window)]
        self._window = window


def _permutation(length: int, *parts: int) -> np.ndarray:
    """The permutation of 0 ... length - 1 that belongs to some integers."""
    return torch.randperm(length, generator=torch.Generator().manual_seed(derive_seed(*parts))).numpy()


def _apportion(weights: Sequence[float], places: int) -> list[int]:
    """Whole places in the ratio of the weights, by largest remainder; in exact arithmetic, so the same everywhere."""
    shares = [Fraction(weight) for weight in weights]
    quotas = [places * share / sum(shares) for share in shares]
    counts = [math.floor(quota) for quota in quotas]
    by_remainder = sorted(range(len(quotas)), key=lambda source: counts[source] - quotas[source])
    for source in by_remainder[: places - sum(counts)]:
        counts[source] += 1
    for source, (share, count) in enumerate(zip(shares, counts, strict=True)):
        if share and count < 1:
            needed = math.ceil(sum(shares) / share)
            raise ValueError(
                f"weight {weights[source]:g} of source {source} gets no place in a block of {places}: "
                f"a block of {needed} has one"
            )
    return counts
