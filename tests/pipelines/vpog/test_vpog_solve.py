"""Poses from correspondences: half pixels, outliers, seeds, frames, both solvers, and none installed."""

from __future__ import annotations

import importlib.util

import pytest
import torch
from vpog_pose_samples import CAMERA, DISTANCE, HALF, PATCH, cuboid_depth, look, make_scene, rotation, turn

from backlot.cameras import inverse_pose, project, rotation_angle, transform
from pipelines.vpog.correspondences import Correspondences, gather_correspondences
from pipelines.vpog.query import box_of
from pipelines.vpog.solve import choose_solver, place_template, reprojection_errors, rotation_between, solve_pose

SOLVERS = [
    pytest.param(name, marks=pytest.mark.skipif(importlib.util.find_spec(module) is None, reason=f"needs {module}"))
    for name, module in (("poselib", "poselib"), ("opencv", "cv2"))
]
FRAME = look(torch.eye(3, dtype=torch.float64))


def degrees(first: torch.Tensor, second: torch.Tensor) -> float:
    return float(rotation_angle(first[:3, :3], second[:3, :3]).rad2deg())


def points_of(pose: torch.Tensor, count: int = 200, noise: float = 0.0, outliers: float = 0.0, seed: int = 0):
    """Points in the cuboid and where a pose shows them, some with noise (pixels), some anywhere."""
    generator = torch.Generator().manual_seed(seed)
    points = HALF * (2 * torch.rand(count, 3, generator=generator, dtype=torch.float64) - 1)
    places = project(CAMERA, transform(pose, points))
    places = places + noise * torch.randn(count, 2, generator=generator, dtype=torch.float64)
    wrong = torch.rand(count, generator=generator) < outliers
    anywhere = 64 * torch.rand(count, 2, generator=generator, dtype=torch.float64)
    places = torch.where(wrong[:, None], anywhere, places)
    rows = torch.zeros(count, dtype=torch.long)
    return Correspondences(points, places, torch.ones(count, dtype=torch.float64), rows, rows), wrong


@pytest.fixture
def pose():
    return look(rotation(torch.Generator().manual_seed(5)), 0.02, -0.03)


@pytest.mark.parametrize("solver", SOLVERS)
def test_exact_centres_leave_no_residual_and_no_bias(solver, pose):
    found, _ = points_of(pose)
    solution = solve_pose(found, CAMERA, FRAME, threshold=2.0, solver=solver)
    residual = project(CAMERA, transform(solution.camera_from_object, found.points)) - found.places
    assert residual.mean(dim=0).norm() < 1e-4
    assert degrees(solution.camera_from_object, pose) < 1e-3
    assert (solution.camera_from_object[:3, 3] - pose[:3, 3]).norm() < 1e-5 * DISTANCE


@pytest.mark.parametrize("solver", SOLVERS)
def test_outliers_are_told_from_inliers(solver, pose):
    found, wrong = points_of(pose, noise=0.3, outliers=0.5)
    solution = solve_pose(found, CAMERA, FRAME, threshold=2.0, solver=solver)
    assert degrees(solution.camera_from_object, pose) < 1.5
    assert solution.inliers[~wrong].double().mean() > 0.97
    assert solution.inliers[wrong].double().mean() < 0.1


def test_refinement_follows_the_weights(pose):
    """Points that are sure and exact win over as many unsure ones that lie a pixel aside."""
    found, _ = points_of(pose, count=300)
    aside = torch.arange(300) % 2 == 1
    places = found.places + 1.0 * aside[:, None] * torch.tensor([1.0, 0.5], dtype=torch.float64)
    shifted = {"points": found.points, "places": places, "patches": found.patches, "templates": found.templates}
    errors = []
    for weight in (1.0, 0.02):
        weights = torch.where(aside, weight, 1.0).double()
        solution = solve_pose(Correspondences(weights=weights, **shifted), CAMERA, FRAME, threshold=2.5)
        exact = reprojection_errors(solution.camera_from_object, found.points, found.places, CAMERA)
        errors.append(exact[~aside].mean())
    assert errors[1] < 0.3 * errors[0]


@pytest.mark.parametrize("solver", SOLVERS)
def test_equal_seeds_give_equal_poses(solver, pose):
    found, _ = points_of(pose, noise=1.0, outliers=0.6)
    answers = [solve_pose(found, CAMERA, FRAME, threshold=2.0, solver=solver, seed=3) for _ in range(2)]
    assert torch.equal(answers[0].camera_from_object, answers[1].camera_from_object)
    assert torch.equal(answers[0].inliers, answers[1].inliers)


@pytest.mark.parametrize("seed", [0, 1])
def test_another_cad_frame_gives_the_same_pose(seed):
    scene = make_scene(seed)
    generator = torch.Generator().manual_seed(seed)
    noise = 0.15 * torch.randn(scene.flow.shape, generator=generator, dtype=torch.float64)
    wrong = torch.rand(scene.buddies.shape, generator=generator) < 0.3
    flow = scene.flow + noise + wrong[..., None, None, None] * 2
    change = look(rotation(generator), 0, 0, 0)

    def solve(gauge: torch.Tensor) -> torch.Tensor:
        # poses are kept in float32
        poses = (scene.template_poses @ gauge).float().double()
        points = transform(inverse_pose(gauge), scene.points.flatten(0, 2)).reshape(scene.points.shape)
        found = gather_correspondences(
            *(scene.logits, scene.buddies, flow, scene.scale, scene.template_depth, points, scene.object_patches)
        ).heaviest(500)
        return solve_pose(found, CAMERA, poses[0], threshold=2.5).camera_from_object

    expected = solve(torch.eye(4, dtype=torch.float64)) @ change
    assert degrees(expected, scene.query_pose @ change) < 8
    assert degrees(solve(change), expected) < 0.01


def test_a_rotation_is_a_rotation(pose):
    found, _ = points_of(pose, noise=0.5)
    blurred = FRAME.clone()
    blurred[:3, :3] *= 1 + 1e-4  # a template's rotation that was rounded
    R = solve_pose(found, CAMERA, blurred, threshold=2.0).camera_from_object[:3, :3]
    assert (R @ R.T - torch.eye(3)).norm() < 1e-12


def test_too_few_points_or_nonsense_give_none(pose):
    found, _ = points_of(pose, count=5)
    assert solve_pose(found, CAMERA, FRAME, threshold=2.0) is None
    found, _ = points_of(pose, outliers=1.0, count=12)
    solution = solve_pose(found, CAMERA, FRAME, threshold=0.01)
    assert solution is None or solution.inliers.sum() <= 7


def test_points_behind_the_camera_agree_with_nothing(pose):
    found, _ = points_of(pose)
    behind = pose.clone()
    behind[:3] *= -1  # the same projections
    assert reprojection_errors(behind, found.points, found.places, CAMERA).isinf().all()


def test_without_a_solver_one_line_says_what_to_install(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ImportError, match="poselib or opencv-python-headless, which is not installed: pip install"):
        choose_solver()
    with pytest.raises(ImportError, match="need opencv-python-headless"):
        choose_solver("opencv")


def test_the_first_solver_that_is_installed_is_used(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: name == "cv2" or None)
    assert choose_solver() == "opencv"


def test_smallest_rotation_between_two_rays():
    a, b = torch.nn.functional.normalize(torch.randn(2, 3, dtype=torch.float64), dim=1)
    R = rotation_between(a, b)
    assert torch.allclose(R @ a, b)
    assert torch.allclose(R @ R.T, torch.eye(3, dtype=torch.float64))
    axis = torch.linalg.cross(a, b)
    assert torch.allclose(R @ axis, axis)


def test_a_template_placed_by_a_box_fills_it():
    template = look(rotation(torch.Generator().manual_seed(2)))
    extent = box_of(cuboid_depth(template, CAMERA) > 0)
    truth = turn("y", 8.0) @ look(template[:3, :3], 0.0, 0.0, 0.21)
    box = box_of(cuboid_depth(truth, CAMERA) > 0)
    pose = place_template(template, CAMERA, extent, CAMERA, box)
    assert degrees(pose, truth) < 3
    assert (pose[:3, 3] - truth[:3, 3]).norm() < 0.1 * DISTANCE
    assert (box_of(cuboid_depth(pose, CAMERA) > 0) - box).abs().max() <= PATCH / 2
    same = place_template(template, CAMERA, extent, CAMERA, extent)
    assert torch.allclose(same, template)
