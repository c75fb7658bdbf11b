"""A model on data: points drawn from it, and how far they are from true ones."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from evaluation.point_flow.metrics import wasserstein
from pipelines.point_flow.pipeline import PointFlowPipeline


def draw_points(
    pipeline: PointFlowPipeline, count: int, num_inference_steps: int, seed: int = 0, batch_size: int = 1024
) -> Tensor:
    """(count, 2) points; switches the pipeline's progress bar off. The noise depends on seed and count alone."""
    pipeline.set_progress_bar_config(disable=True)
    noise = torch.randn(count, 2, generator=torch.Generator().manual_seed(seed))
    batches = [
        pipeline(len(latents), num_inference_steps, latents=latents).points.cpu() for latents in noise.split(batch_size)
    ]
    return torch.cat(batches)


def evaluate(
    pipeline: PointFlowPipeline, true: Tensor, steps: Sequence[int], seed: int = 0, batch_size: int = 1024
) -> dict[int, float]:
    """The distance of as many drawn points from `true` (N, 2), by number of steps."""
    return {n: wasserstein(draw_points(pipeline, len(true), n, seed, batch_size), true) for n in steps}
