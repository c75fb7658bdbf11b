"""Tar shards of pictures with poses, as MegaPose's training sets are published, read where they lie and written.

    shard-<number:06d>.tar, with the members of a picture one after the other:
        <scene>_<view>.rgb.jpg (or .rgb.png)
        <scene>_<view>.depth.png         16 bits; millimetres = number / depth_scale, unlike in BOP's folders
        <scene>_<view>.camera.json       {cam_K, depth_scale}
        <scene>_<view>.gt.json           [{cam_R_m2c, cam_t_m2c, obj_id}]
        <scene>_<view>.gt_info.json      [{bbox_visib, visib_fract, ...}]
        <scene>_<view>.mask_visib.json   {gt: run lengths of what is seen of the object, as COCO has them}
    key_to_shard.json                    {<scene>_<view>: number}

Nothing is unpacked. A picture is one read: the stretch of the tar from its first member to its last.
"""

from __future__ import annotations

import io
import json
import os
import re
import tarfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image
from pydantic import TypeAdapter

from backlot.files import write_file
from backlot.tar_index import open_members
from data_prep.bop.format import (
    PNG_LEVEL,
    BadSampleError,
    BopDataset,
    CameraJson,
    Frame,
    InfoJson,
    Instance,
    PoseJson,
    decode_depth,
    decode_numbers,
    decode_rgb,
    encode_depth,
    find_picture,
    make_instances,
    pose_json,
    to_file_box,
)
from data_prep.bop.json_files import parse_json
from data_prep.bop.symmetries import METRES_PER_MM

MEGAPOSE_BROKEN = (101, 102, 108, 114, 701)
"""Shards that are published damaged, for `skip_shards`."""
DEPTH_SCALE = 10.0
"""Of the depth that is written: tenths of a millimetre."""
IMAGES_PER_SHARD = 1000
RGB_KINDS = ("rgb.jpg", "rgb.jpeg", "rgb.png")
KINDS = ("rgb", "depth.png", "camera.json", "gt.json", "gt_info.json", "mask_visib.json")
READ_KINDS = ("rgb", "depth.png", "mask_visib.json")
"""What is read of a picture once the rest is in an index."""
MAX_PICTURE_BYTES = 2**27
KEY = re.compile(r"(\d+)_(\d+)")
CAMERA, POSES, INFOS = TypeAdapter(CameraJson), TypeAdapter(list[PoseJson]), TypeAdapter(list[InfoJson])


# --- run lengths ----------------------------------------------------------------------------------------------------


def encode_rle(mask: np.ndarray) -> dict:
    """A mask (H, W) as COCO's run lengths: by columns, of 0 and 1 in turn, beginning with 0."""
    values = np.concatenate([[False], mask.T.ravel().astype(bool)])  # so that the first run is of zeros
    edges = np.concatenate([[0], np.flatnonzero(values[1:] != values[:-1]), [mask.size]])
    return {"counts": np.diff(edges).tolist(), "size": list(mask.shape)}


def decode_rle(rle: Mapping[str, object]) -> np.ndarray:
    """(H, W) bool of COCO's run lengths, a list or a compressed text; ValueError if they do not fill the picture."""
    height, width = rle["size"]
    counts = rle["counts"]
    counts = np.asarray(decompress(counts) if isinstance(counts, str) else counts, np.int64)
    if (counts < 0).any() or counts.sum() != height * width:
        raise ValueError(f"run lengths fill {counts.sum()} pixels of {height} x {width}")
    return np.repeat(np.arange(len(counts)) % 2 == 1, counts).reshape(width, height).T


def decompress(text: str) -> list[int]:
    """COCO's text of run lengths: five bits a character, low ones first, from the third on less the last but one."""
    counts, value, shift = [], 0, 0
    for character in text.encode():
        bits = character - 48
        value |= (bits & 31) << shift
        shift += 5
        if not bits & 32:
            if bits & 16:
                value -= 1 << shift
            counts.append(value + counts[-2] if len(counts) > 2 else value)
            value = shift = 0
    return counts


# --- reading --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class ShardFrame:
    """A picture in a shard.

    Args:
        frame: `depth_scale` as the file has it.
        start, size: bytes, the stretch of the tar in which its members lie.
        places: (3, 2) int32, where in it `READ_KINDS` begin, and how long they are.
    """

    frame: Frame
    start: int
    size: int
    places: np.ndarray


def shard_number(tar: Path | str) -> int | None:
    """The last number in the name of a shard."""
    numbers = re.findall(r"\d+", Path(tar).stem)
    return int(numbers[-1]) if numbers else None


def scan_shard(tar: Path) -> tuple[list[ShardFrame], dict[str, str], str | None]:
    """What a shard holds, by its headers and JSON members.

    Returns:
        the pictures; by key, why others cannot be used; and why the tar cannot be read to its end, else None.
    """
    members, problem = open_members(tar, ())
    if problem is not None:
        return [], {}, problem
    names = members.names.tobytes().decode().split("\n") if len(members.sizes) else []
    pictures: dict[str, dict[str, tuple[int, int]]] = {}
    for name, start, size in zip(names, members.offsets.tolist(), members.sizes.tolist(), strict=True):
        key, _, kind = Path(name).name.partition(".")
        pictures.setdefault(key, {})["rgb" if kind in RGB_KINDS else kind] = (start, size)
    found, bad = [], {}
    with tar.open("rb") as file:
        for key, parts in pictures.items():
            try:
                found.append(read_shard_frame(file.fileno(), key, parts))
            except ValueError as error:
                bad[key] = str(error)
    return found, bad, None


def read_shard_frame(descriptor: int, key: str, parts: Mapping[str, tuple[int, int]]) -> ShardFrame:
    """The JSON members of a picture; ValueError, one line, says what is missing or wrong."""
    match = KEY.fullmatch(key)
    if match is None:
        raise ValueError("its name is not <scene>_<view>")
    if missing := [kind for kind in KINDS if kind not in parts]:
        raise ValueError(f"{', '.join(missing)} missing")
    texts = {kind: os.pread(descriptor, size, start) for kind, (start, size) in parts.items() if kind.endswith("json")}
    camera = parse_json(texts["camera.json"], CAMERA, "camera.json")
    poses, infos = (
        parse_json(texts[f"{n}.json"], form, f"{n}.json") for n, form in (("gt", POSES), ("gt_info", INFOS))
    )
    instances = make_instances(poses, infos, "gt.json")
    read = [parts[kind] for kind in READ_KINDS]
    start, end = min(place for place, _ in read), max(place + size for place, size in read)
    if end - start > MAX_PICTURE_BYTES:
        raise ValueError(f"its members do not lie together: {end - start} bytes from the first to the last")
    places = np.array([(place - start, size) for place, size in read], np.int32)
    scene_id, im_id = (int(number) for number in match.groups())
    frame = Frame(scene_id, im_id, np.reshape(camera.intrinsics, (3, 3)), camera.depth_scale, instances)
    return ShardFrame(frame, start, end - start, places)


def read_stretch(tar: Path, start: int, size: int) -> bytes:
    """A stretch of a tar in one read; BadSampleError if the tar is missing or ends in it."""
    try:
        # opened each time: a thousand shards are more than a process may hold open, and forks share no position
        descriptor = os.open(tar, os.O_RDONLY)
    except FileNotFoundError:
        raise BadSampleError(f"{tar} is missing") from None
    try:
        data = os.pread(descriptor, size, start)
    finally:
        os.close(descriptor)
    if len(data) < size:
        raise BadSampleError(f"{tar} is damaged: it ends in the middle of a picture")
    return data


def read_pictures(
    tar: Path, start: int, size: int, places: np.ndarray, gt: int, metres: float, key: str
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """A picture and one object's mask, in one read of the tar.

    Args:
        start, size, places: of the picture, as in `ShardFrame`.
        gt: which object.
        metres: per number in the depth picture.
        key: names the picture.

    Returns:
        rgb (H, W, 3) uint8, depth (H, W) float32 metres, and what is seen of the object (H, W) bool.

    Raises:
        BadSampleError: one line: something is damaged.
    """
    data = read_stretch(tar, start, size)
    rgb, depth, masks = (data[place : place + length] for place, length in places.tolist())
    source = f"{tar}, {key}"
    mask = decode_mask(masks, gt, f"{source}.mask_visib.json")
    return decode_rgb(rgb, f"{source}.rgb"), decode_depth(depth, metres, f"{source}.depth.png"), mask


def decode_mask(data: bytes, gt: int, source: str) -> np.ndarray:
    """(H, W) bool, one object of mask_visib.json; BadSampleError, one line, if there is none."""
    try:
        return decode_rle(json.loads(data)[str(gt)])
    except (ValueError, LookupError, TypeError, RecursionError) as error:
        raise BadSampleError(f"{source} has no good mask {gt}: {' '.join(str(error).split())[:200]}") from None


def depth_numbers(tar: Path, picture: ShardFrame, gt: int) -> np.ndarray:
    """The numbers of the depth picture, where an object is seen and there is a surface: (P,)."""
    data = read_stretch(tar, picture.start, picture.size)
    _, depth, masks = (data[place : place + length] for place, length in picture.places.tolist())
    numbers = decode_numbers(depth, f"{tar}, {picture.frame.key}.depth.png")
    mask = decode_mask(masks, gt, f"{tar}, {picture.frame.key}.mask_visib.json")
    if mask.shape != numbers.shape:
        raise BadSampleError(f"{tar}, {picture.frame.key}: mask {mask.shape} and depth {numbers.shape} differ in form")
    return numbers[mask & (numbers > 0)]


# --- writing --------------------------------------------------------------------------------------------------------


def write_shards(
    dataset: BopDataset,
    folder: str | Path,
    images_per_shard: int = IMAGES_PER_SHARD,
    depth_scale: float = DEPTH_SCALE,
) -> list[Path]:
    """Write the pictures of a BOP split as shards; each is whole or absent.

    Args:
        depth_scale: numbers per millimetre in the depth pictures.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    frames, tars, shards = dataset.frames(), [], {}
    for number, first in enumerate(range(0, len(frames), images_per_shard)):
        buffer = io.BytesIO()
        with tarfile.open(fileobj=buffer, mode="w", format=tarfile.USTAR_FORMAT) as archive:
            for frame in frames[first : first + images_per_shard]:
                shards[frame.key] = number
                for name, content in shard_members(dataset, frame, depth_scale):
                    member = tarfile.TarInfo(name)
                    member.size = len(content)
                    archive.addfile(member, io.BytesIO(content))
        tars.append(folder / f"shard-{number:06d}.tar")
        write_file(tars[-1], buffer.getvalue())
    write_file(folder / "key_to_shard.json", json.dumps(shards))
    return tars


def shard_members(dataset: BopDataset, frame: Frame, depth_scale: float) -> Iterator[tuple[str, bytes]]:
    """Name and content of the members of one picture."""
    path = find_picture(dataset.scene(frame.scene_id), frame.im_id)
    if f"rgb{path.suffix}" not in RGB_KINDS:
        raise ValueError(f"{path}: shards hold png and jpg")
    depth = io.BytesIO()
    numbers = encode_depth(dataset.depth(frame), METRES_PER_MM / depth_scale)
    Image.fromarray(numbers).save(depth, "PNG", compress_level=PNG_LEVEL)
    masks = {
        str(gt): encode_rle(dataset.mask_visib(frame.scene_id, frame.im_id, gt)) for gt in range(len(frame.instances))
    }
    values = {
        "camera": {"cam_K": frame.K.ravel().tolist(), "depth_scale": depth_scale},
        "gt": [pose_json(each) for each in frame.instances],
        "gt_info": [visibility_json(each) for each in frame.instances],
        "mask_visib": masks,
    }
    yield f"{frame.key}.rgb{path.suffix}", path.read_bytes()
    yield f"{frame.key}.depth.png", depth.getvalue()
    for kind, value in values.items():
        yield f"{frame.key}.{kind}.json", json.dumps(value).encode()


def visibility_json(each: Instance) -> dict:
    """An entry of gt_info.json."""
    return {
        "bbox_obj": to_file_box(each.bbox_obj),
        "bbox_visib": to_file_box(each.bbox_visib),
        "px_count_visib": each.px_count_visib,
        "visib_fract": each.visib_fract,
    }
