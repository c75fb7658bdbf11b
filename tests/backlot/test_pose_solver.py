"""Pose from 2D-3D pairs."""

import numpy as np
import pytest
import torch
from scipy.spatial.transform import Rotation

from backlot.cameras import make_pose, project, quat_wxyz_from_matrix, rotation_angle, transform
from backlot.pose_solver import (
    find_pose,
    linearise,
    move,
    pose_cost,
    pose_problem,
    random_start,
    refine_pose,
    tangent_map,
    to_matrices,
    to_rows,
)

DIAMETER = 0.1


def problems(count: int = 4, points: int = 96, noise: float = 0.0, outliers: int = 0, seed: int = 0) -> dict:
    """Points in a ball of 0.1 m seen at 0.4 to 0.7 m, with equal weights; the first `outliers` pairs are far off."""
    generator = torch.Generator().manual_seed(seed)
    x3d = torch.nn.functional.normalize(torch.randn(count, points, 3, generator=generator), dim=-1)
    x3d = DIAMETER / 2 * x3d * torch.rand(count, points, 1, generator=generator) ** 0.3
    rotation = torch.from_numpy(Rotation.random(count, random_state=seed).as_matrix()).float()
    shift = torch.rand(count, 3, generator=generator) * torch.tensor([0.1, 0.1, 0.3])
    shift = shift + torch.tensor([-0.05, -0.05, 0.4])
    pose = make_pose(rotation, shift)
    K = torch.tensor([[500.0, 0, 112], [0, 500, 112], [0, 0, 1]]).expand(count, 3, 3)
    x2d = project(K, transform(pose, x3d)) + noise * torch.randn(count, points, 2, generator=generator)
    x2d[:, :outliers] += 60 * torch.randn(count, outliers, 2, generator=generator) + 30
    return {"x3d": x3d, "x2d": x2d, "w2d": torch.full_like(x2d, 0.5), "K": K, "pose": pose}


def turned(pose: torch.Tensor, degrees: float, shift: float, seed: int = 0) -> torch.Tensor:
    """Poses disturbed by so many degrees and metres in random directions."""
    generator = np.random.default_rng(seed)
    axes = generator.normal(size=(len(pose), 3))
    axes *= np.radians(degrees) / np.linalg.norm(axes, axis=1, keepdims=True)
    off = make_pose(torch.from_numpy(Rotation.from_rotvec(axes).as_matrix()).float(), torch.zeros(len(pose), 3))
    moved = pose @ off
    moved[:, :3, 3] += shift * torch.from_numpy(generator.normal(size=(len(pose), 3))).float()
    return moved


def degrees_off(found: torch.Tensor, truth: torch.Tensor) -> torch.Tensor:
    return torch.rad2deg(rotation_angle(found[:, :3, :3], truth[:, :3, :3]))


def test_tangent_map_turns_by_twice_the_step():
    rotation = torch.from_numpy(Rotation.random(5, random_state=1).as_matrix())
    quat = quat_wxyz_from_matrix(rotation)
    M = tangent_map(quat)
    torch.testing.assert_close(M.mT @ M, torch.eye(3).double().expand(5, 3, 3))
    assert (M.mT @ quat[..., None]).abs().max() < 1e-12
    rows = torch.cat([torch.zeros(5, 3).double(), quat], dim=-1)
    step = torch.tensor([0, 0, 0, 1e-4, -2e-4, 3e-4]).double().expand(5, 6)
    expected = Rotation.from_rotvec(2 * step[0, 3:].numpy()).as_matrix() @ rotation.numpy()
    np.testing.assert_allclose(to_matrices(move(rows, step))[:, :3, :3], expected, atol=1e-9)
    torch.testing.assert_close(to_matrices(to_rows(to_matrices(rows))), to_matrices(rows))


def test_gradient_and_curvature_are_those_of_the_cost():
    data = {key: value.double() for key, value in problems(2, 20, noise=1.0, outliers=3).items()}
    problem = pose_problem(data["x3d"], data["x2d"], data["w2d"], data["K"])
    rows = to_rows(turned(data["pose"].float(), 3, 0.002).double())
    step = torch.zeros(2, 6, dtype=torch.float64, requires_grad=True)
    [expected] = torch.autograd.grad(pose_cost(problem, move(rows, step)).sum(), step)
    cost, _, gradient = linearise(problem, rows)
    torch.testing.assert_close(gradient, expected)
    torch.testing.assert_close(cost, pose_cost(problem, rows))
    truth = to_rows(data["pose"])
    exact = problem._replace(x2d=project(data["K"], transform(to_matrices(truth), data["x3d"])))
    _, jtj, gradient = linearise(exact, move(truth, step))  # without residuals J^T J is the whole Hessian
    hessian = [torch.autograd.grad(gradient[:, k].sum(), step, retain_graph=True)[0] for k in range(6)]
    torch.testing.assert_close(jtj, torch.stack(hessian, dim=1))


def test_points_behind_the_camera_have_no_derivative():
    data = problems(1, 12)
    data["pose"][:, 2, 3] = -1.0
    problem = pose_problem(data["x3d"], data["x2d"], data["w2d"], data["K"], z_min=0.05)
    cost, jtj, gradient = linearise(problem, to_rows(data["pose"]))
    assert torch.isfinite(cost).all()
    assert jtj.abs().max() == 0
    assert gradient.abs().max() == 0


def test_exact_pairs_give_the_pose_back():
    data = problems(6)
    truth = data.pop("pose")
    fit = refine_pose(**data, pose=turned(truth, 20, 0.02), iterations=15)
    assert degrees_off(fit.pose, truth).max() < 0.02
    assert (fit.pose - truth)[:, :3, 3].norm(dim=1).max() < 2e-3 * DIAMETER
    assert fit.cost.max() < 1e-4


def test_twelve_gross_outliers_of_96_do_not_matter():
    """Pitfall 7."""
    data = problems(8, 96, noise=0.3, outliers=12)
    truth = data.pop("pose")
    fit = refine_pose(**data, pose=turned(truth, 15, 0.01), iterations=15)
    assert degrees_off(fit.pose, truth).max() < 1.5
    plain = degrees_off(fit.pose, truth).median()
    unknown = find_pose(**data, generator=torch.Generator().manual_seed(0))
    assert degrees_off(unknown.pose, truth).max() < 1.5
    assert plain < 0.7


def test_a_row_is_solved_as_if_alone_and_weightless_pairs_do_not_count():
    data = problems(3, 40, noise=0.5)
    start = turned(data.pop("pose"), 10, 0.01)
    together = refine_pose(**data, pose=start, iterations=8)
    alone = refine_pose(**{key: value[1:2] for key, value in data.items()}, pose=start[1:2], iterations=8)
    torch.testing.assert_close(together.pose[1:2], alone.pose, atol=1e-5, rtol=1e-5)
    padded = {key: torch.cat([data[key], torch.full_like(data[key], 7.0)], dim=1) for key in ("x3d", "x2d")}
    padded["w2d"] = torch.cat([data["w2d"], torch.zeros_like(data["w2d"])], dim=1)
    wider = refine_pose(**padded, K=data["K"], pose=start, iterations=8)
    torch.testing.assert_close(wider.pose, together.pose, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(wider.cost, together.cost, rtol=1e-4, atol=1e-6)


def test_without_pairs_or_with_nan_the_start_stays():
    data = problems(2, 10)
    start = turned(data.pop("pose"), 10, 0.01)
    data["w2d"][0] = 0
    data["x2d"][1, 3] = torch.nan
    fit = refine_pose(**data, pose=start, iterations=4)
    torch.testing.assert_close(fit.pose, start, atol=1e-6, rtol=1e-5)


def test_random_starts_are_within_reach():
    data = problems(16, 96, noise=0.3)
    problem = pose_problem(data["x3d"], data["x2d"], data["w2d"], data["K"])
    rows, cost = random_start(problem, generator=torch.Generator().manual_seed(1))
    assert degrees_off(to_matrices(rows), data["pose"]).median() < 5
    torch.testing.assert_close(cost, pose_cost(problem, rows))


def test_the_answer_is_the_same_under_autocast():
    data = problems(2, 32)
    start = turned(data.pop("pose"), 5, 0.005)
    plain = refine_pose(**data, pose=start, iterations=6)
    with torch.autocast("cpu", torch.bfloat16):
        cast = refine_pose(**data, pose=start, iterations=6)
    assert torch.equal(plain.pose, cast.pose)


def test_agrees_with_poselib_on_noisy_pairs():
    poselib = pytest.importorskip("poselib")
    data = problems(3, 96, noise=1.0)
    fit = refine_pose(**{k: v for k, v in data.items() if k != "pose"}, pose=data["pose"], iterations=20)
    camera = {"model": "PINHOLE", "width": 224, "height": 224, "params": [500.0, 500.0, 112.5, 112.5]}
    for row in range(3):
        pairs = (data["x2d"][row] + 0.5).double().numpy(), data["x3d"][row].double().numpy()
        theirs, _ = poselib.estimate_absolute_pose(*pairs, camera, {"max_reproj_error": 50.0}, {})
        assert torch.rad2deg(rotation_angle(fit.pose[row, :3, :3], torch.from_numpy(theirs.R).float())) < 0.3
