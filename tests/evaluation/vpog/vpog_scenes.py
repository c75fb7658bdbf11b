"""A small BOP dataset on disk: two objects, one of them symmetric, of which one stands twice in each picture."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import trimesh
from scipy.spatial.transform import Rotation

from backlot.mesh_views import instance_masks, render_views
from data_prep.bop.format import RenderedFrame, RenderedObject, write_scene, write_targets
from data_prep.bop.models import write_models

SIZE = (96, 128)
K = np.array([[150.0, 0, 63.5], [0, 150, 47.5], [0, 0, 1]])
OBJECT, BOX = 1, 2
HALF_TURN = np.diag([-1.0, -1, 1, 1])
PLACES = ((OBJECT, (-0.08, 0.0, 0.45)), (OBJECT, (0.07, 0.05, 0.4)), (BOX, (0.06, -0.06, 0.45)))


def make_meshes() -> dict[int, trimesh.Trimesh]:
    """A lump with a nose, and a box that looks the same after half a turn about z; about 0.1 m."""
    lump = trimesh.creation.icosphere(subdivisions=2, radius=0.04)
    vertices = np.asarray(lump.vertices)
    lump.vertices = vertices * (1 + 0.6 * np.exp(-400 * ((vertices - (0.04, 0, 0.01)) ** 2).sum(1)))[:, None]
    box = trimesh.creation.box((0.08, 0.05, 0.03))
    for mesh, tint in ((lump, 0), (box, 1)):
        mesh.vertices -= mesh.bounds.mean(0)
        shade = np.round(255 * (mesh.vertices - mesh.bounds[0]) / np.ptp(mesh.bounds, axis=0)).astype(np.uint8)
        shade = np.roll(shade, tint, axis=1) if tint == 0 else np.abs(shade.astype(int) - 128).astype(np.uint8) * 2
        mesh.visual.vertex_colors = np.column_stack([shade, np.full(len(shade), 255, np.uint8)])
    return {OBJECT: lump, BOX: box}


def make_dataset(root: Path, count: int = 2, split: str = "test") -> Path:
    """Write the dataset; poses are a function of the picture's number."""
    meshes = make_meshes()
    write_models(root, meshes, {BOX: {"symmetries_discrete": [HALF_TURN.ravel().tolist()]}})
    rng = np.random.default_rng(3)
    frames = []
    for im_id in range(count):
        poses = np.tile(np.eye(4), (len(PLACES), 1, 1))
        poses[:, :3, :3] = Rotation.random(len(PLACES), rng=rng).as_matrix()
        poses[:, :3, 3] = [place for _, place in PLACES]
        bodies = [meshes[object_id] for object_id, _ in PLACES]
        views = render_views(bodies, poses[None], K, SIZE, backend="zbuffer")
        alone, seen = instance_masks(bodies, poses[None], K, SIZE)[0], views.masks(len(bodies))[0]
        objects = [
            RenderedObject(object_id, pose, mask, visible)
            for (object_id, _), pose, mask, visible in zip(PLACES, poses, alone, seen, strict=True)
        ]
        depth = np.where(views.depth[0] > 0, views.depth[0], 0.9)
        frames.append(RenderedFrame(im_id, views.rgb[0], depth, K, objects))
    write_scene(root, split, 0, frames)
    write_targets(root, split)
    return root
