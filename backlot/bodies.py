"""Meshes made ready to be drawn, and the light on them: what the renderers of `backlot.mesh_views` share."""

# ruff: noqa: N803 - K is what everybody calls it
from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import trimesh

from backlot.rendering import Soup, Surface, by_corner, corner_normals, cross

GREY = (0.6, 0.6, 0.6)  # of a mesh without colours, sRGB


@dataclass(frozen=True)
class Light:
    """A far lamp and an even glow: a surface receives colour * (ambient + (1 - ambient) * cosine).

    Args:
        direction: (3,) towards the lamp, in the camera's axes; the lamp is behind the camera by default, so that a turn
            of the picture does not change its light.
        ambient: the glow's share, in [0, 1].
        colour: (3,) linear, 1 = white surfaces that face the lamp are white.
    """

    direction: tuple[float, float, float] = (0.0, 0.0, -1.0)
    ambient: float = 0.4
    colour: tuple[float, float, float] = (1.0, 1.0, 1.0)

    def __post_init__(self) -> None:
        if not 0 <= self.ambient <= 1:
            raise ValueError(f"`ambient` must lie between 0 and 1, got {self.ambient:g}")
        if not np.linalg.norm(self.direction) > 0:
            raise ValueError("`direction` of the light must not be zero")

    def towards(self) -> np.ndarray:
        """The unit vector (3,) towards the lamp."""
        return np.asarray(self.direction, np.float64) / np.linalg.norm(self.direction)

    def on(self, lambert: np.ndarray) -> np.ndarray:
        """Light (3, N) on surfaces with cosines (N,) to the lamp, shadows counted."""
        return np.asarray(self.colour, np.float32)[:, None] * (self.ambient + (1 - self.ambient) * lambert)


@dataclass(frozen=True, eq=False)
class Body:
    """A mesh made ready: `vertices` (P, 3), `faces` (F, 3), unit `normals` (F, 3), `curved` (F, 3, 3) at the corners,
    its `surface`, and whether it is `solid`: closed, and wound so that only faces that look at the camera are seen.
    """

    vertices: np.ndarray
    faces: np.ndarray
    normals: np.ndarray
    curved: np.ndarray
    surface: Surface
    solid: bool

    @classmethod
    def of(cls, mesh: trimesh.Trimesh) -> Body:
        if not isinstance(mesh, trimesh.Trimesh) or not len(mesh.faces):
            raise ValueError("a mesh has no triangles")
        if not np.isfinite(mesh.vertices).all():
            raise ValueError("a mesh has vertices that are not finite")
        soup = Soup.of([mesh], [GREY])
        curved = corner_normals(soup)
        return cls(soup.vertices, soup.faces, soup.normals, curved, Surface.of(mesh, GREY), is_solid(mesh))


def is_solid(mesh: trimesh.Trimesh) -> bool:
    """Whether every part of a mesh is closed and has its outside outside; vertices of one place count as one."""
    shape = trimesh.Trimesh(mesh.vertices, mesh.faces, process=True)
    if not (shape.is_watertight and shape.is_winding_consistent):
        return False
    part = trimesh.graph.connected_component_labels(shape.face_adjacency, node_count=len(shape.faces))
    a, b, c = by_corner(shape.vertices - shape.vertices.mean(axis=0), shape.faces)
    return bool((np.bincount(part, (a * cross(b, c)).sum(0)) > 0).all())


def finer(K: np.ndarray, supersample: int) -> np.ndarray:
    """K of a picture of the same view with this many times the pixels along a side."""
    shift = (supersample - 1) / 2
    return np.array([[supersample, 0, shift], [0, supersample, shift], [0, 0, 1]]) @ K
