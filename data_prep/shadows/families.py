"""Families of made objects. Each is a function of a random generator that returns a mesh in its design pose, z up.

Thin structures (bars, rings, ladders, cages, coils) come first in `FAMILIES`: their shadows are the hardest to learn.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import pairwise

import numpy as np
import shapely
import shapely.affinity
import trimesh
from PIL import Image, ImageDraw, ImageFont
from trimesh import creation

# --- building blocks ------------------------------------------------------------------------------------------------


def joined(parts: Sequence[trimesh.Trimesh]) -> trimesh.Trimesh:
    return trimesh.util.concatenate([trimesh.Trimesh(part.vertices, part.faces, process=False) for part in parts])


def block(extents: Sequence[float], centre: Sequence[float]) -> trimesh.Trimesh:
    mesh = creation.box(extents=extents)
    mesh.apply_translation(centre)
    return mesh


def rod(start: Sequence[float], end: Sequence[float], radius: float, sections: int = 16) -> trimesh.Trimesh:
    return creation.cylinder(radius=radius, segment=[start, end], sections=sections)


def tube(path: np.ndarray, radius: float, sections: int = 12) -> trimesh.Trimesh:
    """A round tube along the points `path` (N, 3); closed where the first point is also the last."""
    return creation.sweep_polygon(shapely.Point(0, 0).buffer(radius, quad_segs=sections // 4), path)


def extruded(polygon: shapely.Polygon, height: float, standing: bool) -> trimesh.Trimesh:
    """The polygon, thickened; lying as drawn, or standing upright as one sees it on paper."""
    mesh = creation.extrude_polygon(polygon, height)
    if standing:
        mesh.apply_transform(trimesh.transformations.rotation_matrix(np.pi / 2, [1, 0, 0]))
    return mesh


def turned(radii: np.ndarray, heights: np.ndarray, sections: int = 48) -> trimesh.Trimesh:
    """The solid of revolution of a profile that begins and ends on the axis."""
    return creation.revolve(np.stack([radii, heights], axis=1), sections=sections)


def polar_polygon(radii: np.ndarray, hole: float = 0.0) -> shapely.Polygon:
    angles = np.arange(len(radii)) * 2 * np.pi / len(radii) + np.pi / 2
    polygon = shapely.Polygon(np.stack([radii * np.cos(angles), radii * np.sin(angles)], axis=1))
    return polygon.difference(shapely.Point(0, 0).buffer(hole, quad_segs=12)) if hole else polygon


def smooth_noise(rng: np.random.Generator, points: np.ndarray, waves: int, frequency: float) -> np.ndarray:
    """A smooth random function of points (N, 3), about in [-1, 1]."""
    directions = rng.normal(size=(waves, 3)) * frequency
    phases = rng.uniform(0, 2 * np.pi, waves)
    weights = rng.dirichlet(np.full(waves, 2.0))
    return np.cos(points @ directions.T + phases) @ weights


def coin(rng: np.random.Generator, probability: float = 0.5) -> bool:
    return bool(rng.random() < probability)


# --- families -------------------------------------------------------------------------------------------------------


def box(rng: np.random.Generator) -> trimesh.Trimesh:
    width, depth, height = rng.uniform(0.25, 1.0, 3)
    if coin(rng, 0.4):
        return creation.box(extents=(width, depth, height))
    rounding = rng.uniform(0.1, 0.4) * min(width, depth)
    outline = shapely.box(0, 0, width - 2 * rounding, depth - 2 * rounding).buffer(rounding, quad_segs=6)
    if coin(rng, 0.4):  # an open tray
        wall = rng.uniform(0.06, 0.12)
        floor = creation.extrude_polygon(outline, wall)
        sides = creation.extrude_polygon(outline.difference(outline.buffer(-wall)), height)
        return joined([floor, sides])
    return creation.extrude_polygon(outline, height)


def superquadric(rng: np.random.Generator) -> trimesh.Trimesh:
    """Radial form of the superquadric with exponents e1 (along z) and e2 (around z), both in [0.2, 1.6]."""
    e1, e2 = rng.uniform(0.2, 1.6, 2)
    radii = rng.uniform(0.4, 1.0, 3)
    mesh = creation.icosphere(subdivisions=4)
    x, y, z = np.abs(mesh.vertices / radii).T
    inside = (x ** (2 / e2) + y ** (2 / e2)) ** (e2 / e1) + z ** (2 / e1)
    return trimesh.Trimesh(mesh.vertices * inside[:, None] ** (-e1 / 2), mesh.faces, process=False)


def blob(rng: np.random.Generator) -> trimesh.Trimesh:
    mesh = creation.icosphere(subdivisions=4)
    bumps = smooth_noise(rng, mesh.vertices, 8, rng.uniform(1.0, 3.0))
    radius = np.clip(1 + rng.uniform(0.5, 1.3) * bumps, 0.3, None)
    stretch = rng.uniform(0.6, 1.2, 3)
    return trimesh.Trimesh(mesh.vertices * radius[:, None] * stretch, mesh.faces, process=False)


def profile(rng: np.random.Generator, low: float, high: float) -> tuple[np.ndarray, np.ndarray]:
    """Radii and heights of a random outline, smooth or with edges; heights in [0, 1]."""
    knots = int(rng.integers(3, 8))
    heights = np.linspace(0, 1, knots)
    radii = rng.uniform(low, high, knots)
    if coin(rng, 0.35):
        return radii, heights
    fine = np.linspace(0, 1, 40)
    near = np.exp(-0.5 * ((fine[:, None] - heights) * 1.6 * (knots - 1)) ** 2)
    return near @ radii / near.sum(axis=1), fine


def lathe(rng: np.random.Generator) -> trimesh.Trimesh:
    """Vases, pawns, skittles; every third one is hollow."""
    radii, heights = profile(rng, 0.12, 0.6)
    heights = heights * rng.uniform(0.8, 1.8)
    if coin(rng, 0.35):
        wall = 0.06
        inner = np.maximum(radii[::-1] - wall, 0.04)
        inner_heights = np.maximum(heights[::-1], wall)
        radii, heights = np.concatenate([radii, inner]), np.concatenate([heights, inner_heights])
    return turned(np.r_[0, radii, 0], np.r_[heights[0], heights, heights[-1]])


def star(rng: np.random.Generator) -> trimesh.Trimesh:
    points = int(rng.integers(4, 10))
    radii = np.tile([1.0, rng.uniform(0.3, 0.7)], points)
    hole = rng.uniform(0.1, 0.2) if coin(rng, 0.3) else 0.0
    return extruded(polar_polygon(radii, hole), rng.uniform(0.1, 0.6), standing=coin(rng, 0.9))


def gear(rng: np.random.Generator) -> trimesh.Trimesh:
    teeth = int(rng.integers(7, 18))
    root = rng.uniform(0.7, 0.88)
    radii = np.tile([root, root, 1.0, 1.0], teeth)
    return extruded(polar_polygon(radii, rng.uniform(0.12, 0.55)), rng.uniform(0.12, 0.5), standing=coin(rng, 0.9))


def prism(rng: np.random.Generator) -> trimesh.Trimesh:
    """Regular and irregular polygons, some of them frames."""
    corners = int(rng.integers(3, 9))
    radii = np.ones(corners) if coin(rng) else rng.uniform(0.6, 1.0, corners)
    polygon = polar_polygon(radii)
    if coin(rng, 0.4):
        polygon = polygon.difference(polygon.buffer(-rng.uniform(0.1, 0.2), join_style="mitre"))
    return extruded(polygon, rng.uniform(0.1, 1.2), standing=coin(rng, 0.8))


def glyph_polygon(character: str) -> shapely.Polygon:
    """Outline of a character of Pillow's built-in font (Aileron, public domain), about one unit high."""
    font = ImageFont.load_default(size=96)
    picture = Image.new("L", (128, 128))
    ImageDraw.Draw(picture).text((64, 64), character, fill=255, font=font, anchor="mm")
    ink = np.pad(np.asarray(picture) > 127, 1).astype(np.int8)
    runs = []
    for row, steps in enumerate(np.diff(ink, axis=1)):
        starts, ends = np.flatnonzero(steps == 1), np.flatnonzero(steps == -1)
        runs += [shapely.box(start, -row - 1, end, -row) for start, end in zip(starts, ends, strict=True)]
    shape = shapely.union_all(runs).buffer(0.6, join_style="mitre").simplify(0.9)
    largest = max(shapely.get_parts(shape), key=lambda part: part.area)
    return shapely.affinity.scale(largest, 1 / 70, 1 / 70, origin=(0, 0))


def glyph(rng: np.random.Generator) -> trimesh.Trimesh:
    character = str(rng.choice(list("ABCDEFGHJKLMNPQRSTUVWXYZ23456789&$?@#abdefghkmnpqrstwyz")))
    return extruded(glyph_polygon(character), rng.uniform(0.12, 0.45), standing=coin(rng, 0.9))


def ring(rng: np.random.Generator) -> trimesh.Trimesh:
    """Round or flat rings, thin as a rule, standing or lying, one or two of them."""
    radius = rng.uniform(0.05, 0.14) if coin(rng, 0.75) else rng.uniform(0.15, 0.38)
    if coin(rng, 0.3):
        annulus = shapely.Point(0, 0).buffer(1, quad_segs=16).difference(shapely.Point(0, 0).buffer(1 - 2 * radius))
        mesh = creation.extrude_polygon(annulus, rng.uniform(0.08, 0.5))
    else:
        mesh = creation.torus(1 - radius, radius, major_sections=64, minor_sections=16)
    mesh.apply_scale([1, rng.uniform(0.7, 1.0), 1])
    if coin(rng, 0.25):  # a second ring through the first
        other = mesh.copy()
        other.apply_transform(trimesh.transformations.rotation_matrix(np.pi / 2, [1, 0, 0]))
        other.apply_translation([rng.uniform(0, 1), 0, 0])
        mesh = joined([mesh, other])
    if coin(rng, 0.85):
        mesh.apply_transform(trimesh.transformations.rotation_matrix(np.pi / 2, [1, 0, 0]))
    return mesh


def bar(rng: np.random.Generator) -> trimesh.Trimesh:
    """Thin bars: one lying or standing on its end, a tripod, a cross, a gate."""
    thickness = rng.uniform(0.09, 0.18)
    sort = int(rng.integers(5))
    if sort == 0:
        return creation.box(extents=(2, thickness, rng.uniform(0.5, 2) * thickness))
    if sort == 1:
        end = rng.normal(0, 0.5, 2)
        return creation.capsule(height=2, radius=thickness / 2, count=[16, 16]).apply_transform(
            trimesh.geometry.align_vectors([0, 0, 1], [end[0], end[1], 1.2])
        )
    if sort == 2:
        turn = rng.uniform(0, 2 * np.pi)
        angles = turn + np.arange(3) * 2 * np.pi / 3
        spread = rng.uniform(0.3, 0.8)
        feet = [(spread * np.cos(angle), spread * np.sin(angle), 0) for angle in angles]
        return joined([rod(foot, (0, 0, 1.6), thickness / 2) for foot in feet])
    if sort == 3:
        height = rng.uniform(1.2, 2)
        across = rng.uniform(0.5, 0.9) * height
        upright = block((thickness, thickness, height), (0, 0, height / 2))
        beam = block((rng.uniform(0.7, 1.6), thickness, thickness), (0, 0, across))
        foot = block((4 * thickness, 4 * thickness, thickness), (0, 0, thickness / 2))
        return joined([upright, beam, foot])
    width, height = rng.uniform(0.8, 1.8), rng.uniform(0.8, 1.8)
    corners = [(-width / 2, 0, 0), (-width / 2, 0, height), (width / 2, 0, height), (width / 2, 0, 0)]
    knots = [creation.icosphere(2, thickness / 2).apply_translation(corner) for corner in corners[1:3]]
    return joined([*(rod(a, b, thickness / 2) for a, b in pairwise(corners)), *knots])


def ladder(rng: np.random.Generator) -> trimesh.Trimesh:
    """One ladder or two that lean against each other; also fences, which are wide ladders on their side."""
    height, width = 2.0, rng.uniform(0.35, 0.9)
    thickness = rng.uniform(0.08, 0.14)
    rails = [rod((side, 0, 0), (side, 0, height), thickness / 2) for side in (-width / 2, width / 2)]
    levels = np.linspace(0.15, 0.9, int(rng.integers(3, 8))) * height
    rungs = [rod((-width / 2, 0, z), (width / 2, 0, z), thickness / 2) for z in levels]
    mesh = joined([*rails, *rungs])
    if coin(rng, 0.4):
        lean = rng.uniform(0.15, 0.4)
        halves = []
        for sign in (-1, 1):
            turn = trimesh.transformations.rotation_matrix(sign * lean, [1, 0, 0], [0, 0, height])
            halves.append(mesh.copy().apply_transform(turn))
        return joined(halves)
    if coin(rng, 0.3):
        mesh.apply_transform(trimesh.transformations.rotation_matrix(np.pi / 2, [0, 1, 0]))
    return mesh


def cage(rng: np.random.Generator) -> trimesh.Trimesh:
    """The edges of a box, a bird cage, or a globe of hoops."""
    radius = rng.uniform(0.035, 0.07)
    sort = int(rng.integers(3))
    if sort == 0:
        size = rng.uniform(0.5, 1.0, 3)
        ends = np.array([[x, y, z] for x in (-1, 1) for y in (-1, 1) for z in (-1, 1)]) * size
        edges = [(a, b) for a in ends for b in ends if np.count_nonzero(a - b) == 1 and tuple(a) < tuple(b)]
        knots = [creation.icosphere(1, radius * 1.3).apply_translation(end) for end in ends]
        return joined([*(rod(a, b, radius, 10) for a, b in edges), *knots])
    count = int(rng.integers(4, 9))
    if sort == 1:
        height = rng.uniform(0.8, 1.6)
        angles = np.arange(2 * count) * np.pi / count
        feet = np.stack([np.cos(angles), np.sin(angles), 0 * angles], axis=1) * 0.7
        bars = [rod(foot, foot + np.array([0, 0, height]), radius, 8) for foot in feet]
        hoops = [creation.torus(0.7, radius, major_sections=40, minor_sections=8) for _ in range(2)]
        hoops[1].apply_translation([0, 0, height])
        return joined([*bars, *hoops])
    hoop = creation.torus(1, radius, major_sections=48, minor_sections=8)
    upright = hoop.copy().apply_transform(trimesh.transformations.rotation_matrix(np.pi / 2, [1, 0, 0]))
    turns = [trimesh.transformations.rotation_matrix(k * np.pi / count, [0, 0, 1]) for k in range(count)]
    return joined([hoop, *(upright.copy().apply_transform(turn) for turn in turns)])


def coil(rng: np.random.Generator) -> trimesh.Trimesh:
    """Springs, arches and bent wires."""
    radius = rng.uniform(0.055, 0.1)
    sort = int(rng.integers(3))
    if sort == 0:
        turns = rng.uniform(2, 5)
        s = np.linspace(0, 1, int(24 * turns))
        reach = 0.5 * (1 - rng.uniform(0, 0.6) * s)
        path = np.stack([reach * np.cos(2 * np.pi * turns * s), reach * np.sin(2 * np.pi * turns * s), 1.5 * s], axis=1)
    elif sort == 1:
        s = np.linspace(0, np.pi, 32)
        path = np.stack([np.cos(s), 0 * s, rng.uniform(0.5, 1.6) * np.sin(s)], axis=1)
    else:
        s = np.linspace(0, 1, 48)[:, None]
        waves = np.arange(1, 4)
        path = (rng.normal(size=(1, 3, 3)) * np.sin(np.pi * s * waves)[:, :, None] / waves[:, None]).sum(axis=1)
        path += s * rng.uniform(0.8, 1.6, 3)
    return tube(path, radius)


def part(rng: np.random.Generator, reach: float) -> trimesh.Trimesh:
    """A simple solid on z = 0 that fits a square of half side `reach`."""
    height = rng.uniform(0.3, 0.9)
    sort = int(rng.integers(6))
    if sort == 0:
        mesh = creation.box(extents=(2 * reach, 2 * reach * rng.uniform(0.5, 1), height))
    elif sort == 1:
        mesh = creation.cylinder(radius=reach, height=height, sections=48)
    elif sort == 2:
        mesh = creation.cone(radius=reach, height=height, sections=48)
    elif sort == 3:
        mesh = creation.icosphere(subdivisions=3, radius=reach)
    elif sort == 4:
        mesh = creation.torus(0.7 * reach, 0.3 * reach, major_sections=48, minor_sections=16)
    else:
        mesh = creation.extrude_polygon(polar_polygon(np.full(int(rng.integers(3, 7)), reach)), height)
    mesh.apply_translation([0, 0, -mesh.bounds[0, 2]])
    return mesh


def stack(rng: np.random.Generator) -> trimesh.Trimesh:
    """One to three solids on top of each other, each sunk 0.02 into the one below."""
    parts, top, reach = [], 0.0, rng.uniform(0.5, 0.8)
    for _ in range(int(rng.integers(1, 4))):
        mesh = part(rng, reach)
        mesh.apply_transform(trimesh.transformations.rotation_matrix(rng.uniform(0, np.pi), [0, 0, 1]))
        mesh.apply_translation([*rng.uniform(-0.15, 0.15, 2), top])
        parts.append(mesh)
        top = mesh.bounds[1, 2] - 0.02
        reach *= rng.uniform(0.55, 0.95)
    return joined(parts)


def legs(rng: np.random.Generator, width: float, depth: float, height: float) -> list[trimesh.Trimesh]:
    radius = rng.uniform(0.04, 0.08)
    splay = rng.uniform(0, 0.15)
    tops = [(x * (width / 2 - radius), y * (depth / 2 - radius)) for x in (-1, 1) for y in (-1, 1)]
    return [rod((x * (1 + splay), y * (1 + splay), 0), (x, y, height), radius) for x, y in tops]


def table(rng: np.random.Generator) -> trimesh.Trimesh:
    width, depth, height = rng.uniform(0.9, 2.0), rng.uniform(0.6, 1.2), rng.uniform(0.5, 1.1)
    thickness = rng.uniform(0.05, 0.12)
    if coin(rng, 0.35):  # round, on one foot
        top = creation.cylinder(radius=width / 2, height=thickness, sections=48).apply_translation([0, 0, height])
        foot = creation.cylinder(radius=width / 4, height=thickness, sections=48)
        return joined([top, foot, rod((0, 0, 0), (0, 0, height), rng.uniform(0.04, 0.1))])
    return joined([block((width, depth, thickness), (0, 0, height)), *legs(rng, width, depth, height)])


def chair(rng: np.random.Generator) -> trimesh.Trimesh:
    width, depth, seat = rng.uniform(0.6, 0.9), rng.uniform(0.6, 0.9), rng.uniform(0.5, 0.8)
    back = rng.uniform(0.5, 1.0)
    thickness = rng.uniform(0.06, 0.12)
    parts = [block((width, depth, thickness), (0, 0, seat)), *legs(rng, width, depth, seat)]
    sort = int(rng.integers(3))
    y = depth / 2 - 0.04
    if sort == 0:
        parts.append(block((width, 0.07, back), (0, y, seat + back / 2)))
    elif sort == 1:
        for x in np.linspace(-width / 2 + 0.04, width / 2 - 0.04, int(rng.integers(3, 7))):
            parts.append(rod((x, y, seat), (x, y, seat + back), 0.03, 10))
        parts.append(block((width, 0.08, 0.1), (0, y, seat + back)))
    elif coin(rng):
        parts += [rod((x, y, seat), (x, y, seat + back), 0.04) for x in (-width / 2 + 0.04, width / 2 - 0.04)]
        parts += [block((width, 0.05, 0.12), (0, y, seat + back * share)) for share in (0.45, 0.9)]
    return joined(parts)


def lamp(rng: np.random.Generator) -> trimesh.Trimesh:
    height = rng.uniform(1.2, 2.0)
    base = creation.cylinder(radius=rng.uniform(0.2, 0.45), height=0.08, sections=48).apply_translation([0, 0, 0.04])
    pole = rod((0, 0, 0), (0, 0, height - 0.1), rng.uniform(0.03, 0.06))
    bottom, top, drop = rng.uniform(0.3, 0.6), rng.uniform(0.12, 0.3), rng.uniform(0.3, 0.6)
    wall = 0.03
    outline = [(bottom, height - drop), (top, height), (top - wall, height), (bottom - wall, height - drop)]
    shade = creation.revolve([*outline, outline[0]], sections=48)
    cap = creation.cylinder(radius=top - wall / 2, height=0.03, sections=48).apply_translation([0, 0, height - 0.03])
    return joined([base, pole, shade, cap])


def mug(rng: np.random.Generator) -> trimesh.Trimesh:
    radius, height, wall = rng.uniform(0.35, 0.6), rng.uniform(0.6, 1.2), 0.06
    flare = rng.uniform(0.85, 1.2) * radius
    profile_radii = np.array([0, radius, flare, flare - wall, radius - wall, 0])
    cup = turned(profile_radii, np.array([0, 0, height, height, wall, wall]))
    bend = np.linspace(-np.pi / 2, np.pi / 2, 24)
    reach, side = rng.uniform(0.2, 0.35), min(radius, flare)
    handle = [side - 0.06 + reach * np.cos(bend), 0 * bend, height * (0.5 + 0.32 * np.sin(bend))]
    return joined([cup, tube(np.stack(handle, axis=1), rng.uniform(0.04, 0.07))])


def tree(rng: np.random.Generator) -> trimesh.Trimesh:
    trunk = rng.uniform(0.4, 0.9)
    parts = [rod((0, 0, 0), (0, 0, trunk + 0.3), rng.uniform(0.05, 0.1))]
    if coin(rng):
        for level in range(int(rng.integers(2, 5))):
            cone = creation.cone(radius=0.6 - 0.11 * level, height=0.7, sections=32)
            parts.append(cone.apply_translation([0, 0, trunk + 0.32 * level]))
    else:
        for _ in range(int(rng.integers(2, 6))):
            ball = creation.icosphere(subdivisions=3, radius=rng.uniform(0.25, 0.45))
            parts.append(ball.apply_translation([*rng.uniform(-0.3, 0.3, 2), trunk + rng.uniform(0.3, 0.8)]))
    return joined(parts)


FAMILIES: dict[str, Callable[[np.random.Generator], trimesh.Trimesh]] = {
    family.__name__: family
    for family in (
        *(bar, ring, ladder, cage, coil),
        *(box, superquadric, blob, lathe, star, gear, prism, glyph, stack, table, chair, lamp, mug, tree),
    )
}
# How often an object keeps its design pose; otherwise it is dropped.
UPRIGHT = {"table": 0.85, "chair": 0.85, "lamp": 0.85, "tree": 0.85, "mug": 0.85, "ladder": 0.85}
UPRIGHT_ELSEWHERE = 0.85
