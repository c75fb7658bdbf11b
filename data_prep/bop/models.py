"""Meshes of objects by their ids: where they lie, the length of their unit, diameters and symmetries.

A folder of models is either that of a BOP dataset,

    obj_<id:06d>.ply, models_info.json     millimetres; diameter, min_x ... size_z, symmetries_discrete, _continuous

or one of those that MegaPose's shards were rendered from, with the map of ids in it, or one or two folders above:

    gso_models.json                        [{obj_id, gso_id}]
    <gso_id>/meshes/model.obj (.ply)
    shapenet_models.json                   [{obj_id, shapenet_synset_id, shapenet_source_id}]
    <synset>/<source>/models/model_normalized.obj, or model_normalized_scaled.ply

Normalised meshes of these two have a unit of 0.1 m, and those in a folder `...scale=0.1` millimetres. Their diameters
are measured once and kept in `.diameters.json` beside them.
"""

from __future__ import annotations

import functools
import json
import logging
import struct
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import numpy as np
from pydantic import Field, TypeAdapter
from scipy.spatial import ConvexHull, QhullError
from scipy.spatial.distance import cdist
from tqdm import tqdm

from backlot.files import read_json as read_plain_json
from backlot.files import write_file
from backlot.metadata import Metadata
from data_prep.bop.json_files import read_json
from data_prep.bop.symmetries import METRES_PER_MM, symmetry_set

if TYPE_CHECKING:
    import trimesh

logger = logging.getLogger(__name__)

MODELS_INFO_NAME = "models_info.json"
DIAMETERS_NAME = ".diameters.json"
NORMALISED_UNIT = 0.1
DIAMETER_TOLERANCE = 0.05
"""Between the diameter of a mesh and the one that is written of it, as a share."""
NORMALISED_DIAMETERS = (0.01, 0.25)
"""In metres, of what fits into a ball of radius 0.1 m: anything else has another unit."""
NUM_SHOWN = 5
CHUNK = 1024
# What the readers of trimesh raise for files that are not what their names say.
READ_ERRORS = (
    *(ValueError, TypeError, LookupError, AttributeError, OSError, NotImplementedError, RecursionError),
    struct.error,
)


class ModelJson(Metadata):
    diameter: Annotated[float, Field(gt=0)]
    symmetries_discrete: list[list[float]] = []
    symmetries_continuous: list[dict[str, list[float]]] = []


class GsoJson(Metadata):
    obj_id: int
    gso_id: str

    def places(self) -> list[str]:
        return [f"{self.gso_id}/meshes/model.obj", f"{self.gso_id}/meshes/model.ply"]


class ShapenetJson(Metadata):
    obj_id: int
    shapenet_synset_id: str
    shapenet_source_id: str

    def places(self) -> list[str]:
        folder = f"{self.shapenet_synset_id}/{self.shapenet_source_id}/models"
        return [f"{folder}/model_normalized.obj", f"{folder}/model_normalized_scaled.ply"]


ID_MAPS = {
    "gso_models.json": TypeAdapter(list[GsoJson]),
    "shapenet_models.json": TypeAdapter(list[ShapenetJson]),
}
MODELS_INFO = TypeAdapter(dict[str, ModelJson])


@dataclass(frozen=True)
class ModelInfo:
    """An object's mesh.

    Args:
        path: of the mesh, which may be missing until it is loaded.
        diameter: metres, the largest distance between two of its points.
        unit: metres per unit of the file.
        symmetries_discrete, symmetries_continuous: as in models_info.json, in millimetres.
    """

    object_id: int
    path: Path
    diameter: float
    unit: float
    symmetries_discrete: Sequence[Sequence[float]] = ()
    symmetries_continuous: Sequence[Mapping[str, Sequence[float]]] = ()

    @functools.cached_property
    def symmetries(self) -> np.ndarray:
        """(S, 4, 4) float64 metres, the identity first."""
        try:
            return symmetry_set(vars(self))
        except ValueError as error:
            raise ValueError(f"object {self.object_id} of {self.path.parent}: {error}") from None

    def load_mesh(self) -> trimesh.Trimesh:
        """The mesh in metres with its colours or texture.

        Raises:
            ValueError: one line: it is missing or damaged, or its diameter is not the one that is written of it.
        """
        mesh = read_mesh(self.path, f"the mesh of object {self.object_id}")
        mesh.apply_scale(self.unit)
        measured = find_diameter(mesh.vertices)
        if abs(measured - self.diameter) > DIAMETER_TOLERANCE * self.diameter:
            raise ValueError(
                f"object {self.object_id}: its diameter is {self.diameter:.4g} m, that of {self.path} with a unit of"
                f" {self.unit:g} m is {measured:.4g} m"
            )
        return mesh


class Models(dict[int, ModelInfo]):
    """Objects by their ids; ValueError names an id that is not there."""

    def __init__(self, folder: Path, models: Mapping[int, ModelInfo]) -> None:
        super().__init__(models)
        self.folder = folder

    def __missing__(self, object_id: int) -> ModelInfo:
        ids = sorted(self)
        known = f"{len(ids)} objects, ids {ids[0]} ... {ids[-1]}" if ids else "no objects"
        raise ValueError(f"there is no object {object_id} among the models in {self.folder} ({known})")

    def __reduce__(self) -> tuple:
        return Models, (self.folder, dict(self))


# --- reading --------------------------------------------------------------------------------------------------------


def read_models(folder: str | Path, unit: float | None = None, object_ids: Collection[int] | None = None) -> Models:
    """The objects in a folder of models.

    Args:
        unit: metres per unit of the meshes; by default a millimetre for BOP, and see above for the others.
        object_ids: only these.

    Raises:
        ValueError: one line: the folder has no list of models, an id is not in it, a mesh that must be measured is
            missing or damaged, or its diameter shows that it has another unit.
    """
    folder = Path(folder)
    if (folder / MODELS_INFO_NAME).is_file():
        models = read_bop_models(folder, METRES_PER_MM if unit is None else unit)
        return models if object_ids is None else Models(folder, {key: models[key] for key in object_ids})
    if unit is None:
        unit = METRES_PER_MM if "scale=" in folder.name else NORMALISED_UNIT
    return measure_models(folder, read_id_map(folder), unit, object_ids)


def read_bop_models(folder: Path, unit: float) -> Models:
    """By models_info.json; the meshes are not read."""
    models = {}
    for name, values in read_json(folder / MODELS_INFO_NAME, MODELS_INFO).items():
        path = folder / f"obj_{int(name):06d}.ply"
        symmetries = values.symmetries_discrete, values.symmetries_continuous
        models[int(name)] = ModelInfo(int(name), path, values.diameter * METRES_PER_MM, unit, *symmetries)
    return Models(folder, models)


def read_id_map(folder: Path) -> dict[int, list[str]]:
    """Object id -> where its mesh may lie below the folder, by the map of GSO or ShapeNet."""
    if not folder.is_dir():
        raise ValueError(f"{folder} is no folder of models")
    for place in (folder, folder.absolute().parent, folder.absolute().parent.parent):
        for name, form in ID_MAPS.items():
            if (place / name).is_file():
                return {row.obj_id: row.places() for row in read_json(place / name, form)}
    raise ValueError(
        f"{folder} has no {MODELS_INFO_NAME} (of BOP), and neither it nor the folders above have one of"
        f" {', '.join(ID_MAPS)} (of MegaPose's shards)"
    )


def measure_models(
    folder: Path, places: Mapping[int, list[str]], unit: float, object_ids: Collection[int] | None
) -> Models:
    """The objects of a map of ids, with diameters that are measured where that was not done before."""
    known = read_diameters(folder)
    fresh, found = dict(known), {}
    wanted = sorted(places if object_ids is None else object_ids)
    for object_id in tqdm(wanted, desc="measuring meshes", disable=None):
        if object_id not in places:
            raise ValueError(f"there is no object {object_id} in the map of ids of {folder} ({len(places)} objects)")
        found[object_id] = find_mesh(folder, object_id, places[object_id])
        name = found[object_id].relative_to(folder).as_posix()
        status = found[object_id].stat()
        stamp = [status.st_size, status.st_mtime_ns]
        if fresh.get(name, [])[:2] != stamp:
            mesh = read_mesh(found[object_id], f"the mesh of object {object_id}")
            fresh[name] = [*stamp, find_diameter(mesh.vertices)]
    if fresh != known:
        store_diameters(folder, fresh)
    models = {}
    for object_id, path in found.items():
        diameter = fresh[path.relative_to(folder).as_posix()][2] * unit
        check_normalised(object_id, path, diameter, unit)
        models[object_id] = ModelInfo(object_id, path, diameter, unit)
    return Models(folder, models)


def find_mesh(folder: Path, object_id: int, names: Sequence[str]) -> Path:
    path = next((folder / name for name in names if (folder / name).is_file()), None)
    if path is None:
        raise ValueError(f"the mesh of object {object_id} is missing: {folder / names[0]}")
    return path


def check_normalised(object_id: int, path: Path, diameter: float, unit: float) -> None:
    """ValueError if an object does not have the size that all of these have."""
    low, high = NORMALISED_DIAMETERS
    if not low <= diameter <= high:
        raise ValueError(
            f"object {object_id}: with a unit of {unit:g} m its diameter is {diameter:.4g} m, but objects of these"
            f" shards have {low:g} to {high:g} m: {path} has another unit"
        )


def read_diameters(folder: Path) -> dict[str, list]:
    """File -> its size, time of change and diameter in its own unit; empty where nothing was measured."""
    try:
        return read_plain_json(folder / DIAMETERS_NAME)
    except (OSError, ValueError):
        return {}


def store_diameters(folder: Path, diameters: Mapping[str, list]) -> None:
    try:
        write_file(folder / DIAMETERS_NAME, json.dumps(diameters))
    except OSError as error:
        logger.warning("diameters cannot be kept in %s (%s): they are measured each time", folder, error)


def read_mesh(path: Path, what: str) -> trimesh.Trimesh:
    """A mesh in its own unit; ValueError, one line, if it is missing, damaged or empty."""
    import trimesh

    if not path.is_file():
        raise ValueError(f"{what} is missing: {path}")
    try:
        mesh = trimesh.load(path, force="mesh", process=False)
    except READ_ERRORS as error:
        raise ValueError(f"{what} is damaged: {path} ({' '.join(str(error).split())[:200]})") from None
    if not len(mesh.faces) or not np.isfinite(mesh.vertices).all():
        raise ValueError(f"{what} has no faces, or vertices that are not finite: {path}")
    return mesh


def find_diameter(points: np.ndarray) -> float:
    """The largest distance between two of the points (N, 3), in their unit."""
    points = np.asarray(points, np.float64)
    try:
        points = points[ConvexHull(points).vertices]
    except QhullError:  # flat
        points = points[ConvexHull(points, qhull_options="QJ").vertices]
    chunks = (points[start : start + CHUNK] for start in range(0, len(points), CHUNK))
    return float(max(cdist(chunk, points).max() for chunk in chunks))


# --- templates ------------------------------------------------------------------------------------------------------


def require_templates(folder: str | Path, object_ids: Collection[int], models: Models) -> None:
    """ValueError, one line, if objects have no templates in the folder: it names the command that renders them."""
    missing = [each for each in sorted(object_ids) if not (Path(folder) / f"{each:06d}.safetensors").is_file()]
    if missing:
        shown = ", ".join(map(str, missing[:NUM_SHOWN])) + (", ..." if len(missing) > NUM_SHOWN else "")
        raise ValueError(
            f"templates of {len(missing)} objects ({shown}) are missing from {folder}:"
            f" python -m data_prep.bop render_templates --models {models.folder} --out {folder}"
        )


# --- writing --------------------------------------------------------------------------------------------------------


def write_models(
    root: str | Path,
    meshes: Mapping[int, trimesh.Trimesh],
    annotations: Mapping[int, Mapping[str, object]] | None = None,
    folder: str = "models",
) -> Path:
    """Write meshes, and models_info.json last, as the models of a BOP dataset; returns their folder.

    Args:
        meshes: by object id, in metres; vertex colours are kept.
        annotations: by object id `symmetries_discrete` and `symmetries_continuous`, in millimetres.
    """
    place = Path(root) / folder
    place.mkdir(parents=True, exist_ok=True)
    infos = {}
    for object_id, mesh in meshes.items():
        scaled = mesh.copy()
        scaled.apply_scale(1 / METRES_PER_MM)
        scaled.export(place / f"obj_{object_id:06d}.ply")
        low, high = scaled.bounds
        infos[str(object_id)] = {
            "diameter": find_diameter(scaled.vertices),
            **{f"min_{axis}": float(value) for axis, value in zip("xyz", low, strict=True)},
            **{f"size_{axis}": float(value) for axis, value in zip("xyz", high - low, strict=True)},
            **{
                name: value
                for name, value in (annotations or {}).get(object_id, {}).items()
                if name.startswith("symmetries")
            },
        }
    write_file(place / MODELS_INFO_NAME, json.dumps(infos, indent=1))
    return place
