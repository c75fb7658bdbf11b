"""Where a token lies and from where its template was seen, as rotations of queries and keys.

Channels are turned in pairs, so that attention sees differences of angles alone (Su et al., arXiv 2104.09864). A head's
angles come in one order: 2D position, then view. Where 2D position takes all of them, the layout of the channels is
that of CroCo v2 (Weinzaepfel et al., arXiv 2211.10408).
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

VIEW_ENCODINGS = ("s2_smooth", "s2_face", "so3", "none")
FACE_BASE = 10_000.0
NEAR_POLE = 0.9
"""Cosine to the object's z axis from which on `s2_face` measures from its y axis."""


class Rotary(NamedTuple):
    """How each token's query and key are turned.

    Args:
        cos, sin: (B or 1, tokens, head_dim / 2) float32, of the channel pairs.
        turns: (B, tokens, 3, 3), of the channel triples in the head's second half; None: there are none.
    """

    cos: Tensor
    sin: Tensor
    turns: Tensor | None = None


def rotate(heads: Tensor, rotary: Rotary) -> Tensor:
    """Turn queries or keys (B, tokens, heads, head_dim).

    Each half of a head is a block, in which channel i is paired with channel i + head_dim / 4.
    """
    cos, sin = (values.to(heads.dtype)[..., None, :].unflatten(-1, (2, -1)) for values in (rotary.cos, rotary.sin))
    first, second = heads.unflatten(-1, (2, 2, -1)).unbind(-2)
    turned = torch.stack([first * cos - second * sin, second * cos + first * sin], dim=-2).flatten(-3)
    if rotary.turns is None:
        return turned
    half = turned.shape[-1] // 2
    width = half // 3 * 3
    position, triples, rest = turned.split([half, width, half - width], dim=-1)
    triples = torch.einsum("blij,blhnj->blhni", rotary.turns.to(heads.dtype), triples.unflatten(-1, (-1, 3)))
    return torch.cat([position, triples.flatten(-2), rest], dim=-1)


def check_head_dim(view_encoding: str, head_dim: int) -> None:
    """Raises:
    ValueError: the encoding is unknown, or a head of this width has no room for it.
    """
    if view_encoding not in VIEW_ENCODINGS:
        raise ValueError(f"`view_encoding` must be one of {', '.join(VIEW_ENCODINGS)}, got {view_encoding!r}")
    multiple = 8 if view_encoding in ("s2_smooth", "so3") else 4
    if head_dim % multiple or (view_encoding != "none" and head_dim < 16):
        raise ValueError(
            f"`view_encoding` {view_encoding} needs heads of a multiple of {multiple} channels"
            f"{'' if view_encoding == 'none' else ', 16 or more'}, got {head_dim}"
        )


def split_pairs(view_encoding: str, head_dim: int) -> tuple[int, int, int]:
    """How many channel pairs of a head encode the row, the column and the view."""
    pairs = head_dim // 2
    if view_encoding == "none":
        return pairs // 2, pairs // 2, 0
    view = 6 * face_phases(head_dim) if view_encoding == "s2_face" else pairs // 2
    return (pairs - view) // 2, (pairs - view) // 2, view


def face_phases(head_dim: int) -> int:
    """Phases per face of `s2_face`."""
    return max(1, head_dim // 2 // 4 // 6)


def frame_rotary(size: int, head_dim: int, base: float, device: torch.device) -> Rotary:
    """2D positions of a square of `size` x `size` patches, and one more token without any.

    Returns:
        (1, size * size + 1, head_dim / 2).
    """
    angles = F.pad(grid_angles(size, head_dim // 4, head_dim // 4, base, device), (0, 0, 0, 1))[None]
    return Rotary(angles.cos(), angles.sin())


def group_rotary(
    view_encoding: str,
    rotations: Tensor,
    d_ref: Tensor,
    reference_rotation: Tensor,
    size: int,
    head_dim: int,
    base: float,
) -> Rotary:
    """2D positions and views of a query's patches and its S templates' patches and unseen tokens.

    The unseen token has the view of its template and no 2D position; the query has the reference's view.

    Args:
        rotations: (B, S, 3, 3), camera_from_object of the templates.
        d_ref: (B, 3), the direction, in the object's frame, from which the query is thought to be seen.
        reference_rotation: (B, 3, 3), of the template that gave `d_ref`.
        size: patches per side, N = size * size.

    Returns:
        (B, N + S * (N + 1), head_dim / 2): the query's patches, then one template after another.
    """
    rows, columns, pairs = split_pairs(view_encoding, head_dim)
    batch, templates = rotations.shape[:2]
    # Neighbouring views differ by less than bf16 can tell.
    with torch.autocast(rotations.device.type, enabled=False):
        rotations, d_ref, reference_rotation = rotations.float(), d_ref.float(), reference_rotation.float()
        views = rotations.new_zeros(batch, 1 + templates, pairs)
        if view_encoding in ("s2_smooth", "s2_face"):
            directions = torch.cat([d_ref[:, None], -rotations[..., 2, :]], dim=1)
            if view_encoding == "s2_smooth":
                views = smooth_angles(directions, direction_frame(d_ref, reference_rotation[:, 0]), pairs)
            else:
                views = face_angles(directions, direction_frame(d_ref, object_axis(d_ref)), face_phases(head_dim))
        turns = None
        if view_encoding == "so3":
            query = torch.eye(3, device=rotations.device).expand(batch, 1, 3, 3)
            turns = torch.cat([query, reference_rotation[:, None] @ rotations.mT], dim=1)

    grid = F.pad(grid_angles(size, rows, columns, base, rotations.device), (0, 0, 0, 1))
    grid = grid.expand(batch, 1 + templates, *grid.shape)
    tokens = grid.shape[2]
    angles = torch.cat([grid, views[:, :, None].expand(-1, -1, tokens, -1)], dim=-1)
    angles = drop_query_unseen(angles)
    if turns is not None:
        turns = drop_query_unseen(turns[:, :, None].expand(-1, -1, tokens, -1, -1))
    return Rotary(angles.cos(), angles.sin(), turns)


def drop_query_unseen(values: Tensor) -> Tensor:
    """(B, 1 + S, N + 1, ...) -> (B, N + S * (N + 1), ...): the query has no unseen token."""
    return torch.cat([values[:, 0, :-1], values[:, 1:].flatten(1, 2)], dim=1)


def grid_angles(size: int, rows: int, columns: int, base: float, device: torch.device) -> Tensor:
    """Angles of 2D positions, (size * size, rows + columns): coordinate * base^(-i / count)."""
    coordinate = torch.arange(size, device=device, dtype=torch.float32)
    row = coordinate[:, None] * frequencies(rows, base, device)
    column = coordinate[:, None] * frequencies(columns, base, device)
    row, column = row[:, None].expand(size, size, rows), column[None].expand(size, size, columns)
    return torch.cat([row, column], dim=-1).flatten(0, 1)


def frequencies(count: int, base: float, device: torch.device) -> Tensor:
    """base^(-i / count) for i < count."""
    return base ** -(torch.arange(count, device=device, dtype=torch.float32) / max(count, 1))


def direction_frame(d_ref: Tensor, axis: Tensor) -> Tensor:
    """Rows d, e1, e2: the direction, `axis` made orthogonal to it, and their cross product. (B, 3, 3)."""
    direction = F.normalize(d_ref, dim=-1)
    first = F.normalize(axis - (axis * direction).sum(-1, keepdim=True) * direction, dim=-1)
    return torch.stack([direction, first, torch.linalg.cross(direction, first)], dim=-2)


def object_axis(d_ref: Tensor) -> Tensor:
    """The object's z axis, or its y axis where the direction is near z. (B, 3)."""
    z, y = torch.zeros_like(d_ref), torch.zeros_like(d_ref)
    z[..., 2], y[..., 1] = 1.0, 1.0
    near = F.normalize(d_ref, dim=-1)[..., 2:].abs() >= NEAR_POLE
    return torch.where(near, y, z)


def smooth_angles(directions: Tensor, frame: Tensor, pairs: int) -> Tensor:
    """Angles k pi (v . f) for the frame's three axes f and k = 1/2, 1, 2, 4, ...

    The lowest is 1/2 because v . f = 1 and -1 are the same angle for every whole k.

    Args:
        directions: (B, V, 3). frame: (B, 3, 3), an axis in each row.
        pairs: what three axes do not fill stays 0.

    Returns:
        (B, V, pairs).
    """
    components = (F.normalize(directions, dim=-1)[:, :, None] * frame[:, None]).sum(-1)
    octaves = math.pi * 2.0 ** torch.arange(-1, pairs // 3 - 1, device=directions.device, dtype=torch.float32)
    angles = (components[..., None] * octaves).flatten(-2)
    return F.pad(angles, (0, pairs - angles.shape[-1]))


def face_angles(directions: Tensor, frame: Tensor, phases: int) -> Tensor:
    """Distance from, and azimuth around, each of the six directions +-d, +-e1, +-e2.

    Args:
        directions: (B, V, 3). frame: (B, 3, 3), an axis in each row.
        phases: per face; half of them, rounded down, from the distance and the rest from the azimuth.

    Returns:
        (B, V, 6 * phases).
    """
    directions = F.normalize(directions, dim=-1)
    faces = torch.cat([frame, -frame], dim=1)
    right, up = (frame.roll(-places, dims=1).repeat(1, 2, 1) for places in (1, 2))
    on_face, on_right, on_up = ((directions[:, :, None] * axes[:, None]).sum(-1) for axes in (faces, right, up))
    distance, azimuth = on_face.clamp(-1, 1).acos(), torch.atan2(on_up, on_right)
    radial = frequencies(phases // 2, FACE_BASE, directions.device)
    around = frequencies(phases - phases // 2, FACE_BASE, directions.device)
    return torch.cat([distance[..., None] * radial, azimuth[..., None] * around], dim=-1).flatten(-2)
