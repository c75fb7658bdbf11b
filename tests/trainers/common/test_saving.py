"""Saves beside the training: each checkpoint holds its own update, from memory that is used again; what is finite."""

from __future__ import annotations

import time

import pytest
import runs
import torch

from trainers.common import checkpoints, saving
from trainers.common.state import all_finite, snapshot


def test_saves_in_quick_succession_hold_their_own_updates(tmp_path, flows, monkeypatch):
    """Written by a thread while the next updates are made, equal to those written in the way of the training."""
    write = saving.write

    def write_slowly(*arguments) -> None:
        time.sleep(0.05)  # the next update is long made
        write(*arguments)

    monkeypatch.setattr(saving, "write", write_slowly)
    for name, beside in (("beside", True), ("in the way", False)):
        settings = {"max_train_steps": 5, "checkpointing_steps": 1, "checkpoints_total_limit": None}
        run = runs.open_run(tmp_path / name, flows, **settings, async_checkpoints=beside)
        runs.train_on(run)
        runs.save_and_close(run)
    for step in range(1, 6):
        one, other = (tmp_path / name / f"checkpoint-{step}" for name in ("beside", "in the way"))
        assert checkpoints.verify(one) == []
        assert runs.differing(runs.tensors_of(one), runs.tensors_of(other)) == [], step


def test_memory_is_used_again_where_it_fits():
    memory: dict[str, torch.Tensor] = {}
    weights = {"a": torch.randn(3, 2).T, "b": torch.ones((), dtype=torch.int64)}
    first = snapshot(weights, True, memory)
    places = {name: piece.tensor.data_ptr() for name, piece in first.items()}
    weights = {"a": torch.randn(2, 3), "b": torch.tensor(7)}
    second = snapshot(weights, True, memory)
    assert {name: piece.tensor.data_ptr() for name, piece in second.items()} == places
    assert torch.equal(second["a"].tensor, weights["a"])
    assert int(second["b"].tensor) == 7
    larger = snapshot({"a": torch.randn(4, 3), "b": weights["b"]}, True, memory)["a"].tensor
    assert larger.shape == (4, 3)
    assert larger.data_ptr() != places["a"]
    alone = snapshot(weights, True)["a"].tensor
    weights["a"].zero_()
    assert alone.norm() > 0


@pytest.mark.parametrize(
    ("values", "sound"),
    [
        ([torch.tensor([1e30, -1e30])], True),  # its squares overflow
        ([torch.full((9,), 6e4, dtype=torch.float16), torch.ones(2)], True),
        ([torch.ones(2), torch.tensor([1.0, torch.nan])], False),
        ([torch.tensor([torch.inf, -torch.inf])], False),
        ([torch.tensor([1.0, -torch.inf], dtype=torch.bfloat16)], False),
        ([torch.tensor(3), torch.empty(0)], True),
        ([], True),
    ],
    ids=["large", "half", "nan", "infinities", "minus infinity", "integers", "nothing"],
)
def test_what_is_finite(values, sound):
    assert all_finite(values) is sound
