"""Baselines that shorten an existing or growing flow: progressive distillation and the two consistency objectives.

All predict a velocity with the network, times and batches of the shortcut experiments, so that only the target differs.
"""

from __future__ import annotations

import torch
from torch import Tensor

from objectives.rectified_flow import (
    Network,
    Sample,
    euler_step,
    interpolate,
    per_row,
    squared_error,
    tree_map,
)
from objectives.settings import ObjectiveConfig
from objectives.shortcut import clip


def phase(step: int, max_train_steps: int, config: ObjectiveConfig) -> int:
    """Which of the L equal phases of training the update `step` belongs to; it depends on the global step alone."""
    return min(step // max(max_train_steps // config.levels, 1), config.levels - 1)


def starts_phase(step: int, max_train_steps: int, config: ObjectiveConfig) -> bool:
    """Whether update `step` is the first of a phase: the time to renew a progressive teacher."""
    now = phase(step, max_train_steps, config)
    return step == 0 or now != phase(step - 1, max_train_steps, config)


def lattice_times(num_rows: int, sections: int, device: torch.device) -> Tensor:
    """(num_rows,) multiples of 1 / sections in [0, 1)."""
    return torch.randint(sections, (num_rows,), device=device) / sections


def guide(network: Network, sample: Sample, t: Tensor, d: Tensor, conditions: Sample, null: Sample, scale: float):
    """v_null + w (v - v_null); one call where w is 1 (conditions only) or 0 (none)."""
    if scale == 1.0:
        return network(sample, t, d, conditions)
    unconditional = network(sample, t, d, null)
    if scale == 0.0:
        return unconditional
    conditional = network(sample, t, d, conditions)
    return tree_map(lambda n, c: n + scale * (c - n), unconditional, conditional)


def distillation_loss(
    network: Network,
    student_ema: Network,
    teacher: Network | None,
    noise: Sample,
    data: Sample,
    conditions: Sample,
    null_conditions: Sample,
    step: int,
    max_train_steps: int,
    config: ObjectiveConfig,
) -> tuple[Tensor, dict[str, Tensor]]:
    """The loss that `config.name` names, at times of the lattice that update `step` has come to."""
    match config.name:
        case "progressive":
            sections = 2 ** (config.levels - phase(step, max_train_steps, config) - 1)
        case "consistency":
            sections = 2 ** phase(step, max_train_steps, config)
        case "consistency_distillation":
            sections = config.denoise_timesteps
    t = lattice_times(len(data), sections, data.device)
    if config.name == "progressive":
        return progressive_loss(
            network, teacher, noise, data, t, conditions, null_conditions, step, max_train_steps, config
        )
    gap = torch.full_like(t, 1 / sections)
    return consistency_loss(network, student_ema, noise, data, t, gap, conditions, config, teacher)


def progressive_loss(
    network: Network,
    teacher: Network,
    noise: Sample,
    data: Sample,
    t: Tensor,
    conditions: Sample,
    null_conditions: Sample,
    step: int,
    max_train_steps: int,
    config: ObjectiveConfig,
) -> tuple[Tensor, dict[str, Tensor]]:
    """Progressive distillation (Salimans and Ho, arXiv 2202.00512) in velocity form.

    In phase p the student makes in one step of 2^-k, k = L - p - 1, what the frozen teacher (last phase's student)
    makes in two. `t` are multiples of 2^-k. The first phase may guide its teacher.
    """
    now = phase(step, max_train_steps, config)
    half = torch.full_like(t, 2.0 ** -(config.levels - now))
    scale = config.distillation_guidance_scale if now == 0 else 1.0
    noisy = interpolate(noise, data, t, config.path_eps)
    with torch.no_grad():
        first = guide(teacher, noisy, t, half, conditions, null_conditions, scale)
        midpoint = clip(euler_step(noisy, first, half), config.target_clip)
        second = guide(teacher, midpoint, t + half, half, conditions, null_conditions, scale)
        target = tree_map(lambda a, b: (a + b) / 2, first, second)
    loss = squared_error(network(noisy, t, 2 * half, conditions), target).mean()
    return loss, {"loss_distillation": loss.detach()}


def consistency_loss(
    network: Network,
    student_ema: Network,
    noise: Sample,
    data: Sample,
    t: Tensor,
    gap: Tensor,
    conditions: Sample,
    config: ObjectiveConfig,
    teacher: Network | None = None,
) -> tuple[Tensor, dict[str, Tensor]]:
    """Consistency training or, with a teacher, distillation (Song et al., arXiv 2303.01469) in velocity form.

    The data predicted at t must be what the EMA predicts at t + gap on the same path. The path is the straight line
    between noise and data, or one Euler step of the teacher. The target velocity is (data_ema - x_t) / (1 - t).

    Args:
        t, gap: (B,) with t + gap <= 1; the curricula are `consistency_gap` and 1 / M.
    """
    noisy = interpolate(noise, data, t, config.path_eps)
    later = t + gap
    with torch.no_grad():
        if teacher is None:
            ahead = interpolate(noise, data, later, config.path_eps)
        else:
            ahead = clip(euler_step(noisy, teacher(noisy, t, gap, conditions), gap), config.target_clip)
        predicted = euler_step(ahead, student_ema(ahead, later, gap, conditions), 1 - later)
        target = tree_map(lambda x1, x: (x1 - x) / per_row(1 - t, x), predicted, noisy)
    loss = squared_error(network(noisy, t, gap, conditions), target).mean()
    return loss, {"loss_consistency": loss.detach()}
