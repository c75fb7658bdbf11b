"""Verdicts on updates that are not finite."""

from __future__ import annotations

import pytest
import torch

from trainers.common.guard import Guard

GOOD, BAD = torch.tensor(0.0), torch.tensor(1.0)


@pytest.mark.parametrize(("stop", "after"), [(True, 1.0), (False, 0.0)])
def test_a_bad_update_holds_back_later_ones_only_under_stop(stop, after):
    guard = Guard(torch.device("cpu"), stop)
    verdicts = [float(guard.judge(*[BAD if step == 2 else GOOD] * 2, step)) for step in range(4)]
    assert verdicts == [0.0, 0.0, 1.0, after]
    assert guard.read() == (1, 2)
    assert guard.read() == (0, -1)
    assert float(guard.judge(GOOD, GOOD, 4)) == 0.0


def test_the_first_of_several_is_named():
    guard = Guard(torch.device("cpu"), stop=False)
    for step in range(7, 12):
        guard.judge(*[BAD if step >= 9 else GOOD] * 2, step)
    assert guard.read() == (3, 9)
    guard.judge(BAD, BAD, 12)
    assert guard.read() == (1, 12)


@pytest.mark.parametrize("stop", [True, False])
def test_what_is_no_failure_is_held_back_alone(stop):
    guard = Guard(torch.device("cpu"), stop)
    assert [float(guard.judge(bad, GOOD, 0)) for bad in (BAD, GOOD)] == [1.0, 0.0]
    assert guard.read() == (0, -1)
