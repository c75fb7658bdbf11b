"""Scenes in the format of the BOP challenge: what lies where, read and written; and what every source of poses gives.

    <split>/<scene:06d>/rgb/<im:06d>.png (or .jpg; grey pictures in gray/, .tif too)
                        depth/<im:06d>.png               16 bits; millimetres = number * depth_scale; 0 = no surface
                        mask/<im:06d>_<gt:06d>.png       silhouette, as if nothing stood before the object
                        mask_visib/<im:06d>_<gt:06d>.png what is seen of it
                        scene_camera.json                {im: {cam_K, depth_scale}}
                        scene_gt.json                    {im: [{cam_R_m2c, cam_t_m2c, obj_id}]}
                        scene_gt_info.json               {im: [{bbox_obj, bbox_visib, px_count_*, visib_fract}]}
    models/obj_<id:06d>.ply, models/models_info.json     see data_prep/bop/models.py
    test_targets_bop19.json                              [{scene_id, im_id, obj_id, inst_count}]

Files have millimetres, and boxes x, y, w, h with w = last column - first column, as the toolkit writes them; in memory
there are metres, poses `camera_from_object`, and boxes x1, y1, x2, y2 along the edges of pixels: x2 = x + w + 1. An
object that is not seen has -1, -1, -1, -1 in files and a box of zeros here.
"""

from __future__ import annotations

import functools
import io
import json
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Protocol

import numpy as np
from PIL import Image
from pydantic import Field, TypeAdapter

from backlot.files import write_file
from backlot.metadata import Metadata
from backlot.pictures import BAD_IMAGE_ERRORS, EXHAUSTED, decode_image
from data_prep.bop.json_files import read_json
from data_prep.bop.models import Models, read_models
from data_prep.bop.symmetries import METRES_PER_MM, is_rotation

CAMERA_NAME, GT_NAME, INFO_NAME = "scene_camera.json", "scene_gt.json", "scene_gt_info.json"
TARGETS_NAME = "test_targets_bop19.json"
PICTURE_PLACES = (("rgb", (".png", ".jpg")), ("gray", (".tif", ".png")))
DEPTH_SCALE = 0.1
"""Of the depth that is written: tenths of a millimetre, up to 6.5 m."""
NO_BOX = (-1, -1, -1, -1)
MIN_VISIB = 0.1
"""Share of an object's silhouette above which it counts as seen."""
PNG_LEVEL = 1


class BadSampleError(ValueError):
    """One sample cannot be used: it is damaged, or shows nothing of its object. Others of the set may be good."""


# --- what a source of poses gives -----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Row:
    """What is known of an object in a picture before the picture is read.

    Args:
        gt: its place among the objects of the picture.
        visib_fract: share of its silhouette that is seen, in [0, 1].
        bbox_visib: x1, y1, x2, y2 of what is seen of it, along the edges of pixels.
    """

    scene_id: int
    im_id: int
    gt: int
    object_id: int
    visib_fract: float
    bbox_visib: tuple[float, float, float, float]


@dataclass(frozen=True)
class Sample:
    """An object in a picture.

    Args:
        rgb: (H, W, 3) uint8. depth: (H, W) float32 metres, 0 = no surface.
        mask: (H, W) bool, what is seen of the object.
        K: (3, 3) float64, centres of pixels at whole numbers.
        camera_from_object: (4, 4) float64, metres, OpenCV axes.
        bbox_visib: (4,) float32 x1, y1, x2, y2 along the edges of pixels.
        diameter: metres.
        key: names it, for people.
    """

    rgb: np.ndarray
    depth: np.ndarray
    mask: np.ndarray
    K: np.ndarray
    camera_from_object: np.ndarray
    bbox_visib: np.ndarray
    object_id: int
    diameter: float
    key: str


class Source(Protocol):
    """Objects in pictures, each read by its number, in any order, any number of times.

    Attributes:
        objects: the ids of the objects that occur, ascending.
        object_ids: (N,) int32, the object of each sample.
        shard_sizes: samples of each file, or folder, one after the other, for orders that read file by file.
        models: of the objects: diameters, symmetries, meshes.
        fingerprint: tells other data apart.
    """

    objects: list[int]
    object_ids: np.ndarray
    shard_sizes: list[int]
    models: Models
    fingerprint: str

    def __len__(self) -> int: ...

    def row(self, index: int) -> Row: ...

    def read(self, index: int) -> Sample: ...


# --- the JSON files -------------------------------------------------------------------------------------------------

Numbers = list[float]


class CameraJson(Metadata):
    intrinsics: Annotated[Numbers, Field(min_length=9, max_length=9, alias="cam_K")]
    depth_scale: Annotated[float, Field(gt=0)] = 1.0


class PoseJson(Metadata):
    rotation: Annotated[Numbers, Field(min_length=9, max_length=9, alias="cam_R_m2c")]
    translation: Annotated[Numbers, Field(min_length=3, max_length=3, alias="cam_t_m2c")]
    obj_id: Annotated[int, Field(ge=0)]


class InfoJson(Metadata):
    bbox_visib: Annotated[Numbers, Field(min_length=4, max_length=4)]
    visib_fract: float
    bbox_obj: Annotated[Numbers, Field(min_length=4, max_length=4)] = list(NO_BOX)
    px_count_all: int = 0
    px_count_visib: int = 0


class Target(Metadata):
    """Objects to be found in a picture, a line of test_targets_bop19.json."""

    scene_id: int
    im_id: int
    obj_id: int
    inst_count: Annotated[int, Field(ge=1)]


CAMERAS = TypeAdapter(dict[str, CameraJson])
POSES = TypeAdapter(dict[str, list[PoseJson]])
INFOS = TypeAdapter(dict[str, list[InfoJson]])
TARGETS = TypeAdapter(list[Target])


@dataclass(frozen=True)
class Instance:
    """An object in a picture, as a scene's JSON files describe it.

    Args:
        camera_from_object: (4, 4) float64, metres.
        visib_fract: in [0, 1].
        bbox_visib, bbox_obj: (4,) float32 x1, y1, x2, y2 of what is seen, and of the whole silhouette, which may reach
            beyond the picture.
    """

    obj_id: int
    camera_from_object: np.ndarray
    visib_fract: float
    bbox_visib: np.ndarray
    bbox_obj: np.ndarray
    px_count_visib: int


@dataclass(frozen=True)
class Frame:
    """A picture of a scene and what is known of it.

    Args:
        K: (3, 3) float64 in pixels.
        depth_scale: millimetres per number in the depth picture.
        instances: in the order of the file; none where the poses are not public.
    """

    scene_id: int
    im_id: int
    K: np.ndarray
    depth_scale: float
    instances: tuple[Instance, ...]

    @property
    def key(self) -> str:
        return f"{self.scene_id:06d}_{self.im_id:06d}"


def make_instance(pose: PoseJson, info: InfoJson, source: str) -> Instance:
    """Millimetres and x, y, w, h -> metres and x1, y1, x2, y2; ValueError if the pose has no rotation."""
    matrix = np.eye(4)
    matrix[:3, :3] = np.reshape(pose.rotation, (3, 3))
    matrix[:3, 3] = np.multiply(pose.translation, METRES_PER_MM)
    if not is_rotation(matrix[:3, :3]):
        raise ValueError(f"{source}: `cam_R_m2c` of object {pose.obj_id} is no rotation: {pose.rotation}")
    boxes = to_edges(info.bbox_visib), to_edges(info.bbox_obj)
    return Instance(pose.obj_id, matrix, info.visib_fract, *boxes, info.px_count_visib)


def to_edges(box: Sequence[float]) -> np.ndarray:
    """x, y, w, h of a file -> (4,) float32 x1, y1, x2, y2 along the edges of pixels; zeros for what is not seen."""
    x, y, width, height = box
    if width < 0 or height < 0:
        return np.zeros(4, np.float32)
    return np.array([x, y, x + width + 1, y + height + 1], np.float32)


def to_file_box(box: Sequence[float]) -> list[int]:
    """The inverse of `to_edges`."""
    x1, y1, x2, y2 = (round(float(edge)) for edge in box)
    return [x1, y1, x2 - x1 - 1, y2 - y1 - 1] if x2 > x1 and y2 > y1 else list(NO_BOX)


def make_instances(poses: Sequence[PoseJson], infos: Sequence[InfoJson], source: str) -> tuple[Instance, ...]:
    """The objects of one picture; ValueError if the two lists do not belong together."""
    if len(poses) != len(infos):
        raise ValueError(f"{source}: {len(poses)} poses, but {len(infos)} entries of visibility")
    return tuple(make_instance(pose, info, source) for pose, info in zip(poses, infos, strict=True))


# --- pictures -------------------------------------------------------------------------------------------------------


def decode_rgb(data: bytes, source: str) -> np.ndarray:
    """(H, W, 3) uint8; BadSampleError, one line, if it is no picture."""
    try:
        return np.array(decode_image(data))
    except BAD_IMAGE_ERRORS as error:
        raise bad_picture(error, source) from None


def decode_numbers(data: bytes, source: str) -> np.ndarray:
    """The numbers of a picture of one channel, (H, W) of its own type; BadSampleError, one line, if it is none."""
    try:
        with Image.open(io.BytesIO(data), formats=("PNG", "TIFF")) as image:
            numbers = np.asarray(image)
    except BAD_IMAGE_ERRORS as error:
        raise bad_picture(error, source) from None
    if numbers.ndim != 2:
        raise BadSampleError(f"{source} must have one channel, its form is {numbers.shape}")
    return numbers


def bad_picture(error: BaseException, source: str) -> BadSampleError:
    """What a decoder's error says of the file; raises the error itself if it speaks of the machine."""
    if isinstance(error, OSError) and error.errno in EXHAUSTED:
        raise error
    return BadSampleError(f"{source} is damaged: {' '.join(str(error).split())[:200]}")


def decode_depth(data: bytes, metres: float, source: str) -> np.ndarray:
    """(H, W) float32 metres of a depth picture; `metres` is the length of one unit."""
    return decode_numbers(data, source).astype(np.float32) * np.float32(metres)


def read_bytes(path: Path) -> bytes:
    """BadSampleError, one line, if the file is missing."""
    try:
        return path.read_bytes()
    except FileNotFoundError:
        raise BadSampleError(f"{path} is missing") from None


# --- reading --------------------------------------------------------------------------------------------------------


class BopDataset:
    """A split of a BOP dataset. JSON files are read when asked for, pictures each time.

    Raises:
        ValueError: the split has no scenes.
    """

    def __init__(self, root: str | Path, split: str) -> None:
        self.root, self.split = Path(root), split
        self.folder = self.root / split
        self.scene_ids = scene_ids(self.folder)
        if not self.scene_ids:
            raise ValueError(f"{self.folder} holds no BOP scenes (folders 000000, 000001, ... with {CAMERA_NAME})")

    def scene(self, scene_id: int) -> Path:
        return self.folder / f"{scene_id:06d}"

    @functools.cached_property
    def _frames(self) -> list[Frame]:
        return [frame for scene_id in self.scene_ids for frame in read_scene(self.scene(scene_id))]

    def frames(self) -> list[Frame]:
        """Every picture, by scene and number; ValueError, one line, names what is wrong in a JSON file."""
        return self._frames

    def rgb(self, scene_id: int, im_id: int) -> np.ndarray:
        """(H, W, 3) uint8."""
        path = find_picture(self.scene(scene_id), im_id)
        return decode_rgb(path.read_bytes(), str(path))

    def depth(self, frame: Frame) -> np.ndarray:
        """(H, W) float32 metres, 0 = no surface."""
        return self.depth_in(frame.scene_id, frame.im_id, frame.depth_scale * METRES_PER_MM)

    def depth_in(self, scene_id: int, im_id: int, metres: float) -> np.ndarray:
        """As `depth`; `metres` is the length of one unit of the file."""
        folder = self.scene(scene_id) / "depth"
        path = folder / f"{im_id:06d}.tif"
        path = path if path.is_file() else path.with_suffix(".png")
        return decode_depth(read_bytes(path), metres, str(path))

    def mask(self, scene_id: int, im_id: int, gt: int) -> np.ndarray:
        """(H, W) bool, the silhouette of an object."""
        return self._mask("mask", scene_id, im_id, gt)

    def mask_visib(self, scene_id: int, im_id: int, gt: int) -> np.ndarray:
        """(H, W) bool, what is seen of an object."""
        return self._mask("mask_visib", scene_id, im_id, gt)

    def _mask(self, kind: str, scene_id: int, im_id: int, gt: int) -> np.ndarray:
        path = self.scene(scene_id) / kind / f"{im_id:06d}_{gt:06d}.png"
        return decode_numbers(read_bytes(path), str(path)) != 0

    def models(self, folder: str = "models") -> Models:
        """Of the objects, by their ids."""
        return read_models(self.root / folder)

    def targets(self) -> list[Target]:
        """What is to be found in the pictures of the split; ValueError if there is no list."""
        scenes = set(self.scene_ids)
        return [target for target in read_json(self.root / TARGETS_NAME, TARGETS) if target.scene_id in scenes]


def scene_ids(folder: Path) -> list[int]:
    """Of the scenes in the folder of a split."""
    if not folder.is_dir():
        return []
    return sorted(int(path.name) for path in folder.iterdir() if path.name.isdigit() and (path / CAMERA_NAME).is_file())


def read_scene(folder: Path) -> Iterator[Frame]:
    """The pictures of a scene by its JSON files; ValueError, one line, names what is wrong in them."""
    scene_id = int(folder.name)
    cameras = read_json(folder / CAMERA_NAME, CAMERAS)
    known = (folder / GT_NAME).is_file()  # the poses of some test splits are not public
    poses = read_json(folder / GT_NAME, POSES) if known else {}
    infos = read_json(folder / INFO_NAME, INFOS) if known else {}
    for name in sorted(cameras, key=int):
        if known and (name not in poses or name not in infos):
            raise ValueError(f"{folder}: picture {name} of {CAMERA_NAME} is missing from {GT_NAME} or {INFO_NAME}")
        instances = make_instances(poses.get(name, ()), infos.get(name, ()), f"{folder}, picture {name}")
        camera = cameras[name]
        yield Frame(scene_id, int(name), np.reshape(camera.intrinsics, (3, 3)), camera.depth_scale, instances)


def find_picture(scene: Path, im_id: int) -> Path:
    """The colour, or else grey picture; BadSampleError if there is none."""
    paths = [scene / kind / f"{im_id:06d}{suffix}" for kind, suffixes in PICTURE_PLACES for suffix in suffixes]
    path = next((path for path in paths if path.is_file()), None)
    if path is None:
        raise BadSampleError(f"{paths[0]} is missing")
    return path


# --- writing --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class RenderedObject:
    """An object to write into a scene.

    Args:
        camera_from_object: (4, 4) metres.
        mask, mask_visib: (H, W) bool, its silhouette and what is seen of it.
        bbox_obj, px_count_all: of the silhouette if that reaches beyond the picture; by default they are the mask's.
    """

    obj_id: int
    camera_from_object: np.ndarray
    mask: np.ndarray
    mask_visib: np.ndarray
    bbox_obj: Sequence[float] | None = None
    px_count_all: int | None = None


@dataclass(frozen=True)
class RenderedFrame:
    """A picture to write into a scene: rgb (H, W, 3) uint8, depth (H, W) metres, K (3, 3) in pixels."""

    im_id: int
    rgb: np.ndarray
    depth: np.ndarray
    K: np.ndarray
    objects: Sequence[RenderedObject]


def write_scene(
    root: str | Path, split: str, scene_id: int, frames: Iterable[RenderedFrame], depth_scale: float = DEPTH_SCALE
) -> Path:
    """Write a scene and return its folder; its JSON files come last, so it is whole, or is not found as a scene.

    Args:
        frames: are taken one at a time.
        depth_scale: millimetres per number in the depth pictures.

    Raises:
        ValueError: a depth does not fit into 16 bits, or forms do not fit together.
    """
    folder = Path(root) / split / f"{scene_id:06d}"
    for kind in ("rgb", "depth", "mask", "mask_visib"):
        (folder / kind).mkdir(parents=True, exist_ok=True)
    cameras, poses, infos = {}, {}, {}
    for frame in frames:
        write_pictures(folder, frame, depth_scale)
        name = str(frame.im_id)
        cameras[name] = {"cam_K": np.ravel(frame.K).tolist(), "depth_scale": depth_scale}
        poses[name] = [pose_json(each) for each in frame.objects]
        infos[name] = [info_json(each, frame.depth) for each in frame.objects]
    for name, values in ((GT_NAME, poses), (INFO_NAME, infos), (CAMERA_NAME, cameras)):
        write_file(folder / name, json.dumps(values), durable=False)
    return folder


def write_pictures(folder: Path, frame: RenderedFrame, depth_scale: float) -> None:
    """The png files of one picture."""
    size = frame.rgb.shape[:2]
    pictures = {f"rgb/{frame.im_id:06d}.png": frame.rgb}
    pictures[f"depth/{frame.im_id:06d}.png"] = encode_depth(frame.depth, depth_scale * METRES_PER_MM)
    for gt, each in enumerate(frame.objects):
        for kind, mask in (("mask", each.mask), ("mask_visib", each.mask_visib)):
            pictures[f"{kind}/{frame.im_id:06d}_{gt:06d}.png"] = mask.astype(np.uint8) * 255
    for name, pixels in pictures.items():
        if pixels.shape[:2] != size:
            raise ValueError(f"{folder / name}: its form is {pixels.shape[:2]}, that of the picture {size}")
        Image.fromarray(pixels).save(folder / name, compress_level=PNG_LEVEL)


def encode_depth(depth: np.ndarray, metres: float) -> np.ndarray:
    """(H, W) uint16 units of `metres`; ValueError if they do not suffice."""
    units = np.rint(np.asarray(depth, np.float64) / metres)
    if not (units.min() >= 0 and units.max() <= np.iinfo(np.uint16).max):
        limit = np.iinfo(np.uint16).max * metres
        raise ValueError(f"depth must lie in [0, {limit:g}] m at this scale, got {depth.min():g} ... {depth.max():g}")
    return units.astype(np.uint16)


def pose_json(each: RenderedObject) -> dict:
    """An entry of scene_gt.json."""
    pose = np.asarray(each.camera_from_object, np.float64)
    translation = (pose[:3, 3] / METRES_PER_MM).tolist()
    return {"cam_R_m2c": pose[:3, :3].ravel().tolist(), "cam_t_m2c": translation, "obj_id": int(each.obj_id)}


def info_json(each: RenderedObject, depth: np.ndarray) -> dict:
    """An entry of scene_gt_info.json."""
    count, visible = int(each.mask.sum()), int(each.mask_visib.sum())
    total = count if each.px_count_all is None else int(each.px_count_all)
    return {
        "bbox_obj": to_file_box(mask_box(each.mask) if each.bbox_obj is None else each.bbox_obj),
        "bbox_visib": to_file_box(mask_box(each.mask_visib)),
        "px_count_all": total,
        "px_count_valid": int((each.mask & (depth > 0)).sum()),
        "px_count_visib": visible,
        "visib_fract": visible / total if total else 0.0,
    }


def mask_box(mask: np.ndarray) -> np.ndarray:
    """(4,) float32 x1, y1, x2, y2 along the edges of the pixels of a mask (H, W); zeros if it has none."""
    rows, columns = (np.flatnonzero(mask.any(axis)) for axis in (1, 0))
    if not len(rows):
        return np.zeros(4, np.float32)
    return np.array([columns[0], rows[0], columns[-1] + 1, rows[-1] + 1], np.float32)


def write_targets(root: str | Path, split: str, min_visib: float = MIN_VISIB) -> None:
    """Write test_targets_bop19.json: of each picture of a split the objects that are seen, and how many of each."""
    targets = []
    for frame in BopDataset(root, split).frames():
        counts = Counter(each.obj_id for each in frame.instances if each.visib_fract > min_visib)
        targets += [
            {"scene_id": frame.scene_id, "im_id": frame.im_id, "obj_id": obj_id, "inst_count": count}
            for obj_id, count in sorted(counts.items())
        ]
    write_file(Path(root) / TARGETS_NAME, json.dumps(targets), durable=False)
