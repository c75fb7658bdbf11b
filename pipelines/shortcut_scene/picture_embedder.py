"""PictureEmbedder: a small picture, and where in the scene its pixels lie, as tokens."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from backlot.layers import sincos_positions

NUM_OCTAVES = 6
POINT_CHANNELS = 6 * NUM_OCTAVES  # of `embed_points`
WINDOW_UNIT = 0.25  # metres
EDGE = 0.25  # metres between neighbouring pixels: further apart they belong to different surfaces


class PictureEmbedder(nn.Module):
    """Patches of a picture (B, 3, S, S), or of picture and pointmap (B, 6, S, S), as tokens.

    Returns (B, L, D), or (B, N, L, D) with a mask of each object, and (B, L) bool: which are real, None for all.
    A token sees its patch and the eight around it. With a pointmap, patches without any point in it are left
    out (L is the largest number of the others in the batch), and points are relative to the middle of their patch's.
    """

    def __init__(
        self, channels: int, image_size: int, patch_size: int, width: int, heads: int, num_layers: int, has_masks: bool
    ):
        super().__init__()
        if image_size % patch_size:
            raise ValueError(f"`image_size` ({image_size}) must be a multiple of `patch_size` ({patch_size})")
        self.image_size = image_size
        # with a pointmap also whether there is a point, and the surface's normal
        self.windows = nn.Linear((channels + 4 * (channels == 6)) * (3 * patch_size) ** 2, width)
        positions = sincos_positions(width, image_size // patch_size)
        self.register_buffer("positions", positions, persistent=False)
        self.mlp = nn.Sequential(nn.SiLU(), nn.Linear(width, width))
        self.layers = nn.ModuleList(
            nn.TransformerEncoderLayer(
                width, heads, 4 * width, dropout=0.0, activation="gelu", batch_first=True, norm_first=True
            )
            for _ in range(num_layers)
        )
        self.mask_patches = nn.Conv2d(1, width, patch_size, stride=patch_size) if has_masks else None
        self.places = nn.Linear(POINT_CHANNELS + 1, width) if channels == 6 else None
        self.patch_size = patch_size
        self.norm = nn.LayerNorm(width)

    def forward(self, picture: Tensor, masks: Tensor | None) -> tuple[Tensor, Tensor | None]:
        if picture.shape[-2:] != (self.image_size, self.image_size):
            height, width = picture.shape[-2:]
            raise ValueError(f"the picture is {width} x {height}, the network was made for {self.image_size} squared")
        dtype = self.windows.weight.dtype
        positions, kept, seen = self.positions.to(dtype).expand(len(picture), -1, -1), None, None
        if self.places is None:
            tokens = self.mlp(self.windows(cut_windows(picture.to(dtype), self.patch_size))) + positions
        else:
            picture = picture.float()  # in half precision neighbouring points would be a centimetre off
            is_point = (picture[:, 3:] != 0).any(1, keepdim=True).float()
            centres, shares = average_points(picture[:, 3:], is_point, self.patch_size)
            kept, seen = leave_out(shares[..., 0] > 0)
            normals = surface_normals(picture[:, 3:], is_point)
            windows = cut_windows(torch.cat([picture, is_point, normals], dim=1), self.patch_size, kept)
            centres, shares, positions = (select(x, kept) for x in (centres, shares, positions))
            places = torch.cat([embed_points(centres), shares], dim=-1).to(dtype)
            tokens = self.mlp(self.windows(move_points(windows, centres).to(dtype))) + positions + self.places(places)
        for layer in self.layers:
            tokens = layer(tokens, src_key_padding_mask=None if seen is None else ~seen)
        if masks is None:
            return self.norm(tokens), seen
        own = self.mask_patches(masks.to(dtype).flatten(0, 1)[:, None]).flatten(2).transpose(1, 2)
        if kept is not None:
            own = select(own, kept.repeat_interleave(masks.shape[1], dim=0))
        return self.norm(tokens[:, None] + own.unflatten(0, masks.shape[:2])), seen


def leave_out(seen: Tensor) -> tuple[Tensor, Tensor]:
    """(B, L) bool -> numbers (B, K) of those that are true, in order, K the most of any row, and which are no filling.

    A row without any keeps its first.
    """
    seen = seen | (torch.arange(seen.shape[1], device=seen.device) == 0) & ~seen.any(1, keepdim=True)
    kept = seen.int().argsort(dim=1, descending=True, stable=True)[:, : int(seen.sum(1).max())]
    return kept, seen.gather(1, kept)


def select(x: Tensor, kept: Tensor) -> Tensor:
    """(B, L, C) and numbers (B, K) -> (B, K, C)."""
    return x.gather(1, kept[..., None].expand(-1, -1, x.shape[-1]))


def cut_windows(x: Tensor, patch_size: int, kept: Tensor | None = None) -> Tensor:
    """(B, C, S, S) -> (B, L, C (3 p)^2): each patch, or those of numbers (B, L), with the ones around it.

    Beyond the border there is 0.
    """
    padded = F.pad(x, (patch_size,) * 4)
    windows = padded.unfold(2, 3 * patch_size, patch_size).unfold(3, 3 * patch_size, patch_size)
    windows = windows.permute(0, 2, 3, 1, 4, 5)  # (B, S / p, S / p, C, 3 p, 3 p), of which nothing is copied yet
    if kept is None:
        return windows.flatten(1, 2).flatten(2)
    scenes, side = torch.arange(len(x), device=x.device)[:, None], windows.shape[2]
    return windows[scenes, kept // side, kept % side].flatten(2)


def move_points(windows: Tensor, centres: Tensor) -> Tensor:
    """Windows (B, K, 10 (3 p)^2) of colour, point, whether there is one, and normal: points relative to (B, K, 3)."""
    colors, points, is_point, normals = windows.unflatten(-1, (10, -1)).split((3, 3, 1, 3), dim=2)
    points = (points - centres[..., None]) * is_point / WINDOW_UNIT
    return torch.cat([colors, points, is_point, normals], dim=2).flatten(2)


def surface_normals(pointmap: Tensor, is_point: Tensor) -> Tensor:
    """Unit normals (B, 3, S, S) towards the camera, of neighbouring points; 0 where too few are on one surface."""
    along, known = [], is_point
    for axis in (3, 2):
        steps, weights = [], []
        for shift in (-1, 1):
            step = (pointmap.roll(shift, axis) - pointmap) * -shift
            near = squared_norm(step) < EDGE**2
            weights.append(near * is_point * is_point.roll(shift, axis))
            steps.append(step * weights[-1])
        along.append(steps[0] + steps[1])
        known = known * (weights[0] + weights[1]).clamp(max=1)
    right, down = along
    normals = torch.linalg.cross(down, right, dim=1)
    return normals * squared_norm(normals).clamp(min=1e-24).rsqrt() * known


def squared_norm(x: Tensor) -> Tensor:
    """Over channels, (B, C, S, S) -> (B, 1, S, S); the norm itself is several times slower there on a CPU."""
    return x.square().sum(1, keepdim=True)


def average_points(pointmap: Tensor, is_point: Tensor, patch_size: int) -> tuple[Tensor, Tensor]:
    """Mean of each patch's points (B, patches, 3), and the share of its pixels that have one (B, patches, 1)."""
    share, centre = (F.avg_pool2d(x, patch_size).flatten(2).transpose(1, 2) for x in (is_point, pointmap))
    return centre / share.clamp(min=1e-6), share


def embed_points(points: Tensor) -> Tensor:
    """Points (..., 3) in metres -> sines and cosines (..., 6 NUM_OCTAVES) of waves from 4 m down to 12 cm long."""
    octaves = torch.pi / 2 * 2.0 ** torch.arange(NUM_OCTAVES, device=points.device)
    angles = (points.float()[..., None] * octaves).flatten(-2)
    return torch.cat([angles.sin(), angles.cos()], dim=-1).to(points.dtype)
