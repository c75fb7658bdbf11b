"""In which precision a network computes, and for float16 the scale of its loss.

Weights, gradients, moments and averages stay float32; only the forward pass computes in less (autocast).
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext

import torch
from accelerate.utils import convert_outputs_to_fp32
from torch import Tensor, nn

DTYPES = {"no": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


class Precision:
    """Args: name: one of `DTYPES`. device: where the network runs."""

    def __init__(self, name: str, device: torch.device):
        self.name, self.device, self.dtype = name, device, DTYPES[name]
        self.scale = LossScale(device) if name == "fp16" else None

    def autocast(self) -> AbstractContextManager:
        if self.name == "no":
            return nullcontext()
        return torch.autocast(self.device.type, self.dtype)

    def prepare(self, network: nn.Module) -> None:
        """Let `network` compute in this precision and answer in float32, whoever calls it."""
        if self.name == "no":
            return
        forward: Callable = network.forward

        def in_precision(*args, **kwargs):
            with self.autocast():
                return forward(*args, **kwargs)

        network.forward = convert_outputs_to_fp32(in_precision)


class LossScale:
    """Keeps small float16 gradients from vanishing: the loss is multiplied, the gradients are divided.

    It is halved when a gradient overflows though the loss is finite, and doubled after 2,000 updates without that; all
    on the device, without a host synchronisation (Micikevicius et al., arXiv 1710.03740).
    """

    GROWTH, BACKOFF, INTERVAL = 2.0, 0.5, 2000

    def __init__(self, device: torch.device, start: float = 2.0**16):
        self.value = torch.full((), start, device=device)
        self.tracker = torch.zeros((), dtype=torch.int32, device=device)

    def update(self, overflow: Tensor) -> None:
        """After an update: `overflow` is 1 where its gradient did, else 0 (scalar, float32)."""
        torch._amp_update_scale_(self.value, self.tracker, overflow, self.GROWTH, self.BACKOFF, self.INTERVAL)

    def state(self) -> dict[str, float]:
        return {"value": float(self.value), "tracker": int(self.tracker)}

    def load(self, state: dict[str, float]) -> None:
        self.value.fill_(state["value"])
        self.tracker.fill_(state["tracker"])
