"""Objects that cast shadows: made ones or the user's own meshes, at rest on the floor.

`procedural_object` makes number i of a seed, always the same one.
"""

from __future__ import annotations

import hashlib
import re
import struct
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import trimesh
from scipy.spatial import QhullError

from data_prep.shadows.families import FAMILIES, UPRIGHT, UPRIGHT_ELSEWHERE, coin

MESH_SUFFIXES = (".glb", ".gltf", ".obj", ".ply", ".stl")
SIZE_RANGE = (1.7, 2.3)  # largest extent of an object at rest, in world units
MAX_FACES = 2_000_000
# What the readers of trimesh raise for files that are not what their names say.
READ_ERRORS = (ValueError, TypeError, KeyError, IndexError, AttributeError, OSError, NotImplementedError, struct.error)
# Streams of random numbers, so that one more draw in one of them changes nothing in the others.
SHAPE, ORDER = 1, 2


# --- objects --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class CastingObject:
    """A mesh at rest on the floor z = 0, centred in x and y, and where it comes from."""

    object_id: str
    family: str
    mesh: trimesh.Trimesh


def object_name(seed: int, number: int, stream: str = "S") -> tuple[str, str]:
    """(object_id, family) of procedural object `number`, without making it."""
    deal, place = divmod(number, len(FAMILIES))  # every family comes up once in a deal
    rng = np.random.default_rng(np.random.SeedSequence([seed, ord(stream), ORDER, deal]))
    family = list(FAMILIES)[rng.permutation(len(FAMILIES))[place]]
    return f"{family}-{stream}{seed}-{number:06d}", family


def procedural_object(seed: int, number: int, stream: str = "S") -> CastingObject:
    """Object `number` of `seed`: the same one whenever it is asked for. Each run of 19 numbers holds every family.

    Args:
        seed, number: non-negative.
        stream: one letter; other letters give other objects (the benchmark tracks use "T").
    """
    object_id, family = object_name(seed, number, stream)
    rng = np.random.default_rng(np.random.SeedSequence([seed, ord(stream), SHAPE, number]))
    mesh = FAMILIES[family](rng)
    upright = coin(rng, UPRIGHT.get(family, UPRIGHT_ELSEWHERE))
    return CastingObject(object_id, family, at_rest(mesh, rng, upright))


def at_rest(mesh: trimesh.Trimesh, rng: np.random.Generator, upright: bool = False) -> trimesh.Trimesh:
    """A copy that rests on z = 0, turned about z at random, of a random size in `SIZE_RANGE`, centred in x and y.

    Args:
        upright: keep the orientation it has instead of dropping it.
    """
    mesh = mesh.copy()
    if not upright:
        mesh.apply_transform(resting_rotation(mesh, rng))
    mesh.apply_transform(trimesh.transformations.rotation_matrix(rng.uniform(0, 2 * np.pi), [0, 0, 1]))
    mesh.apply_scale(rng.uniform(*SIZE_RANGE) / mesh.extents.max())
    low, high = mesh.bounds
    mesh.apply_translation([-(low[0] + high[0]) / 2, -(low[1] + high[1]) / 2, -low[2]])
    return mesh


def resting_rotation(mesh: trimesh.Trimesh, rng: np.random.Generator) -> np.ndarray:
    """Rotation (4, 4) that puts a randomly chosen stable face of the convex hull down.

    A face is stable if the centre of mass lies above it; its chance is the solid angle it fills as seen from there,
    which is how often a body in a random orientation points this face down. This leaves out rolling from unstable
    faces to their neighbours, which `trimesh.poses.compute_stable_poses` follows at 100 times the cost.
    A mesh without a hull (flat, or fewer than four points) stays as it is.
    """
    try:
        with np.errstate(invalid="ignore", divide="ignore"):  # flat meshes have no centre of mass
            hull = mesh.convex_hull
    except QhullError:
        return np.eye(4)
    if len(hull.faces) < 4 or hull.volume <= 1e-9 * hull.extents.max() ** 3:
        return np.eye(4)
    centre = mesh.center_mass if mesh.is_watertight and mesh.volume > 0 else hull.center_mass
    if not (np.einsum("ij,ij->i", hull.face_normals, hull.triangles[:, 0] - centre) > 0).all():
        centre = hull.center_mass
    corners = hull.triangles - centre
    _, first, group = np.unique(hull.face_normals.round(3), axis=0, return_index=True, return_inverse=True)
    group = group.ravel()
    stable = np.bincount(group, holds_foot_point(corners, hull.face_normals)) > 0
    chances = np.where(stable, np.bincount(group, solid_angles(corners)), 0.0)
    chances[chances < 0.1 * chances.max()] = 0.0
    face = first[rng.choice(len(first), p=chances / chances.sum())]
    return trimesh.geometry.align_vectors(hull.face_normals[face], [0, 0, -1])


def holds_foot_point(corners: np.ndarray, normals: np.ndarray) -> np.ndarray:
    """Whether the perpendicular from the origin onto each triangle (N, 3, 3) meets it; (N,) bool."""
    feet = normals * np.einsum("ij,ij->i", normals, corners[:, 0])[:, None]
    edges = np.roll(corners, -1, axis=1) - corners
    sides = np.einsum("ij,ikj->ik", normals, np.cross(edges, feet[:, None] - corners))
    return (sides >= -1e-9).all(axis=1)


def solid_angles(corners: np.ndarray) -> np.ndarray:
    """Solid angles of triangles (N, 3, 3) from the origin (van Oosterom and Strackee 1983); (N,) in steradians."""
    a, b, c = np.moveaxis(corners, 1, 0)
    la, lb, lc = np.linalg.norm(corners, axis=2).T
    triple = np.abs(np.einsum("ij,ij->i", a, np.cross(b, c)))
    below = la * lb * lc + (a * b).sum(1) * lc + (b * c).sum(1) * la + (c * a).sum(1) * lb
    return 2 * np.arctan2(triple, below)


# --- meshes of the user ---------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class MeshFile:
    """A file below the user's folder: its path there, with forward slashes, and the first digits of its sha256."""

    name: str
    digest: str

    @property
    def object_id(self) -> str:
        stem = Path(self.name).with_suffix("").as_posix()
        return f"{re.sub(r'[^A-Za-z0-9]+', '_', stem)}-{self.digest}"


def find_meshes(folder: str | Path) -> list[MeshFile]:
    """The meshes in `folder` and below, sorted by path; of equal files only the first.

    Raises:
        ValueError: the folder is missing or holds no mesh.
    """
    folder = Path(folder)
    paths = sorted(path for path in folder.rglob("*") if path.suffix.lower() in MESH_SUFFIXES and path.is_file())
    if not paths:
        raise ValueError(f"{folder} holds no mesh ({', '.join(MESH_SUFFIXES)})")
    files: dict[str, MeshFile] = {}
    for path in paths:
        digest = hashlib.sha256(path.read_bytes()).hexdigest()[:10]
        files.setdefault(digest, MeshFile(path.relative_to(folder).as_posix(), digest))
    return list(files.values())


def load_mesh(path: str | Path) -> trimesh.Trimesh:
    """The triangles of a mesh file as one mesh, its colours with it; glTF is turned from y up to z up.

    Raises:
        ValueError: naming the file, if it cannot be read or holds no finite triangles of some extent.
    """
    path = Path(path)
    try:
        scene = trimesh.load_scene(path)
        mesh = scene.to_mesh()
    except READ_ERRORS as error:
        raise ValueError(f"{path} cannot be read as a mesh: {error}".splitlines()[0]) from None
    if len(mesh.faces) == 0:
        raise ValueError(f"{path} holds no triangles")
    if len(mesh.faces) > MAX_FACES:
        raise ValueError(f"{path} has {len(mesh.faces)} triangles, more than {MAX_FACES}")
    if not np.isfinite(mesh.vertices).all() or not 0 < mesh.extents.max() < np.inf:
        raise ValueError(f"{path} has no finite extent")
    if path.suffix.lower() in (".glb", ".gltf"):
        mesh.apply_transform(trimesh.transformations.rotation_matrix(np.pi / 2, [1, 0, 0]))
    return mesh


def user_object(folder: str | Path, file: MeshFile, rng: np.random.Generator) -> CastingObject:
    """A mesh of the user at rest: upright or dropped with equal chance. Errors as in `load_mesh`."""
    mesh = load_mesh(Path(folder) / file.name)
    return CastingObject(file.object_id, "user", at_rest(mesh, rng, upright=coin(rng)))
