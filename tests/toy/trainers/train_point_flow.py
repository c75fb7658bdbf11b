"""Train a flow on points of the plane (rectified flow, arXiv 2209.03003).

    accelerate launch -q --config_file accelerate_configs/cpu.yaml trainers/train_point_flow.py \\
        --config configs/point_flow/tiny.yaml --data.path DIR
    ... --resume_from_checkpoint latest        continue where it stopped

DIR is what `python -m data_prep.points synth` writes. `PointFlowPipeline.from_pretrained(output_dir)` is the result.
"""

from __future__ import annotations

import lazy_loader
from pydantic import Field

import backlot
import objectives
from backlot.command_line import input_errors
from backlot.config import Section
from data_prep import points
from evaluation import point_flow as measures
from pipelines import point_flow
from trainers import common
from trainers.common.config import RunConfig
from trainers.common.startup import load_config

torch = lazy_loader.load("torch")  # like the packages above: a wrong configuration is answered before it loads
PICTURE_SIZE, PICTURE_RANGE = 96, 2.0


class ModelConfig(Section):
    hidden_size: int = Field(128, gt=0)
    """Width of the network."""
    num_layers: int = Field(4, gt=0)
    """Its residual blocks."""


class DataConfig(Section):
    path: str
    """Folder of points with the splits train and val (data_prep/points/format.py)."""
    turns: int = Field(1, gt=0)
    """Turn points by random multiples of 1 / turns of a circle."""


class ObjectiveConfig(Section):
    stratified: bool = True
    """Spread the noise levels of a batch evenly, instead of drawing each by itself."""


class ValidationConfig(Section):
    validation_steps: int | None = Field(500, gt=0)
    """Draw points and measure the held-out loss every so many updates; null for never."""
    num_inference_steps: list[int] = Field([1, 4, 16], min_length=1)
    """One picture and one distance for each; all start from the same noise, every time."""
    num_samples: int = Field(500, gt=0)
    """Held-out points, and points drawn."""
    batch_size: int = Field(256, gt=0)
    """Held-out points that go through the network together."""


class Config(RunConfig):
    may_change = RunConfig.may_change | {"data.path"}
    model: ModelConfig = ModelConfig()
    data: DataConfig
    objective: ObjectiveConfig = ObjectiveConfig()
    validation: ValidationConfig = ValidationConfig()


def compute_loss(run: common.TrainingRun, batch: dict, config: Config, pipeline, model=None):
    """The loss of one micro-batch {points (B, 2)} -> (scalar, metrics).

    `model` takes the place of the network in training (validation measures the EMA).
    """
    network, data = run.model if model is None else model, batch["points"]
    noise = torch.randn_like(data)
    if config.objective.stratified:
        sigmas = objectives.stratified.draw_stratified_sigmas(len(data), data.device)
    else:
        sigmas = 1 - torch.rand(len(data), device=data.device)
    loss, clean = objectives.denoising.flow_loss(
        lambda noisy, timesteps, _: network(noisy, timesteps).sample,
        noise,
        data,
        sigmas,
        conditions={},
        num_timesteps=pipeline.scheduler.config.num_train_timesteps,
    )
    error = (clean - data).square().mean()
    return loss, {"loss_flow": loss.detach(), "squared_error": error.detach()}


def validate(model, run: common.TrainingRun, config: Config, pipeline, held_out: list):
    """Held-out loss, and points drawn in several step counts: the same noise every time."""
    settings, seed = config.validation, config.training.seed
    torch.manual_seed(seed)
    losses = []
    for batch in common.batches_of(held_out, settings.batch_size, run.accelerator.device):
        losses.append((compute_loss(run, batch, config, pipeline, model)[1], len(batch["points"])))
    scalars = common.mean_of(losses)

    true = torch.stack([item["points"] for item in held_out])
    pictures, names = [[draw(true)]], ["true"]
    for steps, name in zip(settings.num_inference_steps, common.step_names(settings.num_inference_steps), strict=True):
        drawn = measures.draw_points(pipeline, len(true), steps, seed)
        scalars[f"distance_{steps}"] = measures.wasserstein(drawn, true)
        pictures.append([draw(drawn)])
        names.append(name)
    return scalars, {"points": backlot.image_grid(pictures, names)}


def draw(points):
    """A picture of where points (N, 2) lie."""
    cells = ((points / PICTURE_RANGE + 1) / 2 * PICTURE_SIZE).long().clamp(0, PICTURE_SIZE - 1)
    picture = torch.ones(1, 1, PICTURE_SIZE, PICTURE_SIZE)
    picture[0, 0, PICTURE_SIZE - 1 - cells[:, 1], cells[:, 0]] = 0
    return backlot.to_images(picture)[0]


def main(argv: list[str] | None = None) -> None:
    config = load_config(Config, argv)
    accelerator = common.create_accelerator(config)
    with input_errors("data"):
        dataset = points.PointDataset(config.data.path, "train", config.data.turns)
        held_out = points.PointDataset(config.data.path, "val")
    held_out = common.held_out_items(held_out, config.validation.num_samples)
    torch.manual_seed(config.training.seed)
    network = point_flow.PointFlowNetwork(**config.model.model_dump())
    run = common.TrainingRun(accelerator, config, model=network, dataset=dataset)
    run.resume()
    pipeline = point_flow.PointFlowPipeline(run.inference_model, point_flow.create_scheduler())
    check = run.validation(
        config.validation.validation_steps,
        lambda model: validate(model, run, config, pipeline, held_out),
        score=lambda scalars: -scalars["loss_flow"],
    )
    for batch in run.batches():
        with run.accumulate():
            run.update(*compute_loss(run, batch, config, pipeline))
        check()
    run.finish(pipeline)


if __name__ == "__main__":
    main()
