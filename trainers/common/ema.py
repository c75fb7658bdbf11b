"""An exponential moving average of what trains, as a network that can be called."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext

import torch
from torch import Tensor, nn

from trainers.common.sharding import give_back, local, state_tensors


class EMA:
    """A copy of `network`, never in training mode, that follows it: ema <- decay ema + (1 - decay) weights.

    Only what trains is copied; frozen weights are shared with the network. Calling it runs the copy without gradient,
    in the run's precision, so it can serve as a teacher.

    Args:
        network: the bare network (before it is prepared or sharded); the copy starts from its weights.
        decay: constant decay in [0, 1); 0 keeps the live weights.
        trained: the part of `network` that learns; all of it by default.
        ramp: use min(decay, (1 + n) / (10 + n)) at update n = 0, 1, ...
        autocast: makes the context of mixed precision.

    Attributes:
        model: the copied network. part: the copy of `trained` in it.
    """

    def __init__(
        self,
        network: nn.Module,
        decay: float,
        ramp: bool = False,
        autocast: Callable[[], AbstractContextManager] = nullcontext,
        trained: nn.Module | None = None,
    ):
        self.decay, self.ramp, self.autocast = decay, ramp, autocast
        trained = network if trained is None else trained
        copied = {id(parameter) for parameter in trained.parameters()}
        shared = [*network.parameters(), *network.buffers()] if trained is not network else []
        owned = {id(buffer) for buffer in trained.buffers()} | copied
        memo = {id(tensor): tensor for tensor in shared if id(tensor) not in owned}
        # together, since a part made of pieces of the network is not in it
        self.model, self.part = copy.deepcopy((network, trained), memo)
        self.model.eval()
        self.part.requires_grad_(False)

    def __call__(self, *args, **kwargs):
        with torch.no_grad(), self.applied(), self.autocast():
            return self.model(*args, **kwargs)

    def applied(self) -> AbstractContextManager:
        """Inside, `model` has the averaged weights (it always has)."""
        return nullcontext()

    def tensors(self) -> dict[str, Tensor]:
        """Averaged weights, and buffers, by their names in the part that trains."""
        return dict(state_tensors(self.part))

    @torch.no_grad()
    def update(self, trained: nn.Module, step: int) -> None:
        """Follow the bare part that trains after update `step` (counted from 0)."""
        decay = min(self.decay, (1 + step) / (10 + step)) if self.ramp else self.decay
        mine, theirs = self._weights(), list(trained.parameters())
        torch._foreach_lerp_(local(mine), local(theirs), 1 - decay)
        for mine, theirs in zip(self._buffers(), trained.buffers(), strict=True):
            mine.copy_(theirs)

    def _weights(self) -> list[Tensor]:
        return list(self.part.parameters())

    def _buffers(self) -> list[Tensor]:
        return list(self.part.buffers())


class SwappedEMA(EMA):
    """The average of a part of a sharded network. Shares of a frozen base cannot be in two networks at once, so the
    averages take the place of the live weights while it is called.

    Args: as `EMA`; `network` is sharded already.
    """

    def __init__(
        self,
        network: nn.Module,
        decay: float,
        ramp: bool,
        autocast: Callable[[], AbstractContextManager],
        trained: nn.Module,
    ):
        self.decay, self.ramp, self.autocast = decay, ramp, autocast
        self.model = network
        self.part = trained
        self._averages = {name: tensor.detach().clone() for name, tensor in state_tensors(trained)}
        self._is_applied = False

    @contextmanager
    def applied(self) -> Iterator[None]:
        """Inside, `model` has the averaged weights."""
        if self._is_applied:
            yield
            return
        was_training, self._is_applied = self.model.training, True
        self._swap()
        self.model.eval()
        try:
            yield
        finally:
            self._swap()
            self.model.train(was_training)
            self._is_applied = False

    def tensors(self) -> dict[str, Tensor]:
        return self._averages

    def _weights(self) -> list[Tensor]:
        return [self._averages[name] for name, _ in self.part.named_parameters()]

    def _buffers(self) -> list[Tensor]:
        return [self._averages.get(name, buffer) for name, buffer in self.part.named_buffers()]

    def _swap(self) -> None:
        give_back(self.model)  # a block that is still gathered would be used as it is
        # by `.data`: what autograd has saved of the live weights stays valid, they are back before it is used
        for mine, theirs in zip(local(self._weights()), local(self.part.parameters()), strict=True):
            kept = theirs.data.clone()
            theirs.data.copy_(mine.data)
            mine.data.copy_(kept)
