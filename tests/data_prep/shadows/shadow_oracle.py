"""Shadow maps by planar projection: numpy and Pillow only, and none of the renderer's geometry.

For each point of a grid on the light, the triangles are thrown onto the floor, drawn into the picture, and counted with
the irradiance that this point of the light would have brought.
"""

from __future__ import annotations

import numpy as np
from PIL import Image, ImageDraw

DISTANCE = 8.0
FOV = 49.0


def camera_frame(distance: float) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Eye, right, up and forward of a camera at (0, -d, d / 2) that looks at (0, 0, 1/2)."""
    pitch = np.arctan2(distance / 2 - 0.5, distance)
    eye = np.array([0.0, -distance, distance / 2])
    forward = np.array([0.0, np.cos(pitch), -np.sin(pitch)])
    up = np.array([0.0, np.sin(pitch), np.cos(pitch)])
    return eye, np.array([1.0, 0.0, 0.0]), up, forward


def light_points(theta: float, phi: float, size: float, count: int) -> tuple[np.ndarray, np.ndarray]:
    """Centres of a count x count grid on the light (count^2, 3), and the normal of the light, toward the origin."""
    theta, phi = np.radians([theta, phi])
    # The light starts overhead with sides along x and y, is tilted about y, then turned about z.
    tilt = np.array([[np.cos(theta), 0, np.sin(theta)], [0, 1, 0], [-np.sin(theta), 0, np.cos(theta)]])
    turn = np.array([[np.cos(phi), -np.sin(phi), 0], [np.sin(phi), np.cos(phi), 0], [0, 0, 1]])
    steps = ((np.arange(count) + 0.5) / count - 0.5) * size
    flat = np.stack([*(axis.ravel() for axis in np.meshgrid(steps, steps)), np.full(count**2, DISTANCE)], axis=1)
    return flat @ (turn @ tilt).T, -(turn @ tilt)[:, 2]


def shadow_map(
    vertices: np.ndarray,
    faces: np.ndarray,
    *,
    theta: float,
    phi: float,
    size: float,
    distance: float,
    image_size: int,
    light_samples: int = 8,
    supersample: int = 2,
) -> np.ndarray:
    """(H, W) map in [0, 1] of a mesh that lies above z = 0 and below the whole of the light."""
    side = image_size * supersample
    focal = side / 2 / np.tan(np.radians(FOV) / 2)
    eye, right, up, forward = camera_frame(distance)
    rows, columns = np.mgrid[0:side, 0:side] + 0.5
    rays = forward + (columns[..., None] - side / 2) / focal * right - (rows[..., None] - side / 2) / focal * up
    on_floor = rays[..., 2] < -1e-9
    reach = np.where(on_floor, -eye[2] / np.where(on_floor, rays[..., 2], 1), 0)
    floor = eye + reach[..., None] * rays

    total, blocked = np.zeros((side, side)), np.zeros((side, side))
    points, normal = light_points(theta, phi, size, light_samples)
    for point in points:
        to_light = point - floor
        squared = (to_light**2).sum(axis=-1)
        irradiance = to_light[..., 2] * np.clip(-(to_light @ normal), 0, None) / squared**2
        shares = point[2] / (point[2] - vertices[:, 2:])
        local = point + shares * (vertices - point) - eye
        depth = local @ forward
        assert (depth > 0.1).all(), "the shadow reaches behind the camera"
        x = side / 2 + focal * (local @ right) / depth
        y = side / 2 - focal * (local @ up) / depth
        picture = Image.new("L", (side, side))
        draw = ImageDraw.Draw(picture)
        # Pillow counts pixels by their centres.
        for triangle in np.stack([x, y], axis=1)[faces] - 0.5:
            draw.polygon([tuple(corner) for corner in triangle], fill=1)
        total += irradiance
        blocked += irradiance * np.asarray(picture)
    shadow = np.where(on_floor, blocked / np.where(total > 1e-3 * total.max(), total, np.inf), 0)
    return shadow.reshape(image_size, supersample, image_size, supersample).mean(axis=(1, 3))


def rmse(a: np.ndarray, b: np.ndarray) -> float:
    return float(np.sqrt(np.mean((a - b) ** 2)))


def zncc(a: np.ndarray, b: np.ndarray) -> float:
    return float(np.corrcoef(a.ravel(), b.ravel())[0, 1])
