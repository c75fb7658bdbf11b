"""Rectified flow, the straight path between noise and data (Liu et al., arXiv 2209.03003; Lipman et al., 2210.02747).

t = 0 is noise, t = 1 is data, and a velocity points from noise to data. A sample is a tensor (B, ...) or a dict of such
tensors (one per modality of a scene); nothing here assumes images.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

Sample = Tensor | dict[str, Tensor]
# network(sample, t, step_size, conditions) -> the velocity, of the sample's shape; t and step_size are (B,)
Network = Callable[[Sample, Tensor, Tensor, Sample], Sample]


def tree_map(function: Callable[..., Tensor], *samples: Sample) -> Sample:
    """Apply `function` to a tensor, or to each entry of a dict; further samples have the same keys."""
    first = samples[0]
    if isinstance(first, dict):
        return {key: tree_map(function, *(sample[key] for sample in samples)) for key in first}
    return function(*samples)


def leaves(sample: Sample) -> list[Tensor]:
    """The tensors of a sample."""
    return [leaf for value in sample.values() for leaf in leaves(value)] if isinstance(sample, dict) else [sample]


def per_row(values: Tensor, like: Tensor) -> Tensor:
    """(B,) -> (B, 1, ..., 1), ready to multiply a (B, ...) tensor; (B, N) for a (B, N, ...) tensor likewise."""
    return values.reshape(*values.shape, *(1,) * (like.ndim - values.ndim)).to(like.dtype)


def take(sample: Sample, rows: Tensor | slice) -> Sample:
    """The given rows of every tensor."""
    return tree_map(lambda x: x[rows], sample)


def concatenate(*samples: Sample) -> Sample:
    """Rows of several samples, one after another."""
    return tree_map(lambda *xs: torch.cat(xs), *samples)


def where_rows(mask: Tensor, a: Sample, b: Sample) -> Sample:
    """Row by row `a` where the mask (B,) is set, else `b`."""
    return tree_map(lambda x, y: torch.where(mask.reshape(-1, *(1,) * (x.ndim - 1)), x, y), a, b)


def noise_like(sample: Sample) -> Sample:
    """Standard normal noise of the sample's shape, from torch's global generator."""
    return tree_map(torch.randn_like, sample)


def interpolate(noise: Sample, data: Sample, t: Tensor, path_eps: float = 0.0) -> Sample:
    """x_t = (1 - (1 - path_eps) t) noise + t data."""
    return tree_map(lambda x0, x1: (1 - (1 - path_eps) * per_row(t, x0)) * x0 + per_row(t, x1) * x1, noise, data)


def velocity_target(noise: Sample, data: Sample, path_eps: float = 0.0) -> Sample:
    """d x_t / dt = data - (1 - path_eps) noise."""
    return tree_map(lambda x0, x1: x1 - (1 - path_eps) * x0, noise, data)


def euler_step(sample: Sample, velocity: Sample, step_size: Tensor) -> Sample:
    """x_{t+d} = x_t + d v."""
    return tree_map(lambda x, v: x + per_row(step_size, x) * v, sample, velocity)


def squared_difference(prediction: Tensor, target: Tensor) -> Tensor:
    """Elementwise (prediction - target)^2, at least in float32."""
    if prediction.dtype in (torch.float16, torch.bfloat16):
        prediction = prediction.float()
    return (prediction - target.to(prediction.dtype)).square()


def squared_error(prediction: Sample, target: Sample) -> Tensor:
    """(B,) mean squared error of each row, at least in float32; modalities of a dict weigh alike."""
    errors = tree_map(lambda p, y: squared_difference(p, y).flatten(1).mean(1), prediction, target)
    return torch.stack(leaves(errors)).mean(0)


def flow_matching_loss(
    network: Network, noise: Sample, data: Sample, t: Tensor, conditions: Sample, *, step_size: float, path_eps: float
) -> tuple[Tensor, dict[str, Tensor]]:
    """E || v(x_t, t) - (data - noise) ||^2 at given noise and times; the network is told `step_size` on every row."""
    noisy = interpolate(noise, data, t, path_eps)
    prediction = network(noisy, t, torch.full_like(t, step_size), conditions)
    loss = squared_error(prediction, velocity_target(noise, data, path_eps)).mean()
    return loss, {"loss_flow": loss.detach()}
