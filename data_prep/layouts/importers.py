"""Layouts of others: COCO, LayoutSAM, DenseLayout, folders of captions. Boxes become x1 y1 x2 y2 in 0..1 here, once.

Each importer gives `Sample`s; `write_sample` fits the picture into a square and writes both as the format says.
"""

from __future__ import annotations

import ast
import io
import json
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps

from backlot.files import write_file
from backlot.pictures import BAD_IMAGE_ERRORS, decode_image
from data_prep.layouts.format import (
    CAPTIONS,
    FORMAT_VERSION,
    IMAGES,
    REFERENCES,
    caption_path,
    find_phrase,
    inside,
    parse_caption,
    read_json_object,
)

MIN_COCO_AREA = 0.005
"""Of the picture: smaller objects are left out."""
MIN_KEPT = 0.5
"""Of a box, inside the square that is cut out of a picture: objects with less are left out."""
BENCHMARKS = ("denselayout",)
"""Sources that are never to be trained on."""


@dataclass(frozen=True)
class Sample:
    """A picture and what stands in it, before it is fitted into a square.

    Args:
        read: gives the bytes of the picture's file.
        objects: `category_name`, `caption`, `bbox` (x1 y1 x2 y2 in 0..1, of any extent) and, if known, the other fields
            of the caption format; a reference's `image_path` is absolute.
    """

    image_id: str
    read: Callable[[], bytes]
    global_caption: str
    objects: list[dict] = field(default_factory=list)
    problem: str | None = None


# --- sources --------------------------------------------------------------------------------------------------------


def read_coco(annotations: Path, images: Path) -> Iterator[Sample]:
    """COCO instances, without crowds and objects below `MIN_COCO_AREA`; a picture's `caption` is used if it has one.

    Args:
        annotations: the JSON file with `images`, `annotations` and `categories`.
        images: folder of the pictures.
    """
    content = read_json_object(annotations)
    try:
        names = {each["id"]: each["name"] for each in content["categories"]}
        boxes: dict[int, list[dict]] = {}
        for each in content["annotations"]:
            boxes.setdefault(each["image_id"], []).append(each)
        for picture in content["images"]:
            width, height = picture["width"], picture["height"]
            objects = []
            for each in boxes.get(picture["id"], []):
                x, y, w, h = each["bbox"]
                if each.get("iscrowd") or w * h < MIN_COCO_AREA * width * height:
                    continue
                name = names[each["category_id"]]
                box = [x / width, y / height, (x + w) / width, (y + h) / height]
                caption = each.get("caption") or with_article(name)
                objects.append({"category_name": name, "caption": caption, "bbox": box})
            caption = picture.get("caption") or list_of([each["caption"] for each in objects])
            path = images / picture["file_name"]
            yield Sample(plain_id(Path(picture["file_name"]).stem), path.read_bytes, caption, objects)
    except (KeyError, TypeError, ValueError, ZeroDivisionError) as error:
        raise ValueError(f"{annotations} is no COCO file of instances: {error!r}") from None


def read_layoutsam(path: Path, images: Path | None = None) -> Iterator[Sample]:
    """LayoutSAM rows: lists are stored as strings, boxes are x1 y1 x2 y2 in pixels."""
    for number, row in enumerate(read_rows(path)):
        try:
            boxes = [scaled(box, row["width"], row["height"]) for box in as_list(row["bbox_list"])]
            names = [str(name) for name in as_list(row["region_captions"])]
            details = [str(name) for name in as_list(row.get("detail_region_captions") or names)]
            if not len(boxes) == len(names) == len(details):
                raise ValueError(f"{len(boxes)} boxes, {len(names)} captions, {len(details)} details")
            objects = [
                {"category_name": name, "caption": detail or name, "bbox": box}
                for name, detail, box in zip(names, details, boxes, strict=True)
            ]
            name = str(row["file_name"])
            yield Sample(plain_id(Path(name).stem), reader(row, name, images), str(row["global_caption"]), objects)
        except (KeyError, TypeError, ValueError, SyntaxError, ZeroDivisionError) as error:
            yield bad_row(path, number, error)


def read_denselayout(path: Path, images: Path | None = None) -> Iterator[Sample]:
    """DenseLayout rows, for evaluation only: boxes are x1 y1 x2 y2 in pixels, annotations may be nested lists."""
    for number, row in enumerate(read_rows(path)):
        try:
            objects = [
                {
                    "category_name": str(each["category_name"]),
                    "caption": str(each.get("caption") or each["category_name"]),
                    "bbox": scaled(each["bbox"], row["width"], row["height"]),
                }
                for each in flatten(row["annos"])
            ]
            name = f"{row['id']}.jpg"
            yield Sample(plain_id(str(row["id"])), reader(row, name, images), str(row["prompt"]), objects)
        except (KeyError, TypeError, ValueError, SyntaxError, ZeroDivisionError) as error:
            yield bad_row(path, number, error)


def read_folder(folder: Path) -> Iterator[Sample]:
    """Captions and pictures in the format of data_prep/layouts/format.py, of any size."""
    paths = sorted((folder / CAPTIONS).glob("*.json"))
    if not paths:
        raise ValueError(f"{folder} has no {CAPTIONS}/*.json")
    for path in paths:
        values = read_json_object(path)
        objects = []
        for each in values.get("objects") or []:
            reference = each.get("reference")
            if reference:
                reference = {**reference, "image_path": str(inside(folder, reference["image_path"]).resolve())}
            objects.append({**each, "reference": reference})
        picture = inside(folder, str(values.get("image_path")))
        yield Sample(plain_id(path.stem), picture.read_bytes, str(values.get("global_caption", "")), objects)


SOURCES = {"coco": read_coco, "layoutsam": read_layoutsam, "denselayout": read_denselayout, "folder": read_folder}


def open_source(source: str, path: Path, images: Path | None) -> Iterator[Sample]:
    """The samples of one of `SOURCES`; ValueError, one line, where a file of annotations is not what it should be."""
    if source == "coco":
        return read_coco(path, images or path.parent)
    if source == "folder":
        return read_folder(path)
    return SOURCES[source](path, images)


def read_rows(path: Path) -> Iterator[dict]:
    """The rows of a .jsonl, .json or .parquet file, or of all those in a folder."""
    if path.is_dir():
        paths = sorted(each for each in path.iterdir() if each.suffix in (".jsonl", ".json", ".parquet"))
        if not paths:
            raise ValueError(f"{path} holds no .jsonl, .json or .parquet files")
        for each in paths:
            yield from read_rows(each)
    elif path.suffix == ".parquet":
        import pyarrow.parquet

        for batch in pyarrow.parquet.ParquetFile(path).iter_batches(256):
            yield from batch.to_pylist()
    else:
        text = path.read_text(encoding="utf-8")
        lines = text.splitlines() if path.suffix == ".jsonl" else None
        try:
            rows = [json.loads(line) for line in lines if line.strip()] if lines is not None else json.loads(text)
        except (ValueError, RecursionError):
            raise ValueError(f"{path} is not JSON") from None
        yield from rows


def bad_row(path: Path, number: int, error: Exception) -> Sample:
    """What stands for a row that cannot be understood."""
    return Sample(f"row-{number}", bytes, "", problem=f"row {number} of {path.name}: {error!r}")


def reader(row: dict, name: str, images: Path | None) -> Callable[[], bytes]:
    """How to get the bytes of a row's picture: it holds them, or names a file in the folder `images`."""
    held = row.get("image")
    if isinstance(held, dict) and held.get("bytes"):
        return lambda: held["bytes"]
    if images is None:
        raise ValueError("it holds no picture: --images FOLDER says where they are")
    return (images / name).read_bytes


def as_list(value: object) -> list:
    """A list that may be stored as a string; ValueError or SyntaxError if it is none."""
    value = ast.literal_eval(value) if isinstance(value, str) else value
    if not isinstance(value, list | tuple):
        raise ValueError(f"a list is expected, got {str(value)[:60]!r}")
    return list(value)


def flatten(values: Sequence) -> Iterator[dict]:
    for each in values:
        if isinstance(each, list | tuple):
            yield from flatten(each)
        else:
            yield each


def scaled(box: Sequence[float], width: float, height: float) -> list[float]:
    """x1 y1 x2 y2 in pixels -> in 0..1."""
    x1, y1, x2, y2 = (float(edge) for edge in box)
    return [x1 / width, y1 / height, x2 / width, y2 / height]


def plain_id(name: str) -> str:
    """A name that can be a file's."""
    return re.sub(r"[^A-Za-z0-9._-]", "-", name).lstrip("._-")[:150] or "sample"


def with_article(name: str) -> str:
    return f"{'an' if name[:1].lower() in tuple('aeiou') else 'a'} {name}"


def list_of(phrases: Sequence[str]) -> str:
    """a, b and c."""
    return " and ".join(filter(None, [", ".join(phrases[:-1]), *phrases[-1:]]))


# --- writing --------------------------------------------------------------------------------------------------------


def write_sample(folder: Path, sample: Sample, resolution: int) -> None:
    """Cut the centre square out of a picture, resize it, take its boxes along, and write picture and caption.

    Raises:
        ValueError: one line: the picture cannot be read, or no object is left.
    """
    if sample.problem:
        raise ValueError(sample.problem)
    try:
        image = decode_image(sample.read())
    except BAD_IMAGE_ERRORS as error:
        raise ValueError(f"its picture cannot be read: {error}") from None
    objects = [each for each in (fit_object(each, image.size) for each in sample.objects) if each is not None]
    for number, each in enumerate(objects):
        each.setdefault("object_id", number)
        if each.get("phrase_span") is None:
            phrases = (find_phrase(sample.global_caption, str(each[name])) for name in ("caption", "category_name"))
            each["phrase_span"] = next((span for span in phrases if span), None)
    name = f"{IMAGES}/{sample.image_id}.png"
    values = {
        "version": FORMAT_VERSION,
        "image_id": sample.image_id,
        "image_path": name,
        "width": resolution,
        "height": resolution,
        "global_caption": sample.global_caption,
        "objects": objects,
    }
    if not objects:
        raise ValueError("no object is left inside its square")
    references = {}
    for number, each in enumerate(objects):
        if reference := each.get("reference"):
            path = f"{REFERENCES}/{sample.image_id}_{number}.png"
            references[path] = read_reference(Path(reference["image_path"]))
            each["reference"] = {"image_path": path, "bbox": reference["bbox"]}
    parse_caption(values, "its caption")
    square = ImageOps.fit(image, (resolution, resolution), Image.Resampling.LANCZOS)
    write_parts(folder, values, {name: np.asarray(square), **references})


def fit_object(values: dict, size: tuple[int, int]) -> dict | None:
    """An object as it lies in the centre square of a picture (width, height); None if too little of it does."""
    side = min(size)
    box = [float(edge) for edge in values["bbox"]]
    offsets = [(length - side) / 2 for length in size] * 2
    moved = [(edge * length - offset) / side for edge, length, offset in zip(box, size * 2, offsets, strict=True)]
    x1, y1, x2, y2 = (min(max(edge, 0.0), 1.0) for edge in moved)
    whole = (moved[2] - moved[0]) * (moved[3] - moved[1])
    if whole <= 0 or x1 >= x2 or y1 >= y2 or (x2 - x1) * (y2 - y1) < MIN_KEPT * whole:
        return None
    return {**values, "bbox": [x1, y1, x2, y2]}


def read_reference(path: Path) -> np.ndarray:
    """(H, W, 3) uint8; ValueError if it is no picture."""
    try:
        return np.asarray(decode_image(path.read_bytes()))
    except BAD_IMAGE_ERRORS as error:
        raise ValueError(f"its reference {path.name} cannot be read: {error}") from None


def write_parts(folder: Path, caption: dict, pictures: dict[str, np.ndarray]) -> None:
    """Write pictures, names relative to the folder, and then the caption: a sample that has one is whole."""
    for name, pixels in pictures.items():
        buffer = io.BytesIO()
        Image.fromarray(pixels).save(buffer, "PNG", compress_level=1)
        write_file(folder / name, buffer.getvalue(), durable=False)
    write_file(caption_path(folder, caption["image_id"]), json.dumps(caption), durable=False)


def is_whole(folder: Path, image_id: str) -> bool:
    """Whether a sample has been written."""
    return caption_path(folder, image_id).is_file()
