"""Layers that several networks share."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from diffusers.models.embeddings import get_timestep_embedding
from torch import Tensor, nn


class ScalarEmbedder(nn.Module):
    """One number per sample -> 256 sinusoids -> two linear layers. (B,) -> (B, hidden_size)."""

    def __init__(self, hidden_size: int, num_features: int = 256):
        super().__init__()
        self.num_features = num_features
        self.linear_1 = nn.Linear(num_features, hidden_size)
        self.linear_2 = nn.Linear(hidden_size, hidden_size)

    def forward(self, value: Tensor) -> Tensor:
        # The sinusoids in float32 whatever the precision: bf16 cannot tell neighbouring times apart.
        features = get_timestep_embedding(
            value.float(), self.num_features, flip_sin_to_cos=True, downscale_freq_shift=0, max_period=10_000
        )
        return self.linear_2(F.silu(self.linear_1(features.to(self.linear_1.weight.dtype))))


def sincos_positions(hidden_size: int, rows: int) -> Tensor:
    """Fixed 2-D sine-cosine positions, (1, rows * rows, hidden_size): half from the column, half from the row."""
    frequencies = 10_000.0 ** -(torch.arange(hidden_size // 4, dtype=torch.float64) / (hidden_size // 4))
    angles = torch.arange(rows, dtype=torch.float64)[:, None] * frequencies
    axis = torch.cat([angles.sin(), angles.cos()], dim=1)
    column = axis[None].expand(rows, rows, -1)
    row = axis[:, None].expand(rows, rows, -1)
    return torch.cat([column, row], dim=-1).reshape(1, rows * rows, hidden_size).float()
