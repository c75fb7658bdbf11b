"""What the ranks and their workers read together is the order's stream, whatever their number."""

from __future__ import annotations

import itertools
import random

import pytest
import torch
from torch.utils.data import Dataset

from backlot.samples import BlockShuffle, DataOrder, Order, SampleKey, WeightedMixture
from trainers.common.loader import StreamSampler, create_loader


def take(order: Order, batch_size: int, start: int, processes: int, micro_batches: int) -> list[SampleKey]:
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


@pytest.mark.parametrize(
    "create", [lambda: WeightedMixture([7, 30, 4], [1, 2, 5], 3, block=16), lambda: BlockShuffle([5, 9, 2, 8], 3, 2)]
)
def test_any_order_is_shared_out_without_gaps(create):
    consumed, seen = 0, []
    for processes, batch_size in ((4, 3), (1, 5), (3, 2)):
        seen += take(create(), batch_size, consumed, processes, 7)
        consumed += processes * batch_size * 7
    assert seen == create().keys(0, consumed)


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
