"""Pictures of spheres and boxes cast by arithmetic: depth, masks and poses without a renderer."""

# ruff: noqa: N803 - K is what everybody calls it

from __future__ import annotations

import numpy as np
import torch
from scipy.spatial.transform import Rotation

from backlot.cameras import backproject, inverse_pose, make_pose, transform

DIAMETER = 0.12


def rays_of(K: torch.Tensor, pose: torch.Tensor, size: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Origin (3,) and directions (size, size, 3) with z = 1 in the camera, both in the object's frame."""
    ends = backproject(K, torch.ones(size, size, dtype=K.dtype))
    back = inverse_pose(pose)
    return back[:3, 3], ends @ back[:3, :3].mT


def box_depth(K: torch.Tensor, pose: torch.Tensor, size: int, half=(0.045, 0.032, 0.022)) -> torch.Tensor:
    """(size, size) depth of a box of given half sides; 0 beside it."""
    origin, rays = rays_of(K, pose, size)
    half = torch.tensor(half, dtype=K.dtype)
    near, far = (-half - origin) / rays, (half - origin) / rays
    first, last = torch.minimum(near, far).amax(-1), torch.maximum(near, far).amin(-1)
    return torch.where((first < last) & (first > 0), first, 0.0)


def sphere_depth(K: torch.Tensor, pose: torch.Tensor, size: int, radius: float = 0.06) -> torch.Tensor:
    """(size, size) depth of a sphere; 0 beside it."""
    origin, rays = rays_of(K, pose, size)
    a, b, c = rays.square().sum(-1), (rays * origin).sum(-1), origin.square().sum() - radius**2
    root = b.square() - a * c
    return torch.where(root > 0, (-b - root.clamp(min=0).sqrt()) / a, 0.0)


def look_from(direction: np.ndarray, distance: float, roll: float = 0.0) -> torch.Tensor:
    """(4, 4) camera_from_object of a camera at a direction from the object, turned by `roll` radians."""
    forward = -np.asarray(direction, float) / np.linalg.norm(direction)
    side = np.cross([0.2, 1.0, 0.1], forward)
    side /= np.linalg.norm(side)
    rotation = Rotation.from_euler("z", roll).as_matrix() @ np.stack([side, np.cross(forward, side), forward])
    return make_pose(torch.from_numpy(rotation), torch.tensor([0.0, 0.0, distance], dtype=torch.float64))


def pose_batch(
    queries: int = 2, templates: int = 3, size: int = 112, degrees: float = 25.0, seed: int = 0, cast=box_depth
) -> dict[str, torch.Tensor]:
    """A batch as the pose data set gives it, without pictures: queries of one object, templates around each's view."""
    generator = np.random.default_rng(seed)
    focal, distance = 2.2 * size, 0.35
    K = torch.tensor([[focal, 0, (size - 1) / 2], [0, focal, (size - 1) / 2], [0, 0, 1]], dtype=torch.float64)
    batch = {key: [] for key in ("K", "poses", "query_depth", "template_depth", "masks")}
    for _ in range(queries):
        view = generator.normal(size=3)
        view /= np.linalg.norm(view)
        pose = look_from(view, 1.3 * distance, generator.uniform(-0.5, 0.5))
        pose[:2, 3] += torch.from_numpy(generator.uniform(-0.01, 0.01, 2))
        zoom = torch.tensor([[1.35, 0, -0.175 * size], [0, 1.35, -0.175 * size], [0, 0, 1]], dtype=torch.float64)
        cameras, poses = [zoom @ K], [pose]
        for _ in range(templates):
            axis = np.cross(view, generator.normal(size=3))
            axis *= np.radians(degrees * generator.uniform(0.3, 1)) / np.linalg.norm(axis)
            cameras.append(K)
            poses.append(look_from(Rotation.from_rotvec(axis).apply(view), distance))
        depth = torch.stack([cast(*camera, size) for camera in zip(cameras, poses, strict=True)])
        batch["K"].append(torch.stack(cameras))
        batch["poses"].append(torch.stack(poses))
        batch["query_depth"].append(depth[0])
        batch["template_depth"].append(depth[1:])
        batch["masks"].append(depth > 0)
    stacked = {key: torch.stack(value) for key, value in batch.items()}
    stacked = {key: value if value.dtype == torch.bool else value.float() for key, value in stacked.items()}
    return stacked | {"diameter": torch.full((queries,), DIAMETER)}


def hide(batch: dict[str, torch.Tensor], columns: slice, distance: float = 0.05) -> dict[str, torch.Tensor]:
    """The batch with something in front of these columns of the query."""
    depth, masks = batch["query_depth"].clone(), batch["masks"].clone()
    depth[:, :, columns] = distance
    masks[:, 0, :, columns] = False
    return batch | {"query_depth": depth, "masks": masks}


def points_of(batch: dict[str, torch.Tensor], which: int) -> torch.Tensor:
    """(B, H, W, 3) object points of picture `which` (0 the query), the plain way."""
    depth = batch["query_depth"] if which == 0 else batch["template_depth"][:, which - 1]
    points = backproject(batch["K"][:, which], depth)
    moved = transform(inverse_pose(batch["poses"][:, which]), points.flatten(1, 2)).view_as(points)
    return torch.where(depth[..., None] > 0, moved, 0.0)
