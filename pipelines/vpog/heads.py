"""What is read from a query's and a template's tokens: which patches match, and where exactly their pixels lie."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

LOGIT_SCALE = 1 / 0.07
LOGIT_SCALE_RANGE = (1e-3, 100.0)
MIN_SCALE = 0.01
"""Of the Laplace distribution, in patches."""
OUTPUT_STD = 1e-3


class ClassificationHead(nn.Module):
    """Scaled cosines between a query's patches and one template's tokens.

    Args:
        inner_size, out_size: of the two MLPs hidden_size -> inner_size -> out_size.
    """

    def __init__(self, hidden_size: int, inner_size: int, out_size: int):
        super().__init__()
        self.query, self.template = (
            nn.Sequential(
                nn.Linear(hidden_size, inner_size),
                nn.LayerNorm(inner_size),
                nn.GELU(),
                nn.Linear(inner_size, out_size),
            )
            for _ in range(2)
        )
        # One element rather than none: a tensor without axes cannot be sharded.
        self.log_scale = nn.Parameter(torch.full((1,), math.log(LOGIT_SCALE)))

    def forward(self, query: Tensor, templates: Tensor) -> Tensor:
        """(B, N, C) and (B, S, N + 1, C) -> logits (B, S, N, N + 1), float32."""
        query, templates = self.query(query), self.template(templates)
        with torch.autocast(query.device.type, enabled=False):
            query, templates = F.normalize(query.float(), dim=-1), F.normalize(templates.float(), dim=-1)
            scale = self.log_scale.float().exp().clamp(*LOGIT_SCALE_RANGE)
            return scale * (query[:, None] @ templates.mT)


class Flow(NamedTuple):
    """What `FlowHead` finds, in patches; None: it has no such output.

    Args:
        flow: (B, S, N, ps, ps, 2). scale: (B, S, N, ps, ps). center_flow: (B, S, N, 2).
    """

    flow: Tensor | None
    scale: Tensor | None
    center_flow: Tensor | None


class FlowHead(nn.Module):
    """Where the pixels of a query patch's buddy lie in the query.

    Args:
        dense, center: which outputs there are.
    """

    def __init__(self, hidden_size: int, inner_size: int, patch_size: int, dense: bool, center: bool):
        super().__init__()
        self.patch_size = patch_size
        # A linear layer of both tokens side by side, in two parts: the buddies are then gathered at the inner size.
        self.query = nn.Linear(hidden_size, inner_size)
        self.template = nn.Linear(hidden_size, inner_size, bias=False)
        self.trunk = nn.Sequential(
            nn.LayerNorm(inner_size),
            nn.GELU(),
            nn.Linear(inner_size, inner_size),
            nn.LayerNorm(inner_size),
            nn.GELU(),
            nn.Linear(inner_size, inner_size),
            nn.LayerNorm(inner_size),
            nn.GELU(),
        )
        self.dense = nn.Linear(inner_size, 3 * patch_size**2) if dense else None
        self.center = nn.Linear(inner_size, 2) if center else None

    def forward(self, query: Tensor, templates: Tensor, buddies: Tensor) -> Flow:
        """Args:
        query: (B, N, C). templates: (B, S, N, C), without the unseen tokens.
        buddies: (B, S, N) integers; whatever is outside 0 ... N - 1 gets the flow of the nearest number in it.
        """
        query, templates = self.query(query)[:, None], self.template(templates)
        index = buddies.clamp(0, templates.shape[2] - 1)[..., None].expand(-1, -1, -1, templates.shape[-1])
        hidden_states = self.trunk(query + templates.gather(2, index))
        flow = scale = center_flow = None
        if self.dense is not None:
            dense = self.dense(hidden_states).float().unflatten(-1, (self.patch_size, self.patch_size, 3))
            flow, scale = dense[..., :2], F.softplus(dense[..., 2]) + MIN_SCALE
        if self.center is not None:
            center_flow = self.center(hidden_states).float()
        return Flow(flow, scale, center_flow)
