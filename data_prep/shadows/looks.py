"""How an object's picture looks: its colours, its surface, and the light of the picture, which is not the shadow's.

If it were the shadow's, a network would read the direction of the light off the shading and ignore the angles it is
given.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import trimesh

CREASE = np.radians(40)  # edges sharper than this are shaded as edges
PATTERNS = {"solid": 0.3, "parts": 0.25, "gradient": 0.15, "checker": 0.1, "stripes": 0.1, "noise": 0.1}


@dataclass(frozen=True)
class Look:
    """Surface and lighting of an object's picture. Colours are linear RGB in [0, 1]."""

    pattern: str
    """solid, parts, gradient, checker, stripes, noise, or own (the colours of the mesh)"""
    colours: np.ndarray
    """(4, 3)"""
    frequency: float
    roughness: float
    metallic: float
    environment: np.ndarray
    """(3,) radiance from all sides"""
    key_position: np.ndarray
    """(3,) of an area light that looks at the object"""
    key_size: float
    key_power: np.ndarray
    """(3,) irradiance that it would give a surface that faces it"""
    texture_seed: int


def random_look(rng: np.random.Generator, own_colours: bool = False) -> Look:
    """A varied look; meshes with colours of their own keep them nine times in ten."""
    hue = rng.random()
    hues = (hue + np.array([0, rng.choice([0.08, 0.33, 0.5]), 0.5, 0.66]) + rng.normal(0, 0.04, 4)) % 1
    saturation = rng.uniform(0.05, 0.9) ** rng.uniform(0.6, 1.6)
    value = rng.uniform(0.25, 0.95, 4)
    colours = np.stack(
        [hsv_to_rgb(h, min(1, saturation * rng.uniform(0.6, 1.2)), v) for h, v in zip(hues, value, strict=True)]
    )
    pattern = str(rng.choice(list(PATTERNS), p=list(PATTERNS.values())))
    keeps = rng.random() < 0.9
    azimuth, height = rng.uniform(0, 2 * np.pi), rng.uniform(0.15, 1.0)
    flat = np.sqrt(1 - height**2)
    tint = 1 + rng.uniform(-0.08, 0.08, (2, 3))
    return Look(
        pattern="own" if own_colours and keeps else pattern,
        colours=colours**2.2,
        frequency=float(rng.uniform(1.0, 5.0)),
        roughness=float(rng.uniform(0.15, 0.9)),
        metallic=float(rng.uniform(0.6, 1.0)) if rng.random() < 0.2 else 0.0,
        environment=rng.uniform(0.3, 0.6) * tint[0],
        key_position=6 * np.array([flat * np.cos(azimuth), flat * np.sin(azimuth), height]),
        key_size=float(rng.uniform(0.5, 4.0)),
        key_power=rng.uniform(0.6, 2.2) * tint[1],
        texture_seed=int(rng.integers(2**31)),
    )


def hsv_to_rgb(hue: float, saturation: float, value: float) -> np.ndarray:
    steps = (np.array([5, 3, 1]) + 6 * hue) % 6
    return value * (1 - saturation * np.clip(np.minimum(steps, 4 - steps), 0, 1))


def has_colours(mesh: trimesh.Trimesh) -> bool:
    return mesh.visual.defined


def texture_picture(look: Look, size: int = 128) -> np.ndarray:
    """(size, size, 3) float32 linear, made to be tiled."""
    rng = np.random.default_rng(look.texture_seed)
    y, x = np.mgrid[0:size, 0:size] / size
    if look.pattern == "checker":
        weight = ((x < 0.5) ^ (y < 0.5)).astype(float)
    elif look.pattern == "stripes":
        weight = ((x + (y if rng.random() < 0.5 else 0)) % 1 < rng.uniform(0.2, 0.6)).astype(float)
    else:
        waves = rng.integers(-4, 5, (12, 2))
        phases = rng.uniform(0, 2 * np.pi, 12)
        angles = 2 * np.pi * (waves[:, 0, None, None] * x + waves[:, 1, None, None] * y) + phases[:, None, None]
        weight = 0.5 + 0.5 * np.tanh(1.5 * np.cos(angles).sum(axis=0) / np.sqrt(6))
    return (look.colours[0] + weight[..., None] * (look.colours[1] - look.colours[0])).astype(np.float32)


def smooth_normals(mesh: trimesh.Trimesh) -> np.ndarray:
    """Normals at the corners of each face (F, 3, 3): averaged over faces that meet at less than `CREASE`."""
    flat = mesh.face_adjacency[mesh.face_adjacency_angles < CREASE]
    patch = trimesh.graph.connected_component_labels(flat, node_count=len(mesh.faces))
    keys = mesh.faces.astype(np.int64) * (patch.max() + 1) + patch[:, None]
    unique, place = np.unique(keys, return_inverse=True)
    weighted = np.repeat(mesh.face_normals * mesh.area_faces[:, None], 3, axis=0)
    place = place.ravel()
    total = np.stack([np.bincount(place, weighted[:, axis], minlength=len(unique)) for axis in range(3)], axis=1)
    length = np.linalg.norm(total, axis=1, keepdims=True)
    normals = (total / np.maximum(length, 1e-12))[place].reshape(-1, 3, 3)
    return np.where(np.linalg.norm(normals, axis=2, keepdims=True) > 0.5, normals, mesh.face_normals[:, None])


def corner_colours(mesh: trimesh.Trimesh, look: Look) -> np.ndarray:
    """Linear colours at the corners of each face (F, 3, 3)."""
    shape = (len(mesh.faces), 3, 3)
    if look.pattern == "own":
        visual = mesh.visual.to_color() if mesh.visual.kind == "texture" else mesh.visual
        if visual.kind == "face":
            srgb = np.repeat(visual.face_colors[:, None, :3], 3, axis=1)
        else:
            srgb = visual.vertex_colors[mesh.faces][..., :3]
        return (srgb / 255.0) ** 2.2
    if look.pattern == "parts":
        label = trimesh.graph.connected_component_labels(mesh.face_adjacency, node_count=len(mesh.faces))
        return np.broadcast_to(look.colours[label % len(look.colours)][:, None], shape)
    if look.pattern == "gradient":
        low, high = mesh.bounds[:, 2]
        share = (mesh.triangles[..., 2:] - low) / max(high - low, 1e-9)
        return look.colours[0] + share * (look.colours[1] - look.colours[0])
    return np.broadcast_to(look.colours[0], shape)


def box_coordinates(mesh: trimesh.Trimesh, frequency: float) -> np.ndarray:
    """Texture coordinates at the corners (F, 3, 2): each face is projected along its main axis."""
    axis = np.abs(mesh.face_normals).argmax(axis=1)
    others = np.array([[1, 2], [0, 2], [0, 1]])[axis]
    return np.take_along_axis(mesh.triangles, others[:, None, :], axis=2) * frequency / 2
