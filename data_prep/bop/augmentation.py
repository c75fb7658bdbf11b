"""What makes queries look like those of a detector and a camera: moved boxes, frayed masks, changed colours.

Every function draws a fixed count of numbers from its generator, whatever it does with them: switching one thing off
leaves the others as they are.
"""

from __future__ import annotations

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageEnhance, ImageFilter
from scipy import ndimage
from torch import Tensor

from data_prep.bop.item_settings import ColourSettings, DetectionSettings

WAVES = 6
"""Values along a side of the noise that frays an outline."""


def jitter_box(box: Tensor, share: float, generator: torch.Generator) -> Tensor:
    """A box (4,), x1 y1 x2 y2, with each edge moved by up to `share` of the side."""
    sides = (box[2:] - box[:2]).repeat(2)
    return box + share * sides * (2 * torch.rand(4, generator=generator).to(box.dtype) - 1)


def jitter_mask(mask: Tensor, settings: DetectionSettings, generator: torch.Generator) -> Tensor:
    """A mask (H, W) bool as a detector might give it: grown or shrunk, its outline wavering, with holes.

    The mask itself where nothing would be left of it.
    """
    height, width = mask.shape
    reach = settings.mask_growth * max(height, width)
    growth = 2 * torch.rand(1, generator=generator) - 1
    waves = torch.rand(1, 1, WAVES, WAVES, generator=generator) - 0.5
    count = torch.randint(settings.max_holes + 1, (1,), generator=generator)
    places = torch.rand(settings.max_holes, 2, generator=generator)

    waves = F.interpolate(waves, size=(height, width), mode="bicubic", align_corners=True)[0, 0]
    jittered = _signed_distance(mask) > -reach * (growth + waves)
    inside = mask.nonzero()
    v, u = torch.arange(height)[:, None], torch.arange(width)
    for place, size in places[: int(count)].tolist() if len(inside) else ():
        row, column = inside[int(place * len(inside))]
        radius = size * settings.hole_size * max(height, width)
        jittered &= (v - row) ** 2 + (u - column) ** 2 > radius**2
    return jittered if (jittered & mask).any() else mask


def _signed_distance(mask: Tensor) -> Tensor:
    """Of each pixel to the outline, in pixels: above 0 inside, below 0 outside."""
    values = mask.numpy()
    inside, outside = ndimage.distance_transform_edt(values), ndimage.distance_transform_edt(~values)
    return torch.from_numpy(np.where(values, inside - 0.5, 0.5 - outside))


def jitter_colours(picture: Tensor, settings: ColourSettings, scale: float, generator: torch.Generator) -> Tensor:
    """A picture (H, W, 3) uint8 blurred, sharpened, and with other contrast, brightness and saturation.

    Args:
        scale: pixels of `picture` in one of the uncropped picture, which the radius of blur is counted in.
    """
    gate, *luck = torch.rand(11, generator=generator, dtype=torch.float64).tolist()
    if gate >= settings.augmentation_probability:
        return picture
    image = Image.fromarray(picture.numpy())
    happens, amounts = luck[:5], luck[5:]
    if happens[0] < settings.blur_probability:
        low, high = settings.blur_radius
        image = image.filter(ImageFilter.GaussianBlur(scale * (low + int(amounts[0] * (high - low + 1)))))
    enhancers = (
        (ImageEnhance.Sharpness, settings.sharpness_probability, settings.sharpness_factor),
        (ImageEnhance.Contrast, settings.contrast_probability, settings.contrast_factor),
        (ImageEnhance.Brightness, settings.brightness_probability, settings.brightness_factor),
        (ImageEnhance.Color, settings.colour_probability, settings.colour_factor),
    )
    for (enhancer, probability, (low, high)), happened, amount in zip(enhancers, happens[1:], amounts[1:], strict=True):
        if happened < probability:
            image = enhancer(image).enhance(low + amount * (high - low))
    return torch.from_numpy(np.array(image))
