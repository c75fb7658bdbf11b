"""What the ranks and their workers read together is the order's stream, whatever their number."""

from __future__ import annotations

import itertools
import os
import random
import re
import subprocess
import sys

import pytest
import torch
from runs import ROOT
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


# ---- what must not hang ----

SMALL = """
import itertools, os, resource, sys, time, torch
from backlot.samples import DataOrder
from trainers.common.loader import StreamSampler, create_loader

class Samples(torch.utils.data.Dataset):
    room = None  # files that a worker may still open
    sent = 0  # samples before that
    bad = None

    def __len__(self):
        return 8

    def __getitem__(self, key):
        self.sent -= 1
        if self.room is not None and self.sent < 0:
            time.sleep(0.3)  # until what was handed over is on its way
            limit = max(map(int, os.listdir("/proc/self/fd"))) + 1 + self.room
            resource.setrlimit(resource.RLIMIT_NOFILE, (limit, limit))
            opened = []
            try:
                while True:
                    opened.append(os.open("/dev/null", os.O_RDONLY))
            except OSError:
                for descriptor in opened[len(opened) - self.room:]:
                    os.close(descriptor)
            self.room = None
        if key == self.bad:
            raise ValueError("bad sample")
        return torch.zeros(3), torch.zeros(2), torch.ones(4)

def load(samples):
    return iter(create_loader(samples, StreamSampler(DataOrder(8, 0), 2), 2, False))
"""


def run_small(program: str) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, "-c", SMALL + program],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )


def test_a_worker_that_runs_out_of_files_ends_the_trainer_and_says_so():
    """Whichever descriptor is the one too many: reading, sharing memory, sending the batch, giving the memory out."""
    program = """
for room in [0, 3, 4, 5, 6, 8, 16]:
    if os.fork():  # a trainer of its own each time, without the seconds that importing takes
        os.wait()
        continue
    samples = Samples()
    samples.room = room
    try:
        for batch in itertools.islice(load(samples), 12):
            pass
        print(room, "fine", flush=True)
    except (OSError, EOFError, RuntimeError) as error:
        print(room, "failed", repr(error.args)[-200:], flush=True)
    sys.exit()
"""
    result = run_small(program)
    lines = result.stdout.splitlines()
    assert result.returncode == 0, result.stderr[-2000:]
    assert [int(line.split()[0]) for line in lines] == [0, 3, 4, 5, 6, 8, 16]
    assert lines[0].startswith("0 failed")
    assert lines[-1] == "16 fine"
    named = [line for line in lines if "a loader process could not hand over a batch" in line]
    assert len(named) >= 2
    assert all(re.search(r"Too many open files \(the limit is \d+: ulimit -n\)", line) for line in named)
    # a cause that the trainer cannot see is told by the worker
    unnamed = [line for line in lines if "failed" in line and "open files" not in line]
    assert result.stderr.count("could not hand over a batch: [Errno 24] Too many open files") >= len(unnamed)


def test_a_worker_that_cannot_give_out_the_memory_of_a_batch_ends_the_trainer():
    """The batch was sent; the trainer comes for its memory when no connection can be accepted any more."""
    program = """
samples = Samples()
samples.room, samples.sent = 0, 2
stream = load(samples)
time.sleep(2)
next(stream)
"""
    result = run_small(program)
    assert result.returncode == 1
    assert result.stderr.count("a loader process could not hand over a batch: [Errno 24] Too many open files") in (1, 2)


@pytest.mark.parametrize(
    ("program", "message"),
    [
        ("samples = Samples(); samples.bad = 3\nstream = load(samples)\nfor batch in stream: pass", "bad sample"),
        ("stream = load(Samples())\nnext(stream)\nraise ValueError('in the trainer')", "in the trainer"),
    ],
)
def test_an_error_ends_a_process_with_workers(program, message):
    result = run_small(program)
    assert result.returncode == 1
    assert f"ValueError: {message}" in result.stderr


def test_a_loader_may_have_as_many_files_as_its_user_may():
    program = """
hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
resource.setrlimit(resource.RLIMIT_NOFILE, (64, hard))
load(Samples())
print(resource.getrlimit(resource.RLIMIT_NOFILE) == (min(hard, 2**16), hard))
resource.setrlimit(resource.RLIMIT_NOFILE, (64, 96))
load(Samples())
print(resource.getrlimit(resource.RLIMIT_NOFILE) == (96, 96))
"""
    assert run_small(program).stdout.split() == ["True", "True"]
