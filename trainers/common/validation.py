"""Measuring on held-out data while training, and what every script's `validate` would otherwise write by hand."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any, Protocol

import torch
from accelerate import Accelerator
from diffusers import ModelMixin
from PIL import Image
from torch import Tensor
from torch.utils.data import default_collate

from backlot.samples import SampleKey
from trainers.common.precision import Precision
from trainers.common.processes import Processes
from trainers.common.rescue import Rescue
from trainers.common.sharding import give_back
from trainers.common.signals import StopRequested, StopSignal

Measured = tuple[dict[str, float], dict[str, Image.Image]]
logger = logging.getLogger(__name__)


class Measurable(Protocol):
    """What validation needs of a `TrainingRun`."""

    step: int
    is_sharded: bool
    inference_model: ModelMixin
    accelerator: Accelerator
    processes: Processes
    stop: StopSignal
    precision: Precision
    rescue: Rescue

    def is_due(self, every: int | None) -> bool: ...

    def applied_average(self) -> AbstractContextManager: ...

    def keep_best(self, score: float) -> None: ...

    def log(self, scalars: dict[str, float], pictures: dict[str, Image.Image]) -> None: ...

    def end_early(self) -> None: ...

    def restart_clock(self) -> None: ...


class Validation:
    """What `TrainingRun.validation` gives: call it after each update; it does something where it is due.

    Args:
        run: the run.
        every: updates from one to the next; None for never.
        function: `function(inference_model) -> (scalars, pictures)`; on the main process alone, or on all of them
            where the network is sharded.
        score: of these scalars, higher is better: the best checkpoint so far is kept and named in best.json.
        name: of its rows: `<name>/<scalar>`.
    """

    def __init__(
        self,
        run: Measurable,
        every: int | None,
        function: Callable[[ModelMixin], Measured],
        score: Callable[[dict[str, float]], float] | None,
        name: str,
    ):
        self.run, self.every, self.function, self.score, self.name = run, every, function, score, name

    def __call__(self) -> None:
        if self.run.is_due(self.every):
            self.make()

    def make_up(self, rows: list[dict]) -> None:
        """Make the one that was due at the resumed step, if no row says that it was made."""
        made = any(row["step"] == self.run.step and any(k.startswith(self.name + "/") for k in row) for row in rows)
        if self.run.step and self.run.is_due(self.every) and not made:
            self.make()

    def make(self) -> None:
        """Measure, keep the best, write the row. The run is as before; running out of memory does not end it.

        (It does where the network is sharded: the processes measure in step.)
        """
        run = self.run
        with run.rescue:
            run.processes.wait()
            outcome, pictures = None, {}
            if run.processes.is_main or run.is_sharded:
                outcome, pictures = self._measure()
            outcome = run.processes.share(outcome)
            if outcome == "stopped":
                run.end_early()  # now, or the next update would be made first and this validation never
            if isinstance(outcome, dict):
                row = {f"{self.name}/{key}": value for key, value in outcome.items()}
                if self.score is not None:
                    row[f"{self.name}/score"] = score = float(self.score(outcome))
                    run.keep_best(score)
                run.log(row, pictures)
        run.restart_clock()

    def _measure(self) -> tuple[dict[str, float] | str, dict[str, Image.Image]]:
        """Scalars and pictures; or `stopped` by a signal, or `skipped` for want of memory."""
        run = self.run
        model, device = run.inference_model, run.accelerator.device
        was_training = model.training
        with torch.random.fork_rng([device] if device.type == "cuda" else []), torch.no_grad():
            try:
                with self._interruptible(), run.applied_average(), run.precision.autocast():
                    scalars, pictures = self.function(model.eval())
                return {name: float(value) for name, value in scalars.items()}, pictures
            except torch.OutOfMemoryError as error:
                if run.is_sharded:
                    raise  # the others are waiting for this one's share
                logger.warning("validation ran out of memory and is skipped: %s", str(error).splitlines()[0])
                return "skipped", {}
            except StopRequested:
                return "stopped", {}
            finally:
                model.train(was_training)
                if run.is_sharded:
                    give_back(model)

    def _interruptible(self) -> AbstractContextManager:
        # the processes of a sharded network measure in step: none may leave alone
        return nullcontext() if self.run.is_sharded else self.run.stop.interruptible()


# ---- what validation functions are made of ----


def spread(total: int, count: int) -> list[int]:
    """At most `count` of the rows 0 ... total - 1, spread out: folders list one class after another."""
    count = min(count, total)
    return [i * total // count for i in range(count)]


def held_out_items(dataset: Any, count: int) -> list[dict[str, Tensor]]:
    """At most `count` items of a data set, spread over it and never augmented."""
    return [dataset[SampleKey(row)] for row in spread(len(dataset), count)]


def batches_of(
    items: Sequence[dict[str, Tensor]], batch_size: int, device: torch.device
) -> Iterator[dict[str, Tensor]]:
    """Collated batches on the device, of equal size but for one."""
    number = -(-len(items) // batch_size)
    for start in range(number):
        yield to_device(default_collate(items[start::number]), device)


def to_device(batch: dict[str, Tensor], device: torch.device) -> dict[str, Tensor]:
    return {name: values.to(device) for name, values in batch.items()}


def mean_of(measured: Iterable[tuple[dict[str, Tensor | float], int]]) -> dict[str, float]:
    """Means of scalars of batches, each with the number of its rows, over all rows."""
    totals, count = {}, 0
    for scalars, number in measured:
        count += number
        for name, value in scalars.items():
            totals[name] = totals.get(name, 0.0) + float(value) * number
    return {name: total / count for name, total in totals.items()}


def step_names(counts: Iterable[int]) -> list[str]:
    """`1 step`, `4 steps`: names of rows of samples."""
    return [f"{count} step{'s' * (count > 1)}" for count in counts]
