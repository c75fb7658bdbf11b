"""Layouts on disk: pictures, what stands where in them, and what models made of them.

    images/<id>.png                                 RGB, of the training resolution
    captions/<id>.json                              a `Caption`
    references/<id>_<k>.png                         other views of objects, where there are any
    embedding/clip_cropped_boxes/<id>.safetensors   image (n, E), text (n, P), valid (n,)
    embedding/dino_cropped_boxes/<id>.safetensors   cls (n, F), valid (n,)
    latents/vae_full_images/<id>.safetensors        mean (C, h, w) as the VAE gives it; shift and scale in the metadata
    latents/text_embeddings/<id>.safetensors        t5 (L, T), t5_len (), pooled (P,), span_tokens (n, 2)
    latents/text_embeddings/_empty.safetensors      t5 and pooled of the empty prompt
    splits.json                                     names of splits -> ids
    manifest.jsonl                                  a line for each whole sample, written last
    prepare_meta.json                               models and preprocessing, a `Meta`
    report.json                                     the samples that were dropped, and why

n objects, one row each, in the order of the caption. Embeddings of an object are those of its reference, or of its own
place in the picture where it has none. Older folders hold one file `<id>_obj<k>.npy` or `.pt` for each embedding.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Literal

import numpy as np
import torch
from pydantic import Field, ValidationError, field_validator, model_validator
from safetensors import SafetensorError, safe_open
from torch import Tensor

from backlot.metadata import Metadata, describe_errors

FORMAT_VERSION = 1
IMAGES, CAPTIONS, REFERENCES = "images", "captions", "references"
CLIP, DINO = "embedding/clip_cropped_boxes", "embedding/dino_cropped_boxes"
LATENTS, TEXTS = "latents/vae_full_images", "latents/text_embeddings"
EMPTY_PROMPT = "_empty"
MANIFEST_NAME, META_NAME, SPLITS_NAME, REPORT_NAME = "manifest.jsonl", "prepare_meta.json", "splits.json", "report.json"
DEPTHS = ("foreground", "midground", "background")
NEAR_AREA, NEAR_HEIGHT, FAR_AREA, FAR_HEIGHT = 0.10, 0.7, 0.01, 0.3
TENSORS = {CLIP: ("image", "text", "valid"), DINO: ("cls", "valid"), LATENTS: ("mean",)}
TENSORS[TEXTS] = ("t5", "t5_len", "pooled", "span_tokens")
PER_OBJECT = {CLIP: TENSORS[CLIP], DINO: TENSORS[DINO], LATENTS: (), TEXTS: ("span_tokens",)}
OLDER_SUFFIXES = (".npy", ".pt")
MAX_CAPTION_BYTES = 2**22

Box = tuple[float, float, float, float]


class Reference(Metadata):
    image_path: str
    """relative to the folder"""
    bbox: Annotated[list[float], Field(min_length=4, max_length=4)]


class LayoutObject(Metadata):
    object_id: int | str
    category_name: str = ""
    caption: str
    bbox: Annotated[list[float], Field(min_length=4, max_length=4)]
    """x1, y1, x2, y2 in 0..1"""
    depth_label: Literal["foreground", "midground", "background"]
    is_foreground: bool
    z_order: int | None = None
    """0 is farthest"""
    phrase_span: Annotated[list[int], Field(min_length=2, max_length=2)] | None = None
    """characters c0 ... c1 - 1 of the global caption"""
    mask_path: str | None = None
    reference: Reference | None = None

    @model_validator(mode="before")
    @classmethod
    def _fill_depth(cls, values: object) -> object:
        """Where no depth is given, that of `depth_label`; the foreground is what has this label."""
        if not isinstance(values, dict):
            return values
        box = values.get("bbox")
        if values.get("depth_label") is None and isinstance(box, list) and len(box) == 4:
            if not all(isinstance(edge, int | float) for edge in box):
                return values
            values = {**values, "depth_label": depth_label(box)}
        return {"is_foreground": values.get("depth_label") == "foreground", **values}

    @model_validator(mode="after")
    def _check(self) -> LayoutObject:
        if not self.caption.strip():
            raise ValueError("`caption` is empty")
        if self.is_foreground != (self.depth_label == "foreground"):
            raise ValueError(f"`is_foreground` is {self.is_foreground}, but `depth_label` is {self.depth_label!r}")
        check_box(self.bbox)
        if self.reference is not None:
            check_box(self.reference.bbox)
        return self


class Caption(Metadata):
    """A picture and what stands where in it."""

    version: Literal[1]
    image_id: Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,199}$")]
    image_path: str
    """relative to the folder"""
    width: Annotated[int, Field(ge=1)]
    height: Annotated[int, Field(ge=1)]
    global_caption: str
    objects: Annotated[list[LayoutObject], Field(min_length=1)]

    @field_validator("global_caption")
    @classmethod
    def _not_empty(cls, text: str) -> str:
        if not text.strip():
            raise ValueError("is empty")
        return text

    @model_validator(mode="after")
    def _check(self) -> Caption:
        ids = [each.object_id for each in self.objects]
        if len(set(map(str, ids))) < len(ids):
            raise ValueError("two objects have the same `object_id`")
        for each in self.objects:
            x1, y1, x2, y2 = each.bbox
            if (x2 - x1) * self.width < 1 or (y2 - y1) * self.height < 1:
                raise ValueError(f"object {each.object_id!r} is smaller than a pixel: {each.bbox}")
            if each.phrase_span is not None and not 0 <= each.phrase_span[0] < each.phrase_span[1] <= len(
                self.global_caption
            ):
                raise ValueError(
                    f"`phrase_span` {each.phrase_span} of object {each.object_id!r} is outside the caption"
                )
        return self


class Meta(Metadata):
    """What a folder was made of: a difference in any of the recipes makes what they made stale."""

    format_version: Literal[1]
    recipes: dict[str, dict]
    """step -> its models and settings"""
    evaluation_only: bool
    """a benchmark, or held-out identities: never to be trained on"""


def check_box(box: list[float]) -> None:
    """ValueError if x1 < x2, y1 < y2 within [0, 1] does not hold."""
    x1, y1, x2, y2 = box
    if not (0 <= x1 < x2 <= 1 and 0 <= y1 < y2 <= 1):
        raise ValueError(f"`bbox` must be x1 y1 x2 y2 with 0 <= x1 < x2 <= 1 and 0 <= y1 < y2 <= 1, got {box}")


def depth_label(box: list[float] | Box) -> str:
    """Guess from a box how near its object is: large or low is near, tiny or high is far; tested in this order."""
    x1, y1, x2, y2 = box
    area, height = (x2 - x1) * (y2 - y1), (y1 + y2) / 2
    if area > NEAR_AREA or height > NEAR_HEIGHT:
        return "foreground"
    return "background" if area < FAR_AREA or height < FAR_HEIGHT else "midground"


def find_phrase(global_caption: str, caption: str) -> list[int] | None:
    """Where an object's caption stands in the picture's, as characters [c0, c1); None if nowhere, or more than once."""
    text, phrase = global_caption.lower(), caption.strip().lower().rstrip(".")
    if not phrase or text.count(phrase) != 1:
        return None
    start = text.index(phrase)
    return [start, start + len(phrase)]


# --- reading --------------------------------------------------------------------------------------------------------


def caption_path(folder: Path, image_id: str) -> Path:
    return folder / CAPTIONS / f"{image_id}.json"


def parse_caption(values: object, source: str) -> Caption:
    """ValueError, one line, names the first of what is wrong."""
    try:
        return Caption.model_validate(values)
    except ValidationError as error:
        raise ValueError(describe_errors(error, source)[0]) from None


def read_caption(folder: Path, image_id: str, pictures: bool = True) -> Caption:
    """Read and check the caption of a sample; ValueError, one line, if it is missing, damaged or wrong.

    Args:
        pictures: those that it names must be there.
    """
    path = caption_path(folder, image_id)
    if not path.is_file():
        raise ValueError(f"{path} is missing")
    if path.stat().st_size > MAX_CAPTION_BYTES:
        raise ValueError(f"{path} is larger than {MAX_CAPTION_BYTES} bytes")
    try:
        values = json.loads(path.read_bytes())
    except (ValueError, RecursionError):
        raise ValueError(f"{path} is not JSON") from None
    caption = parse_caption(values, str(path))
    if caption.image_id != image_id:
        raise ValueError(f"{path} is of the image {caption.image_id!r}")
    names = [caption.image_path, *(each.reference.image_path for each in caption.objects if each.reference)]
    for name in names if pictures else []:
        if not inside(folder, name).is_file():
            raise ValueError(f"{path} names the picture {name}, which is missing")
    return caption


def inside(folder: Path, name: str) -> Path:
    """A file below `folder`; ValueError if the name points out of it."""
    path = Path(name)
    if path.is_absolute() or ".." in path.parts:
        raise ValueError(f"{name!r} points out of {folder}")
    return folder / path


def tensor_path(folder: Path, kind: str, image_id: str) -> Path:
    return folder / kind / f"{image_id}.safetensors"


def read_key(path: Path) -> str | None:
    """What the file was made of; None if there is no whole file."""
    try:
        with safe_open(path, framework="pt") as file:
            return (file.metadata() or {}).get("key")
    except (OSError, SafetensorError):
        return None


def read_tensors(folder: Path, kind: str, image_id: str, num_objects: int) -> tuple[dict[str, Tensor], dict[str, str]]:
    """The tensors of one kind of a sample, and the file's metadata.

    Raises:
        ValueError: one line: the file is missing or damaged, or has not a row for each object.
    """
    path = tensor_path(folder, kind, image_id)
    try:
        with safe_open(path, framework="pt") as file:
            missing = set(TENSORS[kind]).difference(file.keys())
            if missing:
                raise ValueError(f"{path} has no {', '.join(sorted(missing))}")
            tensors, metadata = {name: file.get_tensor(name) for name in TENSORS[kind]}, file.metadata() or {}
    except FileNotFoundError:
        raise ValueError(f"{path} is missing") from None
    except (OSError, SafetensorError) as error:
        raise ValueError(f"{path} is damaged: {error}") from None
    for name in PER_OBJECT[kind]:
        if len(tensors[name]) != num_objects:
            raise ValueError(f"{path}: {name} has {len(tensors[name])} rows for {num_objects} objects")
    return tensors, metadata


def read_older(folder: Path, kind: str, image_id: str, num_objects: int) -> Tensor:
    """Embeddings of the older naming, `<id>_obj<k>.npy` or `.pt`, one vector each: (n, width) float32.

    Raises:
        ValueError: one line: a file is missing, damaged, or of another width than the first.
    """
    rows = [_read_vector(folder / kind, f"{image_id}_obj{k}") for k in range(num_objects)]
    if len({len(row) for row in rows}) > 1:
        raise ValueError(
            f"{folder / kind}: embeddings of {image_id!r} have widths {sorted({len(row) for row in rows})}"
        )
    return torch.stack(rows)


def _read_vector(folder: Path, stem: str) -> Tensor:
    path = next(
        (folder / f"{stem}{suffix}" for suffix in OLDER_SUFFIXES if (folder / f"{stem}{suffix}").is_file()), None
    )
    if path is None:
        raise ValueError(f"{folder / stem}{' or '.join(OLDER_SUFFIXES)} is missing")
    try:
        if path.suffix == ".npy":
            vector = torch.from_numpy(np.load(path, allow_pickle=False))
        else:
            vector = torch.load(path, map_location="cpu", weights_only=True)
        vector = vector.float().flatten()
    except (*DAMAGED, OSError) as error:
        raise ValueError(f"{path} is damaged: {' '.join(str(error).split())[:200]}") from None
    if not len(vector) or not vector.isfinite().all():
        raise ValueError(f"{path} holds no finite vector")
    return vector


# What numpy and torch.load raise for damaged files.
DAMAGED = (AttributeError, EOFError, LookupError, OverflowError, RuntimeError, TypeError, ValueError)
DAMAGED = (*DAMAGED, torch.serialization.pickle.UnpicklingError)


def read_json_object(path: Path) -> dict:
    """ValueError, one line, if it is missing or no JSON object."""
    try:
        values = json.loads(path.read_bytes())
    except FileNotFoundError:
        raise ValueError(f"{path} is missing") from None
    except (ValueError, RecursionError):
        values = None
    if not isinstance(values, dict):
        raise ValueError(f"{path} is damaged")
    return values


def read_meta(folder: Path) -> Meta:
    """ValueError, one line, if the folder was not prepared, or by another version."""
    path = folder / META_NAME
    if not path.is_file():
        raise ValueError(f"{folder} holds no prepared layouts (no {META_NAME}): python -m data_prep.layouts prepare")
    try:
        return Meta.model_validate(read_json_object(path))
    except ValidationError as error:
        raise ValueError(describe_errors(error, str(path))[0]) from None


def read_manifest(folder: Path) -> Iterator[dict]:
    """A row for each whole sample; ValueError if preparation was not finished."""
    path = folder / MANIFEST_NAME
    if not path.is_file():
        raise ValueError(f"{folder} is incomplete (no {MANIFEST_NAME}): python -m data_prep.layouts prepare goes on")
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
        try:
            row = json.loads(line)
        except (ValueError, RecursionError):
            row = None
        if not isinstance(row, dict) or not isinstance(row.get("image_id"), str) or not _is_plain(row["image_id"]):
            raise ValueError(f"{path}, line {number}: is damaged")
        yield row


def _is_plain(image_id: str) -> bool:
    return re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]{0,199}", image_id) is not None
