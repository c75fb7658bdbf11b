"""The shortcut objective on scenes: what is drawn for them, and how errors of objects and modalities add up.

The targets are those of objectives.shortcut. A sample is a dict of modalities (B, N, tokens, channels) of B scenes with
up to N objects; objects of a scene share their time and step size. Object mode is the case N = 1. The rules are those
of SAM 3D Objects' sparse structure stage (arXiv 2511.16624), repaired unless config.rules is `reference`.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from scipy.optimize import linear_sum_assignment
from torch import Tensor

from objectives.rectified_flow import (
    Network,
    Sample,
    leaves,
    noise_like,
    squared_difference,
    tree_map,
)
from objectives.settings import SceneObjectiveConfig
from objectives.shortcut import Draws, regress

NUM_TIME_BUCKETS = 5


def draw(
    data: Sample,
    object_mask: Tensor,
    config: SceneObjectiveConfig,
    step: int,
    generator: torch.Generator | None = None,
) -> Draws:
    """Draw all the randomness of one micro-batch of scenes.

    Args:
        data: modalities (B, N, tokens, channels). object_mask: (B, N) bool.
        step: number of the update, for the flow-only phase.
        generator: on the CPU, the same on every process: decides how many rows learn self-consistency, which of them
            are guided, and their step sizes. None draws these from the global one.
    """
    device, batch = object_mask.device, len(object_mask)

    def coins(*shape: int) -> Tensor:
        return torch.rand(shape, generator=generator)

    probability = config.self_consistency_prob if step >= config.fm_warmup_steps else 0.0
    if config.follows_reference and config.mode == "scene":
        count = batch * int(coins(1).item() < probability)  # all or nothing
    else:
        count = int(batch * probability + (0 if config.follows_reference else coins(1).item()))
    step_size = draw_step_sizes(count, config, generator)
    if config.follows_reference:
        start = draw_times((count,), config)
    else:
        sections = 1 / step_size
        start = torch.floor(torch.rand(count) * sections) / sections
    guided, all_guided = draw_guided(step_size, coins, config)
    half = step_size / 2
    queried = name_half_steps(half, config)
    if coins(1).item() < config.fm_in_shortcut_target_prob:
        queried = torch.zeros_like(half)

    shape = (batch - count, object_mask.shape[1]) if config.independent_t else (batch - count,)
    times = draw_times(shape, config)
    named = torch.rand(batch - count) * config.fm_eps_max * (2 if config.follows_reference else 1)
    if config.independent_t:
        start, named = start[:, None].expand(-1, shape[1]), named[:, None].expand(-1, shape[1])
        step_size = step_size[:, None].expand(-1, shape[1])
    if config.follows_reference:
        drop = (torch.rand(1) < config.condition_dropout_prob).expand(batch).clone()
    else:
        drop = torch.rand(batch) < config.condition_dropout_prob
        # An unconditional model drops everything, everywhere.
        drop[:count] = config.condition_dropout_prob == 1
    partial = config.follows_reference and not all_guided
    return Draws(
        noise=noise_like(data),
        t=torch.cat([start, times]).to(device, non_blocking=True),
        step_size=torch.cat([step_size, named]).to(device, non_blocking=True),
        drop=drop.to(device, non_blocking=True),
        rows=torch.arange(batch, device=device),
        num_bootstrap=count,
        guidable=guided,
        queried=(queried[:, None].expand(-1, shape[1]) if config.independent_t else queried).to(
            device, non_blocking=True
        ),
        guided=torch.ones(len(guided), dtype=torch.bool, device=device),
        guided_modalities=None if partial else tuple(config.cfg_modalities),
    )


def name_half_steps(half: Tensor, config: SceneObjectiveConfig) -> Tensor:
    """The step sizes that the teacher is asked for: the finest one stands for the infinitesimal, 0."""
    if config.follows_reference:
        return half
    return torch.where(half * config.denoise_timesteps <= 1, 0.0, half)


def draw_step_sizes(count: int, config: SceneObjectiveConfig, generator: torch.Generator | None = None) -> Tensor:
    """(count,) step sizes D, every level in turn from a random start: balanced in a batch, uniform on average."""
    largest, levels = (2.0, config.levels + 1) if config.follows_reference else (1.0, config.levels)
    first = torch.randint(levels, (1,), generator=generator)
    return largest * torch.exp2(-((torch.arange(count) + first) % levels).float())


def draw_times(shape: tuple[int, ...], config: SceneObjectiveConfig) -> Tensor:
    """Times by the law of the flow rows."""
    if config.time_law == "uniform":
        times = torch.rand(shape)
    else:
        times = torch.sigmoid(config.logit_mean + config.logit_std * torch.randn(shape))
    return torch.where(torch.rand(shape) < config.pure_noise_prob, 0.0, times)


def draw_guided(
    step_size: Tensor, coins: Callable[..., Tensor], config: SceneObjectiveConfig
) -> tuple[list[int], bool]:
    """Which self-consistency rows are guided, and whether these are all of them."""
    count, ratio = len(step_size), config.ratio_cfg_samples
    tosses = coins(count)
    if not config.follows_reference:
        candidates = [row for row in range(count) if step_size[row] * config.denoise_timesteps <= 2]
        guided = [row for row in candidates if tosses[row] < ratio]
    elif config.mode == "scene":
        guided = list(range(count)) if count and tosses[0] < ratio else []
    else:
        guided = list(range(int(count * ratio)))
    return guided, len(guided) == count


def pair_objects(data: Sample, noise: Sample, object_mask: Tensor) -> Sample:
    """`data` with each scene's objects reordered so that the translations' squared distance to the noise is least.

    It ends the ambiguity of which noise becomes which object, and leaves the noise what it was; right only where
    objects are exchangeable, i.e. no object has a condition of its own.
    """
    distances = (noise["translation"].squeeze(2)[:, :, None] - data["translation"].squeeze(2)[:, None]).square().sum(-1)
    order = torch.arange(object_mask.shape[1]).repeat(len(object_mask), 1)
    counts = object_mask.sum(1).tolist()
    for scene, (costs, count) in enumerate(zip(distances.cpu().numpy(), counts, strict=True)):
        order[scene, :count] = torch.from_numpy(linear_sum_assignment(costs[:count, :count])[1])
    order = order.to(object_mask.device)
    return tree_map(lambda x: x.gather(1, order[:, :, None, None].expand_as(x)), data)


def scene_loss(
    network: Network,
    teacher: Network,
    data: Sample,
    object_mask: Tensor,
    conditions: Sample,
    null_conditions: Sample,
    draws: Draws,
    config: SceneObjectiveConfig,
) -> tuple[Tensor, dict[str, Tensor], Tensor | None]:
    """Flow matching and self-consistency of a batch of scenes.

    Args:
        network, teacher: called as (sample, t, step_size, conditions); the teacher gets no gradient.
        data: modalities (B, N, tokens, channels). object_mask: (B, N) bool.
        conditions, null_conditions: (B, ...) each scene's condition and "none".
        draws: the batch's randomness, see `draw`.

    Returns:
        The loss, to log either scalars or pairs (sum, number of rows), and a weight. Where scenes weigh alike the loss
        is the mean over the batch and the weight None; where objects do (`reduction`), their sum and their number.
    """
    prediction, target = regress(network, teacher, data, conditions, null_conditions, draws, config)
    mask = object_mask[draws.rows].to(draws.t.dtype)
    errors = {name: object_mean(squared_difference(prediction[name], target[name]), mask) for name in sorted(data)}
    total = sum(config.loss_weights[name] * values for name, values in errors.items())
    objects, count = mask.sum(1), draws.num_bootstrap
    by_object = config.reduction == "object"
    rows = objects * total if by_object else total
    consistency, flow = rows[:count], rows[count:]
    if config.follows_reference:
        means = [part.mean() if len(part) else part.sum() for part in (consistency, flow)]
        loss = config.shortcut_loss_weight * means[0] + means[1]
    else:
        loss = config.shortcut_loss_weight * consistency.sum() + flow.sum()
        loss = loss if by_object else loss / len(total)
    return loss, describe_errors(errors, total, draws, config), objects.sum() if by_object else None


def object_mean(errors: Tensor, mask: Tensor) -> Tensor:
    """(B, N, tokens, channels) -> (B,) mean over the objects there are."""
    return (errors.mean((2, 3)) * mask).sum(1) / mask.sum(1)


def describe_errors(
    errors: dict[str, Tensor], total: Tensor, draws: Draws, config: SceneObjectiveConfig
) -> dict[str, Tensor]:
    """Sums and numbers of rows: of each kind of loss, by modality, by step size, by time."""
    count = draws.num_bootstrap
    metrics = {}

    def add(name: str, values: Tensor) -> None:
        metrics[name] = torch.stack([values.sum(), values.new_full((), len(values))])

    for kind, part in (("self_consistency_loss", slice(0, count)), ("flow_matching_loss", slice(count, None))):
        add(kind, total[part].detach())
        for name, values in errors.items():
            add(f"{kind}/{name}", values[part].detach())
    # (B, N) times are an object's own; the row's first stands for it
    t, step_size = (values.reshape(len(total), -1)[:, 0] for values in (draws.t, draws.step_size))
    level = -torch.log2(step_size[:count]).round().long()  # 0 for D = 1, -1 for the reference's 2
    levels = range(-1 if config.follows_reference else 0, config.levels)
    bucket = (t[count:] * NUM_TIME_BUCKETS).long().clamp(max=NUM_TIME_BUCKETS - 1)
    for number in levels:
        chosen = (level == number).to(total.dtype)
        metrics[f"self_consistency_loss/D={2.0**-number:g}"] = torch.stack(
            [(total[:count].detach() * chosen).sum(), chosen.sum()]
        )
    for number in range(NUM_TIME_BUCKETS):
        chosen = (bucket == number).to(total.dtype)
        metrics[f"flow_matching_loss/t={number / NUM_TIME_BUCKETS:g}"] = torch.stack(
            [(total[count:].detach() * chosen).sum(), chosen.sum()]
        )
    return metrics


def validation_grid(config: SceneObjectiveConfig) -> list[tuple[float, float]]:
    """(t, D) at which validation measures the loss: five times of the flow, and starts of four lengths of step."""
    steps = [(start * 2.0**-k, 2.0**-k) for k in (0, 2, 4, 6) for start in sorted({0, 2**k // 2})]
    return [(t / 5, 0.0) for t in range(5)] + (steps if config.self_consistency_prob else [])


def grid_draws(
    data: Sample, config: SceneObjectiveConfig, t: float, step_size: float = 0.0, noise: Sample | None = None
) -> Draws:
    """Draws of a validation point: every row at this t, and a self-consistency row if `step_size` is not 0."""
    first = leaves(data)[0]
    batch, device = len(first), first.device
    count = batch if step_size else 0
    full = torch.full((batch,), step_size, device=device)
    half = full[:count] / 2
    guided = bool(count) and (config.follows_reference or bool(step_size * config.denoise_timesteps <= 2))
    return Draws(
        noise=noise_like(data) if noise is None else noise,
        t=torch.full((batch,), t, device=device),
        step_size=full,
        drop=torch.zeros(batch, dtype=torch.bool, device=device),
        rows=torch.arange(batch, device=device),
        num_bootstrap=count,
        guidable=list(range(batch)) if guided and config.ratio_cfg_samples > 0 else [],
        queried=name_half_steps(half, config),
        guided=torch.ones(batch, dtype=torch.bool, device=device),
        guided_modalities=tuple(config.cfg_modalities),
    )


def from_reverse_fn(reverse_fn: Callable[..., dict], time_scale: float = 1000.0) -> Network:
    """A user's network `reverse_fn(x_t, t, cond, d) -> dict` in the calling convention of the objectives.

    It gets t and d times `time_scale`, shape (B,) or (B, N); what it returns must have the shapes of x_t.
    """

    def network(sample: Sample, t: Tensor, step_size: Tensor, conditions: Sample) -> Sample:
        velocity = reverse_fn(sample, t * time_scale, conditions, step_size * time_scale)
        if not isinstance(velocity, dict) or set(velocity) != set(sample):
            given = sorted(velocity) if isinstance(velocity, dict) else type(velocity).__name__
            raise ValueError(f"`reverse_fn` must return a dict of {sorted(sample)}, it returned {given}")
        for name, value in velocity.items():
            if value.shape != sample[name].shape:
                wanted, given = tuple(sample[name].shape), tuple(value.shape)
                raise ValueError(f"`reverse_fn` must return {name} of shape {wanted}, it returned {given}")
        return velocity

    return network


def without_condition(conditions: Sample) -> Sample:
    """The same conditions, marked as unknown."""
    return conditions | {"unconditional": torch.ones_like(conditions["unconditional"])}
