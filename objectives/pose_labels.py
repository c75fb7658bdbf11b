"""Which template patch each query patch sees, and where each template pixel lies in the query: labels from geometry.

Made on the device, for all templates of a batch at once, from depth, masks, cameras and poses. Every template pixel u
with depth D has a point in space that both cameras see, so that its place in the query is

    v = pi(K_q (R_q R_t^T (D K_t^-1 [u, 1] - t_t) + t_q)) = pi(D H [u, 1] + g),

one 3 x 3 matrix and one vector per template. Flow runs from template to query: pixel u of the template patch s that
query patch p is paired with has f = (v(u) - c_p) / ps, c_p the patch's centre, ps its side. Points are matched to the
pixel they fall in; no depth is interpolated.
"""
# ruff: noqa: N803 - K and H are what everybody calls them

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

import torch
from torch import Tensor

from backlot.cameras import inverse_affine, inverse_pose, pixel_grid
from objectives.pose_settings import LabelConfig

NEAREST = 1e-6
"""Metres: what is nearer to the camera's plane, or behind it, is not seen."""


class PoseLabels(NamedTuple):
    """B queries with S templates each, N = Hp Wp patches of ps x ps pixels, row by row. Flow is in patches."""

    patch_cls: Tensor
    """(B, S, N) long: the paired template patch, N if the template does not see it, -1 off the object."""
    flows: Tensor
    """(B, S, Hp, Wp, 2) from the query patch's centre to where the centre of its template patch lies; 0 elsewhere."""
    flow_visibility: Tensor
    """(B, S, Hp, Wp) bool: `flows` is defined and its pair visible."""
    patch_visibility: Tensor
    """(B, S, Hp, Wp) bool: enough pixels of the pair are seen, and none of them moves too far."""
    dense_flow: Tensor
    """(B, S, N, ps, ps, 2) of the template patch's pixels; 0 where they are not seen."""
    dense_visibility: Tensor
    """(B, S, N, ps, ps) bool: the pixel's point is seen in the query."""
    dense_supervised: Tensor
    """(B, S, N, ps, ps) bool: seen, and moved by at most `max_flow` along both axes."""
    dense_surface: Tensor
    """(B, S, N, ps, ps) bool: the pixel of a paired patch lies on the object."""
    object_points: Tensor
    """(B, S, H, W, 3) metres, object's frame: the point of every template pixel; 0 where there is none."""


class Places(NamedTuple):
    """Where the pixels of one picture lie in another."""

    u: Tensor
    v: Tensor
    """(B, S, H, W) pixels; not meaningful where not visible and not on a surface."""
    number: Tensor
    """(B, S, H, W) long: the pixel they fall in, row by row, clamped to the picture."""
    visible: Tensor
    """(B, S, H, W) bool"""


def patch_centers(height: int, width: int, patch_size: int, like: Tensor, rule: str = "exact") -> Tensor:
    """(N, 2) u, v of the patches' centres in pixels, row by row."""
    offset = (patch_size - 1) / 2 if rule == "exact" else patch_size // 2
    corners = patch_size * pixel_grid(height // patch_size, width // patch_size, like)
    return (corners + offset).flatten(0, 1)


def to_patches(pixels: Tensor, patch_size: int) -> Tensor:
    """(B, S, H, W) -> (B, S, N, ps, ps)."""
    split = pixels.unflatten(-1, (-1, patch_size)).unflatten(-3, (-1, patch_size))
    return split.transpose(-3, -2).flatten(-4, -3)


def reprojection(K_from: Tensor, pose_from: Tensor, K_to: Tensor, pose_to: Tensor) -> tuple[Tensor, Tensor]:
    """H (..., 3, 3) and g (..., 3) with which depth D at pixel u lies at pi(D H [u, 1] + g), its depth the third row.

    In float64: these few numbers carry the precision of all pixels.
    """
    K_from, pose_from, K_to, pose_to = (x.double() for x in (K_from, pose_from, K_to, pose_to))
    relative = pose_to @ inverse_pose(pose_from)
    H = K_to @ relative[..., :3, :3] @ inverse_affine(K_from)
    return H.float(), (K_to @ relative[..., :3, 3:]).squeeze(-1).float()


def affine_planes(depth: Tensor, H: Tensor, g: Tensor) -> list[Tensor]:
    """The three planes of D H [u, 1] + g, each (B, S, H, W): elementwise, so that no reduced precision touches them."""
    height, width = depth.shape[-2:]
    rows, columns = (torch.arange(n, device=depth.device, dtype=depth.dtype) for n in (height, width))
    H, g = H[..., None, None], g[..., None, None]
    planes = []
    for k in range(3):
        rays = (H[..., k, 1, :, :] * rows[:, None] + H[..., k, 2, :, :]) + H[..., k, 0, :, :] * columns
        planes.append(torch.addcmul(g[..., k, :, :], rays, depth))
    return planes


def find_places(
    depth: Tensor, H: Tensor, g: Tensor, seen_depth: Tensor, tolerance: Tensor, config: LabelConfig
) -> Places:
    """Places of one picture's pixels in another, and which of them are seen there.

    visible = surface, in front, inside the picture, on the object, and |Y_z - D(round v)| < tolerance; one-sided
    Y_z <= D(round v) + tolerance.

    Args:
        depth: (B, 1 or S, H, W), 0 where there is no surface.
        H, g: of `reprojection`, (B, S, ...).
        seen_depth: (B, 1 or S, H, W) of the other picture, 0 off the object.
        tolerance: (B, 1, 1, 1) metres.
    """
    height, width = depth.shape[-2:]
    x, y, z = affine_planes(depth, H, g)
    inverse = z.clamp(min=NEAREST).reciprocal()
    u, v = x * inverse, y * inverse
    column, row = (u + 0.5).floor(), (v + 0.5).floor()
    near_column, near_row = column.clamp(0, width - 1), row.clamp(0, height - 1)
    visible = (depth > 0) & (z > NEAREST) & (column == near_column) & (row == near_row)
    number = torch.add(near_column, near_row, alpha=width).long()
    if config.compute_visibility:
        at = seen_depth.flatten(2).expand(*z.shape[:2], -1).gather(2, number.flatten(2)).view_as(z)
        behind = z - at
        fits = behind.abs() < tolerance if config.occlusion == "two_sided" else behind <= tolerance
        visible = visible & fits & (at > 0)
    return Places(u, v, number, visible)


def depth_tolerance(diameter: Tensor, config: LabelConfig) -> Tensor:
    """(B, 1, 1, 1) metres within which two depths are one."""
    if config.occlusion == "one_sided":
        tolerance = torch.full_like(diameter, config.one_sided_tolerance)
    else:
        tolerance = (config.relative_tolerance * diameter).clamp(min=config.tolerance)
    return tolerance.float()[:, None, None, None]


def patch_of_pixels(number: Tensor, width: int, patch_size: int) -> Tensor:
    """Numbers of the patches that pixels lie in, both row by row."""
    rows = number.div(width, rounding_mode="floor")
    columns = number - rows * width
    across = width // patch_size
    return rows.div(patch_size, rounding_mode="floor") * across + columns.div(patch_size, rounding_mode="floor")


def vote(places: Places, is_object: Tensor, patch_size: int, config: LabelConfig) -> Tensor:
    """(B, S, N) labels: the template patch that most pixels of a query patch see.

    -1 with fewer than `min_object_share` ps^2 object pixels; N if fewer than `min_visible_share` of them are seen.

    Args:
        places: of the query's pixels in the templates.
        is_object: (B, H, W) bool, of the query.
    """
    batch, templates, height, width = places.visible.shape
    device = is_object.device
    count = (height // patch_size) * (width // patch_size)
    lookup = patch_of_pixels(torch.arange(height * width, device=device), width, patch_size)
    table = torch.zeros(batch, templates, count * count, device=device)
    cells = lookup[places.number.flatten(2)] + lookup * count
    table.scatter_add_(2, cells, places.visible.flatten(2).float())
    table = table.unflatten(2, (count, count))
    num_object = to_patches(is_object[:, None].float(), patch_size).sum((-2, -1))
    best = torch.where(table.sum(-1) >= config.min_visible_share * num_object, table.argmax(-1), count)
    return torch.where(num_object >= config.min_object_share * patch_size**2, best, -1)


def look_at_centers(places: Places, is_object: Tensor, patch_size: int) -> Tensor:
    """(B, S, N) labels: the template patch that sees the pixel at a query patch's centre; N if none, -1 off the object.

    Args: as of `vote`.
    """
    height, width = is_object.shape[-2:]
    count, middle = (height // patch_size) * (width // patch_size), patch_size // 2

    def at_center(pixels: Tensor) -> Tensor:
        return pixels[..., middle::patch_size, middle::patch_size].flatten(-2)

    found = patch_of_pixels(at_center(places.number), width, patch_size)
    label = torch.where(at_center(places.visible), found, count)
    return torch.where(at_center(is_object)[:, None], label, -1)


def take_patches(patches: Tensor, patch_cls: Tensor) -> Tensor:
    """(B, S, N, ...): of (B, S, N, ...) per template patch, those that the query patches are paired with.

    Patches without a pair get some template patch.
    """
    batch, templates, count = patch_cls.shape
    first = torch.arange(batch * templates, device=patch_cls.device).view(batch, templates, 1) * count
    rows = (patch_cls.clamp(0, count - 1) + first).flatten()
    return patches.flatten(0, 2).index_select(0, rows).unflatten(0, (batch, templates, count))


def center_flow(
    places: Places, surface: Tensor, patch_cls: Tensor, centers: Tensor, patch_size: int
) -> tuple[Tensor, Tensor]:
    """(B, S, N, 2) offsets (v(centre of the template patch) - c_p) / ps, and (B, S, N) where the centre has a surface.

    The centre's place is the mean over the pixels around it, 4 of an even patch and 1 of an odd; all must lie on the
    object.
    """
    low, high = (patch_size - 1) // 2, patch_size // 2 + 1
    planes = (places.u, places.v, surface.float())
    at = torch.stack([to_patches(x, patch_size)[..., low:high, low:high].mean((-2, -1)) for x in planes], dim=-1)
    at = take_patches(at, patch_cls)
    return (at[..., :2] - centers) / patch_size, at[..., 2] == 1


def _labels_of(batch: Mapping[str, Tensor], patch_size: int, config: LabelConfig) -> PoseLabels:
    query_depth = (batch["query_depth"] * batch["masks"][:, 0])[:, None].float()
    template_depth = batch["template_depth"].float()
    height, width = query_depth.shape[-2:]
    K, poses = batch["K"], batch["poses"]
    tolerance = depth_tolerance(batch["diameter"], config)
    query, templates = (K[:, :1], poses[:, :1]), (K[:, 1:], poses[:, 1:])

    back = find_places(query_depth, *reprojection(*query, *templates), template_depth, tolerance, config)
    is_object = query_depth[:, 0] > 0
    if config.class_rule == "vote":
        patch_cls = vote(back, is_object, patch_size, config)
    else:
        patch_cls = look_at_centers(back, is_object, patch_size)

    places = find_places(template_depth, *reprojection(*templates, *query), query_depth, tolerance, config)
    centers = patch_centers(height, width, patch_size, query_depth, config.patch_center)
    is_pair = (patch_cls >= 0) & (patch_cls < len(centers))
    surface = template_depth > 0
    # coordinate by coordinate: their planes are contiguous
    visible, on_surface = (
        take_patches(to_patches(mask, patch_size), patch_cls) & is_pair[..., None, None]
        for mask in (places.visible, surface)
    )
    flow = [
        (take_patches(to_patches(plane, patch_size), patch_cls) - start[:, None, None]) / patch_size
        for plane, start in zip((places.u, places.v), centers.unbind(-1), strict=True)
    ]
    supervised = visible & (torch.maximum(flow[0].abs(), flow[1].abs()) <= config.max_flow)
    dense_flow = torch.stack([torch.where(visible, plane, 0.0) for plane in flow], dim=-1)
    is_visible = is_pair
    if config.compute_patch_visibility:
        enough = visible.sum((-2, -1)) >= max(config.visibility_threshold * patch_size**2, 1)
        is_visible = enough & (supervised == visible).flatten(-2).all(-1)
    coarse, is_defined = center_flow(places, surface, patch_cls, centers, patch_size)
    is_defined = is_defined & is_pair
    in_object = (torch.eye(size, device=K.device, dtype=K.dtype) for size in (3, 4))
    points = affine_planes(template_depth, *reprojection(*templates, *in_object))
    grid = (height // patch_size, width // patch_size)
    return PoseLabels(
        patch_cls,
        torch.where(is_defined[..., None], coarse, 0.0).unflatten(2, grid),
        (is_visible & is_defined).unflatten(2, grid),
        is_visible.unflatten(2, grid),
        dense_flow,
        visible,
        supervised,
        on_surface,
        torch.stack([torch.where(surface, plane, 0.0) for plane in points], dim=-1),
    )


@torch.no_grad()
def build_labels(batch: Mapping[str, Tensor], patch_size: int, config: LabelConfig) -> PoseLabels:
    """Labels of a batch, on its device, in float32.

    Args:
        batch: `query_depth` (B, H, W) and `template_depth` (B, S, H, W) in metres, 0 without surface; `masks`
            (B, S + 1, H, W), the first one true on the object's visible pixels in the query; `K` (B, S + 1, 3, 3) and
            `poses` (B, S + 1, 4, 4) camera from object, query first; `diameter` (B,) metres.
        patch_size: divides H and W.

    Raises:
        ValueError: if the patch does not divide the picture.
    """
    height, width = batch["query_depth"].shape[-2:]
    if height % patch_size or width % patch_size:
        raise ValueError(f"`patch_size` must divide the picture's {height} x {width} pixels, but is {patch_size}")
    with torch.autocast(batch["K"].device.type, enabled=False):
        return _labels_of(batch, patch_size, config)
