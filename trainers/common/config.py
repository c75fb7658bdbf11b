"""The section that every run shares."""

from __future__ import annotations

import difflib
import logging
import math
from pathlib import Path
from typing import Annotated, ClassVar, Literal, Self

from pydantic import Field, model_validator

from backlot.config import Section, Settings, checked

logger = logging.getLogger(__name__)


class TrainingConfig(Section):
    """What every run shares. Process count, precision and sharding belong to the file given to `accelerate launch`."""

    output_dir: Path
    """The run's folder: checkpoints, logs and, at its end, the pipeline."""
    seed: int = Field(0, ge=0, lt=2**63)
    """Data order, noise and augmentation are functions of it."""
    max_train_steps: int | None = Field(None, gt=0)
    """Optimiser updates. A finished run goes on when this is raised."""
    num_epochs: int | None = Field(None, gt=0)
    """Passes over the data, in place of `max_train_steps`."""
    train_batch_size: int = Field(gt=0)
    """Samples per process and micro-batch."""
    gradient_accumulation_steps: int = Field(1, gt=0)
    """Micro-batches per update."""
    dataloader_num_workers: int = Field(0, ge=0)
    """Loader processes per training process; the samples do not depend on it."""

    learning_rate: float = Field(1e-4, gt=0)
    """Peak learning rate; not scaled by batch size or process count."""
    learning_rate_factors: dict[str, Annotated[float, Field(gt=0)]] = {}
    """Factors on it for parameters whose names begin with a prefix, {"encoder.": 0.1}; the longest prefix rules."""
    lr_scheduler: Literal[
        "constant",
        "constant_with_warmup",
        "linear",
        "cosine",
        "cosine_with_restarts",
        "polynomial",
        "warmup_stable_decay",
        "inverse_sqrt",
    ] = "constant"
    """diffusers' schedules by name, counted in updates; `warmup_stable_decay`: constant, then linear to 0 at the end;
    `inverse_sqrt`: (1 - .999^(n+1)) / sqrt(1 + n / 200000)."""
    lr_warmup_steps: int = Field(0, ge=0)
    """Updates of linear warm-up (schedules that have one)."""
    lr_decay_steps: int = Field(0, ge=0)
    """Last updates over which `warmup_stable_decay` falls."""
    adam_beta1: float = Field(0.9, ge=0, lt=1)
    adam_beta2: float = Field(0.999, ge=0, lt=1)
    adam_epsilon: float = Field(1e-8, gt=0)
    adam_weight_decay: float = Field(0.01, ge=0)
    decay_all_parameters: bool = False
    """Decay biases, norms and embeddings too."""
    use_8bit_adam: bool = False
    """AdamW with 8-bit state (bitsandbytes; pip install 'backlot[gpu]')."""
    max_grad_norm: float | None = Field(1.0, ge=0)
    """Clip the gradient's norm; null or 0 only measures it."""
    on_nonfinite: Literal["stop", "skip"] = "stop"
    """A NaN or infinite loss or gradient never reaches the weights: `stop` ends the run (exit code 3)."""
    max_nonfinite_skips: int = Field(10, ge=1)
    """More skipped updates than this in one process's life end the run."""

    use_ema: bool = True
    """Keep an exponential moving average of the weights: validation and the exported pipeline use it."""
    ema_decay: float = Field(0.999, ge=0, lt=1)
    """Share of the average that each update keeps; 0 follows the weights."""
    ema_ramp: bool = False
    """Start with decay (1 + n) / (10 + n) until it exceeds `ema_decay`."""

    mixed_precision: Literal["no", "bf16", "fp16"] | None = None
    """null: as the launch configuration says. Weights stay float32; fp16 scales the loss by itself."""
    gradient_checkpointing: bool = False
    """Recompute activations in the backward pass: less memory, about a third more work."""
    attention_backend: str = "native"
    """diffusers' attention dispatcher: native, flash, xformers, flex, ...; tried out before training starts."""
    torch_compile: bool = False
    """Compile the network."""
    expected_processes: int | None = Field(None, gt=0)
    """Refuse to start with another process count (a wrong launch line otherwise trains on one process in silence)."""

    checkpointing_steps: int = Field(500, gt=0)
    """A checkpoint every so many updates, besides the one at the end."""
    checkpointing_epochs: int | None = Field(None, gt=0)
    """A checkpoint every so many passes over the data, in place of `checkpointing_steps`."""
    checkpoints_total_limit: int | None = Field(2, gt=0)
    """Keep this many valid checkpoints; null keeps all."""
    keep_every_n_steps: int | None = Field(None, gt=0)
    """Checkpoints at multiples of this are milestones and never deleted."""
    async_checkpoints: bool | None = None
    """Hash and flush checkpoints in a thread while training goes on; null: where the state is larger than 64 MiB."""
    resume_from_checkpoint: str | None = None
    """`latest` continues the run in `output_dir`; `auto` does so if there is one; or a checkpoint's path."""
    resume_with_changes: list[str] = []
    """Keys or sections (`model.dropout`, `objective`, and `data`, `num_samples`, `frozen` for what is read) that may
    differ from the run that is resumed though they make it another experiment."""

    logging_steps: int = Field(50, gt=0)
    """A row of metrics (means since the last one) every so many updates."""
    report_to: list[Literal["tensorboard", "wandb"]] = ["tensorboard"]
    """Trackers beside metrics.jsonl."""

    @model_validator(mode="after")
    def _check(self) -> TrainingConfig:
        schedule = self.lr_scheduler
        if self.lr_warmup_steps and schedule in ("constant", "inverse_sqrt"):
            raise ValueError(f"`lr_warmup_steps` has no effect on lr_scheduler {schedule}: try constant_with_warmup")
        if self.lr_decay_steps and schedule != "warmup_stable_decay":
            raise ValueError(f"`lr_decay_steps` has no effect on lr_scheduler {schedule}, only on warmup_stable_decay")
        if self.max_train_steps is None and self.num_epochs is None:
            raise ValueError("`max_train_steps` or `num_epochs` is required")
        if self.num_epochs is None and self.lr_warmup_steps + self.lr_decay_steps > self.max_train_steps:
            raise ValueError(
                f"`lr_warmup_steps` ({self.lr_warmup_steps}) and `lr_decay_steps` ({self.lr_decay_steps}) exceed "
                f"`max_train_steps` ({self.max_train_steps})"
            )
        return self


# What may change when a run is resumed: the rest decides what is trained, on what, from which noise.
MAY_CHANGE = frozenset(
    f"training.{key}"
    for key in [
        "output_dir",
        "max_train_steps",
        "num_epochs",
        "checkpointing_epochs",
        "train_batch_size",
        "gradient_accumulation_steps",
        "dataloader_num_workers",
        "learning_rate",
        "learning_rate_factors",
        "lr_scheduler",
        "lr_warmup_steps",
        "lr_decay_steps",
        "adam_beta1",
        "adam_beta2",
        "adam_epsilon",
        "adam_weight_decay",
        "decay_all_parameters",
        "max_grad_norm",
        "on_nonfinite",
        "max_nonfinite_skips",
        "ema_decay",
        "ema_ramp",
        "mixed_precision",
        "gradient_checkpointing",
        "attention_backend",
        "torch_compile",
        "expected_processes",
        "checkpointing_steps",
        "checkpoints_total_limit",
        "keep_every_n_steps",
        "async_checkpoints",
        "resume_from_checkpoint",
        "resume_with_changes",
        "logging_steps",
        "report_to",
    ]
)


# What must be the same besides the configuration; these names, too, may stand in `resume_with_changes`.
IDENTITY = {
    "seed": "of the order of samples",
    "num_samples": "their number",
    "data": "their fingerprint",
    "frozen": "the checksum of the frozen base",
}


class RunConfig(Settings):
    """The root of a script's configuration; a script adds its own sections."""

    may_change: ClassVar[frozenset[str]] = frozenset({"validation"})
    """Keys or sections of the script that a resumed run may change: where data lie, how it is validated."""
    training: TrainingConfig

    def in_updates(self, num_samples: int, num_processes: int) -> Self:
        """With passes over the data counted in updates, now that its length is known; then all is checked again."""
        training = self.training
        updates = num_samples / (training.train_batch_size * training.gradient_accumulation_steps * num_processes)
        passes = {"max_train_steps": training.num_epochs, "checkpointing_steps": training.checkpointing_epochs}
        counted: dict = {key: math.ceil(value * updates) for key, value in passes.items() if value}
        if not counted:
            return self
        for key, value in counted.items():
            logger.info("training.%s is %d: %d passes over %d samples", key, value, passes[key], num_samples)
        return checked(self, {"training": {**counted, "num_epochs": None, "checkpointing_epochs": None}})

    @model_validator(mode="after")
    def _check_changes(self) -> RunConfig:
        leaves = _leaves(self.model_dump(mode="json"))
        known = {*IDENTITY, *leaves, *(key.rsplit(".", depth)[0] for key in leaves for depth in (1, 2))}
        for key in self.training.resume_with_changes:
            if key not in known:
                close = difflib.get_close_matches(key, sorted(known), 1)
                hint = f"; did you mean {close[0]}?" if close else ""
                raise ValueError(f"`training.resume_with_changes`: there is no key or section {key!r}{hint}")
        return self

    def differences(self, other: dict) -> list[str]:
        """Keys in which this is another experiment than `other` (what `model_dump(mode="json")` gave then)."""
        allowed = MAY_CHANGE | self.may_change | set(self.training.resume_with_changes)
        mine, theirs = _leaves(self.model_dump(mode="json")), _leaves(other)
        return [
            f"{key}: {theirs.get(key)!r} then, {mine.get(key)!r} now"
            for key in sorted(mine.keys() | theirs.keys())
            # a key that did not exist then had no effect
            if key in theirs and mine.get(key) != theirs[key] and not _is_within(key, allowed)
        ]


def _leaves(values: dict, prefix: str = "") -> dict:
    leaves = {}
    for key, value in values.items():
        leaves |= _leaves(value, f"{prefix}{key}.") if isinstance(value, dict) else {prefix + key: value}
    return leaves


def _is_within(key: str, allowed: frozenset[str] | set[str]) -> bool:
    parts = key.split(".")
    return any(".".join(parts[: i + 1]) in allowed for i in range(len(parts)))
