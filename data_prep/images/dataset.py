"""Pictures with class labels: digits, MNIST, image folders, `datasets` image sets and cached latents, behind one call.

`open_images` returns a map-style dataset: `len()`, `num_classes` and `dataset[key]`, a dict of tensors. `key` is an
int; where an item is random (flip, latent sampling) it must also have `key.generator()`, a `torch.Generator` seeded
for this item.

No picture ends a run by being broken: it is written to the quarantine list and the next readable one takes its place,
until there are more of them than `max_bad_fraction` allows.
"""

from __future__ import annotations

import gzip
import hashlib
import json
import os
import zlib
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Protocol, SupportsInt

import numpy as np
import torch
import torch.nn.functional as F
from torch.utils.data import Dataset

from backlot.fingerprint import fingerprint, fingerprint_files, spread
from backlot.pictures import BAD_IMAGE_ERRORS, EXHAUSTED, decode_image, to_pixel_values
from backlot.samples import SampleKey, is_validation
from data_prep.images.digits import DigitsDataset
from data_prep.images.latents import LatentDataset

if TYPE_CHECKING:
    import datasets

DATASET_NAMES = ("digits", "mnist", "imagefolder", "hub", "latents")
IMAGE_SUFFIXES = {".jpg", ".jpeg", ".png", ".webp", ".gif", ".bmp", ".tif", ".tiff", ".ppm", ".pgm"}


class DataQualityError(ValueError):
    """More samples are unreadable than `max_bad_fraction` allows."""


# --- one picture ----------------------------------------------------------------------------------


# --- where pictures come from ---------------------------------------------------------------------


class ImageSource(Protocol):
    """Encoded images and labels by row. `read` gives the bytes of the file and the label; `name` is for people."""

    num_classes: int | None

    @property
    def fingerprint(self) -> str: ...

    def __len__(self) -> int: ...

    def name(self, row: int) -> str: ...

    def read(self, row: int) -> tuple[bytes, int]: ...


class FolderSource:
    """Image files below `root/<class>/`, or `root/<split>/<class>/` where the root holds just train, validation, test.

    Without split folders 5 % of the files, chosen by a hash of their path relative to the root, are the validation
    split: a file keeps its split when others come or go. A folder of images without sub-folders has no classes; every
    label is 0.
    """

    def __init__(self, root: Path, split: str) -> None:
        if not root.is_dir():
            raise ValueError(f"`path` must be a folder of images, {root} is not a folder")
        folders = subfolders(root)
        if "train" in folders and set(folders) <= {"train", "validation", "test"}:
            roots = {name: root / name for name in folders}
        else:
            roots = {"train": root}
        classes = sorted({name for folder in roots.values() for name in subfolders(folder)})
        hashed = "validation" not in roots and split in ("train", "validation")
        if split == "all":
            chosen = list(roots.values())
        elif hashed:
            chosen = [roots["train"]]
        elif split in roots:
            chosen = [roots[split]]
        else:
            raise ValueError(f"`split` must be one of all, train, validation, got {split!r} ({root})")

        labels = {}
        for folder in chosen:
            for label, class_folder in enumerate([folder / name for name in classes] or [folder]):
                for file in image_files(class_folder):
                    relative = file.relative_to(root).as_posix()
                    if not hashed or (is_validation(relative) == (split == "validation")):
                        labels[relative] = label
        if not labels:
            raise ValueError(f"no images for split {split!r} in {root}: files belong into <class>/ sub-folders")
        self.root = root
        self.num_classes = len(classes) or None
        # Arrays and not lists: forked workers would copy a list's memory page by page, only by counting references.
        self._names = np.array([os.fsencode(name) for name in sorted(labels)])
        self._labels = np.array([labels[name] for name in sorted(labels)])

    def __len__(self) -> int:
        return len(self._names)

    @cached_property
    def fingerprint(self) -> str:
        """Of names below the root, sizes, labels, and the contents of some files."""
        names = [os.fsdecode(name) for name in self._names]
        return fingerprint([fingerprint_files(self.root, names), self._labels.tolist()])

    def name(self, row: int) -> str:
        return str(self.root / os.fsdecode(self._names[row]))

    def read(self, row: int) -> tuple[bytes, int]:
        return Path(self.name(row)).read_bytes(), int(self._labels[row])


def subfolders(folder: Path) -> list[str]:
    """Names of the visible folders in `folder`, sorted."""
    return sorted(entry.name for entry in folder.iterdir() if entry.is_dir() and not entry.name.startswith("."))


def image_files(folder: Path) -> list[Path]:
    """Visible files with an image suffix anywhere below `folder`; empty where there is no such folder."""
    return [
        Path(parent) / name
        for parent, _, names in os.walk(folder)
        for name in names
        if Path(name).suffix.lower() in IMAGE_SUFFIXES and not name.startswith(".")
    ]


class HubSource:
    """One split of an image dataset read with the `datasets` library: a hub name or a local folder.

    The local folder may hold parquet files, an imagefolder, or what `save_to_disk` wrote.

    Raises:
        ImportError: `datasets` is not installed.
        ValueError: the split or a column is missing or of the wrong kind; the message lists what there is.
    """

    def __init__(self, path: str, split: str, image_column: str, label_column: str | None) -> None:
        rows = load_hub_split(path, split)
        datasets = import_datasets()
        for argument, column in {"image_column": image_column, "label_column": label_column}.items():
            if column is not None and column not in rows.column_names:
                raise ValueError(
                    f"`{argument}` {column!r} is not in {path}: its columns are {', '.join(rows.column_names)}"
                )
        if not isinstance(rows.features[image_column], datasets.Image):
            raise ValueError(
                f"`image_column` {image_column!r} of {path} holds {rows.features[image_column]}, not images"
            )
        self.num_classes = None if label_column is None else count_classes(rows, label_column, path)
        self._rows = rows.cast_column(image_column, datasets.Image(decode=False))
        self._place = f"{path}/{split}"
        self._image_column = image_column
        self._label_column = label_column

    def __len__(self) -> int:
        return len(self._rows)

    @cached_property
    def fingerprint(self) -> str:
        """Of all labels, and the contents of some pictures."""
        labels = () if self._label_column is None else self._rows[self._label_column][:]
        pictures = (hashlib.sha256(self.read(row)[0]).hexdigest() for row in spread(len(self)))
        return fingerprint([len(self), tuple(labels), *pictures])

    def name(self, row: int) -> str:
        return f"{self._place}[{row}]"

    def read(self, row: int) -> tuple[bytes, int]:
        item = self._rows[row]
        image = item[self._image_column]
        label = 0 if self._label_column is None else item[self._label_column]
        if image is None:
            raise ValueError("the row holds no image")
        data = image["bytes"] if image["bytes"] is not None else Path(image["path"]).read_bytes()
        return data, label


def import_datasets():
    """Import `datasets`, or say how to get it: only the hub source and MNIST without a path need it."""
    try:
        import datasets
    except ImportError as error:
        raise ImportError("image sets from the hub need the datasets library: pip install 'backlot[hub]'") from error
    return datasets


def load_hub_split(path: str, split: str) -> datasets.Dataset:
    datasets = import_datasets()
    folder = Path(path)
    if (folder / "dataset_dict.json").is_file():
        splits = datasets.load_from_disk(path)
    elif (folder / "state.json").is_file():
        rows = datasets.load_from_disk(path)
        splits = {str(rows.split or "train"): rows}
    else:
        return datasets.load_dataset(path, split=split)
    if split not in splits:
        raise ValueError(f"`split` {split!r} is not in {path}: its splits are {', '.join(splits)}")
    return splits[split]


def count_classes(rows: datasets.Dataset, label_column: str, path: str) -> int:
    """Number of classes of an integer column; ValueError for other columns and for missing or negative labels."""
    datasets = import_datasets()
    feature = rows.features[label_column]
    is_class = isinstance(feature, datasets.ClassLabel)
    if not is_class and not (isinstance(feature, datasets.Value) and "int" in feature.dtype):
        raise ValueError(f"`label_column` {label_column!r} of {path} holds {feature}, not integers")
    labels = rows.unique(label_column)
    if any(label is None or label < 0 for label in labels):
        raise ValueError(f"`label_column` {label_column!r} of {path} has rows without a label")
    return feature.num_classes if is_class else max(labels) + 1


# --- bad pictures ---------------------------------------------------------------------------------


class Quarantine:
    """The unreadable rows of one source: shared by DataLoader workers through memory, by ranks through one file.

    Args:
        source: names the rows.
        max_bad_fraction: share of the source that may be unreadable.
        path: file that gets one line `{"path", "row", "reason"}` per unreadable row; lines of earlier sessions count
            too. None keeps the list in memory.
    """

    def __init__(self, source: ImageSource, max_bad_fraction: float, path: str | Path | None) -> None:
        if not 0 <= max_bad_fraction <= 1:
            raise ValueError(f"`max_bad_fraction` must be in [0, 1], got {max_bad_fraction}")
        self.path = None if path is None else Path(path)
        self.max_bad_fraction = max_bad_fraction
        self._source = source
        self._bad = torch.zeros(len(source), dtype=torch.bool).share_memory_()
        self._listed: set[int] = set()
        self._offset = 0

    def __contains__(self, row: int) -> bool:
        return bool(self._bad[row])

    def add(self, row: int, reason: str) -> None:
        """List a row; DataQualityError when that makes too many."""
        self._bad[row] = True
        if self.path is not None:
            self._read_list()
            if row not in self._listed:
                self._append({"path": self._source.name(row), "row": row, "reason": reason})
                self._listed.add(row)
        # A copy: other workers may set rows meanwhile, and nonzero() fails if its two passes find different counts.
        count = len(self._listed.union(self._bad.clone().nonzero().flatten().tolist()))
        bound = self.max_bad_fraction * len(self._source)
        if count > bound:
            where = "" if self.path is None else f"; they are listed in {self.path} (repair them, then delete the list)"
            raise DataQualityError(
                f"{count} of {len(self._source)} images are unreadable, `max_bad_fraction` {self.max_bad_fraction:g}"
                f" allows {int(bound)}; the last is {self._source.name(row)} ({reason}){where}"
            )

    def _append(self, entry: dict[str, str | int]) -> None:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        # One write to an O_APPEND file: lines of several processes follow each other and never mix.
        descriptor = os.open(self.path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
        try:
            os.write(descriptor, (json.dumps(entry) + "\n").encode())
        finally:
            os.close(descriptor)

    def _read_list(self) -> None:
        """Take in the lines that anyone has added since the last call; those about other datasets are passed over."""
        if not self.path.is_file():
            return
        with self.path.open("rb") as file:
            file.seek(self._offset)
            text = file.read()
        complete = text[: text.rfind(b"\n") + 1]
        self._offset += len(complete)
        for line in complete.splitlines():
            row = self._listed_row(line)
            if row is not None:
                self._listed.add(row)

    def _listed_row(self, line: bytes) -> int | None:
        try:
            entry = json.loads(line)
        except ValueError:
            return None
        row = entry.get("row") if isinstance(entry, dict) else None
        known = isinstance(row, int) and 0 <= row < len(self._source) and self._source.name(row) == entry.get("path")
        return row if known else None


# --- datasets -------------------------------------------------------------------------------------


class ImageDataset(Dataset):
    """RGB pictures from encoded files. Items: `pixel_values` (3, H, W) float32 in [-1, 1], `class_labels` int64 scalar.

    An unreadable row is quarantined and answered with the next readable one (cyclically), so every key gives the same
    item in every worker and every session. Without an `image_size` the pictures keep their own sizes.
    """

    def __init__(
        self,
        source: ImageSource,
        *,
        image_size: int | None = None,
        horizontal_flip: bool = False,
        max_bad_fraction: float = 0.01,
        quarantine_path: str | Path | None = None,
    ) -> None:
        if image_size is not None and image_size < 1:
            raise ValueError(f"`image_size` must be at least 1, got {image_size}")
        self.source = source
        self.num_classes = source.num_classes
        self.image_size = image_size
        self.horizontal_flip = horizontal_flip
        self.quarantine = Quarantine(source, max_bad_fraction, quarantine_path)

    @property
    def fingerprint(self) -> str:
        """Of the pictures' files and labels, whatever is made of them."""
        return self.source.fingerprint

    def __len__(self) -> int:
        return len(self.source)

    def __getitem__(self, key: SampleKey | SupportsInt) -> dict[str, torch.Tensor]:
        """Read one sample; without `horizontal_flip` a plain int will do. DataQualityError: too many are unreadable."""
        row, size = int(key), len(self)
        if not 0 <= row < size:
            raise IndexError(f"row {row} of {size}")
        item = next(filter(None, (self._read(candidate % size) for candidate in range(row, row + size))), None)
        if item is None:
            raise DataQualityError(f"none of the {size} images is readable")
        if self.horizontal_flip and torch.rand((), generator=key.generator()) < 0.5:
            item["pixel_values"] = item["pixel_values"].flip(-1)
        return item

    def _read(self, row: int) -> dict[str, torch.Tensor] | None:
        """The item of a row, or None if it is unreadable."""
        if row in self.quarantine:
            return None
        try:
            data, label = self.source.read(row)
            image = decode_image(data, self.image_size)
        except BAD_IMAGE_ERRORS as error:
            if isinstance(error, OSError) and error.errno in EXHAUSTED:
                raise
            self.quarantine.add(row, f"{type(error).__name__}: {error}")
            return None
        return {"pixel_values": to_pixel_values(image), "class_labels": torch.tensor(label)}


class MnistDataset(Dataset):
    """MNIST in memory. Items: `pixel_values` (1, S, S) float32 in [-1, 1], `class_labels` int64 scalar.

    Args:
        images: (N, 28, 28) uint8.
        labels: (N,) uint8 in 0..9.
        image_size: S: 28, or 32 for a border of -1 (what networks with several halvings want).
    """

    num_classes = 10

    def __init__(self, images: torch.Tensor, labels: torch.Tensor, *, image_size: int | None = None) -> None:
        if image_size not in (None, 28, 32):
            raise ValueError(f"`image_size` of MNIST must be 28 or 32, got {image_size}")
        border = 2 if image_size == 32 else 0
        self.images = F.pad(images, [border] * 4).unsqueeze(1)
        self.class_labels = labels.long()

    @cached_property
    def fingerprint(self) -> str:
        """Of all pictures, without the border, and labels."""
        border = (self.images.shape[-1] - 28) // 2
        images = self.images[..., border : border + 28, border : border + 28]
        return fingerprint(values.numpy().tobytes() for values in (images, self.class_labels))

    def __len__(self) -> int:
        return len(self.class_labels)

    def __getitem__(self, key: SupportsInt) -> dict[str, torch.Tensor]:
        row = int(key)
        pixel_values = self.images[row].float().div_(127.5).sub_(1)
        return {"pixel_values": pixel_values, "class_labels": self.class_labels[row]}


def load_mnist_files(folder: Path, split: str) -> tuple[torch.Tensor, torch.Tensor]:
    """Read images (N, 28, 28) and labels (N,), both uint8, from the four IDX files (plain or .gz) in `folder`."""
    prefix = "train" if split == "train" else "t10k"
    images = read_idx(find_idx(folder, f"{prefix}-images", 3))
    labels = read_idx(find_idx(folder, f"{prefix}-labels", 1))
    if images.shape != (len(labels), 28, 28) or labels.ndim != 1 or len(labels) == 0 or labels.max() > 9:
        raise ValueError(f"{folder} does not hold MNIST: images {tuple(images.shape)}, labels {tuple(labels.shape)}")
    return images, labels


def find_idx(folder: Path, stem: str, ndim: int) -> Path:
    candidates = [folder / f"{stem}{dot}idx{ndim}-ubyte{gz}" for dot in "-." for gz in ("", ".gz")]
    for file in candidates:
        if file.is_file():
            return file
    raise ValueError(f"no {candidates[0].name} (or .gz) in {folder}")


def read_idx(file: Path) -> torch.Tensor:
    """Read one IDX file of unsigned bytes; ValueError (one line, naming it) if it is anything else or cut short."""
    opener = gzip.open if file.suffix == ".gz" else open
    try:
        with opener(file, "rb") as stream:
            magic = stream.read(4)
            if len(magic) < 4 or magic[:3] != b"\0\0\x08" or not 1 <= magic[3] <= 3:
                raise ValueError(f"{file} is not an IDX file of unsigned bytes")
            header = stream.read(4 * magic[3])
            data = stream.read()
    except (gzip.BadGzipFile, EOFError, zlib.error) as error:
        raise ValueError(f"{file} is damaged: {error}") from None
    if len(header) < 4 * magic[3]:
        raise ValueError(f"{file} is damaged: it ends in the header")
    shape = [int(side) for side in np.frombuffer(header, ">u4")]
    if len(data) != np.prod(shape, dtype=object):
        raise ValueError(f"{file} is damaged: {shape} needs {np.prod(shape, dtype=object)} bytes, it has {len(data)}")
    return torch.from_numpy(np.frombuffer(bytearray(data), np.uint8)).reshape(shape)


def load_mnist_hub(split: str) -> tuple[torch.Tensor, torch.Tensor]:
    """Read the same two tensors from ylecun/mnist on the hub."""
    rows = load_hub_split("ylecun/mnist", "train" if split == "train" else "test")
    images = np.stack([np.array(image.convert("L")) for image in rows["image"]])
    return torch.from_numpy(images), torch.tensor(rows["label"][:], dtype=torch.uint8)


def open_images(
    dataset_name: str,
    *,
    path: str | Path | None = None,
    split: str = "train",
    image_size: int | None = None,
    horizontal_flip: bool = False,
    image_column: str = "image",
    label_column: str | None = "label",
    max_bad_fraction: float = 0.01,
    quarantine_path: str | Path | None = None,
) -> DigitsDataset | MnistDataset | ImageDataset | LatentDataset:
    """Open a map-style dataset of pictures (or latents) with class labels.

    Args:
        dataset_name: "digits" (8x8, from scikit-learn), "mnist" (IDX files in `path`, or else from the hub),
            "imagefolder" (class = sub-folder of `path`), "hub" (`path` is a hub name or a local folder that `datasets`
            reads) or "latents" (`path` was written by `data_prep.images encode`).
        path: folder or hub name, see above.
        split: "train" or "validation"; digits and imagefolder also have "all", a hub set has its own names and slices.
        image_size: side of the pictures in pixels. None: 8 for digits, 28 for mnist, as they are otherwise.
        horizontal_flip: mirror half of the pictures, drawn from `key.generator()`. Not for digits and mnist.
        image_column, label_column: columns of a hub set. `label_column` None: no classes, every label is 0.
        max_bad_fraction: share of unreadable pictures that ends the run with a DataQualityError.
        quarantine_path: JSON-lines file that lists the unreadable pictures.

    Raises:
        ValueError: an argument does not fit the dataset, or there are no images.
        ImportError: `datasets` is needed and missing.
    """
    if dataset_name in ("digits", "mnist") and horizontal_flip:
        raise ValueError(f"`horizontal_flip` makes no sense for {dataset_name}: a mirrored digit is another sign")
    if dataset_name in ("imagefolder", "hub", "latents") and path is None:
        raise ValueError(f"`path` must be given for {dataset_name!r}")

    if dataset_name == "digits":
        if path is not None or image_size not in (None, 8):
            raise ValueError("digits come with scikit-learn at 8x8: leave out `path`, and `image_size` unless it is 8")
        return DigitsDataset(split)

    if dataset_name == "mnist":
        if split not in ("train", "validation", "test"):
            raise ValueError(f"`split` of MNIST must be one of train, validation, test, got {split!r}")
        images, labels = load_mnist_hub(split) if path is None else load_mnist_files(Path(path), split)
        return MnistDataset(images, labels, image_size=image_size)

    if dataset_name == "latents":
        latents = LatentDataset(path, split=split, horizontal_flip=horizontal_flip)
        if image_size not in (None, latents.manifest.image_size):
            raise ValueError(
                f"`image_size` is {image_size}, the latents in {path} are of {latents.manifest.image_size} pixels"
            )
        return latents

    if dataset_name == "imagefolder":
        source = FolderSource(Path(path), split)
    elif dataset_name == "hub":
        source = HubSource(str(path), split, image_column, label_column)
    else:
        raise ValueError(f"`dataset_name` must be one of {', '.join(DATASET_NAMES)}, got {dataset_name!r}")
    return ImageDataset(
        source,
        image_size=image_size,
        horizontal_flip=horizontal_flip,
        max_bad_fraction=max_bad_fraction,
        quarantine_path=quarantine_path,
    )
