"""Estimated poses held against the true ones, picture by picture, and the figures that follow."""

from __future__ import annotations

import itertools
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
import trimesh
from PIL import Image

from backlot.cameras import square_crop
from backlot.mesh_views import render_views
from data_prep.bop.format import BopDataset, Frame, find_picture
from data_prep.bop.models import ModelInfo, Models
from data_prep.bop.results import PoseEstimate
from evaluation.vpog.detections import CROP_PADDING, Target
from evaluation.vpog.metrics import (
    ADD_SHARE,
    MM,
    PROJECTION_RECALLS,
    SURFACE_RECALLS,
    add,
    add_s,
    area_under_curve,
    auroc,
    match,
    mspd,
    mssd,
    pose_error,
    relative_width,
    vsd,
)

CROP_SIDE = 64
CROP_RECALLS = (2, 4, 8)
"""of MSPD, in pixels of a crop of `CROP_SIDE`"""
ANGLES = (5, 10, 20)
CORRECT_MSSD = 0.2
"""diameters, below which a pose counts as correct where its score is judged"""
OCCLUSIONS = (0.0, 0.4, 0.7, 0.9, 1.0)
"""edges between groups of instances, by the share of them that is seen"""
LOST = {"rotation": 180.0}
"""what an instance without an estimate is charged; infinity where nothing stands here"""
VIEWS_AT_ONCE = 16


@dataclass(frozen=True)
class Errors:
    """Of the E estimates of an object in a picture, the surest first, against its G instances, arrays (E, G).

    Args:
        scores: (E,).
        rotation: degrees. translation, mssd: diameters. mspd: pixels of a picture 640 wide. mspd_crop: pixels of the
            instance's crop, 64 wide. add, add_s: mm.
        vsd: (E, G, 10) by tolerance; None if not asked for.
        diameter: mm.
    """

    targets: tuple[Target, ...]
    estimates: tuple[PoseEstimate, ...]
    rotation: np.ndarray
    translation: np.ndarray
    mssd: np.ndarray
    mspd: np.ndarray
    mspd_crop: np.ndarray
    add: np.ndarray
    add_s: np.ndarray
    vsd: np.ndarray | None
    diameter: float

    @property
    def scores(self) -> np.ndarray:
        return np.array([each.score for each in self.estimates])

    def of_instances(self, name: str) -> np.ndarray:
        """(G,) the error of the estimate that found each instance, by MSSD; the worst there is without one."""
        values, found = getattr(self, name), match(self.mssd)
        lost = LOST.get(name, np.inf)
        return np.array([lost if row < 0 else values[row, column] for column, row in enumerate(found)])


def compare(
    dataset: BopDataset,
    models: Models,
    targets: Sequence[Target],
    estimates: Sequence[PoseEstimate],
    with_vsd: bool = True,
) -> list[Errors]:
    """The errors of estimates against all that is to be found; estimates of anything else do not count.

    Of an object in a picture as many estimates count as there are instances of it, as in the BOP challenge.

    Args:
        with_vsd: render the models and read the depth pictures, which takes most of the time.

    Raises:
        ValueError: one line: a mesh or a picture is missing or damaged.
    """
    wanted, given = defaultdict(list), defaultdict(list)
    for target in targets:
        wanted[target.instance.obj_id, target.frame.scene_id, target.frame.im_id].append(target)
    for estimate in estimates:
        given[estimate.obj_id, estimate.scene_id, estimate.im_id].append(estimate)
    errors = []
    by_object = defaultdict(list)
    for key in sorted(wanted):
        surest = sorted(given[key], key=lambda each: -each.score)[: len(wanted[key])]
        by_object[key[0]].append((wanted[key], surest))
    for object_id, groups in by_object.items():
        errors += compare_object(dataset, models[object_id], groups, with_vsd)
    return errors


def compare_object(
    dataset: BopDataset,
    model: ModelInfo,
    groups: Sequence[tuple[Sequence[Target], Sequence[PoseEstimate]]],
    with_vsd: bool,
) -> Iterator[Errors]:
    """The errors of one object, picture by picture."""
    mesh, diameter = model.load_mesh(), model.diameter * MM
    points, symmetries = np.asarray(mesh.vertices) * MM, in_millimetres(model.symmetries)
    views = [
        (pose, group[0].frame)
        for group, estimates in groups
        for pose in (*(each.camera_from_object for each in estimates), *(t.instance.camera_from_object for t in group))
    ]
    depths = render_depths(dataset, mesh, views) if with_vsd else None
    for group, estimates in groups:
        frame = group[0].frame
        poses = [in_millimetres(each.camera_from_object) for each in estimates]
        truths = [in_millimetres(each.instance.camera_from_object) for each in group]

        def table(error: Callable, poses=poses, truths=truths) -> np.ndarray:
            values = np.array([[error(pose, truth) for truth in truths] for pose in poses], float)
            return values.reshape(len(poses), len(truths), *values.shape[2:])

        surface = table(lambda pose, truth: mssd(pose, truth, points, symmetries))
        projected = table(lambda pose, truth, camera=frame.K: mspd(pose, truth, points, symmetries, camera))
        turned = table(lambda pose, truth: pose_error(pose, truth, symmetries)).reshape(*surface.shape, 2)
        width = picture_size(dataset, frame)[1]
        yield Errors(
            tuple(group),
            tuple(estimates),
            rotation=turned[..., 0],
            translation=turned[..., 1] / diameter,
            mssd=surface / diameter,
            mspd=projected / relative_width(width),
            mspd_crop=projected * np.array([crop_scale(each) for each in group]),
            add=table(lambda pose, truth: add(pose, truth, points)),
            add_s=table(lambda pose, truth: add_s(pose, truth, points)),
            vsd=None if depths is None else surface_discrepancies(dataset, frame, depths, surface.shape, diameter),
            diameter=diameter,
        )


def in_millimetres(poses: np.ndarray) -> np.ndarray:
    """Poses (..., 4, 4) in metres, in mm."""
    poses = np.array(poses, float)
    poses[..., :3, 3] *= MM
    return poses


def picture_size(dataset: BopDataset, frame: Frame) -> tuple[int, int]:
    """Height and width; only the picture's head is read."""
    with Image.open(find_picture(dataset.scene(frame.scene_id), frame.im_id)) as image:
        return image.height, image.width


def crop_scale(target: Target) -> float:
    """Pixels of the 64-pixel crop of an instance per pixel of the picture."""
    box = torch.as_tensor(target.instance.bbox_visib, dtype=torch.float64)
    return float(square_crop(box[None], CROP_SIDE, CROP_PADDING)[0, 0, 0])


def render_depths(
    dataset: BopDataset, mesh: trimesh.Trimesh, views: Sequence[tuple[np.ndarray, Frame]]
) -> Iterator[np.ndarray]:
    """The depth (H, W) in mm of a model alone, view by view; a few are rendered at once.

    Args:
        mesh: in metres.
        views: `camera_from_object`, and the picture whose camera and size are taken.
    """
    for start in range(0, len(views), VIEWS_AT_ONCE):
        part = views[start : start + VIEWS_AT_ONCE]
        sizes = [picture_size(dataset, frame) for _, frame in part]
        places = np.array([0, *(row for row in range(1, len(part)) if sizes[row] != sizes[row - 1]), len(part)])
        for first, last in itertools.pairwise(places):
            poses = np.stack([pose for pose, _ in part[first:last]])[:, None]
            cameras = np.stack([frame.K for _, frame in part[first:last]])
            yield from render_views([mesh], poses, cameras, sizes[first], supersample=1).depth.astype(float) * MM


def surface_discrepancies(
    dataset: BopDataset, frame: Frame, depths: Iterator[np.ndarray], shape: tuple[int, int], diameter: float
) -> np.ndarray:
    """VSD (E, G, 10) of a picture; takes the depths of its estimates and then of its instances.

    Args:
        shape: (E, G). diameter: mm.
    """
    estimated = [next(depths) for _ in range(shape[0])]
    true = [next(depths) for _ in range(shape[1])]
    if not estimated:
        return np.zeros((*shape, len(SURFACE_RECALLS)))
    measured = dataset.depth(frame).astype(float) * MM
    tolerances = SURFACE_RECALLS * diameter
    return np.array([[vsd(e, t, measured, frame.K, tolerances) for t in true] for e in estimated])


# --- figures --------------------------------------------------------------------------------------------------------


def values_of(errors: Sequence[Errors], name: str) -> np.ndarray:
    """(G,) an error of all instances."""
    return np.concatenate([each.of_instances(name) for each in errors])


def recall(errors: Sequence[Errors], threshold: float, read: Callable[[Errors], np.ndarray]) -> float:
    """The share of instances that an estimate finds with an error below the threshold.

    Args:
        read: gives the errors (E, G) of a picture.
    """
    found = sum(int((match(read(each), threshold) >= 0).sum()) for each in errors)
    return found / sum(len(each.targets) for each in errors)


def mssd_recalls(errors: Sequence[Errors]) -> dict[str, float]:
    """By threshold in diameters."""
    return {f"{limit:.2f}": recall(errors, limit, lambda each: each.mssd) for limit in SURFACE_RECALLS}


def mspd_recalls(errors: Sequence[Errors]) -> dict[str, float]:
    """By threshold in pixels of a picture 640 wide."""
    return {f"{limit:g}": recall(errors, limit, lambda each: each.mspd) for limit in PROJECTION_RECALLS}


def crop_recalls(errors: Sequence[Errors]) -> dict[str, float]:
    """Of MSPD, by threshold in pixels of the instance's crop, 64 wide."""
    return {f"{limit}/{CROP_SIDE}": recall(errors, limit, lambda each: each.mspd_crop) for limit in CROP_RECALLS}


def vsd_recalls(errors: Sequence[Errors]) -> dict[str, float]:
    """By threshold of the error, each the mean over the ten tolerances; empty if VSD was not measured."""
    if any(each.vsd is None for each in errors):
        return {}
    columns = range(len(SURFACE_RECALLS))
    return {
        f"{limit:.2f}": float(np.mean([recall(errors, limit, lambda e, c=c: e.vsd[..., c]) for c in columns]))
        for limit in SURFACE_RECALLS
    }


def mean_of(recalls: dict[str, float]) -> float:
    return float(np.mean(list(recalls.values())))


def finite(value: float) -> float | None:
    """None for what JSON has no number for: more than half are lost."""
    return float(value) if np.isfinite(value) else None


def pose_figures(errors: Sequence[Errors]) -> dict:
    """What a file of results says: the part of metrics.json that needs no network.

    `median_translation` is in diameters; `acc_5_10_20` are shares below these degrees; `mspd_recall` has thresholds in
    pixels of a picture 640 wide, and as `8/64` in pixels of the instance's crop; `add_s` is the share whose ADD-S is
    below a tenth of the diameter; `ar` is the mean of the average recalls of MSSD, MSPD and VSD, None without VSD.
    """
    rotation, surface = values_of(errors, "rotation"), mssd_recalls(errors)
    projected, visible = mspd_recalls(errors), vsd_recalls(errors)
    averages = [mean_of(each) for each in (surface, projected, visible) if each]
    return {
        "median_rotation_deg": float(np.median(rotation)),
        "median_translation": finite(np.median(values_of(errors, "translation"))),
        "acc_5_10_20": [float((rotation < angle).mean()) for angle in ANGLES],
        "mssd_recall": surface,
        "mspd_recall": projected | crop_recalls(errors),
        "vsd_recall": visible,
        "add_s": recall_of_add(errors, "add_s"),
        "ar": float(np.mean(averages)) if visible else None,
        "by_occlusion": by_occlusion(errors),
        "score_auroc": score_auroc(errors),
        "seconds_per_object": seconds_per_object(errors),
    }


def pose_scalars(errors: Sequence[Errors]) -> dict[str, float]:
    """The figures that a training run logs: a median, and average recalls, which rise."""
    rotation = values_of(errors, "rotation")
    shares = {f"acc_{angle:g}": float((rotation < angle).mean()) for angle in ANGLES}
    recalls = {"mssd_recall": mean_of(mssd_recalls(errors)), "mspd_recall": mean_of(mspd_recalls(errors))}
    return {"median_rotation_deg": float(np.median(rotation)), **shares, **recalls}


def recall_of_add(errors: Sequence[Errors], name: str) -> float:
    """The share of instances whose ADD, or ADD-S, is below a tenth of the diameter."""
    limits = np.concatenate([np.full(len(each.targets), ADD_SHARE * each.diameter) for each in errors])
    return float((values_of(errors, name) < limits).mean())


def add_figures(errors: Sequence[Errors]) -> dict[str, float]:
    """ADD and ADD-S: shares below a tenth of the diameter, and areas under their curves up to 10 cm."""
    names = ("add", "add_s")
    return {name: recall_of_add(errors, name) for name in names} | {
        f"{name}_auc": area_under_curve(values_of(errors, name)) for name in names
    }


def by_occlusion(errors: Sequence[Errors]) -> dict[str, dict]:
    """Rotation errors by the share of an instance that is seen."""
    seen = np.array([target.instance.visib_fract for each in errors for target in each.targets])
    rotation = values_of(errors, "rotation")
    groups = {}
    for low, high in itertools.pairwise(OCCLUSIONS):
        chosen = rotation[(seen >= low) & (seen < high if high < OCCLUSIONS[-1] else seen >= low)]
        if len(chosen):
            below = float((chosen < ANGLES[1]).mean())
            figures = {"count": len(chosen), "median_rotation_deg": float(np.median(chosen)), "acc_10": below}
            groups[f"{low:g}-{high:g}"] = figures
    return groups


def score_auroc(errors: Sequence[Errors]) -> float | None:
    """How well scores tell poses that are right, with an MSSD below a fifth of the diameter, from others."""
    scores, correct = [], []
    for each in errors:
        found = match(each.mssd, CORRECT_MSSD)
        scores.append(each.scores)
        correct.append(np.isin(np.arange(len(each.estimates)), found))
    return auroc(np.concatenate(scores), np.concatenate(correct))


def seconds_per_object(errors: Sequence[Errors]) -> float | None:
    """Time of the pictures, as the results have it, per estimate; None if it is not known."""
    pictures = {(estimate.scene_id, estimate.im_id): estimate.time for each in errors for estimate in each.estimates}
    count = sum(len(each.estimates) for each in errors)
    return sum(pictures.values()) / count if count and min(pictures.values()) >= 0 else None
