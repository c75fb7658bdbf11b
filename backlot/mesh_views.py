"""Pictures of objects from given poses: colours, metric depth, and which object each pixel sees.

Conventions: metres, OpenCV axes, `camera_from_object` poses; pixel (row i, column j) has its centre at u = j, v = i and
K is in pixels; depth is along the camera's z, 0 where there is nothing. Depth and objects are those at the pixels'
centres, colours are averages over what of a pixel is covered. The z-buffer needs no graphics card; `gl` is faster where
OpenGL can be had without a display.
"""

# ruff: noqa: N803 - K is what everybody calls it
from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import trimesh

from backlot import gl_views
from backlot.bodies import Body, Light, finer
from backlot.rendering import (
    NEAR,
    by_corner,
    edge_functions,
    mix,
    seen_from,
    to_bytes,
    to_srgb,
    z_buffer,
)

Backend = Literal["auto", "zbuffer", "gl"]
SHADOW_MAP = 768  # pixels of a side
PART = 16_384  # pixels that are shaded in one go: what the processor keeps close
SRGB_STEPS = 16_383


@dataclass(frozen=True, eq=False)
class Views:
    """V pictures: `rgb` (V, H, W, 3) uint8, black where nothing is seen; `depth` (V, H, W) float32 metres, 0 where
    nothing is seen; `instances` (V, H, W) int16, the object's number, -1 where there is none.
    """

    rgb: np.ndarray
    depth: np.ndarray
    instances: np.ndarray

    def masks(self, num_objects: int) -> np.ndarray:
        """The visible part of each object: (V, num_objects, H, W) bool."""
        return self.instances[:, None] == np.arange(num_objects)[:, None, None]


@dataclass(frozen=True, eq=False)
class Placed:
    """Bodies before a camera: `corners` (3, 3, F) in its axes, and of each triangle its body `owner` (F,), its number
    `face` (F,) there, and the `lambert` cosines (3, 1, F) and the unit normal `outward` (F, 3), on the camera's side.
    """

    corners: np.ndarray
    owner: np.ndarray
    face: np.ndarray
    lambert: np.ndarray
    outward: np.ndarray

    @classmethod
    def of(cls, bodies: Sequence[Body], poses: np.ndarray, light: Light, cull: bool) -> Placed:
        """Args:
        poses: `camera_from_object` (O, 4, 4).
        cull: leave out the triangles of solid bodies that look away.
        """
        parts, towards = [], light.towards()
        for number, (body, pose) in enumerate(zip(bodies, poses, strict=True)):
            rotation = pose[:3, :3]
            corners = by_corner(body.vertices @ rotation.T + pose[:3, 3], body.faces)
            normals = body.normals @ rotation.T
            away = (normals.T * corners[0]).sum(0) > 0
            kept = np.arange(len(away))
            if cull and body.solid and corners[:, 2].min() > NEAR:
                kept = np.flatnonzero(~away)
            sign = np.where(away[kept], -1.0, 1.0)[:, None]
            lambert = np.maximum(sign * (body.curved[kept] @ (towards @ rotation)), 0)
            owner = np.full(len(kept), number, np.int16)
            parts.append((corners[..., kept].transpose(2, 0, 1), owner, kept, lambert, sign * normals[kept]))
        corners, owner, face, lambert, outward = (np.concatenate(each) for each in zip(*parts, strict=True))
        lambert = np.ascontiguousarray(lambert.T[:, None], np.float32)
        return cls(np.ascontiguousarray(corners.transpose(1, 2, 0)), owner, face, lambert, outward)

    def in_pixels(self, K: np.ndarray) -> np.ndarray:
        """Corners (3, 3, F) as (column * w, row * w, w), w their depth."""
        return K @ self.corners


def render_views(
    meshes: Sequence[trimesh.Trimesh],
    camera_from_object: np.ndarray,
    K: np.ndarray,
    size: tuple[int, int],
    *,
    light: Light | Sequence[Light] | None = None,
    supersample: int = 2,
    shadows: bool = False,
    backend: Backend = "auto",
) -> Views:
    """Pictures of objects, in their own textures or colours, or grey.

    Args:
        meshes: O of them, in metres; both sides of a triangle are seen.
        camera_from_object: (V, O, 4, 4) rigid.
        K: (3, 3) or (V, 3, 3), in pixels; integer coordinates are pixels' centres.
        size: (height, width).
        light: of all views, or one of each; white and behind the camera by default.
        supersample: colours are averages of this many squared rays.
        shadows: what the lamp does not reach past all these meshes has the glow alone. Only the z-buffer casts them.
        backend: `auto` is `gl` where it can be had and there are no shadows.

    Raises:
        ValueError: shapes that do not fit, a mesh without triangles, or `gl` is asked for and cannot be had.
    """
    poses, Ks = check_cameras(meshes, camera_from_object, K, size)
    if supersample < 1:
        raise ValueError(f"`supersample` must be at least 1, got {supersample}")
    lights = [light or Light()] * len(poses) if light is None or isinstance(light, Light) else list(light)
    if len(lights) != len(poses):
        raise ValueError(f"`light` has {len(lights)} entries for {len(poses)} views")
    draw = choose_backend(backend, shadows)([Body.of(mesh) for mesh in meshes], size, supersample)
    rgb = np.zeros((len(poses), *size, 3), np.uint8)
    depth, instances = np.zeros((len(poses), *size), np.float32), np.full((len(poses), *size), -1, np.int16)
    for view, (pose, intrinsics, lamp) in enumerate(zip(poses, Ks, lights, strict=True)):
        colors, covered, depth[view], instances[view] = draw(pose, intrinsics, lamp)
        rgb[view] = develop(colors, covered, instances[view] >= 0, supersample)
    return Views(rgb, depth, instances)


def instance_masks(
    meshes: Sequence[trimesh.Trimesh], camera_from_object: np.ndarray, K: np.ndarray, size: tuple[int, int]
) -> np.ndarray:
    """Where each object would be seen if the others were not there: (V, O, H, W) bool; arguments of `render_views`."""
    poses, Ks = check_cameras(meshes, camera_from_object, K, size)
    bodies, light = [Body.of(mesh) for mesh in meshes], Light()
    result = np.zeros((*poses.shape[:2], *size), bool)
    for view, (pose, intrinsics) in enumerate(zip(poses, Ks, strict=True)):
        for number, body in enumerate(bodies):
            placed = Placed.of([body], pose[number : number + 1], light, cull=True)
            result[view, number] = (z_buffer(placed.in_pixels(intrinsics), None, size)[1] >= 0).reshape(size)
    return result


def check_cameras(
    meshes: Sequence[trimesh.Trimesh], camera_from_object: np.ndarray, K: np.ndarray, size: tuple[int, int]
) -> tuple[np.ndarray, np.ndarray]:
    """Poses (V, O, 4, 4) and intrinsics (V, 3, 3) of all views, as float64."""
    poses, K = np.asarray(camera_from_object, np.float64), np.asarray(K, np.float64)
    if poses.ndim != 4 or poses.shape[1:] != (len(meshes), 4, 4) or not len(meshes):
        raise ValueError(f"`camera_from_object` must be (V, {len(meshes)}, 4, 4) with an object, got {poses.shape}")
    if K.shape not in ((3, 3), (len(poses), 3, 3)):
        raise ValueError(f"`K` must be (3, 3) or ({len(poses)}, 3, 3), got {K.shape}")
    if min(size) < 1:
        raise ValueError(f"`size` must be at least 1 by 1, got {size}")
    return poses, np.broadcast_to(K, (len(poses), 3, 3))


def choose_backend(backend: Backend, shadows: bool) -> type:
    """The class that draws."""
    if backend not in ("auto", "zbuffer", "gl"):
        raise ValueError(f"`backend` must be auto, zbuffer or gl, got {backend!r}")
    if backend == "gl" and shadows:
        raise ValueError("`shadows` need the backend zbuffer")
    if backend == "gl" and (problem := gl_views.problem()):
        raise ValueError(f"`backend` gl cannot be used: {problem}")
    if backend == "gl" or (backend == "auto" and not shadows and not gl_views.problem()):
        return gl_views.GLDrawer
    return functools.partial(ZBufferDrawer, shadows=shadows)


def develop(colors: np.ndarray, covered: np.ndarray, seen: np.ndarray, supersample: int) -> np.ndarray:
    """sRGB bytes (H, W, 3) from linear colours (3, H s, W s), 0 where not `covered` (H s, W s); black where not `seen`
    (H, W)."""
    offsets = [(row, column) for row in range(supersample) for column in range(supersample)]
    total = sum(colors[:, row::supersample, column::supersample] for row, column in offsets)
    count = sum(covered[row::supersample, column::supersample].astype(np.float32) for row, column in offsets)
    mean = np.where(seen, np.minimum(total / np.maximum(count, 1), 1), 0)
    return np.ascontiguousarray(srgb_bytes().take((mean * SRGB_STEPS + 0.5).astype(np.int32)).transpose(1, 2, 0))


@functools.cache
def srgb_bytes() -> np.ndarray:
    """sRGB bytes of linear light in even steps."""
    return to_bytes(to_srgb(np.arange(SRGB_STEPS + 1) / SRGB_STEPS))


class ZBufferDrawer:
    """Draws bodies with the z-buffer of `backlot.rendering`."""

    def __init__(self, bodies: Sequence[Body], size: tuple[int, int], supersample: int, *, shadows: bool) -> None:
        self.bodies, self.size, self.supersample, self.shadows = bodies, size, supersample, shadows

    def __call__(
        self, poses: np.ndarray, K: np.ndarray, light: Light
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
        """One view.

        Args:
            poses: (O, 4, 4).

        Returns:
            Linear colours (3, H s, W s) and which of them are covered (H s, W s); depth and instances (H, W).
        """
        s = self.supersample
        placed = Placed.of(self.bodies, poses, light, cull=not self.shadows)
        nearness, face = z_buffer(placed.in_pixels(K), None, self.size)
        hit = face >= 0
        depth = np.where(hit, 1 / np.where(hit, nearness, 1), 0).reshape(self.size)
        instances = np.where(hit, placed.owner[face], -1).reshape(self.size)
        fine_size, fine_K = (self.size[0] * s, self.size[1] * s), finer(K, s)
        if s > 1:
            nearness, face = z_buffer(placed.in_pixels(fine_K), None, fine_size)
        colors = self.shade(placed, fine_K, face, nearness, fine_size, light)
        return colors.reshape(3, *fine_size), (face >= 0).reshape(fine_size), depth, instances

    def shade(
        self, placed: Placed, K: np.ndarray, face: np.ndarray, nearness: np.ndarray, size: tuple[int, int], light: Light
    ) -> np.ndarray:
        """Linear colours (3, H W) of the pixels that see triangles `face` (H W,), 0 where that is -1."""
        colors = np.zeros((3, len(face)), np.float32)
        lines, determinant = edge_functions(placed.in_pixels(K))
        with np.errstate(divide="ignore", invalid="ignore"):  # seen from its edge, and so not seen
            planes = (lines[:2] / determinant).reshape(6, -1)
        seen = np.flatnonzero(face >= 0)
        reached = self.reached(placed, K, seen, face, nearness, size, light)
        for pixel, share in zip(in_parts(seen), in_parts(reached), strict=True):
            which = face.take(pixel)
            row, column = np.divmod(pixel, size[1])
            depth = 1 / nearness.take(pixel)
            a, b, c, d, e, f = planes.take(which, axis=1)
            weights = np.empty((3, len(pixel)), np.float32)
            weights[0] = (a * column + b * row + c) * depth
            weights[1] = (d * column + e * row + f) * depth
            weights[2] = 1 - weights[0] - weights[1]
            lambert = mix(weights, placed.lambert, which)[0] * share
            shaded = self.albedo(placed, which, weights) * light.on(lambert)
            for channel, values in zip(colors, shaded, strict=True):
                channel[pixel] = values
        return colors

    def albedo(self, placed: Placed, which: np.ndarray, weights: np.ndarray) -> np.ndarray:
        """Linear colours (3, N) of points of triangles (N,), which weigh their corners so (3, N)."""
        face, owner = placed.face.take(which), placed.owner.take(which)
        if len(self.bodies) == 1:
            return self.bodies[0].surface.at(face, weights)
        result = np.empty((3, len(which)), np.float32)
        for number in np.unique(owner):
            mine = np.flatnonzero(owner == number)
            result[:, mine] = self.bodies[number].surface.at(face[mine], weights[:, mine])
        return result

    def reached(
        self,
        placed: Placed,
        K: np.ndarray,
        seen: np.ndarray,
        face: np.ndarray,
        nearness: np.ndarray,
        size: tuple[int, int],
        light: Light,
    ) -> np.ndarray:
        """Share (N,) of the lamp's light that reaches what the pixels `seen` (N,) see; 1 without shadows."""
        if not self.shadows or not len(seen):
            return np.ones(len(seen), np.float32)
        low, high = placed.corners.min(axis=(0, 2)), placed.corners.max(axis=(0, 2))
        centre = (low + high) / 2
        texel = 2.04 * float(np.linalg.norm(high - centre)) / SHADOW_MAP + 1e-9
        row, column = np.divmod(seen, size[1])
        rays = np.stack([column, row, np.ones(len(seen))], axis=1) @ np.linalg.inv(K).T
        points = rays / nearness[seen, None] - centre + 1.5 * texel * placed.outward[face[seen]]
        corners = placed.corners - centre[:, None]
        return seen_from(light.towards(), corners, points, texel, SHADOW_MAP).astype(np.float32)


def in_parts(values: np.ndarray) -> list[np.ndarray]:
    return [values[start : start + PART] for start in range(0, len(values), PART)]
