"""Boxes drawn on a picture: red for foreground, blue for background, with alpha and what is asked for."""

from __future__ import annotations

from collections.abc import Sequence

from PIL import Image, ImageDraw, ImageFont

from pipelines.layout_flux.layout import FOREGROUND_ALPHA

FOREGROUND, BACKGROUND = (220, 30, 30), (40, 80, 230)
MIN_SIDE = 256  # a smaller picture is enlarged, so that the texts can be read


def box_colour(alpha: float) -> tuple[int, int, int]:
    return FOREGROUND if alpha >= FOREGROUND_ALPHA else BACKGROUND


def font_for(canvas: Image.Image) -> ImageFont.FreeTypeFont:
    return ImageFont.load_default(size=max(11, min(canvas.size) // 32))


def draw_boxes(
    image: Image.Image,
    boxes: Sequence[Sequence[float]],
    alpha: Sequence[float],
    texts: Sequence[str | None] | None = None,
    min_side: int = MIN_SIDE,
) -> Image.Image:
    """A copy of a picture with its boxes; small ones are enlarged by a whole number.

    Args:
        boxes: x1 y1 x2 y2 in [0, 1]. alpha: how much each is foreground. texts: beside alpha; None: alpha alone.
        min_side: in pixels, of the result's shorter side.
    """
    factor = max(1, -(-min_side // min(image.size)))
    canvas = image.convert("RGB").resize((image.width * factor, image.height * factor), Image.Resampling.NEAREST)
    draw, font = ImageDraw.Draw(canvas), font_for(canvas)
    line = max(2, min(canvas.size) // 200)
    for box, strength, text in zip(boxes, alpha, texts or [None] * len(boxes), strict=True):
        colour = box_colour(strength)
        x1, y1, x2, y2 = (value * side for value, side in zip(box, canvas.size * 2, strict=True))
        draw.rectangle((x1, y1, max(x1, x2 - 1), max(y1, y2 - 1)), outline=colour, width=line)
        label = f"{strength:.2f}" + (f" {text}" if text else "")
        left, top, right, bottom = draw.textbbox((x1 + 2 * line, y1 + 2 * line), label, font=font)
        draw.rectangle((left - line, top - line, right + line, bottom + line), fill=colour)
        draw.text((x1 + 2 * line, y1 + 2 * line), label, font=font, fill="white")
    return canvas
