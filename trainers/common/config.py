"""Configuration: typed sections, YAML files, command-line overrides, and errors a person can act on.

Light on purpose (no torch): a typo is answered before anything heavy is imported or any file is touched.
"""

from __future__ import annotations

import difflib
import reprlib
import sys
from pathlib import Path
from typing import ClassVar, Literal, TypeVar

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator
from pydantic_settings import BaseSettings, PydanticBaseSettingsSource, SettingsConfigDict, SettingsError

EXIT_CONFIG = 2
MAX_FILE_BYTES = 1_000_000


class Section(BaseModel):
    """One section of a configuration: unknown keys are errors, values never change, the docstring is the help."""

    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True, allow_inf_nan=False)


class TrainingConfig(Section):
    """What every run shares. Process count, precision and sharding belong to the file given to `accelerate launch`."""

    output_dir: Path
    """The run's folder: checkpoints, logs and, at its end, the pipeline."""
    seed: int = Field(0, ge=0, lt=2**63)
    """Data order, noise and augmentation are functions of it."""
    max_train_steps: int = Field(gt=0)
    """Optimiser updates. A finished run goes on when this is raised."""
    train_batch_size: int = Field(gt=0)
    """Samples per process and micro-batch."""
    gradient_accumulation_steps: int = Field(1, gt=0)
    """Micro-batches per update."""
    dataloader_num_workers: int = Field(0, ge=0)
    """Loader processes per training process; the samples do not depend on it."""

    learning_rate: float = Field(1e-4, gt=0)
    """Peak learning rate; not scaled by batch size or process count."""
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

    mixed_precision: Literal["no", "bf16"] | None = None
    """null: as the launch configuration says."""
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
    checkpoints_total_limit: int | None = Field(2, gt=0)
    """Keep this many valid checkpoints; null keeps all."""
    keep_every_n_steps: int | None = Field(None, gt=0)
    """Checkpoints at multiples of this are milestones and never deleted."""
    resume_from_checkpoint: str | None = None
    """`latest` continues the run in `output_dir`; `auto` does so if there is one; or a checkpoint's path."""

    logging_steps: int = Field(50, gt=0)
    """A row of metrics (means since the last one) every so many updates."""
    report_to: list[Literal["tensorboard", "wandb"]] = ["tensorboard"]
    """Trackers beside metrics.jsonl."""

    @model_validator(mode="after")
    def _check(self) -> TrainingConfig:
        if self.lr_warmup_steps + self.lr_decay_steps > self.max_train_steps:
            raise ValueError(
                f"`lr_warmup_steps` ({self.lr_warmup_steps}) and `lr_decay_steps` ({self.lr_decay_steps}) exceed "
                f"`max_train_steps` ({self.max_train_steps})"
            )
        return self


class RunConfig(BaseSettings):
    """The root of a script's configuration; a script adds its own sections."""

    model_config = SettingsConfigDict(
        extra="forbid", frozen=True, use_attribute_docstrings=True, cli_parse_none_str="null", cli_avoid_json=True
    )
    aliases: ClassVar[dict[str, str]] = {}
    """Further names on the command line, and the keys they stand for."""
    training: TrainingConfig

    @classmethod
    def settings_customise_sources(
        cls,
        settings_cls: type[BaseSettings],
        init_settings: PydanticBaseSettingsSource,
        **_: PydanticBaseSettingsSource,
    ) -> tuple[PydanticBaseSettingsSource, ...]:
        return (init_settings,)  # nothing from the environment


ConfigT = TypeVar("ConfigT", bound=RunConfig)


def load_config(config_class: type[ConfigT], argv: list[str] | None = None) -> ConfigT:
    """Read `--config FILE` (repeatable, later files win), then `--section.key value` overrides.

    A key's last part is enough where it is unique (`--learning_rate 1e-4`). Whatever is wrong is printed, all of it,
    one line each, and the process exits with code 2.
    """
    argv = sys.argv[1:] if argv is None else list(argv)
    keys = _keys(config_class)
    files, overrides, problems = _split_arguments(argv, keys, config_class.aliases)
    values: dict = {}
    for file in files:
        _merge(values, _read_yaml(file, problems))
    try:
        config = config_class(_cli_parse_args=overrides, **values)
    except ValidationError as error:
        problems += [_explain(detail, keys) for detail in error.errors()]
    except SettingsError as error:
        problems.append(str(error))
    if problems:
        lines = "\n".join(f"  {problem}" for problem in problems)
        print(f"configuration refused:\n{lines}", file=sys.stderr)
        raise SystemExit(EXIT_CONFIG)
    return config


def dump_config(config: RunConfig) -> str:
    """The resolved configuration as YAML that `load_config` reads back to the same values."""
    return yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False, allow_unicode=True)


def _keys(model: type[BaseModel], prefix: str = "") -> list[str]:
    """Every leaf key of a configuration class in dotted form."""
    keys = []
    for name, field in model.model_fields.items():
        if isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel):
            keys += _keys(field.annotation, f"{prefix}{name}.")
        else:
            keys.append(prefix + name)
    return keys


def _split_arguments(
    argv: list[str], keys: list[str], aliases: dict[str, str]
) -> tuple[list[str], list[str], list[str]]:
    """Separate --config files from overrides, spell out short keys, and collect what is not understood."""
    files, overrides, problems = [], [], []
    arguments = iter(argv)
    for argument in arguments:
        if argument in ("-h", "--help"):
            overrides.append("--help")
            continue
        if not argument.startswith("--"):
            problems.append(f"unexpected argument {argument!r} (expected --key value)")
            continue
        name, equals, value = argument[2:].partition("=")
        name = aliases.get(name, name)
        if not equals:
            value = next(arguments, None)
        if value is None:
            problems.append(f"--{name} lacks a value")
        elif name == "config":
            files.append(value)
        else:
            matches = [name] if name in keys else [key for key in keys if key.rpartition(".")[2] == name]
            if len(matches) == 1:
                overrides.append(f"--{matches[0]}={value}")
            elif matches:
                problems.append(f"--{name} is ambiguous: {', '.join('--' + key for key in matches)}")
            else:
                problems.append(f"unknown key --{name}{_suggest(name, keys)}")
    return files, overrides, problems


def _read_yaml(file: str, problems: list[str]) -> dict:
    path = Path(file)
    try:
        if path.stat().st_size > MAX_FILE_BYTES:
            problems.append(f"{file}: larger than {MAX_FILE_BYTES} bytes, not a configuration")
            return {}
        values = yaml.safe_load(path.read_text(encoding="utf-8"))
    except OSError as error:
        problems.append(f"--config {file}: {error.strerror}")
        return {}
    except (yaml.YAMLError, UnicodeDecodeError, RecursionError) as error:
        problems.append(f"{file} is not YAML: {' '.join(str(error).split())}")
        return {}
    if not isinstance(values, dict):
        problems.append(f"{file} must hold sections of `key: value` lines")
        return {}
    return values


def _merge(into: dict, values: dict) -> None:
    for key, value in values.items():
        if isinstance(value, dict) and isinstance(into.get(key), dict):
            _merge(into[key], value)
        else:
            into[key] = value


def _explain(detail: dict, keys: list[str]) -> str:
    """One pydantic error as one line: key, value, what is allowed."""
    key = ".".join(str(part) for part in detail["loc"])
    if detail["type"] == "extra_forbidden":
        return f"unknown key {key}{_suggest(key, keys)}"
    if detail["type"] == "missing":
        return f"{key} is required"
    message = detail["msg"].removeprefix("Value error, ")
    if isinstance(detail["input"], dict):
        return f"{key}: {message}" if key else message
    # reprlib: a few lines of YAML aliases can stand for gigabytes
    return f"{key} = {reprlib.repr(detail['input'])}: {message[0].lower()}{message[1:]}"


def _suggest(key: str, keys: list[str]) -> str:
    """The nearest known key, compared in full and by its last part."""
    leaves = {known.rpartition(".")[2]: known for known in keys}
    close = difflib.get_close_matches(key, keys, 1, 0.75)
    close = close or [leaves[leaf] for leaf in difflib.get_close_matches(key.rpartition(".")[2], leaves, 1, 0.6)]
    return f"; did you mean {close[0]}?" if close else ""
