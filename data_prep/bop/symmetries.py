"""The symmetries of an object as a set of transforms, by the convention of the BOP toolkit."""

from __future__ import annotations

import math
from collections.abc import Mapping

import numpy as np
from scipy.spatial.transform import Rotation

METRES_PER_MM = 0.001
MAX_STEP = 0.01
"""Of a continuous symmetry: the arc that the farthest point moves, as a share of the diameter."""
ORTHONORMAL = 1e-3


def symmetry_set(model_info: Mapping[str, object], max_step: float = MAX_STEP) -> np.ndarray:
    """All G with which the object looks the same: camera_from_object and camera_from_object @ G are one pose.

    Each discrete symmetry, the identity among them, is followed by each step of a continuous one, as in the toolkit;
    but the set begins with the identity, which the toolkit leaves out beside continuous symmetries.

    Args:
        model_info: of one object in models_info.json: `symmetries_discrete`, 4x4 matrices, row-major, and
            `symmetries_continuous`, each an `axis` and an `offset`; lengths in millimetres. Both may be missing.
        max_step: an axis is cut into ceil(pi / max_step) steps.

    Returns:
        (S, 4, 4) float64, translations in metres.

    Raises:
        ValueError: a matrix is no rigid transform, or an axis has no direction.
    """
    if not 0 < max_step <= math.pi:
        raise ValueError(f"`max_step` must be in (0, pi], got {max_step}")
    discrete = [np.eye(4), *map(read_transform, model_info.get("symmetries_discrete", ()))]
    continuous = [turn for axis in model_info.get("symmetries_continuous", ()) for turn in turns(axis, max_step)]
    # the identity of every axis after the first would only repeat the discrete symmetries
    steps = np.stack([np.eye(4), *continuous])
    transforms = (steps[None] @ np.stack(discrete)[:, None]).reshape(-1, 4, 4)
    transforms[:, :3, 3] *= METRES_PER_MM
    return transforms


def read_transform(values: object) -> np.ndarray:
    """(4, 4) of 16 numbers; ValueError if it is no rigid transform."""
    matrix = np.asarray(values, np.float64)
    if matrix.size != 16:
        raise ValueError(f"a discrete symmetry must have 16 numbers, got {matrix.size}")
    matrix = matrix.reshape(4, 4)
    if not is_rotation(matrix[:3, :3]) or not np.allclose(matrix[3], (0, 0, 0, 1)):
        raise ValueError(f"a discrete symmetry must be a rotation and a translation, got {matrix.tolist()}")
    return matrix


def turns(symmetry: Mapping[str, object], max_step: float) -> np.ndarray:
    """(n - 1, 4, 4): the steps about an axis through an offset, all but the identity."""
    axis, offset = (np.asarray(symmetry[name], np.float64).reshape(-1) for name in ("axis", "offset"))
    length = np.linalg.norm(axis)
    if axis.shape != (3,) or offset.shape != (3,) or not 0 < length < math.inf:
        raise ValueError(f"a continuous symmetry must have an axis and an offset of 3 numbers, got {dict(symmetry)}")
    count = math.ceil(math.pi / max_step)
    angles = np.arange(1, count) * (2 * math.pi / count)
    transforms = np.tile(np.eye(4), (count - 1, 1, 1))
    transforms[:, :3, :3] = Rotation.from_rotvec(angles[:, None] * (axis / length)).as_matrix()
    transforms[:, :3, 3] = offset - transforms[:, :3, :3] @ offset
    return transforms


def is_rotation(matrix: np.ndarray) -> bool:
    """Whether (..., 3, 3) are rotations, each entry of R R^T within a thousandth of the identity's."""
    is_orthonormal = np.abs(matrix @ matrix.swapaxes(-1, -2) - np.eye(3)).max() < ORTHONORMAL
    return bool(is_orthonormal and (np.linalg.det(matrix) > 0).all())
