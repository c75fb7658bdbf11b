"""How an update is made, and everything a run promises around it. The script says what happens; this knows how.

run = TrainingRun(accelerator, config, model=..., dataset=...)
run.resume()
check = run.validation(every, function)
for batch in run.batches():
    with run.accumulate():
        loss, metrics = ...
        run.update(loss, metrics)
    check()
run.finish(pipeline)
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path

import torch
from accelerate import Accelerator
from accelerate.utils import send_to_device
from diffusers import DiffusionPipeline, ModelMixin
from PIL import Image
from safetensors import SafetensorError
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import Dataset
from tqdm import tqdm

from backlot.command_line import EXIT_DONE, EXIT_INPUT, EXIT_NONFINITE, EXIT_RESUME, leave
from backlot.files import write_json
from backlot.samples import DataOrder, Order, derive_seed
from trainers.common import checkpoints
from trainers.common.config import RunConfig
from trainers.common.guard import Guard
from trainers.common.launch import Launch
from trainers.common.loader import StreamSampler, abandon_workers, create_loader
from trainers.common.meter import Meter
from trainers.common.networks import Networks
from trainers.common.optimization import base_learning_rate, create_lr_scheduler, set_schedule_step
from trainers.common.rescue import Rescue
from trainers.common.resume import best_of, choose_checkpoint, describe_state, read_state
from trainers.common.run_dir import export_pipeline
from trainers.common.saving import Saver, Snapshot
from trainers.common.sharding import local, whole
from trainers.common.signals import GRACE, StopRequested
from trainers.common.state import all_finite
from trainers.common.tracking import TRACKERS, Tracking, read_rows
from trainers.common.validation import Measured, Validation

logger = logging.getLogger(__name__)


class TrainingRun:
    """One training run in one folder.

    Args:
        accelerator: from `create_accelerator`.
        config: the script's configuration.
        model: the network that computes the loss.
        dataset: map-style; indexed with `SampleKey`s. If it has a `fingerprint`, other data cannot continue the run.
        trained: the part of `model` that learns; all of it by default. Only it is optimised (what of it requires a
            gradient), averaged, saved and exported; the rest stays as it is and is told apart by its checksum.
        order: which sample comes when; all samples in a new order each epoch by default.
        modules: further networks whose weights are part of the run's state (a teacher that changes, say).

    Attributes:
        model: the prepared network, to compute losses with. network: the same, bare.
        ema: callable average of the weights (None without `use_ema`).
        step: updates done. consumed_samples: samples they took, over all processes.
        resumed_plan: `max_train_steps` when the checkpoint was written that the run resumed from.
    """

    def __init__(
        self,
        accelerator: Accelerator,
        config: RunConfig,
        *,
        model: ModelMixin,
        dataset: Dataset,
        trained: nn.Module | None = None,
        order: Order | None = None,
        modules: dict[str, nn.Module] | None = None,
    ):
        launch: Launch = accelerator.launch
        if config.training.max_train_steps is None:
            raise ValueError("`config` counts in epochs: call its `in_updates` first")
        self.accelerator, self.config, self.training = accelerator, config, config.training
        self.folder, self.processes, self.stop, self.precision = (
            launch.folder,
            launch.processes,
            launch.stop,
            launch.precision,
        )
        self.run_dir: Path = config.training.output_dir
        self.dataset, self.order = dataset, order or DataOrder(len(dataset), self.training.seed)
        self.step = self.consumed_samples = 0
        self.resumed_plan: int | None = None
        self.is_sharded = launch.sharding is not None or launch.zero is not None
        self.rescue = Rescue(self)
        self._saver = Saver(self.run_dir, self.processes, launch.sharding is not None, self.training)
        self._micro_step, self._nonfinite = 0, 0
        self._weight: Tensor | None = None
        self._loss_is_bad: Tensor | float = 0.0
        self._rows: list[dict] = []
        self._resumed_from: Path | None = None
        self._best: dict[str, float] = {}
        self._validations: list[Validation] = []
        self._tracking: Tracking | None = None
        self._progress: tqdm | None = None
        try:
            self.networks = Networks(accelerator, config.training, model, trained, modules or {})
        except ValueError as error:
            raise self.refuse(str(error)) from error
        networks = self.networks
        self.model, self.network, self.trained = networks.model, networks.network, networks.trained
        self.ema, self.optimizer, self.zero = networks.ema, networks.optimizer, networks.zero
        # Never prepared: Accelerate would step it once per process.
        self.lr_scheduler = create_lr_scheduler(self.optimizer, self.training)
        self._parameters = networks.parameters()
        self._guard = Guard(accelerator.device, stop=self.training.on_nonfinite == "stop")
        self._meter = Meter(accelerator)

    # ---- start ----

    @property
    def samples_per_update(self) -> int:
        training = self.training
        return training.train_batch_size * training.gradient_accumulation_steps * self.processes.count

    @property
    def micro_batch(self) -> tuple[int, int]:
        """Which of the update's micro-batches this process is at, and how many all processes together have."""
        part = self._micro_step * self.processes.count + self.processes.rank
        return part, self.training.gradient_accumulation_steps * self.processes.count

    def shared_generator(self) -> torch.Generator:
        """A fresh CPU generator for this micro-batch, the same on every process: for coins that all must share."""
        return torch.Generator().manual_seed(derive_seed(self.training.seed, self.step, self._micro_step))

    @property
    def inference_model(self) -> ModelMixin:
        """What validation and the exported pipeline use: the EMA, or the live weights without one."""
        return self.networks.for_inference

    def applied_average(self) -> AbstractContextManager:
        """Inside, `inference_model` has the averaged weights."""
        return nullcontext() if self.ema is None else self.ema.applied()

    def resume(self) -> None:
        """Restore what `resume_from_checkpoint` names, and open the logs. Call it once, before `batches`."""
        wanted = self.training.resume_from_checkpoint
        if self.processes.is_main:
            checkpoints.clean_up(self.run_dir)
        self.processes.wait()
        rows: list[dict] = []
        if wanted:
            is_main = self.processes.is_main
            checkpoint, problem = self.processes.share(choose_checkpoint(self.run_dir, wanted) if is_main else None)
            if problem:
                raise self.refuse(problem)
            if checkpoint is not None:
                self._load(checkpoint)
                rows = self.processes.share(read_rows(self.run_dir) if is_main else None)
        if self._resumed_from is not None:
            self._best = best_of(rows, self.step) or self._best
            self._rows = rows
        if self.processes.is_main:
            self.folder.describe(self.config, self.processes.count, str(self.accelerator.device))
            self._write_best()
            trackers = [TRACKERS[name] for name in self.training.report_to]
            self._tracking = Tracking(self.run_dir, self.step, trackers, self.config.model_dump(mode="json"))
            self._progress = tqdm(total=self.training.max_train_steps, initial=self.step, unit="update", smoothing=0.05)
        if self.step >= self.training.max_train_steps:
            logger.info("%d updates are done already, of %d", self.step, self.training.max_train_steps)
        self.restart_clock()

    def _load(self, checkpoint: Path) -> None:
        state, problem = {}, None
        try:
            state = read_state(checkpoint, self.config, self._identity())
            self.networks.load(checkpoint, state["optimizer"])
        except (ValueError, OSError, KeyError, SafetensorError) as error:
            problem = f"cannot resume from {checkpoint}: {error}"
        if problem and not self.processes.is_main:
            logger.error(problem)
        if self.processes.any(problem is not None):  # all leave, or none
            raise self.refuse(problem or f"another process cannot resume from {checkpoint}")
        if self.precision.scale is not None and state["loss_scale"]:
            self.precision.scale.load(state["loss_scale"])
        self.step, self.consumed_samples = state["step"], state["consumed_samples"]
        set_schedule_step(self.lr_scheduler, self.step)
        self.resumed_plan = state["max_train_steps"]
        self._meter.load(state["meter"])
        if checkpoint.resolve().parent == self.run_dir.resolve():  # however its path was written
            self._resumed_from = self.run_dir / checkpoint.name
            self._saver.saved.add(self._resumed_from)
            self._best = state["best"]
        logger.info("resumed from %s", checkpoint)

    def _identity(self) -> dict:
        """What must be the same in every run that continues this one."""
        return {
            "seed": self.order.seed,
            "num_samples": self.order.num_samples,
            "data": getattr(self.dataset, "fingerprint", None),
            "frozen": self.networks.frozen,
        }

    # ---- the loop ----

    def batches(self) -> Iterator[dict[str, Tensor]]:
        """Micro-batches on the device until `max_train_steps`. A requested stop saves and ends the process here."""
        training, device = self.training, self.accelerator.device
        rank, count = self.processes.rank, self.processes.count
        for validation in self._validations:
            validation.make_up(self._rows)
        sampler = StreamSampler(self.order, training.train_batch_size, self.consumed_samples, rank, count)
        loader = create_loader(self.dataset, sampler, training.dataloader_num_workers, device.type == "cuda")
        try:
            if self.step < training.max_train_steps:
                with self._data_wait():
                    stream = iter(loader)
            while self.step < training.max_train_steps:
                if self._micro_step == 0:
                    with self.rescue:  # the other processes may be gone
                        stops = self.stop.agreed()
                    if stops:
                        self.end_early()
                with self._data_wait():
                    batch = next(stream)
                # Randomness is a function of the position, so that nothing of it has to be saved.
                torch.manual_seed(derive_seed(training.seed, self.step, self._micro_step, rank))
                yield send_to_device(batch, device, non_blocking=True)
        except StopRequested:
            # with several processes the others may be in the middle of an update, and can no longer agree
            self.end_early(alone=count > 1)

    @contextmanager
    def _data_wait(self) -> Iterator[None]:
        with self.rescue, self._meter.data_wait(), self.stop.interruptible(GRACE if self.processes.count > 1 else 0.0):
            yield

    @contextmanager
    def accumulate(self) -> Iterator[None]:
        """Around one micro-batch: gradients are synchronised only at the last one of an update."""
        is_last = self._micro_step + 1 == self.training.gradient_accumulation_steps
        if self.zero is not None:
            self.model.set_gradient_accumulation_boundary(is_last)
        elif self.is_sharded:
            self.model.set_requires_gradient_sync(is_last)
        holds = not is_last and isinstance(self.model, DistributedDataParallel)
        with self.rescue, self.model.no_sync() if holds else nullcontext():
            yield

    def update(
        self, loss: Tensor, metrics: dict[str, Tensor] | None = None, weight: Tensor | float | None = None
    ) -> None:
        """Backward; at the last micro-batch also clip, step, schedule, zero, EMA, count, log and checkpoint.

        Args:
            loss: scalar with gradient: the mean over this micro-batch, or with a `weight` the sum over its rows.
            metrics: detached scalars, or pairs (sum, number of rows), the same keys every time; logged as means.
            weight: rows (or their total weight) of this micro-batch, 0 allowed. The update is then the mean over all
                rows of all processes and micro-batches, however they are spread.
        """
        detached, scale = loss.detach(), self.precision.scale
        if weight is None:
            share, logged = 1 / self.training.gradient_accumulation_steps, detached
        else:
            if not isinstance(weight, Tensor):  # filled there: a copy from the host would wait for the device
                weight = torch.full((), float(weight), device=detached.device)
            weight = weight.detach().to(detached.device, torch.float32)
            self._weight = weight if self._weight is None else self._weight + weight
            share, logged = 1.0, torch.stack([detached.float(), weight])
        # A non-finite loss makes every gradient NaN, on every process, whatever its own gradient was.
        sound = torch.where(torch.isfinite(logged).all(), share, torch.nan)
        loss = loss * (sound if scale is None else sound * scale.value)
        loss.backward() if self.zero is None else self.zero.backward(loss)
        self._meter.add({"loss": logged, **(metrics or {})})
        if scale is not None:
            self._loss_is_bad = self._loss_is_bad + (~torch.isfinite(detached)).float()
        self._micro_step = (self._micro_step + 1) % self.training.gradient_accumulation_steps
        if self._micro_step == 0:
            self._complete_update()

    def _complete_update(self) -> None:
        with self.rescue.unsound():
            learning_rate = base_learning_rate(self.lr_scheduler, self.training)
            grad_norm = self._step() if self.zero is None else self._zero_step()
            self.lr_scheduler.step()
            self.optimizer.zero_grad(set_to_none=True)
            if self.ema is not None:
                self.ema.update(self.trained, self.step)
            self.step += 1
            self.consumed_samples += self.samples_per_update
            self._meter.add_update(grad_norm)
        # here the host knows already, or need not wait for the device
        if self.is_due(self.training.logging_steps) or self.accelerator.device.type == "cpu" or self.zero is not None:
            self._report_nonfinite()
        if self.is_due(self.training.logging_steps):
            self._log(learning_rate)
        if self.is_due(self.training.checkpointing_steps):
            self.save_checkpoint()
        if self._progress is not None:
            self._progress.update()

    def _step(self) -> Tensor:
        grad_norm = self._gradient_norm()
        self._step_unless_nonfinite(grad_norm)
        return grad_norm

    def _zero_step(self) -> Tensor:
        grad_norm = self.zero.step(self._mean_weight())
        bad = (~torch.isfinite(grad_norm)).float()
        self._guard.judge(bad, bad, self.step)  # DeepSpeed has left the update out by itself
        return grad_norm

    def _mean_weight(self) -> Tensor | None:
        """Of the update, per process: DDP, FSDP2 and ZeRO divide by their number; None without weights."""
        if self._weight is None:
            return None
        weight, self._weight = self.accelerator.reduce(self._weight, "sum"), None
        return torch.where(weight > 0, weight, 1.0) / self.processes.count

    def _gradient_norm(self) -> Tensor:
        """Undo scales and weights, clip; the norm before that, over all processes."""
        factor = None if self.precision.scale is None else 1 / self.precision.scale.value
        weight = self._mean_weight()
        if weight is not None:
            factor = 1 / weight if factor is None else factor / weight
        if factor is not None:
            torch._foreach_mul_(local(p.grad for p in self._parameters), factor)
        limit = self.training.max_grad_norm or float("inf")
        norm = torch.nn.utils.clip_grad_norm_(self._parameters, limit, foreach=True)
        return whole(norm).detach().to(self.accelerator.device)

    def is_due(self, every: int | None) -> bool:
        """Whether an update has just been completed whose number is a multiple of `every` (never, if None)."""
        return bool(every) and self._micro_step == 0 and self.step % every == 0

    def _log(self, learning_rate: float) -> None:
        row = self._meter.flush(self.samples_per_update)
        row |= {"learning_rate": learning_rate, "epoch": self.consumed_samples / self.order.num_samples}
        if self.precision.scale is not None:
            row["loss_scale"] = float(self.precision.scale.value)
        self.log(row)
        if self._progress is not None:
            self._progress.set_postfix_str(f"loss {row['loss']:.4g}")

    def log(
        self,
        scalars: dict[str, float],
        pictures: dict[str, Image.Image] | None = None,
        histograms: dict[str, Tensor] | None = None,
    ) -> None:
        """A row of metrics.jsonl and the trackers at this step, with pictures and histograms; any time, any process."""
        if self._tracking is not None:
            self._tracking.log(self.step, scalars, pictures, histograms)

    def restart_clock(self) -> None:
        """Leave a pause out of the rates: they speak of training alone."""
        self._meter.restart_clock()

    # ---- non-finite values ----

    def _step_unless_nonfinite(self, grad_norm: Tensor) -> None:
        """The optimiser step, which leaves weights and moments alone where the gradient is not finite.

        The verdict stays on the device: the fused kernel reads it there. Under `stop`, the first bad update blocks all
        later ones until the host reads it at the next log point.
        """
        bad, scale = (~torch.isfinite(grad_norm)).float(), self.precision.scale
        failed = bad
        if scale is not None:  # an overflow is no failure: the scale is halved, and the update left out
            loss_is_bad = (self.accelerator.reduce(self._loss_is_bad, "sum") > 0).float()
            failed = bad * torch.maximum(loss_is_bad, (scale.value < 1).float())
            scale.update(bad * (1 - failed))
            self._loss_is_bad = 0.0
        verdict = self._guard.judge(bad, failed, self.step)
        if self.networks.is_gated:
            self.optimizer.found_inf = verdict
        elif verdict:  # 8-bit AdamW has no such input: one host synchronisation
            return
        self.optimizer.step()

    def _report_nonfinite(self) -> None:
        count, step = self._guard.read()
        if count == 0:
            return
        first_position = self.consumed_samples - (self.step - step) * self.samples_per_update
        samples = [int(key) for key in self.order.keys(first_position, min(self.samples_per_update, 64))]
        self._nonfinite += count
        spoilt = self._spoilt(self.networks.tensors()[0])
        what = f"non-finite loss or gradient in update {step + 1}; its samples: {samples}"
        may_skip = self.training.on_nonfinite == "skip" and self._nonfinite <= self.training.max_nonfinite_skips
        if may_skip and not spoilt:
            logger.warning("%s; skipped (%d so far)", what, self._nonfinite)
            return
        before = f"{spoilt} was not finite before it" if spoilt else "the weights are those before it"
        self._end_nonfinite(f"{what}; {before}")

    def _end_nonfinite(self, what: str) -> None:
        logger.error("%s", what)  # here already: a save under way may have failed, and its error ends the run then
        with self.rescue.unsound():
            self._saver.wait()
        newest = checkpoints.find_latest(self.run_dir) if self.processes.is_main else None
        self._close(EXIT_NONFINITE)
        raise self._left(EXIT_NONFINITE, f"{what}; last checkpoint: {newest or 'none'}")

    def _spoilt(self, tensors: dict[str, dict[str, Tensor]], alone: bool = False) -> str:
        """What of the state is not finite on any process, in words; synchronises."""
        names = [part for part, named in tensors.items() if not all_finite(named.values())]
        somewhere = bool(names) if alone else self.processes.any(bool(names))
        return (" and ".join(names) or "the share of another process") if somewhere else ""

    # ---- checkpoints, validation, end ----

    def save_checkpoint(self) -> None:
        """Write `checkpoint-<step>`; called by all processes.

        Weights, averages or moments that are not finite are never written: the run ends instead.
        """
        if self._saver.has(self.step):
            self._saver.wait()
            return
        self._report_nonfinite()
        tensors, values = self.networks.tensors()
        if spoilt := self._spoilt(tensors):
            self._end_nonfinite(f"{spoilt} not finite at update {self.step}: no checkpoint")
        self._saver.save(self._snapshot(tensors, values))
        self.restart_clock()

    def end_saving(self) -> None:
        """Wait for the save under way; its error is raised here."""
        self._saver.wait()

    def save_alone(self) -> None:
        """The same by the main process alone, in an emergency.

        Raises:
            OSError: it could not be written.
            ValueError: the state is not one to continue from.
        """
        if self._saver.has(self.step):
            return
        if self.training.on_nonfinite == "stop" and self._guard.read()[0]:
            raise ValueError("a loss or gradient was not finite")
        tensors, values = self.networks.tensors()
        if spoilt := self._spoilt(tensors, alone=True):
            raise ValueError(f"{spoilt} not finite")
        self._saver.save(self._snapshot(tensors, values, alone=True), alone=True)

    def _snapshot(
        self, tensors: dict[str, dict[str, Tensor]], values: dict[str, dict], alone: bool = False
    ) -> Snapshot:
        """A copy of the state in host memory."""
        parts = self._saver.copy(tensors, alone)
        state = self._identity() | {
            "step": self.step,
            "consumed_samples": self.consumed_samples,
            "max_train_steps": self.training.max_train_steps,
            "meter": self._meter.state(alone),
            "loss_scale": None if self.precision.scale is None else self.precision.scale.state(),
            "best": self._best,
        }
        kept = {path for path in (self._resumed_from, self._best_checkpoint()) if path is not None}
        return Snapshot(self.step, parts, describe_state(state, values, self.config), kept)

    def validation(
        self,
        every: int | None,
        function: Callable[[ModelMixin], Measured],
        score: Callable[[dict[str, float]], float] | None = None,
        name: str = "validation",
    ) -> Validation:
        """A check to call after each update: measures `function(inference_model)` every so many updates.

        One that a stop interrupted, or a kill, is made when the run has been resumed. Arguments as `Validation`.
        """
        if score is not None and any(validation.score for validation in self._validations):
            raise ValueError("only one validation of a run can have a score: there is one best checkpoint")
        self._validations.append(Validation(self, every, function, score, name))
        return self._validations[-1]

    def keep_best(self, score: float) -> None:
        """Make this update's checkpoint a milestone if `score`, higher is better, exceeds all before it.

        The best one is named in best.json and is not deleted until a better one exists.
        """
        # compared in memory, where every process comes to the same answer; NaN is never the best
        if not score > self._best.get("score", float("-inf")):
            return
        self._best = {"step": self.step, "score": score}
        self.save_checkpoint()
        self._saver.wait()
        self._write_best()

    def _write_best(self) -> None:
        path = self.run_dir / "best.json"
        if not self.processes.is_main:
            return
        if path.is_dir() or not self._best:  # or it named one that the run has fallen back behind
            checkpoints.discard(path)
        if self._best:
            write_json(path, self._best)

    def _best_checkpoint(self) -> Path | None:
        return self.run_dir / f"checkpoint-{self._best['step']}" if self._best else None

    def finish(self, pipeline: DiffusionPipeline | ModelMixin) -> None:
        """Final checkpoint, pipeline or network for `from_pretrained(output_dir)`, logs closed."""
        with self.rescue:
            self.save_checkpoint()
            self._saver.wait()
            if self.is_sharded:
                pipeline = self.networks.with_whole_weights(pipeline)
            if self.processes.is_main:
                with self.applied_average() if not self.is_sharded else nullcontext():
                    export_pipeline(self.run_dir, pipeline)
        self._close(EXIT_DONE)

    def end_early(self, alone: bool = False) -> None:
        """Answer a stop: checkpoint, exit code 75; `alone` where the other processes can no longer take part."""
        if alone:
            self.rescue.leave_alone("stopped while another process may wait for this one")
        with self.rescue:
            self.save_checkpoint()
            self._saver.wait()
        self._close(EXIT_RESUME)
        abandon_workers()
        raise self._left(EXIT_RESUME, f"stopped at update {self.step}; continue with --resume_from_checkpoint latest")

    def refuse(self, problem: str) -> SystemExit:
        """The input is wrong (exit code 2): said once, by the main process. `raise run.refuse(...)`."""
        self._close(EXIT_INPUT)
        return self._left(EXIT_INPUT, problem)

    def _left(self, code: int, message: str) -> SystemExit:
        return leave(code, message) if self.processes.is_main else SystemExit(code)

    def _close(self, code: int) -> None:
        if self._tracking is not None:
            self._progress.close()
            self._tracking.close()
        if self.processes.is_main:
            self.folder.write_exit(code)
        self.stop.release()
        self.processes.wait()
        self.accelerator.end_training()
        self.folder.release()
