"""Pinhole cameras, rigid poses and crops: the geometry that labels, losses, pipelines and data share. Pure torch.

Metres, OpenCV axes (x right, y down, z forward). Pixel centres lie at integer coordinates: the pixel in row i and
column j is at u = j, v = i. A crop is an affine matrix M from the picture's pixels to the crop's, and its camera is
M @ K exactly. Nothing here waits for a device, except `warp` when it reads how much it shrinks.
"""
# ruff: noqa: N803 - K and M are what everybody calls them

from __future__ import annotations

import math
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

SMALLEST_BOX = 1.0
"""Pixels: a smaller box is cropped as if it were this large."""


# ---- projection ----


def project(K: Tensor, points: Tensor) -> Tensor:
    """Pixels of points in camera coordinates; those with z = 0 are not finite, those behind the camera are mirrored.

    Args:
        K: (..., 3, 3), last row 0 0 1. points: (..., P, 3) metres.

    Returns:
        (..., P, 2) u, v.
    """
    rays = points[..., :2] / points[..., 2:]
    return rays @ K[..., :2, :2].mT + K[..., None, :2, 2]


def pixel_grid(height: int, width: int, like: Tensor) -> Tensor:
    """(height, width, 2) u, v of all pixel centres, on the device and in the dtype of `like`."""
    v, u = torch.meshgrid(
        torch.arange(height, device=like.device, dtype=like.dtype),
        torch.arange(width, device=like.device, dtype=like.dtype),
        indexing="ij",
    )
    return torch.stack([u, v], dim=-1)


def inverse_affine(M: Tensor) -> Tensor:
    """Inverse of (..., 3, 3) matrices whose last row is 0 0 1: crops and cameras."""
    (a, b, x), (c, d, y) = (M[..., row, :].unbind(-1) for row in (0, 1))
    zero, determinant = torch.zeros_like(a), a * d - b * c
    top = torch.stack([d, -b, b * y - d * x], dim=-1) / determinant[..., None]
    middle = torch.stack([-c, a, c * x - a * y], dim=-1) / determinant[..., None]
    return torch.stack([top, middle, torch.stack([zero, zero, torch.ones_like(a)], dim=-1)], dim=-2)


def backproject(K: Tensor, depth: Tensor) -> Tensor:
    """Points in camera coordinates of all pixels; the origin where depth is 0.

    Args:
        K: (..., 3, 3), last row 0 0 1. depth: (..., H, W) metres along z.

    Returns:
        (..., H, W, 3) metres.
    """
    inverse = inverse_affine(K)
    pixels = pixel_grid(*depth.shape[-2:], like=depth)
    rays = torch.einsum("...ij,hwj->...hwi", inverse[..., :2, :2], pixels) + inverse[..., None, None, :2, 2]
    return torch.cat([rays, torch.ones_like(rays[..., :1])], dim=-1) * depth[..., None]


# ---- rigid poses ----


def transform(pose: Tensor, points: Tensor) -> Tensor:
    """Points (..., P, 3) moved by rigid matrices (..., 4, 4)."""
    return points @ pose[..., :3, :3].mT + pose[..., None, :3, 3]


def make_pose(rotation: Tensor, translation: Tensor) -> Tensor:
    """(..., 4, 4) of rotations (..., 3, 3) and translations (..., 3)."""
    top = torch.cat([rotation, translation[..., None]], dim=-1)
    last = torch.zeros_like(top[..., :1, :])
    last[..., 3] = 1
    return torch.cat([top, last], dim=-2)


def inverse_pose(pose: Tensor) -> Tensor:
    """Inverse of rigid matrices (..., 4, 4)."""
    rotation = pose[..., :3, :3].mT
    return make_pose(rotation, -(rotation @ pose[..., :3, 3:]).squeeze(-1))


def viewing_direction(camera_from_object: Tensor) -> Tensor:
    """(..., 3) unit vector from the object's origin to the camera, in the object's frame: -R^T t / |t|."""
    rotation, translation = camera_from_object[..., :3, :3], camera_from_object[..., :3, 3]
    return -F.normalize((rotation.mT @ translation[..., None]).squeeze(-1), dim=-1)


def rotation_angle(first: Tensor, second: Tensor) -> Tensor:
    """Angle in radians, 0 to pi, between rotations (..., 3, 3); exact for small angles and near pi alike."""
    relative = first @ second.mT
    skew = relative - relative.mT
    sine = torch.stack([skew[..., 2, 1], skew[..., 0, 2], skew[..., 1, 0]], dim=-1).norm(dim=-1)
    return torch.atan2(sine, relative.diagonal(dim1=-2, dim2=-1).sum(-1) - 1)


def rotation_z(angle: Tensor) -> Tensor:
    """(..., 3, 3) turns by angles (...) in radians about the camera's axis; clockwise in the picture."""
    zero, one = torch.zeros_like(angle), torch.ones_like(angle)
    c, s = angle.cos(), angle.sin()
    return torch.stack([c, -s, zero, s, c, zero, zero, zero, one], dim=-1).unflatten(-1, (3, 3))


def in_plane_angle(query: Tensor, template: Tensor) -> tuple[Tensor, Tensor]:
    """How far a template must be turned in its picture to look like the query (GigaPose, arXiv 2311.14155).

    theta is the first of the extrinsic zyx Euler angles of R_t R_q^T, so that R_z(-theta) R_t is close to R_q.

    Args:
        query, template: (..., 3, 3) rotations camera_from_object.

    Returns:
        theta in radians, and the angle that is left between R_z(-theta) R_t and R_q; both (...).
    """
    relative = template @ query.mT
    theta = torch.atan2(-relative[..., 0, 1], relative[..., 0, 0])
    return theta, rotation_angle(rotation_z(-theta) @ template, query)


def matrix_from_quat_wxyz(quat_wxyz: Tensor) -> Tensor:
    """Rotations (..., 3, 3) of quaternions (..., 4) of any length but 0."""
    w, x, y, z = F.normalize(quat_wxyz, dim=-1).unbind(-1)
    entries = (
        *(1 - 2 * (y * y + z * z), 2 * (x * y - w * z), 2 * (x * z + w * y)),
        *(2 * (x * y + w * z), 1 - 2 * (x * x + z * z), 2 * (y * z - w * x)),
        *(2 * (x * z - w * y), 2 * (y * z + w * x), 1 - 2 * (x * x + y * y)),
    )
    return torch.stack(entries, dim=-1).unflatten(-1, (3, 3))


def quat_wxyz_from_matrix(rotation: Tensor) -> Tensor:
    """Unit quaternions (..., 4) with w >= 0 of rotations (..., 3, 3): the best conditioned of four equal formulas."""
    xx, yy, zz = rotation.diagonal(dim1=-2, dim2=-1).unbind(-1)
    plus, minus = rotation + rotation.mT, rotation - rotation.mT
    wx, wy, wz = minus[..., 2, 1], minus[..., 0, 2], minus[..., 1, 0]
    xy, xz, yz = plus[..., 0, 1], plus[..., 0, 2], plus[..., 1, 2]
    rows = (  # row k is 4 q_k q
        (1 + xx + yy + zz, wx, wy, wz),
        (wx, 1 + xx - yy - zz, xy, xz),
        (wy, xy, 1 - xx + yy - zz, yz),
        (wz, xz, yz, 1 - xx - yy + zz),
    )
    table = torch.stack([torch.stack(row, dim=-1) for row in rows], dim=-2)
    largest = table.diagonal(dim1=-2, dim2=-1).argmax(-1)
    chosen = table.gather(-2, largest[..., None, None].expand(*largest.shape, 1, 4)).squeeze(-2)
    unit = F.normalize(chosen, dim=-1)
    return torch.where(unit[..., :1] < 0, -unit, unit)


# ---- crops ----


def square_crop(boxes: Tensor, size: int, padding: float = 1.2) -> Tensor:
    """The affine that cuts boxes out as squares; boxes may lie outside the picture.

    Args:
        boxes: (B, 4) x1 y1 x2 y2, edges in whole pixels counted from the picture's corner, x2 and y2 exclusive: the
            pixels of columns x1 ... x2 - 1 are inside.
        size: side of the crop in pixels.
        padding: side of the square over the box's longer side.

    Returns:
        (B, 3, 3) M, crop pixels from picture pixels.
    """
    boxes = boxes if boxes.is_floating_point() else boxes.float()
    # an edge at x lies at x - 1/2 where pixel centres have integer coordinates
    centres = (boxes[:, :2] + boxes[:, 2:] - 1) / 2
    sides = padding * (boxes[:, 2:] - boxes[:, :2]).amax(1).clamp(min=SMALLEST_BOX)
    scale = size / sides
    shift = (size - 1) / 2 - scale[:, None] * centres
    zero, one = torch.zeros_like(scale), torch.ones_like(scale)
    entries = (scale, zero, shift[:, 0], zero, scale, shift[:, 1], zero, zero, one)
    return torch.stack(entries, dim=-1).unflatten(-1, (3, 3))


def warp(pictures: Tensor, M: Tensor, size: int, mode: Literal["bilinear", "nearest"] = "bilinear") -> Tensor:
    """Pictures resampled through affines, zeros outside.

    Bilinear sampling is antialiased where a crop shrinks: each crop pixel is the mean of k x k samples spread evenly
    over it, k the least whole number that leaves no more than one picture pixel between samples.

    Args:
        pictures: (B, C, H, W) float.
        M: (B, 3, 3), crop pixels from picture pixels; turns are allowed.
        size: side of the square crops.
        mode: nearest for depth and masks.

    Returns:
        (B, C, size, size)
    """
    inverse = inverse_affine(M)
    factors = [1] * len(M)
    if mode == "bilinear":
        steps = inverse[:, :2, :2].norm(dim=1).amax(1).tolist()  # picture pixels from one crop pixel to the next
        factors = [max(1, math.ceil(step - 1e-3)) for step in steps]
    crops = [_sample(*row, size, factor, mode) for *row, factor in zip(pictures, inverse, factors, strict=True)]
    return torch.stack(crops)


def _sample(picture: Tensor, inverse: Tensor, size: int, factor: int, mode: str) -> Tensor:
    """One crop (C, size, size) of a picture (C, H, W); `inverse`: picture pixels from crop pixels."""
    height, width = picture.shape[-2:]
    fine = (pixel_grid(size * factor, size * factor, like=inverse) + 0.5) / factor - 0.5
    places = fine @ inverse[:2, :2].mT + inverse[:2, 2]
    scale = places.new_tensor((width, height))
    grid = ((2 * places + 1) / scale - 1).to(picture.dtype)
    crop = F.grid_sample(picture[None], grid[None], mode=mode, padding_mode="zeros", align_corners=False)
    return F.avg_pool2d(crop, factor)[0]
