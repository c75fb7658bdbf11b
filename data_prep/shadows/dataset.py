"""Shadow data: an object picture, its mask, and the shadow it casts under a light of known direction and size.

A folder:

    objects/<stem>.png      the object with alpha, or on the fill grey (also .jpg, .jpeg, .webp)
    masks/<stem>.png        grey, full scale = object; between at the edges, if they are antialiased
    shadows/<stem>.png      8- or 16-bit grey, linear, full scale = full shadow; or <stem>.npy, floats in [0, 1]
    metadata.json           {stem: {"theta", "phi", "size", and if known "object_id", "clipped", "family", "track"}}

or a tar file, or a folder of them (at any depth), with the members `<stem>.image.png`, `<stem>.mask.png`,
`<stem>.shadow.png` and `<stem>.metadata.json`. The public benchmark is of this kind: its stems begin with the name of
a track, `softness_control` or `direction_control_...`. Tars are never unpacked: their members are found once, which an
index beside each tar remembers (`backlot/tar_index.py`), and then read where they lie.

Metadata: theta in degrees from the zenith, 0..45; phi in degrees, 0 = light from the right, taken modulo 360; size =
side of the square light, 2..8 (also `light_size` or `s`; a key `r` is the radius of the light's sphere and never the
size). Samples with equal `object_id` show the same object and stay in one split; without it the sha256 of the object's
file takes its place, which costs reading all of these files where a split is asked for. `clipped` (bool): the shadow
leaves the picture. `family`: the kind of object. `track`: the sample belongs to an evaluation grid, and is refused for
training.

`python -m data_prep.shadows check PATH` names every sample that `ShadowDataset` would not take.
"""

from __future__ import annotations

import functools
import hashlib
import io
import json
import math
import os
import re
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Protocol, SupportsInt

import numpy as np
import torch
from PIL import Image, ImageOps, UnidentifiedImageError
from pydantic import BeforeValidator, Field, ValidationError, model_validator
from torch.utils.data import Dataset

from backlot.fingerprint import fingerprint
from backlot.metadata import Metadata, between, describe_errors
from backlot.pictures import BAD_IMAGE_ERRORS, EXHAUSTED, MAX_PIXELS, fit_object, fit_square, object_pixels
from backlot.samples import SampleKey, is_validation
from backlot.tar_index import TarIndex

SPLITS = ("train", "validation", "all")
THETA_RANGE = (0, 45)
SIZE_RANGE = (2, 8)
SIZE_NAMES = ("size", "light_size", "s")
FILL = 0.5
METADATA_NAME = "metadata.json"
# What a sample consists of: the folder and the name of a tar's member, and the kinds of file each may be.
KINDS = ("object", "mask", "shadow")
FOLDERS = {"object": "objects", "mask": "masks", "shadow": "shadows"}
MEMBERS = {"object": "image", "mask": "mask", "shadow": "shadow", "metadata": "metadata"}
SUFFIXES = {"object": (".png", ".jpg", ".jpeg", ".webp"), "mask": (".png",), "shadow": (".png", ".npy")}
MEMBER = re.compile(r"(?P<stem>.+)\.(?P<kind>image|mask|shadow|metadata)(?P<suffix>\.[a-z]+)")
TRACK = re.compile(r"(?:^|/)(softness_control|direction_control(?:_[a-z]+)?)(?=[_/.]|$)")
# numpy's own reader of headers parses Python, and fails in many ways on damaged ones.
NPY_HEADER = re.compile(
    r"\{'descr': '([<>]f[248])', 'fortran_order': (True|False), 'shape': \(([1-9]\d{0,5}), ([1-9]\d{0,5})\), \}\s*"
)


# --- what a good sample is ------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Labels:
    """What the metadata say of a sample: `theta`, `phi` in [0, 360) in degrees, `size`; None where they say nothing."""

    theta: float
    phi: float
    size: float
    object_id: str | None = None
    track: str | None = None
    family: str | None = None
    clipped: bool | None = None


@dataclass(frozen=True)
class Sample:
    """Three pictures of one size: object (H, W, 3) in [0, 1] over the fill, mask (H, W) and shadow in [0, 1].

    All are float32.
    """

    object_image: np.ndarray
    mask: np.ndarray
    shadow: np.ndarray


Size = Annotated[float, between(*SIZE_RANGE)]
Text = Annotated[str, Field(min_length=1)]


class ShadowMetadata(Metadata):
    """What a format says of one sample; the size under one of three names."""

    theta: Annotated[float, between(*THETA_RANGE)]
    phi: float
    size: Size = None
    light_size: Size = None
    s: Size = None
    object_id: Annotated[Text | None, BeforeValidator(lambda value: str(value) if type(value) is int else value)] = None
    track: Text | None = None
    family: Text | None = None
    clipped: bool | None = None

    @model_validator(mode="after")
    def _check(self) -> ShadowMetadata:
        sizes = {name: getattr(self, name) for name in SIZE_NAMES if getattr(self, name) is not None}
        if not sizes:
            raise ValueError("has no `size`")
        if len(set(sizes.values())) > 1:
            given = ", ".join(f"`{name}` {value:g}" for name, value in sizes.items())
            raise ValueError(f"gives several sizes: {given}")
        return self


def read_labels(metadata: object) -> Labels:
    """Check the metadata of one sample; ValueError, one line naming the field, for anything missing or out of range."""
    try:
        known = ShadowMetadata.model_validate(metadata)
    except ValidationError as error:
        raise ValueError(describe_errors(error, "its metadata")[0]) from None
    return Labels(
        known.theta,
        wrap_degrees(known.phi),
        known.size or known.light_size or known.s,
        object_id=known.object_id,
        track=known.track,
        family=known.family,
        clipped=known.clipped,
    )


def wrap_degrees(phi: float) -> float:
    """The same direction in [0, 360), also after rounding to float32."""
    return float(np.float32(phi % 360.0)) % 360.0


def mirror_degrees(phi: float) -> float:
    """The direction of the light in the mirrored picture; the camera lies in the plane that mirrors."""
    return wrap_degrees(180.0 - phi)


def decode_sample(object_data: bytes, mask_data: bytes, shadow_data: bytes, fill: float = FILL) -> Sample:
    """Decode the three files of a sample and check them; ValueError, one line, if they do not make a good one."""
    object_image = decode_object(object_data, fill)
    mask, shadow = decode_grey(mask_data, "mask"), decode_shadow(shadow_data)
    sizes = {"object": object_image.shape[:2], "mask": mask.shape, "shadow": shadow.shape}
    if len(set(sizes.values())) > 1:
        described = ", ".join(f"{kind} {width}x{height}" for kind, (height, width) in sizes.items())
        raise ValueError(f"its pictures differ in size: {described}")
    if not mask.any():
        raise ValueError("its mask is empty")
    return Sample(object_image, mask, shadow)


def decode_picture(data: bytes, kind: str, formats: tuple[str, ...]) -> Image.Image:
    """Decode all of a picture, upright; ValueError says why it cannot be read."""
    try:
        image = Image.open(io.BytesIO(data), formats=formats)
        if image.width * image.height > MAX_PIXELS:
            raise ValueError(f"{image.width}x{image.height} pixels, the limit is {MAX_PIXELS}")
        image.load()
        ImageOps.exif_transpose(image, in_place=True)
    except UnidentifiedImageError:
        raise ValueError(f"its {kind} is not a {' or '.join(formats)} picture") from None
    except BAD_IMAGE_ERRORS as error:
        raise ValueError(f"its {kind} is unreadable ({type(error).__name__}: {error})") from None
    return image


def decode_object(data: bytes, fill: float) -> np.ndarray:
    """The object's picture (H, W, 3) float32 in [0, 1], transparent pixels laid over the grey `fill`."""
    return object_pixels(decode_picture(data, "object", ("PNG", "JPEG", "WEBP")), None, fill)


def decode_grey(data: bytes, kind: str) -> np.ndarray:
    """A picture without colour as (H, W) float32 in [0, 1], full scale = 1."""
    image = decode_picture(data, kind, ("PNG",))
    if image.mode == "I" or image.mode.startswith("I;16"):
        return np.asarray(image).astype(np.float32) / 65535
    if image.mode in ("1", "L") and not image.has_transparency_data:
        return np.asarray(image.convert("L"), np.float32) / 255
    red, green, blue, alpha = np.moveaxis(np.asarray(image.convert("RGBA")), -1, 0)
    if (alpha < 255).any():
        raise ValueError(f"its {kind} is partly transparent, it must be a grey picture")
    if (red != green).any() or (red != blue).any():
        raise ValueError(f"its {kind} has colours, it must be a grey picture")
    return red.astype(np.float32) / 255


def decode_shadow(data: bytes) -> np.ndarray:
    """A shadow map (H, W) float32 in [0, 1] from a grey PNG or an npy file of floats."""
    if not data.startswith(np.lib.format.MAGIC_PREFIX):
        return decode_grey(data, "shadow")
    start = 10 if data[6:7] == b"\x01" else 12  # of the header, whose length stands before it
    end = start + int.from_bytes(data[8:start], "little")
    header = data[start:end].decode("latin-1")
    match = NPY_HEADER.fullmatch(header)
    if match is None:
        raise ValueError(f"its shadow must be an npy file of (H, W) floats, its header is {header[:80]!r}")
    dtype, shape = np.dtype(match[1]), (int(match[3]), int(match[4]))
    wanted = math.prod(shape) * dtype.itemsize
    if len(data) - end != wanted:
        raise ValueError(f"its shadow is unreadable ({len(data) - end} bytes of values, {wanted} wanted)")
    values = np.frombuffer(data, dtype, offset=end).reshape(shape, order="F" if match[2] == "True" else "C")
    values = np.array(values, np.float32, order="C")
    if not ((values >= 0) & (values <= 1)).all():  # also for what is not a number
        raise ValueError(f"its shadow must lie in [0, 1], it has values from {values.min():g} to {values.max():g}")
    return values


# --- where samples come from ----------------------------------------------------------------------------------------


class ShadowSource(Protocol):
    """The samples of one place by row, in the order of their stems.

    `problems` says why a stem (or a whole tar) cannot be a good sample by what is there and by its metadata; its row
    has no labels then.
    """

    path: Path
    stems: list[str]
    labels: list[Labels | None]
    problems: dict[str, str]

    def read(self, row: int, kind: str) -> bytes: ...

    def file_size(self, row: int, kind: str) -> int: ...


def open_source(path: str | Path) -> ShadowSource:
    """Find the samples in a folder, a tar or a folder of tars; ValueError, one line, if it is none of them.

    Bad samples are listed in `problems`; no picture is decoded.
    """
    path = Path(path)
    if path.is_file():
        return TarSource(path)
    if not path.is_dir():
        raise ValueError(f"`path` must be a folder or a tar file of shadow data, {path} does not exist")
    if (path / METADATA_NAME).exists() or any((path / folder).is_dir() for folder in FOLDERS.values()):
        return FolderSource(path)
    if next(path.rglob("*.tar"), None) is None:
        folders = ", ".join(f"{folder}/" for folder in FOLDERS.values())
        raise ValueError(f"{path} holds no shadow data: neither {METADATA_NAME} beside {folders} nor .tar files")
    return TarSource(path)


def load_sample(source: ShadowSource, row: int, fill: float = FILL) -> Sample:
    """Read and decode one sample; ValueError, one line naming it, if it is not a good one."""
    stem = source.stems[row]
    reason = source.problems.get(stem)
    if reason is None:
        try:
            return decode_sample(*(source.read(row, kind) for kind in KINDS), fill)
        except ValueError as error:
            reason = str(error)
        except OSError as error:
            if error.errno in EXHAUSTED:  # says nothing about the sample
                raise
            reason = f"a file cannot be read ({error.strerror or error})"
    raise bad_sample(source, stem, reason)


def bad_sample(source: ShadowSource, stem: str, reason: str) -> ValueError:
    return ValueError(f"sample {stem!r} of {source.path}: {reason}")


def find_track(labels: Labels, name: str) -> Labels:
    """Add the track that the stem begins with, where the metadata name none."""
    match = TRACK.search(name)
    return labels if labels.track or match is None else replace(labels, track=match[1])


def without_repeats(pairs: list[tuple[str, object]]) -> dict[str, object]:
    """A JSON object; KeyError for a key that is there twice."""
    values = dict(pairs)
    if len(values) < len(pairs):
        raise KeyError(next(name for index, (name, _) in enumerate(pairs) if name in dict(pairs[:index])))
    return values


DECODER = json.JSONDecoder(object_pairs_hook=without_repeats)


def parse_json(data: bytes, what: str) -> object:
    """JSON without repeated keys; ValueError, beginning with `what`, for anything else."""

    try:
        return DECODER.decode(data.decode())
    except KeyError as error:
        raise ValueError(f"{what} is damaged: the key {error} is there twice") from None
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{what} is damaged: not JSON ({error})") from None


class FolderSource:
    """Samples in `objects/`, `masks/`, `shadows/` and `metadata.json`."""

    def __init__(self, root: Path) -> None:
        self.path = root
        try:
            data = (root / METADATA_NAME).read_bytes()
        except FileNotFoundError:
            raise ValueError(f"{root / METADATA_NAME} is missing") from None
        metadata = parse_json(data, str(root / METADATA_NAME))
        if not isinstance(metadata, dict):
            raise ValueError(f"{root / METADATA_NAME} is damaged: not a JSON object of stems")
        found = {kind: files_by_stem(root / FOLDERS[kind], SUFFIXES[kind]) for kind in KINDS}
        self.stems = sorted(set(metadata).union(*found.values()))
        self.labels: list[Labels | None] = []
        self.problems: dict[str, str] = {}
        self._names: list[tuple[str, ...]] = []
        for stem in self.stems:
            files = {kind: found[kind].get(stem, []) for kind in KINDS}
            labels = None
            try:
                for kind, names in files.items():
                    if len(names) > 1:
                        raise ValueError(f"it has several {FOLDERS[kind]}: {', '.join(sorted(names))}")
                missing = [f"{FOLDERS[kind]}/{stem}{SUFFIXES[kind][0]}" for kind in KINDS if not files[kind]]
                if missing:
                    raise ValueError(f"{' and '.join(missing)} missing")
                if stem not in metadata:
                    raise ValueError(f"it is not in {METADATA_NAME}")
                labels = find_track(read_labels(metadata[stem]), stem)
            except ValueError as error:
                self.problems[stem] = str(error)
            self.labels.append(labels)
            self._names.append(tuple(names[0] if names else "" for names in files.values()))

    def read(self, row: int, kind: str) -> bytes:
        return self._file(row, kind).read_bytes()

    def file_size(self, row: int, kind: str) -> int:
        return self._file(row, kind).stat().st_size

    def _file(self, row: int, kind: str) -> Path:
        return self.path / FOLDERS[kind] / self._names[row][KINDS.index(kind)]


def files_by_stem(folder: Path, suffixes: tuple[str, ...]) -> dict[str, list[str]]:
    """Names of the visible files with one of the suffixes, by stem; empty where there is no such folder."""
    found: dict[str, list[str]] = {}
    if folder.is_dir():
        for name in os.listdir(folder):
            stem, suffix = os.path.splitext(name)
            if suffix.lower() in suffixes and not name.startswith("."):
                found.setdefault(stem, []).append(name)
    return found


class TarSource:
    """Samples in tar files; a stem is the name of a member up to `.image`, `.mask`, `.shadow` or `.metadata`."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._index = TarIndex.open(path, keep=(f".{MEMBERS['metadata']}.json",))
        self.problems = self._index.problems
        # the name of a tar and of its folder may be a track's, too
        self._places = [tar.relative_to(path.parent).as_posix() for tar in self._index.tars]
        found = self._find_files()
        self.stems = sorted(found)
        self.labels = [self._read_labels(stem, found[stem]) for stem in self.stems]
        # An array: a list of a million dicts would be copied into every loader worker.
        self._rows = np.array([[found[stem].get(kind, 0) for kind in KINDS] for stem in self.stems], np.int64)

    def _find_files(self) -> dict[str, dict[str, int]]:
        """Rows of the index by stem and kind; what is there twice is a problem."""
        kind_of = {name: kind for kind, name in MEMBERS.items()}
        found: dict[str, dict[str, int]] = {}
        for row, path in enumerate(self._index.names):
            folder, _, name = path.rpartition("/")
            match = MEMBER.fullmatch(name)
            if match is None or name.startswith("."):
                continue
            kind = kind_of[match["kind"]]
            if match["suffix"] not in SUFFIXES.get(kind, (".json",)):
                continue
            stem = f"{folder}/{match['stem']}" if folder else match["stem"]
            known = found.setdefault(stem, {})
            if kind in known:
                where = sorted({self._tar(known[kind]).name, self._tar(row).name})
                self.problems.setdefault(stem, f"its {MEMBERS[kind]} is there twice ({', '.join(where)})")
            known[kind] = row
        return found

    def _tar(self, row: int) -> Path:
        return self._index.tars[self._index.tar_numbers[row]]

    def _read_labels(self, stem: str, rows: dict[str, int]) -> Labels | None:
        """The labels of a sample; None, and an entry in `problems`, if there are no good ones."""
        missing = [f"{stem}.{name}" for kind, name in MEMBERS.items() if kind not in rows]
        if missing:
            self.problems.setdefault(stem, f"{' and '.join(missing)} missing")
        if stem in self.problems:
            return None
        try:
            labels = read_labels(parse_json(self._index.read(rows["metadata"]), "its metadata"))
        except ValueError as error:
            self.problems[stem] = str(error)
            return None
        return find_track(labels, f"{self._places[self._index.tar_numbers[rows['metadata']]]}/{stem}")

    def read(self, row: int, kind: str) -> bytes:
        return self._index.read(self._rows[row, KINDS.index(kind)])

    def file_size(self, row: int, kind: str) -> int:
        return int(self._index.sizes[self._rows[row, KINDS.index(kind)]])


# --- the dataset ----------------------------------------------------------------------------------------------------


class ShadowDataset(Dataset):
    """Objects, masks and shadow maps with their lights, from the formats above.

    Items: `object_image` (3, H, W) float32 in [-1, 1]; `mask` (1, H, W) float32 in [0, 1]; `shadow_map` (1, H, W)
    float32 in [0, 1], 1 = full shadow; `theta`, `phi`, `size` float32 scalars (degrees, degrees in [0, 360), world
    units). A mirrored item has `phi` -> 180 - `phi`.

    Pictures of another size than `image_size` are resized (object: Lanczos; mask and shadow: mean of the area). Those
    that are not square are centred on a square: object on the fill, mask and shadow on 0.

    Args:
        path: folder, tar or folder of tars.
        split: "train", "validation" (5 % of the objects, chosen by a hash of their ids) or "all".
        image_size: side of the square items in pixels; None keeps the pictures as they are, all of one size then.
        horizontal_flip: mirror half of the items, drawn from `key.generator()`; keys without one are never mirrored.
        evaluation: also read samples of evaluation tracks, such as the public benchmark's. They are refused otherwise.
        fill: grey in [0, 1] behind objects with alpha and beside those that are not square.

    Attributes, in the order of the rows: `stems`, `labels` (`Labels`), `lights` (theta, phi, size), `tracks` (name or
    None) and `object_ids`. `picture_size` is (H, W) of the items.

    Raises:
        ValueError: an argument is out of range, nothing is in the split, evaluation data were opened without
            `evaluation`, or a sample is bad by its files or metadata; the message names it. Reading an item raises it
            for a bad picture.
    """

    def __init__(
        self,
        path: str | Path,
        *,
        split: str = "train",
        image_size: int | None = None,
        horizontal_flip: bool = False,
        evaluation: bool = False,
        fill: float = FILL,
    ) -> None:
        if split not in SPLITS:
            raise ValueError(f"`split` must be one of {', '.join(SPLITS)}, got {split!r}")
        if image_size is not None and image_size < 1:
            raise ValueError(f"`image_size` must be at least 1, got {image_size}")
        if not 0 <= fill <= 1:
            raise ValueError(f"`fill` must be in [0, 1], got {fill}")
        source = open_source(path)
        if source.problems:
            name, reason = next(iter(source.problems.items()))
            others = f" (bad samples in all: {len(source.problems)})" if len(source.problems) > 1 else ""
            advice = f"python -m data_prep.shadows check {source.path} lists them"
            raise ValueError(f"sample {name!r} of {source.path}: {reason}{others}; {advice}")
        if not source.stems:
            raise ValueError(f"{source.path} holds no samples")
        tracks = sorted({labels.track for labels in source.labels if labels.track})
        if tracks and not evaluation:
            raise ValueError(
                f"{source.path} holds evaluation data ({', '.join(tracks)}), never to be trained on (the public"
                " benchmark's licence forbids commercial use as well): only `evaluation=True` reads it"
            )
        self.path = source.path
        self.split = split
        self.image_size = image_size
        self.horizontal_flip = horizontal_flip
        self.fill = fill
        self._source = source
        self._rows = self._choose_rows()
        self.stems = [source.stems[row] for row in self._rows]
        self.labels = [source.labels[row] for row in self._rows]
        self.lights = [(labels.theta, labels.phi, labels.size) for labels in self.labels]
        self.tracks = [labels.track for labels in self.labels]
        self.picture_size = (image_size, image_size)
        if image_size is None:
            self.picture_size = load_sample(source, self._rows[0], fill).mask.shape

    def _choose_rows(self) -> list[int]:
        rows = range(len(self._source.stems))
        if self.split == "all":
            return list(rows)
        object_ids = [self._object_id(row) for row in rows]
        chosen = [row for row in rows if is_validation(object_ids[row]) == (self.split == "validation")]
        if not chosen:
            raise ValueError(
                f"`split` {self.split!r} of {self.path} is empty: none of its {len(set(object_ids))} objects falls into"
                " it (5 % of the objects are for validation, chosen by a hash); more objects are needed"
            )
        return chosen

    def _object_id(self, row: int) -> str:
        object_id = self._source.labels[row].object_id
        return hashlib.sha256(self._source.read(row, "object")).hexdigest() if object_id is None else object_id

    @functools.cached_property
    def object_ids(self) -> list[str]:
        """The object of each sample: its `object_id`, else the sha256 of the object's file."""
        return [self._object_id(row) for row in self._rows]

    @functools.cached_property
    def fingerprint(self) -> str:
        """Of stems, lights and sizes of the files, without reading pictures."""
        return fingerprint(
            (stem, light, *(self._source.file_size(row, kind) for kind in KINDS))
            for row, stem, light in zip(self._rows, self.stems, self.lights, strict=True)
        )

    @property
    def item_fingerprint(self) -> str:
        """Of the data and of the settings that make pictures of them, which a cache of these depends on."""
        return fingerprint([self.fingerprint, self.picture_size, float(self.fill)])

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, key: SampleKey | SupportsInt) -> dict[str, torch.Tensor]:
        """Read one sample; ValueError names it if its pictures are bad."""
        item = self._read(int(key))
        theta, phi, size = self.lights[int(key)]
        if self.horizontal_flip and is_mirrored(key):
            item = {name: picture.flip(-1) for name, picture in item.items()}
            phi = mirror_degrees(phi)
        return {**item, **light_tensors(theta, phi, size)}

    def check_disjoint(self, other: ShadowDataset) -> None:
        """ValueError if an object is in both data sets."""
        shared = sorted(set(self.object_ids) & set(other.object_ids))
        if shared:
            raise ValueError(f"{self.path} and {other.path} share {len(shared)} objects, {shared[0]!r} is the first")

    def shadow_map(self, row: int) -> torch.Tensor:
        """The shadow map of a row, (1, H, W) float32 in [0, 1], never mirrored."""
        return self._read(row)["shadow_map"]

    def _read(self, row: int) -> dict[str, torch.Tensor]:
        if not 0 <= row < len(self):
            raise IndexError(f"row {row} of {len(self)}")
        sample = load_sample(self._source, self._rows[row], self.fill)
        if self.image_size is not None:
            sample = fit_sample(sample, self.image_size, self.fill)
        elif sample.mask.shape != self.picture_size:
            (height, width), (first_height, first_width) = sample.mask.shape, self.picture_size
            reason = f"{width}x{height} pixels, {self.stems[0]!r} has {first_width}x{first_height}: set `image_size`"
            raise bad_sample(self._source, self.stems[row], reason)
        object_image = torch.from_numpy(np.ascontiguousarray(sample.object_image.transpose(2, 0, 1)))
        return {
            "object_image": object_image.mul_(2).sub_(1),
            "mask": torch.from_numpy(sample.mask)[None],
            "shadow_map": torch.from_numpy(sample.shadow)[None],
        }


def is_mirrored(key: SampleKey | SupportsInt) -> bool:
    """Whether a reader that mirrors half of the items mirrors this one: drawn from `key.generator()`, if it has one."""
    return isinstance(key, SampleKey) and bool(torch.rand((), generator=key.generator()) < 0.5)


def light_tensors(theta: float, phi: float, size: float) -> dict[str, torch.Tensor]:
    return {
        name: torch.tensor(value, dtype=torch.float32)
        for name, value in {"theta": theta, "phi": phi, "size": size}.items()
    }


def fit_sample(sample: Sample, image_size: int, fill: float = FILL) -> Sample:
    """The three pictures fitted into squares: object on the fill, mask and shadow on 0."""
    shadow = fit_square(sample.shadow, image_size, 0.0, Image.Resampling.BOX)
    return Sample(*fit_object(sample.object_image, sample.mask, image_size, fill), shadow)
