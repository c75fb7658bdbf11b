"""Which templates go with a query: near views, far views, and the equivalent pose that is nearest to them.

A template is near when the camera looks from nearly the same side (`view`): its own turn about the camera's axis is
arbitrary, so that the whole rotation (`so3`, as older code has it) says little about what the two pictures share.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from backlot.cameras import rotation_angle, viewing_direction
from data_prep.bop.item_settings import SelectionSettings

POSITIVE, NEGATIVE = 0, 1
SLACK = math.cos(math.radians(5.0))
"""Equivalent poses whose views are this close to the best are told apart by their turn: along an axis of symmetry all
views are the same."""
BOUNDARY = 1e-6
"""Of a cosine: an angle that is the limit but for rounding keeps it."""


@dataclass(frozen=True)
class PoseTable:
    """The cameras of an object's templates, float64.

    Args:
        rotations: (T, 3, 3) camera_from_object.
        directions: (T, 3) unit vectors towards the camera, in the object's frame.
    """

    rotations: Tensor
    directions: Tensor

    @classmethod
    def of(cls, camera_from_object: Tensor) -> PoseTable:
        """From (T, 4, 4) poses."""
        poses = camera_from_object.double()
        return cls(poses[:, :3, :3].contiguous(), viewing_direction(poses))


@dataclass(frozen=True)
class Selection:
    """What was chosen for B queries; positives come first.

    Args:
        indices: (B, S) int64 templates, no one twice. types: (B, S) int64, 0 positive, 1 negative.
        nearest: (B,) int64 t*, the template nearest to `poses`.
        d_ref: (B, 3) viewing direction of the reference template, unit length, in the object's frame.
        reference_rotation: (B, 3, 3) its rotation camera_from_object.
        poses: (B, 4, 4) the query's pose, of all that symmetry makes equal the one nearest to t*.
    """

    indices: Tensor
    types: Tensor
    nearest: Tensor
    d_ref: Tensor
    reference_rotation: Tensor
    poses: Tensor


def select_templates(
    poses: Tensor, table: PoseTable, symmetries: Tensor, settings: SelectionSettings, generator: torch.Generator
) -> Selection:
    """Choose positives, negatives and the reference direction of queries of one object.

    Where too few templates are far from all equivalent poses (bodies of revolution), further positives take the place
    of the missing negatives. The count of random numbers does not depend on the settings.

    Args:
        poses: (B, 4, 4) camera_from_object. symmetries: (G, 4, 4), the identity among them.
        generator: of the processor.

    Raises:
        ValueError: there are fewer templates than are to be chosen.
    """
    check_count(table, settings)
    num_templates = len(table.directions)
    luck = torch.rand(len(poses), 2 * num_templates + 2, generator=generator, dtype=torch.float64)
    near_luck, far_luck, swap, which = luck.split([num_templates, num_templates, 1, 1], dim=1)

    equivalents = poses.double()[:, None] @ symmetries.double()  # (B, G, 4, 4)
    cosines = similarity(equivalents, table, settings.selection_metric)  # (B, G, T)
    chosen = nearest_equivalent(equivalents, cosines, table)
    rows = torch.arange(len(poses))
    near = cosines[rows, chosen]
    nearest = near.argmax(1)

    ranked = rank_positives(near, near_luck, settings)
    positives = ranked[:, : settings.num_positive_templates]
    limit = math.cos(math.radians(settings.min_negative_angle_deg)) + BOUNDARY
    allowed = cosines.amax(1) <= limit
    allowed.scatter_(1, ranked, False).scatter_(1, nearest[:, None], False)
    indices, types = fill(ranked, allowed, far_luck, settings)

    pick = (which * settings.num_positive_templates).long()  # which is below 1
    reference = torch.where(swap < settings.d_ref_random_ratio, positives.gather(1, pick), nearest[:, None])[:, 0]
    return Selection(
        indices, types, nearest, table.directions[reference], table.rotations[reference], equivalents[rows, chosen]
    )


def check_count(table: PoseTable, settings: SelectionSettings) -> None:
    """ValueError if there are fewer templates than are to be chosen."""
    if settings.num_templates > len(table.directions):
        raise ValueError(f"{settings.num_templates} templates are to be chosen of {len(table.directions)}")


def similarity(poses: Tensor, table: PoseTable, metric: str) -> Tensor:
    """Cosines (..., T) of the angles between poses (..., 4, 4) and all templates."""
    if metric == "view":
        return viewing_direction(poses) @ table.directions.mT
    # the trace of R_q R_t^T is the sum over all products of their entries
    traces = poses[..., :3, :3].flatten(-2) @ table.rotations.flatten(-2).mT
    return (traces - 1) / 2


def nearest_equivalent(equivalents: Tensor, cosines: Tensor, table: PoseTable) -> Tensor:
    """Of each query the equivalent pose whose view is nearest to a template's, (B,); of near ties the least turned.

    Args:
        equivalents: (B, G, 4, 4). cosines: (B, G, T) to the templates.
    """
    best = cosines.amax(1).argmax(1)  # (B,) t* over all equivalents
    to_best = cosines.gather(2, best[:, None, None].expand(-1, cosines.shape[1], 1))[..., 0]
    top = to_best.amax(1, keepdim=True).clamp(-1, 1)
    is_tie = to_best >= torch.cos(torch.acos(top) + math.acos(SLACK))
    turn = rotation_angle(equivalents[..., :3, :3], table.rotations[best][:, None])
    return turn.masked_fill(~is_tie, torch.inf).argmin(1)


def rank_positives(near: Tensor, luck: Tensor, settings: SelectionSettings) -> Tensor:
    """The first S templates (B, S) in the order in which they become positives.

    Args:
        near: (B, T) cosines to the query's pose. luck: (B, T) in [0, 1).
    """
    scores = near
    if settings.positive_sampling_mode == "random_within_range":
        in_range = near >= math.cos(math.radians(settings.positive_sampling_deg_range)) - BOUNDARY
        scores = torch.where(in_range, 2 + luck, near)
    return scores.topk(settings.num_templates, dim=1).indices


def fill(ranked: Tensor, allowed: Tensor, luck: Tensor, settings: SelectionSettings) -> tuple[Tensor, Tensor]:
    """Indices and types (B, S): the positives, then negatives drawn from `allowed`, then positives where those end.

    Args:
        ranked: (B, S) positives in their order. allowed: (B, T) bool. luck: (B, T) in [0, 1).
    """
    num_positives, num_negatives = settings.num_positive_templates, settings.num_negative_templates
    drawn = luck.masked_fill(~allowed, -1).topk(num_negatives, dim=1)
    is_negative = drawn.values >= 0  # a run of True, then of False
    spare = (~is_negative).cumsum(1) - 1 + num_positives
    filled = torch.where(is_negative, drawn.indices, ranked.gather(1, spare.clamp(min=0)))
    types = torch.where(is_negative, NEGATIVE, POSITIVE)
    return (
        torch.cat([ranked[:, :num_positives], filled], dim=1),
        torch.cat([torch.full_like(ranked[:, :num_positives], POSITIVE), types], dim=1),
    )
