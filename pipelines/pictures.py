"""Pictures of samples: from tensors, and in grids with labels."""

from __future__ import annotations

from typing import TYPE_CHECKING

from PIL import Image, ImageDraw, ImageFont

if TYPE_CHECKING:
    from torch import Tensor


def to_images(pictures: Tensor) -> list[Image.Image]:
    """(B, 1 or 3, H, W) in [0, 1] -> 8-bit greyscale or RGB."""
    pixels = (pictures.clamp(0, 1) * 255).round().byte().permute(0, 2, 3, 1).cpu().numpy()
    return [Image.fromarray(x[..., 0] if x.shape[2] == 1 else x) for x in pixels]


def image_grid(
    rows: list[list[Image.Image]], row_labels: list[str] | None = None, cell: int | None = None
) -> Image.Image:
    """Lay out rows of equally large images, each row with a label to its left.

    Args:
        rows: images, all of one size; rows may differ in length.
        row_labels: one text per row.
        cell: enlarge (bicubic) so that an image is about this many pixels wide.
    """
    first = rows[0][0]
    factor = max(1, round((cell or first.width) / first.width))
    width, height = first.width * factor, first.height * factor
    gap = max(2, width // 8)  # wide enough that strokes of neighbours do not run into one another
    font = ImageFont.load_default(size=max(10, min(16, height // 2)))
    margin = 8 + max((int(font.getlength(label)) for label in row_labels), default=0) if row_labels else 0
    columns = max(len(row) for row in rows)
    canvas = Image.new(
        "RGB", (margin + columns * (width + gap) + gap, len(rows) * (height + gap) + gap), (255, 255, 255)
    )
    draw = ImageDraw.Draw(canvas)
    for i, row in enumerate(rows):
        top = gap + i * (height + gap)
        if row_labels:
            draw.text((4, top + height // 2), row_labels[i], fill=(60, 60, 60), font=font, anchor="lm")
        for j, image in enumerate(row):
            enlarged = image.convert("RGB").resize((width, height), Image.Resampling.BICUBIC)
            canvas.paste(enlarged, (margin + gap + j * (width + gap), top))
    return canvas
