"""Families of shapes for made scenes. A shape fills the cube [-.5, .5]^3, z up, and touches all of its six sides.

Each is both a solid, `occupied(points)`, and a closed surface, `mesh()`. Nothing is thinner than a seventh of the cube,
so that grids of 16^3 still show it.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import trimesh

SECTIONS = 32  # around a turned shape; a multiple of 4, so that it touches the cube's sides
CURVE = 7  # points of a curved profile


class Solid(Protocol):
    def occupied(self, points: np.ndarray) -> np.ndarray: ...

    def mesh(self) -> trimesh.Trimesh: ...


@dataclass(frozen=True, eq=False)
class Shape:
    """A shape of a family. `top` is the outline of its flat upper side, `square` or `round`, None if there is none."""

    family: str
    solid: Solid
    top: str | None = None

    def occupied(self, points: np.ndarray) -> np.ndarray:
        """Which of the points (..., 3) lie in it."""
        return self.solid.occupied(points)

    def mesh(self) -> trimesh.Trimesh:
        """Its surface, watertight, normals outwards."""
        return self.solid.mesh()


def occupancy(shape: Shape, resolution: int, aspect: Sequence[float] = (1, 1, 1)) -> np.ndarray:
    """Which voxels' centres lie in the shape: bool (R, R, R), axes x, y, z, centres (i + .5) / R - .5.

    Args:
        aspect: sides of the box about the middle of the cube that the shape fills.
    """
    return shape.occupied(voxel_centres(resolution) / np.asarray(aspect, np.float64))


@functools.cache
def voxel_centres(resolution: int) -> np.ndarray:
    """(R, R, R, 3)."""
    centres = (np.arange(resolution) + 0.5) / resolution - 0.5
    points = np.stack(np.meshgrid(centres, centres, centres, indexing="ij"), axis=-1)
    points.flags.writeable = False
    return points


# --- kinds of solids ------------------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class Blocks:
    """Cells of a grid: `cells` (X, Y, Z) bool between the `cuts` along the three axes, from -.5 to .5 each."""

    cuts: tuple[np.ndarray, np.ndarray, np.ndarray]
    cells: np.ndarray

    def occupied(self, points: np.ndarray) -> np.ndarray:
        inside = (np.abs(points) <= 0.5).all(axis=-1)
        places = [np.searchsorted(cut[1:-1], points[..., axis]) for axis, cut in enumerate(self.cuts)]
        return inside & self.cells[tuple(places)]

    def mesh(self) -> trimesh.Trimesh:
        padded = np.pad(self.cells, 1)
        quads = []
        for axis in range(3):
            before = np.roll(padded, 1, axis)
            for full, empty, order in ((padded, before, (0, 3, 2, 1)), (before, padded, (0, 1, 2, 3))):
                corner = np.argwhere(full & ~empty) - 1  # of the side between a cell and the one before it
                steps = np.zeros((4, 3), np.int64)
                steps[1:3, (axis + 1) % 3], steps[2:4, (axis + 2) % 3] = 1, 1
                quads.append((corner[:, None] + steps)[:, order])
        quads = np.concatenate(quads)
        numbers, index = np.unique(np.ravel_multi_index(np.moveaxis(quads, -1, 0), padded.shape), return_inverse=True)
        vertices = np.unravel_index(numbers, padded.shape)
        corners = np.stack([cut[place] for cut, place in zip(self.cuts, vertices, strict=True)], axis=1)
        return surface(corners, split(index.reshape(-1, 4)))


@dataclass(frozen=True, eq=False)
class Loft:
    """From the cube's bottom straight to a rectangle `top` (x0, x1, y0, y1) within its top."""

    top: tuple[float, float, float, float]

    def occupied(self, points: np.ndarray) -> np.ndarray:
        x, y, z = np.moveaxis(points, -1, 0)
        up = z + 0.5
        x0, x1, y0, y1 = (
            side * (1 - up) + end * up for side, end in zip((-0.5, 0.5, -0.5, 0.5), self.top, strict=True)
        )
        return (np.abs(z) <= 0.5) & (x0 <= x) & (x <= x1) & (y0 <= y) & (y <= y1)

    def mesh(self) -> trimesh.Trimesh:
        x0, x1, y0, y1 = self.top
        bottom = [(-0.5, -0.5, -0.5), (0.5, -0.5, -0.5), (0.5, 0.5, -0.5), (-0.5, 0.5, -0.5)]
        vertices = [*bottom, (x0, y0, 0.5), (x1, y0, 0.5), (x1, y1, 0.5), (x0, y1, 0.5)]
        sides = [(i, (i + 1) % 4, (i + 1) % 4 + 4, i + 4) for i in range(4)]
        return surface(np.array(vertices), split(np.array([(3, 2, 1, 0), (4, 5, 6, 7), *sides])))


@dataclass(frozen=True, eq=False)
class Turned:
    """Turned about z: what lies between two profiles of points (radius, height), from height -.5 up to .5 each."""

    outer: np.ndarray
    inner: np.ndarray

    def occupied(self, points: np.ndarray) -> np.ndarray:
        z, radius = points[..., 2], np.hypot(points[..., 0], points[..., 1])
        outer, inner = (np.interp(z, profile[:, 1], profile[:, 0]) for profile in (self.outer, self.inner))
        return (np.abs(z) <= 0.5) & (inner <= radius) & (radius <= outer)

    def mesh(self) -> trimesh.Trimesh:
        outline = np.concatenate([self.outer, self.inner[::-1]])  # up outside, down inside
        outline = outline[(outline != np.roll(outline, 1, axis=0)).any(axis=1)]
        turn = 2 * np.pi * np.arange(SECTIONS) / SECTIONS
        circle = np.stack([np.cos(turn), np.sin(turn)], axis=1).round(12)
        rings = np.concatenate(
            [outline[:, None, :1] * circle, np.repeat(outline[:, None, 1:], SECTIONS, axis=1)], axis=2
        )
        point = outline[:, :1] == 0  # of the axis: a ring of one vertex
        kept = ~point | (np.arange(SECTIONS) == 0)
        lower = np.cumsum(kept).reshape(kept.shape) - 1
        lower = np.where(point, lower[:, :1], lower)
        upper = np.roll(lower, -1, axis=0)
        faces = split(np.stack([lower, np.roll(lower, -1, 1), np.roll(upper, -1, 1), upper], axis=-1).reshape(-1, 4))
        on_axis = (faces == np.roll(faces, 1, axis=1)).any(axis=1)  # two corners are one
        return surface(rings[kept], faces[~on_axis])


@dataclass(frozen=True, eq=False)
class Superquadric:
    """(|2x|^around + |2y|^around)^(along / around) + |2z|^along <= 1."""

    around: float
    along: float

    def _norm(self, points: np.ndarray) -> np.ndarray:
        x, y, z = np.moveaxis(np.abs(2 * points), -1, 0)
        level = (x**self.around + y**self.around) ** (self.along / self.around) + z**self.along
        return level ** (1 / self.along)

    def occupied(self, points: np.ndarray) -> np.ndarray:
        return self._norm(points) <= 1

    def mesh(self) -> trimesh.Trimesh:
        vertices, faces = sphere()
        return surface(vertices / self._norm(vertices)[:, None], faces)


@functools.cache
def sphere() -> tuple[np.ndarray, np.ndarray]:
    """Vertices, among them those on the axes, and faces."""
    mesh = trimesh.creation.icosphere(subdivisions=3)
    return np.array(mesh.vertices), np.array(mesh.faces)


def split(quads: np.ndarray) -> np.ndarray:
    """Two triangles of each quad."""
    return np.concatenate([quads[:, [0, 1, 2]], quads[:, [0, 2, 3]]])


def surface(vertices: np.ndarray, faces: np.ndarray) -> trimesh.Trimesh:
    return trimesh.Trimesh(vertices, faces, process=False, validate=False)


# --- families -------------------------------------------------------------------------------------------------------


def turned_by_quarters(cells: np.ndarray, cuts: list[np.ndarray], quarters: int) -> Blocks:
    for _ in range(quarters):
        cells, cuts = np.rot90(cells), [-cuts[1][::-1], cuts[0], cuts[2]]
    return Blocks(tuple(cuts), np.ascontiguousarray(cells))


def cut(*inner: float) -> np.ndarray:
    return np.array([-0.5, *inner, 0.5])


def box(rng: np.random.Generator) -> Blocks:
    return Blocks((cut(), cut(), cut()), np.ones((1, 1, 1), bool))


def step(rng: np.random.Generator) -> Blocks:
    """Two stairs."""
    cells = np.array([[[True, True]], [[True, False]]])
    return turned_by_quarters(
        cells, [cut(rng.uniform(-0.2, 0.15)), cut(), cut(rng.uniform(-0.2, 0.15))], rng.integers(4)
    )


def table(rng: np.random.Generator) -> Blocks:
    """A plate on four legs."""
    leg, plate = rng.uniform(0.2, 0.3), rng.uniform(0.2, 0.35)
    sides = cut(-0.5 + leg, 0.5 - leg)
    cells = np.ones((3, 3, 2), bool)
    cells[1, :, 0] = cells[:, 1, 0] = False
    return Blocks((sides, sides, cut(0.5 - plate)), cells)


def arch(rng: np.random.Generator) -> Blocks:
    """A gate: a plate on two walls."""
    wall, plate = rng.uniform(0.2, 0.32), rng.uniform(0.22, 0.4)
    cells = np.array([[[True, True]], [[False, True]], [[True, True]]])
    return turned_by_quarters(cells, [cut(-0.5 + wall, 0.5 - wall), cut(), cut(0.5 - plate)], rng.integers(2))


def pyramid(rng: np.random.Generator) -> Loft:
    end = rng.uniform(0.02, 0.12)
    return Loft((-end, end, -end, end))


def wedge(rng: np.random.Generator) -> Loft:
    """A ramp up to one of the four sides."""
    end = rng.uniform(0.03, 0.2)
    tops = [(0.5 - end, 0.5, -0.5, 0.5), (-0.5, 0.5, 0.5 - end, 0.5)]
    tops += [(-0.5, end - 0.5, -0.5, 0.5), (-0.5, 0.5, -0.5, end - 0.5)]
    return Loft(tops[rng.integers(4)])


def turned(radii: Sequence[float], heights: Sequence[float]) -> Turned:
    """Without a hollow."""
    return Turned(np.column_stack([radii, heights]), np.array([[0, -0.5], [0, 0.5]]))


def quarter_arc() -> tuple[np.ndarray, np.ndarray]:
    """Sines and cosines from 0 to a right angle."""
    turn = np.linspace(0, np.pi / 2, CURVE)
    return np.sin(turn).round(12), np.cos(turn).round(12)


def cylinder(rng: np.random.Generator) -> Turned:
    return turned([0.5, 0.5], cut())


def cone(rng: np.random.Generator) -> Turned:
    return turned([0.5, rng.uniform(0.05, 0.12)], cut())


def dome(rng: np.random.Generator) -> Turned:
    """Half an ellipsoid on a wall."""
    sine, cosine = quarter_arc()
    wall = rng.uniform(0.05, 0.3)
    return turned(np.r_[0.5, 0.5 * cosine], np.r_[-0.5, 0.5 - (1 - wall) * (1 - sine)])


def capsule(rng: np.random.Generator) -> Turned:
    """Rounded at both ends."""
    sine, cosine = quarter_arc()
    end = rng.uniform(0.15, 0.4)
    heights = 0.5 - end * (1 - sine)
    return turned(0.5 * np.r_[cosine[::-1], cosine], np.r_[-heights[::-1], heights])


def ring(rng: np.random.Generator) -> Turned:
    """A torus that lies flat."""
    sine, cosine = quarter_arc()
    half = rng.uniform(0.15, 0.19)
    heights, bulge = 0.5 * np.r_[-sine[:0:-1], sine], half * np.r_[cosine[:0:-1], cosine]
    return Turned(*(np.column_stack([0.5 - half + side * bulge, heights]) for side in (1, -1)))


def bowl(rng: np.random.Generator) -> Turned:
    """Hollow from above."""
    sine, cosine = quarter_arc()
    foot, rim, depth = rng.uniform(0.3, 0.42), rng.uniform(0.15, 0.2), rng.uniform(0.5, 0.72)
    hollow = np.column_stack([np.r_[0, (0.5 - rim) * sine], np.r_[-0.5, 0.5 - depth * cosine]])
    return Turned(np.array([[foot, -0.5], [0.5, 0.5]]), hollow)


def superquadric(rng: np.random.Generator) -> Superquadric:
    return Superquadric(*rng.uniform(1.6, 3.0, 2))


FAMILIES: dict[str, Callable[[np.random.Generator], Solid]] = {
    family.__name__: family
    for family in (box, cylinder, cone, superquadric, pyramid, wedge, capsule, dome, ring, bowl, step, table, arch)
}
FLAT_TOPS = {"box": "square", "cylinder": "round", "table": "square", "arch": "square"}


def random_shape(family: str, rng: np.random.Generator) -> Shape:
    """A shape of a family of `FAMILIES`, its proportions drawn at random."""
    return Shape(family, FAMILIES[family](rng), FLAT_TOPS.get(family))
