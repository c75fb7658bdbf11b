"""The network of the flow: a residual MLP that is told the noise level."""

from __future__ import annotations

from dataclasses import dataclass

import torch.nn.functional as F
from diffusers import ConfigMixin, ModelMixin
from diffusers.configuration_utils import register_to_config
from diffusers.utils import BaseOutput
from torch import Tensor, nn

from backlot.layers import ScalarEmbedder


@dataclass
class PointFlowNetworkOutput(BaseOutput):
    """`sample`: the velocity (B, 2), noise minus data."""

    sample: Tensor


class PointFlowBlock(nn.Module):
    """Norm, shift by the noise level, MLP, residual: (B, C), (B, C) -> (B, C)."""

    def __init__(self, hidden_size: int):
        super().__init__()
        self.norm = nn.LayerNorm(hidden_size)
        self.level = nn.Linear(hidden_size, hidden_size)
        self.linear_1 = nn.Linear(hidden_size, 2 * hidden_size)
        self.linear_2 = nn.Linear(2 * hidden_size, hidden_size)

    def forward(self, hidden_states: Tensor, embedding: Tensor) -> Tensor:
        shifted = self.norm(hidden_states) + self.level(embedding)
        return hidden_states + self.linear_2(F.silu(self.linear_1(shifted)))


class PointFlowNetwork(ModelMixin, ConfigMixin):
    """Predicts the velocity d x / d sigma of noisy points.

    Args:
        hidden_size: width. num_layers: residual blocks.
    """

    _supports_gradient_checkpointing = True
    _no_split_modules = ("PointFlowBlock",)
    _repeated_blocks = ("PointFlowBlock",)

    @register_to_config
    def __init__(self, hidden_size: int = 128, num_layers: int = 4):
        super().__init__()
        self.proj_in = nn.Linear(2, hidden_size)
        self.level_embedder = ScalarEmbedder(hidden_size)
        self.blocks = nn.ModuleList([PointFlowBlock(hidden_size) for _ in range(num_layers)])
        self.norm_out = nn.LayerNorm(hidden_size)
        self.proj_out = nn.Linear(hidden_size, 2)
        self.gradient_checkpointing = False

    def forward(
        self, noisy_points: Tensor, timesteps: Tensor, return_dict: bool = True
    ) -> PointFlowNetworkOutput | tuple[Tensor]:
        """
        Args:
            noisy_points: (B, 2). timesteps: (B,) in 0..1000, 1000 is noise.
        """
        embedding = F.silu(self.level_embedder(timesteps))
        hidden_states = self.proj_in(noisy_points)
        for block in self.blocks:
            if self.gradient_checkpointing and self.training:
                hidden_states = self._gradient_checkpointing_func(block, hidden_states, embedding)
            else:
                hidden_states = block(hidden_states, embedding)
        sample = self.proj_out(self.norm_out(hidden_states))
        return PointFlowNetworkOutput(sample=sample) if return_dict else (sample,)
