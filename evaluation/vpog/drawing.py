"""Pictures of poses: a model's outline and axes over the query, correspondences as lines, flow as colours, histograms.

Pictures are (H, W, 3) uint8; pixels are (u, v) with the centre of the first at (0, 0).
"""

from __future__ import annotations

import colorsys
from collections.abc import Mapping, Sequence

import numpy as np
import trimesh
from PIL import Image, ImageDraw, ImageFont
from scipy.ndimage import binary_dilation

from backlot.mesh_views import render_views

TRUE_COLOUR = (40, 220, 90)
ESTIMATE_COLOUR = (255, 80, 40)
AXIS_COLOURS = ((230, 40, 40), (40, 190, 60), (60, 110, 255))
INK, BAR = (40, 50, 60), (11, 107, 203)
Colour = tuple[int, int, int]


def draw_outline(picture: np.ndarray, mask: np.ndarray, colour: Colour = ESTIMATE_COLOUR, width: int = 1) -> np.ndarray:
    """A copy with a line just outside of a mask.

    Args:
        mask: (H, W) bool, as a rendered model covers it.
        width: of the line, pixels.
    """
    drawn = picture.copy()
    drawn[binary_dilation(mask, np.ones((3, 3)), width) & ~mask] = colour
    return drawn


def draw_axes(picture: np.ndarray, pose: np.ndarray, intrinsics: np.ndarray, length: float) -> np.ndarray:
    """A copy with the object's x, y and z axes in red, green and blue; unchanged where they reach behind the camera.

    Args:
        pose: `camera_from_object` (4, 4).
        intrinsics: K (3, 3).
        length: of an axis, in the pose's unit.
    """
    ends = np.vstack([np.zeros(3), np.eye(3) * length])
    places = (ends @ pose[:3, :3].T + pose[:3, 3]) @ intrinsics.T
    if (places[:, 2] <= 0).any():
        return picture.copy()
    origin, *tips = (tuple(place[:2] / place[2]) for place in places)
    canvas = Image.fromarray(picture)
    pen = ImageDraw.Draw(canvas)
    for tip, colour in zip(tips, AXIS_COLOURS, strict=True):
        pen.line([origin, tip], fill=colour, width=max(1, len(picture) // 160))
    return np.asarray(canvas)


def draw_model(
    picture: np.ndarray,
    mesh: trimesh.Trimesh,
    pose: np.ndarray,
    intrinsics: np.ndarray,
    colour: Colour = ESTIMATE_COLOUR,
) -> np.ndarray:
    """A copy with a model's outline and axes.

    Args:
        mesh: in metres.
        pose: `camera_from_object` (4, 4), metres.
        intrinsics: K (3, 3).
    """
    views = render_views([mesh], pose[None, None], intrinsics, picture.shape[:2], supersample=1)
    drawn = draw_outline(picture, views.instances[0] >= 0, colour, max(1, len(picture) // 240))
    return draw_axes(drawn, pose, intrinsics, 0.5 * float(mesh.extents.max()))


def draw_correspondences(
    query: np.ndarray,
    template: np.ndarray,
    query_points: np.ndarray,
    template_points: np.ndarray,
    *,
    max_lines: int = 60,
    scale: int = 1,
) -> np.ndarray:
    """Query and template side by side, a line for each pair; a pair's colour is its direction from the query's middle.

    Args:
        query, template: of one height.
        query_points, template_points: (P, 2) pixels of either.
        max_lines: evenly chosen from the pairs.
        scale: by which both are enlarged.

    Raises:
        ValueError: the heights differ.
    """
    if len(query) != len(template):
        raise ValueError(f"`query` and `template` must be of one height, got {len(query)} and {len(template)}")
    both = np.concatenate([query, template], axis=1)
    canvas = Image.fromarray(both).resize((both.shape[1] * scale, both.shape[0] * scale), Image.Resampling.NEAREST)
    pen = ImageDraw.Draw(canvas)
    chosen = np.linspace(0, len(query_points) - 1, min(max_lines, len(query_points))).round().astype(int)
    middle = query_points.mean(0) if len(query_points) else 0
    for start, end in zip(query_points[chosen], template_points[chosen], strict=True):
        u, v = start - middle
        colour = colorsys.hsv_to_rgb(np.arctan2(v, u) / (2 * np.pi) % 1, 0.9, 1)
        line = (np.array([start, end + np.array([query.shape[1], 0])]) + 0.5) * scale
        pen.line(list(map(tuple, line)), fill=tuple(int(255 * c) for c in colour), width=1)
    return np.asarray(canvas)


def flow_to_rgb(flow: np.ndarray, limit: float = 1.0, valid: np.ndarray | None = None) -> np.ndarray:
    """Flow in HSV: the direction is the hue (right is red), the length the saturation; none is white.

    Args:
        flow: (..., 2) to the right and downwards.
        limit: length that is fully saturated.
        valid: (...) bool; black elsewhere.

    Returns:
        (..., 3) uint8.
    """
    hue = np.arctan2(flow[..., 1], flow[..., 0]) / (2 * np.pi) % 1
    saturation = np.clip(np.linalg.norm(flow, axis=-1) / limit, 0, 1)
    value = np.ones_like(hue) if valid is None else valid.astype(float)
    pixels = (np.stack([hue, saturation, value], -1) * 255).round().astype(np.uint8)
    flat = Image.fromarray(pixels.reshape(-1, 1, 3), "HSV").convert("RGB")
    return np.asarray(flat).reshape(*flow.shape[:-1], 3)


def join_patches(patches: np.ndarray, columns: int) -> np.ndarray:
    """Values of patches (N, ps, ps, ...), row-major, as one picture (rows * ps, columns * ps, ...)."""
    number, side = patches.shape[:2]
    grid = patches.reshape(number // columns, columns, side, side, *patches.shape[3:]).swapaxes(1, 2)
    return grid.reshape(number // columns * side, columns * side, *patches.shape[3:])


def draw_histogram(
    values: Mapping[str, Sequence[float]], edges: Sequence[float], unit: str, size: tuple[int, int] = (360, 160)
) -> np.ndarray:
    """Histograms under one another, each with its median; what lies above the last edge is counted in the last bar.

    Args:
        values: title -> values; those that are not finite are counted in the last bar.
        edges: of the bars, ascending.
        unit: behind the numbers on the axis.
        size: (width, height) of one, pixels.
    """
    width, height = size
    canvas = Image.new("RGB", (width, height * len(values)), (255, 255, 255))
    pen, font = ImageDraw.Draw(canvas), ImageFont.load_default(size=11)
    bar = (width - 20) / (len(edges) - 1)
    for row, (title, numbers) in enumerate(values.items()):
        top, bottom = row * height + 22, (row + 1) * height - 20
        numbers = np.nan_to_num(np.asarray(numbers, float), nan=np.inf)
        counts = np.histogram(np.clip(numbers, edges[0], edges[-1]), edges)[0]
        median = f", median {np.median(numbers):.3g}{unit}" if len(numbers) else ""
        pen.text((10, row * height + 4), f"{title}: {len(numbers)}{median}", fill=INK, font=font)
        for place, count in enumerate(counts):
            left = 10 + place * bar
            if count:
                pen.rectangle([left, bottom - (bottom - top) * count / counts.max(), left + bar - 2, bottom], fill=BAR)
        for place in range(0, len(edges), max(1, len(edges) // 8)):
            label = f"{edges[place]:g}{unit}"
            pen.text((10 + place * bar, bottom + 3), label, fill=INK, font=font, anchor="ma")
    return np.asarray(canvas)
