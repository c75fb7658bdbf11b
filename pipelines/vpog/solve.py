"""A pose from correspondences: RANSAC, then Levenberg-Marquardt on what agrees with it."""
# ruff: noqa: N803 - K is what everybody calls it

from __future__ import annotations

import importlib.util
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from backlot.cameras import project, transform
from backlot.pose_solver import refine_pose
from pipelines.vpog.correspondences import Correspondences

Solver = Literal["auto", "poselib", "opencv"]
SOLVERS = {"poselib": "poselib", "opencv": "cv2"}  # name -> module
MIN_POINTS = 6
RANSAC_ITERATIONS = 2000
REFINE_ITERATIONS = 10


@dataclass(frozen=True)
class PoseSolution:
    """A pose (4, 4) float64 and which correspondences agree with it, (M,) bool."""

    camera_from_object: Tensor
    inliers: Tensor


def choose_solver(solver: Solver = "auto") -> str:
    """The RANSAC that is used: the one asked for, or the first that is installed.

    Raises:
        ImportError: it, or for "auto" each of them, is not installed; one line says what to install.
    """
    wanted = list(SOLVERS) if solver == "auto" else [solver]
    for name in wanted:
        if importlib.util.find_spec(SOLVERS[name]) is not None:
            return name
    packages = {"poselib": "poselib", "opencv": "opencv-python-headless"}
    names = " or ".join(packages[name] for name in wanted)
    raise ImportError(f"poses need {names}, which is not installed: pip install {packages[wanted[0]]}")


def solve_pose(
    found: Correspondences, K: Tensor, frame: Tensor, *, threshold: float, solver: Solver = "auto", seed: int = 0
) -> PoseSolution | None:
    """The pose that most correspondences agree with; None if there is none.

    Points are taken to the camera frame of a template and there to unit size, so that neither the CAD frame nor the
    unit of length matters, and places to a camera without offset, so that no convention of pixel centres does.

    Args:
        K: (3, 3) of the crop.
        frame: (4, 4) camera_from_object of a template.
        threshold: largest reprojection error of an inlier, in pixels.
        seed: of RANSAC's draws; equal seeds give equal poses.
    """
    name = choose_solver(solver)
    if len(found) < MIN_POINTS:
        return None
    found, K, frame = _on_cpu(found), K.double().cpu(), frame.double().cpu()
    unit_from_object = _unit_frame(found.points, frame)
    points = transform(unit_from_object, found.points)
    focal = K[[0, 1], [0, 1]].mean()
    rays = torch.cat([found.places, torch.ones(len(found), 1, dtype=torch.float64)], dim=1) @ K.inverse().T
    places = focal * rays[:, :2]
    ransac = {"poselib": _ransac_poselib, "opencv": _ransac_opencv}[name]
    pose = ransac(points.numpy(), places.numpy(), float(focal), threshold, seed)
    if pose is None:
        return None
    camera = torch.diag(torch.stack([focal, focal, focal.new_ones(())]))
    weights = found.weights / found.weights.mean()
    pose = _refine(pose, points, places, weights, camera, threshold)
    inliers = reprojection_errors(pose, points, places, camera) <= threshold
    if not pose.isfinite().all() or not inliers.any():
        return None
    return PoseSolution(_join(pose, unit_from_object), inliers)


def reprojection_errors(pose: Tensor, points: Tensor, places: Tensor, K: Tensor) -> Tensor:
    """Distances (M,) in pixels between where points are seen under a pose and where they should be; inf behind it."""
    in_camera = transform(pose, points)
    errors = (project(K, in_camera) - places).norm(dim=-1)
    return torch.where(in_camera[:, 2] > 0, errors, torch.inf)


def _on_cpu(found: Correspondences) -> Correspondences:
    return Correspondences(*(values.cpu() for values in vars(found).values()))


def _unit_frame(points: Tensor, frame: Tensor) -> Tensor:
    """The similarity (4, 4) that takes points to a camera frame, their mean to 0 and their spread to 1."""
    points = transform(frame, points)
    center = points.mean(dim=0)
    spread = (points - center).square().sum(dim=1).mean().sqrt().clamp(min=1e-12)
    result = torch.eye(4, dtype=torch.float64)
    result[:3, :3] = frame[:3, :3] / spread
    result[:3, 3] = (frame[:3, 3] - center) / spread
    return result


def _join(camera_from_unit: Tensor, unit_from_object: Tensor) -> Tensor:
    """The rigid pose in the object's unit of length: the camera looks at a scene of any size alike."""
    scale = unit_from_object[:3, :3].det().pow(1 / 3)
    pose = camera_from_unit @ unit_from_object
    pose[:3] /= scale
    # a template's rotation in float32 is one to seven digits only
    u, _, vh = torch.linalg.svd(pose[:3, :3])
    pose[:3, :3] = u @ vh
    return pose


def _refine(pose: Tensor, points: Tensor, places: Tensor, weights: Tensor, K: Tensor, threshold: float) -> Tensor:
    """The pose after Levenberg-Marquardt on its inliers, where that fits all of them better."""
    for _ in range(2):  # the second time with the inliers of the better pose
        near = reprojection_errors(pose, points, places, K) <= threshold
        if near.sum() < MIN_POINTS:
            return pose
        w2d = weights[near, None].expand(-1, 2)
        fit = refine_pose(points[near][None], places[near][None], w2d[None], K[None], pose[None], REFINE_ITERATIONS)
        costs = [
            (weights * reprojection_errors(each, points, places, K).clamp(max=threshold).square()).sum()
            for each in (pose, fit.pose[0])
        ]
        if not costs[1] < costs[0]:
            return pose
        pose = fit.pose[0]
    return pose


def _ransac_poselib(points: np.ndarray, places: np.ndarray, focal: float, threshold: float, seed: int) -> Tensor | None:
    import poselib

    camera = {"model": "SIMPLE_PINHOLE", "width": 1, "height": 1, "params": [focal, 0.0, 0.0]}
    options = {
        "max_reproj_error": threshold,
        "seed": seed,
        "min_iterations": min(200, RANSAC_ITERATIONS),
        "max_iterations": RANSAC_ITERATIONS,
    }
    estimate, details = poselib.estimate_absolute_pose(places, points, camera, options, {"loss_scale": threshold / 2})
    if details["num_inliers"] < MIN_POINTS:
        return None
    return _pose(estimate.R, estimate.t)


def _ransac_opencv(points: np.ndarray, places: np.ndarray, focal: float, threshold: float, seed: int) -> Tensor | None:
    import cv2

    cv2.setRNGSeed(seed)
    K = np.diag([focal, focal, 1.0])
    found, rotation, translation, inliers = cv2.solvePnPRansac(
        points,
        places,
        K,
        None,
        iterationsCount=RANSAC_ITERATIONS,
        reprojectionError=threshold,
        confidence=0.9999,
        flags=cv2.SOLVEPNP_SQPNP,
    )
    if not found or inliers is None or len(inliers) < MIN_POINTS:
        return None
    return _pose(cv2.Rodrigues(rotation)[0], translation[:, 0])


def _pose(rotation: np.ndarray, translation: np.ndarray) -> Tensor:
    pose = torch.eye(4, dtype=torch.float64)
    pose[:3, :3], pose[:3, 3] = torch.tensor(rotation), torch.tensor(translation)
    return pose


def place_template(camera_from_object: Tensor, K_template: Tensor, extent: Tensor, K: Tensor, box: Tensor) -> Tensor:
    """The pose of an object that looks as in a template and fills a box: what a template alone can say.

    Args:
        camera_from_object: (4, 4) of the template. K_template: (3, 3).
        extent: (4,) x1 y1 x2 y2, edges of the object's pixels in the template.
        K: (3, 3) of the query. box: (4,) the edges of the object's pixels there.

    Returns:
        (4, 4) float64: as far away as the sizes say, its centre on the ray through the box's, turned with that ray.
    """
    pose, K_template, K = camera_from_object.double(), K_template.double(), K.double()

    def ray_and_size(edges: Tensor, camera: Tensor) -> tuple[Tensor, Tensor]:
        edges = edges.double() - 0.5  # edges of pixels lie half a pixel before their centres
        center = torch.cat([(edges[:2] + edges[2:]) / 2, edges.new_ones(1)])
        ray = camera.inverse() @ center
        size = ((edges[2:] - edges[:2]) / camera[[0, 1], [0, 1]]).norm()
        return ray / ray.norm(), size

    ray, size = ray_and_size(box, K)
    ray_template, size_template = ray_and_size(extent, K_template)
    turn = rotation_between(ray_template, ray)
    distance = pose[:3, 3] @ ray_template  # of the middle of what is seen, as far away as the object's origin
    aside = pose[:3, 3] - distance * ray_template
    result = torch.eye(4, dtype=torch.float64)
    result[:3, :3] = turn @ pose[:3, :3]
    result[:3, 3] = distance * size_template / size * ray + turn @ aside
    return result


def rotation_between(start: Tensor, end: Tensor) -> Tensor:
    """The smallest rotation (3, 3) that takes one unit vector to another that is not its opposite."""
    x, y, z = torch.linalg.cross(start, end)
    zero = torch.zeros_like(x)
    skew = torch.stack([zero, -z, y, z, zero, -x, -y, x, zero]).reshape(3, 3)
    return torch.eye(3, dtype=start.dtype) + skew + skew @ skew / (1 + start @ end)
