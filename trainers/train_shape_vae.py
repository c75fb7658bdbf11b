"""Train the VAE that turns an object's occupancy grid into a few latent tokens (TRELLIS's, arXiv 2412.01506).

    accelerate launch -q --config_file accelerate_configs/cpu.yaml trainers/train_shape_vae.py \\
        --config configs/shape_vae/demo.yaml --data.path DIR
    ... --resume_from_checkpoint latest        continue where it stopped
    ... --model.init_from FOLDER               go on from a trained VAE on other shapes

DIR is what data_prep.scenes writes. `OccupancyVAE.from_pretrained(output_dir)` is the result.
"""

from __future__ import annotations

from typing import ClassVar, Literal

import lazy_loader
from pydantic import Field

import backlot
from backlot.command_line import input_errors
from backlot.config import Section
from data_prep import scenes
from pipelines import shortcut_scene
from trainers import common
from trainers.common.config import RunConfig, TrainingConfig
from trainers.common.startup import load_config

torch = lazy_loader.load("torch")  # like the packages above: a wrong configuration is answered before it loads
PICTURE_SIZE = 96


class ModelConfig(Section):
    preset: Literal["demo", "toy", "mid", "trellis"] = "trellis"
    """Shape of the network, and side of the grid (pipelines.shortcut_scene.vae.PRESETS)."""
    sample_size: int | None = Field(None, gt=0)
    """Another side of the grid than the preset's."""
    latent_channels: int | None = Field(None, gt=0)
    """Another width of a token than the preset's."""
    block_out_channels: list[int] | None = Field(None, min_length=1)
    """Other widths of the levels than the preset's; the side is halved between two of them."""
    layers_per_block: int | None = Field(None, gt=0)
    """Another number of residual blocks per level than the preset's."""
    mid_layers: int | None = Field(None, ge=0)
    """Another number of residual blocks beside the latents than the preset's."""
    patch_size: int | None = Field(None, gt=0)
    """Another block of cells that becomes channels than the preset's."""
    init_from: str | None = None
    """Folder of a trained VAE to start from, in place of all this."""


class DataConfig(Section):
    path: str
    """Folder of scenes with the splits train and val (data_prep/scenes/format.py): their shapes are learnt."""
    flip: bool = False
    """Mirror half of the shapes in x and half of them in y."""
    rotate: bool = False
    """Turn shapes about z by a random multiple of a right angle."""


class LossConfig(Section):
    reconstruction: Literal["dice", "bce_dice"] = "dice"
    """Dice alone is TRELLIS's; with cross-entropy a small network learns sooner."""
    kl_weight: float = Field(1e-3, ge=0)
    """Of the divergence of the posterior from N(0, 1), the mean over the latents, not the sum."""


class ShapeTrainingConfig(TrainingConfig):
    adam_weight_decay: float = Field(0.0, ge=0)
    """0 is TRELLIS's."""
    ema_decay: float = Field(0.9999, ge=0, lt=1)
    """Share of the average that each update keeps; 0 follows the weights."""


class ValidationConfig(Section):
    validation_steps: int | None = Field(1000, gt=0)
    """Reconstruct held-out shapes every so many updates; null for never."""
    num_samples: int = Field(256, gt=0)
    """Held-out shapes."""
    batch_size: int = Field(32, gt=0)
    """Of these, at a time."""
    num_shown: int = Field(8, gt=0)
    """Shapes of the picture."""


class Config(RunConfig):
    may_change: ClassVar[frozenset[str]] = frozenset({"validation", "data.path"})
    training: ShapeTrainingConfig
    model: ModelConfig = ModelConfig()
    data: DataConfig
    objective: LossConfig = LossConfig()
    validation: ValidationConfig = ValidationConfig()


def compute_loss(run: common.TrainingRun, batch: dict, config: Config, model=None):
    """The loss of one micro-batch {occupancy (B, 1, R, R, R)} -> (scalar, metrics).

    `model` takes the network's place (validation measures the EMA).
    """
    output = (run.model if model is None else model)(batch["occupancy"])
    return vae_loss(output.sample, batch["occupancy"], output.latent_dist, config.objective)


def vae_loss(logits, occupancy, posterior, settings: LossConfig):
    """Reconstruction + kl_weight * KL(posterior | N(0, 1)), means over shapes (arXiv 2412.01506).

    Dice is 1 - (2 <p, o> + 1) / (|p| + |o| + 1) of probabilities p and occupancy o. It is taken of each shape and not
    of the batch as a whole as there: small objects count as much as large ones, and micro-batches may have any size.
    """
    logits, functional = logits.float(), torch.nn.functional
    inside = logits.sigmoid()
    overlap, total = (x.flatten(1).sum(1) for x in (inside * occupancy, inside + occupancy))
    metrics = {"loss_dice": (1 - (2 * overlap + 1) / (total + 1)).mean(), "kl": posterior.kl().mean()}
    loss = metrics["loss_dice"] + settings.kl_weight * metrics["kl"]
    if settings.reconstruction == "bce_dice":
        metrics["loss_bce"] = functional.binary_cross_entropy_with_logits(logits, occupancy)
        loss = loss + metrics["loss_bce"]
    return loss, {name: value.detach() for name, value in metrics.items()}


def validate(model, run: common.TrainingRun, config: Config, held_out):
    """Loss and reconstructions of unseen shapes (N, 1, R, R, R): the same noise every time, then none."""
    torch.manual_seed(config.training.seed)
    measured, decoded, shown = [], [], config.validation.num_shown
    for part in held_out.split(config.validation.batch_size):
        occupancy = part.to(run.accelerator.device)
        values = compute_loss(run, {"occupancy": occupancy}, config, model)[1]
        logits = model(occupancy, sample_posterior=False).sample.float()
        values |= {name: each.mean() for name, each in compare(logits > 0, occupancy > 0).items()}
        decoded += logits[: max(0, shown - len(decoded))].cpu()
        measured.append((values, len(part)))
    rows = [[draw(grid[0]) for grid in grids] for grids in (20 * held_out[:shown] - 10, decoded)]
    return common.mean_of(measured), {"shapes": backlot.image_grid(rows, ["true", "decoded"])}


def compare(decoded, true) -> dict:
    """IoU, precision and recall (B,) of boolean grids (B, ...)."""
    decoded, true = decoded.flatten(1), true.flatten(1)
    shared, counts = (decoded & true).sum(1), {"precision": decoded.sum(1), "recall": true.sum(1)}
    counts["iou"] = (decoded | true).sum(1)
    return {name: shared / count.clamp(min=1) for name, count in counts.items()}


def draw(logits):
    """A picture of the surface of a grid (R, R, R); of nothing where it is empty."""
    camera = backlot.rendering.Camera.look_at((1.1, -1.9, 1.3), (0, 0, 0), 38)
    meshes = [shortcut_scene.mesh_from_logits(logits.numpy())] if (logits > 0).any() else []
    colors = [backlot.rendering.object_color(0)] * len(meshes)
    return backlot.rendering.render(meshes, colors, camera, PICTURE_SIZE, supersample=2, floor=False).image()


def create_vae(config: Config):
    """The network: of the configured shape, or a trained one."""
    model = config.model
    with input_errors("model"):
        if model.init_from:
            return shortcut_scene.OccupancyVAE.from_pretrained(model.init_from)
        shape = model.model_dump(exclude={"preset", "init_from"}, exclude_none=True)
        return shortcut_scene.OccupancyVAE.from_preset(model.preset, **shape)


def open_data(config: Config, resolution: int):
    """The training shapes, and (N, 1, R, R, R) held-out ones, spread over their split; one line if they do not fit."""
    data = config.data
    with input_errors("data"):
        train = scenes.OccupancyDataset(data.path, "train", flip=data.flip, rotate=data.rotate)
        held_out = scenes.OccupancyDataset(data.path, "val")
        for dataset in (train, held_out):
            if dataset.resolution != resolution:
                raise ValueError(
                    f"the shapes in {data.path} have {dataset.resolution} cells a side, the model takes {resolution}"
                )
        items = common.held_out_items(held_out, config.validation.num_samples)
    return train, torch.stack([item["occupancy"] for item in items])


def main(argv: list[str] | None = None) -> None:
    config = load_config(Config, argv)
    accelerator = common.create_accelerator(config)
    torch.manual_seed(config.training.seed)
    vae = create_vae(config)
    dataset, held_out = open_data(config, vae.config.sample_size)
    config = config.in_updates(len(dataset), accelerator.num_processes)
    run = common.TrainingRun(accelerator, config, model=vae, dataset=dataset)
    run.resume()
    check = run.validation(
        config.validation.validation_steps,
        lambda model: validate(model, run, config, held_out),
        score=lambda scalars: scalars["iou"],
    )
    for batch in run.batches():
        with run.accumulate():
            run.update(*compute_loss(run, batch, config))
        check()
    run.finish(run.inference_model)


if __name__ == "__main__":
    main()
