"""Errors of poses as the BOP challenge defines them, and what is counted of them. Millimetres, pixels and degrees.

Poses are `camera_from_object` (4, 4) with the translation in mm; `points` are a model's vertices (P, 3) in mm;
`symmetries` (S, 4, 4) map the model onto itself, the identity among them, and each makes `truth @ symmetry` as true as
`truth`. Sources: Hodan et al., "BOP Challenge 2020 on 6D Object Localization", section 2.2, and bop_toolkit's
reference for what the paper leaves open (distances instead of depths, strict thresholds, order of matching).
"""

from __future__ import annotations

import numpy as np
from scipy.spatial import cKDTree
from sklearn.metrics import roc_auc_score

MM = 1000.0
"""per metre"""
SURFACE_RECALLS = np.arange(1, 11) * 0.05
"""of MSSD, in diameters; also VSD's tolerances, in diameters, and its thresholds"""
PROJECTION_RECALLS = np.arange(1, 11) * 5.0
"""of MSPD, in pixels of a picture 640 wide"""
REFERENCE_WIDTH = 640
VISIBILITY_TOLERANCE = 15.0
"""VSD's delta, mm: how far behind the measured surface a model still counts as visible"""
ADD_SHARE = 0.1
"""of the diameter, below which ADD and ADD-S call a pose correct"""
AUC_LIMIT = 100.0
"""mm at which the area under a curve of ADD or ADD-S ends"""


def transform(pose: np.ndarray, points: np.ndarray) -> np.ndarray:
    """Points (P, 3) moved by a pose (4, 4)."""
    return points @ pose[:3, :3].T + pose[:3, 3]


def project(pose: np.ndarray, points: np.ndarray, intrinsics: np.ndarray) -> np.ndarray:
    """Pixels (P, 2) that points fall on; those on or behind the camera's plane are at infinity."""
    places = transform(pose, points) @ intrinsics.T
    depth = np.where(places[:, 2:] > 0, places[:, 2:], np.nan)
    return np.nan_to_num(places[:, :2] / depth, nan=np.inf)


def mssd(estimate: np.ndarray, truth: np.ndarray, points: np.ndarray, symmetries: np.ndarray) -> float:
    """Maximum symmetry-aware surface distance in mm: min over symmetries of the farthest vertex's error."""
    placed = transform(estimate, points)
    return min(
        float(np.linalg.norm(placed - transform(truth @ symmetry, points), axis=1).max()) for symmetry in symmetries
    )


def mspd(
    estimate: np.ndarray, truth: np.ndarray, points: np.ndarray, symmetries: np.ndarray, intrinsics: np.ndarray
) -> float:
    """Maximum symmetry-aware projection distance in pixels of the picture; infinite for a model behind the camera.

    Args:
        intrinsics: K (3, 3).
    """
    placed = project(estimate, points, intrinsics)
    if not np.isfinite(placed).all():
        return np.inf
    return min(
        float(np.linalg.norm(placed - project(truth @ symmetry, points, intrinsics), axis=1).max())
        for symmetry in symmetries
    )


def relative_width(width: int) -> float:
    """What MSPD's thresholds are multiplied by for pictures of another width than 640."""
    return width / REFERENCE_WIDTH


def distances_from_depth(depth: np.ndarray, intrinsics: np.ndarray) -> np.ndarray:
    """Distances of surfaces from the camera's centre, of a picture of depths (H, W) in the same unit; 0 stays 0."""
    rows, columns = np.indices(depth.shape)
    rays = np.stack([columns, rows, np.ones(depth.shape)], -1) @ np.linalg.inv(intrinsics).T
    return depth * np.linalg.norm(rays, axis=-1)


def vsd(
    estimated_depth: np.ndarray,
    true_depth: np.ndarray,
    measured_depth: np.ndarray,
    intrinsics: np.ndarray,
    tolerances: np.ndarray,
    visibility_tolerance: float = VISIBILITY_TOLERANCE,
) -> np.ndarray:
    """Visible surface discrepancy: the share of the pixels, visible in either pose, whose surfaces do not agree.

    Where nothing was measured, a model counts as visible.

    Args:
        estimated_depth, true_depth: (H, W) mm, of the model alone in either pose, 0 beside it.
        measured_depth: (H, W) mm, what the sensor saw, 0 = nothing.
        intrinsics: K (3, 3).
        tolerances: (T,) mm, tau.
        visibility_tolerance: mm, delta.

    Returns:
        (T,) in [0, 1]; 1 where neither is visible.
    """
    estimated, true, measured = (
        distances_from_depth(depth, intrinsics) for depth in (estimated_depth, true_depth, measured_depth)
    )
    reached = (measured == 0) | (true - measured <= visibility_tolerance)
    true_visible = (true > 0) & reached
    reached = (measured == 0) | (estimated - measured <= visibility_tolerance)
    estimated_visible = (estimated > 0) & (reached | true_visible)
    both, either = true_visible & estimated_visible, true_visible | estimated_visible
    if not either.any():
        return np.ones(len(tolerances))
    apart = np.abs(estimated[both] - true[both])
    wrong = (apart[:, None] >= tolerances).sum(0) + either.sum() - both.sum()
    return wrong / either.sum()


def add(estimate: np.ndarray, truth: np.ndarray, points: np.ndarray) -> float:
    """Mean distance in mm of the model's vertices in the two poses."""
    return float(np.linalg.norm(transform(estimate, points) - transform(truth, points), axis=1).mean())


def add_s(estimate: np.ndarray, truth: np.ndarray, points: np.ndarray) -> float:
    """Mean distance in mm of each vertex in the true pose from the nearest one in the estimated pose."""
    return float(cKDTree(transform(estimate, points)).query(transform(truth, points))[0].mean())


def rotation_angle(first: np.ndarray, second: np.ndarray) -> np.ndarray:
    """Angles in degrees between rotations (..., 3, 3); exact near 0, which the trace's arc cosine is not."""
    half_sine = np.linalg.norm(first - second, axis=(-2, -1)) / np.sqrt(8)
    return np.degrees(2 * np.arcsin(np.clip(half_sine, 0, 1)))


def pose_error(estimate: np.ndarray, truth: np.ndarray, symmetries: np.ndarray) -> tuple[float, float]:
    """Rotation error in degrees and translation error in mm, against the equally true pose of the nearest rotation."""
    equal = truth @ symmetries
    angles = rotation_angle(estimate[:3, :3], equal[:, :3, :3])
    nearest = equal[angles.argmin()]
    return float(angles.min()), float(np.linalg.norm(estimate[:3, 3] - nearest[:3, 3]))


def view_error(direction: np.ndarray, truth: np.ndarray, symmetries: np.ndarray) -> float:
    """Degrees between a viewing direction (3,) in the object's frame and the nearest of the equally true ones."""
    equal = truth @ symmetries
    true = -np.einsum("sji,sj->si", equal[:, :3, :3], equal[:, :3, 3])
    true /= np.linalg.norm(true, axis=1, keepdims=True)
    return float(np.degrees(2 * np.arcsin(np.clip(np.linalg.norm(true - direction, axis=1) / 2, 0, 1))).min())


def match(errors: np.ndarray, threshold: float = np.inf) -> np.ndarray:
    """Which estimate finds each true instance: in order, each takes the free one of the least error below the limit.

    Args:
        errors: (E, G) of every estimate, the surest first, against every instance of its object in its picture.
        threshold: an error must be below it.

    Returns:
        (G,) number of the estimate, -1 without one.
    """
    found = np.full(errors.shape[1], -1)
    for number, row in enumerate(errors):
        row = np.where(found < 0, row, np.inf)
        if row.size and row.min() < threshold:
            found[row.argmin()] = number
    return found


def area_under_curve(errors: np.ndarray, limit: float = AUC_LIMIT) -> float:
    """The area under the recall as a function of its threshold, from 0 to `limit`, divided by `limit`."""
    return float(np.clip(1 - np.asarray(errors) / limit, 0, 1).mean())


def auroc(scores: np.ndarray, correct: np.ndarray) -> float | None:
    """The probability that a correct estimate's score is above a wrong one's, ties half; None if there are not both."""
    if len(np.unique(correct)) < 2:
        return None
    return float(roc_auc_score(correct, scores))
