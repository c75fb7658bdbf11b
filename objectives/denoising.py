"""Denoisers at given noise levels: rectified flow, and the diffusion losses it is compared with (arXiv 2412.11972).

sigma = 1 is noise, sigma = 0 is data, as in diffusers' flow-matching schedulers: an output of 'flow' is d x / d sigma,
noise - data, the negative of the velocity in objectives.rectified_flow, where time runs the other way.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from objectives.rectified_flow import interpolate, per_row, squared_error
from objectives.settings import NoiseLevelConfig

# network(noisy, timesteps, conditions) -> its output, of the shape of noisy; timesteps (B,)
Denoiser = Callable[[Tensor, Tensor, dict[str, Tensor]], Tensor]


def draw_sigmas(count: int, config: NoiseLevelConfig, device: torch.device) -> Tensor:
    """(count,) noise levels in (0, 1], of which a share of `pure_noise_prob` is exactly 1."""
    match config.timestep_sampling:
        case "uniform":
            sigmas = 1 - torch.rand(count, device=device)
        case "logit_normal":
            sigmas = torch.sigmoid(config.logit_mean + config.logit_std * torch.randn(count, device=device))
        case "discrete":
            levels = torch.tensor(config.discrete_sigmas).to(device, non_blocking=True)
            sigmas = levels[torch.randint(len(levels), (count,), device=device)]
    return torch.where(torch.rand(count, device=device) < config.pure_noise_prob, 1.0, sigmas)


def flow_loss(
    network: Denoiser,
    noise: Tensor,
    data: Tensor,
    sigmas: Tensor,
    conditions: dict[str, Tensor],
    num_timesteps: int,
    loss_weighting: str = "none",
) -> tuple[Tensor, Tensor]:
    """E w || f(x, T sigma) - (noise - data) ||^2 at x = sigma noise + (1 - sigma) data, for given noise and levels.

    Args:
        noise, data: (B, ...). sigmas: (B,) in (0, 1].
        num_timesteps: T, the scale on which the network is told sigma.
        loss_weighting: `none`, w = 1; `sigma_squared`, w = sigma^2: the error of the clean data instead.

    Returns:
        The scalar loss, and the clean data (B, ...) that one step from x would give.
    """
    noisy = interpolate(noise, data, 1 - sigmas)
    output = network(noisy, num_timesteps * sigmas, conditions)
    errors = squared_error(output, noise - data)
    loss = (sigmas.square() * errors if loss_weighting == "sigma_squared" else errors).mean()
    return loss, noisy - per_row(sigmas, noisy) * output


def diffusion_loss(
    network: Denoiser,
    noise: Tensor,
    data: Tensor,
    sigmas: Tensor,
    conditions: dict[str, Tensor],
    prediction_type: str,
    alphas_cumprod: Tensor,
) -> tuple[Tensor, Tensor]:
    """The same on a diffusion schedule: x = alpha data + sigma noise at the step that `sigmas` point to.

    Args:
        sigmas: (B,) in (0, 1], the place on the schedule: 1 is its last step.
        prediction_type: the network's target: `epsilon` (noise), `v_prediction` (alpha noise - sigma data) or `sample`.
        alphas_cumprod: (T,) squares of alpha; sigma^2 = 1 - alpha^2.
    """
    timesteps = ((sigmas * len(alphas_cumprod)).ceil().long() - 1).clamp(min=0)
    alphas_cumprod = alphas_cumprod.to(data.device, non_blocking=True)[timesteps]
    alpha, sigma = per_row(alphas_cumprod.sqrt(), data), per_row((1 - alphas_cumprod).sqrt(), data)
    noisy = alpha * data + sigma * noise
    output = network(noisy, timesteps, conditions)
    match prediction_type:
        case "epsilon":
            target, clean = noise, (noisy - sigma * output) / alpha
        case "v_prediction":
            target, clean = alpha * noise - sigma * data, alpha * noisy - sigma * output
        case "sample":
            target, clean = data, output
        case _:
            raise ValueError(
                f"`prediction_type` must be 'epsilon', 'v_prediction' or 'sample', got {prediction_type!r}"
            )
    return squared_error(output, target).mean(), clean
