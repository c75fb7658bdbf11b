"""Cameras about an object: evenly spread directions, poses that look at it, and a camera that holds all of it.

Conventions: metres, OpenCV axes, `camera_from_object` poses; pixel (row i, column j) has its centre at u = j, v = i.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import trimesh

SUBDIVISIONS = {42: 1, 162: 2, 642: 3}
"""Views of an icosphere by how often its triangles were divided; neighbours are about 32, 16 and 8 degrees apart."""
MARGIN = 1.05  # of the distance at which the bounding sphere would touch the picture's edges
POLE = 1e-6  # sine of the angle to the z axis below which the picture's up is y


def view_directions(count: int = 162) -> np.ndarray:
    """Unit vectors (count, 3) from the object towards the cameras: the vertices of an icosphere.

    Raises:
        ValueError: `count` is not 42, 162 or 642.
    """
    if count not in SUBDIVISIONS:
        raise ValueError(f"`views` must be one of {', '.join(map(str, SUBDIVISIONS))}, got {count}")
    vertices = np.asarray(trimesh.creation.icosphere(SUBDIVISIONS[count]).vertices, np.float64)
    return vertices / np.linalg.norm(vertices, axis=1, keepdims=True)


def look_at_poses(directions: np.ndarray, distance: float, centre: Sequence[float] = (0.0, 0.0, 0.0)) -> np.ndarray:
    """`camera_from_object` (T, 4, 4) of cameras that look at `centre` from each direction (T, 3), z up in the picture.

    Args:
        directions: unit vectors of the object's frame, from the centre towards the camera; along z the picture's up is
            the object's y.
        distance: from the centre, in metres.
    """
    directions = np.asarray(directions, np.float64)
    forward = -directions
    polar = np.hypot(forward[:, 0], forward[:, 1]) < POLE
    up = np.where(polar[:, None], (0.0, 1.0, 0.0), (0.0, 0.0, 1.0))
    right = np.cross(forward, up)
    right /= np.linalg.norm(right, axis=1, keepdims=True)
    rotation = np.stack([right, np.cross(forward, right), forward], axis=1)
    eyes = np.asarray(centre, np.float64) + distance * directions
    poses = np.tile(np.eye(4), (len(directions), 1, 1))
    poses[:, :3, :3] = rotation
    poses[:, :3, 3] = -np.einsum("tij,tj->ti", rotation, eyes)
    return poses


def template_camera(radius: float, size: int = 224, fov_degrees: float = 40.0) -> tuple[np.ndarray, float]:
    """K (3, 3) in pixels of a square picture, and the distance in metres at which it holds a sphere with some margin.

    Args:
        radius: of the sphere about the object, in metres.
        size: pixels of a side.
        fov_degrees: from the left edge of the picture to the right one.
    """
    if not radius > 0 or not np.isfinite(radius):
        raise ValueError(f"`radius` must be positive, got {radius:g}")
    if not 0 < fov_degrees < 180:
        raise ValueError(f"`fov_degrees` must lie between 0 and 180, got {fov_degrees:g}")
    half = np.radians(fov_degrees) / 2
    focal, middle = size / 2 / np.tan(half), (size - 1) / 2
    K = np.array([[focal, 0, middle], [0, focal, middle], [0, 0, 1]])
    return K, MARGIN * radius / np.sin(half)
