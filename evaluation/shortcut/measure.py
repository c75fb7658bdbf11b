"""How good a shortcut model is: its samples against real digits, its loss by level and time."""

from __future__ import annotations

import functools
from collections.abc import Iterator, Sequence

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from data_prep.images.digits import load_digits
from evaluation.shortcut.metrics import energy_distance, frechet_distance, train_digits_classifier
from objectives.rectified_flow import flow_matching_loss, interpolate, squared_error
from objectives.settings import ObjectiveConfig
from objectives.shortcut import Draws, bootstrap_targets
from pipelines.shortcut.pipeline import ShortcutPipeline
from pipelines.shortcut.transformer import ShortcutDiT

NOISE_BLOCK = 64  # samples whose noise is drawn together


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
    inside = functools.partial(stays_inside, transformer, objective)
    grid = [(level, t) for level in levels for t in times if inside(t, 2.0**-level)]
    grid += [(None, t) for t in times if inside(t, objective.flow_step_size)]
    loss = dict.fromkeys(grid, 0.0)

    null = torch.full((len(data),), transformer.config.num_classes)
    class_labels = null if class_labels is None else class_labels
    was_training, device = transformer.training, transformer.device
    transformer.eval()
    try:
        for start in range(0, len(data), batch_size):
            rows = slice(start, start + batch_size)
            x = data[rows].to(device)
            noise = sample_noise(start, len(x), data.shape[1:], seed).to(device)
            conditions = [{"class_labels": y[rows].to(device)} for y in (class_labels, null)]
            for level, t in tqdm(grid, desc="loss by level and time", disable=not show_progress, leave=False):
                error = loss_at(transformer, x, noise, *conditions, level, t, objective)
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


def stays_inside(transformer: ShortcutDiT, objective: ObjectiveConfig, t: float, d: float) -> bool:
    """Whether a network knows a step of length d at t: up to t + d = 1, and on the lattice if it knows only that."""
    # What stands for the infinitesimal step is of no length, but log2 networks know times by 1/M.
    spacing = d or 1 / objective.denoise_timesteps
    lattice = transformer.config.step_embedding == "log2"
    return t + d <= 1 + 1e-9 and (not lattice or abs(t / spacing - round(t / spacing)) < 1e-6)


def loss_at(
    transformer: ShortcutDiT,
    x: Tensor,
    noise: Tensor,
    conditions: dict[str, Tensor],
    null_conditions: dict[str, Tensor],
    level: int | None,
    t: float,
    objective: ObjectiveConfig,
) -> Tensor:
    """The scalar loss of samples x (B, C, H, W), all at time t: of a step 2^-level, or of the flow where it is None."""

    def network(sample: Tensor, t: Tensor, step_size: Tensor, conditions: dict[str, Tensor]) -> Tensor:
        return transformer(sample, t, step_size, **conditions).sample

    t_rows = torch.full((len(x),), t, device=x.device)
    if level is None:
        d = objective.flow_step_size
        return flow_matching_loss(network, noise, x, t_rows, conditions, step_size=d, path_eps=objective.path_eps)[0]
    draws = Draws(
        noise=noise,
        t=t_rows,
        step_size=torch.full_like(t_rows, 2.0**-level),
        drop=torch.zeros_like(t_rows, dtype=torch.bool),
        rows=torch.arange(len(x), device=x.device),
        num_bootstrap=len(x),
        guidable=list(range(len(x))) if level == objective.levels - 1 else [],
    )
    noisy = interpolate(noise, x, t_rows, objective.path_eps)
    target = bootstrap_targets(network, noisy, draws, conditions, null_conditions, objective)
    return squared_error(network(noisy, t_rows, draws.step_size, conditions), target).mean()
