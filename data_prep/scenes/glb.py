"""Scenes from GLB files: one node with a mesh is one object, its name the object's id.

A node's place in the file's world is split into a rotation and a stretch of its axes, p_world = R (S p) + t. The
stretch goes into the object's sizes. If it mirrors, the mesh is mirrored along its own x, so that R is a rotation.
Axes that are no longer at right angles (a turned node below one that is stretched unevenly) are refused, or with
`bake_shear` put into the mesh.

glTF has y up; it becomes (x, -z, y). The scene is moved, not scaled: its lowest point to z = 0, the middle of its
footprint to the origin, p_scene = (p_file - scene_shift) / scene_scale in metres. It is seen from `Camera.floor_view`,
as far away as it needs to be seen whole.

Voxels are the solid where the mesh is closed, also of overlapping parts; parts that are thinner than a voxel are kept
by their surface. An open mesh gives its surface and what that encloses on all six sides, and a warning.
"""

from __future__ import annotations

import hashlib
import re
import struct
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import trimesh
from scipy.ndimage import binary_dilation
from tqdm import tqdm

from backlot.rendering import (
    Camera,
    by_corner,
    edge_functions,
    fragments,
    in_picture,
    mesh_colors,
    object_color,
    render,
    view_scale,
)
from data_prep.scenes.format import CONDITIONS, SPLITS, pack_occupancy, write_scene
from data_prep.scenes.synth import camera_metadata, descriptors, picture_conditionals, poses

SUFFIXES = (".glb", ".gltf")
# What the readers of trimesh raise for files that are not what their names say.
READ_ERRORS = (
    *(ValueError, TypeError, LookupError, AttributeError, OSError, NotImplementedError, RecursionError),
    struct.error,
)
Z_UP = np.array([[1.0, 0, 0], [0, 0, -1], [0, 1, 0]])
MIRROR = np.diag([-1.0, 1, 1])
SHEAR = 1e-3  # cosine between two axes of a node from which on they are not at right angles
FLAT = 1e-6  # of the largest stretch
THINNEST = 1e-3  # of the longest side: a flat object has this thickness
FINE = 4  # per voxel, in each direction, where a surface is looked for
MAX_FACES = 5_000_000


@dataclass(frozen=True, eq=False)
class GlbObject:
    """A node of a file: its mesh within [-.5, .5]^3, z up, and where it is: p = rotation (sides p_mesh) + middle."""

    name: str
    mesh: trimesh.Trimesh
    rotation: np.ndarray
    sides: np.ndarray
    middle: np.ndarray

    def placed(self) -> trimesh.Trimesh:
        """Its mesh in the scene."""
        vertices = (self.mesh.vertices * self.sides) @ self.rotation.T + self.middle
        return trimesh.Trimesh(vertices, self.mesh.faces, process=False)


# --- files and their nodes ------------------------------------------------------------------------------------------


def find_scenes(source: str | Path) -> dict[str, Path]:
    """GLB and glTF files by scene_id, their path below the folder; ValueError if there are none or two of one id."""
    source = Path(source)
    if source.is_file():
        paths, root = [source], source.parent
    elif source.is_dir():
        paths, root = sorted(path for path in source.rglob("*") if path.suffix.lower() in SUFFIXES), source
    else:
        raise ValueError(f"{source} does not exist")
    if not paths:
        raise ValueError(f"{source} holds no {' or '.join(SUFFIXES)} files")
    found: dict[str, Path] = {}
    for path in paths:
        if path.suffix.lower() not in SUFFIXES:
            raise ValueError(f"{path} is not a {' or '.join(SUFFIXES)} file")
        name = re.sub(r"[^A-Za-z0-9_-]+", "_", path.relative_to(root).with_suffix("").as_posix())
        if name in found:
            raise ValueError(f"{found[name]} and {path} would both be scene {name!r}; rename one")
        found[name] = path
    return found


def load_objects(path: str | Path, isotropic_scale: bool = True, bake_shear: bool = False) -> list[GlbObject]:
    """The objects of a file in its own place, z up; ValueError, one line, names the file and the node.

    Args:
        isotropic_scale: sides are the longest one, three times; otherwise each mesh fills its cube.
        bake_shear: put the shear of a node into its mesh instead of refusing it.
    """
    path = Path(path)
    try:
        scene = trimesh.load_scene(path, merge_primitives=True)
    except READ_ERRORS as error:
        raise ValueError(f"{path}: unreadable ({type(error).__name__}: {error})") from None
    objects = []
    for node in scene.graph.nodes_geometry:
        matrix, name = scene.graph.get(node)
        mesh = scene.geometry[name]
        if not isinstance(mesh, trimesh.Trimesh) or not len(mesh.faces):
            warnings.warn(f"{path}: node {node!r} has no triangles and is left out", stacklevel=2)
            continue
        try:
            objects.append(load_object(str(node), mesh, matrix, isotropic_scale, bake_shear))
        except ValueError as error:
            raise ValueError(f"{path}: node {node!r} {error}") from None
    if not objects:
        raise ValueError(f"{path}: no node has a mesh")
    return objects


def load_object(
    name: str, mesh: trimesh.Trimesh, matrix: np.ndarray, isotropic_scale: bool, bake_shear: bool
) -> GlbObject:
    if len(mesh.faces) > MAX_FACES:
        raise ValueError(f"has {len(mesh.faces)} triangles, the limit is {MAX_FACES}")
    rotation, stretch = split_matrix(matrix, bake_shear)
    used, faces = np.unique(mesh.faces, return_inverse=True)
    vertices = mesh.vertices[used] @ (Z_UP @ stretch).T
    if not np.isfinite(vertices).all():
        raise ValueError("has vertices that are not finite")
    low, high = vertices.min(axis=0), vertices.max(axis=0)
    longest = float((high - low).max())
    if not longest > 0:
        raise ValueError("has a mesh without extent")
    sides = np.full(3, longest) if isotropic_scale else np.maximum(high - low, THINNEST * longest)
    faces = faces.reshape(-1, 3)
    if np.linalg.det(stretch) < 0:
        faces = faces[:, ::-1]
    canonical = trimesh.Trimesh((vertices - (low + high) / 2) / sides, faces, process=False)
    colors = mesh_colors(mesh)
    if colors is not None:
        colors = np.broadcast_to(colors, mesh.vertices.shape)[used]
        canonical.visual = trimesh.visual.ColorVisuals(canonical, vertex_colors=colors)
    rotation = Z_UP @ rotation @ Z_UP.T
    return GlbObject(name, canonical, rotation, sides, rotation @ (low + high) / 2 + Z_UP @ matrix[:3, 3])


def split_matrix(matrix: np.ndarray, bake_shear: bool = False) -> tuple[np.ndarray, np.ndarray]:
    """A node's matrix (4, 4) as rotation and stretch (3, 3), matrix = rotation @ stretch; ValueError for what has none.

    The stretch is symmetric and positive, and diagonal without shear; times diag(-1, 1, 1) if the matrix mirrors.
    """
    linear = np.asarray(matrix, np.float64)[:3, :3]
    if not np.isfinite(matrix).all() or not np.allclose(np.asarray(matrix)[3], [0, 0, 0, 1]):
        raise ValueError("has a matrix that is no finite affine one")
    mirror = MIRROR if np.linalg.det(linear) < 0 else np.eye(3)
    left, sizes, right = np.linalg.svd(linear @ mirror)
    if sizes[-1] <= FLAT * sizes[0]:
        raise ValueError(f"is squashed flat: its matrix stretches by {', '.join(f'{size:.3g}' for size in sizes)}")
    axes = linear / np.linalg.norm(linear, axis=0)
    cosine = np.abs(axes.T @ axes - np.eye(3)).max()
    if cosine > SHEAR and not bake_shear:
        angle = np.degrees(np.arccos(min(cosine, 1.0)))
        raise ValueError(f"is sheared: two of its axes meet at {angle:.1f} degrees; apply its transform to its mesh")
    return left @ right, right.T @ np.diag(sizes) @ right @ mirror


# --- voxels ---------------------------------------------------------------------------------------------------------


def voxelise(mesh: trimesh.Trimesh, resolution: int) -> tuple[np.ndarray, bool]:
    """Occupancy of a mesh within [-.5, .5]^3 and whether the mesh is closed: bool (R, R, R), axes x, y, z.

    A voxel of a closed mesh is occupied if its centre is inside, or if a part passes through it that no centre lies in.
    """
    vertices, faces = weld(mesh)
    surface = surface_voxels(vertices, faces, resolution)
    kind = closure(faces)
    if kind == "open":
        return surface | enclosed(surface), False
    solid = solid_voxels(vertices, faces, resolution, by_parity=kind == "unoriented")
    around = np.ones((3, 3, 3), bool)
    thin = surface & ~binary_dilation(solid, around)
    thin |= surface & binary_dilation(thin, around)  # up to the solid part
    return solid | thin, True


def weld(mesh: trimesh.Trimesh) -> tuple[np.ndarray, np.ndarray]:
    """Vertices and faces with one vertex at each place: files repeat them where normals or textures are cut."""
    _, first, index = np.unique(
        np.rint(mesh.vertices * 1e6).astype(np.int64), axis=0, return_index=True, return_inverse=True
    )
    faces = index.ravel()[mesh.faces]
    return np.asarray(mesh.vertices)[first], faces[(faces != np.roll(faces, 1, axis=1)).all(axis=1)]


def closure(faces: np.ndarray) -> str:
    """`oriented`: each edge is run along as often in one direction as in the other; `unoriented`: an even number of
    faces meet at each; or `open`."""
    start, end = faces.ravel(), np.roll(faces, -1, axis=1).ravel()
    count = int(faces.max()) + 1
    if (np.sort(start * count + end) == np.sort(end * count + start)).all():
        return "oriented"
    _, meeting = np.unique(np.minimum(start, end) * count + np.maximum(start, end), return_counts=True)
    return "unoriented" if (meeting % 2 == 0).all() else "open"


def solid_voxels(vertices: np.ndarray, faces: np.ndarray, resolution: int, by_parity: bool) -> np.ndarray:
    """Which voxels' centres a closed surface winds around, or is crossed an odd number of times on the way to."""
    # Never exactly through a vertex or along an edge, which two triangles would count.
    place = (vertices + 0.5) * resolution - 0.5 + np.array([7.31e-5, 4.14e-5, 0])
    a, b, c = corners = by_corner(place, faces)
    area = (b[0] - a[0]) * (c[1] - a[1]) - (b[1] - a[1]) * (c[0] - a[0])
    upright = np.abs(area) > 1e-12  # not parallel to the columns, which it would not cross
    corners, area, height = corners[..., upright], area[upright], corners[:, 2, upright]
    corners[:, 2] = 1
    kept, bounds = in_picture(corners, resolution)
    lines, determinant = edge_functions(corners[..., kept])
    plane = (height[:, None, kept] * lines).sum(0) / determinant
    crossings = np.zeros((resolution, resolution, resolution + 1), np.int64)
    for which, x, y in fragments(lines, bounds):
        above = (
            np.ceil(plane[0][which] * x + plane[1][which] * y + plane[2][which]).clip(0, resolution).astype(np.int64)
        )
        np.add.at(crossings, (x, y, above), 1 if by_parity else np.sign(area[kept[which]]).astype(np.int64))
    winding = np.cumsum(crossings, axis=2)[..., :resolution]
    return winding % 2 == 1 if by_parity else winding != 0


def surface_voxels(vertices: np.ndarray, faces: np.ndarray, resolution: int) -> np.ndarray:
    """Voxels that a surface passes through, as lines along the three axes, `FINE` to a voxel's side, meet it."""
    grid = np.zeros((resolution,) * 3, bool)
    size = resolution * FINE
    cells = np.floor((vertices + 0.5) * resolution).clip(0, resolution - 1).astype(np.int64)
    grid[tuple(cells[faces.ravel()].T)] = True
    for axis in range(3):
        order = [(axis + 1) % 3, (axis + 2) % 3, axis]
        corners = by_corner((vertices[:, order] + 0.5) * size - 0.5, faces)
        height = (corners[:, 2] + 0.5) / FINE
        corners[:, 2] = 1
        kept, bounds = in_picture(corners, size)
        lines, determinant = edge_functions(corners[..., kept])
        with np.errstate(divide="ignore", invalid="ignore"):  # parallel to the lines: another axis meets it
            plane = (height[:, None, kept] * lines).sum(0) / determinant
        for which, column, row in fragments(lines, bounds):
            level = plane[0][which] * column + plane[1][which] * row + plane[2][which]
            low, high = height[:, kept].min(0)[which], height[:, kept].max(0)[which]
            level = np.floor(level.clip(low, high)).clip(0, resolution - 1).astype(np.int64)
            grid.transpose(order)[column // FINE, row // FINE, level] = True
    return grid


def enclosed(surface: np.ndarray) -> np.ndarray:
    """Voxels with some of the surface on either side along all three axes."""
    result = np.ones_like(surface)
    for axis in range(3):
        before = np.logical_or.accumulate(surface, axis)
        after = np.flip(np.logical_or.accumulate(np.flip(surface, axis), axis), axis)
        result &= before & after
    return result


# --- scenes ---------------------------------------------------------------------------------------------------------


def to_floor(objects: Sequence[GlbObject]) -> tuple[list[GlbObject], np.ndarray]:
    """The same with the scene's lowest point at z = 0 and the middle of its footprint at the origin, and the shift."""
    points = np.concatenate([thing.placed().vertices for thing in objects])
    low, high = points.min(axis=0), points.max(axis=0)
    shift = np.r_[(low + high)[:2] / 2, low[2]]
    moved = [GlbObject(o.name, o.mesh, o.rotation, o.sides, o.middle - shift) for o in objects]
    return moved, shift


def make_scene(
    path: Path,
    folder: Path,
    *,
    resolution: int,
    image_size: int,
    isotropic_scale: bool,
    bake_shear: bool,
    conditionals: Sequence[str],
) -> None:
    """Read a file and write its scene."""
    objects, shift = to_floor(load_objects(path, isotropic_scale, bake_shear))
    grids = []
    for thing in objects:
        grid, closed = voxelise(thing.mesh, resolution)
        if not closed:
            warnings.warn(f"{path}: node {thing.name!r} is not closed, its inside is a guess", stacklevel=2)
        grids.append(grid)
    tensors = poses(*(np.stack([getattr(o, name) for o in objects]) for name in ("middle", "sides", "rotation")))
    meshes = [thing.placed() for thing in objects]
    own = [mesh_colors(thing.mesh) for thing in objects]
    colors = [object_color(i) if color is None else color for i, color in enumerate(own)]
    camera = Camera.floor_view(view_scale(meshes))
    written = picture_conditionals(render(meshes, colors, camera, image_size, supersample=2), len(objects))
    written["cond_tokens"] = descriptors(tensors, np.random.default_rng(int(digest(folder.name), 16)))
    metadata = {
        "scene_id": folder.name,
        "num_objects": len(objects),
        "object_ids": [thing.name for thing in objects],
        "source": path.name,
        "frame": "floor",
        "scene_shift": shift.tolist(),
        "scene_scale": 1.0,
        "camera": camera_metadata(camera, image_size),
        "shape_layout": "tokens_channels",
        "isotropic_scale": isotropic_scale,
        "resolution": resolution,
    }
    write_scene(
        folder,
        tensors={"occupancy": pack_occupancy(np.stack(grids)), **tensors},
        conditionals={name: written[name] for name in conditionals} or None,
        metadata=metadata,
        kind="shapes",
    )


def digest(scene_id: str) -> str:
    return hashlib.sha256(scene_id.encode()).hexdigest()[:16]


def choose_splits(scene_ids: Sequence[str], val_fraction: float) -> dict[str, str]:
    """A split of each scene that depends on its id alone, but that one of several is always in `val`."""
    ordered = sorted(scene_ids, key=digest)
    splits = {name: "val" if int(digest(name), 16) < val_fraction * 16**16 else "train" for name in ordered}
    if val_fraction > 0 and len(ordered) > 1:
        splits[ordered[0]] = "val"
    return splits


def build_glb(
    source: str | Path,
    out: str | Path,
    split: str | None = None,
    *,
    val_fraction: float = 0.1,
    resolution: int = 16,
    image_size: int = 32,
    isotropic_scale: bool = True,
    bake_shear: bool = False,
    conditionals: Sequence[str] = CONDITIONS,
    progress: bool = True,
) -> int:
    """Make scenes of a GLB file, or of all in a folder and below it; those that are there are written anew.

    Args:
        split: of all scenes; without it, `val` for this share of them, chosen by scene_id, and `train` for the others.
        resolution, image_size: side of the occupancy grids and of the pictures.
        isotropic_scale: one size per object, its longest side; otherwise three, and each shape fills its cube.
        bake_shear: put the shear of a node into its mesh instead of refusing it.
        conditionals: which to write, of image, pointmap, masks, cond_tokens.

    Returns:
        The number of scenes.

    Raises:
        ValueError: an argument is out of range, or a file is bad; names file and node.
    """
    if split is not None and split not in SPLITS:
        raise ValueError(f"`split` must be one of {', '.join(SPLITS)}, got {split!r}")
    if not 0 <= val_fraction < 1:
        raise ValueError(f"`val_fraction` must lie in [0, 1), got {val_fraction:g}")
    if resolution < 2 or resolution % 2:
        raise ValueError(f"`resolution` must be an even number of at least 2, got {resolution}")
    if image_size < 8:
        raise ValueError(f"`image_size` must be at least 8, got {image_size}")
    unknown = [name for name in conditionals if name not in CONDITIONS]
    if unknown:
        raise ValueError(f"`conditionals` has the unknown {', '.join(unknown)}; known are {', '.join(CONDITIONS)}")
    scenes = find_scenes(source)
    splits = dict.fromkeys(scenes, split) if split else choose_splits(list(scenes), val_fraction)
    for name, path in tqdm(scenes.items(), disable=not progress, unit="scene", desc="glb"):
        make_scene(
            path,
            Path(out) / splits[name] / name,
            resolution=resolution,
            image_size=image_size,
            isotropic_scale=isotropic_scale,
            bake_shear=bake_shear,
            conditionals=conditionals,
        )
    return len(scenes)
