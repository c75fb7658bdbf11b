"""Poses drawn over pictures: the object's surface as dots, its axes, and how surely it was found."""
# ruff: noqa: N803 - K is what everybody calls it

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from backlot.cameras import project, transform

SURFACE = (60, 220, 90)
AXES = ((230, 50, 50), (60, 200, 60), (70, 110, 250))  # x, y, z
MIN_SIDE = 256  # a smaller picture is enlarged


def draw_pose(
    image: Image.Image,
    K: np.ndarray | Tensor,
    camera_from_object: np.ndarray | Tensor,
    points: Tensor,
    diameter: float,
    text: str | None = None,
    colour: Sequence[int] = SURFACE,
    min_side: int = MIN_SIDE,
) -> Image.Image:
    """A copy of a picture with a pose; small ones are enlarged by a whole number.

    Args:
        K: (3, 3) of the picture. camera_from_object: (4, 4), metres.
        points: (P, 3) of the object's surface, its own frame; those on the far side are drawn, too.
        diameter: of the object in metres; the axes are half as long.
        text: drawn at the top left.
        min_side: in pixels, of the result's shorter side.
    """
    factor = max(1, -(-min_side // min(image.size)))
    canvas = image.convert("RGB").resize((image.width * factor, image.height * factor), Image.Resampling.NEAREST)
    K, pose = (torch.as_tensor(np.asarray(each), dtype=torch.float64) for each in (K, camera_from_object))

    def places(of: Tensor) -> list[tuple[float, float]]:
        """Where points (P, 3) are on the canvas; those behind the camera are nowhere."""
        seen = transform(pose, of.double())
        seen = seen[seen[:, 2] > 0]
        return [tuple(each) for each in (factor * (project(K, seen) + 0.5)).tolist()]

    layer = canvas.copy()
    draw = ImageDraw.Draw(layer)
    radius = max(1.0, factor / 2)
    for x, y in places(points):
        draw.ellipse((x - radius, y - radius, x + radius, y + radius), fill=tuple(colour))
    canvas = Image.blend(canvas, layer, 0.45)
    draw = ImageDraw.Draw(canvas)
    for axis, tint in zip(torch.eye(3, dtype=torch.float64), AXES, strict=True):
        line = places(torch.stack([torch.zeros_like(axis), axis * diameter / 2]))
        if len(line) == 2:
            draw.line(line, fill=tint, width=max(2, min(canvas.size) // 120))
    if text:
        font = ImageFont.load_default(size=max(11, min(canvas.size) // 24))
        draw.text((5, 4), text, fill="white", font=font, stroke_width=2, stroke_fill="black")
    return canvas
