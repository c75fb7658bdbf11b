"""An exponential moving average of a network's weights, as a network that can be called."""

from __future__ import annotations

import copy
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext

import torch
from torch import nn


class EMA:
    """A copy of `model`, never in training mode, that follows it: ema <- decay ema + (1 - decay) weights.

    Calling it runs the copy without gradient, in the run's precision, so it can serve as a teacher.

    Args:
        model: the bare network (before `accelerator.prepare`); the copy starts from its weights.
        decay: constant decay in [0, 1); 0 keeps the live weights.
        ramp: use min(decay, (1 + n) / (10 + n)) at update n = 0, 1, ...
        autocast: makes the context of mixed precision.
    """

    def __init__(
        self,
        model: nn.Module,
        decay: float,
        ramp: bool = False,
        autocast: Callable[[], AbstractContextManager] = nullcontext,
    ):
        self.decay, self.ramp, self.autocast = decay, ramp, autocast
        self.model = copy.deepcopy(model).eval().requires_grad_(False)

    def __call__(self, *args, **kwargs):
        with torch.no_grad(), self.autocast():
            return self.model(*args, **kwargs)

    @torch.no_grad()
    def update(self, model: nn.Module, step: int) -> None:
        """Follow the bare `model` after update `step` (counted from 0)."""
        decay = min(self.decay, (1 + step) / (10 + step)) if self.ramp else self.decay
        torch._foreach_lerp_(list(self.model.parameters()), list(model.parameters()), 1 - decay)
        for mine, theirs in zip(self.model.buffers(), model.buffers(), strict=True):
            mine.copy_(theirs)
