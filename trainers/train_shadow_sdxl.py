"""Train SDXL to cast the shadow of an object for any light, in one step (arXiv 2412.11972).

    accelerate launch -q --config_file accelerate_configs/a100_40gb.yaml trainers/train_shadow_sdxl.py \\
        --config configs/shadow_sdxl/litmus512.yaml --data.path DIR
    ... --resume_from_checkpoint latest        continue where it stopped
    ... --objective.name shortcut              the network also learns how long its step is

DIR is what data_prep.shadows render writes; the mathematics of the losses is in objectives.
"""

from __future__ import annotations

from typing import Annotated, ClassVar, Literal

import lazy_loader
from pydantic import Field, model_validator

import backlot
import objectives
from backlot.command_line import input_errors
from backlot.config import Section
from data_prep import shadows
from evaluation import shadow_sdxl as evaluation
from objectives.settings import NoiseLevelConfig, ObjectiveConfig
from pipelines import shadow_sdxl
from trainers import common
from trainers.common.config import RunConfig
from trainers.common.startup import load_config

torch = lazy_loader.load("torch")  # like the packages above: a wrong configuration is answered before it loads


class ModelConfig(Section):
    pretrained_model: str | None = "stabilityai/stable-diffusion-xl-base-1.0"
    """SDXL checkpoint (folder or hub name) whose UNet it starts from; null: random weights of the shape below."""
    vae: str | None = "stabilityai/sdxl-vae"
    """VAE (folder or hub name, with config.json at its top); null: no VAE, blocks of pixels are the latents."""
    pixel_block_size: int = Field(2, gt=0)
    """Side of these blocks."""
    down_block_types: list[str] = ["DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"]
    up_block_types: list[str] = ["CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"]
    block_out_channels: list[int] = [320, 640, 1280]
    layers_per_block: int = Field(2, gt=0)
    transformer_layers_per_block: list[int] = [1, 2, 10]
    attention_head_dim: list[int] = [5, 10, 20]
    """Heads per level, as SDXL's configuration calls them."""
    norm_num_groups: int = Field(32, gt=0)
    resnet_time_scale_shift: Literal["default", "scale_shift"] = "default"
    """How light and time act on a residual block: added to its features, or scaling them as well."""
    light_conditioning: Literal["periodic", "sdxl", "blob"] = "periodic"
    """Harmonics, no seam at phi = 0; SDXL's embedding of bare numbers (the paper's); or a picture of the light."""
    light_harmonics: int = Field(3, ge=1, le=63)
    """Of `periodic`."""
    raw_output: Literal["velocity", "sample"] = "velocity"
    """What the blocks compute; the velocity follows from the clean `sample`. A small network learns that sooner."""


class DataConfig(Section):
    path: str
    """Folder, tar or folder of tars in a format of data_prep/shadows/dataset.py."""
    validation_path: str | None = None
    """Other objects for validation; null: 5 % of the objects of `path`."""
    image_size: int = Field(1024, gt=0)
    horizontal_flip: bool = True
    """Mirror half of the samples, phi -> 180 - phi: right because the camera faces the light's axis squarely."""
    cache_latents: bool = True
    """With a VAE: encode everything once, in float32, into a folder `latents` beside the data."""


class LossConfig(Section):
    name: Literal["flow", "shortcut", "epsilon", "v_prediction", "sample"] = "flow"
    """Rectified flow; with step sizes; or the paper's diffusion ablations on SDXL's schedule."""
    noise_levels: NoiseLevelConfig = NoiseLevelConfig()
    """Of all but `shortcut`, which draws times of its own."""
    pixel_weight: float = Field(0.0, ge=0)
    """Weight of the mean absolute error of the shadow map that one step decodes to (not with `shortcut`)."""


class ShortcutConfig(ObjectiveConfig):
    name: Literal["shortcut"] = "shortcut"
    condition_dropout_prob: float = Field(0.0, ge=0, le=0)
    """Always 0: a shadow has no unconditional counterpart."""


class ValidationConfig(Section):
    validation_steps: int | None = Field(1000, gt=0)
    """Measure decoded shadows and the loss every so many updates; null for never."""
    num_samples: int = Field(64, gt=1)
    """Held-out samples."""
    num_inference_steps: list[Annotated[int, Field(gt=0)]] = Field([1, 4], min_length=1)
    """The first decides which checkpoint is the best."""
    batch_size: int = Field(8, gt=2)


class Config(RunConfig):
    may_change: ClassVar[frozenset[str]] = frozenset(
        {"validation", "data.path", "data.validation_path", "data.cache_latents"}
    )
    model: ModelConfig = ModelConfig()
    data: DataConfig
    objective: LossConfig = LossConfig()
    shortcut: ShortcutConfig = ShortcutConfig()
    validation: ValidationConfig = ValidationConfig()

    @model_validator(mode="after")
    def _check(self) -> Config:
        model, name = self.model, self.objective.name
        if model.pretrained_model and not model.vae:
            raise ValueError("`model.vae` is null, but a pretrained SDXL works on a VAE's latents")
        if name not in ("flow", "shortcut") and model.raw_output != "velocity":
            raise ValueError(f"`model.raw_output` must be velocity: {name} defines the output itself")
        if name in ("shortcut", "epsilon") and self.objective.pixel_weight:
            raise ValueError(f"`objective.pixel_weight` must be 0: {name} gives no clean sample worth decoding")
        if name == "shortcut" and self.training.train_batch_size < 2:
            raise ValueError("`training.train_batch_size` must be at least 2 for shortcut: rows of two kinds")
        if name == "shortcut" and self.shortcut.teacher == "ema" and not self.training.use_ema:
            raise ValueError("`training.use_ema` is false, but shortcut.teacher is ema")
        return self


def compute_loss(run: common.TrainingRun, batch: dict, config: Config, pipeline, model=None):
    """The loss of one micro-batch of data_prep.ShadowDataset or ShadowLatents -> (scalar, metrics).

    `model` takes the network's place (validation measures the EMA).
    """
    shadow, conditions = encode(batch, pipeline)
    model, objective = run.model if model is None else model, config.objective
    if objective.name == "shortcut":
        teacher = run.ema if config.shortcut.teacher == "ema" else run.network
        draws = objectives.shortcut.draw(shadow, config.shortcut, *run.micro_batch)
        networks = as_shortcut(model), as_shortcut(teacher)
        return objectives.shortcut.shortcut_loss(*networks, shadow, conditions, conditions, draws, config.shortcut)

    sigmas = objectives.denoising.draw_sigmas(len(shadow), objective.noise_levels, shadow.device)
    given = lambda x, t, c: model(x, t, **c).sample, torch.randn_like(shadow), shadow, sigmas, conditions
    if objective.name == "flow":
        weighting = objective.noise_levels.loss_weighting
        loss, clean = objectives.denoising.flow_loss(*given, shadow_sdxl.NUM_TIMESTEPS, weighting)
    else:
        schedule = pipeline.scheduler.alphas_cumprod
        loss, clean = objectives.denoising.diffusion_loss(*given, objective.name, schedule)
    metrics = {"loss_latents": loss}
    if objective.pixel_weight:
        metrics["loss_pixels"] = (pipeline.decode(clean).float() - batch["shadow_map"]).abs().mean()
        loss = loss + objective.pixel_weight * metrics["loss_pixels"]
    return loss, {name: value.detach() for name, value in metrics.items()}


def encode(batch: dict, pipeline):
    """A batch -> the shadow's latents (B, C, h, w), and the conditions by the names of ShadowUNet.forward."""
    light = torch.stack([batch["theta"], batch["phi"], batch["size"]], dim=1)
    if "shadow_latents" in batch:
        shadow, objects, mask = batch["shadow_latents"], batch["object_latents"], batch["mask_latents"]
    else:
        with torch.no_grad():
            # contiguous: noise is drawn in the order of its memory, and a VAE may answer channels-last
            shadow = pipeline.encode(batch["shadow_map"].expand(-1, 3, -1, -1) * 2 - 1).float().contiguous()
            objects = pipeline.encode(batch["object_image"]).float()
            mask = torch.nn.functional.adaptive_avg_pool2d(batch["mask"], shadow.shape[-2:])
    return shadow, {"object_latents": objects, "mask": mask, "light": light}


def as_shortcut(model):
    """In objectives.shortcut time runs from noise to data: t = 1 - sigma, and velocities turn round."""
    scale = shadow_sdxl.NUM_TIMESTEPS
    return lambda x, t, step_size, c: -model(x, scale * (1 - t), **c, step_size=step_size).sample


def validate(model, run: common.TrainingRun, config: Config, pipeline, held_out: list[dict]):
    """Loss and decoded shadows of unseen objects: the same noise and times every time."""
    settings = config.validation
    pipeline.set_progress_bar_config(disable=True)
    torch.manual_seed(config.training.seed)
    batches = common.batches_of(held_out, settings.batch_size, run.accelerator.device)
    scalars = common.mean_of(
        (compute_loss(run, batch, config, pipeline, model)[1], len(batch["mask"])) for batch in batches
    )
    shown = held_out[:8]
    true = torch.stack([item["shadow_map"] for item in held_out])
    rows = [torch.stack([(item["object_image"] + 1) / 2 for item in shown]), true[: len(shown)]]
    for steps in settings.num_inference_steps:
        maps = evaluation.cast(pipeline, held_out, num_inference_steps=steps, batch_size=settings.batch_size)
        measured = evaluation.measure_maps(maps, true)
        scalars |= {f"{name}/{steps}": float(values.mean()) for name, values in measured.items()}
        rows.append(maps[: len(shown)])
    names = ["object", "true", *common.step_names(settings.num_inference_steps)]
    return scalars, {"shadows": backlot.image_grid([backlot.to_images(row) for row in rows], names, cell=128)}


def open_data(config: Config, accelerator):
    """Training samples (latents where there is a VAE and they are cached), and a list of held-out ones."""
    data, model = config.data, config.model
    size, other = data.image_size, data.validation_path
    splits = ("all", "all") if other else ("train", "validation")
    with input_errors("data"):
        train = shadows.ShadowDataset(data.path, split=splits[0], image_size=size, horizontal_flip=data.horizontal_flip)
        held_out = shadows.ShadowDataset(other or data.path, split=splits[1], image_size=size)
        held_out.check_disjoint(train)
        items = common.held_out_items(held_out, config.validation.num_samples)
        if model.vae and data.cache_latents:
            pixels = config.objective.pixel_weight > 0
            with accelerator.launch.processes.main_first():
                train = shadows.open_latents(train, model.vae, device=accelerator.device, pixels=pixels)
        return train, items


def create_unet(config: Config, vae):
    """The network: SDXL's with new inputs, or one of the configured shape."""
    model, name = config.model, config.objective.name
    shape = model.model_dump(exclude={"pretrained_model", "vae", "pixel_block_size"})
    settings = {key: shape.pop(key) for key in ("light_conditioning", "light_harmonics", "raw_output")}
    if name == "shortcut":
        settings |= {"knows_step_size": True, "smallest_step": 1 / config.shortcut.denoise_timesteps}
    elif name != "flow":
        settings |= {"prediction_type": name}
    settings["sample_size"], rest = divmod(config.data.image_size, backlot.vae_scale_factor(vae))
    with input_errors("model"):
        if rest:
            raise ValueError(f"data.image_size {config.data.image_size} is no multiple of the latents' side")
        if model.pretrained_model:
            return shadow_sdxl.ShadowUNet.from_sdxl(model.pretrained_model, **settings)
        return shadow_sdxl.ShadowUNet(latent_channels=backlot.latent_channels(vae), **shape, **settings)


def main(argv: list[str] | None = None) -> None:
    config = load_config(Config, argv)
    accelerator = common.create_accelerator(config)
    dataset, held_out = open_data(config, accelerator)
    config = config.in_updates(len(dataset), accelerator.num_processes)
    vae = backlot.load_vae(config.model.vae, config.model.pixel_block_size).to(accelerator.device)
    torch.manual_seed(config.training.seed)
    unet = create_unet(config, vae)
    scheduler = shadow_sdxl.create_scheduler(unet.config.prediction_type)
    run = common.TrainingRun(accelerator, config, model=unet, dataset=dataset)
    run.resume()
    pipeline = shadow_sdxl.ShadowSDXLPipeline(run.inference_model, vae, scheduler)
    check = run.validation(
        config.validation.validation_steps,
        lambda model: validate(model, run, config, pipeline, held_out),
        score=lambda scalars: scalars[f"iou/{config.validation.num_inference_steps[0]}"],
    )
    for batch in run.batches():
        with run.accumulate():
            run.update(*compute_loss(run, batch, config, pipeline))
        check()
    run.finish(pipeline)


if __name__ == "__main__":
    main()
