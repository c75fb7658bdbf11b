"""Noise levels spread evenly over a batch, so that its loss varies less from draw to draw."""

from __future__ import annotations

import torch
from torch import Tensor


def draw_stratified_sigmas(count: int, device: torch.device) -> Tensor:
    """(count,) noise levels, each uniform in (0, 1] and one in every interval of length 1 / count.

    One draw shifts them all (Kingma et al., arXiv 2107.00630, appendix I.1).
    """
    levels = torch.arange(count, device=device) / count
    return 1 - (levels + torch.rand((), device=device)) % 1
