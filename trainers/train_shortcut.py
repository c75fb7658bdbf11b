"""Train an image model that generates in one step, or in as many as you like (shortcut models, arXiv 2410.12557).

    accelerate launch -q --config_file accelerate_configs/cpu.yaml trainers/train_shortcut.py \\
        --config configs/shortcut/digits.yaml
    ... --resume_from_checkpoint latest            continue where it stopped
    ... --objective.name flow_matching             a baseline on the same network, data and budget

Top to bottom: what can be set, the loss of one micro-batch, validation, the loop. See also objectives.
"""

from __future__ import annotations

import copy
import logging
from typing import ClassVar, Literal

import lazy_loader
from pydantic import Field, model_validator

import backlot
import objectives
from backlot.command_line import input_errors
from backlot.config import Section
from data_prep import images
from objectives.settings import ObjectiveConfig
from pipelines import shortcut
from trainers import common
from trainers.common.config import RunConfig
from trainers.common.startup import load_config

torch = lazy_loader.load("torch")  # like the packages above: a wrong configuration is answered before it loads
logger = logging.getLogger(__name__)


class ModelConfig(Section):
    size: Literal["tiny", "S", "B", "L", "XL"] = "B"
    """Shape of the transformer (pipelines.shortcut.SIZES)."""
    hidden_size: int | None = Field(None, gt=0)
    """Another width than the size's."""
    num_layers: int | None = Field(None, gt=0)
    """Another depth than the size's."""
    patch_size: int | None = Field(None, gt=0)
    """Another patch side than the size's."""
    official: bool = False
    """The network of the paper's code: step size as log2 level, raw times, logits over head_dim, no adaLN-Zero."""
    use_shortcut: bool = True
    """Tell the network its step size; false for baselines whose network ignores it."""
    dropout: float = Field(0.0, ge=0, lt=1)
    """Dropout in the transformer's MLPs."""


class DataConfig(Section):
    dataset_name: Literal["digits", "mnist", "imagefolder", "hub", "latents"] = "digits"
    """`digits` is bundled with scikit-learn; `latents` is a folder written by data_prep.images.encode."""
    path: str | None = None
    """Folder of the files, or the hub's dataset name."""
    image_size: int | None = Field(None, gt=0)
    """Resize the shorter side to this and crop the centre."""
    horizontal_flip: bool = False
    """Mirror half of the samples."""
    image_column: str = "image"
    label_column: str | None = "label"
    max_bad_fraction: float = Field(0.01, ge=0, lt=1)
    """Stop when more than this share of the images cannot be read; up to it they are listed and replaced."""
    vae: str | None = None
    """The VAE (folder or hub name) whose latents are the data; it is exported with the pipeline."""


class ValidationConfig(Section):
    validation_steps: int | None = Field(1000, gt=0)
    """Draw samples and measure the held-out loss every so many updates; null for never."""
    num_images_per_row: int = Field(10, gt=0)
    num_inference_steps: list[int] = Field([1, 2, 4, 32], min_length=1)
    """One row of samples for each; all start from the same noise, every time."""
    num_samples: int = Field(256, gt=1)
    """Held-out samples for the loss."""


class Config(RunConfig):
    may_change: ClassVar[frozenset[str]] = frozenset({"validation", "data.path", "data.max_bad_fraction"})
    model: ModelConfig = ModelConfig()
    data: DataConfig = DataConfig()
    objective: ObjectiveConfig = ObjectiveConfig()
    validation: ValidationConfig = ValidationConfig()

    @model_validator(mode="after")
    def _check(self) -> Config:
        name, shortcuts = self.objective.name, self.model.use_shortcut
        distils = name in ("progressive", "consistency", "consistency_distillation")
        if self.model.official and shortcuts and self.objective.smallest_step != "lattice":
            raise ValueError("`model.official` embeds log2 of the step size: set objective.smallest_step to lattice")
        if name in ("shortcut", "live_reflow") and not shortcuts:
            raise ValueError(f"`model.use_shortcut` is false, but a {name} model has to know its step size")
        if distils and shortcuts:
            raise ValueError(f"`model.use_shortcut` must be false: {name} trains no step sizes")
        if name in ("shortcut", "live_reflow") and self.training.train_batch_size < 2:
            raise ValueError(f"`training.train_batch_size` must be at least 2: {name} needs rows of two kinds")
        learns_from_ema = distils or (name == "shortcut" and self.objective.teacher == "ema")
        if learns_from_ema and not self.training.use_ema:
            raise ValueError(f"`training.use_ema` is false, but {name} learns from the EMA")
        if (self.data.dataset_name == "latents") != (self.data.vae is not None):
            raise ValueError("`data.vae` names the VAE of a latents dataset; give both or neither")
        if self.data.dataset_name in ("imagefolder", "hub", "latents") and self.data.path is None:
            raise ValueError(f"`data.path` is required for {self.data.dataset_name}")
        return self


def compute_loss(run: common.TrainingRun, batch: dict, config: Config, teacher=None, model=None):
    """The loss of one micro-batch: {latents or pixel_values (B, C, H, W), class_labels (B,)} -> (scalar, metrics).

    `model` takes the place of the network in training (validation measures the EMA).
    """
    data, labels = batch.get("latents", batch.get("pixel_values")), batch["class_labels"]
    conditions = {"class_labels": labels}
    null = {"class_labels": torch.full_like(labels, run.network.config.num_classes)}
    network = as_network(run.model if model is None else model)
    online, ema = as_network(run.network), as_network(run.ema)
    objective = config.objective
    if objective.name == "shortcut":
        draws = objectives.shortcut.draw(data, objective, *run.micro_batch)
        half_steps = ema if objective.teacher == "ema" else online
        return objectives.shortcut.shortcut_loss(network, half_steps, data, conditions, null, draws, objective)

    noise, t = torch.randn_like(data), torch.rand(len(data), device=data.device)
    if objective.name in ("flow_matching", "live_reflow") or objective.condition_dropout_prob == 1:
        drop = torch.rand(len(data), device=data.device) < objective.condition_dropout_prob
        conditions = objectives.rectified_flow.where_rows(drop, null, conditions)
    if objective.name == "flow_matching":
        return objectives.rectified_flow.flow_matching_loss(
            network, noise, data, t, conditions, step_size=objective.flow_step_size, path_eps=objective.path_eps
        )
    if objective.name == "live_reflow":
        rows = objectives.shortcut.count_bootstrap_rows(len(data), objective)
        return objectives.reflow.live_reflow_loss(network, noise, data, t, conditions, null, rows, objective)
    teacher = as_network(teacher) if teacher is not None else None
    return objectives.distillation.distillation_loss(
        network, ema, teacher, noise, data, conditions, null, run.step, config.training.max_train_steps, objective
    )


def as_network(model):
    """The objectives' calling convention around a ShortcutDiT (or its EMA)."""
    return lambda sample, t, step_size, conditions: model(sample, t, step_size, **conditions).sample


def validate(model, run: common.TrainingRun, config: Config, pipeline, held_out: dict, teacher=None):
    """Held-out loss and rows of samples of different step counts: same noise and classes every time."""
    columns, classes = config.validation.num_images_per_row, model.config.num_classes
    labels = [i % classes for i in range(columns)]
    if config.objective.condition_dropout_prob == 1:
        labels = [None] * columns
    pipeline.set_progress_bar_config(disable=True)
    rows, counts = [], config.validation.num_inference_steps
    for steps in counts:
        generator = torch.Generator().manual_seed(config.training.seed)
        rows.append(pipeline(labels, num_inference_steps=steps, generator=generator).images)

    torch.manual_seed(config.training.seed)
    batch = common.to_device(held_out, run.accelerator.device)
    _, metrics = compute_loss(run, batch, config, teacher, model)
    scalars = {name: float(value) for name, value in metrics.items()}
    if scalars.get("flow_target_outside_clip", 0) > 0.01:
        logger.warning("over 1 % of the flow targets exceed objective.target_clip: the data's range does not fit it")
    return scalars, {"samples": backlot.image_grid(rows, common.step_names(counts), cell=64)}


def create_pipeline(transformer, config: Config):
    """The pipeline users get: the scheduler knows what step sizes the objective taught."""
    objective = config.objective
    larger = {"flow_matching": "smallest", "live_reflow": "one_step"}.get(objective.name, "own")
    scheduler = shortcut.ShortcutScheduler(
        denoise_timesteps=objective.denoise_timesteps,
        smallest_step=objective.smallest_step,
        larger_steps=larger,
        dyadic_only=config.model.official and config.model.use_shortcut,
        method="consistency" if objective.name.startswith("consistency") else "euler",
    )
    with input_errors("validation.num_inference_steps"):
        for steps in config.validation.num_inference_steps:
            scheduler.set_timesteps(steps)
    vae = backlot.load_vae(config.data.vae).to(transformer.device) if config.data.vae else None
    return shortcut.ShortcutPipeline(transformer, scheduler, vae)


def open_split(config: Config, split: str):
    """The dataset of one split; what is wrong with it is said in one line."""
    data, quarantine = config.data, config.training.output_dir / "quarantine.jsonl"
    with input_errors("data"):
        if data.dataset_name == "latents":
            fingerprint = backlot.latent_cache.vae_fingerprint(data.vae)
            return images.LatentDataset(
                data.path, split=split, horizontal_flip=data.horizontal_flip, vae_fingerprint=fingerprint
            )
        settings = data.model_dump(exclude={"vae"})
        return images.open_images(**settings, split=split, quarantine_path=quarantine)


def create_transformer(config: Config, sample, num_classes: int):
    """A network for samples (C, H, W)."""
    model = config.model
    return shortcut.ShortcutDiT.from_size(
        model.size,
        sample_size=sample.shape[-1],
        in_channels=sample.shape[0],
        num_classes=num_classes,
        **model.model_dump(exclude={"size", "official"}, exclude_none=True),
        **(shortcut.OFFICIAL if model.official else {}),
    )


def main(argv: list[str] | None = None) -> None:
    config = load_config(Config, argv)
    accelerator = common.create_accelerator(config)
    dataset, held_out = open_split(config, "train"), open_split(config, "validation")
    config = config.in_updates(len(dataset), accelerator.num_processes)
    objective, steps = config.objective, config.training.max_train_steps
    items = common.held_out_items(held_out, config.validation.num_samples)
    sample = items[0].get("latents", items[0].get("pixel_values"))
    held_out = torch.utils.data.default_collate(items)
    torch.manual_seed(config.training.seed)
    with input_errors("model"):
        transformer = create_transformer(config, sample, dataset.num_classes or 1)
        teacher = None
        if objective.teacher_model:
            common.load_weights(transformer, objective.teacher_model, part="transformer")
            teacher = copy.deepcopy(transformer).requires_grad_(False)
    modules = {"teacher": teacher} if teacher is not None else None
    run = common.TrainingRun(accelerator, config, model=transformer, dataset=dataset, modules=modules)
    run.resume()
    progressive = objective.name == "progressive"
    if progressive and run.resumed_plan not in (None, steps):
        raise run.refuse(f"a progressive run cannot be extended: it was laid out for {run.resumed_plan} updates")
    if objective.name == "shortcut":
        logger.info(objectives.shortcut.describe(config.training.train_batch_size, run.micro_batch[1], objective))
    pipeline = create_pipeline(run.inference_model, config)
    check = run.validation(
        config.validation.validation_steps,
        lambda model: validate(model, run, config, pipeline, held_out, teacher),
    )
    for batch in run.batches():
        if progressive and objectives.distillation.starts_phase(run.step, steps, objective):
            teacher.load_state_dict(run.ema.model.state_dict())
        with run.accumulate():
            run.update(*compute_loss(run, batch, config, teacher))
        check()
    run.finish(pipeline)


if __name__ == "__main__":
    main()
