"""The order of the data is arithmetic: with any processes, workers and interruptions, no sample repeats or is lost."""

from __future__ import annotations

import itertools
import pickle
import random

import pytest
import torch
from torch.utils.data import Dataset

from backlot.samples import DataOrder, SampleKey, derive_seed
from trainers.common.loader import StreamSampler, create_loader


def take(order: DataOrder, batch_size: int, start: int, processes: int, micro_batches: int) -> list[SampleKey]:
    """What `processes` ranks see together in their first micro-batches, turn by turn."""
    streams = [iter(StreamSampler(order, batch_size, start, rank, processes)) for rank in range(processes)]
    return [key for _ in range(micro_batches) for stream in streams for key in next(stream)]


@pytest.mark.parametrize("case", range(40))
def test_an_epoch_covers_every_sample_once_over_any_number_of_ranks(case):
    rng = random.Random(case)
    samples, batch_size, processes = rng.randint(1, 50), rng.randint(1, 9), rng.randint(1, 5)
    epochs = 3
    micro_batches = -(-epochs * samples // (batch_size * processes))
    keys = take(DataOrder(samples, seed=case), batch_size, 0, processes, micro_batches)[: epochs * samples]
    for epoch in range(epochs):
        part = keys[epoch * samples : (epoch + 1) * samples]
        assert sorted(part) == list(range(samples))
        assert {key.epoch for key in part} == {epoch}


@pytest.mark.parametrize("case", range(40))
def test_changing_the_number_of_processes_repeats_and_loses_nothing(case):
    rng = random.Random(case)
    samples = rng.randint(5, 200)
    consumed, seen = 0, []
    for processes in (4, 2, 1, 3):
        batch_size, micro_batches = rng.randint(1, 6), rng.randint(1, 7)
        # A new order each time, as after a restart: nothing but the integer is carried over.
        seen += take(DataOrder(samples, seed=case), batch_size, consumed, processes, micro_batches)
        consumed += processes * batch_size * micro_batches
    assert len(seen) == consumed
    assert seen == DataOrder(samples, seed=case).keys(0, consumed)


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


def test_epochs_and_seeds_have_different_orders():
    first = DataOrder(100, seed=0).keys(0, 200)
    assert first[:100] != first[100:]
    assert first[:100] != DataOrder(100, seed=1).keys(0, 100)


def test_an_empty_dataset_is_refused():
    with pytest.raises(ValueError, match="the dataset is empty"):
        DataOrder(0, seed=0)


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


class Noisy(Dataset):
    """Items with their index and a draw from their own generator."""

    def __len__(self) -> int:
        return 10

    def __getitem__(self, key: SampleKey) -> dict[str, torch.Tensor]:
        return {"index": torch.tensor(int(key)), "draw": torch.rand(2, generator=key.generator())}


def test_batches_do_not_depend_on_the_number_of_workers():
    def batches(workers: int) -> list[dict[str, torch.Tensor]]:
        order = DataOrder(10, seed=5)
        loader = create_loader(Noisy(), StreamSampler(order, 4, start=3), workers, pin_memory=False)
        return list(itertools.islice(loader, 6))  # 24 samples: over two epoch boundaries

    for here, there in zip(batches(0), batches(2), strict=True):
        assert torch.equal(here["index"], there["index"])
        assert torch.equal(here["draw"], there["draw"])


@pytest.mark.parametrize("workers", [0, 2])
def test_loading_leaves_the_global_generator_alone(workers):
    torch.manual_seed(0)
    before = torch.get_rng_state()
    loader = create_loader(Noisy(), StreamSampler(DataOrder(10, seed=0), 2), workers, pin_memory=False)
    next(iter(loader))
    assert torch.equal(torch.get_rng_state(), before)
