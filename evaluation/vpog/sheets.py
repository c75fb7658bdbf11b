"""Contact sheets of training batches: query and templates, what is to be learned of them, and what the network says."""

from __future__ import annotations

import colorsys
from collections.abc import Mapping
from typing import Protocol

import numpy as np
from PIL import Image
from torch import Tensor

from backlot.pictures import image_grid
from evaluation.vpog.drawing import flow_to_rgb, join_patches
from objectives.pose_labels import PoseLabels

UNSEEN_COLOUR, BACKGROUND_COLOUR = (90, 90, 90), (0, 0, 0)
NAMES = ("query", "template", "classes", "said", "flow", "said")


class Matches(Protocol):
    """What the network says, see pipelines.vpog.VPOGOutput."""

    logits: Tensor
    flow: Tensor | None


def draw_batch(
    batch: Mapping[str, Tensor], labels: PoseLabels, output: Matches, *, max_samples: int = 4, cell: int = 128
) -> Image.Image:
    """A column per sample, of its query and its nearest template: pictures, classes and flow, true and said.

    A class is shown by the colour of the place of its template patch, unseen ones are grey; flow is in HSV.

    Args:
        batch: of data_prep.bop.PoseDataset. output: of the network that was told the labels' pairs.
    """
    columns = []
    for row in range(min(max_samples, len(batch["images"]))):
        templates = (batch["template_types"][row] == 0).nonzero()
        nearest = int(templates[0]) if len(templates) else 0
        classes = labels.patch_cls[row, nearest].cpu().numpy()
        said = output.logits[row, nearest].detach().float().argmax(-1).cpu().numpy()
        side = labels.flows.shape[3]
        pictures = [to_picture(batch["images"][row, 0]), to_picture(batch["images"][row, 1 + nearest])]
        size = pictures[0].width
        pictures += [draw_classes(values, side, size) for values in (classes, np.where(classes < 0, -1, said))]
        if output.flow is not None:
            taught = labels.dense_supervised[row, nearest].cpu().numpy()
            for flow in (labels.dense_flow, output.flow.detach()):
                values = flow_to_rgb(flow[row, nearest].float().cpu().numpy(), 1.0, taught)
                pictures.append(Image.fromarray(join_patches(values, side)))
        columns.append(pictures)
    rows = [list(row) for row in zip(*columns, strict=True)]
    return image_grid(rows, list(NAMES[: len(rows)]), cell=cell)


def to_picture(values: Tensor) -> Image.Image:
    """(3, H, W) in [0, 1] as a picture."""
    return Image.fromarray((values.detach().float() * 255).round().byte().permute(1, 2, 0).cpu().numpy())


def draw_classes(classes: np.ndarray, side: int, size: int) -> Image.Image:
    """Classes (N,) of a grid of side x side patches, `size` pixels wide: colour tells place, -1 is black, N grey."""
    number = len(classes)
    palette = [tuple(int(255 * c) for c in place_colour(patch, side)) for patch in range(number)]
    palette += [UNSEEN_COLOUR, BACKGROUND_COLOUR]  # the last is also -1
    picture = Image.fromarray(np.array(palette, np.uint8)[classes].reshape(side, side, 3))
    return picture.resize((size, size), Image.Resampling.NEAREST)


def place_colour(patch: int, side: int) -> tuple[float, float, float]:
    """Hue by the angle about the middle, saturation by the distance from it."""
    y, x = divmod(patch, side)
    u, v = (x - (side - 1) / 2) / (side / 2), (y - (side - 1) / 2) / (side / 2)
    return colorsys.hsv_to_rgb(float(np.arctan2(v, u) / (2 * np.pi)) % 1, min(1.0, float(np.hypot(u, v))), 1.0)
