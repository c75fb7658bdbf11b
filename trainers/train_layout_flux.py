"""Train a layout adapter on a frozen FLUX in three stages: boxes, identity, feedback (arXiv 2509.16691, 2506.21416).

    accelerate launch -q --config_file accelerate_configs/h100x8_ddp.yaml trainers/train_layout_flux.py \\
        --config configs/layout_flux/stage1.yaml                then stage2.yaml, and stage3.yaml
    ... --resume_from_checkpoint latest        continue where it stopped
    ... --init_from CHECKPOINT                 start from other weights than those of the stage before

What trains and which loss weighs what stands in the configuration; `stage: base` trains a small FLUX itself. The data
are what data_prep.layouts prepare writes; the mathematics of the losses is in objectives/layout.py.
"""

from __future__ import annotations

from datetime import datetime
from functools import partial
from pathlib import Path
from typing import Any, Literal, NamedTuple

import lazy_loader
from pydantic import Field, model_validator

import objectives
from backlot.command_line import input_errors
from backlot.config import checked
from data_prep import layouts
from objectives.layout_settings import DropoutConfig, IdentityConfig, LossWeights, RegionConfig, TimestepConfig
from pipelines import layout_flux
from pipelines.layout_flux import settings
from trainers import common
from trainers.common import checkpoints
from trainers.common.config import RunConfig, TrainingConfig
from trainers.common.startup import load_config

torch = lazy_loader.load("torch")  # like the packages above: a wrong configuration is answered before it loads


class LayoutTrainingConfig(TrainingConfig):
    iteration_unit: Literal["optimizer", "micro"] = "optimizer"
    """What counts of steps mean: updates, or micro-batches (then they are divided, once, at the start)."""
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
    """Checkpoint, run or stage whose weights it starts from; null: stages 2 and 3 take the newest intact checkpoint of
    stage1 or stage2 beside `training.output_dir`."""
    logging_dir: Path | None = Path("runs/logs")
    """Gets a folder stage<N>_YYYYMMDD_HHMMSS that is the run's TensorBoard log; null for none."""
    model: settings.ModelConfig = settings.ModelConfig()
    trainable: settings.TrainableConfig = settings.TrainableConfig()
    lora: settings.LoraConfig = settings.LoraConfig()
    modulation: settings.ModulationConfig = settings.ModulationConfig()
    bridge: settings.BridgeConfig = settings.BridgeConfig()
    adapter: dict[str, Any] | None = None
    """What the adapter is made of: filled in by the run, for whoever loads a checkpoint."""
    data: settings.DataConfig = settings.DataConfig()
    loss_weights: LossWeights = LossWeights()
    timesteps: TimestepConfig = TimestepConfig()
    dropout: DropoutConfig = DropoutConfig()
    dino: IdentityConfig = IdentityConfig()
    region_preservation: RegionConfig = RegionConfig()
    training: LayoutTrainingConfig
    validation: settings.ValidationConfig = settings.ValidationConfig()

    @model_validator(mode="after")
    def _check(self) -> Config:
        trains, weights = self.trainable.names, self.loss_weights
        if not trains:
            raise ValueError("`trainable` names no part: nothing would train")
        if stray := sorted(set(self.training.lr_groups) - trains):
            raise ValueError(f"`training.lr_groups` names {', '.join(stray)}, which `trainable` leaves as it is")
        if self.stage in ("base", "1") and (weights.dino_identity or weights.region_preservation):
            raise ValueError("`loss_weights.dino_identity` and `region_preservation` must be 0 before stage 2")
        if self.training.iteration_unit == "micro" and self.training.num_epochs:
            raise ValueError("`training.iteration_unit` micro does not go with `num_epochs`, which counts passes")
        return self

    def in_updates(self, num_samples: int, num_processes: int) -> Config:
        """Counts of micro-batches, too, become counts of updates."""
        training = self.training
        if training.iteration_unit == "micro":
            counts = settings.divided(self, training.gradient_accumulation_steps)
            return checked(self, {**counts, "training": {**counts["training"], "iteration_unit": "optimizer"}})
        return super().in_updates(num_samples, num_processes)


class Task(NamedTuple):
    """What the loss needs besides the network and a batch."""

    mu: float
    """Shift of the noise levels."""
    empty_prompt: tuple
    identity: Any
    """layout_flux.IdentityEncoder; None where no loss looks at crops."""


def compute_loss(run: common.TrainingRun, batch: dict, config: Config, task: Task, model=None):
    """The loss of one micro-batch of data_prep.layouts -> (scalar, metrics, histograms).

    `model` takes the network's place (validation measures the EMA).
    """
    objective, flows, weights = objectives.layout, objectives.rectified_flow, config.loss_weights
    latents, device = batch["latents"], batch["latents"].device
    p_low = config.dino.p_low if weights.dino_identity else 0.0
    levels = objective.draw_sigmas(len(latents), config.timesteps, task.mu, p_low, config.dino.sigma_max)
    kept = objective.draw_kept(*batch["valid"].shape, config.dropout)
    layout, *prompts = layout_flux.conditions(batch, kept.to(device), task.empty_prompt)
    sigmas, noise = levels.to(device, non_blocking=True), torch.randn_like(latents)
    noisy = flows.interpolate(noise, latents, 1 - sigmas)
    layout = None if config.stage == "base" else layout
    if weights.dino_identity:
        layout.alpha_learns = sigmas >= config.dino.sigma_max  # a likeness is not to be had by moving alpha
    given = noisy, sigmas, *prompts, layout, config.timesteps.guidance_scale
    output = (run.model if model is None else model)(*given)
    flow = flows.squared_error(output.velocity, noise - latents).mean()
    metrics = {"loss/flow_matching": flow, "loss/reconstruction": flow}
    loss = weights.flow_matching * flow
    histograms = {"metrics/timesteps": 1000 * levels}
    if output.alpha is not None:
        prior = objective.alpha_prior(output.alpha, batch["is_foreground"], batch["valid"])
        loss = loss + weights.alpha_prior * prior
        means, all_of_it = objective.describe_alpha(output.alpha, batch["valid"])
        metrics |= {"loss/alpha_prior": prior, **means}
        histograms["metrics/alpha_distribution"] = all_of_it
    if output.feedback_magnitude is not None:
        metrics["metrics/feedback_magnitude"] = output.feedback_magnitude
    if weights.dino_identity:
        clean = objective.denoised(noisy, output.velocity, sigmas)
        seen = batch, levels, kept, task.identity, config.dino
        identity, means = objective.identity_term(clean, output.alpha, *seen)
        weight = weights.dino_identity * objective.ramp(run.step, config.dino.ramp_steps)
        ratio = objective.gradient_ratio(weight * identity, loss, output.velocity)
        metrics |= {**means, "metrics/dino_gradient_ratio": ratio}
        loss = loss + weight * identity
    if weights.region_preservation:
        # the same coin on all processes: all make the second pass, or none
        coin = torch.rand((), generator=run.shared_generator())
        drawn = coin < config.region_preservation.probability
        plain = partial(run.network, *given, use_modulation=False)
        changed = objective.region_term(output.velocity, plain, batch["boxes"].values, drawn)
        metrics["loss/region_preservation"] = changed
        loss = loss + weights.region_preservation * changed[0]
    rate = run.training.learning_rate * run.lr_scheduler.lr_lambdas[0](run.step)
    metrics |= {
        "loss/total": loss,
        "metrics/timestep_mean": 1000 * sigmas.mean(),
        "metrics/learning_rate": torch.full((), rate, device=device),
    }
    return loss, {name: value.detach() for name, value in metrics.items()}, histograms


def validate(model, run: common.TrainingRun, config: Config, task: Task, pipeline, held_out: list[dict]):
    """Loss on unseen pictures, and some of them drawn from their layouts: the same noise every time."""
    section, seed, device = config.validation, config.training.seed, run.accelerator.device
    torch.manual_seed(seed)
    measured = []
    for batch in common.batches_of(held_out, section.batch_size, device):
        metrics = compute_loss(run, batch, config, task, model)[1]
        told = {name: metrics[name] for name in settings.VALIDATED if name in metrics}
        measured.append((told, len(batch["latents"])))
    (batch,) = common.batches_of(held_out[: section.num_validation_images], section.num_validation_images, device)
    pipeline.set_progress_bar_config(disable=True)
    drawn = seed, section.num_inference_steps, section.guidance_scale
    with model.gathered():
        pictures, alphas = layout_flux.compare(pipeline, batch, *drawn)
    run.log({}, histograms=alphas)
    return common.mean_of(measured), pictures


def open_data(config: Config):
    """Training samples, and a list of held-out ones."""
    with input_errors("data"):
        folder, most, keep = config.data.output_dir, config.model.max_refs, config.data.keep_in_memory
        train = layouts.LayoutDataset(folder, split="train", max_objects=most, keep_in_memory=keep)
        held_out = layouts.LayoutDataset(folder, split="validation", max_objects=most)
        train, held_out = (layout_flux.IdentityTargets(part) for part in (train, held_out))
        return train, common.held_out_items(held_out, config.validation.num_samples)


def create_model(config: Config, item: dict, start: Path | None, dtype):
    """The base's pipeline without text encoders, and the network that trains: with an adapter, but for stage `base`."""
    name, vae = config.model.pretrained_model_name_or_path, config.model.vae
    with input_errors("model"):
        if config.stage == "base":
            torch.manual_seed(config.training.seed)
            pipeline = layout_flux.create_base(name, vae, config.model.transformer)
            return pipeline, layout_flux.LayoutFlux(pipeline.transformer)
        pipeline = layout_flux.load_base(name, vae, dtype)
        layout_flux.check_size(pipeline, item, config.training.resolution)
    load = start and partial(common.load_weights, path=start)
    with input_errors(f"init_from (where the weights of stage {config.stage} come from)"):
        adapter = layout_flux.create_adapter(pipeline.transformer, config, item, load)
    return pipeline, layout_flux.LayoutFlux(pipeline.transformer, adapter)


def create_task(config: Config, dataset, item: dict, pipeline, device) -> Task:
    """Shift of the noise levels as the base's scheduler has it, and what looks at crops."""
    mu, section, identity = 0.0, config.dino, None
    if config.timesteps.dynamic_shift:
        mu = objectives.layout.scheduler_shift(pipeline.scheduler.config, layout_flux.count_tokens(item))
    if config.loss_weights.dino_identity:
        with input_errors("dino"):
            given = section.encoder, section.decoder, pipeline.vae, device, section.crop_size, section.margin
            identity = layout_flux.IdentityEncoder.load(*given)
    return Task(mu, tuple(part.to(device) for part in dataset.empty_prompt), identity)


def main(argv: list[str] | None = None) -> None:
    config, start = settings.find_start(load_config(Config, argv), checkpoints.find_latest)
    accelerator = common.create_accelerator(config)
    dataset, held_out = open_data(config)
    config = config.in_updates(len(dataset), accelerator.num_processes)
    pipeline, model = create_model(config, held_out[0], start, accelerator.launch.precision.dtype)
    config = layout_flux.complete(config, model.adapter)
    pipeline.vae.to(accelerator.device)
    task = create_task(config, dataset, held_out[0], pipeline, accelerator.device)
    trained = model.adapter or model.transformer
    run = common.TrainingRun(accelerator, config, model=model, dataset=dataset, trained=trained)
    run.resume()
    network = run.inference_model
    if model.adapter is not None and not run.is_sharded:
        # what checkpoints are loaded from for use; its memory is that of the average, which is restored by itself
        run.networks.modules["layout_adapter"] = network.adapter
    if config.logging_dir is not None and run.processes.is_main:
        layout_flux.link_logs(config.logging_dir, config.stage, run.run_dir, datetime.now())
    drawing = layout_flux.with_network(pipeline, network.transformer, network.adapter)
    check = run.validation(
        config.validation.every,
        lambda model: validate(model, run, config, task, drawing, held_out),
        score=lambda scalars: -scalars["loss/flow_matching"],
    )
    for batch in run.batches():
        with run.accumulate():
            loss, metrics, histograms = compute_loss(run, batch, config, task)
            run.update(loss, metrics)
        if run.is_due(config.training.logging_steps):
            run.log({}, histograms=histograms)
        check()
    run.finish(network.adapter or layout_flux.exported(pipeline, network.transformer))


if __name__ == "__main__":
    main()
