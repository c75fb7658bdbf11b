"""Drawn CAD models: closed surfaces in vivid vertex colours, from which one picture tells the pose, and symmetric ones.

An object is a function of (seed, number): number picks the family, and both everything else. Other seeds give other
objects of the same families. Shapes and colours of a symmetric object are made of functions that are averaged over its
symmetry group, on meshes that the group maps onto themselves, so that a symmetry moves each vertex onto another one of
the same colour. The z axis is that of every symmetry of more than half a turn.
"""

from __future__ import annotations

import colorsys
import functools
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import trimesh
from scipy.spatial import ConvexHull
from scipy.spatial.distance import pdist

from backlot.samples import derive_seed

MAX_VERTICES = 2562
RINGS, SEGMENTS = 40, 60  # of a turned surface; 60 so that turns of 2, 3, 4, 5 and 6 fit
CUBE_CELLS = 14  # along an edge of the cube
DIAMETERS = (0.08, 0.13)  # metres
PALETTE_SIZE = 8
NUM_CELLS, NUM_SPOTS = (26, 44), (14, 30)  # on a whole surface; a symmetric one shows them once per turn
FLIP = np.diag([1.0, -1.0, -1.0])  # half a turn about x


@dataclass(frozen=True, eq=False)
class Draft:
    """A surface that is not yet scaled or painted.

    Attributes:
        vertices: (V, 3).
        faces: (F, 3), normals outwards.
        group: (G, 3, 3) rotations that map the surface onto itself, the identity first.
        turned: whether every rotation about z does, too; the colours are then those of the profile.
    """

    vertices: np.ndarray
    faces: np.ndarray
    group: np.ndarray
    turned: bool = False


Family = Callable[[np.random.Generator], Draft]


def make_object(seed: int, number: int, *, symmetric: bool = False) -> tuple[trimesh.Trimesh, dict]:
    """One object, centred, with its entry of BOP's models_info.json.

    Args:
        seed: of the set of objects.
        number: of the object in the set; the families take turns.
        symmetric: from the families with symmetries, not from those without.

    Returns:
        The mesh in metres, `visual.vertex_colors` its sRGB albedo; and diameter, bounds and symmetries in millimetres.
    """
    rng = np.random.default_rng(derive_seed(seed, number, int(symmetric)))
    families = SYMMETRIC_FAMILIES if symmetric else FAMILIES
    draft = families[number % len(families)](rng)
    points = centred(draft)
    points *= rng.uniform(*DIAMETERS) / diameter(points)
    colors = np.rint(255 * paint(points, draft, rng)).astype(np.uint8)
    mesh = trimesh.Trimesh(points, draft.faces, vertex_colors=colors, process=False)
    return mesh, model_info(points, draft)


def make_objects(
    seed: int, count: int, num_symmetric: int = 0, first_id: int = 1
) -> tuple[dict[int, trimesh.Trimesh], dict[int, dict]]:
    """Meshes and entries of models_info.json by object id, for `write_models`.

    Args:
        count: of the objects, with ids from `first_id` on.
        num_symmetric: how many of them have symmetries; these have the last ids.
    """
    if not 0 <= num_symmetric <= count:
        raise ValueError(f"`num_symmetric` must lie between 0 and `count`, {count}, got {num_symmetric}")
    plain = [make_object(seed, number) for number in range(count - num_symmetric)]
    even = [make_object(seed, number, symmetric=True) for number in range(num_symmetric)]
    made = dict(enumerate(plain + even, first_id))
    return {key: mesh for key, (mesh, _) in made.items()}, {key: info for key, (_, info) in made.items()}


def centred(draft: Draft) -> np.ndarray:
    """The vertices with the middle of their bounds at the origin, moved along axes of symmetry only."""
    offset = (draft.vertices.min(0) + draft.vertices.max(0)) / 2
    shared = np.mean(draft.group, axis=0) * np.where(draft.turned, np.diag([0.0, 0.0, 1.0]), 1.0)
    return draft.vertices - shared @ offset


def diameter(points: np.ndarray) -> float:
    """The largest distance between two of the points (N, 3)."""
    return float(pdist(points[ConvexHull(points).vertices]).max())


def model_info(points: np.ndarray, draft: Draft) -> dict:
    """The entry of models_info.json of vertices (V, 3) in metres, in millimetres."""
    low, high = 1000 * points.min(0), 1000 * points.max(0)
    info = {"diameter": 1000 * diameter(points)}
    info |= {f"min_{axis}": float(value) for axis, value in zip("xyz", low, strict=True)}
    info |= {f"size_{axis}": float(value) for axis, value in zip("xyz", high - low, strict=True)}
    if len(draft.group) > 1:
        poses = np.tile(np.eye(4), (len(draft.group) - 1, 1, 1))
        poses[:, :3, :3] = draft.group[1:]
        info["symmetries_discrete"] = poses.reshape(-1, 16).tolist()
    if draft.turned:
        info["symmetries_continuous"] = [{"axis": [0, 0, 1], "offset": [0, 0, 0]}]
    return info


# --- symmetry groups and the meshes that have them ------------------------------------------------------------------


def rotation_group(order: int, flip: bool = False) -> np.ndarray:
    """Turns by 1 / order about z, and with `flip` also half a turn about x: (order or 2 order, 3, 3)."""
    angles = 2 * np.pi * np.arange(order) / order
    cos, sin, zero, one = np.cos(angles), np.sin(angles), np.zeros(order), np.ones(order)
    turns = np.stack([cos, -sin, zero, sin, cos, zero, zero, zero, one], axis=1).reshape(-1, 3, 3)
    return np.concatenate([turns, turns @ FLIP]) if flip else turns


@functools.cache
def icosphere() -> tuple[np.ndarray, np.ndarray]:
    sphere = trimesh.creation.icosphere(subdivisions=4)
    return np.asarray(sphere.vertices), np.asarray(sphere.faces)


@functools.cache
def crossed_cube() -> tuple[np.ndarray, np.ndarray]:
    """The surface of [-1, 1]^3 in a grid of squares, each cut along both diagonals: rotations of the cube keep it."""
    steps = np.linspace(-1, 1, CUBE_CELLS + 1)
    corner = np.stack(np.meshgrid(steps, steps, indexing="ij"), axis=-1)
    middle = (corner[:-1, :-1] + corner[1:, 1:]) / 2
    a, b = np.arange((CUBE_CELLS + 1) ** 2).reshape(CUBE_CELLS + 1, -1), np.arange(CUBE_CELLS**2)
    b = b.reshape(CUBE_CELLS, -1) + a.size
    ring = [a[:-1, :-1], a[1:, :-1], a[1:, 1:], a[:-1, 1:]]
    square = np.concatenate([np.stack([ring[k], ring[(k + 1) % 4], b], axis=-1).reshape(-1, 3) for k in range(4)])
    flat = np.concatenate([corner.reshape(-1, 2), middle.reshape(-1, 2)])
    points, faces = [], []
    for axis in range(3):
        for side in (1.0, -1.0):
            sheet = np.empty((len(flat), 3))
            sheet[:, axis] = side
            sheet[:, [(axis + 1) % 3, (axis + 2) % 3]] = flat
            faces.append((square if side > 0 else square[:, ::-1]) + len(flat) * len(points))
            points.append(sheet)
    points, faces = np.concatenate(points), np.concatenate(faces)
    _, first, index = np.unique(np.rint(points * 4 * CUBE_CELLS), axis=0, return_index=True, return_inverse=True)
    return points[first], index.reshape(-1)[faces]


@functools.cache
def turned_faces() -> np.ndarray:
    """Faces of RINGS rings of SEGMENTS vertices each from bottom to top, then the lowest and the highest point."""
    grid = np.arange(RINGS * SEGMENTS).reshape(RINGS, SEGMENTS)
    beside = np.roll(grid, -1, axis=1)
    bottom, top = np.full(SEGMENTS, grid.size), np.full(SEGMENTS, grid.size + 1)
    parts = [
        (grid[:-1], beside[:-1], beside[1:]),
        (grid[:-1], beside[1:], grid[1:]),
        (bottom, beside[0], grid[0]),
        (top, grid[-1], beside[-1]),
    ]
    return np.concatenate([np.stack(part, axis=-1).reshape(-1, 3) for part in parts])


def turn(profile: np.ndarray, lobes: Callable[[np.ndarray, np.ndarray], np.ndarray] | None = None) -> np.ndarray:
    """The vertices of `turned_faces` on a profile turned about z.

    Args:
        profile: (RINGS + 2, 2) radius and height from bottom to top; both ends are on the axis.
        lobes: factor of the radius at (angle (SEGMENTS,), height (RINGS, 1)).
    """
    angles = 2 * np.pi * np.arange(SEGMENTS) / SEGMENTS
    radius, height = profile[1:-1, :1], profile[1:-1, 1:]
    radius = radius * (lobes(angles, height) if lobes else np.ones(SEGMENTS))
    rings = np.stack([radius * np.cos(angles), radius * np.sin(angles), height + 0 * angles], axis=-1)
    ends = np.column_stack([np.zeros((2, 2)), profile[[0, -1], 1]])
    return np.concatenate([rings.reshape(-1, 3), ends])


def draw_profile(rng: np.random.Generator, flip: bool) -> np.ndarray:
    """Radius and height (RINGS + 2, 2) of a vase, cup, cone or dumb-bell, evenly along the curve.

    Args:
        flip: whether the upper half is the lower one upside down.
    """
    count = int(rng.integers(3, 6))
    radii = rng.uniform(0.3, 1.0, count)
    radii[rng.integers(count)] = 1.0
    heights = np.linspace(-1, 1, count) * rng.uniform(0.6, 1.5)
    if flip:
        radii = (radii + radii[::-1]) / 2
    fine = np.linspace(0, count - 1, 200)
    if rng.random() < 0.5:  # straight walls
        radius, height = np.interp(fine, range(count), radii), np.interp(fine, range(count), heights)
    else:
        tent = np.clip(1 - np.abs(fine[:, None] - np.arange(count)), 0, 1)
        weight = tent**2 * (3 - 2 * tent)
        radius, height = weight @ radii, np.interp(fine, range(count), heights)
    curve = np.concatenate([[[0, height[0]]], np.column_stack([radius, height]), [[0, height[-1]]]])
    length = np.r_[0, np.cumsum(np.linalg.norm(np.diff(curve, axis=0), axis=1))]
    even = np.linspace(0, length[-1], RINGS + 2)
    profile = np.column_stack([np.interp(even, length, column) for column in curve.T])
    if flip:  # to the last bit
        profile = (profile + profile[::-1] * [1, -1]) / 2
    return profile


# --- fields over space that a group leaves as they are --------------------------------------------------------------


def noise(
    points: np.ndarray, rng: np.random.Generator, group: np.ndarray, frequency: float, channels: int = 1, waves: int = 6
) -> np.ndarray:
    """Smooth random functions (P, channels) of about unit variance at points (P, 3), the same at R x for R in `group`.

    Args:
        frequency: periods per unit of length.
    """
    wave = rng.normal(size=(3, waves * channels)) * 2 * np.pi * frequency / np.sqrt(3)
    phase, strength = rng.uniform(0, 2 * np.pi, waves * channels), rng.normal(size=waves * channels)
    total = sum(np.sin((points @ rotation.T) @ wave + phase) for rotation in group) * strength
    return total.reshape(-1, channels, waves).sum(2) * np.sqrt(2 / (waves * len(group)))


def nearest_orbit(points: np.ndarray, seeds: np.ndarray, group: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Which of the seeds (S, 3) and their images under the group is nearest to each point: number (P,), distance."""
    squared = ((points[:, None, None] - np.einsum("gij,sj->sgi", group, seeds)) ** 2).sum(-1).min(2)
    nearest = squared.argmin(1)
    return nearest, np.sqrt(squared[np.arange(len(points)), nearest])


# --- colours --------------------------------------------------------------------------------------------------------


def draw_palette(rng: np.random.Generator) -> np.ndarray:
    """Colours (PALETTE_SIZE, 3) in [0, 1] whose hues go round the circle, some dark and some pale."""
    hue = rng.random()
    colors = []
    for number in range(PALETTE_SIZE):
        value = rng.uniform(0.75, 1.0) if number % 3 else rng.uniform(0.35, 0.55)
        saturation = rng.uniform(0.7, 1.0) if number % 4 else rng.uniform(0.1, 0.4)
        colors.append(colorsys.hsv_to_rgb((hue + number * 0.618034) % 1, saturation, value))
    return np.array(colors)


def paint(points: np.ndarray, draft: Draft, rng: np.random.Generator) -> np.ndarray:
    """Colours (V, 3) in [0.04, 1]: a ground of cells, bands or marble, spots on it, and slow changes of brightness."""
    places = points / np.linalg.norm(points, axis=1).max()
    if draft.turned:
        places = np.column_stack([np.hypot(places[:, 0], places[:, 1]), np.zeros(len(places)), places[:, 2]])
    palette, group = draw_palette(rng), draft.group
    ground = (cells, bands, marble)[rng.choice(3, p=(0.5, 0.25, 0.25))]
    colors = ground(places, palette, rng, group)
    colors = spots(places, colors, palette, rng, group)
    tint = np.tanh(noise(places, rng, group, 0.35, channels=3))
    return np.clip(colors * (1 + 0.22 * tint), 0.04, 1.0)


def cells(places: np.ndarray, palette: np.ndarray, rng: np.random.Generator, group: np.ndarray) -> np.ndarray:
    """Patches of one colour each with crooked borders."""
    count = max(int(rng.integers(*NUM_CELLS)) // len(group), 5)
    seeds = scattered(places, count, rng)
    crooked = places * (1 + 0.06 * noise(places, rng, group, 1.5))
    return shuffled(palette, count, rng)[nearest_orbit(crooked, seeds, group)[0]]


def bands(places: np.ndarray, palette: np.ndarray, rng: np.random.Generator, group: np.ndarray) -> np.ndarray:
    """Crooked stripes of colours in no order."""
    level = noise(places, rng, group, 0.35)[:, 0] + 0.15 * noise(places, rng, group, 1.0)[:, 0]
    level = (level - level.min()) / max(np.ptp(level), 1e-9)
    count = int(rng.integers(7, 11))
    return shuffled(palette, count, rng)[np.minimum((level * count).astype(np.int64), count - 1)]


def marble(places: np.ndarray, palette: np.ndarray, rng: np.random.Generator, group: np.ndarray) -> np.ndarray:
    """Colours of the palette that run into each other."""
    strength = noise(places, rng, group, 0.7, channels=len(palette))
    weight = np.exp(4 * (strength - strength.max(1, keepdims=True)))
    return weight @ palette / weight.sum(1, keepdims=True)


def spots(
    places: np.ndarray, colors: np.ndarray, palette: np.ndarray, rng: np.random.Generator, group: np.ndarray
) -> np.ndarray:
    """Round spots of several sizes over the colours (V, 3)."""
    count = max(int(rng.integers(*NUM_SPOTS)) // len(group), 3)
    seeds, radii = scattered(places, count, rng), rng.uniform(0.08, 0.2, count)
    nearest, distance = nearest_orbit(places, seeds, group)
    cover = np.clip((radii[nearest] - distance) / 0.04 + 0.5, 0, 1)[:, None]
    return (1 - cover) * colors + cover * shuffled(palette, count, rng)[nearest]


def scattered(places: np.ndarray, count: int, rng: np.random.Generator) -> np.ndarray:
    """Points (count, 3) close to the surface; never two that a symmetry maps onto each other, which would be a tie."""
    return places[rng.choice(len(places), count, replace=False)] + rng.normal(scale=0.02, size=(count, 3))


def shuffled(palette: np.ndarray, count: int, rng: np.random.Generator) -> np.ndarray:
    """`count` colours (count, 3), each of the palette as often as any other."""
    return np.concatenate([rng.permutation(palette) for _ in range(-(-count // len(palette)))])[:count]


# --- families -------------------------------------------------------------------------------------------------------


def warp(
    points: np.ndarray, rng: np.random.Generator, group: np.ndarray, bumps: float, taper: float, twist: float
) -> np.ndarray:
    """Push points (V, 3) in and out by smooth noise, then taper and twist them about z.

    Args:
        bumps: how far, as a share of the distance from the origin.
        taper: relative change of width per unit of height; 0 where the group turns the object upside down.
        twist: radians per unit of height.
    """
    reach = np.abs(points).max()
    field = np.tanh(noise(points / reach, rng, group, 0.5)) if bumps else 0.0
    points = points * (1 + bumps * field)
    scale, angle = 1 + taper * points[:, 2] / reach, twist * points[:, 2] / reach
    x, y = points[:, 0] * scale, points[:, 1] * scale
    cos, sin = np.cos(angle), np.sin(angle)
    return np.column_stack([cos * x - sin * y, sin * x + cos * y, points[:, 2]])


def blob(rng: np.random.Generator) -> Draft:
    """A potato."""
    directions, faces = icosphere()
    points = directions * rng.uniform(0.55, 1.0, 3)
    return Draft(warp(points, rng, ONE, rng.uniform(0.25, 0.4), 0.0, 0.0), faces, ONE)


def boxified(rng: np.random.Generator) -> Draft:
    """A sphere blown up towards its bounding box."""
    directions, faces = icosphere()
    exponent = rng.uniform(3, 9)
    radius = (np.abs(directions) ** exponent).sum(1, keepdims=True) ** (-1 / exponent)
    points = directions * radius * rng.uniform(0.45, 1.0, 3)
    return Draft(warp(points, rng, ONE, rng.uniform(0.05, 0.2), rng.uniform(-0.35, 0.35), 0.0), faces, ONE)


def block(rng: np.random.Generator) -> Draft:
    """A box with sharp or soft edges, tapered or twisted."""
    points, faces = crossed_cube()
    points = soft(points, rng) * rng.uniform(0.4, 1.0, 3)
    return Draft(warp(points, rng, ONE, 0.0, rng.uniform(-0.4, 0.4), rng.uniform(-0.6, 0.6)), faces, ONE)


def vessel(rng: np.random.Generator) -> Draft:
    """A turned body with a dent or a bulge; its colours turn with it."""
    return Draft(warp(turn(draw_profile(rng, flip=False)), rng, ONE, 0.12, 0.0, 0.0), turned_faces(), ONE)


def cog(rng: np.random.Generator) -> Draft:
    """A body with lobes around, that only the colours tell from each other."""
    profile = draw_profile(rng, flip=False)
    lobes = draw_lobes(rng, int(rng.integers(2, 6)))
    return Draft(warp(turn(profile, lobes), rng, ONE, 0.08, 0.0, 0.0), turned_faces(), ONE)


def turned_body(rng: np.random.Generator) -> Draft:
    """A turned body in rings of colour."""
    return Draft(turn(draw_profile(rng, flip=False)), turned_faces(), ONE, turned=True)


def turned_even_body(rng: np.random.Generator) -> Draft:
    """A turned body that may also stand on its head."""
    return Draft(turn(draw_profile(rng, flip=True)), turned_faces(), rotation_group(1, flip=True), turned=True)


def n_fold(order: int, flip: bool) -> Family:
    """A family of bodies with `order` equal lobes."""

    def family(rng: np.random.Generator) -> Draft:
        group = rotation_group(order, flip)
        points = turn(draw_profile(rng, flip), draw_lobes(rng, order))
        taper, twist = 0.0 if flip else rng.uniform(-0.2, 0.2), rng.uniform(-0.5, 0.5)
        return Draft(warp(points, rng, group, 0.06, taper, twist), turned_faces(), group)

    return family


def n_fold_block(order: int, flip: bool) -> Family:
    """A family of boxes, `order` 2 or 4, whose sides agree in shape and colours."""

    def family(rng: np.random.Generator) -> Draft:
        points, faces = crossed_cube()
        sides = rng.uniform(0.4, 1.0, 3)
        if order == 4:
            sides[1] = sides[0]
        taper, twist = 0.0 if flip else rng.uniform(-0.4, 0.4), rng.uniform(-0.4, 0.4)
        group = rotation_group(order, flip)
        return Draft(warp(soft(points, rng) * sides, rng, group, 0.0, taper, twist), faces, group)

    return family


def soft(points: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Points of the cube, drawn some way towards the sphere."""
    softness = rng.uniform(0, 0.5)
    return (1 - softness) * points + softness * 1.25 * points / np.linalg.norm(points, axis=1, keepdims=True)


def draw_lobes(rng: np.random.Generator, order: int) -> Callable[[np.ndarray, np.ndarray], np.ndarray]:
    """Factors of the radius around the axis, for `turn`; even in the angle, so that half a turn about x keeps them."""
    depth, sharpness = rng.uniform(0.15, 0.35), rng.uniform(0.5, 2.5)

    def lobes(angle: np.ndarray, height: np.ndarray) -> np.ndarray:
        wave = np.tanh(sharpness * np.cos(order * angle)) / np.tanh(sharpness)
        return (1 + depth * wave) / (1 + depth) + 0 * height

    return lobes


ONE = np.eye(3)[None]
FAMILIES: tuple[Family, ...] = (blob, boxified, block, vessel, cog)
SYMMETRIC_FAMILIES: tuple[Family, ...] = (
    turned_body,
    n_fold_block(2, flip=False),
    n_fold(3, flip=False),
    n_fold(4, flip=False),
    turned_even_body,
    n_fold_block(2, flip=True),
    n_fold(2, flip=False),
    n_fold_block(4, flip=True),
    n_fold(3, flip=True),
)
