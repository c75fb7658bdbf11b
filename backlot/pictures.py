"""Pictures of samples: decoded, fitted into squares, made from tensors, and in grids with labels."""

from __future__ import annotations

import errno
import io
import struct
import zlib
from typing import TYPE_CHECKING

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont, ImageOps, UnidentifiedImageError

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


# Only these decoders ever see a file; Pillow has some forty more, EPS (which starts Ghostscript) among them.
IMAGE_FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "PPM")
# Pillow's own limit. Pillow warns above it and raises only above twice as much.
MAX_PIXELS = 89_478_485
# What Pillow raises on damaged files (found by flipping bytes in all the formats above), besides MemoryError.
BAD_IMAGE_ERRORS = (
    OSError,  # also UnidentifiedImageError
    SyntaxError,
    ValueError,
    TypeError,
    IndexError,
    KeyError,
    EOFError,
    OverflowError,
    struct.error,
    zlib.error,
    Image.DecompressionBombError,
    Image.DecompressionBombWarning,  # an exception where warnings are turned into errors
)
# These say something about the machine and nothing about the file.
EXHAUSTED = {errno.EMFILE, errno.ENFILE, errno.ENOMEM}


def decode_image(data: bytes, image_size: int | None = None) -> Image.Image:
    """Decode an image file to 8-bit RGB as a viewer would show it.

    EXIF orientation is applied, 16-bit samples are scaled, alpha is laid over white, an animation gives its first
    frame.

    Args:
        data: the bytes of the file, in one of `IMAGE_FORMATS`.
        image_size: side of the square result in pixels: the shorter side is resized to it (Lanczos, antialiased) and
            the centre cut out. None keeps the picture as it is.

    Raises:
        One of `BAD_IMAGE_ERRORS` when the bytes are not a readable image or have more than `MAX_PIXELS` pixels.
    """
    if not data:
        raise ValueError("the file is empty")
    try:
        image = Image.open(io.BytesIO(data), formats=IMAGE_FORMATS)
    except UnidentifiedImageError:
        raise ValueError(f"not an image of a known format ({', '.join(IMAGE_FORMATS)})") from None
    if image.width * image.height > MAX_PIXELS:
        raise Image.DecompressionBombError(f"{image.width}x{image.height} pixels, the limit is {MAX_PIXELS}")
    if image_size is not None:
        # JPEG can be decoded at 1/2, 1/4 or 1/8 for little; twice the wanted size leaves the filter enough to work on.
        image.draft(None, (2 * image_size, 2 * image_size))
    ImageOps.exif_transpose(image, in_place=True)
    image = to_rgb(image)
    if image_size is not None:
        image = ImageOps.fit(image, (image_size, image_size), Image.Resampling.LANCZOS)
    return image


def to_rgb(image: Image.Image) -> Image.Image:
    """Convert a Pillow image of any mode to RGB; ValueError where a mode has no defined way to RGB (float, 32-bit)."""
    if image.mode == "I" or image.mode.startswith("I;16"):  # Pillow's own conversion would clip these at 255
        samples = np.asarray(image).astype(np.int64)
        if samples.min() < 0 or samples.max() > 65535:
            raise ValueError("32-bit samples have no defined range")
        image = Image.fromarray(np.rint(samples * (255 / 65535)).astype(np.uint8))
    elif image.mode == "F":
        raise ValueError("float samples have no defined range")
    elif image.has_transparency_data:
        image = image.convert("RGBA")
        white = Image.new("RGBA", image.size, "white")
        image = Image.alpha_composite(white, image)
    return image.convert("RGB")


def to_pixel_values(image: Image.Image) -> torch.Tensor:
    """Turn an RGB or L image into (C, H, W) float32 in [-1, 1]."""
    pixels = np.array(image).reshape(image.height, image.width, -1)
    return torch.from_numpy(pixels).permute(2, 0, 1).contiguous().float().div_(127.5).sub_(1)


# --- an object's picture and its mask -------------------------------------------------------------------------------


def object_pixels(image: Image.Image, mask: Image.Image | None, fill: float) -> np.ndarray:
    """An object's colours laid over grey by its mask, (H, W, 3) float32 in [0, 1].

    Args:
        image: of any mode; its own alpha is the mask where `mask` is None, and is not looked at otherwise. Without
            either the object lies on the grey already.
        mask: white = object, of the image's size.
        fill: the grey, in [0, 1].
    """
    if image.has_transparency_data:
        pixels = np.asarray(image.convert("RGBA"), np.float32) / 255
        pixels, alpha = pixels[..., :3], pixels[..., 3:]
    else:
        pixels, alpha = np.asarray(to_rgb(image), np.float32) / 255, None
    if mask is not None:
        alpha = np.asarray(mask.convert("L"), np.float32)[..., None] / 255
    return pixels if alpha is None else pixels * alpha + np.float32(fill) * (1 - alpha)


def place_in_square(width: int, height: int, side: int) -> tuple[int, int, int, int]:
    """Left, top, width and height of a picture in the square that `fit_square` makes of it."""
    width, height = (max(1, round(length * side / max(width, height))) for length in (width, height))
    return (side - width) // 2, (side - height) // 2, width, height


def fit_square(values: np.ndarray, side: int, background: float, resampling: Image.Resampling) -> np.ndarray:
    """Resize (H, W) or (H, W, C) float32 in [0, 1] until its longer side has `side` pixels, and centre it on a square.

    Args:
        background: what lies beside a picture that is not square.
        resampling: Lanczos for colours, box (the mean of the area) for masks and maps.
    """
    if values.ndim == 3:
        channels = np.moveaxis(values, -1, 0)
        return np.stack([fit_square(channel, side, background, resampling) for channel in channels], axis=-1)
    left, top, width, height = place_in_square(values.shape[1], values.shape[0], side)
    if (height, width) != values.shape:
        image = Image.fromarray(np.ascontiguousarray(values)).resize((width, height), resampling)
        values = np.asarray(image)
    square = np.full((side, side), background, np.float32)
    square[top : top + height, left : left + width] = values
    return square.clip(0, 1)


def fit_object(pixels: np.ndarray, mask: np.ndarray, side: int, fill: float) -> tuple[np.ndarray, np.ndarray]:
    """The square picture (side, side, 3) and mask (side, side) of an object that networks see, trained or in use.

    Args:
        pixels: (H, W, 3), the object on the grey `fill`. mask: (H, W). Both float32 in [0, 1].
    """
    return (
        fit_square(pixels, side, fill, Image.Resampling.LANCZOS),
        fit_square(mask, side, 0.0, Image.Resampling.BOX),
    )
