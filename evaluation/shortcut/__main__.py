"""Measure a trained shortcut model at several step counts.

    python -m evaluation.shortcut outputs/shortcut-digits
    python -m evaluation.shortcut outputs/celeba --dataset_name imagefolder --path photos --num_samples 50000 \\
        --steps 1 2 4 8 32 128 --mode shortcut flow --inception_weights inception-2015-12-05.pt

Writes results.jsonl (a row per setting), grid.png (a row of samples per setting, a class and its noise per column) and
loss_by_level_and_time.json. Digits are compared by energy distance and by Frechet distance in a small classifier's
features, other pictures by FID and KID, and by energy distance where they are small.
"""

from __future__ import annotations

import argparse
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

from backlot.command_line import Parser, fail, number
from backlot.loading import load_pipeline
from backlot.pictures import image_grid
from backlot.samples import SampleKey
from data_prep.images.dataset import DATASET_NAMES, open_images
from evaluation.shortcut.measure import DigitsReference, draw_samples, loss_by_level_and_time, sample_batches
from evaluation.shortcut.metrics import (
    InceptionDistances,
    energy_distance,
    to_uint8,
)
from objectives.settings import ObjectiveConfig
from pipelines.shortcut.pipeline import ShortcutPipeline

GRID_COLUMNS = 10
ENERGY_SAMPLES = 2000  # of either set, for the energy distance of other pictures than digits
ENERGY_VALUES = 3 * 64 * 64  # per picture; larger ones are only compared by FID and KID


@dataclass(frozen=True)
class Setting:
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


def create_parser() -> argparse.ArgumentParser:
    parser = Parser(prog="python -m evaluation.shortcut", description=__doc__.split("\n")[0])
    parser.add_argument("model_dir", type=Path, help="folder of an exported ShortcutPipeline, or of a finished run")
    parser.add_argument("--dataset_name", choices=DATASET_NAMES, default="digits", help="the real pictures")
    parser.add_argument("--path", help="their folder or hub name")
    parser.add_argument("--split", help="what samples are compared with: all for digits, otherwise train")
    parser.add_argument("--num_samples", type=number(int, 2), default=1797)
    parser.add_argument("--steps", type=number(int, 1), nargs="+", default=[1, 2, 4, 8, 128], help="step counts")
    parser.add_argument("--step_sizes", type=float, nargs="+", help="one list of irregular steps more, of sum 1")
    parser.add_argument("--guidance_scale", type=number(float, 0), nargs="+", default=[1.0])
    parser.add_argument("--mode", choices=["shortcut", "flow"], nargs="+", default=["shortcut"])
    parser.add_argument(
        "--unconditional", action="store_true", help="sample without classes; assumed where the run's config.yaml says"
    )
    parser.add_argument("--seed", type=number(int, 0), default=0)
    parser.add_argument("--batch_size", type=number(int, 1), default=600)
    parser.add_argument("--inception_weights", type=Path, help="TorchScript Inception-v3 for FID and KID")
    parser.add_argument("--loss_samples", type=number(int, 1), default=256, help="held-out samples for the loss")
    parser.add_argument("--num_time_bins", type=number(int, 1), default=32, help="times for the loss")
    parser.add_argument("--dataloader_num_workers", type=number(int, 0), default=0)
    parser.add_argument("--device", help="the accelerator if there is one")
    parser.add_argument("--output_dir", type=Path, help="MODEL_DIR/evaluation")
    return parser


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


def choose_settings(args: argparse.Namespace, pipeline: ShortcutPipeline) -> list[Setting]:
    """Every step count and list, in every mode, at every guidance; what the scheduler refuses is said and left out."""
    layouts = [(steps, None) for steps in args.steps]
    layouts += [(None, tuple(args.step_sizes))] if args.step_sizes else []
    settings = []
    for guidance_scale in args.guidance_scale:
        for mode in args.mode:
            for layout in layouts:
                setting = Setting(*layout, mode, guidance_scale)
                try:
                    pipeline.scheduler.set_timesteps(*layout, mode)
                    settings.append(setting)
                except ValueError as error:
                    print(f"skipped {setting.name}: {error}")
    if not settings:
        fail("no steps are left to measure")
    return list(dict.fromkeys(settings))


def open_dataset(args: argparse.Namespace, split: str, image_size: int) -> Dataset:
    size = None if args.dataset_name == "digits" else image_size
    return open_images(args.dataset_name, path=args.path, split=split, image_size=size)


def read(dataset: Dataset, rows: Sequence[int], args: argparse.Namespace) -> Iterator[dict[str, Tensor]]:
    """Batches of the given rows."""
    keys = [SampleKey(row) for row in rows]
    return iter(DataLoader(dataset, args.batch_size, sampler=keys, num_workers=args.dataloader_num_workers))


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

    def __init__(self, args: argparse.Namespace, pipeline: ShortcutPipeline, image_shape: tuple[int, ...]):
        is_digits = args.dataset_name == "digits"
        dataset = open_dataset(args, args.split or ("all" if is_digits else "train"), image_shape[-1])
        shape = tuple(to_images(pipeline, next(read(dataset, [0], args))).shape[1:])
        if shape != image_shape:
            raise ValueError(
                f"the model makes pictures of shape {image_shape}, those of {args.dataset_name} are {shape}"
            )
        self.inception = open_inception(args, min(len(dataset), args.num_samples), pipeline.device)
        self.digits = DigitsReference() if is_digits else None
        self.pictures = None
        if not is_digits and math.prod(shape) <= ENERGY_VALUES:
            # Evenly spread, since folders list one class after another.
            count = min(len(dataset), ENERGY_SAMPLES)
            rows = [index * len(dataset) // count for index in range(count)]
            self.pictures = torch.cat([to_images(pipeline, batch) for batch in read(dataset, rows, args)])
        if self.inception is not None:
            for batch in tqdm(read(dataset, range(len(dataset)), args), desc="real pictures", unit="batch"):
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


def open_inception(args: argparse.Namespace, smaller_set: int, device: torch.device) -> InceptionDistances | None:
    """FID and KID, or None with a line that says what is missing."""
    if args.inception_weights is None:
        print(
            "FID and KID are skipped: give --inception_weights FILE, the TorchScript inception-2015-12-05.pt that "
            "StyleGAN and clean-fid use (nothing is downloaded)"
        )
        return None
    try:
        return InceptionDistances(args.inception_weights, device, min(1000, smaller_set), args.seed)
    except ImportError as error:
        print(f"FID and KID are skipped: {error}")
        return None
    except ValueError as error:
        fail(f"--inception_weights: {error}")


def evaluate_setting(
    pipeline: ShortcutPipeline, setting: Setting, args: argparse.Namespace, reference: Reference
) -> tuple[dict[str, float], list[Image.Image]]:
    """Sample and measure one setting. Returns the metrics with `seconds` of sampling, and pictures for the grid."""
    columns = min(pipeline.transformer.config.num_classes, GRID_COLUMNS) if not args.unconditional else GRID_COLUMNS
    wanted = args.num_samples if reference.num_kept is None else max(reference.num_kept, columns)
    kept, seconds = [], 0.0
    batches = sample_batches(
        pipeline,
        args.num_samples,
        **setting.arguments(),
        batch_size=args.batch_size,
        seed=args.seed,
        unconditional=args.unconditional,
    )
    with tqdm(total=args.num_samples, desc=setting.name, unit="image", leave=False) as progress:
        began = time.perf_counter()
        for samples in batches:
            seconds += time.perf_counter() - began
            if not samples.isfinite().all():
                raise SystemExit(f"error: the samples of {setting.name} are not finite, this model has diverged")
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
    pipeline: ShortcutPipeline, args: argparse.Namespace, objective: ObjectiveConfig, image_size: int
) -> dict | None:
    """`loss_by_level_and_time` on held-out data, or None with a line that says why not."""
    if objective.name.startswith("consistency"):
        print(f"loss by level and time is skipped: {objective.name} learns no flow")
        return None
    try:
        dataset = open_dataset(args, "validation", image_size)
    except (OSError, ValueError) as error:
        print(f"loss by level and time is skipped, no held-out data: {error}")
        return None
    count = min(args.loss_samples, len(dataset))
    rows = [index * len(dataset) // count for index in range(count)]
    batches = list(read(dataset, rows, args))
    data = torch.cat([to_model_space(pipeline, batch) for batch in batches])
    labels = None if args.unconditional else torch.cat([batch["class_labels"] for batch in batches])
    return loss_by_level_and_time(
        pipeline.transformer,
        data,
        labels,
        objective,
        num_time_bins=args.num_time_bins,
        batch_size=args.batch_size,
        seed=args.seed,
        show_progress=True,
    )


def format_table(rows: dict[str, dict[str, float]]) -> str:
    """One line per named row; columns are all metrics that any row has."""
    columns = list(dict.fromkeys(key for row in rows.values() for key in row))
    width = max(len(name) for name in rows)
    lines = [" " * width + "".join(f"{column:>17}" for column in columns)]
    for name, row in rows.items():
        cells = (f"{row[column]:.4g}" if column in row else "" for column in columns)
        lines.append(f"{name:<{width}}" + "".join(f"{cell:>17}" for cell in cells))
    return "\n".join(lines)


def main(argv: Sequence[str] | None = None) -> None:
    args = create_parser().parse_args(argv)
    pipeline = load_pipeline(ShortcutPipeline, args.model_dir, args.device)
    objective, weights = describe_run(args.model_dir, pipeline)
    args.unconditional = args.unconditional or objective.condition_dropout_prob == 1
    settings = choose_settings(args, pipeline)
    image_shape = tuple(draw_samples(pipeline, 1).shape[1:])
    try:
        reference = Reference(args, pipeline, image_shape)
    except (OSError, ValueError, ImportError) as error:
        fail(str(error))
    output_dir = args.output_dir or args.model_dir / "evaluation"
    output_dir.mkdir(parents=True, exist_ok=True)

    common = {
        "num_samples": args.num_samples,
        "weights": weights,
        "unconditional": args.unconditional,
        "seed": args.seed,
        "dataset_name": args.dataset_name,
        "inception_sha256": reference.inception and reference.inception.sha256,
        "kid_subset_size": reference.inception and reference.inception.kid_subset_size,
    }
    table, pictures = {}, []
    if reference.digits is not None:
        table["real digits, train against held-out"] = common["floor"] = reference.digits.floor()
        common["digits_classifier_accuracy"] = round(reference.digits.accuracy, 4)
    with (output_dir / "results.jsonl").open("w", encoding="utf-8") as results:
        for setting in settings:
            metrics, images = evaluate_setting(pipeline, setting, args, reference)
            results.write(json.dumps(setting.arguments() | common | metrics) + "\n")
            results.flush()  # a long evaluation may be stopped half-way
            table[setting.name] = metrics
            pictures.append(images)
    image_grid(pictures, [setting.name for setting in settings], cell=64).save(output_dir / "grid.png")
    losses = measure_loss(pipeline, args, objective, image_shape[-1])
    if losses is not None:
        losses = {"objective": objective.name, "weights": weights} | losses
        (output_dir / "loss_by_level_and_time.json").write_text(json.dumps(losses) + "\n", encoding="utf-8")
    print(f"{args.num_samples} samples, weights: {weights}")
    print(format_table(table))
    print(f"written to {output_dir}")


if __name__ == "__main__":
    main()
