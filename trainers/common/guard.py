"""Values that are not finite: seen on the device, before the optimiser step, and read by the host only now and then."""

from __future__ import annotations

import torch
from torch import Tensor


class Guard:
    """Counts bad updates and remembers the first one.

    Args:
        device: where the verdicts are.
        stop: once an update was bad, hold back all later ones until the host has read it.
    """

    def __init__(self, device: torch.device, stop: bool):
        self.stop = stop
        self._bad = torch.zeros((), device=device)
        self._first = torch.full((), -1, device=device)

    def judge(self, bad: Tensor, failed: Tensor, step: int) -> Tensor:
        """What the optimiser is told (`found_inf`): 1 to leave weights and moments alone.

        Args:
            bad: the gradient of this update is not finite (scalar, 0 or 1).
            failed: it counts as a failure; under a loss scale an overflow does not.
            step: updates before this one.
        """
        self._first = torch.where((self._first < 0) & (failed > 0), step, self._first)
        self._bad = self._bad + failed
        return torch.maximum(bad, (self._bad > 0).float()) if self.stop else bad

    def read(self) -> tuple[int, int]:
        """Bad updates since the last reading, and the step of the first; then start anew. Synchronises."""
        count, first = int(self._bad), int(self._first)
        if count:
            self._bad.zero_()
            self._first.fill_(-1)
        return count, first
