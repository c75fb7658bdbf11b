"""Pictures of one object from all sides, with their depths and poses: what VPOG compares a picture with.

A set is one file, `<object id, six digits>.safetensors`: `rgba` (T, H, W, 4) uint8 whose alpha is 255 on the object and
0 elsewhere, `depth` (T, H, W) uint16 times `depth_scale` metres, 0 where there is nothing, `camera_from_object`
(T, 4, 4) and `K` (3, 3) float64; its metadata has, as JSON under `templates`, `object_id`, `diameter`, `depth_scale`,
`mesh_hash` and `format_version`.
The folder of pictures of other tools is read and written too, see `save_png_folder`.
"""

# ruff: noqa: N803 - K is what everybody calls it
from __future__ import annotations

import io
import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import safetensors
import torch
import torch.nn.functional as F
import trimesh
from PIL import Image
from safetensors.numpy import save
from scipy.spatial import ConvexHull
from scipy.spatial.distance import pdist

from backlot.bodies import Light
from backlot.files import write_file
from backlot.mesh_views import Backend, render_views
from backlot.views import look_at_poses, template_camera, view_directions

FORMAT_VERSION = 1
METADATA_KEY = "templates"  # one entry: several would be stored in any order
DEPTH_STEPS = 65_535
PNG_DEPTH_SCALE = 1e-4
"""Metres of a step of the depth pictures: tenths of a millimetre, up to 6.5 m."""
MILLIMETRE = 1e-3
SMOOTH = 0.02  # neighbouring depths that differ by a larger share belong to different surfaces


@dataclass(frozen=True, eq=False)
class TemplateSet:
    """T views of an object.

    Args:
        rgba: (T, H, W, 4) uint8; alpha is 255 where the pixel's centre sees the object, and 0 elsewhere, as the colour.
        depth: (T, H, W) float32 along the camera's z, in metres; positive exactly where alpha is 255.
        camera_from_object: (T, 4, 4) float64 rigid, metres, OpenCV axes.
        K: (3, 3) float64, in pixels; integer coordinates are pixels' centres.
        diameter: of the object, in metres.
        object_id: its number in the data set.
        mesh_hash: of what was rendered, empty if unknown.
    """

    rgba: np.ndarray
    depth: np.ndarray
    camera_from_object: np.ndarray
    K: np.ndarray
    diameter: float
    object_id: int
    mesh_hash: str = ""

    def __post_init__(self) -> None:
        number, *size = self.depth.shape
        if self.rgba.shape != (number, *size, 4) or self.camera_from_object.shape != (number, 4, 4):
            shapes = [each.shape for each in (self.rgba, self.depth, self.camera_from_object)]
            raise ValueError(f"`rgba`, `depth` and `camera_from_object` do not fit: {shapes}")

    def __len__(self) -> int:
        return len(self.depth)

    @property
    def masks(self) -> np.ndarray:
        """(T, H, W) bool: where the object is."""
        return self.rgba[..., 3] > 0

    def subset(self, indices: Sequence[int] | np.ndarray) -> TemplateSet:
        """The views of these numbers, in this order."""
        rows = np.asarray(indices, np.int64)
        parts = {name: getattr(self, name)[rows] for name in ("rgba", "depth", "camera_from_object")}
        return replace(self, **parts)

    def rotate_in_plane(self, copies: int) -> TemplateSet:
        """Turned copies: view t, turned by k / copies of a full turn from x to y, has the number k * T + t.

        Pictures turn about the principal point, poses become R_z(angle) pose, K stays.

        Raises:
            ValueError: pixels are not square.
        """
        if copies < 1:
            raise ValueError(f"`copies` must be at least 1, got {copies}")
        if not np.isclose(self.K[0, 0], self.K[1, 1], rtol=1e-6) or abs(self.K[0, 1]) > 1e-6 * self.K[0, 0]:
            raise ValueError("templates can only be turned in their plane where pixels are square")
        turned = [turn(self, 2 * np.pi * k / copies) if k else self for k in range(copies)]
        names = ("rgba", "depth", "camera_from_object")
        return replace(self, **{name: np.concatenate([getattr(each, name) for each in turned]) for name in names})

    def save(self, path: Path) -> None:
        """Write the file, whole or not at all."""
        scale = max(float(self.depth.max(initial=0)), 1e-9) / DEPTH_STEPS
        steps = np.rint(self.depth / scale)
        # what is seen is never 0, however near
        tensors = {
            "rgba": np.ascontiguousarray(self.rgba),
            "depth": np.where(self.depth > 0, np.maximum(steps, 1), 0).astype(np.uint16),
            "camera_from_object": np.ascontiguousarray(self.camera_from_object, np.float64),
            "K": np.ascontiguousarray(self.K, np.float64),
        }
        metadata = {
            "format_version": FORMAT_VERSION,
            "object_id": self.object_id,
            "diameter": self.diameter,
            "depth_scale": scale,
            "mesh_hash": self.mesh_hash,
        }
        path.parent.mkdir(parents=True, exist_ok=True)
        write_file(path, save(tensors, {METADATA_KEY: json.dumps(metadata)}))

    @classmethod
    def load(cls, path: Path, indices: Sequence[int] | None = None) -> TemplateSet:
        """Read a file, or only the views of these numbers, in this order.

        Raises:
            FileNotFoundError: there is none; the message names the command that renders it.
            ValueError: the file is damaged, or holds something else.
        """
        if not path.is_file():
            raise FileNotFoundError(
                f"there are no templates {path}: render them with"
                f" python -m data_prep.bop render_templates --models MODELS --out {path.parent}"
            )
        try:
            with safetensors.safe_open(path, "numpy") as file:
                metadata = json.loads((file.metadata() or {}).get(METADATA_KEY, "{}"))
                if metadata.get("format_version") != FORMAT_VERSION:
                    raise ValueError(f"{path} holds no templates of format {FORMAT_VERSION}")
                names = ("rgba", "depth", "camera_from_object")
                if indices is None:
                    rgba, depth, poses = (file.get_tensor(name) for name in names)
                else:
                    rgba, depth, poses = (read_rows(file.get_slice(name), indices) for name in names)
                intrinsics = file.get_tensor("K")
        except safetensors.SafetensorError as error:
            raise ValueError(f"{path} is damaged: {error}") from error
        metres = depth.astype(np.float32) * np.float32(metadata["depth_scale"])
        return cls(
            rgba,
            metres,
            poses,
            intrinsics,
            metadata["diameter"],
            metadata["object_id"],
            metadata["mesh_hash"],
        )

    def save_png_folder(self, folder: Path) -> None:
        """Write `<id>/<view>.png`, `<id>/<view>_depth.png` (16 bits, tenths of a millimetre) and
        `object_poses/<id>.npy` (T, 4, 4) with translations in millimetres, and K, diameter and hash as
        `<id>/camera.json`; numbers have six digits.
        """
        if self.depth.max(initial=0) > DEPTH_STEPS * PNG_DEPTH_SCALE:
            raise ValueError(f"depths beyond {DEPTH_STEPS * PNG_DEPTH_SCALE:g} m do not fit into 16 bits")
        place, poses = folder / f"{self.object_id:06d}", folder / "object_poses"
        place.mkdir(parents=True, exist_ok=True)
        poses.mkdir(exist_ok=True)
        for view, (rgba, depth) in enumerate(zip(self.rgba, self.depth, strict=True)):
            steps = np.rint(depth / PNG_DEPTH_SCALE).astype(np.uint16)
            for name, picture in ((f"{view:06d}.png", rgba), (f"{view:06d}_depth.png", steps)):
                buffer = io.BytesIO()
                Image.fromarray(picture).save(buffer, "PNG")
                write_file(place / name, buffer.getvalue(), durable=False)
        buffer = io.BytesIO()
        scaled = self.camera_from_object.copy()
        scaled[:, :3, 3] /= MILLIMETRE
        np.save(buffer, scaled, allow_pickle=False)
        write_file(poses / f"{self.object_id:06d}.npy", buffer.getvalue())
        camera = {"K": self.K.tolist(), "diameter": self.diameter, "mesh_hash": self.mesh_hash}
        write_file(place / "camera.json", json.dumps(camera, indent=1) + "\n")

    @classmethod
    def load_png_folder(
        cls, folder: Path, object_id: int, K: np.ndarray | None = None, diameter: float | None = None
    ) -> TemplateSet:
        """Read what `save_png_folder` writes; other tools' folders lack `camera.json`, so they need `K` and `diameter`.

        Raises:
            FileNotFoundError: a file is missing.
        """
        place = folder / f"{object_id:06d}"
        camera = {"mesh_hash": ""}
        if K is None or diameter is None:
            if not (place / "camera.json").is_file():
                raise FileNotFoundError(f"{place} has no camera.json: give `K` and `diameter`")
            camera = json.loads((place / "camera.json").read_text(encoding="utf-8"))
        poses = np.load(folder / "object_poses" / f"{object_id:06d}.npy", allow_pickle=False).astype(np.float64)
        poses[:, :3, 3] *= MILLIMETRE
        rgba = [np.asarray(Image.open(place / f"{view:06d}.png").convert("RGBA")) for view in range(len(poses))]
        depth = [np.asarray(Image.open(place / f"{view:06d}_depth.png"), np.float32) for view in range(len(poses))]
        metres = np.stack(depth) * np.float32(PNG_DEPTH_SCALE)
        intrinsics = np.asarray(camera["K"] if K is None else K, np.float64)
        size = camera["diameter"] if diameter is None else diameter
        return cls(np.stack(rgba), metres, poses, intrinsics, float(size), object_id, camera["mesh_hash"])


def template_path(folder: Path, object_id: int) -> Path:
    """Where in a folder of templates those of an object are."""
    return folder / f"{object_id:06d}.safetensors"


def stored_hash(path: Path) -> str | None:
    """`mesh_hash` of a file of templates, of which only the head is read; None if it is damaged or something else."""
    try:
        with safetensors.safe_open(path, "numpy") as file:
            return json.loads((file.metadata() or {}).get(METADATA_KEY, "{}")).get("mesh_hash")
    except (safetensors.SafetensorError, ValueError):
        return None


def read_rows(tensor: safetensors.PySafeSlice, indices: Sequence[int]) -> np.ndarray:
    """Some rows of a tensor on the disk, without reading the others."""
    count = tensor.get_shape()[0]
    if any(not 0 <= index < count for index in indices):
        raise ValueError(f"there are {count} templates, numbers {list(indices)} are asked for")
    if not len(indices):
        return tensor[:0]
    return np.concatenate([tensor[int(index) : int(index) + 1] for index in indices])


def turn(templates: TemplateSet, angle: float) -> TemplateSet:
    """Turned about the cameras' z axes by an angle in radians, from x to y: rightwards down in the picture."""
    cos, sin = np.cos(angle), np.sin(angle)
    rotation = np.eye(4)
    rotation[:2, :2] = [[cos, -sin], [sin, cos]]
    height, width = templates.depth.shape[1:]
    middle = templates.K[:2, 2]
    target = np.stack(np.meshgrid(np.arange(width), np.arange(height)), axis=-1) - middle
    source = target @ rotation[:2, :2] + middle
    grid = torch.from_numpy((2 * source + 1) / (width, height) - 1)[None]

    def sample(values: np.ndarray, mode: str) -> np.ndarray:
        picture = torch.from_numpy(values.reshape(1, -1, height, width)).double()
        return F.grid_sample(picture, grid, mode, "zeros", align_corners=False)[0].numpy()

    seen = templates.depth > 0
    kept = sample(seen, "nearest") > 0
    share = sample(seen, "bilinear")
    colors = sample(np.where(seen[..., None], templates.rgba[..., :3], 0).transpose(0, 3, 1, 2), "bilinear")
    colors = colors.reshape(len(templates), 3, height, width) / np.maximum(share, 1e-6)[:, None]
    rgba = np.zeros_like(templates.rgba)
    rgba[..., :3] = np.where(kept[:, None], np.rint(colors), 0).transpose(0, 2, 3, 1)
    rgba[..., 3] = np.where(kept, 255, 0)
    nearness = np.divide(1, templates.depth, out=np.zeros_like(templates.depth), where=seen)
    nearest = sample(templates.depth, "nearest")
    # 1 / depth is linear on planes; across an edge the mean would lie on neither surface
    mean = np.divide(1, sample(nearness, "bilinear"), out=np.zeros_like(nearest), where=kept)
    smooth = (share > 1 - 1e-6) & (np.abs(mean - nearest) <= SMOOTH * nearest)
    depth = np.where(smooth, mean, nearest).astype(np.float32) * kept
    return replace(templates, rgba=rgba, depth=depth, camera_from_object=rotation @ templates.camera_from_object)


def object_diameter(vertices: np.ndarray) -> float:
    """The largest distance between two vertices (V, 3)."""
    points = np.asarray(vertices, np.float64)
    if len(points) > 8:
        points = points[ConvexHull(points, qhull_options="QJ Pp").vertices]
    return float(pdist(points).max())


def render_template_set(
    mesh: trimesh.Trimesh,
    object_id: int,
    views: int = 162,
    size: int = 224,
    *,
    fov_degrees: float = 40.0,
    supersample: int = 2,
    light: Light | None = None,
    backend: Backend = "auto",
    diameter: float | None = None,
    mesh_hash: str = "",
) -> TemplateSet:
    """Render an object from 42, 162 or 642 sides, all of it inside the picture.

    Args:
        mesh: in metres. Cameras look at the middle of its box from one distance.
        size: pixels of a side.
        diameter: in metres; the largest distance between two vertices by default.
    """
    if not len(mesh.faces):
        raise ValueError(f"the mesh of object {object_id} has no triangles")
    centre = mesh.bounds.mean(axis=0)
    radius = float(np.linalg.norm(mesh.vertices - centre, axis=1).max())
    K, distance = template_camera(radius, size, fov_degrees)
    poses = look_at_poses(view_directions(views), distance, centre)
    seen = render_views([mesh], poses[:, None], K, (size, size), light=light, supersample=supersample, backend=backend)
    alpha = np.where(seen.instances >= 0, 255, 0).astype(np.uint8)
    edges = np.concatenate([alpha[:, 0], alpha[:, -1], alpha[:, :, 0], alpha[:, :, -1]])
    if edges.any():
        raise ValueError(f"object {object_id} reaches the edge of its templates: `size` {size} is too small")
    rgba = np.concatenate([seen.rgb, alpha[..., None]], axis=-1)
    extent = object_diameter(mesh.vertices) if diameter is None else diameter
    return TemplateSet(rgba, seen.depth, poses, K, extent, object_id, mesh_hash)
