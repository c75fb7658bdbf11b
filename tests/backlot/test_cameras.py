"""Cameras, poses and crops."""

import math

import numpy as np
import pytest
import torch
from scipy.spatial.transform import Rotation

from backlot.cameras import (
    backproject,
    in_plane_angle,
    inverse_affine,
    inverse_pose,
    make_pose,
    matrix_from_quat_wxyz,
    project,
    quat_wxyz_from_matrix,
    rotation_angle,
    rotation_z,
    square_crop,
    transform,
    viewing_direction,
    warp,
)

K = torch.tensor([[572.4, 0.3, 325.3], [0, 573.6, 242.0], [0, 0, 1]], dtype=torch.float64)


def rotations(count: int, seed: int = 0) -> torch.Tensor:
    return torch.from_numpy(Rotation.random(count, random_state=seed).as_matrix())


def poses(count: int, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    shift = torch.randn(count, 3, generator=generator, dtype=torch.float64)
    return make_pose(rotations(count, seed), shift * 0.1 + torch.tensor([0, 0, 0.8]))


def blob_centre(picture: torch.Tensor) -> torch.Tensor:
    """(2,) u, v of the brightness' centre of mass in a picture (H, W)."""
    v, u = torch.meshgrid(*(torch.arange(n, dtype=torch.float64) for n in picture.shape), indexing="ij")
    return torch.stack([(u * picture).sum(), (v * picture).sum()]) / picture.sum()


def blob(height: int, width: int, centre: torch.Tensor, spread: float) -> torch.Tensor:
    v, u = torch.meshgrid(*(torch.arange(n, dtype=torch.float64) for n in (height, width)), indexing="ij")
    return torch.exp(-((u - centre[0]) ** 2 + (v - centre[1]) ** 2) / (2 * spread**2))


def test_backproject_is_the_inverse_of_project():
    depth = torch.rand(2, 5, 7, dtype=torch.float64) + 0.5
    turned = torch.stack([K, rotation_z(torch.tensor(0.4, dtype=torch.float64)) @ K])  # no longer upper triangular
    points = backproject(turned, depth)
    torch.testing.assert_close(points[..., 2], depth)
    pixels = project(turned, points.flatten(1, 2)).unflatten(1, (5, 7))
    v, u = torch.meshgrid(torch.arange(5.0), torch.arange(7.0), indexing="ij")
    torch.testing.assert_close(pixels, torch.stack([u, v], -1).double().expand(2, 5, 7, 2))
    assert backproject(K, torch.zeros(3, 3, dtype=torch.float64)).abs().max() == 0


def test_poses_move_points_and_back():
    pose, points = poses(4), torch.randn(4, 6, 3, dtype=torch.float64)
    torch.testing.assert_close(transform(inverse_pose(pose), transform(pose, points)), points)
    torch.testing.assert_close(inverse_pose(pose) @ pose, torch.eye(4, dtype=torch.float64).expand(4, 4, 4))
    by_hand = pose[1, :3, :3] @ points[1, 2] + pose[1, :3, 3]
    torch.testing.assert_close(transform(pose, points)[1, 2], by_hand)


def test_quaternions_agree_with_scipy_half_turns_among_them():
    matrices = torch.cat([rotations(50), torch.diag_embed(torch.tensor([[1, -1, -1], [-1, 1, -1], [-1, -1, 1]]))])
    quats = quat_wxyz_from_matrix(matrices)
    theirs = torch.from_numpy(Rotation.from_matrix(matrices.numpy()).as_quat(scalar_first=True))
    torch.testing.assert_close((quats * theirs).sum(-1).abs(), torch.ones(53, dtype=torch.float64))
    torch.testing.assert_close(matrix_from_quat_wxyz(3 * quats), matrices)
    assert (quats[:, 0] >= 0).all()


@pytest.mark.parametrize("angle", [0.0, 1e-5, 1e-3, 1.0, math.pi - 1e-4, math.pi])
def test_rotation_angle_is_exact_at_both_ends(angle):
    base = rotations(1, seed=3)[0]
    axis = torch.tensor([0.6, 0.0, 0.8])
    turned = torch.from_numpy(Rotation.from_rotvec(angle * axis.numpy()).as_matrix()) @ base
    assert abs(rotation_angle(turned.float(), base.float()).item() - angle) < 1e-6


def test_viewing_direction_is_towards_the_camera_and_knows_no_roll():
    pose = poses(20)
    camera = inverse_pose(pose)[:, :3, 3]  # of the camera, in the object's frame
    direction = viewing_direction(pose)
    torch.testing.assert_close(direction, camera / camera.norm(dim=1, keepdim=True))
    roll = make_pose(rotation_z(torch.linspace(-3, 3, 20).double()), torch.zeros(20, 3).double())
    torch.testing.assert_close(viewing_direction(roll @ pose), direction)
    centred = pose.clone()
    centred[:, :2, 3] = 0
    torch.testing.assert_close(viewing_direction(centred), -centred[:, 2, :3])  # the third row, not the column
    assert ((-pose[:, :3, 2] * direction).sum(1) < 0.5).any()


def test_in_plane_angle_is_gigaposes():
    theta = torch.linspace(-3, 3, 7).double()
    template = rotations(7, seed=1)
    angle, residual = in_plane_angle(rotation_z(-theta) @ template, template)
    torch.testing.assert_close(angle, theta)
    assert residual.max() < 1e-7
    query = rotations(7, seed=2)
    relative = (template @ query.mT).numpy()
    expected = Rotation.from_matrix(relative).as_euler("zyx")[:, 0]
    np.testing.assert_allclose(in_plane_angle(query, template)[0], expected, atol=1e-9)
    left = rotation_angle(rotation_z(-torch.from_numpy(expected)) @ template, query)
    torch.testing.assert_close(in_plane_angle(query, template)[1], left)


def test_square_crop_puts_the_boxs_edges_where_they_belong():
    boxes = torch.tensor([[10, 20, 30, 30], [-50, 400, 20, 700]])
    M = square_crop(boxes, 64, padding=1.0)
    edges = torch.tensor([10 - 0.5, 15 - 0.5, 1]), torch.tensor([30 - 0.5, 35 - 0.5, 1])  # of the square of side 20
    torch.testing.assert_close((M[0] @ edges[0])[:2], torch.tensor([-0.5, -0.5]))
    torch.testing.assert_close((M[0] @ edges[1])[:2], torch.tensor([63.5, 63.5]))
    wide = square_crop(boxes, 64, padding=1.25)
    assert wide[1, 0, 0].item() == pytest.approx(64 / (300 * 1.25))
    assert torch.isfinite(square_crop(torch.tensor([[5, 5, 5, 5]]), 64)).all()
    torch.testing.assert_close(inverse_affine(M) @ M, torch.eye(3).expand(2, 3, 3), atol=1e-4, rtol=0)


@pytest.mark.parametrize("turn", [0.0, 0.5])
@pytest.mark.parametrize("box", [(150, 100, 190, 140), (40, -20, 300, 240), (200, 60, 420, 250), (-80, -60, 150, 170)])
def test_a_crops_camera_agrees_with_its_pixels(box, turn):
    """Pitfall 6: a point projected through M K is where the warp puts it: grown, shrunk, turned, half outside."""
    size = 96
    M = square_crop(torch.tensor([box], dtype=torch.float64), size)
    centre = torch.tensor([[1, 0, -47.5], [0, 1, -47.5], [0, 0, 1]], dtype=torch.float64)
    M = inverse_affine(centre) @ rotation_z(torch.tensor(turn, dtype=torch.float64)) @ centre @ M
    target = torch.tensor([48.0 + 7.3, 48.0 - 4.6, 1], dtype=torch.float64)
    pixel = (inverse_affine(M[0]) @ target)[:2]
    pixel = pixel.clamp(min=30).minimum(torch.tensor([290.0, 210.0]))  # the blob lies in the picture as a whole
    picture = blob(240, 320, pixel, spread=5.0)
    point = 0.7 * (inverse_affine(K) @ torch.cat([pixel, pixel.new_ones(1)]))
    expected = project(M @ K, point[None, None])[0, 0]
    crop = warp(picture[None, None], M, size)[0, 0]
    assert crop.max() > 0.9
    scale = M[0, :2, :2].det().sqrt()
    assert (blob_centre(crop) - expected).norm() < 1e-3 * max(1, scale)


def test_identity_and_whole_shifts_keep_every_pixel():
    pictures = torch.rand(2, 3, 8, 8)
    M = torch.eye(3).repeat(2, 1, 1)
    torch.testing.assert_close(warp(pictures, M, 8), pictures)
    assert torch.equal(warp(pictures, M, 8, mode="nearest"), pictures)
    M[1, 0, 2] = 3
    moved = warp(pictures, M, 8, mode="nearest")
    assert torch.equal(moved[1, :, :, 3:], pictures[1, :, :, :5])
    assert moved[1, :, :, :3].abs().max() == 0


def test_a_crop_that_shrinks_is_antialiased_and_each_is_as_if_alone():
    rows = (torch.arange(64) % 4 == 0).float().expand(1, 1, 64, 64)
    M = square_crop(torch.tensor([[0, 0, 64, 64], [0, 0, 16, 16]]), 16, padding=1.0)
    both = warp(rows.expand(2, 1, 64, 64), M, 16)
    torch.testing.assert_close(both[0], torch.full_like(both[0], 0.25))
    torch.testing.assert_close(both[1], rows[0, :, :16, :16])
    assert torch.equal(both[:1], warp(rows, M[:1], 16))
    depth = warp(rows, M[:1], 16, mode="nearest")
    assert set(depth.unique().tolist()) <= {0.0, 1.0}
