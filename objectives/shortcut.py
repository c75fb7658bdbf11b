"""Shortcut models: one network that steps by any length (Frans et al., arXiv 2410.12557).

A step of length d from x_t is x_{t+d} = x_t + d s(x_t, t, d). As d -> 0, s is the velocity of the flow, learnt from
data. A longer step must equal two half steps, which the network (or its EMA) provides itself:

    s(x_t, t, d)  =  stopgrad[ s(x_t, t, d/2) + s(x_{t+d/2}, t + d/2, d/2) ] / 2

Every batch mixes both: bootstrap rows first, flow rows after them. `draw` holds all the randomness,
`bootstrap_targets` and `shortcut_loss` have none, so a test can inject every number. Samples and conditions may be
tensors or dicts of tensors.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from objectives.rectified_flow import (
    Network,
    Sample,
    concatenate,
    euler_step,
    interpolate,
    leaves,
    noise_like,
    squared_error,
    take,
    tree_map,
    velocity_target,
    where_rows,
)
from objectives.settings import ObjectiveConfig, SceneObjectiveConfig


@dataclass
class Draws:
    """Everything random about one batch of B rows, of which the first `num_bootstrap` are bootstrap rows."""

    noise: Sample  # (B, ...) standard normal
    t: Tensor  # (B,) start of the step
    step_size: Tensor  # (B,) its length d; config.flow_step_size on flow rows
    drop: Tensor  # (B,) bool, the row loses its condition
    rows: Tensor  # (B,) which sample of the data each row uses
    num_bootstrap: int
    guidable: list[int]  # bootstrap rows whose half steps can be small enough to be guided
    queried: Tensor | None = None  # (num_bootstrap,) step size named to the half steps; None: by config.smallest_step
    guided: Tensor | None = None  # (len(guidable),) bool, which of these rows are guided; None: those with small steps
    guided_modalities: tuple[str, ...] | None = None  # of a dict, entries that guidance changes; None: all


def draw(data: Sample, config: ObjectiveConfig, part: int = 0, num_parts: int = 1) -> Draws:
    """Draw noise, times, step sizes and dropped conditions for the samples `data` (B, ...).

    An update may be made of several micro-batches; this is number `part` of `num_parts`. Fixed shares of the levels are
    dealt out over all of them: one micro-batch may be too small to hold every level.
    """
    first = leaves(data)[0]
    batch, device = first.shape[0], first.device
    num_bootstrap = count_bootstrap_rows(batch, config)
    num_dyadic = math.ceil(num_bootstrap * config.dyadic_fraction)
    num_continuous = num_bootstrap - num_dyadic

    dyadic_t, dyadic_d = draw_dyadic(num_dyadic, config, device, part, num_parts)
    continuous_t, continuous_d = draw_continuous(num_continuous, config, device)
    flow_t = torch.rand(batch - num_bootstrap, device=device)
    if config.flow_times == "lattice":
        flow_t = torch.floor(flow_t * config.denoise_timesteps) / config.denoise_timesteps
    if config.pure_noise_prob:
        flow_t = torch.where(torch.rand_like(flow_t) < config.pure_noise_prob, 0.0, flow_t)
    drop = torch.rand(batch, device=device) < config.condition_dropout_prob
    if not config.dropout_on_bootstrap:
        # An unconditional model drops everything, everywhere.
        drop[:num_bootstrap] = config.condition_dropout_prob == 1
    rows = torch.arange(batch, device=device)
    if config.follows_paper_code:
        rows[num_bootstrap:] -= num_bootstrap

    if spreads(config):
        smallest_dyadic = -(-num_dyadic // config.levels)
    else:
        smallest_dyadic = len(range(part, dyadic_level_counts(num_dyadic * num_parts, config)[-1], num_parts))
    # log-uniform steps come sorted, at most this many of them below 2/M
    smallest_continuous = num_continuous // config.levels + 1 if config.continuous_sampler == "log_uniform" else batch
    return Draws(
        noise=noise_like(data),
        t=torch.cat([dyadic_t, continuous_t, flow_t]),
        step_size=torch.cat([dyadic_d, continuous_d, torch.full_like(flow_t, config.flow_step_size)]),
        drop=drop,
        rows=rows,
        num_bootstrap=num_bootstrap,
        guidable=[
            *range(smallest_dyadic),
            *range(num_dyadic, num_dyadic + min(smallest_continuous, num_continuous)),
        ],
    )


def count_bootstrap_rows(batch: int, config: ObjectiveConfig) -> int:
    """Bootstrap rows of a micro-batch: a fixed number, so that shapes are static; at least one, and one flow row."""
    if batch < 2:
        raise ValueError(f"a shortcut micro-batch needs at least 2 rows (one of each kind), got {batch}")
    return min(max(int(batch * config.bootstrap_fraction), 1), batch - 1)


def describe(batch: int, num_parts: int, config: ObjectiveConfig) -> str:
    """One line on what an update of `num_parts` micro-batches of `batch` rows bootstraps."""
    bootstrap = count_bootstrap_rows(batch, config)
    dyadic = math.ceil(bootstrap * config.dyadic_fraction)
    text = f"each micro-batch of {batch} rows bootstraps {bootstrap}, {dyadic} of them on the lattice"
    if dyadic and not spreads(config):
        counts = dyadic_level_counts(dyadic * num_parts, config)
        text += f"; rows per update with d = 1, 1/2, 1/4, ...: {counts}"
        if 0 in counts:
            text += ". A step size without rows is NEVER TRAINED: enlarge the batch or take another preset"
    return text


def spreads(config: ObjectiveConfig) -> bool:
    """Whether levels take turns; otherwise every update has `dyadic_level_counts`."""
    return not config.follows_paper_code and not config.bootstrap_dt_bias


def dyadic_level_counts(num_rows: int, config: ObjectiveConfig) -> list[int]:
    """Rows on each level 0 (d = 1) ... L-1 (d = 2/M) among the `num_rows` dyadic rows of an update."""
    levels = config.levels
    if config.bootstrap_dt_bias and levels > 2:
        each, quarter = num_rows // 2 // levels, num_rows // 4
        counts = [quarter, quarter] + [each] * (levels - 2)
    else:
        counts = [num_rows // levels] * levels
    counts[0] += num_rows - sum(counts)
    return counts


def draw_dyadic(
    num_rows: int, config: ObjectiveConfig, device: torch.device, part: int = 0, num_parts: int = 1
) -> tuple[Tensor, Tensor]:
    """(t, d) with d = 2^-k and t a multiple of d below 1; smallest steps first."""
    levels = config.levels
    if spreads(config):
        # In turn from a random start: balanced within one row per batch, and exactly balanced on average.
        start = torch.randint(levels, (1,), device=device)
        level = ((torch.arange(num_rows, device=device) + start) % levels).sort(descending=True).values
        if 1 < num_rows < levels:
            level[-1] = 0  # the step that one-step sampling makes is never left out
    else:
        counts = torch.tensor(dyadic_level_counts(num_rows * num_parts, config)[::-1])
        level = torch.arange(levels - 1, -1, -1).repeat_interleave(counts)[part::num_parts]
        level = level.to(device, non_blocking=True)
    sections = torch.exp2(level.float())
    return torch.floor(torch.rand(num_rows, device=device) * sections) / sections, 1 / sections


def draw_continuous(num_rows: int, config: ObjectiveConfig, device: torch.device) -> tuple[Tensor, Tensor]:
    """(t, d) with any d in [1/M, 1] and t + d <= 1; log-uniform steps are stratified and ascend."""
    smallest, u, v = 1 / config.denoise_timesteps, *torch.rand(2, num_rows, device=device)
    if config.continuous_sampler == "triangle":
        t = u * (1 - smallest)
        return t, smallest + v * (1 - t - smallest)
    step_size = config.denoise_timesteps ** ((torch.arange(num_rows, device=device) + u) / max(num_rows, 1) - 1)
    return v * (1 - step_size), step_size


def bootstrap_targets(
    teacher: Network,
    noisy: Sample,
    draws: Draws,
    conditions: Sample,
    null_conditions: Sample,
    config: ObjectiveConfig | SceneObjectiveConfig,
) -> Sample:
    """The mean of two half steps of the teacher from `noisy`, for the bootstrap rows (all arguments hold only those).

    With guidance, half steps that are queried as infinitesimal are v_null + w (v - v_null).
    """
    t, half = draws.t[: draws.num_bootstrap], draws.step_size[: draws.num_bootstrap] / 2
    # The slack forgives rounding: a half step of 1/M must be found whatever the arithmetic that halved it.
    small = half <= (1 + 1e-4) / config.denoise_timesteps
    queried = draws.queried
    if queried is None:
        queried = half if config.smallest_step == "none" else torch.where(small, config.flow_step_size, half)
    scale, chosen = config.bootstrap_guidance_scale, draws.guided_modalities
    guidable = None
    if scale is not None and draws.guidable:
        guidable = torch.tensor(draws.guidable).to(t.device, non_blocking=True)
        guided_rows = small[guidable] if draws.guided is None else draws.guided

    def velocity(x: Sample, t: Tensor) -> Sample:
        if guidable is None:
            return teacher(x, t, queried, conditions)
        both = concatenate(x, take(x, guidable)), torch.cat([t, t[guidable]]), torch.cat([queried, queried[guidable]])
        prediction = teacher(*both, concatenate(conditions, take(null_conditions, guidable)))
        conditional = take(prediction, slice(0, len(t)))
        null = take(prediction, slice(len(t), None))
        guided = tree_map(lambda n, c: n + scale * (c - n), null, take(conditional, guidable))
        guided = where_rows(guided_rows, guided, take(conditional, guidable))
        replaced = tree_map(lambda c, g: c.index_copy(0, guidable, g.to(c.dtype)), conditional, guided)
        return replaced if chosen is None else {k: replaced[k] if k in chosen else conditional[k] for k in replaced}

    with torch.no_grad():
        first = velocity(noisy, t)
        midpoint = clip(euler_step(noisy, first, half), config.target_clip)
        second = velocity(midpoint, t + half)
        return clip(tree_map(lambda a, b: (a + b) / 2, first, second), config.target_clip)


def regress(
    network: Network,
    teacher: Network,
    data: Sample,
    conditions: Sample,
    null_conditions: Sample,
    draws: Draws,
    config: ObjectiveConfig | SceneObjectiveConfig,
) -> tuple[Sample, Sample]:
    """Prediction and target of every row, bootstrap rows first, by one forward pass of the network.

    Args:
        network, teacher: called as (sample, t, step_size, conditions); the teacher gets no gradient.
        data: (B, ...) clean samples. conditions, null_conditions: (B, ...) each row's condition and "none".
        draws: the batch's randomness, see `draw`.
    """
    boot = slice(0, draws.num_bootstrap)
    data, conditions, null_conditions = (take(x, draws.rows) for x in (data, conditions, null_conditions))
    conditions = where_rows(draws.drop, null_conditions, conditions)
    noisy = interpolate(draws.noise, data, draws.t, config.path_eps)
    target = velocity_target(draws.noise, data, config.path_eps)
    if draws.num_bootstrap:
        bootstrap = bootstrap_targets(
            teacher, take(noisy, boot), draws, take(conditions, boot), take(null_conditions, boot), config
        )
        flow = take(target, slice(draws.num_bootstrap, None))
        target = concatenate(tree_map(lambda b, f: b.to(f.dtype), bootstrap, flow), flow)
    return network(noisy, draws.t, draws.step_size, conditions), target


def shortcut_loss(
    network: Network,
    teacher: Network,
    data: Sample,
    conditions: Sample,
    null_conditions: Sample,
    draws: Draws,
    config: ObjectiveConfig,
) -> tuple[Tensor, dict[str, Tensor]]:
    """Flow matching and self-consistency of a batch whose rows weigh alike; arguments as in `regress`.

    Returns:
        The scalar loss, and detached scalars to log.
    """
    prediction, target = regress(network, teacher, data, conditions, null_conditions, draws, config)
    boot, flow = slice(0, draws.num_bootstrap), slice(draws.num_bootstrap, None)
    errors = squared_error(prediction, target)
    if config.loss_weighting == "sigma_squared":
        errors = errors * (1 - draws.t).square()
    loss = errors.mean() if config.loss_reduction == "merged" else errors[boot].mean() + errors[flow].mean()
    metrics = {"loss_flow": errors[flow].mean().detach(), "loss_bootstrap": errors[boot].mean().detach()}
    if config.target_clip is not None:
        # More than a percent here means that the data's range does not fit the clip.
        outside = [(x.abs() > config.target_clip).float().mean() for x in leaves(take(target, flow))]
        metrics["flow_target_outside_clip"] = torch.stack(outside).mean()
    return loss, metrics


def clip(sample: Sample, bound: float | None) -> Sample:
    """Every entry within +-bound; None leaves it."""
    return sample if bound is None else tree_map(lambda x: x.clamp(-bound, bound), sample)
