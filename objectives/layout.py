"""Draws and losses of layout training on FLUX (InstanceAssemble, arXiv 2509.16691; identity: XVerse, 2506.21416).

sigma = 1 is noise, sigma = 0 is data: z = (1 - sigma) data + sigma noise, and a velocity is noise - data, as in
diffusers' flow-matching schedulers. Boxes are on the host, so what is computed for which never waits for a device.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from backlot.crops import span
from objectives.layout_settings import DropoutConfig, IdentityConfig, TimestepConfig
from objectives.rectified_flow import per_row

FOREGROUND = 0.5
"""Alpha from which on an object counts as foreground."""
SMALLEST_SIGMA = 0.02
"""Of a level drawn for the identity loss."""
PRIOR_FOREGROUND, PRIOR_BACKGROUND = 0.75, 0.25
"""What the prior wants alpha to be."""


# ---- noise levels ----


def resolution_shift(num_tokens: int, base_tokens: int, max_tokens: int, base_shift: float, max_shift: float) -> float:
    """mu = base_shift + (S - base_tokens) (max_shift - base_shift) / (max_tokens - base_tokens), S image tokens."""
    return base_shift + (num_tokens - base_tokens) * (max_shift - base_shift) / (max_tokens - base_tokens)


def scheduler_shift(scheduler: Mapping, num_tokens: int) -> float:
    """mu with which a flow-matching scheduler of this configuration generates a picture of so many tokens."""
    if not scheduler["use_dynamic_shifting"]:
        return math.log(scheduler["shift"])
    return resolution_shift(
        num_tokens,
        scheduler["base_image_seq_len"],
        scheduler["max_image_seq_len"],
        scheduler["base_shift"],
        scheduler["max_shift"],
    )


def shift_sigmas(sigmas: Tensor, mu: float) -> Tensor:
    """sigma = e^mu u / (1 + (e^mu - 1) u): more noise for mu > 0 (Esser et al., arXiv 2403.03206)."""
    factor = math.exp(mu)
    return factor * sigmas / (1 + (factor - 1) * sigmas)


def draw_sigmas(count: int, timesteps: TimestepConfig, mu: float, p_low: float = 0.0, sigma_max: float = 1.0) -> Tensor:
    """(count,) levels in (0, 1) on the host, from torch's global generator there.

    Args:
        mu: the resolution shift.
        p_low: share of the levels that is drawn from U(0.02, sigma_max) instead.
    """
    if timesteps.weighting_scheme == "logit_normal":
        drawn = torch.sigmoid(timesteps.logit_mean + timesteps.logit_std * torch.randn(count))
    else:
        drawn = 1 - torch.rand(count)
    low = SMALLEST_SIGMA + (sigma_max - SMALLEST_SIGMA) * torch.rand(count)
    return torch.where(torch.rand(count) < p_low, low, shift_sigmas(drawn, mu))


# ---- conditions that are left out ----


class Kept(NamedTuple):
    """What is left of a batch's conditions: masks, true where something stays."""

    objects: Tensor
    """(B, N)"""
    text: Tensor
    clip: Tensor
    dino: Tensor
    prompt: Tensor
    """(B,)"""

    def to(self, device: torch.device) -> Kept:
        return Kept(*(mask.to(device, non_blocking=True) for mask in self))


def draw_kept(num_pictures: int, num_objects: int, dropout: DropoutConfig) -> Kept:
    """Independent coins for each condition of a batch, on the host."""

    def keep(probability: float, *shape: int) -> Tensor:
        return torch.rand(shape) >= probability

    each = num_pictures, num_objects
    return Kept(
        objects=keep(dropout.layout, num_pictures, 1) & keep(dropout.instance, *each),
        text=keep(dropout.instance_text, *each),
        clip=keep(dropout.clip, *each),
        dino=keep(dropout.dino, *each),
        prompt=keep(dropout.prompt, num_pictures),
    )


# ---- alpha ----


def alpha_prior(alpha: Tensor, is_foreground: Tensor, valid: Tensor) -> Tensor:
    """E_pictures mean_objects BCE(alpha, 0.75 if foreground else 0.25); a picture without objects counts as 0.

    Means within a picture first, so that it does not matter which pictures share a micro-batch.

    Args:
        alpha: (B, N) in (0, 1). is_foreground, valid: (B, N) bool.
    """
    alpha, valid = alpha.float(), valid.float()
    target = torch.where(is_foreground, PRIOR_FOREGROUND, PRIOR_BACKGROUND)
    entropy = -(target * alpha.log() + (1 - target) * (1 - alpha).log())
    return ((entropy * valid).sum(1) / valid.sum(1).clamp(min=1)).mean()


# ---- identity ----


def choose_crops(
    boxes: np.ndarray, sigmas: Tensor, kept: Kept, picture_size: tuple[int, int], config: IdentityConfig
) -> list[tuple[int, int]]:
    """Which objects the identity loss looks at: (picture, object) pairs in order, drawn on the host.

    Those whose DINO embedding the network is told, in a box that is large enough, in pictures with little noise.

    Args:
        boxes: (B, N, 4) xyxy in [0, 1] of objects with an identity, zeros elsewhere.
        sigmas: (B,) levels of the pictures, on the host; so is `kept`.
        picture_size: height and width in pixels.
    """
    height, width = picture_size
    sides = np.minimum((boxes[..., 2] - boxes[..., 0]) * width, (boxes[..., 3] - boxes[..., 1]) * height)
    usable = (kept.objects & kept.dino & (sigmas < config.sigma_max)[:, None]).numpy() & (sides >= config.min_box_px)
    chosen = []
    for picture, row in enumerate(usable):
        numbers = np.flatnonzero(row)
        order = torch.randperm(len(numbers)).tolist()[: config.max_per_image]
        chosen += [(picture, int(numbers[place])) for place in order]
    order = torch.randperm(len(chosen)).tolist()[: config.max_per_step]
    return sorted(chosen[place] for place in order)


def identity_loss(embeddings: Tensor, references: Tensor, alpha: Tensor, sigmas: Tensor) -> tuple[Tensor, Tensor]:
    """L = sum_k w_k alpha_k (1 - cos(f_k, r_k)) / sum_k w_k with w = (1 - sigma)^2, over K generated crops.

    alpha is detached: the cheapest way to a small loss would be to call everything background.

    Args:
        embeddings, references: (K, F), K at least 1. alpha, sigmas: (K,).

    Returns:
        The scalar loss, and the cosines (K,) without gradient.
    """
    cosines = torch.nn.functional.cosine_similarity(embeddings.float(), references.float(), dim=1)
    weights = (1 - sigmas).square()
    loss = (weights * alpha.detach() * (1 - cosines)).sum() / weights.sum()
    return loss, cosines.detach()


def identity_term(
    clean: Tensor,
    alpha: Tensor,
    batch: dict,
    sigmas: Tensor,
    kept: Kept,
    encoder: Callable[[Tensor, list], Tensor],
    config: IdentityConfig,
) -> tuple[Tensor, dict[str, Tensor]]:
    """`identity_loss` of the crops that `choose_crops` chooses; without any a zero that hangs on `clean` all the same.

    Args:
        clean: (B, C, h, w) latents that one step gives. alpha: (B, N).
        batch: `identity_boxes` on the host, `dino_embeds` (B, N, F).
        sigmas, kept: on the host.
        encoder: of latents and (picture, box) pairs -> (K, F), with its `factor`, pixels along a cell of the latents.

    Returns:
        The scalar loss; for the log, pairs of sum and number of the loss and of the cosines.
    """
    boxes, size = batch["identity_boxes"].values, [side * encoder.factor for side in clean.shape[-2:]]
    chosen = choose_crops(boxes, sigmas, kept, size, config)
    if not chosen:
        nothing = torch.zeros(2, device=clean.device)
        return 0 * clean.sum(), {"loss/dino_identity": nothing, "metrics/dino_similarity_mean": nothing}
    embeddings = encoder(clean, [(picture, boxes[picture, number]) for picture, number in chosen])
    references, alphas = (torch.stack([x[place] for place in chosen]) for x in (batch["dino_embeds"], alpha))
    levels = torch.stack([sigmas[picture] for picture, _ in chosen]).to(clean.device, non_blocking=True)
    loss, cosines = identity_loss(embeddings, references, alphas, levels)
    return loss, {"loss/dino_identity": mean_over(loss[None]), "metrics/dino_similarity_mean": mean_over(cosines)}


def ramp(step: int, ramp_steps: int) -> float:
    """The share of its weight that a loss has at update `step` (from 0): linear up to 1."""
    return min(1.0, (step + 1) / ramp_steps) if ramp_steps else 1.0


# ---- what lies outside the boxes ----


def outside_boxes(boxes: np.ndarray, height: int, width: int) -> Tensor:
    """(B, 1, height, width) bool on the host: cells that lie in no box, counted in whole tokens of 2 x 2 cells.

    Args:
        boxes: (B, N, 4) xyxy in [0, 1]; those of no area do not count.
        height, width: of the latents.
    """
    outside = np.ones((len(boxes), 1, height // 2, width // 2), dtype=bool)
    for picture, objects in enumerate(boxes):
        for x1, y1, x2, y2 in objects:
            if x2 > x1 and y2 > y1:
                (top, bottom), (left, right) = span(y1, y2, height // 2), span(x1, x2, width // 2)
                outside[picture, 0, top:bottom, left:right] = False
    return torch.from_numpy(outside.repeat(2, axis=2).repeat(2, axis=3))


def region_preservation(velocity: Tensor, unchanged: Tensor, outside: Tensor) -> Tensor:
    """sum_p outside(p) ||v(p) - v0(p)||^2 / (C sum_p outside(p)): what identity changes where it should not.

    Args:
        velocity: (B, C, h, w). unchanged: the same without identity; no gradient goes there.
        outside: (B, 1, h, w) bool.
    """
    difference = (velocity.float() - unchanged.detach().float()).square()
    return (difference * outside).sum() / (outside.sum() * velocity.shape[1]).clamp(min=1)


def region_term(velocity: Tensor, plain: Callable[[], Any], boxes: np.ndarray, is_drawn: bool) -> Tensor:
    """(2,): `region_preservation` and 1 where this micro-batch is drawn for it, zeros otherwise.

    Args:
        plain: the network's pass on the same input without identity; its `velocity` is compared with.
        boxes: (B, N, 4) on the host.
    """
    if not is_drawn:
        return torch.zeros(2, device=velocity.device)
    with torch.no_grad():
        unchanged = plain().velocity
    outside = outside_boxes(boxes, *velocity.shape[-2:]).to(velocity.device, non_blocking=True)
    loss = region_preservation(velocity, unchanged, outside)
    return torch.stack([loss, torch.ones_like(loss)])


# ---- what is logged ----


def mean_over(values: Tensor, mask: Tensor | None = None) -> Tensor:
    """(2,): the sum of values where the mask is set, and their number; of all without a mask. No gradient."""
    values = values.detach().float()
    mask = torch.ones_like(values) if mask is None else mask.float()
    return torch.stack([(values * mask).sum(), mask.sum()])


def gradient_ratio(loss: Tensor, other: Tensor, velocity: Tensor) -> Tensor:
    """|d loss / d v| / |d other / d v| at the network's output v: how hard each pulls. (2,): ratio and 1, or zeros.

    Zeros where nothing is differentiated, as in a validation.
    """
    if not velocity.requires_grad:
        return velocity.new_zeros(2)
    pulls = [torch.autograd.grad(each, velocity, retain_graph=True)[0].float().norm() for each in (loss, other)]
    ratio = pulls[0] / pulls[1].clamp(min=torch.finfo(torch.float32).tiny)
    return torch.stack([ratio, torch.ones_like(ratio)])


def describe_alpha(alpha: Tensor, valid: Tensor) -> tuple[dict[str, Tensor], Tensor]:
    """Mean of alpha (B, N) and the foreground's share, as pairs of sum and number; and all of it, NaN if invalid."""
    alpha = alpha.detach().float()
    means = {
        "metrics/alpha_mean": mean_over(alpha, valid),
        "metrics/alpha_fg_ratio": mean_over(alpha >= FOREGROUND, valid),
    }
    return means, alpha.masked_fill(~valid, torch.nan)


def denoised(noisy: Tensor, velocity: Tensor, sigmas: Tensor) -> Tensor:
    """The clean latents that one step gives: z - sigma v."""
    return noisy - per_row(sigmas, noisy) * velocity
