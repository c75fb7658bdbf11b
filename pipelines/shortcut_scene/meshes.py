"""Meshes of objects: from occupancy to a surface, from surfaces to a scene, from a scene to a GLB file and back.

A scene here is z up, in metres, with one node per object; the transform of a node is the object's pose, its geometry
lies in the object's own frame: p_scene = R (s * p_object) + t with p_object in [-.5, .5]^3. glTF is y up: in a file the
transform of each node has been turned by (x, y, z) -> (x, z, -y), the geometry is the same; `load_scene` turns it back.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import trimesh
from trimesh.visual import ColorVisuals, TextureVisuals
from trimesh.visual.material import PBRMaterial

logger = logging.getLogger(__name__)
POSE = "scene_from_object"  # what `place` leaves in a mesh's metadata for `assemble`
GLTF_FROM_SCENE = np.array([[1.0, 0, 0, 0], [0, 0, 1, 0], [0, -1, 0, 0], [0, 0, 0, 1]])
TAUBIN_STEPS = 10


def mesh_from_logits(logits: np.ndarray, threshold: float = 0.0, smooth: bool = False) -> trimesh.Trimesh:
    """The surface of what a decoder says is occupied, by marching cubes, watertight and with its normals outwards.

    Args:
        logits: (R, R, R), axes x, y, z; cell i has its centre at (i + .5) / R - .5.
        threshold: the logit above which a cell is occupied.
        smooth: even out the steps between cells (Taubin's filter, which does not shrink).

    Where nothing is occupied the mesh is a box of side 1, and a warning says so.

    Raises:
        ValueError: the grid is no cube, or holds NaN.
    """
    from skimage.measure import marching_cubes

    logits = np.asarray(logits, np.float32)
    if logits.ndim != 3 or len(set(logits.shape)) != 1:
        raise ValueError(f"`logits` must have shape (R, R, R), not {logits.shape}")
    if np.isnan(logits).any():
        raise ValueError("`logits` must be numbers, some are NaN")
    if not (logits > threshold).any():
        logger.warning("an object's occupancy is empty: a box stands in its place")
        return trimesh.creation.box()
    # 2 p - 1, and thereby bounded: between a very sure cell and an unsure one the surface would else lie in the latter
    values = np.tanh((logits - threshold) / 2)
    # Not 0, where triangles have no area. Not nearly 0 either: vertices would fall together in float32. And occupied
    # cells a little stronger: between two that touch at an edge, equal ones would be joined on one side of it only.
    values = np.where(logits > threshold, np.maximum(values, 1e-2), 0.98 * np.minimum(values, -1e-2))
    # Around the grid each cell is mirrored with the opposite sign: a surface that leaves it is cut at its very border.
    padded = np.pad(values, 1, mode="edge")
    shell = np.ones(padded.shape, bool)
    shell[1:-1, 1:-1, 1:-1] = False
    padded[shell] = -np.abs(padded[shell])
    vertices, faces, _, _ = marching_cubes(padded, 0.0)
    # vertex 0 is the centre of the first cell of the shell, half a cell outside the grid
    mesh = trimesh.Trimesh((vertices - 0.5) / len(logits) - 0.5, faces, process=True)
    if mesh.volume < 0:
        mesh.invert()
    if smooth:
        trimesh.smoothing.filter_taubin(mesh, iterations=TAUBIN_STEPS)
    return mesh


def mesh_from_occupancy(occupancy: np.ndarray, smooth: bool = False) -> trimesh.Trimesh:
    """As `mesh_from_logits`, of a grid (R, R, R) of truth values: the surface is halfway between cells."""
    return mesh_from_logits(np.where(np.asarray(occupancy, bool), 10.0, -10.0), smooth=smooth)


def pose_matrix(rotation: np.ndarray, log_scale: np.ndarray, translation: np.ndarray) -> np.ndarray:
    """`scene_from_object` (4, 4) of a rotation (3, 3), logarithms of side lengths (3,) and a translation (3,)."""
    matrix = np.eye(4)
    matrix[:3, :3] = np.asarray(rotation, np.float64) * np.exp(np.asarray(log_scale, np.float64))
    matrix[:3, 3] = translation
    return matrix


def place(
    mesh: trimesh.Trimesh, rotation: np.ndarray, log_scale: np.ndarray, translation: np.ndarray
) -> trimesh.Trimesh:
    """A copy of an object's mesh at its place in the scene; arguments as in `pose_matrix`.

    Its metadata keep the pose, by which `assemble` makes it the transform of a node.
    """
    pose = pose_matrix(rotation, log_scale, translation)
    placed = mesh.copy()
    placed.apply_transform(pose)
    placed.metadata[POSE] = pose.tolist()
    return placed


def assemble(meshes: Sequence[trimesh.Trimesh], names: Sequence[str], colors: Sequence | None = None) -> trimesh.Scene:
    """A scene of placed meshes, one node for each.

    Args:
        meshes: in scene coordinates. Of those made by `place` the node gets the pose and the geometry the object's own
            coordinates; the transform of any other node is the identity.
        names: of the nodes, all different.
        colors: of each object, sRGB in [0, 1]; None keeps what the meshes have.

    Raises:
        ValueError: counts differ, or a name is empty or there twice.
    """
    if len(names) != len(meshes) or (colors is not None and len(colors) != len(meshes)):
        given = "" if colors is None else f" and {len(colors)} `colors`"
        raise ValueError(f"{len(meshes)} `meshes` need as many names and colours, got {len(names)} `names`{given}")
    if len(set(names)) != len(names) or not all(names):
        raise ValueError(f"`names` must all be different and not empty, got {', '.join(map(repr, names))}")
    scene = trimesh.Scene()
    for number, (mesh, name) in enumerate(zip(meshes, names, strict=True)):
        mesh = mesh.copy()
        pose = np.array(mesh.metadata.pop(POSE, np.eye(4)))
        mesh.apply_transform(np.linalg.inv(pose))
        if colors is not None:
            mesh.visual = uniform_color(mesh, colors[number])
        scene.add_geometry(mesh, node_name=name, geom_name=name, transform=pose)
    return scene


def export(scene: trimesh.Scene, path: str | Path, per_object_obj: bool = False) -> None:
    """Write a scene as GLB, y up, with the names of its nodes and the colours of its objects.

    Args:
        per_object_obj: also write `<stem>-<number>-<name>.obj` of each object, in scene coordinates (z up).
    """
    path = Path(path)
    if path.suffix.lower() != ".glb":
        raise ValueError(f"`path` must end in .glb, got {path}")
    path.parent.mkdir(parents=True, exist_ok=True)
    turned = trimesh.Scene()
    for number, node in enumerate(scene.graph.nodes_geometry):
        pose, geometry = scene.graph[node]
        mesh = scene.geometry[geometry].copy()
        if per_object_obj:
            placed = mesh.copy()
            placed.apply_transform(pose)
            name = re.sub(r"[^\w.-]", "_", node)
            placed.export(path.with_name(f"{path.stem}-{number}-{name}.obj"))
        mesh.visual = to_material(mesh)
        turned.add_geometry(mesh, node_name=node, geom_name=node, transform=GLTF_FROM_SCENE @ pose)
    path.write_bytes(turned.export(file_type="glb"))


def load_scene(path: str | Path) -> trimesh.Scene:
    """Read a GLB as a z-up scene without nested nodes, what `export` wrote or any other.

    Raises:
        ValueError: it is no GLB file, or there is no mesh in it.
    """
    try:
        loaded = trimesh.load_scene(Path(path), file_type="glb", process=False)
    except (ValueError, KeyError, IndexError, TypeError) as error:
        raise ValueError(f"{path} is no GLB file ({error})") from None
    scene = trimesh.Scene()
    for node in loaded.graph.nodes_geometry:
        pose, geometry = loaded.graph[node]
        mesh = loaded.geometry[geometry].copy()
        if isinstance(mesh, trimesh.Trimesh):
            mesh.visual = from_material(mesh)
            scene.add_geometry(mesh, node_name=node, geom_name=node, transform=GLTF_FROM_SCENE.T @ pose)
    if not scene.geometry:
        raise ValueError(f"{path} holds no meshes")
    return scene


# --- colours --------------------------------------------------------------------------------------------------------
# A GLB without a material would be shown as bare metal, and the colours of materials are linear.


def uniform_color(mesh: trimesh.Trimesh, color: Sequence[float]) -> ColorVisuals:
    """One sRGB colour in [0, 1] for all of a mesh."""
    rgba = np.append(np.round(255 * np.clip(color, 0, 1)), 255).astype(np.uint8)
    return ColorVisuals(mesh, vertex_colors=np.tile(rgba, (len(mesh.vertices), 1)))


def to_material(mesh: trimesh.Trimesh) -> ColorVisuals | TextureVisuals:
    """A mesh of one colour as one of a matt material; others as they are."""
    visual = mesh.visual
    colors = visual.vertex_colors[:, :3] / 255 if visual.kind in ("vertex", "face") else np.zeros((0, 3))
    if len(colors) == 0 or np.ptp(colors, axis=0).any():
        return visual
    linear = np.where(colors[0] <= 0.04045, colors[0] / 12.92, ((colors[0] + 0.055) / 1.055) ** 2.4)
    material = PBRMaterial(baseColorFactor=np.append(linear, 1.0), metallicFactor=0.0, roughnessFactor=0.8)
    return TextureVisuals(material=material)


def from_material(mesh: trimesh.Trimesh) -> ColorVisuals | TextureVisuals:
    """The inverse of `to_material`, to 8 bits of the linear colour."""
    visual = mesh.visual
    if visual.kind != "texture" or visual.uv is not None:
        return visual
    linear = visual.material.main_color[:3] / 255
    return uniform_color(mesh, np.where(linear <= 0.0031308, linear * 12.92, 1.055 * linear ** (1 / 2.4) - 0.055))
