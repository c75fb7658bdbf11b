"""Running means of one log interval, kept on the device until they are read."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from accelerate import Accelerator
from torch import Tensor

from trainers.common.tracking import resident_memory_gib


class Meter:
    """Adds up metrics and times; `flush` reads them with one reduction over the processes and one host transfer."""

    def __init__(self, accelerator: Accelerator):
        self.accelerator = accelerator
        self.sums: dict[str, Tensor] = {}
        self.micro_batches = self.updates = 0
        self._complete: tuple[dict[str, Tensor], int] = {}, 0  # sums and micro-batches after the last update
        self._timed_updates, self._waited = 0, 0.0
        self._since = time.perf_counter()

    def add(self, metrics: dict[str, Tensor]) -> None:
        """What one micro-batch has to say: scalars, or pairs (sum, number of rows) of a part that may be empty."""
        for name, value in metrics.items():
            self.sums[name] = self.sums[name] + value if name in self.sums else value
        self.micro_batches += 1

    def add_update(self, grad_norm: Tensor) -> None:
        """The end of an update."""
        self.sums["grad_norm"] = self.sums["grad_norm"] + grad_norm if "grad_norm" in self.sums else grad_norm
        self.updates += 1
        self._timed_updates += 1
        self._complete = dict(self.sums), self.micro_batches

    @contextmanager
    def data_wait(self) -> Iterator[None]:
        """Count the time inside as waiting for data."""
        began = time.perf_counter()
        try:
            yield
        finally:
            self._waited += time.perf_counter() - began

    def restart_clock(self) -> None:
        """Leave a pause (saving, validation, start-up) out of the rates: they speak of training alone."""
        self._timed_updates, self._waited, self._since = 0, 0.0, time.perf_counter()

    def flush(self, samples_per_update: int) -> dict[str, float]:
        """The interval's means over updates and processes, and its rates (`perf/...`); then start anew."""
        row = self._means()
        seconds = time.perf_counter() - self._since
        if self._timed_updates:
            row["perf/seconds_per_update"] = seconds / self._timed_updates
            row["perf/samples_per_second"] = samples_per_update * self._timed_updates / seconds
            row["perf/data_wait_share"] = self._waited / seconds
        device = self.accelerator.device
        on_gpu = device.type == "cuda"
        row["perf/memory_gib"] = torch.cuda.max_memory_allocated(device) / 2**30 if on_gpu else resident_memory_gib()
        self.sums, self.micro_batches, self.updates = {}, 0, 0
        self._complete = {}, 0
        self.restart_clock()
        return row

    def _totals(self, sums: dict[str, Tensor], alone: bool = False) -> dict[str, float | list[float]]:
        """Means over the processes, by one reduction and one host transfer."""
        names = sorted(sums)
        if not names:
            return {}
        flat = torch.cat([sums[name].double().reshape(-1) for name in names])
        numbers = iter((flat if alone else self.accelerator.reduce(flat, "mean")).tolist())
        return {name: [next(numbers) for _ in sums[name]] if sums[name].ndim else next(numbers) for name in names}

    def _means(self) -> dict[str, float]:
        row = {}
        for name, total in self._totals(self.sums).items():
            if isinstance(total, float):
                row[name] = total / (self.updates if name == "grad_norm" else self.micro_batches)
            elif total[1]:
                row[name] = total[0] / total[1]
        return row

    def state(self, alone: bool = False) -> dict:
        """The unfinished interval, so that a resumed run logs the same rows; called by all processes, or `alone`.

        Without the micro-batches of an update that a stop cut short: they are drawn again.
        """
        sums, micro_batches = self._complete
        return {"micro_batches": micro_batches, "updates": self.updates, "sums": self._totals(sums, alone)}

    def load(self, state: dict) -> None:
        """Take up an interval from `state`."""
        self.micro_batches, self.updates = state["micro_batches"], state["updates"]
        device = self.accelerator.device
        self.sums = {n: torch.tensor(v, dtype=torch.float32, device=device) for n, v in state["sums"].items()}
        self._complete = dict(self.sums), self.micro_batches
