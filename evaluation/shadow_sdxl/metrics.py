"""How close a predicted shadow map is to the true one; the names are those of arXiv 2412.11972, the definitions ours.

Maps are (B, H, W) or (B, 1, H, W) in [0, 1], 1 = full shadow, masks the same, 1 = object; soft edges are welcome. Every
function returns (B,) in float32. Metrics of pixels take `weights` of the same shape: 1 - mask measures what can be seen
beside the object.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

HAZE = 1 / 255
CORE = 0.2  # of a map's darkest value: what lies above counts for the place of its shadow
FINE = 128  # pixels a side
SSIM_TAPS, SSIM_SIGMA = 11, 1.5
MAX_PSNR = 100.0


# --- metrics of pixels ----------------------------------------------------------------------------------------------


def soft_iou(predicted: Tensor, true: Tensor, haze: float = 0.0, weights: Tensor | None = None) -> Tensor:
    """Sum of minima over sum of maxima, not thresholded; 1 where both maps are empty.

    Args:
        haze: predicted values up to this count as none. Shadows cover a few per cent of a picture, so a faint veil over
            all of it would outweigh them.
    """
    predicted, true, weights = flatten(predicted, true, weights)
    predicted = torch.where(predicted <= haze, 0.0, predicted)
    union = (weights * torch.maximum(predicted, true)).sum(1)
    overlap = (weights * torch.minimum(predicted, true)).sum(1)
    return torch.where(union > 0, overlap / union.clamp(min=1e-12), 1.0)


def product_iou(predicted: Tensor, true: Tensor, haze: float = 0.0, weights: Tensor | None = None) -> Tensor:
    """Sum of p g over sum of p + g - p g, the other soft IoU in use; a soft map does not reach 1 with itself."""
    predicted, true, weights = flatten(predicted, true, weights)
    predicted = torch.where(predicted <= haze, 0.0, predicted)
    overlap = predicted * true
    union = (weights * (predicted + true - overlap)).sum(1)
    return torch.where(union > 0, (weights * overlap).sum(1) / union.clamp(min=1e-12), 1.0)


def rmse(predicted: Tensor, true: Tensor, weights: Tensor | None = None) -> Tensor:
    """Root of the mean squared difference over the pixels."""
    predicted, true, weights = flatten(predicted, true, weights)
    return mean((predicted - true).square(), weights).sqrt()


def scale_invariant_rmse(predicted: Tensor, true: Tensor, weights: Tensor | None = None) -> Tensor:
    """The smallest rmse that any multiple of the prediction reaches; an empty prediction stays what it is."""
    predicted, true, weights = flatten(predicted, true, weights)
    power = (weights * predicted.square()).sum(1)
    factor = torch.where(power > 0, (weights * predicted * true).sum(1) / power.clamp(min=1e-12), 0.0)
    return rmse(factor[:, None] * predicted, true, weights)


def zncc(predicted: Tensor, true: Tensor, weights: Tensor | None = None) -> Tensor:
    """Correlation of the two maps over the pixels; 0 where one of them is constant."""
    predicted, true, weights = (x.double() for x in flatten(predicted, true, weights))
    predicted, true = (x - mean(x, weights)[:, None] for x in (predicted, true))
    power = (weights * predicted.square()).sum(1) * (weights * true.square()).sum(1)
    product = (weights * predicted * true).sum(1)
    return torch.where(power > 1e-16, product / power.clamp(min=1e-16).sqrt(), 0.0).float()


def ssim(predicted: Tensor, true: Tensor) -> Tensor:
    """Structural similarity with a Gaussian window of 11 taps, sigma 1.5, over the pixels whose window lies inside.

    As in Wang et al., "Image quality assessment" (2004): K1 = 0.01, K2 = 0.03, and a range of 1. Maps have at least 11
    pixels on each side (ValueError).
    """
    if min(predicted.shape[-2:]) < SSIM_TAPS:
        raise ValueError(f"ssim needs maps of at least {SSIM_TAPS} pixels a side, got {tuple(predicted.shape[-2:])}")
    predicted, true = (x.reshape(len(x), 1, *x.shape[-2:]).double() for x in (predicted, true))
    taps = torch.arange(SSIM_TAPS, dtype=torch.double, device=predicted.device) - SSIM_TAPS // 2
    window = torch.exp(-0.5 * (taps / SSIM_SIGMA).square())
    window = (window / window.sum()).reshape(1, 1, -1, 1)

    def blur(x: Tensor) -> Tensor:
        return F.conv2d(F.conv2d(x, window), window.mT)

    mean_p, mean_g = blur(predicted), blur(true)
    var_p, var_g = blur(predicted.square()) - mean_p.square(), blur(true.square()) - mean_g.square()
    covariance = blur(predicted * true) - mean_p * mean_g
    c1, c2 = 0.01**2, 0.03**2
    luminance = (2 * mean_p * mean_g + c1) / (mean_p.square() + mean_g.square() + c1)
    structure = (2 * covariance + c2) / (var_p + var_g + c2)
    return (luminance * structure).flatten(1).mean(1).float()


def psnr(predicted: Tensor, true: Tensor) -> Tensor:
    """Peak signal-to-noise ratio in dB for a range of 1; at most `MAX_PSNR`, that of equal maps."""
    error = (predicted - true).flatten(1).float().square().mean(1)
    return (-10 * error.clamp(min=1e-30).log10()).clamp(max=MAX_PSNR)


MAP_METRICS = {"iou": soft_iou, "rmse": rmse, "s_rmse": scale_invariant_rmse, "zncc": zncc}


def measure_maps(
    predicted: Tensor, true: Tensor, haze: float = HAZE, weights: Tensor | None = None
) -> dict[str, Tensor]:
    """All of `MAP_METRICS`, each (B,); the IoU without haze below `HAZE`, half a step of an 8-bit picture or so."""
    return {
        name: metric(predicted, true, haze, weights) if name == "iou" else metric(predicted, true, weights)
        for name, metric in MAP_METRICS.items()
    }


def flatten(predicted: Tensor, true: Tensor, weights: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    """Three (B, H W) in float32; the weights are 1 where there are none."""
    predicted, true = predicted.flatten(1).float(), true.flatten(1).float()
    return predicted, true, torch.ones_like(true) if weights is None else weights.flatten(1).float()


def mean(values: Tensor, weights: Tensor) -> Tensor:
    """Weighted mean over the pixels; 0 without any weight."""
    return (weights * values).sum(1) / weights.sum(1).clamp(min=1e-12)


# --- where a shadow lies, and how soft it is ------------------------------------------------------------------------


def contact_point(mask: Tensor) -> Tensor:
    """Where the object stands on the ground, as far as its outline tells: (B, 2), x and y in pixels.

    The column is that of the mask's centroid, since what rests on the ground rests around its centre. The row is the
    lowest one that the mask reaches with half of its largest value, lifted by a tenth of the mask's width: seen from
    above, the middle of a base lies higher than its front edge. (On renders with known lights, the column of the lowest
    rows themselves was much worse: one foot of a chair, a corner of a tilted box.)
    """
    mask = mask.reshape(len(mask), *mask.shape[-2:]).float()
    height, width = mask.shape[-2:]
    reached = mask >= mask.amax((1, 2), keepdim=True).clamp(min=1e-12) / 2
    rows, columns = reached.any(2), reached.any(1)
    bottom = height - 1 - rows.flip(1).int().argmax(1)
    top = rows.int().argmax(1)
    breadth = width - columns.flip(1).int().argmax(1) - columns.int().argmax(1)
    x = centroid(mask)[:, 0]
    y = bottom - torch.minimum(0.1 * breadth, (bottom - top) / 2)
    return torch.stack([x, y], dim=1)


def centroid(values: Tensor) -> Tensor:
    """Centre of mass of maps (B, H, W) or (B, 1, H, W): (B, 2), x and y in pixels; NaN for an empty one."""
    values = values.reshape(len(values), *values.shape[-2:]).double()
    y, x = (torch.arange(n, dtype=torch.double, device=values.device) for n in values.shape[-2:])
    total = values.sum((1, 2))
    return torch.stack([(values.sum(1) * x).sum(1) / total, (values.sum(2) * y).sum(1) / total], dim=1).float()


def shadow_centroid(shadow: Tensor, weights: Tensor | None = None) -> Tensor:
    """Centre of mass of what is darker than `CORE` of the map's darkest value, so that faint haze has no say.

    A map that nowhere exceeds `HAZE` has none: NaN.
    """
    shadow = shadow if weights is None else shadow * weights
    peak = shadow.flatten(1).amax(1).reshape(-1, *[1] * (shadow.ndim - 1))
    return centroid(torch.where((shadow > CORE * peak) & (peak > HAZE), shadow, 0.0))


def direction_error(predicted: Tensor, true: Tensor, mask: Tensor) -> Tensor:
    """Angle in degrees, 0 to 180, in the picture: between the predicted and the true shadow, from the contact point.

    Only what falls beside the object counts (weights 1 - mask): the ground below it is in shadow whatever the light,
    and would pull both centroids to the foot. Means little for a light overhead (theta below 12 degrees or so).

    Returns:
        (B,); NaN where the true shadow cannot be seen beside the object; 90, as good as guessing, where the predicted
        cannot.
    """
    foot = contact_point(mask)
    weights = 1 - mask.reshape(true.shape)
    directions = [shadow_centroid(x, weights) - foot for x in (predicted, true)]
    angles = [torch.atan2(xy[:, 1], xy[:, 0]) for xy in directions]
    turn = torch.rad2deg((angles[0] - angles[1] + math.pi) % (2 * math.pi) - math.pi).abs()
    return torch.where(angles[0].isnan() & ~angles[1].isnan(), 90.0, turn)


def centroid_error(predicted: Tensor, true: Tensor, mask: Tensor) -> Tensor:
    """Distance in pixels between the centroids of the two shadows, over all of the ground.

    Returns:
        (B,); NaN where the true map is empty; an empty prediction counts as a shadow at the object's foot.
    """
    centres = [shadow_centroid(x) for x in (predicted, true)]
    centres[0] = torch.where(centres[0].isnan(), contact_point(mask), centres[0])
    return (centres[0] - centres[1]).square().sum(1).sqrt()


def edge_width(shadow: Tensor) -> Tensor:
    """Mean width of the penumbra in pixels, from 10 to 90 % of the map's darkest value.

    The area between these two levels, divided by the length of the contour at 50 %. That length is counted from the
    neighbours, along rows, columns and both diagonals, between which the contour passes (Cauchy-Crofton; within 5 % for
    every direction). Levels are relative because a large light leaves a small object no full shadow. Both are counted
    on maps that are enlarged to `FINE` pixels, if they are smaller: whole pixels would be too coarse a measure.

    Returns:
        (B,); about 1 for an edge between two pixels; NaN for a map that nowhere exceeds `HAZE`, or is constant.
    """
    factor = max(1, FINE // min(shadow.shape[-2:]))
    shadow = shadow.reshape(len(shadow), 1, *shadow.shape[-2:]).float()
    if factor > 1:
        shadow = F.interpolate(shadow, scale_factor=factor, mode="bilinear")
    shadow = shadow[:, 0]
    peak = shadow.amax((1, 2), keepdim=True)
    area = ((shadow > 0.1 * peak) & (shadow < 0.9 * peak)).sum((1, 2))
    dark = shadow > 0.5 * peak
    straight = (dark[:, 1:] != dark[:, :-1]).sum((1, 2)) + (dark[:, :, 1:] != dark[:, :, :-1]).sum((1, 2))
    oblique = (dark[:, 1:, 1:] != dark[:, :-1, :-1]).sum((1, 2)) + (dark[:, 1:, :-1] != dark[:, :-1, 1:]).sum((1, 2))
    length = math.pi / 8 * (straight + oblique / math.sqrt(2))
    return torch.where((peak.flatten() > HAZE) & (length > 0), area / length / factor, torch.nan)


def softness_error(predicted: Tensor, true: Tensor) -> Tensor:
    """How many times too wide or too narrow the penumbra is, as |log2|: 0 = right, 1 = double or half.

    A ratio, so that it means the same at every resolution and for hard and soft lights. Widths below half a pixel count
    as that. NaN where one of the maps has no edge.
    """
    widths = [edge_width(x).clamp(min=0.5) for x in (predicted, true)]
    return (widths[0] / widths[1]).log2().abs()
