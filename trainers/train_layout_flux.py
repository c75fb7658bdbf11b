"""Train a layout adapter on a frozen FLUX, in three stages: boxes, identity, feedback (arXiv 2509.16691, 2506.21416).

    accelerate launch -q --config_file accelerate_configs/h100x8_ddp.yaml trainers/train_layout_flux.py \\
        --config configs/layout_flux/stage1.yaml                then stage2.yaml, and stage3.yaml
    ... --resume_from_checkpoint latest        continue where it stopped
    ... --init_from CHECKPOINT                 start from other weights than those of the stage before

What trains, and which loss weighs what, stands in the configuration; `stage: base` trains a small FLUX itself. The data
are what data_prep.layouts prepare writes; the mathematics of the losses is in objectives/layout.py.
"""

from __future__ import annotations

import logging
from datetime import datetime
from pathlib import Path
from typing import Any, Literal

import lazy_loader
from pydantic import Field, model_validator

import backlot
import objectives
from backlot.command_line import input_errors
from backlot.config import Section, checked
from data_prep import layouts
from objectives.layout_settings import DropoutConfig, IdentityConfig, LossWeights, RegionConfig, TimestepConfig
from pipelines import layout_flux
from pipelines.layout_flux import settings
from trainers import common
from trainers.common import checkpoints
from trainers.common.config import RunConfig, TrainingConfig
from trainers.common.startup import load_config

torch = lazy_loader.load("torch")  # like the packages above: a wrong configuration is answered before it loads
logger = logging.getLogger(__name__)


class DataConfig(Section):
    output_dir: Path = Path("output_data")
    """What data_prep.layouts prepare has written."""


class LayoutTrainingConfig(TrainingConfig):
    iteration_unit: Literal["optimizer", "micro"] = "optimizer"
    """What the counts of a configuration mean: updates, or micro-batches (then they are divided, once, at the start)."""
    lr_groups: dict[settings.Part, float] = {}
    """Learning rates of parts, in place of `learning_rate`."""
    resolution: int | None = Field(None, gt=0)
    """Side in pixels that the prepared pictures must have; null: whatever it is."""


class Config(RunConfig):
    aliases = settings.ALIASES
    may_change = RunConfig.may_change | settings.MAY_CHANGE
    stage: settings.Stage
    """1 boxes, 2 identity, 3 feedback; `base`: a small FLUX without any of it."""
    init_from: str | None = None
    """Checkpoint, run or stage whose weights it starts from; null: stages 2 and 3 look beside `training.output_dir`,
    for stage1 and stage2."""
    logging_dir: Path | None = Path("runs/logs")
    """Gets a folder stage<N>_YYYYMMDD_HHMMSS that is the run's TensorBoard log; null for none."""
    model: settings.ModelConfig = settings.ModelConfig()
    trainable: settings.TrainableConfig = settings.TrainableConfig()
    lora: settings.LoraConfig = settings.LoraConfig()
    modulation: settings.ModulationConfig = settings.ModulationConfig()
    bridge: settings.BridgeConfig = settings.BridgeConfig()
    adapter: dict[str, Any] | None = None
    """What the adapter is made of. Filled in by the run, for whoever loads a checkpoint."""
    data: DataConfig = DataConfig()
    loss_weights: LossWeights = LossWeights()
    timesteps: TimestepConfig = TimestepConfig()
    dropout: DropoutConfig = DropoutConfig()
    dino: IdentityConfig = IdentityConfig()
    region_preservation: RegionConfig = RegionConfig()
    training: LayoutTrainingConfig
    validation: settings.ValidationConfig = settings.ValidationConfig()

    @model_validator(mode="after")
    def _check(self) -> Config:
        training, trains = self.training, self.trainable.names
        if self.stage != "base" and not trains:
            raise ValueError("`trainable` names no part: nothing would train")
        if stray := sorted(set(training.lr_groups) - trains):
            raise ValueError(f"`training.lr_groups` names {', '.join(stray)}, which `trainable` leaves as it is")
        if self.loss_weights.dino_identity and self.stage in ("base", "1"):
            raise ValueError(f"`loss_weights.dino_identity` must be 0: stage {self.stage} has no identity to keep")
        if training.num_epochs and training.iteration_unit == "micro":
            raise ValueError("`training.num_epochs` counts passes: `iteration_unit` micro has no meaning beside it")
        return self

    def in_updates(self, num_samples: int, num_processes: int) -> Config:
        """Counts of micro-batches become counts of updates."""
        config = super().in_updates(num_samples, num_processes)
        if config.training.iteration_unit == "optimizer":
            return config
        each = config.training.gradient_accumulation_steps

        def in_updates(section: Section, *keys: str) -> dict[str, int]:
            return {key: -(-value // each) for key in keys if (value := getattr(section, key))}

        counts = in_updates(config.training, *COUNTS)
        changes = {"training": counts | {"iteration_unit": "optimizer"}}
        return checked(config, changes | {"validation": in_updates(config.validation, "validation_steps")})


def find_start(config: Config) -> tuple[Config, Path | None]:
    """Where the adapter's weights come from, if from anywhere; and the configuration, its resume spelt out.

    A checkpoint of another stage that is to be resumed is what this stage starts from.
    """
    training, start = config.training, config.init_from
    resumed = training.resume_from_checkpoint and settings.canonical_path(training.resume_from_checkpoint)
    if resumed in ("latest", "auto"):
        found = checkpoints.find_latest(training.output_dir)
        if found is not None or resumed == "latest":
            return config, found
    elif resumed:
        stage = settings.stage_of(Path(resumed))
        if stage in (None, config.stage):
            return checked(config, {"training": {"resume_from_checkpoint": resumed}}), Path(resumed)
        logger.warning("%s is of stage %s: stage %s starts from its weights", resumed, stage, config.stage)
        config, start = checked(config, {"training": {"resume_from_checkpoint": None}}), resumed
    if start is None and config.stage in ("2", "3"):
        start = str(training.output_dir.parent / f"stage{int(config.stage) - 1}")
    return config, None if start is None else Path(settings.canonical_path(start))


def create_adapter(config: Config, transformer, widths: dict[str, int], start: Path | None):
    """The adapter with all parts that train or that `start` has, with its weights; what trains requires a gradient."""
    sections = config.model, config.lora, config.modulation, config.bridge

    def create(parts: set[str]):
        torch.manual_seed(config.training.seed)
        given = settings.adapter_settings(*sections, parts) | widths
        return layout_flux.FluxLayoutAdapter.for_transformer(transformer, **given)

    trains, absent, left = config.trainable.names, set(settings.PARTS), []
    if start is not None:
        whole = create(absent)
        lacks = set(common.load_weights(whole, start, strict=False))
        absent = {part for part, names in whole.parts().items() if lacks.issuperset(names)}
    adapter = create(set(settings.PARTS) - absent | trains)
    if start is not None:
        may_lack = [name for part in absent for name in adapter.parts()[part]]
        left = common.load_weights(adapter, start, may_lack=may_lack)
        logger.info("weights of %s; new: %s", start, ", ".join(sorted(absent & trains)) or "nothing")
    adapter.set_trainable(trains)
    return adapter


def create_model(config: Config, dataset, start: Path | None, dtype):
    """The base's pipeline without text encoders, and the network that trains, with an adapter but for stage `base`."""
    name, vae = config.model.pretrained_model_name_or_path, config.model.vae
    with input_errors("model"):
        if config.stage == "base":
            pipeline = layout_flux.base.create_pipeline(name, vae, config.model.transformer)
            return pipeline, layout_flux.LayoutFlux(pipeline.transformer)
        pipeline = layout_flux.base.load_pipeline(name, vae, dtype)
    with input_errors("init_from"):
        adapter = create_adapter(config, pipeline.transformer, dataset.widths, start)
    return pipeline, layout_flux.LayoutFlux(pipeline.transformer, adapter)


def complete(config: Config, adapter) -> Config:
    """The configuration with what the adapter is made of, and the factors that learning rates of its parts make."""
    training = config.training
    factors = {
        settings.prefix_of(name): rate / training.learning_rate
        for part, rate in training.lr_groups.items()
        for name in adapter.parts()[part]
    }
    made_of = {key: value for key, value in adapter.config.items() if not key.startswith("_")}
    return checked(config, {"adapter": made_of, "training": {"learning_rate_factors": factors}})
