"""Objects in pictures by number: an index of a folder of BOP scenes or of tar shards, and the source that reads by it.

    source = PoseSource("data/gso/train_pbr_web", skip_shards=MEGAPOSE_BROKEN)
    source.row(7)     # object, visibility and box, no picture is read
    source.read(7)    # a `Sample`

The index lies in the folder as `.poses.index`: all poses, cameras, boxes and, in tars, where pictures begin. It is
mapped into memory, so that millions of rows open at once and processes share them. It belongs to files of one name,
size and time of change. That of scenes is made when it is missing; that of shards, which takes long, by
`python -m data_prep.bop index`.
"""

from __future__ import annotations

import functools
import json
import logging
import math
import os
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from safetensors.numpy import save
from tqdm import tqdm

from backlot.files import write_file
from backlot.fingerprint import fingerprint
from data_prep.bop.format import (
    CAMERA_NAME,
    GT_NAME,
    INFO_NAME,
    MIN_VISIB,
    BadSampleError,
    BopDataset,
    Frame,
    Row,
    Sample,
    read_scene,
    scene_ids,
)
from data_prep.bop.models import MODELS_INFO_NAME, ModelInfo, Models, read_models
from data_prep.bop.shards import ShardFrame, depth_numbers, read_pictures, scan_shard, shard_number
from data_prep.bop.symmetries import METRES_PER_MM

logger = logging.getLogger(__name__)

FORMAT_VERSION = 1
INDEX_NAME = ".poses.index"
DTYPES = {"I32": np.int32, "I64": np.int64, "F32": np.float32, "F64": np.float64}
ROW_ARRAYS = {"picture": (np.int32, ()), "gt": (np.int32, ()), "object_id": (np.int32, ())}
ROW_ARRAYS |= {"visib_fract": (np.float32, ()), "bbox_visib": (np.float32, (4,)), "pose": (np.float64, (3, 4))}
PICTURE_ARRAYS = {"part": (np.int32, ()), "scene_id": (np.int32, ()), "im_id": (np.int32, ())}
PICTURE_ARRAYS |= {"K": (np.float64, (3, 3)), "depth_scale": (np.float64, ())}
PICTURE_ARRAYS |= {"start": (np.int64, ()), "size": (np.int64, ()), "places": (np.int32, (3, 2))}
NUM_PROBED = 16
"""Pictures by which the meaning of `depth_scale` in shards is found."""
DEPTH_FACTOR = 2.0
"""Between an object's measured depth and its pose's, up to which a scale is believed."""
NUM_SHOWN = 5
NOWHERE = np.zeros((3, 2), np.int32)


# --- building -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class IndexReport:
    """What an index was made of.

    Args:
        num_pictures, num_rows, num_objects: in it.
        bad: by name, why pictures were left out.
        problems: by name, why shards cannot be read.
        depth: what a number in the depth pictures means.
    """

    num_pictures: int
    num_rows: int
    num_objects: int
    bad: dict[str, str]
    problems: dict[str, str]
    depth: str


def list_files(folder: Path) -> list[Path]:
    """What an index of the folder is made of: shards, or the JSON files of scenes."""
    tars = sorted(path for path in folder.glob("*.tar") if not path.name.startswith("."))
    if tars:
        return tars
    names = CAMERA_NAME, GT_NAME, INFO_NAME
    files = [folder / f"{scene_id:06d}" / name for scene_id in scene_ids(folder) for name in names]
    if not files:
        raise ValueError(f"{folder} holds neither .tar shards nor BOP scenes (folders with {CAMERA_NAME})")
    return files


def find_folders(folder: Path) -> list[Path]:
    """The folder if it holds shards or scenes, else those in it that do; ValueError if there is none."""
    for candidates in ([folder], sorted(path for path in folder.glob("*") if path.is_dir())):
        if found := [path for path in candidates if any(path.glob("[!.]*.tar")) or scene_ids(path)]:
            return found
    raise ValueError(f"{folder} holds neither .tar shards nor BOP scenes (folders with {CAMERA_NAME})")


def describe(folder: Path, files: Sequence[Path]) -> list:
    """What an index must have been made of."""
    try:
        stamps = [
            (path.relative_to(folder).as_posix(), status.st_size, status.st_mtime_ns)
            for path, status in ((path, path.stat()) for path in files)
        ]
    except FileNotFoundError as error:
        raise ValueError(f"{error.filename} is missing") from None
    return [FORMAT_VERSION, *map(list, stamps)]


def find_models(folder: Path) -> Path:
    """The models of the dataset that a split belongs to."""
    place = folder.absolute().parent / "models"
    if not (place / MODELS_INFO_NAME).is_file():
        raise ValueError(f"{place / MODELS_INFO_NAME} is missing: name the folder of the models with --models")
    return place


def build_index(
    folder: str | Path, models: str | Path | None = None, unit: float | None = None, depth: str = "measured"
) -> IndexReport:
    """Make and store the index of a folder of shards or scenes.

    Args:
        models: the folder of the meshes; by default `models` beside the folder.
        unit: metres per unit of the meshes, see `read_models`.
        depth: of shards: millimetres are numbers `divide`d by depth_scale, as MegaPose's, or `multiply`-ed, as BOP's
            toolkit has it; `measured`: whichever agrees with the poses.

    Raises:
        ValueError: one line: nothing is found, an object has no model, a mesh is missing, or depths and poses disagree.
    """
    _, report = make_index(Path(folder), models, unit, depth)
    return report


def make_index(
    folder: Path, models: str | Path | None, unit: float | None, depth: str
) -> tuple[dict[str, np.ndarray], IndexReport]:
    """The arrays of an index, stored where that is possible, and what they were made of."""
    files = list_files(folder)
    key = describe(folder, files)
    is_shards = files[0].suffix == ".tar"
    if is_shards:
        parts, columns, bad, problems, rule = index_shards(files, depth)
    else:
        parts = [f"{scene_id:06d}" for scene_id in scene_ids(folder)]
        columns = [scene_columns(part, read_scene(folder / name)) for part, name in enumerate(parts)]
        bad, problems, rule = {}, {}, "multiply"
    arrays = join_columns(columns)
    arrays["metres"] = depth_unit(arrays.pop("depth_scale"), rule)
    objects = sorted(set(arrays["object_id"].tolist()))
    if not objects:
        reason = next(iter([*problems.values(), *bad.values()]), "no pose is known")
        raise ValueError(f"{folder} shows no objects: {reason}")
    found = read_models(find_models(folder) if models is None else models, unit, objects)
    described = {"key": key, "parts": parts, "problems": problems, "shards": is_shards}
    described["models"] = describe_models(found, folder)
    store_index(folder, arrays, described)
    report = IndexReport(len(arrays["part"]), len(arrays["object_id"]), len(objects), bad, problems, rule)
    return {**arrays, "described": described}, report


def scene_columns(part: int, frames: Iterable[Frame]) -> dict[str, np.ndarray]:
    return to_columns(part, [ShardFrame(frame, 0, 0, NOWHERE) for frame in frames])


def index_shards(tars: Sequence[Path], depth: str) -> tuple[list[str], list[dict], dict[str, str], dict[str, str], str]:
    """Names, columns, bad pictures and damaged shards, and what depth_scale means."""
    columns, bad, problems, rule = [], {}, {}, None if depth == "measured" else depth
    for part, tar in enumerate(tqdm(tars, desc="reading shards", disable=None)):
        pictures, wrong, problem = scan_shard(tar)
        bad |= {f"{tar.name}, {key}": reason for key, reason in wrong.items()}
        if problem is not None:
            problems[tar.name] = problem
        if rule is None and pictures:
            rule = find_depth_rule(tar, pictures[:NUM_PROBED])
        columns.append(to_columns(part, pictures))
    return [tar.name for tar in tars], columns, bad, problems, rule or "divide"


def find_depth_rule(tar: Path, pictures: Sequence[ShardFrame]) -> str | None:
    """Whether depth_scale divides or multiplies, by what is seen of objects and how far off their poses are.

    Returns:
        None where nothing can be measured.

    Raises:
        ValueError: neither agrees with the poses.
    """
    errors: dict[str, list[float]] = {"divide": [], "multiply": []}
    for picture in pictures:
        gt = max(range(len(picture.frame.instances)), key=lambda gt: _visible(picture, gt), default=None)
        if gt is None or not _visible(picture, gt):
            continue
        try:
            numbers = depth_numbers(tar, picture, gt)
        except BadSampleError:
            continue  # is named when it is read
        distance = float(picture.frame.instances[gt].camera_from_object[2, 3])
        if not len(numbers) or distance <= 0:
            continue
        for rule, found in errors.items():
            measured = float(np.median(numbers)) * float(depth_unit(np.array(picture.frame.depth_scale), rule))
            found.append(math.log(measured / distance))
    if not errors["divide"]:
        return None
    medians = {rule: abs(float(np.median(found))) for rule, found in errors.items()}
    rule = min(medians, key=medians.__getitem__)
    if medians[rule] > math.log(DEPTH_FACTOR):
        factor = math.exp(float(np.median(errors["divide"])))
        raise ValueError(
            f"{tar}: wrong depth scale: with depth_scale {pictures[0].frame.depth_scale:g} objects are measured at"
            f" {factor:.3g} times the distance of their poses"
        )
    return rule


def _visible(picture: ShardFrame, gt: int) -> float:
    x1, y1, x2, y2 = picture.frame.instances[gt].bbox_visib.tolist()
    return (x2 - x1) * (y2 - y1)


def depth_unit(scale: np.ndarray, rule: str) -> np.ndarray:
    """Metres per number in depth pictures; float32, so that dividing by 10 and multiplying by 0.1 are the same."""
    return (METRES_PER_MM / scale if rule == "divide" else METRES_PER_MM * scale).astype(np.float32)


def to_columns(part: int, pictures: Sequence[ShardFrame]) -> dict[str, np.ndarray]:
    """The arrays of one shard or scene; pictures are counted from its first."""
    rows = [
        (number, gt, each) for number, picture in enumerate(pictures) for gt, each in enumerate(picture.frame.instances)
    ]
    values = {
        "picture": [number for number, _, _ in rows],
        "gt": [gt for _, gt, _ in rows],
        "object_id": [each.obj_id for _, _, each in rows],
        "visib_fract": [each.visib_fract for _, _, each in rows],
        "bbox_visib": [each.bbox_visib for _, _, each in rows],
        "pose": [each.camera_from_object[:3] for _, _, each in rows],
        "part": [part] * len(pictures),
        "scene_id": [picture.frame.scene_id for picture in pictures],
        "im_id": [picture.frame.im_id for picture in pictures],
        "K": [picture.frame.K for picture in pictures],
        "depth_scale": [picture.frame.depth_scale for picture in pictures],
        "start": [picture.start for picture in pictures],
        "size": [picture.size for picture in pictures],
        "places": [picture.places for picture in pictures],
    }
    forms = ROW_ARRAYS | PICTURE_ARRAYS
    return {name: np.array(values[name], dtype).reshape(-1, *form) for name, (dtype, form) in forms.items()}


def join_columns(columns: Sequence[Mapping[str, np.ndarray]]) -> dict[str, np.ndarray]:
    """Those of all shards or scenes, pictures counted through."""
    firsts = np.cumsum([0, *(len(each["part"]) for each in columns)])[:-1]
    joined = {name: np.concatenate([each[name] for each in columns]) for name in ROW_ARRAYS | PICTURE_ARRAYS}
    counts = [len(each["picture"]) for each in columns]
    joined["picture"] += np.repeat(firsts, counts).astype(np.int32)
    return joined


# --- the stored index -----------------------------------------------------------------------------------------------


def describe_models(models: Models, folder: Path) -> dict:
    """Models as JSON, places relative to the folder of the index, so that both can be moved together."""
    place = os.path.relpath(models.folder, folder)
    described = {
        str(info.object_id): {
            "path": os.path.relpath(info.path, models.folder),
            "diameter": info.diameter,
            "unit": info.unit,
            "symmetries_discrete": info.symmetries_discrete,
            "symmetries_continuous": info.symmetries_continuous,
        }
        for info in models.values()
    }
    return {"folder": place, "objects": described}


def restore_models(described: Mapping, folder: Path) -> Models:
    """The inverse of `describe_models`."""
    place = Path(os.path.normpath(folder / described["folder"]))
    return Models(
        place,
        {
            int(name): ModelInfo(int(name), place / values["path"], **{k: v for k, v in values.items() if k != "path"})
            for name, values in described["objects"].items()
        },
    )


def store_index(folder: Path, arrays: Mapping[str, np.ndarray], described: Mapping) -> None:
    """Write the index into the folder; where that is not possible say so and go on."""
    try:
        write_file(folder / INDEX_NAME, save(dict(arrays), {"described": json.dumps(described)}))
    except OSError as error:
        logger.warning("no index can be stored in %s (%s): each start makes it anew", folder, error.strerror or error)


def map_index(folder: Path) -> dict | None:
    """The arrays of a stored index, mapped into memory, and `described`; None if there is none, or it is damaged."""
    path = folder / INDEX_NAME
    try:
        with path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            header = json.loads(file.read(length)) if length < path.stat().st_size else None
        data = np.memmap(path, np.uint8, "r", offset=8 + length) if header else np.empty(0, np.uint8)
    except (OSError, ValueError):
        return None
    if not isinstance(header, dict):
        return None
    entries = {name: entry for name, entry in header.items() if name != "__metadata__"}
    if max((entry["data_offsets"][1] for entry in entries.values()), default=-1) != len(data):
        return None
    arrays = {}
    for name, entry in entries.items():
        start, end = entry["data_offsets"]
        arrays[name] = np.asarray(data[start:end]).view(DTYPES[entry["dtype"]]).reshape(entry["shape"])
    return {**arrays, "described": json.loads(header["__metadata__"]["described"])}


def load_index(folder: Path) -> dict:
    """The arrays of a folder's index, and `described`; that of scenes is made if it is missing or of other files.

    Raises:
        ValueError: one line: that of shards is missing or of other files; or see `build_index`.
    """
    files = list_files(folder)
    index = map_index(folder)
    if index is not None and index["described"]["key"] == describe(folder, files):
        return index
    if files[0].suffix == ".tar":
        state = "no index" if index is None else "an index of other files"
        raise ValueError(f"{folder} has {state}: python -m data_prep.bop index {folder} --models FOLDER")
    models = None
    if index is not None:
        models = restore_models(index["described"]["models"], folder).folder
    arrays, _ = make_index(folder, models, None, "multiply")
    return arrays


# --- reading --------------------------------------------------------------------------------------------------------


class PoseSource:
    """The objects in a folder of BOP scenes or tar shards, a `data_prep.bop.format.Source`.

    Args:
        folder: of a split, with scenes or shards.
        min_visib: objects of which this share of the silhouette or less is seen are left out.
        skip_shards: numbers of shards that are left out.

    Attributes:
        folder, objects, object_ids, shard_sizes, models: see `Source`.

    Raises:
        ValueError: one line: the index is missing, a damaged shard is not among those to skip, or nothing is left.
    """

    def __init__(self, folder: str | Path, min_visib: float = MIN_VISIB, skip_shards: Collection[int] = ()) -> None:
        self.folder, self.min_visib, self.skip_shards = Path(folder), min_visib, tuple(sorted(skip_shards))
        index = load_index(self.folder)
        described = index.pop("described")
        self._arrays: dict[str, np.ndarray] = index
        self._parts, self._is_shards = described["parts"], described["shards"]
        self._files = [entry[:2] for entry in described["key"][1:]]
        self.models = restore_models(described["models"], self.folder)
        kept_parts = self._keep_parts(described["problems"])
        parts = index["part"][index["picture"]]
        self._rows = np.flatnonzero((index["visib_fract"] > min_visib) & kept_parts[parts])
        if not len(self._rows):
            raise ValueError(f"{folder}: of no object more than {min_visib:g} of the silhouette is seen")
        self.object_ids = index["object_id"][self._rows]
        self.objects = np.unique(self.object_ids).tolist()
        self.shard_sizes = np.bincount(parts[self._rows], minlength=len(self._parts)).tolist()
        self._scenes = None if self._is_shards else BopDataset(self.folder.parent, self.folder.name)

    def _keep_parts(self, problems: Mapping[str, str]) -> np.ndarray:
        """(parts,) bool, false for what is skipped; ValueError if what is damaged is not skipped."""
        if not self._is_shards:
            return np.ones(len(self._parts), bool)
        numbers = [shard_number(name) for name in self._parts]
        if unknown := sorted(set(self.skip_shards).difference(numbers)):
            logger.info("%s has no shards %s that could be skipped", self.folder, unknown)
        damaged = {name: reason for name, reason in problems.items() if shard_number(name) not in self.skip_shards}
        if damaged:
            name, reason = next(iter(damaged.items()))
            more = f", and {len(damaged) - 1} more are damaged" if len(damaged) > 1 else ""
            raise ValueError(f"{self.folder / name} is damaged: {reason}{more}; name its number in `skip_shards`")
        return np.array([number not in self.skip_shards for number in numbers])

    @functools.cached_property
    def fingerprint(self) -> str:
        """Of the names and sizes of the files, and of what is left out; the folder may be moved."""
        return fingerprint([len(self), self.min_visib, self.skip_shards, *map(tuple, self._files)])

    def __len__(self) -> int:
        return len(self._rows)

    def _find(self, index: int) -> tuple[int, int]:
        """The row of the index, and its picture."""
        if not 0 <= index < len(self):
            raise IndexError(f"row {index} of {len(self)}")
        row = int(self._rows[index])
        return row, int(self._arrays["picture"][row])

    def row(self, index: int) -> Row:
        """What is known of a sample before its picture is read."""
        row, picture = self._find(index)
        values = self._arrays
        return Row(
            scene_id=int(values["scene_id"][picture]),
            im_id=int(values["im_id"][picture]),
            gt=int(values["gt"][row]),
            object_id=int(values["object_id"][row]),
            visib_fract=float(values["visib_fract"][row]),
            bbox_visib=tuple(values["bbox_visib"][row].tolist()),
        )

    def read(self, index: int) -> Sample:
        """One sample, fresh arrays each time.

        Raises:
            BadSampleError: one line: a picture is missing or damaged, nothing of the object is seen, or its depth has
                another scale than its pose.
        """
        row, picture = self._find(index)
        about, values = self.row(index), self._arrays
        key = f"{about.scene_id:06d}_{about.im_id:06d}"
        metres = float(values["metres"][picture])
        if self._is_shards:
            tar = self.folder / self._parts[int(values["part"][picture])]
            start, size = int(values["start"][picture]), int(values["size"][picture])
            pictures = read_pictures(tar, start, size, values["places"][picture], about.gt, metres, key)
        else:
            rgb = self._scenes.rgb(about.scene_id, about.im_id)
            depth = self._scenes.depth_in(about.scene_id, about.im_id, metres)
            pictures = rgb, depth, self._scenes.mask_visib(about.scene_id, about.im_id, about.gt)
        pose = np.eye(4)
        pose[:3] = values["pose"][row]
        diameter = self.models[about.object_id].diameter
        place = f"{self.folder}, object {about.object_id} ({about.gt}) in picture {key}"
        check_pictures(*pictures, pose, diameter, place)
        return Sample(
            *pictures,
            K=np.array(values["K"][picture]),
            camera_from_object=pose,
            bbox_visib=np.array(values["bbox_visib"][row]),
            object_id=about.object_id,
            diameter=diameter,
            key=f"{key}_{about.gt:06d}",
        )

    def __reduce__(self) -> tuple:
        return PoseSource, (self.folder, self.min_visib, self.skip_shards)  # a spawned worker maps the index itself


def check_pictures(
    rgb: np.ndarray, depth: np.ndarray, mask: np.ndarray, pose: np.ndarray, diameter: float, place: str
) -> None:
    """BadSampleError, one line, if the pictures of a sample do not fit together, or do not fit its pose."""
    if not rgb.shape[:2] == depth.shape == mask.shape:
        raise BadSampleError(f"{place}: rgb {rgb.shape[:2]}, depth {depth.shape} and mask {mask.shape} differ in form")
    if not mask.any():
        raise BadSampleError(f"{place}: no pixel of the object is seen")
    seen = depth[mask & (depth > 0)]
    if not len(seen):
        return  # sensors see nothing of what shines or is black
    measured, distance = float(np.median(seen)), float(pose[2, 3])
    is_far_off = not distance / DEPTH_FACTOR < measured < distance * DEPTH_FACTOR
    if is_far_off and abs(measured - distance) > diameter:
        raise BadSampleError(
            f"{place}: wrong depth scale: its surface is measured at {measured:.4g} m, its pose is at {distance:.4g} m"
        )
