"""Reader of scenes: latents of all objects of a scene with its picture, ready to be stacked into batches.

The format is described in `data_prep/scenes/format.py`. For data in another one, sub-class `SceneDataset` and override
`_load_scene_list`, `_load_scene_latents` or `_load_scene_conditionals`.
"""

from __future__ import annotations

import functools
import itertools
import logging
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, SupportsInt

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.data import Dataset

from backlot.fingerprint import fingerprint, fingerprint_files
from backlot.modalities import MODALITIES
from backlot.samples import SampleKey
from data_prep.scenes.format import (
    CONDITIONS,
    bad_scene,
    check_conditionals,
    check_latents,
    check_metadata,
    find_file,
    is_per_object,
    read_metadata,
    read_scene,
    read_tensors,
    scene_ids,
)

if TYPE_CHECKING:
    from pipelines.shortcut_scene import PoseCodec

logger = logging.getLogger(__name__)
PICTURES = ("image", "pointmap", "masks")
CACHE_BYTES = 2**30


class SceneDataset(Dataset):
    """Scenes with the picture that shows them, N objects each.

    Items: the modalities `shape` (N, T, C), `translation` (N, 1, 3), `scale` (N, 1, 3), `6drotation_normalized`
    (N, 1, 6) and, if stored, `translation_scale` (N, 1, 1), float32, as `codec` encodes them; `object_mask` (N,) bool,
    false where padding makes the items of a batch equal; and of the `conditions`: `image` (3, S, S) float32 in [-1, 1];
    `pointmap` (3, S, S) float32 scene coordinates, 0 where there is nothing; `masks` (N, S, S) bool; `cond_tokens`
    (L, C) or (N, L, C) float32 with `cond_mask` (L,) bool, false where it is padded. Padding is 0.

    Which objects of a large scene an item has, and their order, are drawn from `key.generator()`; keys without one give
    the order of the file, and always the same objects.

    Args:
        root, split: scenes lie in <root>/<split>.
        codec: standardises the modalities; None leaves them as stored.
        max_objects_per_scene: of larger scenes a random `subset` is taken, or they are left out: `filter`
            (`on_too_many`).
        conditions: what of the conditionals goes into the items; each scene must have it.
        batch_mode: `scene`, or `object`: items have one object (N = 1) and the condition of its scene; row i is object
            i, counted through the scenes, of which `subset` takes all.
        shuffle_objects: objects in a new order on each access, and what belongs to them with them.
        cache: read everything once and keep it; None: if the files have less than 1 GiB.

    Attributes, in the order of the scenes: `scene_ids`, `num_objects` (that items can have). `shape_tokens` T,
    `shape_channels` C and `image_size` S (None without pictures) are equal in all scenes.

    Raises:
        ValueError: an argument is out of range, the split is missing or empty, or a scene is bad; names scene and
            field. Reading an item raises it for a bad scene that is not in the cache.
    """

    def __init__(
        self,
        root: str | Path,
        split: str = "train",
        codec: PoseCodec | None = None,
        *,
        max_objects_per_scene: int = 32,
        on_too_many: str = "subset",
        conditions: Collection[str] = ("image", "pointmap"),
        batch_mode: str = "scene",
        shuffle_objects: bool = True,
        cache: bool | None = None,
    ) -> None:
        if max_objects_per_scene < 1:
            raise ValueError(f"`max_objects_per_scene` must be at least 1, got {max_objects_per_scene}")
        if on_too_many not in ("subset", "filter"):
            raise ValueError(f"`on_too_many` must be subset or filter, got {on_too_many!r}")
        if batch_mode not in ("scene", "object"):
            raise ValueError(f"`batch_mode` must be scene or object, got {batch_mode!r}")
        if unknown := [name for name in conditions if name not in CONDITIONS]:
            raise ValueError(f"`conditions` must be of {', '.join(CONDITIONS)}, got {unknown[0]!r}")
        self.root, self.split, self.codec = Path(root), split, codec
        self.conditions, self.batch_mode, self.shuffle_objects = tuple(conditions), batch_mode, shuffle_objects
        self.max_objects_per_scene = max_objects_per_scene
        self._first: tuple[str, dict] | None = None  # a scene and the form of its tensors, which all must have
        self._cache: list[dict[str, Tensor]] | None = None
        self.scene_ids = list(self._load_scene_list())
        if not self.scene_ids:
            raise ValueError(f"split {split!r} of {root} is empty: it names no scene")
        first = self._read(0)
        if cache or (cache is None and self._is_small()):
            self._cache = [first, *(self._read(row) for row in range(1, len(self.scene_ids)))]
        self.num_objects = self._count_objects()
        self._limit_objects(on_too_many)
        self._ends = torch.tensor(self.num_objects).cumsum(0)
        self.shape_tokens, self.shape_channels = first["shape"].shape[1:]
        self.image_size = next((first[name].shape[-1] for name in PICTURES if name in first), None)

    @functools.cached_property
    def fingerprint(self) -> str:
        """Of the names and sizes of the scenes' files, and the contents of some."""
        folders = map(self._folder, range(len(self.scene_ids)))
        files = [find_file(folder, kind) for folder in folders for kind in ("latents", "conditionals")]
        names = [file.relative_to(self.root).as_posix() for file in files if file is not None]
        return fingerprint([tuple(self.scene_ids), fingerprint_files(self.root, names)])

    # --- override these for scenes in another format

    def _load_scene_list(self) -> list[str]:
        """Names of the scenes, of folders in <root>/<split>."""
        return scene_ids(self.root, self.split)

    def _load_scene_latents(self, scene_dir: Path) -> dict[str, Tensor]:
        """The modalities of a scene as the codec takes them, tokens before channels."""
        return read_scene(scene_dir, conditionals=False).tensors

    def _load_scene_conditionals(self, scene_dir: Path) -> dict[str, Tensor] | None:
        """The conditionals of a scene in the forms of `data_prep/scenes/format.py`, or None if it has none."""
        return None if find_file(scene_dir, "conditionals") is None else read_tensors(scene_dir, "conditionals")

    # ---

    def __len__(self) -> int:
        return len(self.scene_ids) if self.batch_mode == "scene" else int(self._ends[-1])

    def __getitem__(self, key: SampleKey | SupportsInt) -> dict[str, Tensor]:
        """Read one item, not padded; ValueError names the scene if it is bad."""
        return self.__getitems__([key])[0]

    def __getitems__(self, keys: Sequence[SampleKey | SupportsInt]) -> list[dict[str, Tensor]]:
        """Read the items of a batch, padded to the largest N and L among them."""
        batch = stack(*zip(*(self._pick(key) for key in keys), strict=True))
        return [dict(zip(batch, values, strict=True)) for values in zip(*batch.values(), strict=True)]

    def _pick(self, key: SampleKey | SupportsInt) -> tuple[dict[str, Tensor], list[int]]:
        """A scene, and which of its objects the item has."""
        index = int(key)
        if not 0 <= index < len(self):
            raise IndexError(f"row {index} of {len(self)}")
        if self.batch_mode == "object":
            row = int(torch.searchsorted(self._ends, index, right=True))
            place = index - int(self._ends[row]) + self.num_objects[row]
            scene = self._scene(row)
            # the one row only: `stack` copies all that it is given
            return {name: v.narrow(0, place, 1) if has_objects(name, v) else v for name, v in scene.items()}, [0]
        scene = self._scene(index)
        return scene, self._choose_objects(key, len(scene["shape"]))

    def _choose_objects(self, key: SampleKey | SupportsInt, count: int) -> list[int]:
        shuffled = self.shuffle_objects and draws(type(key))
        if not shuffled and count <= self.max_objects_per_scene:
            return list(range(count))
        generator = key.generator() if draws(type(key)) else torch.Generator().manual_seed(int(key))
        chosen = torch.randperm(count, generator=generator)[: self.max_objects_per_scene].tolist()
        return chosen if shuffled else sorted(chosen)

    def _scene(self, row: int) -> dict[str, Tensor]:
        return self._read(row) if self._cache is None else self._cache[row]

    def _folder(self, row: int) -> Path:
        return self.root / self.split / self.scene_ids[row]

    def _read(self, row: int) -> dict[str, Tensor]:
        """All objects of a scene, encoded, with the conditions."""
        folder = self._folder(row)
        latents = self._load_scene_latents(folder)
        problems = check_latents(latents)
        if not problems and self.codec is not None:
            try:
                latents = self.codec.encode(latents)
            except ValueError as error:
                problems = [str(error)]
        if problems:
            raise bad_scene(folder, problems[0])
        scene = {name: latents[name].float() for name in MODALITIES if name in latents}
        scene |= self._read_conditions(folder, len(scene["shape"]))
        form = {name: tuple(v.shape[1:]) if has_objects(name, v) else tuple(v.shape) for name, v in scene.items()}
        if "cond_tokens" in scene:  # but for their number
            form["cond_tokens"] = (scene["cond_tokens"].ndim, scene["cond_tokens"].shape[-1])
        self._first = self._first or (self.scene_ids[row], form)
        name, usual = self._first
        different = [field for field in sorted(form.keys() | usual) if form.get(field) != usual.get(field)]
        if different:
            field = different[0]
            reason = f"{field} has the form {form.get(field)}, in scene {name!r} it is {usual.get(field)}"
            raise bad_scene(folder, reason)
        return scene

    def _read_conditions(self, folder: Path, num_objects: int) -> dict[str, Tensor]:
        if not self.conditions:
            return {}
        values = self._load_scene_conditionals(folder)
        if values is None:
            raise bad_scene(folder, f"conditionals are missing, {', '.join(self.conditions)} of them asked for")
        if missing := [name for name in self.conditions if name not in values]:
            raise bad_scene(folder, f"conditionals: {', '.join(missing)} missing (there is {', '.join(values)})")
        values = {name: values[name] for name in self.conditions}
        if problems := check_conditionals(values, num_objects):
            raise bad_scene(folder, problems[0])
        if "pointmap" in values:
            pointmap = values["pointmap"].float()
            values["pointmap"] = pointmap.where(pointmap.isfinite().all(0), 0.0)
        if "masks" in values:
            values["masks"] = values["masks"] != 0
        return values

    def _reads_own_format(self) -> bool:
        return type(self)._load_scene_latents is SceneDataset._load_scene_latents

    def _is_small(self) -> bool:
        """Whether everything can be kept in memory, by the size of the files."""
        if not self._reads_own_format():
            return False
        kinds = ["latents", "conditionals"] if self.conditions else ["latents"]
        files = (find_file(self._folder(row), kind) for row in range(len(self.scene_ids)) for kind in kinds)
        sizes = (file.stat().st_size for file in files if file is not None)
        return all(total < CACHE_BYTES for total in itertools.accumulate(sizes))

    def _count_objects(self) -> list[int]:
        rows = range(len(self.scene_ids))
        if self._cache is not None or not self._reads_own_format():
            return [len(self._scene(row)["shape"]) for row in rows]
        counts = []
        for folder in map(self._folder, rows):
            metadata = read_metadata(folder)
            if problems := check_metadata(metadata, None):
                raise bad_scene(folder, problems[0])
            counts.append(metadata["num_objects"])
        return counts

    def _limit_objects(self, on_too_many: str) -> None:
        """Leave out scenes that are too large, or tell that only some of their objects will be seen."""
        limit = self.max_objects_per_scene
        kept = [row for row, count in enumerate(self.num_objects) if count <= limit]
        excess = len(self.num_objects) - len(kept)
        if not excess or (self.batch_mode == "object" and on_too_many == "subset"):
            return
        what = f"{excess} of {len(self.num_objects)} scenes of {self.root / self.split} have more than {limit} objects"
        if on_too_many == "subset":
            logger.warning("%s: a random subset is taken from them", what)
            self.num_objects = [min(count, limit) for count in self.num_objects]
            return
        if not kept:
            raise ValueError(f"{what}, none is left")
        logger.warning("%s and are left out", what)
        self.scene_ids = [self.scene_ids[row] for row in kept]
        self.num_objects = [self.num_objects[row] for row in kept]
        if self._cache is not None:
            self._cache = [self._cache[row] for row in kept]

    def __getstate__(self) -> dict[str, object]:
        return {**self.__dict__, "_cache": None}  # thousands of tensors do not travel to a spawned worker


@functools.cache
def draws(kind: type) -> bool:
    """Whether keys of a type have a generator."""
    return issubclass(kind, SampleKey)


def has_objects(name: str, value: Tensor) -> bool:
    """Whether what an item calls so has a row per object."""
    return name in MODALITIES or is_per_object(name, value)


def stack(scenes: Sequence[dict[str, Tensor]], objects: Sequence[list[int]]) -> dict[str, Tensor]:
    """Scenes -> one batch of the given objects of each, padded, with `object_mask`."""
    widest = max(map(len, objects))
    starts = itertools.accumulate((scene["shape"].shape[0] for scene in scenes), initial=0)
    # of all rows one after the other, and -1: the row of zeros behind them
    index = torch.tensor(
        [
            [start + place for place in places] + [-1] * (widest - len(places))
            for start, places in zip(starts, objects, strict=False)
        ]
    )
    batch = {"object_mask": index >= 0}
    for name in scenes[0]:
        values = [scene[name] for scene in scenes]
        if name == "cond_tokens":
            lengths = [value.shape[-2] for value in values]
            longest = max(lengths)
            batch["cond_mask"] = torch.arange(longest) < torch.tensor(lengths)[:, None]
            if min(lengths) < longest:
                values = [F.pad(value, (0, 0, 0, longest - value.shape[-2])) for value in values]
        if has_objects(name, values[0]):
            padding = values[0].new_zeros(1, *values[0].shape[1:])
            batch[name] = torch.cat([*values, padding])[index]
        elif name == "image":
            one_type = len({value.dtype for value in values}) == 1
            batch[name] = as_floats(torch.stack(values)) if one_type else torch.stack([as_floats(v) for v in values])
        else:
            batch[name] = torch.stack(values)
        if name == "cond_tokens":
            batch[name] = batch[name].float()
    return batch


def as_floats(image: Tensor) -> Tensor:
    """uint8 -> float32 in [-1, 1]; floats are there already."""
    return image.float().div_(127.5).sub_(1) if image.dtype == torch.uint8 else image.float()
