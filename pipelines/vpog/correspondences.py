"""Which point of the object lies where in the query: 3D from the template's depth, 2D from patch class and flow.

A query patch p that matches a template patch s gives a correspondence for each pixel of *s* that the object covers: its
point is known exactly, the flow says where in the query it lies, c_p + patch_size * flow, in pixels of the crop.
"""
# ruff: noqa: N803 - K is what everybody calls it

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from backlot.cameras import backproject, inverse_pose, transform

Flow = Literal["dense", "center", "none"]
MIN_COVERAGE = 0.15  # of a patch's pixels: below it, labels call a patch background


@dataclass(frozen=True)
class Correspondences:
    """M points of the object and their places in the crop.

    Args:
        points: (M, 3) float64, in the object's frame, metres.
        places: (M, 2) float64, x and y in pixels of the crop, pixel centres at integers.
        weights: (M,) float64, the class probability over the flow's Laplace scale.
        patches: (M,) query patches, row-major.
        templates: (M,) which template of the group a point comes from.
    """

    points: Tensor
    places: Tensor
    weights: Tensor
    patches: Tensor
    templates: Tensor

    def __len__(self) -> int:
        return len(self.weights)

    def select(self, rows: Tensor) -> Correspondences:
        """Those of some rows (indices or bool)."""
        return Correspondences(*(values[rows] for values in vars(self).values()))

    def heaviest(self, count: int) -> Correspondences:
        """At most so many, in their own order: which of two alike comes first must not change what RANSAC draws."""
        return self if len(self) <= count else self.select(self.weights.topk(count).indices.sort().values)


def patch_centers(height: int, width: int, patch_size: int) -> Tensor:
    """(N, 2) float64, x and y of the centres of the patches of a picture, row-major, in pixels."""
    rows = torch.arange(height // patch_size, dtype=torch.float64) * patch_size + (patch_size - 1) / 2
    columns = torch.arange(width // patch_size, dtype=torch.float64) * patch_size + (patch_size - 1) / 2
    y, x = torch.meshgrid(rows, columns, indexing="ij")
    return torch.stack([x, y], dim=-1).reshape(-1, 2)


def to_patches(values: Tensor, patch_size: int) -> Tensor:
    """Pixels (S, H, W, ...) by patch: (S, N, ps, ps, ...)."""
    count, height, width, *rest = values.shape
    rows, columns = height // patch_size, width // patch_size
    split = values.reshape(count, rows, patch_size, columns, patch_size, *rest)
    return split.transpose(2, 3).reshape(count, rows * columns, patch_size, patch_size, *rest)


def covered_patches(mask: Tensor, patch_size: int, min_coverage: float = MIN_COVERAGE) -> Tensor:
    """Which patches show the object, (S, N) bool; where none does, the one that shows the most of it.

    Args:
        mask: (S, H, W) bool.
    """
    coverage = to_patches(mask, patch_size).double().mean(dim=(2, 3))
    most = coverage == coverage.amax(dim=1, keepdim=True)
    is_bare = ~(coverage >= min_coverage).any(dim=1, keepdim=True)
    return (coverage >= min_coverage) | (most & is_bare & (coverage > 0))


def object_points(depth: Tensor, K: Tensor, camera_from_object: Tensor) -> Tensor:
    """The object's point behind each template pixel, (S, H, W, 3) float64 metres; meaningless where depth is 0."""
    seen = backproject(K.double().expand(len(depth), 3, 3), depth.double())
    points = transform(inverse_pose(camera_from_object.double()), seen.flatten(1, 2))
    return points.reshape(seen.shape)


def gather_correspondences(
    logits: Tensor,
    buddies: Tensor,
    flow: Tensor,
    scale: Tensor | None,
    depth: Tensor,
    points: Tensor,
    object_patches: Tensor,
) -> Correspondences:
    """All correspondences of a query with a group of S templates.

    Args:
        logits: (S, N, N + 1), buddies: (S, N) with N for unseen: what the network says of query patch p and template s.
        flow: (S, N, ps, ps, 2) in patches, or (S, N, 1, 1, 2) of the buddy's centre alone.
        scale: (S, N, ps, ps) Laplace b in patches; None: all flow is equally good.
        depth: (S, H, W) of the templates, metres, 0 = no surface; points: (S, H, W, 3), see `object_points`.
        object_patches: (N,) bool, query patches that show the object.
    """
    number = buddies.shape[1]
    patch_size = round((depth.shape[1] * depth.shape[2] / number) ** 0.5)
    template, patch = ((buddies < number) & object_patches).nonzero(as_tuple=True)
    buddy = buddies[template, patch]
    probability = logits.double().softmax(dim=-1)[template, patch, buddy]
    weights = probability[:, None, None].expand(-1, *flow.shape[2:4])
    if scale is not None:
        weights = weights / scale[template, patch].double()
    centers = patch_centers(*depth.shape[1:], patch_size).to(flow.device)
    places = centers[patch][:, None, None] + patch_size * flow[template, patch].double()
    has_surface = to_patches(depth, patch_size)[template, buddy] > 0
    surface = to_patches(points, patch_size)[template, buddy]
    if flow.shape[2] == 1:
        has_surface, surface = _center_of(has_surface, surface)
    return Correspondences(
        points=surface[has_surface],
        places=places[has_surface],
        weights=weights[has_surface],
        patches=patch[:, None, None].expand(has_surface.shape)[has_surface],
        templates=template[:, None, None].expand(has_surface.shape)[has_surface],
    )


def _center_of(has_surface: Tensor, points: Tensor) -> tuple[Tensor, Tensor]:
    """Whether a surface is at the centre of patches (M, ps, ps, ...), and its mean point, (M, 1, 1) and (M, 1, 1, 3).

    The centre of a patch of even size lies between four pixels.
    """
    size = has_surface.shape[1]
    middle = slice((size - 1) // 2, size // 2 + 1)
    is_there, near = has_surface[:, middle, middle].flatten(1), points[:, middle, middle].flatten(1, 2)
    mean = (near * is_there[..., None]).sum(dim=1) / is_there.sum(dim=1, keepdim=True).clamp(min=1)
    return is_there.any(dim=1)[:, None, None], mean[:, None, None]
