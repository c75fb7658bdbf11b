"""Stratified noise levels: one in every interval, each uniform by itself."""

from __future__ import annotations

import pytest
import torch

from objectives.stratified import draw_stratified_sigmas


@pytest.mark.parametrize("count", [1, 7, 64])
def test_every_interval_has_one(count):
    torch.manual_seed(0)
    sigmas = draw_stratified_sigmas(count, torch.device("cpu"))
    assert sigmas.shape == (count,)
    assert 0 < sigmas.min() <= sigmas.max() <= 1
    gaps = sigmas.sort().values.diff()
    torch.testing.assert_close(gaps, torch.full_like(gaps, 1 / count), rtol=0, atol=1e-6)


def test_each_is_uniform():
    torch.manual_seed(0)
    first = torch.stack([draw_stratified_sigmas(8, torch.device("cpu"))[0] for _ in range(4000)])
    assert first.mean() == pytest.approx(1 / 2, abs=0.02)
    assert first.var() == pytest.approx(1 / 12, abs=0.005)
