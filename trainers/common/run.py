"""How an update is made, and everything a run promises around it. The script says what happens; this knows how.

run = TrainingRun(accelerator, config, model=..., dataset=...)
run.resume()
for batch in run.batches():
    with run.accumulate():
        loss, metrics = ...
        run.update(loss, metrics)
run.finish(pipeline)
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from pathlib import Path

import torch
from accelerate import Accelerator, DistributedType
from accelerate.utils import DistributedDataParallelKwargs, broadcast_object_list, send_to_device
from diffusers import DiffusionPipeline, ModelMixin
from PIL import Image
from safetensors.torch import load_model, save_model
from torch import Tensor, nn
from torch.utils.data import Dataset
from tqdm import tqdm

from backlot.command_line import EXIT_INPUT, EXIT_RESUME, leave
from backlot.files import read_json, write_json
from backlot.samples import DataOrder, derive_seed
from trainers.common import checkpoints
from trainers.common.attention import configure_network
from trainers.common.checkpoints import step_of
from trainers.common.config import RunConfig
from trainers.common.ema import EMA
from trainers.common.loader import StreamSampler, abandon_workers, create_loader
from trainers.common.meter import Meter
from trainers.common.optimization import create_lr_scheduler, create_optimizer, set_schedule_step
from trainers.common.run_dir import claim, export_pipeline, refuse_to_overwrite, write_description
from trainers.common.signals import StopRequested, StopSignal
from trainers.common.tracking import TRACKERS, Tracking

EXIT_NONFINITE = 3
SUPPORTED = (DistributedType.NO, DistributedType.MULTI_CPU, DistributedType.MULTI_GPU)
logger = logging.getLogger(__name__)


def create_accelerator(config: RunConfig) -> Accelerator:
    """The accelerator of the launch configuration; what Accelerate would get wrong in silence stops here."""
    logging.basicConfig(format="%(levelname)s %(name)s: %(message)s", level=logging.INFO)
    logging.getLogger("accelerate").setLevel(logging.WARNING)
    training = config.training
    refuse_to_overwrite(training.output_dir, training.resume_from_checkpoint)
    accelerator = Accelerator(
        gradient_accumulation_steps=training.gradient_accumulation_steps,
        mixed_precision=training.mixed_precision,
        kwargs_handlers=[DistributedDataParallelKwargs(gradient_as_bucket_view=True)],
    )
    launched = int(os.environ.get("WORLD_SIZE", 1))
    expected = training.expected_processes or launched
    if accelerator.num_processes != expected:
        raise leave(
            EXIT_INPUT,
            f"expected {expected} processes, Accelerate runs {accelerator.num_processes} "
            "(on CPUs, several need ACCELERATE_USE_CPU=true and accelerate_configs/cpu_2proc.yaml)",
        )
    if accelerator.distributed_type not in SUPPORTED:
        raise leave(EXIT_INPUT, f"{accelerator.distributed_type} is not supported: use one process or DDP")
    if accelerator.mixed_precision not in ("no", "bf16"):
        raise leave(EXIT_INPUT, f"mixed precision {accelerator.mixed_precision} is not supported: use bf16 or no")
    if accelerator.gradient_accumulation_steps != training.gradient_accumulation_steps:
        raise leave(
            EXIT_INPUT,
            f"the launch configuration sets gradient_accumulation_steps {accelerator.gradient_accumulation_steps}, "
            f"the run {training.gradient_accumulation_steps}: leave it out of the launch configuration",
        )
    # So early that a signal during start-up is answered at the first update.
    accelerator.stop_signal = StopSignal(accelerator.num_processes)
    return accelerator


class TrainingRun:
    """One training run in one folder.

    Args:
        accelerator: from `create_accelerator`.
        config: the script's configuration.
        model: the network to train; its parameters that require a gradient are optimised.
        dataset: map-style; indexed with `SampleKey`s.
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
        modules: dict[str, nn.Module] | None = None,
    ):
        self.accelerator, self.config, self.training = accelerator, config, config.training
        self.run_dir: Path = config.training.output_dir
        self.stop: StopSignal = accelerator.stop_signal
        self.dataset = dataset
        self.order = DataOrder(len(dataset), self.training.seed)
        self.step = self.consumed_samples = 0
        self.resumed_plan: int | None = None
        self._lock = claim(self.run_dir) if accelerator.is_main_process else None
        self._micro_step, self._nonfinite = 0, 0
        self._saved: set[Path] = set()
        self._resumed_from: Path | None = None
        self._best: dict[str, float] = {}
        self._tracking: Tracking | None = None
        self._progress: tqdm | None = None

        dtype = torch.bfloat16 if accelerator.mixed_precision == "bf16" else torch.float32
        self.network = configure_network(model.to(accelerator.device), self.training, dtype)
        self.ema = None
        self._state_modules = {name: module.to(accelerator.device) for name, module in (modules or {}).items()}
        if self.training.use_ema:
            self.ema = EMA(self.network, self.training.ema_decay, self.training.ema_ramp, accelerator.autocast)
            self._state_modules["ema"] = self.ema.model
        if self.training.torch_compile:
            for module in (self.network, *self._state_modules.values()):
                module.compile()
        optimizer = create_optimizer(self.network, self.training)
        self.model, self.optimizer = accelerator.prepare(self.network, optimizer)
        self.model.train()
        # Never prepared: Accelerate would step it once per process.
        self.lr_scheduler = create_lr_scheduler(optimizer, self.training)
        self._parameters = [p for p in self.network.parameters() if p.requires_grad]
        self._gated = isinstance(optimizer, torch.optim.AdamW)
        self._bad = torch.zeros((), device=accelerator.device)
        self._first_bad = torch.full((), -1, device=accelerator.device)
        self._meter = Meter(accelerator)

    @property
    def samples_per_update(self) -> int:
        training = self.training
        return training.train_batch_size * training.gradient_accumulation_steps * self.accelerator.num_processes

    @property
    def micro_batch(self) -> tuple[int, int]:
        """Which of the update's micro-batches this process is at, and how many all processes together have."""
        processes = self.accelerator.num_processes
        part = self._micro_step * processes + self.accelerator.process_index
        return part, self.training.gradient_accumulation_steps * processes

    def shared_generator(self) -> torch.Generator:
        """A fresh CPU generator for this micro-batch, the same on every process: for coins that all must share."""
        return torch.Generator().manual_seed(derive_seed(self.training.seed, self.step, self._micro_step))

    @property
    def inference_model(self) -> ModelMixin:
        """What validation and the exported pipeline use: the EMA, or the live weights without one."""
        return self.network if self.ema is None else self.ema.model

    # ---- start ----

    def resume(self) -> None:
        """Restore what `resume_from_checkpoint` names, and open the logs. Call it once, before `batches`."""
        wanted = self.training.resume_from_checkpoint
        if self.accelerator.is_main_process:
            checkpoints.clean_up(self.run_dir)
        self.accelerator.wait_for_everyone()
        checkpoint = self._choose_checkpoint(wanted) if wanted else None
        if checkpoint is not None:
            self._load(checkpoint)
            best = self.run_dir / "best.json"
            self._best = read_json(best) if best.exists() else {}
            logger.info("resumed from %s", checkpoint)
        if self.accelerator.is_main_process:
            write_description(self.run_dir, self.config, self.accelerator.num_processes, str(self.accelerator.device))
            self._tracking = Tracking(self.run_dir, self.step, [TRACKERS[name] for name in self.training.report_to])
            self._progress = tqdm(total=self.training.max_train_steps, initial=self.step, unit="update", smoothing=0.05)
        self._meter.restart_clock()

    def _choose_checkpoint(self, wanted: str) -> Path | None:
        if wanted in ("latest", "auto"):
            found = checkpoints.find_latest(self.run_dir)
            # `auto` starts afresh only where there is nothing at all: a folder of damaged checkpoints is an error.
            if found is None and (wanted == "latest" or checkpoints.list_checkpoints(self.run_dir)):
                raise leave(EXIT_INPUT, f"no intact checkpoint in {self.run_dir}")
            return found
        checkpoint = Path(wanted)
        problems = checkpoints.verify(checkpoint) if checkpoint.is_dir() else ["no such folder"]
        if problems:
            raise leave(EXIT_INPUT, f"cannot resume from {checkpoint}: {'; '.join(problems)}")
        if checkpoint.resolve().parent == self.run_dir.resolve():
            newest = checkpoints.find_latest(self.run_dir)
            if newest is not None and step_of(newest) > step_of(checkpoint):
                raise leave(
                    EXIT_INPUT, f"{newest} is newer than {checkpoint}: continue an older one in another --output_dir"
                )
        return checkpoint

    def _load(self, checkpoint: Path) -> None:
        state = read_json(checkpoint / "run_state.json")
        for key, now in (("num_samples", self.order.num_samples), ("seed", self.order.seed)):
            if state[key] != now:
                raise leave(
                    EXIT_INPUT, f"{checkpoint} was trained with {key} {state[key]}, now it is {now}: start a new run"
                )
        settings = [{k: v for k, v in group.items() if k != "params"} for group in self.optimizer.param_groups]
        self.accelerator.load_state(str(checkpoint))
        self.accelerator.step = 0  # micro-steps: a checkpoint always lies between two updates
        for group, configured in zip(self.optimizer.param_groups, settings, strict=True):
            group.update(configured)  # the configuration rules, not the values of the interrupted run
        for name, module in self._state_modules.items():
            load_model(module, checkpoint / f"{name}.safetensors")
        self.step, self.consumed_samples = state["step"], state["consumed_samples"]
        set_schedule_step(self.lr_scheduler, self.step)
        self.resumed_plan = state["max_train_steps"]
        self._meter.load(state["meter"])
        if checkpoint.resolve().parent == self.run_dir.resolve():  # however its path was written
            self._resumed_from = self.run_dir / checkpoint.name
            self._saved.add(self._resumed_from)

    # ---- the loop ----

    def batches(self) -> Iterator[dict[str, Tensor]]:
        """Micro-batches on the device until `max_train_steps`. A requested stop saves and ends the process here."""
        training, accelerator = self.training, self.accelerator
        rank, processes = accelerator.process_index, accelerator.num_processes
        sampler = StreamSampler(self.order, training.train_batch_size, self.consumed_samples, rank, processes)
        loader = create_loader(
            self.dataset, sampler, training.dataloader_num_workers, accelerator.device.type == "cuda"
        )
        try:
            if self.step < training.max_train_steps:
                with self._data_wait():
                    stream = iter(loader)
            while self.step < training.max_train_steps:
                if self._micro_step == 0 and self.stop.agreed():
                    raise StopRequested
                with self._data_wait():
                    batch = next(stream)
                # Randomness is a function of the position, so that nothing of it has to be saved.
                torch.manual_seed(derive_seed(training.seed, self.step, self._micro_step, rank))
                yield send_to_device(batch, accelerator.device, non_blocking=True)
        except StopRequested:
            self._stop()

    def _data_wait(self) -> AbstractContextManager:
        return self._meter.data_wait(self.stop if self.accelerator.num_processes == 1 else None)

    def accumulate(self) -> AbstractContextManager:
        """Around one micro-batch: gradients are synchronised only at the last one of an update."""
        return self.accelerator.accumulate(self.model)

    def update(self, loss: Tensor, metrics: dict[str, Tensor] | None = None) -> None:
        """Backward; at the last micro-batch also clip, step, schedule, zero, EMA, count, log and checkpoint.

        Args:
            loss: scalar with gradient, the mean over this micro-batch.
            metrics: detached scalars, or pairs (sum, number of rows), the same keys every time; logged as means.
        """
        detached = loss.detach()
        # A non-finite loss makes every gradient NaN, on every process, whatever its own gradient was.
        self.accelerator.backward(loss * torch.where(torch.isfinite(detached), 1.0, torch.nan))
        self._meter.add({"loss": detached, **(metrics or {})})
        self._micro_step = (self._micro_step + 1) % self.training.gradient_accumulation_steps
        if not self.accelerator.sync_gradients:
            return
        limit = self.training.max_grad_norm or float("inf")
        grad_norm = torch.nn.utils.clip_grad_norm_(self._parameters, limit, foreach=True)
        learning_rate = self.lr_scheduler.get_last_lr()[0]
        self._step_unless_nonfinite(grad_norm)
        self.lr_scheduler.step()
        self.optimizer.zero_grad(set_to_none=True)
        if self.ema is not None:
            self.ema.update(self.network, self.step)
        self.step += 1
        self.consumed_samples += self.samples_per_update
        self._meter.add_update(grad_norm.detach())
        if self.is_due(self.training.logging_steps) or self.accelerator.device.type == "cpu":
            self._report_nonfinite()
        if self.is_due(self.training.logging_steps):
            self._log(learning_rate)
        if self.is_due(self.training.checkpointing_steps):
            self.save_checkpoint()
        if self._progress is not None:
            self._progress.update()

    def is_due(self, every: int | None) -> bool:
        """Whether an update has just been completed whose number is a multiple of `every` (never, if None)."""
        return bool(every) and self._micro_step == 0 and self.step % every == 0

    def _log(self, learning_rate: float) -> None:
        row = self._meter.flush(self.samples_per_update)
        row |= {"learning_rate": learning_rate, "epoch": self.consumed_samples / self.order.num_samples}
        if self._tracking is not None:
            self._tracking.log(self.step, row)
            self._progress.set_postfix_str(f"loss {row['loss']:.4g}")

    # ---- non-finite values ----

    def _step_unless_nonfinite(self, grad_norm: Tensor) -> None:
        """The optimiser step, which leaves weights and moments alone where the gradient is not finite.

        The verdict stays on the device: the fused kernel reads it there. Under `stop`, the first bad update blocks all
        later ones until the host reads it at the next log point.
        """
        bad = (~torch.isfinite(grad_norm)).float()
        self._first_bad = torch.where((self._first_bad < 0) & (bad > 0), self.step, self._first_bad)
        self._bad = self._bad + bad
        if self.training.on_nonfinite == "stop":
            bad = (self._bad > 0).float()
        if self._gated:
            self.optimizer.optimizer.found_inf = bad
        elif bad:  # 8-bit AdamW has no such input: one host synchronisation
            return
        self.optimizer.step()

    def _report_nonfinite(self) -> None:
        count = int(self._bad)
        if count == 0:
            return
        step = int(self._first_bad)
        first_position = self.consumed_samples - (self.step - step) * self.samples_per_update
        samples = [int(key) for key in self.order.keys(first_position, min(self.samples_per_update, 64))]
        self._bad.zero_()
        self._first_bad.fill_(-1)
        self._nonfinite += count
        what = f"non-finite loss or gradient in update {step + 1}; its samples: {samples}"
        if self.training.on_nonfinite == "skip" and self._nonfinite <= self.training.max_nonfinite_skips:
            logger.warning("%s; skipped (%d so far)", what, self._nonfinite)
            return
        self._close()
        raise leave(EXIT_NONFINITE, f"{what}; the weights are those before it; last checkpoint: {self._newest()}")

    def _newest(self) -> str:
        found = checkpoints.list_checkpoints(self.run_dir)
        return str(found[0]) if found else "none"

    # ---- checkpoints, validation, end ----

    def save_checkpoint(self) -> None:
        """Write `checkpoint-<step>`; called by all processes. Afterwards the oldest beyond the limit is deleted."""
        final = self.run_dir / f"checkpoint-{self.step}"
        if final in self._saved:
            return
        self._report_nonfinite()
        temporary = final.with_name(final.name + ".tmp")
        meter = self._meter.state()
        if self.accelerator.is_main_process:
            checkpoints.begin(self.run_dir, self.step)
        self.accelerator.wait_for_everyone()
        self.accelerator.save_state(str(temporary))
        if self.accelerator.is_main_process:
            for name, module in self._state_modules.items():
                save_model(module, str(temporary / f"{name}.safetensors"))
            state = {"step": self.step, "consumed_samples": self.consumed_samples, "meter": meter}
            state |= {"seed": self.order.seed, "num_samples": self.order.num_samples}
            state |= {"max_train_steps": self.training.max_train_steps}
            write_json(temporary / "run_state.json", state)
        self.accelerator.wait_for_everyone()
        self._saved.add(final)
        if self.accelerator.is_main_process:
            checkpoints.commit(temporary)
            training = self.training
            checkpoints.rotate(
                self.run_dir,
                training.checkpoints_total_limit,
                training.keep_every_n_steps,
                trusted=self._saved,
                kept={self._resumed_from, self._best_checkpoint()},
            )
        self.accelerator.wait_for_everyone()
        self._meter.restart_clock()

    def validate(
        self, function: Callable[[ModelMixin], tuple[dict[str, float], dict[str, Image.Image]]]
    ) -> dict[str, float]:
        """Run `function(inference_model) -> (scalars, pictures)` on the main process and log what it returns.

        It cannot change the run (weights, modes and random state are as before) and running out of memory does not
        end it. Returns the scalars, on every process; none where it did not come to an end.
        """
        scalars: dict[str, float] = {}
        self.accelerator.wait_for_everyone()
        if self.accelerator.is_main_process:
            model, devices = self.inference_model, [self.accelerator.device]
            was_training = model.training
            with torch.random.fork_rng(devices if devices[0].type == "cuda" else []), torch.no_grad():
                try:
                    with self.stop.interruptible(), self.accelerator.autocast():
                        scalars, pictures = function(model.eval())
                    self._tracking.log(self.step, {f"validation/{k}": v for k, v in scalars.items()}, pictures)
                except torch.OutOfMemoryError as error:
                    logger.warning("validation ran out of memory and is skipped: %s", str(error).splitlines()[0])
                except StopRequested:
                    pass  # the loop saves and leaves before the next update
                finally:
                    model.train(was_training)
        scalars = broadcast_object_list([scalars])[0]
        self._meter.restart_clock()
        return scalars

    def keep_best(self, score: float | None) -> None:
        """Make this update's checkpoint a milestone if `score`, higher is better, exceeds all before it.

        The best one is named in best.json and is not deleted until a better one exists; None is no score.
        """
        # compared in memory, where every process comes to the same answer
        if score is None or not score > self._best.get("score", float("-inf")):  # nor is NaN the best
            return
        self.save_checkpoint()
        self._best = {"step": self.step, "score": score}
        if self.accelerator.is_main_process:
            temporary = self.run_dir / "best.json.tmp"
            write_json(temporary, self._best)
            temporary.rename(self.run_dir / "best.json")

    def _best_checkpoint(self) -> Path | None:
        return self.run_dir / f"checkpoint-{self._best['step']}" if self._best else None

    def finish(self, pipeline: DiffusionPipeline | ModelMixin) -> None:
        """Final checkpoint, pipeline or network for `from_pretrained(output_dir)`, logs closed."""
        self.save_checkpoint()
        if self.accelerator.is_main_process:
            export_pipeline(self.run_dir, pipeline)
        self._close()

    def _stop(self) -> None:
        self.save_checkpoint()
        self._close()
        abandon_workers()
        raise leave(EXIT_RESUME, f"stopped at update {self.step}; continue with --resume_from_checkpoint latest")

    def _close(self) -> None:
        if self._tracking is not None:
            self._progress.close()
            self._tracking.close()
        self.stop.release()
        self.accelerator.wait_for_everyone()
        self.accelerator.end_training()
        if self._lock is not None:
            self._lock.close()
