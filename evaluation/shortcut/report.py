"""What `python -m evaluation.shortcut` does: sample in every way asked for, measure, print a table, write figures."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
import yaml
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm

from backlot.command_line import fail, input_errors
from backlot.loading import load_pipeline
from backlot.pictures import image_grid
from backlot.samples import SampleKey
from data_prep.images.dataset import open_images
from evaluation.shortcut.measure import DigitsReference, draw_samples, loss_by_level_and_time, sample_batches
from evaluation.shortcut.metrics import InceptionDistances, energy_distance, to_uint8
from evaluation.shortcut.settings import Settings
from evaluation.table import format_table
from objectives.settings import ObjectiveConfig
from pipelines.shortcut.pipeline import ShortcutPipeline

GRID_COLUMNS = 10
ENERGY_SAMPLES = 2000  # of either set, for the energy distance of other pictures than digits
ENERGY_VALUES = 3 * 64 * 64  # per picture; larger ones are only compared by FID and KID


@dataclass(frozen=True)
class Way:
    """One way of sampling."""

    num_inference_steps: int | None
    step_sizes: tuple[float, ...] | None
    mode: str
    guidance_scale: float

    @property
    def name(self) -> str:
        if self.step_sizes is not None:
            name = " ".join(f"{d:g}" for d in self.step_sizes)
        else:
            name = f"{self.num_inference_steps} step" + "s" * (self.num_inference_steps > 1)
        name += ", flow" if self.mode == "flow" else ""
        return name + (f", guidance {self.guidance_scale:g}" if self.guidance_scale != 1 else "")

    def arguments(self) -> dict:
        """As the pipeline takes them."""
        return {
            "num_inference_steps": self.num_inference_steps,
            "step_sizes": None if self.step_sizes is None else list(self.step_sizes),
            "mode": self.mode,
            "guidance_scale": self.guidance_scale,
        }


def describe_run(folder: Path, pipeline: ShortcutPipeline) -> tuple[ObjectiveConfig, str]:
    """The objective of the training and a name for the weights, from the run's config.yaml if that is there."""
    scheduler = pipeline.scheduler.config
    names = {"own": "shortcut", "smallest": "flow_matching", "one_step": "live_reflow"}
    objective = ObjectiveConfig(
        name="consistency" if scheduler.method == "consistency" else names[scheduler.larger_steps],
        denoise_timesteps=scheduler.denoise_timesteps,
        smallest_step=scheduler.smallest_step,
    )
    unknown = "exported (EMA unless the run was trained without it)"
    path = folder / "config.yaml"
    if not path.is_file():
        return objective, unknown
    try:
        saved = yaml.safe_load(path.read_text(encoding="utf-8"))
        weights = "exported (EMA)" if saved["training"]["use_ema"] else "exported (raw, trained without EMA)"
        return ObjectiveConfig(**saved["objective"]), weights
    except (KeyError, TypeError, ValueError, yaml.YAMLError) as error:
        print(f"{path} is not understood, its objective is guessed from the scheduler: {str(error).splitlines()[0]}")
        return objective, unknown


def choose_ways(settings: Settings, pipeline: ShortcutPipeline) -> list[Way]:
    """Every step count and list, in every mode, at every guidance; what the scheduler refuses is said and left out."""
    layouts = [(steps, None) for steps in settings.steps]
    layouts += [(None, settings.step_sizes)] if settings.step_sizes else []
    ways = []
    for guidance_scale in settings.guidance_scale:
        for mode in settings.mode:
            for layout in layouts:
                way = Way(*layout, mode, guidance_scale)
                try:
                    pipeline.scheduler.set_timesteps(*layout, mode)
                    ways.append(way)
                except ValueError as error:
                    print(f"skipped {way.name}: {error}")
    if not ways:
        fail("no steps are left to measure")
    return list(dict.fromkeys(ways))


def open_dataset(settings: Settings, split: str, image_size: int) -> Dataset:
    size = None if settings.dataset_name == "digits" else image_size
    return open_images(settings.dataset_name, path=settings.path, split=split, image_size=size)


def read(dataset: Dataset, rows: Sequence[int], settings: Settings) -> Iterator[dict[str, Tensor]]:
    """Batches of the given rows."""
    keys = [SampleKey(row) for row in rows]
    return iter(DataLoader(dataset, settings.batch_size, sampler=keys, num_workers=settings.dataloader_num_workers))


@torch.no_grad()
def to_images(pipeline: ShortcutPipeline, batch: dict[str, Tensor]) -> Tensor:
    """A batch's pictures (B, C, H, W) in [-1, 1] on the CPU; cached latents are decoded, as samples are."""
    if "pixel_values" in batch:
        return batch["pixel_values"]
    return pipeline._decode(batch["latents"].to(pipeline.device)).float().clamp(-1, 1).cpu()


@torch.no_grad()
def to_model_space(pipeline: ShortcutPipeline, batch: dict[str, Tensor]) -> Tensor:
    """What the network models (B, C, H, W): the batch's latents, or its pictures, encoded where there is a VAE."""
    if "latents" in batch or pipeline.vae is None:
        return batch.get("latents", batch.get("pixel_values"))
    config = pipeline.vae.config
    latents = pipeline.vae.encode(batch["pixel_values"].to(pipeline.vae.device, pipeline.vae.dtype)).latent_dist.mean
    return ((latents - (config.shift_factor or 0.0)) * config.scaling_factor).float().cpu()


class Reference:
    """The real pictures and every distance that can be measured to them."""

    def __init__(self, settings: Settings, pipeline: ShortcutPipeline, image_shape: tuple[int, ...]):
        is_digits = settings.dataset_name == "digits"
        dataset = open_dataset(settings, settings.split or ("all" if is_digits else "train"), image_shape[-1])
        shape = tuple(to_images(pipeline, next(read(dataset, [0], settings))).shape[1:])
        if shape != image_shape:
            raise ValueError(
                f"the model makes pictures of shape {image_shape}, those of {settings.dataset_name} are {shape}"
            )
        self.inception = open_inception(settings, min(len(dataset), settings.num_samples), pipeline.device)
        self.digits = DigitsReference() if is_digits else None
        self.pictures = None
        if not is_digits and math.prod(shape) <= ENERGY_VALUES:
            # Evenly spread, since folders list one class after another.
            count = min(len(dataset), ENERGY_SAMPLES)
            rows = [index * len(dataset) // count for index in range(count)]
            self.pictures = torch.cat([to_images(pipeline, batch) for batch in read(dataset, rows, settings)])
        if self.inception is not None:
            for batch in tqdm(read(dataset, range(len(dataset)), settings), desc="real pictures", unit="batch"):
                self.inception.add(to_images(pipeline, batch), real=True)

    @property
    def num_kept(self) -> int | None:
        """How many samples `measure` wants to see: none, some, or all (None)."""
        if self.digits is not None:
            return None
        return ENERGY_SAMPLES if self.pictures is not None else 0

    def measure(self, samples: Tensor) -> dict[str, float | str | int]:
        """Distances of the samples (N, C, H, W) that were kept; FID and KID of all that were added to `inception`."""
        metrics = {}
        if self.digits is not None:
            metrics |= self.digits.measure(samples)
        if self.pictures is not None:
            metrics["energy_distance"] = energy_distance(samples, self.pictures)
        if self.inception is not None:
            metrics |= self.inception.compute()
        return metrics


def open_inception(settings: Settings, smaller_set: int, device: torch.device) -> InceptionDistances | None:
    """FID and KID, or None with a line that says what is missing."""
    if settings.inception_weights is None:
        print(
            "FID and KID are skipped: give --inception_weights FILE, the TorchScript inception-2015-12-05.pt that "
            "StyleGAN and clean-fid use (nothing is downloaded)"
        )
        return None
    try:
        return InceptionDistances(settings.inception_weights, device, min(1000, smaller_set), settings.seed)
    except ImportError as error:
        print(f"FID and KID are skipped: {error}")
        return None
    except ValueError as error:
        fail(f"--inception_weights: {error}")


def evaluate_way(
    pipeline: ShortcutPipeline, way: Way, settings: Settings, reference: Reference
) -> tuple[dict[str, float], list[Image.Image]]:
    """Sample and measure one way. Returns the metrics with `seconds` of sampling, and pictures for the grid."""
    columns = min(pipeline.transformer.config.num_classes, GRID_COLUMNS) if not settings.unconditional else GRID_COLUMNS
    wanted = settings.num_samples if reference.num_kept is None else max(reference.num_kept, columns)
    kept, seconds = [], 0.0
    batches = sample_batches(
        pipeline,
        settings.num_samples,
        **way.arguments(),
        batch_size=settings.batch_size,
        seed=settings.seed,
        unconditional=settings.unconditional,
    )
    with tqdm(total=settings.num_samples, desc=way.name, unit="image", leave=False) as progress:
        began = time.perf_counter()
        for samples in batches:
            seconds += time.perf_counter() - began
            if not samples.isfinite().all():
                fail(f"the samples of {way.name} are not finite, this model has diverged")
            if reference.inception is not None:
                reference.inception.add(samples, real=False)
            if wanted > 0:
                kept.append(samples[:wanted])
                wanted -= len(kept[-1])
            progress.update(len(samples))
            began = time.perf_counter()
    samples = torch.cat(kept)
    metrics = reference.measure(samples) | {"seconds": round(seconds, 3)}
    return metrics, [to_pil(sample) for sample in samples[:columns]]


def to_pil(sample: Tensor) -> Image.Image:
    """(1 or 3, H, W) in [-1, 1] -> a picture."""
    pixels = to_uint8(sample).permute(1, 2, 0).numpy()
    return Image.fromarray(pixels[..., 0] if pixels.shape[-1] == 1 else pixels)


def measure_loss(
    pipeline: ShortcutPipeline, settings: Settings, objective: ObjectiveConfig, image_size: int
) -> dict | None:
    """`loss_by_level_and_time` on held-out data, or None with a line that says why not."""
    if objective.name.startswith("consistency"):
        print(f"loss by level and time is skipped: {objective.name} learns no flow")
        return None
    try:
        dataset = open_dataset(settings, "validation", image_size)
    except (OSError, ValueError) as error:
        print(f"loss by level and time is skipped, no held-out data: {error}")
        return None
    count = min(settings.loss_samples, len(dataset))
    rows = [index * len(dataset) // count for index in range(count)]
    batches = list(read(dataset, rows, settings))
    data = torch.cat([to_model_space(pipeline, batch) for batch in batches])
    labels = None if settings.unconditional else torch.cat([batch["class_labels"] for batch in batches])
    return loss_by_level_and_time(
        pipeline.transformer,
        data,
        labels,
        objective,
        num_time_bins=settings.num_time_bins,
        batch_size=settings.batch_size,
        seed=settings.seed,
        show_progress=True,
    )


def format_metrics(rows: dict[str, dict[str, float]]) -> str:
    """One line per named row; columns are all metrics that any row has."""
    columns = list(dict.fromkeys(key for row in rows.values() for key in row))
    cells = {name: [f"{row[key]:.4g}" if key in row else "" for key in columns] for name, row in rows.items()}
    return format_table(columns, cells, width=17)


def report(settings: Settings) -> None:
    """Measure every way of sampling, and the loss by level and time."""
    pipeline = load_pipeline(ShortcutPipeline, settings.model_dir, settings.device)
    objective, weights = describe_run(settings.model_dir, pipeline)
    unconditional = settings.unconditional or objective.condition_dropout_prob == 1
    settings = settings.model_copy(update={"unconditional": unconditional})
    ways = choose_ways(settings, pipeline)
    image_shape = tuple(draw_samples(pipeline, 1).shape[1:])
    output_dir = settings.output_dir or settings.model_dir / "evaluation"
    with input_errors():
        reference = Reference(settings, pipeline, image_shape)
        output_dir.mkdir(parents=True, exist_ok=True)

    common = {
        "num_samples": settings.num_samples,
        "weights": weights,
        "unconditional": unconditional,
        "seed": settings.seed,
        "dataset_name": settings.dataset_name,
        "inception_sha256": reference.inception and reference.inception.sha256,
        "kid_subset_size": reference.inception and reference.inception.kid_subset_size,
    }
    table, pictures = {}, []
    if reference.digits is not None:
        table["real digits, train against held-out"] = common["floor"] = reference.digits.floor()
        common["digits_classifier_accuracy"] = round(reference.digits.accuracy, 4)
    with (output_dir / "results.jsonl").open("w", encoding="utf-8") as results:
        for way in ways:
            metrics, images = evaluate_way(pipeline, way, settings, reference)
            results.write(json.dumps(way.arguments() | common | metrics) + "\n")
            results.flush()  # a long evaluation may be stopped half-way
            table[way.name] = metrics
            pictures.append(images)
    image_grid(pictures, [way.name for way in ways], cell=64).save(output_dir / "grid.png")
    losses = measure_loss(pipeline, settings, objective, image_shape[-1])
    if losses is not None:
        losses = {"objective": objective.name, "weights": weights} | losses
        (output_dir / "loss_by_level_and_time.json").write_text(json.dumps(losses) + "\n", encoding="utf-8")
    print(f"{settings.num_samples} samples, weights: {weights}")
    print(format_metrics(table))
    print(f"written to {output_dir}")
