"""Measure a trained shortcut model at several step counts.

    python -m pipelines.shortcut.evaluate outputs/shortcut-digits
    python -m pipelines.shortcut.evaluate outputs/celeba --dataset_name imagefolder --path photos --num_samples 50000 \\
        --steps 1 2 4 8 32 128 --mode shortcut flow --inception_weights inception-2015-12-05.pt

Writes results.jsonl (a row per setting), grid.png (a row of samples per setting, a class and its noise per column) and
loss_by_level_and_time.json. Digits are compared by energy distance and by Frechet distance in a small classifier's
features, other pictures by FID and KID, and by energy distance where they are small.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NoReturn

import numpy as np
import torch
import yaml
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm

from data_prep.digits import load_digits
from data_prep.images import DATASET_NAMES, open_images
from pipelines.metrics import (
    InceptionDistances,
    energy_distance,
    frechet_distance,
    to_uint8,
    train_digits_classifier,
)
from pipelines.pictures import image_grid
from pipelines.shortcut.pipeline import ShortcutPipeline
from pipelines.shortcut.transformer import ShortcutDiT
from trainers.objectives.rectified_flow import flow_matching_loss, interpolate, squared_error
from trainers.objectives.settings import ObjectiveConfig
from trainers.objectives.shortcut import Draws, bootstrap_targets

NOISE_BLOCK = 64  # samples whose noise is drawn together
GRID_COLUMNS = 10
ENERGY_SAMPLES = 2000  # of either set, for the energy distance of other pictures than digits
ENERGY_VALUES = 3 * 64 * 64  # per picture; larger ones are only compared by FID and KID


# --- samples --------------------------------------------------------------------------------------


def sample_noise(first: int, count: int, shape: Sequence[int], seed: int = 0) -> Tensor:
    """Standard normal noise (count, *shape) of samples first, first + 1, ...: a function of (seed, index) only."""
    start, stop = first // NOISE_BLOCK, -(-(first + count) // NOISE_BLOCK)
    blocks = [
        np.random.default_rng((seed, block)).standard_normal((NOISE_BLOCK, *shape), dtype=np.float32)
        for block in range(start, stop)
    ]
    offset = first - start * NOISE_BLOCK
    return torch.from_numpy(np.concatenate(blocks)[offset : offset + count])


def step_generator(seed: int, index: int) -> torch.Generator:
    """The fresh noise of consistency steps, for one sample; the third number keeps it apart from the first noise."""
    return torch.Generator().manual_seed(int(np.random.SeedSequence((seed, index, 1)).generate_state(1)[0]))


def sample_batches(
    pipeline: ShortcutPipeline,
    num_samples: int,
    *,
    num_inference_steps: int | None = None,
    step_sizes: Sequence[float] | None = None,
    guidance_scale: float = 1.0,
    mode: str = "shortcut",
    batch_size: int = 600,
    seed: int = 0,
    unconditional: bool = False,
    first: int = 0,
) -> Iterator[Tensor]:
    """Sample first ... first + num_samples - 1, batch by batch; the pipeline's own progress bar is switched off.

    Sample i has class i % num_classes and noise made from (seed, i), so it does not matter how samples are spread over
    batches, or over processes by `first`.

    Args:
        num_inference_steps, step_sizes, guidance_scale, mode: as the pipeline takes them.
        unconditional: no class; for models trained without.

    Yields:
        (B, C, H, W) float32 in [-1, 1] on the CPU; the last batch may be smaller.
    """
    if num_samples < 1 or batch_size < 1:
        raise ValueError(f"`num_samples` and `batch_size` must be at least 1, got {num_samples} and {batch_size}")
    pipeline.set_progress_bar_config(disable=True)
    config = pipeline.transformer.config
    shape = (config.in_channels, config.sample_size, config.sample_size)
    for start in range(first, first + num_samples, batch_size):
        rows = range(start, min(start + batch_size, first + num_samples))
        noisy_steps = pipeline.scheduler.config.method == "consistency"
        images = pipeline(
            [None if unconditional else row % config.num_classes for row in rows],
            num_inference_steps=num_inference_steps,
            step_sizes=step_sizes,
            guidance_scale=guidance_scale,
            mode=mode,
            generator=[step_generator(seed, row) for row in rows] if noisy_steps else None,
            latents=sample_noise(start, len(rows), shape, seed),
            output_type="pt",
        ).images
        yield images.float().cpu() * 2 - 1


def draw_samples(
    pipeline: ShortcutPipeline,
    num_samples: int,
    *,
    num_inference_steps: int | None = None,
    step_sizes: Sequence[float] | None = None,
    guidance_scale: float = 1.0,
    mode: str = "shortcut",
    batch_size: int = 600,
    seed: int = 0,
    unconditional: bool = False,
    first: int = 0,
) -> Tensor:
    """All of `sample_batches` at once: (num_samples, C, H, W) float32 in [-1, 1]."""
    batches = sample_batches(
        pipeline,
        num_samples,
        num_inference_steps=num_inference_steps,
        step_sizes=step_sizes,
        guidance_scale=guidance_scale,
        mode=mode,
        batch_size=batch_size,
        seed=seed,
        unconditional=unconditional,
        first=first,
    )
    return torch.cat(list(batches))


class DigitsReference:
    """The 1,797 real digits and a classifier trained on the 1,437 of their train split (a few seconds).

    Attributes:
        accuracy: of the classifier, on the 360 held-out digits.
    """

    def __init__(self, seed: int = 0):
        self.train, train_labels = load_digits("train")
        self.test, test_labels = load_digits("validation")
        self.images = torch.cat([self.train, self.test])
        self.classifier = train_digits_classifier(self.train, train_labels, seed)
        self.accuracy = (self.classifier(self.test).argmax(1) == test_labels).float().mean().item()

    def measure(self, samples: Tensor) -> dict[str, float]:
        """Samples (N, 1, 8, 8) in [-1, 1] against all real digits.

        Returns:
            `energy_distance` in pixels, about 0 at best; `frechet` in the classifier's features, see `floor`.
        """
        return self._compare(samples, self.images)

    def floor(self) -> dict[str, float]:
        """The train split against the held-out one: what real digits score."""
        return self._compare(self.train, self.test)

    def _compare(self, a: Tensor, b: Tensor) -> dict[str, float]:
        features = self.classifier.features
        return {"energy_distance": energy_distance(a, b), "frechet": frechet_distance(features(a), features(b))}


# --- the loss, looked at closely ------------------------------------------------------------------


@torch.no_grad()
def loss_by_level_and_time(
    transformer: ShortcutDiT,
    data: Tensor,
    class_labels: Tensor | None,
    objective: ObjectiveConfig,
    *,
    num_time_bins: int = 32,
    batch_size: int = 256,
    seed: int = 0,
    show_progress: bool = False,
) -> dict:
    """The loss where every sample is given the same step size d = 2^-k and time t: nothing is trained or changed.

    Steps stay inside t + d <= 1, and on the lattice (t a multiple of d) for a network that knows only that.

    Args:
        data: (N, C, H, W) what the network models (latents where it has a VAE).
        class_labels: (N,), None for no class.
        objective: of the training. Levels below `levels` are measured for `shortcut` only.
        num_time_bins: B; times are 0, 1/B, ..., (B-1)/B.

    Returns:
        `times` (B numbers); `flow`, the flow-matching loss at each; `levels`, a list of {`level`, `step_size`, `loss`},
        the self-consistency error with the network itself as the teacher. None where a step would leave the domain.
    """
    times = [index / num_time_bins for index in range(num_time_bins)]
    levels = range(objective.levels) if objective.name == "shortcut" else range(0)
    lattice = transformer.config.step_embedding == "log2"
    smallest = 1 / objective.denoise_timesteps

    def inside(t: float, d: float) -> bool:
        # What stands for the infinitesimal step is of no length, but log2 networks know times by 1/M.
        spacing = d or smallest
        return t + d <= 1 + 1e-9 and (not lattice or abs(t / spacing - round(t / spacing)) < 1e-6)

    grid = [(level, t) for level in levels for t in times if inside(t, 2.0**-level)]
    grid += [(None, t) for t in times if inside(t, objective.flow_step_size)]
    loss = dict.fromkeys(grid, 0.0)

    def network(sample: Tensor, t: Tensor, step_size: Tensor, conditions: dict[str, Tensor]) -> Tensor:
        return transformer(sample, t, step_size, **conditions).sample

    null = torch.full((len(data),), transformer.config.num_classes)
    class_labels = null if class_labels is None else class_labels
    was_training, device = transformer.training, transformer.device
    transformer.eval()
    try:
        for start in range(0, len(data), batch_size):
            rows = slice(start, start + batch_size)
            x = data[rows].to(device)
            noise = sample_noise(start, len(x), data.shape[1:], seed).to(device)
            conditions, null_conditions = ({"class_labels": y[rows].to(device)} for y in (class_labels, null))
            for level, t in tqdm(grid, desc="loss by level and time", disable=not show_progress, leave=False):
                t_rows = torch.full((len(x),), t, device=device)
                if level is None:
                    d = objective.flow_step_size
                    error, _ = flow_matching_loss(
                        network, noise, x, t_rows, conditions, step_size=d, path_eps=objective.path_eps
                    )
                else:
                    draws = Draws(
                        noise=noise,
                        t=t_rows,
                        step_size=torch.full_like(t_rows, 2.0**-level),
                        drop=torch.zeros_like(t_rows, dtype=torch.bool),
                        rows=torch.arange(len(x), device=device),
                        num_bootstrap=len(x),
                        guidable=list(range(len(x))) if level == objective.levels - 1 else [],
                    )
                    noisy = interpolate(noise, x, t_rows, objective.path_eps)
                    target = bootstrap_targets(network, noisy, draws, conditions, null_conditions, objective)
                    error = squared_error(network(noisy, t_rows, draws.step_size, conditions), target).mean()
                loss[level, t] += error.item() * len(x) / len(data)
    finally:
        transformer.train(was_training)
    return {
        "times": times,
        "flow": [loss.get((None, t)) for t in times],
        "levels": [
            {"level": level, "step_size": 2.0**-level, "loss": [loss.get((level, t)) for t in times]}
            for level in levels
        ],
    }


# --- the program ----------------------------------------------------------------------------------


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


class RowKey(int):
    """A row that knows its randomness: a latent cache draws from its posterior."""

    def generator(self) -> torch.Generator:
        return torch.Generator().manual_seed(int(self))


class Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        fail(message)


def fail(message: str) -> NoReturn:
    """One line and exit code 2: an argument is wrong."""
    print(f"error: {message}", file=sys.stderr)
    raise SystemExit(2)


def number(kind: type, lowest: float, highest: float = math.inf):
    """An argparse type: a number in [lowest, highest]."""

    def parse(text: str) -> int | float:
        value = kind(text)
        if not lowest <= value <= highest or value == math.inf:
            raise argparse.ArgumentTypeError(f"must be at least {lowest:g}, got {text}")
        return value

    parse.__name__ = kind.__name__  # argparse names it where the text is no number
    return parse


def create_parser() -> argparse.ArgumentParser:
    parser = Parser(
        prog="python -m pipelines.shortcut.evaluate", description=__doc__.split("\n")[0], allow_abbrev=False
    )
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


def load_pipeline(folder: Path, device: str | None) -> ShortcutPipeline:
    index = folder / "model_index.json"
    if not index.is_file():
        fail(f"{folder} holds no exported pipeline (no model_index.json); a run exports one when it finishes")
    kind = json.loads(index.read_text(encoding="utf-8")).get("_class_name")
    if kind != ShortcutPipeline.__name__:
        fail(f"{folder} holds a {kind}, not a {ShortcutPipeline.__name__}")
    if device is None:
        device = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else "cpu"
    try:
        return ShortcutPipeline.from_pretrained(folder).to(device)
    except (OSError, ValueError, RuntimeError) as error:
        fail(f"{folder} cannot be loaded on {device}: {str(error).splitlines()[0]}")


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
    keys = [RowKey(row) for row in rows]
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
    pipeline = load_pipeline(args.model_dir, args.device)
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
