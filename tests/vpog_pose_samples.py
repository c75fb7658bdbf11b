"""A cuboid whose depth is known in closed form, and what a perfect network would say of two of its views."""
# ruff: noqa: N803 - K is what everybody calls it

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from backlot.cameras import backproject, inverse_pose, project, transform
from pipelines.vpog.correspondences import covered_patches, object_points, patch_centers, to_patches

HALF = torch.tensor([0.06, 0.04, 0.025], dtype=torch.float64)  # metres
SIZE, PATCH = 64, 8
CAMERA = torch.tensor([[90.0, 0, 31.5], [0, 92.0, 31.5], [0, 0, 1]], dtype=torch.float64)
DISTANCE = 0.26


def cuboid_depth(camera_from_object: Tensor, K: Tensor, size: int = SIZE) -> Tensor:
    """Depth (size, size) of the cuboid in metres, 0 beside it."""
    object_from_camera = inverse_pose(camera_from_object)
    eye = object_from_camera[:3, 3]
    rays = backproject(K, torch.ones(size, size, dtype=torch.float64)) @ object_from_camera[:3, :3].T
    first, second = (-HALF - eye) / rays, (HALF - eye) / rays
    near, far = torch.minimum(first, second).amax(dim=-1), torch.maximum(first, second).amin(dim=-1)
    return torch.where((near <= far) & (near > 0), near, 0.0)


def rotation(generator: torch.Generator) -> Tensor:
    """A random rotation (3, 3) float64."""
    matrix = torch.linalg.qr(torch.randn(3, 3, generator=generator, dtype=torch.float64))[0]
    return matrix * matrix.det().sign()


def turn(axis: str, degrees: float) -> Tensor:
    """(4, 4) about one of the camera's axes."""
    i, j = {"x": (1, 2), "y": (2, 0), "z": (0, 1)}[axis]
    c, s = math.cos(math.radians(degrees)), math.sin(math.radians(degrees))
    result = torch.eye(4, dtype=torch.float64)
    result[i, i], result[i, j], result[j, i], result[j, j] = c, -s, s, c
    return result


def look(rotation: Tensor, x: float = 0.0, y: float = 0.0, z: float = DISTANCE) -> Tensor:
    pose = torch.eye(4, dtype=torch.float64)
    pose[:3, :3], pose[:3, 3] = rotation, torch.tensor([x, y, z])
    return pose


@dataclass
class Scene:
    """A query and S templates of the cuboid, with what a perfect network answers."""

    query_pose: Tensor
    template_poses: Tensor
    template_depth: Tensor
    points: Tensor
    object_patches: Tensor
    logits: Tensor
    buddies: Tensor
    flow: Tensor
    scale: Tensor


def make_scene(seed: int = 0, templates: int = 2) -> Scene:
    """Views that differ by up to some 25 degrees, the query off its centre and nearer."""
    generator = torch.Generator().manual_seed(seed)
    base = rotation(generator)
    poses = [look((turn("x", 9.0 * k) @ turn("y", 12.0 - 17 * k))[:3, :3] @ base) for k in range(templates)]
    query_pose = look(turn("z", 11.0)[:3, :3] @ turn("x", -8.0)[:3, :3] @ base, 0.006, -0.009, 0.23)
    poses = torch.stack(poses)
    depth = torch.stack([cuboid_depth(pose, CAMERA) for pose in poses])
    query_depth = cuboid_depth(query_pose, CAMERA)
    points = object_points(depth, CAMERA, poses)
    answers = [perfect_answer(d, p, query_pose, query_depth) for d, p in zip(depth, points, strict=True)]
    buddies, flow = (torch.stack(values) for values in zip(*answers, strict=True))
    number = buddies.shape[1]
    logits = 12 * torch.nn.functional.one_hot(buddies, number + 1).double()
    scale = torch.full(flow.shape[:-1], 0.05, dtype=torch.float64)
    object_patches = covered_patches(query_depth[None] > 0, PATCH)[0]
    return Scene(query_pose, poses, depth, points, object_patches, logits, buddies, flow, scale)


def perfect_answer(depth: Tensor, points: Tensor, query_pose: Tensor, query_depth: Tensor) -> tuple[Tensor, Tensor]:
    """Buddies (N,), by most visible pixels, and flow (N, ps, ps, 2), where each pixel of the buddy really lies."""
    in_camera = transform(query_pose, points.reshape(-1, 3))
    places = project(CAMERA, in_camera).reshape(SIZE, SIZE, 2)
    u, v = (places[..., axis].round().long().clamp(0, SIZE - 1) for axis in (0, 1))
    is_visible = (depth > 0) & ((in_camera[:, 2].reshape(SIZE, SIZE) - query_depth[v, u]).abs() < 0.002)
    side = SIZE // PATCH
    to, of = (v // PATCH) * side + u // PATCH, (torch.arange(SIZE) // PATCH)
    of = of[:, None] * side + of
    votes = torch.zeros(side * side, side * side).index_put_((to[is_visible], of[is_visible]), torch.ones(()), True)
    buddies = torch.where(votes.amax(dim=1) >= 4, votes.argmax(dim=1), side * side)
    centers = patch_centers(SIZE, SIZE, PATCH)
    flow = (to_patches(places[None], PATCH)[0][buddies.clamp(max=side * side - 1)] - centers[:, None, None]) / PATCH
    return buddies, flow
