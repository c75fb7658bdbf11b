"""Orders of samples are arithmetic: whatever is asked, and from wherever, the stream is the same one."""

from __future__ import annotations

import itertools
import pickle
import random
import time
from collections import Counter

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.data import ConcatDataset, Dataset

from backlot.samples import BlockShuffle, DataOrder, Order, SampleKey, WeightedMixture, derive_seed

FAR = 10**12
SIZES = st.lists(st.integers(1, 40), min_size=1, max_size=5)
SEEDS = st.integers(0, 2**63 - 1)


@st.composite
def mixtures(draw) -> WeightedMixture:
    sizes = draw(SIZES)
    weights = draw(st.lists(st.integers(1, 9), min_size=len(sizes), max_size=len(sizes)))
    return WeightedMixture(sizes, weights, draw(SEEDS), block=draw(st.integers(sum(weights), 80)))


@st.composite
def block_shuffles(draw) -> BlockShuffle:
    sizes = draw(st.lists(st.integers(0, 20), min_size=1, max_size=8).filter(any))
    return BlockShuffle(sizes, draw(SEEDS), draw(st.integers(1, 9)))


@st.composite
def data_orders(draw) -> DataOrder:
    return DataOrder(draw(st.integers(1, 60)), draw(SEEDS))


ORDERS = st.one_of(data_orders(), mixtures(), block_shuffles())


def described(keys: list[SampleKey]) -> list[tuple[int, int, int]]:
    return [(int(key), key.epoch, key.seed) for key in keys]


# ---- every order ----


@settings(deadline=None, max_examples=60)
@given(ORDERS, st.one_of(st.integers(0, 300), st.integers(FAR, 2 * FAR)), st.integers(0, 90), st.data())
def test_a_stream_is_the_same_from_wherever_it_is_read(order: Order, start: int, count: int, data):
    whole = described(order.keys(start, count))
    skipped = data.draw(st.integers(0, count))
    order.keys(data.draw(st.integers(0, 500)), 3)  # what was asked before has no say
    assert described(order.keys(start + skipped, count - skipped)) == whole[skipped:]
    assert described(pickle.loads(pickle.dumps(order)).keys(start, count)) == whole


@settings(deadline=None, max_examples=40)
@given(st.one_of(data_orders(), block_shuffles()), st.one_of(st.integers(0, 5), st.integers(FAR, FAR + 5)))
def test_an_epoch_has_every_sample_once(order: Order, epoch: int):
    keys = order.keys(epoch * order.num_samples, order.num_samples)
    assert sorted(keys) == list(range(order.num_samples))
    assert {(key.epoch, key.seed) for key in keys} == {(epoch, order.seed)}


@pytest.mark.parametrize(
    "create",
    [
        lambda seed: DataOrder(100, seed),
        lambda seed: WeightedMixture([50, 50], [1, 1], seed, block=100),
        lambda seed: BlockShuffle([10] * 10, seed, 3),
        lambda seed: BlockShuffle([100], seed, 1),
    ],
)
def test_epochs_and_seeds_have_different_orders(create):
    first = create(0).keys(0, 200)
    assert first[:100] != first[100:]
    assert first[:100] != create(1).keys(0, 100)


@pytest.mark.parametrize(
    "create",
    [
        lambda: DataOrder(10**6, 0),
        lambda: WeightedMixture([10**6, 3000, 7], [0.5, 0.4, 0.1], 0),
        lambda: BlockShuffle([1000] * 1000, 0, 16),
    ],
)
def test_a_million_samples_from_far_away_take_no_time(create):
    create().keys(0, 1)
    started = time.perf_counter()
    create().keys(FAR, 64)
    # measured: 5 to 55 ms, nearly all of it a permutation of a million numbers; a loop over them takes a second
    assert time.perf_counter() - started < 0.25


# ---- one set ----


@pytest.mark.parametrize("case", range(20))
def test_ranks_at_different_speeds_read_the_same_stream(case):
    """An order computes one permutation at a time; jumping between epochs must not disturb it."""
    rng = random.Random(case)
    samples = rng.randint(1, 30)
    order, reference = DataOrder(samples, seed=case), DataOrder(samples, seed=case).keys(0, 6 * samples)
    for _ in range(50):
        start = rng.randrange(5 * samples)
        count = rng.randint(0, samples)
        assert order.keys(start, count) == reference[start : start + count]


def test_an_empty_dataset_is_refused():
    with pytest.raises(ValueError, match="the dataset is empty"):
        DataOrder(0, seed=0)


# ---- keys ----


def test_a_key_is_an_integer_and_survives_pickling():
    key = SampleKey(7, epoch=3, seed=11)
    copy = pickle.loads(pickle.dumps(key))
    assert (copy, copy.epoch, copy.seed) == (7, 3, 11)
    assert list(range(10))[copy] == 7
    assert torch.equal(torch.rand(4, generator=copy.generator()), torch.rand(4, generator=key.generator()))


def test_generators_depend_on_seed_epoch_and_index_and_on_nothing_else():
    draws = {
        (index, epoch, seed): torch.rand(2, generator=SampleKey(index, epoch, seed).generator())
        for index, epoch, seed in itertools.product(range(5), repeat=3)
    }
    assert len({tuple(draw.tolist()) for draw in draws.values()}) == 125
    torch.rand(10)
    assert torch.equal(draws[1, 2, 3], torch.rand(2, generator=SampleKey(1, 2, 3).generator()))


def test_derived_seeds_do_not_collide_and_fit_torch():
    seeds = {derive_seed(*parts) for length in (2, 3, 4) for parts in itertools.product(range(8), repeat=length)}
    assert len(seeds) == 8**2 + 8**3 + 8**4  # (1, 2) and (1, 2, 0) differ too
    assert min(seeds) >= 0
    assert max(seeds) < 2**63
    torch.manual_seed(max(seeds))


class Keys(Dataset):
    """Items are what a part of a larger set is asked for."""

    def __init__(self, size: int):
        self.size = size

    def __len__(self) -> int:
        return self.size

    def __getitem__(self, key: SampleKey) -> tuple[int, int, int, float]:
        return int(key), key.epoch, key.seed, float(torch.rand((), generator=key.generator()))


def test_a_part_of_a_larger_set_gets_the_key_and_not_a_bare_integer():
    order = WeightedMixture([10, 4], [1, 1], seed=2, block=2)
    joined = ConcatDataset([Keys(10), Keys(4)])
    items = [joined[key] for key in order.keys(0, 40)]
    first, second = ([item for item in items if item[2] == seed] for seed in {key.seed for key in order.keys(0, 2)})
    if len({item[0] for item in first}) < len({item[0] for item in second}):
        first, second = second, first
    assert sorted(item[:2] for item in first) == [(index, epoch) for index in range(10) for epoch in (0, 1)]
    assert sorted(item[:2] for item in second) == [(index, epoch) for index in range(4) for epoch in range(5)]
    assert len({item[3] for item in items}) == 40  # no two draws are the same


# ---- mixtures ----


@settings(deadline=None, max_examples=40)
@given(SIZES, st.data(), SEEDS)
def test_each_block_has_exact_shares_and_each_source_its_own_epochs(sizes, data, seed):
    weights = data.draw(st.lists(st.integers(1, 9), min_size=len(sizes), max_size=len(sizes)))
    block = sum(weights) * data.draw(st.integers(1, 3))
    order = WeightedMixture(sizes, weights, seed, block)
    keys = order.keys(0, 4 * block)
    ends = list(itertools.accumulate(sizes))
    sources = [next(source for source, end in enumerate(ends) if key < end) for key in keys]
    expected = {source: weight * block // sum(weights) for source, weight in enumerate(weights)}
    for first in range(0, 4 * block, block):
        assert Counter(sources[first : first + block]) == expected
    for source, size in enumerate(sizes):
        own = [key for key, of in zip(keys, sources, strict=True) if of == source]
        for epoch, first in enumerate(range(0, len(own), size)):
            part = own[first : first + size]
            assert {key.epoch for key in part} == {epoch}
            assert len(set(part)) == len(part)
            assert set(part) <= set(range(ends[source] - size, ends[source]))


def test_shares_are_rounded_by_largest_remainder():
    assert WeightedMixture([5, 5, 5], [1, 1, 1], 0).counts == [334, 333, 333]
    assert WeightedMixture([5, 5, 5], [0.58, 0.29, 0.13], 0, block=10).counts == [6, 3, 1]
    assert WeightedMixture([5, 5], [1e-300, 1e-300], 0, block=2).counts == [1, 1]


def test_the_arrangement_changes_from_block_to_block():
    order = WeightedMixture([1, 1], [1, 1], 0, block=50)
    blocks = [[int(key) for key in order.keys(first, 50)] for first in range(0, 500, 50)]
    assert len({tuple(block) for block in blocks}) == 10
    assert all(block != sorted(block) for block in blocks)


def test_a_source_of_weight_0_is_left_out():
    order = WeightedMixture([3, 0, 4], [1, 0, 3], 0, block=8)
    assert set(order.keys(0, 200)) == set(range(7))
    assert order.num_samples == 7
    order = WeightedMixture([3, 10, 4], [1, 0, 3], 0, block=8)
    assert set(order.keys(0, 200)) == {0, 1, 2, 13, 14, 15, 16}
    assert order.num_samples == 7


@pytest.mark.parametrize(
    ("sizes", "weights", "message"),
    [
        ([3, 0], [1, 1], "source 1 is empty, but has weight 1"),
        ([3], [1, 2], "1 sizes, but 2 weights"),
        ([3, 3], [0, 0], "not all 0"),
        ([3, 3], [2, -1], "at least 0"),
        ([3, 3], [2, float("nan")], "finite"),
        ([3, 3], [2, float("inf")], "finite"),
        ([], [], "not all 0"),
        ([3, 3], [1, 1e-4], "weight 0.0001 of source 1 gets no place in a block of 1000: a block of 10001 has one"),
    ],
)
def test_mixtures_that_cannot_be_made_are_refused(sizes, weights, message):
    with pytest.raises(ValueError, match=message):
        WeightedMixture(sizes, weights, seed=0)


def test_a_block_without_places_is_refused():
    with pytest.raises(ValueError, match="no place in a block of 0: a block of 2 has one"):
        WeightedMixture([3, 3], [1, 1], seed=0, block=0)


def test_the_block_that_a_refusal_names_is_large_enough():
    assert WeightedMixture([3, 3], [1, 1e-4], 0, block=10001).counts == [10000, 1]


# ---- shards ----


@settings(deadline=None, max_examples=40)
@given(st.lists(st.integers(0, 12), min_size=1, max_size=9).filter(any), st.integers(1, 10), SEEDS)
def test_reading_stays_within_a_window_of_shards(sizes, shards_in_window, seed):
    order = BlockShuffle(sizes, seed, shards_in_window)
    shard_of = [shard for shard, size in enumerate(sizes) for _ in range(size)]
    for epoch in range(3):
        shards = [shard_of[key] for key in order.keys(epoch * order.num_samples, order.num_samples)]
        stretches = {shard: (shards.index(shard), len(shards) - 1 - shards[::-1].index(shard)) for shard in set(shards)}
        for position in range(len(shards)):
            opened = [shard for shard, (first, last) in stretches.items() if first <= position <= last]
            assert len(opened) <= shards_in_window


def test_windows_are_mixed_and_made_of_other_shards_in_each_epoch():
    order = BlockShuffle([100] * 20, 0, 4)
    epochs = [[key // 100 for key in order.keys(epoch * 2000, 2000)] for epoch in range(3)]
    windows = [[frozenset(shards[first : first + 400]) for first in range(0, 2000, 400)] for shards in epochs]
    assert all(len(window) == 4 for each in windows for window in each)
    assert len({frozenset(each) for each in windows}) == 3
    places = [[key % 100 for key in order.keys(first, 400)] for first in range(0, 2000, 400)]
    assert sum(a == b for a, b in zip(places[0], places[1], strict=True)) < 40  # each is shuffled in its own way
    # neighbours are of one shard as often as chance has it, one time in four
    same = sum(a == b for a, b in itertools.pairwise(epochs[0])) / 2000
    assert 0.2 < same < 0.3


@pytest.mark.parametrize(
    ("sizes", "window", "message"),
    [
        ([], 1, "the dataset is empty"),
        ([0, 0], 1, "the dataset is empty"),
        ([3, -1], 1, "fewer than 0"),
        ([3], 0, "at least 1 shard"),
    ],
)
def test_shards_that_cannot_be_ordered_are_refused(sizes, window, message):
    with pytest.raises(ValueError, match=message):
        BlockShuffle(sizes, 0, window)
