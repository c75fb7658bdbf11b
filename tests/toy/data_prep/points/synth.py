"""Points to try things on: eight round clouds on a circle."""

from __future__ import annotations

import math

import torch
from torch import Tensor

CLOUDS = 8
RADIUS = 1.4
SPREAD = 0.1


def make_ring(count: int, seed: int) -> Tensor:
    """(count, 2) points of `CLOUDS` normal clouds, each equally likely; standard deviation 1 in each direction."""
    generator = torch.Generator().manual_seed(seed)
    angles = torch.randint(CLOUDS, (count,), generator=generator) * (2 * math.pi / CLOUDS)
    centres = RADIUS * torch.stack([angles.cos(), angles.sin()], dim=1)
    return centres + SPREAD * torch.randn(count, 2, generator=generator)
