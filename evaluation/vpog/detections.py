"""Where the objects are said to be: what a detector wrote, or the truth made as inexact as a detector is."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import numpy as np
import torch
from pydantic import Field, TypeAdapter

from backlot.metadata import Metadata
from data_prep.bop.augmentation import jitter_mask
from data_prep.bop.format import MIN_VISIB, TARGETS_NAME, BopDataset, Frame, Instance, mask_box, read_json
from data_prep.bop.item_settings import DetectionSettings
from data_prep.bop.shards import decode_rle

CROP_PADDING = 1.2
"""Jitter is told in shares of the crop that the network sees, not of the picture."""


@dataclass(frozen=True)
class Target:
    """An instance that is to be found: the `gt`-th of its picture."""

    frame: Frame
    gt: int

    @property
    def instance(self) -> Instance:
        return self.frame.instances[self.gt]


@dataclass(frozen=True)
class Detection:
    """An object in a picture.

    Args:
        box: (4,) x1, y1, x2, y2 along the edges of pixels.
        rle: its mask as the detector wrote it; None if it gave none.
        gt: number of the instance, where it comes from the truth: the mask is the jittered one of that.
        seconds: that finding all objects of the picture took; 0 where it is not known.
    """

    scene_id: int
    im_id: int
    object_id: int
    box: np.ndarray
    score: float = 1.0
    rle: Mapping[str, object] | None = None
    gt: int | None = None
    seconds: float = 0.0


class DetectionJson(Metadata):
    """An entry of a detector's file, as those of the BOP challenge and of CNOS."""

    scene_id: int
    image_id: int
    category_id: int
    bbox: Annotated[list[float], Field(min_length=4, max_length=4)]
    score: float
    segmentation: dict | None = None
    time: float = 0.0


DETECTIONS = TypeAdapter(list[DetectionJson])


def find_targets(dataset: BopDataset, min_visib: float = MIN_VISIB) -> list[Target]:
    """The instances that are to be found: seen well enough, and listed where the dataset lists what counts.

    Raises:
        ValueError: there are none; the poses of some test splits are not public.
    """
    listed = None
    if (dataset.root / TARGETS_NAME).is_file():
        listed = {(each.scene_id, each.im_id, each.obj_id) for each in dataset.targets()}
    targets = [
        Target(frame, gt)
        for frame in dataset.frames()
        for gt, instance in enumerate(frame.instances)
        if instance.visib_fract >= min_visib
        and (listed is None or (frame.scene_id, frame.im_id, instance.obj_id) in listed)
    ]
    if not targets:
        raise ValueError(f"{dataset.folder} has no objects with known poses that are seen to {min_visib:.0%} or more")
    return targets


def choose_targets(targets: Sequence[Target], count: int | None) -> list[Target]:
    """At most `count`, evenly from all, always the same."""
    if count is None or count >= len(targets):
        return list(targets)
    return [targets[row] for row in np.linspace(0, len(targets) - 1, count).round().astype(int)]


def detect_truly(targets: Sequence[Target]) -> list[Detection]:
    """A detection of each target, from the truth."""
    return [
        Detection(t.frame.scene_id, t.frame.im_id, t.instance.obj_id, t.instance.bbox_visib, gt=t.gt) for t in targets
    ]


def read_detections(path: Path, dataset: BopDataset) -> list[Detection]:
    """What a detector found, of each object in a picture as many as are to be found there, the surest first.

    Objects that are not to be found are left out; all are kept where the dataset does not tell.

    Raises:
        ValueError: one line: the file is no list of detections, or is about other pictures.
    """
    found = defaultdict(list)
    for each in read_json(path, DETECTIONS):
        found[each.scene_id, each.image_id, each.category_id].append(each)
    counts = count_targets(dataset)
    pictures = {(frame.scene_id, frame.im_id) for frame in dataset.frames()}
    if not pictures & {key[:2] for key in found}:
        raise ValueError(f"{path} has no detections in the pictures of {dataset.folder}")
    detections = []
    for key in sorted(found):
        if key[:2] in pictures:
            surest = sorted(found[key], key=lambda each: -each.score)
            detections += [read_detection(each) for each in surest[: None if counts is None else counts[key]]]
    return detections


def count_targets(dataset: BopDataset) -> Counter | None:
    """How many instances of an object are to be found in a picture, by (scene, picture, object); None: not told."""
    if (dataset.root / TARGETS_NAME).is_file():
        return Counter({(each.scene_id, each.im_id, each.obj_id): each.inst_count for each in dataset.targets()})
    if not any(frame.instances for frame in dataset.frames()):
        return None
    return Counter((t.frame.scene_id, t.frame.im_id, t.instance.obj_id) for t in find_targets(dataset))


def read_detection(each: DetectionJson) -> Detection:
    x, y, width, height = each.bbox
    box = np.array([x, y, x + width, y + height])
    return Detection(
        each.scene_id, each.image_id, each.category_id, box, each.score, each.segmentation, None, max(each.time, 0.0)
    )


def detected_mask(
    detection: Detection, dataset: BopDataset, settings: DetectionSettings, seed: int
) -> np.ndarray | None:
    """The mask (H, W) bool of a detection: the detector's, or the true one jittered by (seed, picture, instance).

    None: the box is all that is known.

    Raises:
        ValueError: one line: the mask is damaged or empty.
    """
    if detection.gt is None:
        return None if detection.rle is None else read_mask(detection)
    mask = dataset.mask_visib(detection.scene_id, detection.im_id, detection.gt)
    keys = (seed, detection.scene_id, detection.im_id, detection.gt)
    state = int(np.random.SeedSequence(keys).generate_state(1, np.uint64)[0] >> 1)
    x1, y1, x2, y2 = mask_box(mask)
    side = CROP_PADDING * max(x2 - x1, y2 - y1)
    left, right = (round((x1 + x2 + sign * side) / 2) for sign in (-1, 1))
    top, bottom = (round((y1 + y2 + sign * side) / 2) for sign in (-1, 1))
    window = (slice(max(top, 0), bottom), slice(max(left, 0), right))
    jittered = np.zeros_like(mask)
    part = jitter_mask(torch.from_numpy(mask[window].copy()), settings, torch.Generator().manual_seed(state))
    jittered[window] = part.numpy()
    return jittered


def read_mask(detection: Detection) -> np.ndarray:
    """The mask that the detector wrote."""
    name = f"the mask of object {detection.object_id} in picture {detection.scene_id:06d}_{detection.im_id:06d}"
    try:
        mask = decode_rle(detection.rle)
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{name} is no run-length code of `size` and `counts`: {error}") from None
    if not mask.any():
        raise ValueError(f"{name} is empty")
    return mask
