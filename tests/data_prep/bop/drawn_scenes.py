"""Scenes of coloured balls, drawn exactly by their rays, for tests of the formats of poses."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import trimesh
from scipy.spatial.transform import Rotation

from data_prep.bop.format import RenderedFrame, RenderedObject, write_scene
from data_prep.bop.models import write_models

HEIGHT, WIDTH = 48, 64
K = np.array([[80.0, 0, 31.5], [0, 82.0, 23.5], [0, 0, 1]])
RADIUS = 0.05
WALL = 1.5
# Two of one model, overlapping; one beside them; one that is hidden by the first.
PLACES = ((1, (-0.05, 0.0, 0.6)), (1, (0.0, 0.03, 0.7)), (2, (0.15, 0.05, 0.65)), (2, (-0.06, 0.0, 0.8)))


def draw_ball(centre: np.ndarray) -> np.ndarray:
    """(H, W) distances along z, infinite beside the ball."""
    v, u = np.mgrid[:HEIGHT, :WIDTH]
    rays = np.stack([u, v, np.ones_like(u)], -1) @ np.linalg.inv(K).T
    square, along = (rays**2).sum(-1), rays @ centre
    root = along**2 - square * (centre @ centre - RADIUS**2)
    return np.where(root > 0, (along - np.sqrt(root.clip(0))) / square, np.inf)


def draw_frame(im_id: int, places=PLACES) -> RenderedFrame:
    """A picture of balls, turned and coloured at random, before a wall."""
    rng = np.random.default_rng(im_id)
    shifts = rng.uniform(-0.01, 0.01, (len(places), 3))
    centres = [np.add(centre, shift) for (_, centre), shift in zip(places, shifts, strict=True)]
    layers = np.stack([*map(draw_ball, centres), np.full((HEIGHT, WIDTH), WALL)])
    nearest = layers.argmin(0)
    objects = []
    for number, (object_id, _) in enumerate(places):
        pose = np.eye(4)
        pose[:3, :3] = Rotation.random(random_state=rng.integers(1 << 30)).as_matrix()
        pose[:3, 3] = centres[number]
        objects.append(RenderedObject(object_id, pose, np.isfinite(layers[number]), nearest == number))
    colours = rng.integers(0, 256, (len(layers), 3), np.uint8)
    return RenderedFrame(im_id, colours[nearest], layers.min(0).astype(np.float32), K, objects)


def ball() -> trimesh.Trimesh:
    mesh = trimesh.creation.icosphere(subdivisions=2, radius=RADIUS)
    mesh.visual.vertex_colors = np.random.default_rng(0).integers(0, 256, (len(mesh.vertices), 4), np.uint8)
    return mesh


def write_dataset(root: Path, scenes: int = 2, frames: int = 3, places=PLACES) -> list[list[RenderedFrame]]:
    """Models 1 and 2, and scenes 0, 1, ... of the split `train`; returns what was drawn."""
    axis = {"symmetries_continuous": [{"axis": [0, 0, 1], "offset": [0, 0, 0]}]}
    write_models(root, {1: ball(), 2: ball()}, {2: axis})
    drawn = [[draw_frame(100 * scene + im_id, places) for im_id in range(frames)] for scene in range(scenes)]
    for scene_id, each in enumerate(drawn):
        write_scene(root, "train", scene_id, each)
    return drawn
