"""Live reflow: flow matching whose bootstrap rows learn the straight line to the network's own samples."""

from __future__ import annotations

import torch
from torch import Tensor

from objectives.distillation import guide
from objectives.rectified_flow import (
    Network,
    Sample,
    concatenate,
    euler_step,
    interpolate,
    squared_error,
    take,
    velocity_target,
)
from objectives.settings import ObjectiveConfig

SAMPLING_STEPS = 8


def live_reflow_loss(
    network: Network,
    noise: Sample,
    data: Sample,
    t: Tensor,
    conditions: Sample,
    null_conditions: Sample,
    num_bootstrap: int,
    config: ObjectiveConfig,
) -> tuple[Tensor, dict[str, Tensor]]:
    """Rectified flow's second stage (Liu et al., arXiv 2209.03003), done while the first one trains.

    The first `num_bootstrap` rows replace their data by what 8 Euler steps of the network make of their noise, and
    learn that pair's straight line at step size 1; the others are flow matching. All arguments have B rows.
    """
    boot, flow = slice(0, num_bootstrap), slice(num_bootstrap, None)
    with torch.no_grad():
        sample = take(noise, boot)
        ones = torch.ones_like(t[boot])
        smallest = config.flow_step_size * ones
        for i in range(SAMPLING_STEPS):
            time = i / SAMPLING_STEPS * ones
            args = (take(conditions, boot), take(null_conditions, boot), config.distillation_guidance_scale)
            sample = euler_step(sample, guide(network, sample, time, smallest, *args), ones / SAMPLING_STEPS)
    data = concatenate(sample, take(data, flow))
    step_size = torch.cat([ones, torch.full_like(t[flow], config.flow_step_size)])
    prediction = network(interpolate(noise, data, t, config.path_eps), t, step_size, conditions)
    errors = squared_error(prediction, velocity_target(noise, data, config.path_eps))
    return errors.mean(), {"loss_flow": errors[flow].mean().detach(), "loss_reflow": errors[boot].mean().detach()}
