"""How far two sets of points are apart."""

from __future__ import annotations

import torch
from scipy.optimize import linear_sum_assignment
from torch import Tensor


def wasserstein(a: Tensor, b: Tensor) -> float:
    """The mean distance that points travel from one set to the other when they travel least (1-Wasserstein distance).

    Args:
        a, b: (N, D), both of one size; computed in float64. A matter of seconds up to N = 4000.

    Raises:
        ValueError: other shapes.
    """
    if a.shape != b.shape or a.ndim != 2 or len(a) == 0:
        raise ValueError(f"`a` and `b` must both be (N, D), got {tuple(a.shape)} and {tuple(b.shape)}")
    distances = torch.cdist(a.double(), b.double()).cpu()
    rows, columns = linear_sum_assignment(distances.numpy())
    return distances[rows, columns].mean().item()
