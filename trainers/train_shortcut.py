"""Train an image model that generates in one step, or in as many as you like (shortcut models, arXiv 2410.12557).

    accelerate launch -q --config_file accelerate_configs/cpu.yaml trainers/train_shortcut.py \\
        --config configs/shortcut/digits.yaml
    ... --resume_from_checkpoint latest            continue where it stopped
    ... --objective.name flow_matching             a baseline on the same network, data and budget

Top to bottom: what can be set, the loss of one micro-batch, validation, the loop. The mathematics is in
trainers/objectives, network and sampling in pipelines/shortcut, the mechanics in trainers/common.
"""

from __future__ import annotations

import logging
from typing import Literal

import lazy_loader
from pydantic import Field, model_validator

import data_prep
import pipelines
from pipelines import shortcut
from trainers import common, objectives
from trainers.common.config import RunConfig, Section, load_config
from trainers.objectives.settings import ObjectiveConfig

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
    """`digits` is bundled with scikit-learn; `latents` is a folder written by data_prep.encode_latents."""
    path: str | None = None
    """Folder of the files, or the hub's dataset name."""
    image_size: int | None = Field(None, gt=0)
    """Resize the shorter side to this and crop the centre."""
    horizontal_flip: bool = False
    """Mirror half of the samples."""
    image_column: str = "image"
    label_column: str = "label"
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
    model: ModelConfig = ModelConfig()
    data: DataConfig = DataConfig()
    objective: ObjectiveConfig = ObjectiveConfig()
    validation: ValidationConfig = ValidationConfig()

    @model_validator(mode="after")
    def _check(self) -> Config:
        if self.model.official and self.model.use_shortcut and self.objective.smallest_step != "lattice":
            raise ValueError("`model.official` embeds log2 of the step size: set objective.smallest_step to lattice")
        if self.objective.name == "shortcut" and not self.model.use_shortcut:
            raise ValueError("`model.use_shortcut` is false, but a shortcut model has to know its step size")
        needs_ema = self.objective.name in ("progressive", "consistency", "consistency_distillation")
        if (needs_ema or (self.objective.name, self.objective.teacher) == ("shortcut", "ema")) and (
            not self.training.use_ema
        ):
            raise ValueError(f"`training.use_ema` is false, but {self.objective.name} learns from the EMA")
        if (self.data.dataset_name == "latents") != (self.data.vae is not None):
            raise ValueError("`data.vae` names the VAE of a latents dataset; give both or neither")
        if self.data.dataset_name in ("imagefolder", "hub", "latents") and self.data.path is None:
            raise ValueError(f"`data.path` is required for {self.data.dataset_name}")
        return self


def compute_loss(run: common.TrainingRun, batch: dict, config: Config, teacher=None):
    """The loss of one micro-batch: {latents or pixel_values (B, C, H, W), class_labels (B,)} -> (scalar, metrics)."""
    data, labels = batch.get("latents", batch.get("pixel_values")), batch["class_labels"]
    conditions = {"class_labels": labels}
    null = {"class_labels": torch.full_like(labels, run.network.config.num_classes)}
    network, online, ema = (as_network(model) for model in (run.model, run.network, run.ema))
    objective = config.objective
    if objective.name == "shortcut":
        draws = objectives.shortcut.draw(data, objective)
        half_steps = ema if objective.teacher == "ema" else online
        return objectives.shortcut.shortcut_loss(network, half_steps, data, conditions, null, draws, objective)

    noise, t = torch.randn_like(data), torch.rand(len(data), device=data.device)
    step, last_step = run.step, config.training.max_train_steps
    if objective.name in ("flow_matching", "live_reflow"):
        drop = torch.rand(len(data), device=data.device) < objective.condition_dropout_prob
        conditions = objectives.rectified_flow.where_rows(drop, null, conditions)
    match objective.name:
        case "flow_matching":
            return objectives.rectified_flow.flow_matching_loss(
                network, noise, data, t, conditions, step_size=objective.flow_step_size, path_eps=objective.path_eps
            )
        case "live_reflow":
            rows = objectives.shortcut.count_bootstrap_rows(len(data), objective)
            return objectives.reflow.live_reflow_loss(network, noise, data, t, conditions, null, rows, objective)
        case "progressive":
            phase = objectives.distillation.phase(step, last_step, objective)
            t = objectives.distillation.lattice_times(len(data), 2 ** (objective.levels - phase - 1), data.device)
            return objectives.distillation.progressive_loss(
                network, as_network(teacher), noise, data, t, conditions, null, step, last_step, objective
            )
        case "consistency":
            sections = 2 ** objectives.distillation.phase(step, last_step, objective)
        case "consistency_distillation":
            sections = objective.denoise_timesteps
    t = objectives.distillation.lattice_times(len(data), sections, data.device)
    return objectives.distillation.consistency_loss(
        network, ema, noise, data, t, torch.full_like(t, 1 / sections), conditions, objective,
        teacher=as_network(teacher) if objective.name == "consistency_distillation" else None,
    )  # fmt: skip


def as_network(model):
    """The objectives' calling convention around a ShortcutDiT (or its EMA)."""
    return lambda sample, t, step_size, conditions: model(sample, t, step_size, **conditions).sample


def validate(model, run: common.TrainingRun, config: Config, pipeline, held_out: dict):
    """Held-out loss, by part, and rows of samples of different step counts: same noise and classes every time."""
    generator = torch.Generator().manual_seed(config.training.seed)
    columns, classes = config.validation.num_images_per_row, model.config.num_classes
    labels = [i % classes for i in range(columns)] if config.objective.condition_dropout_prob < 1 else [None] * columns
    shape = (columns, model.config.in_channels, model.config.sample_size, model.config.sample_size)
    latents = torch.randn(shape, generator=generator)
    rows, names = [], []
    pipeline.set_progress_bar_config(disable=True)
    for steps in config.validation.num_inference_steps:
        rows.append(pipeline(labels, num_inference_steps=steps, latents=latents).images)
        names.append(f"{steps} step" + "s" * (steps > 1))

    torch.manual_seed(config.training.seed)
    data = held_out.get("latents", held_out.get("pixel_values")).to(run.accelerator.device)
    conditions = {"class_labels": held_out["class_labels"].to(data.device)}
    draws = objectives.shortcut.draw(data, config.objective)
    network = as_network(model)
    _, metrics = objectives.shortcut.shortcut_loss(
        network, network, data, conditions, conditions, draws, config.objective
    )
    scalars = {name: float(value) for name, value in metrics.items()}
    if scalars.get("flow_target_outside_clip", 0) > 0.01:
        logger.warning("over 1 % of the flow targets exceed objective.target_clip: the data's range does not fit it")
    return scalars, {"samples": pipelines.image_grid(rows, names, cell=64)}


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
    vae = pipelines.load_vae(config.data.vae).to(transformer.device) if config.data.vae else None
    return shortcut.ShortcutPipeline(transformer, scheduler, vae)


def open_split(config: Config, split: str):
    """The dataset of one split; what is wrong with it is said in one line."""
    data, quarantine = config.data, config.training.output_dir / "quarantine.jsonl"
    try:
        if data.dataset_name == "latents":
            fingerprint = data_prep.vae_fingerprint(data.vae)
            return data_prep.LatentDataset(
                data.path, split=split, horizontal_flip=data.horizontal_flip, vae_fingerprint=fingerprint
            )
        settings = data.model_dump(exclude={"vae"})
        return data_prep.open_images(**settings, split=split, quarantine_path=quarantine)
    except (OSError, ValueError, ImportError) as error:
        raise SystemExit(f"data: {error}") from error


def main(argv: list[str] | None = None) -> None:
    config = load_config(Config, argv)
    accelerator = common.create_accelerator(config)
    dataset, held_out = open_split(config, "train"), open_split(config, "validation")
    held_out = torch.utils.data.default_collate(
        [held_out[common.SampleKey(i)] for i in range(min(config.validation.num_samples, len(held_out)))]
    )
    sample = held_out.get("latents", held_out.get("pixel_values"))
    overrides = config.model.model_dump(include={"hidden_size", "num_layers", "patch_size"}, exclude_none=True)
    torch.manual_seed(config.training.seed)
    transformer = shortcut.ShortcutDiT.from_size(
        config.model.size,
        sample_size=sample.shape[-1],
        in_channels=sample.shape[1],
        num_classes=dataset.num_classes or 1,
        use_shortcut=config.model.use_shortcut,
        dropout=config.model.dropout,
        **overrides,
        **(shortcut.OFFICIAL if config.model.official else {}),
    )
    teacher = None
    if config.objective.teacher_model:
        teacher = shortcut.ShortcutDiT.from_pretrained(config.objective.teacher_model, subfolder="transformer")
        teacher.requires_grad_(False)
        transformer.load_state_dict(teacher.state_dict())
    modules = {"teacher": teacher} if teacher is not None else None
    run = common.TrainingRun(accelerator, config, model=transformer, dataset=dataset, modules=modules)
    run.resume()
    if config.objective.name == "shortcut":
        rows = objectives.shortcut.count_bootstrap_rows(config.training.train_batch_size, config.objective)
        logger.info("each micro-batch of %d rows bootstraps %d", config.training.train_batch_size, rows)
    pipeline = create_pipeline(run.inference_model, config)
    for batch in run.batches():
        if config.objective.name == "progressive" and objectives.distillation.starts_phase(
            run.step, config.training.max_train_steps, config.objective
        ):
            teacher.load_state_dict(run.ema.model.state_dict())
        with run.accumulate():
            loss, metrics = compute_loss(run, batch, config, teacher)
            run.update(loss, metrics)
        if run.is_due(config.validation.validation_steps):
            run.validate(lambda model: validate(model, run, config, pipeline, held_out))
    run.finish(pipeline)


if __name__ == "__main__":
    main()
