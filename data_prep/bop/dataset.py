"""Objects in pictures as items to train on: a cropped query, templates of the same object, and where each camera is.

A query is cut out by one affine M, and its camera is M K exactly. What is random in an item (templates, jitter of boxes
and masks, colours) is drawn from its key alone: workers, ranks and interruptions change nothing. Labels are built from
depth, masks, cameras and poses on the training device (objectives/pose_labels.py).

A sample that cannot be used never ends a run: it is written to the quarantine list and the next good one of its source
takes its place, until there are more of them than `max_bad_fraction` allows.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Literal, NamedTuple, SupportsInt

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from backlot.cameras import inverse_affine, make_pose, rotation_z, square_crop, warp
from backlot.fingerprint import fingerprint
from backlot.quarantine import DataQualityError, Quarantine
from backlot.samples import SampleKey
from data_prep.bop.augmentation import jitter_box, jitter_colours, jitter_mask
from data_prep.bop.format import BadSampleError, Sample, Source
from data_prep.bop.item_settings import ColourSettings, DetectionSettings, SelectionSettings
from data_prep.bop.models import require_templates
from data_prep.bop.selection import PoseTable, check_count, select_templates
from pipelines.vpog.templates import TemplateSet, template_path

MASK_MODES = ("none", "gt", "jitter")
PADDING = 1.2
"""Side of a crop over the longer side of its box."""


class PoseDataset(Dataset):
    """Items of S templates and a query, which is number 0 where both are stacked:

        images (S+1, 3, H, W)              in [0, 1], templates on black
        masks (S+1, H, W) bool             of the query what of its object is seen, in the scene and in the picture
        K (S+1, 3, 3), poses (S+1, 4, 4)   camera_from_object, metres; the query's of all that symmetry makes equal to
                                           the true one is nearest to its nearest template
        query_depth (H, W), template_depth (S, H, W)  metres, 0 = no surface
        template_indices (S,), template_types (S,)    int64, which of the object's templates; 0 positive, 1 negative
        d_ref (3,), reference_rotation (3, 3)         viewing direction and rotation of the reference template
        M_query (3, 3), K_original_query (3, 3)       the query's crop from its picture, and the picture's camera
        bboxes (4,)                        x1 y1 x2 y2 that was cropped, along the edges of the picture's pixels
        diameter (), object_id ()          metres; int64
        sample_id str

    All float tensors are float32. An index counts through the sources one after the other.

    Args:
        sources: objects in pictures.
        templates_dir: folder of template sets, for all sources or one for each.
        image_size: side of the pictures in pixels, that of the templates.
        num_positive_templates ... selection_metric: see `SelectionSettings`.
        mask_query: the query's background stays (`none`), or is black by the true mask (`gt`) or by one as a detector
            would give it (`jitter`).
        augment: other colours for the query, and boxes as a detector would give them (these also with `jitter`).
        in_plane_augmentation_deg: the query is turned in its picture by up to this angle.
        seed: of keys that are plain integers.
        colours, detection: how far `augment` and `jitter` go.
        max_bad_fraction: share of bad samples that ends the run with a DataQualityError.
        quarantine_path: JSON-lines file that lists the bad samples.
        template_cache_bytes: of template sets that are kept in memory, in each worker.

    Raises:
        ValueError: an argument is out of range, templates are missing or of another size, or there are no samples.
    """

    def __init__(
        self,
        sources: Sequence[Source],
        templates_dir: str | Path | Sequence[str | Path],
        *,
        image_size: int,
        num_positive_templates: int = 4,
        num_negative_templates: int = 2,
        min_negative_angle_deg: float = 90.0,
        d_ref_random_ratio: float = 0.0,
        positive_sampling_mode: Literal["nearest", "random_within_range"] = "nearest",
        positive_sampling_deg_range: float = 30.0,
        selection_metric: Literal["view", "so3"] = "view",
        mask_query: Literal["none", "gt", "jitter"] = "jitter",
        augment: bool = True,
        in_plane_augmentation_deg: float = 0.0,
        seed: int = 42,
        colours: ColourSettings | None = None,
        detection: DetectionSettings | None = None,
        max_bad_fraction: float = 0.01,
        quarantine_path: str | Path | None = None,
        template_cache_bytes: int = 2**30,
    ) -> None:
        if mask_query not in MASK_MODES:
            raise ValueError(f"`mask_query` must be one of {', '.join(MASK_MODES)}, got {mask_query!r}")
        if not 0 <= in_plane_augmentation_deg <= 180:
            raise ValueError(f"`in_plane_augmentation_deg` must be in [0, 180], got {in_plane_augmentation_deg}")
        self.sources = list(sources)
        self._ends = np.cumsum([len(source) for source in self.sources])
        if not self.sources or not self._ends[-1]:
            raise ValueError("the dataset is empty")
        self.selection = SelectionSettings(
            num_positive_templates=num_positive_templates,
            num_negative_templates=num_negative_templates,
            min_negative_angle_deg=min_negative_angle_deg,
            d_ref_random_ratio=d_ref_random_ratio,
            positive_sampling_mode=positive_sampling_mode,
            positive_sampling_deg_range=positive_sampling_deg_range,
            selection_metric=selection_metric,
        )
        self.image_size, self.mask_query, self.augment, self.seed = image_size, mask_query, augment, seed
        self.in_plane_augmentation_deg = in_plane_augmentation_deg
        self.colours, self.detection = colours or ColourSettings(), detection or DetectionSettings()
        self.template_folders = _folders(templates_dir, len(self.sources))
        for source, folder in zip(self.sources, self.template_folders, strict=True):
            require_templates(folder, source.objects, source.models)
        self.templates = TemplateCache(image_size, template_cache_bytes)
        first = self.templates.table(template_path(self.template_folders[0], self.sources[0].objects[0]))
        check_count(first, self.selection)
        self.quarantine = Quarantine(len(self), self.sample_name, max_bad_fraction, quarantine_path)

    @functools.cached_property
    def fingerprint(self) -> str:
        """Of the sources, whatever is made of them."""
        return fingerprint(source.fingerprint for source in self.sources)

    @property
    def shard_sizes(self) -> list[list[int]]:
        """Of each source the samples of its files, for `ShardMixture`."""
        return [list(source.shard_sizes) for source in self.sources]

    def __len__(self) -> int:
        return int(self._ends[-1])

    def locate(self, index: int) -> tuple[int, int]:
        """The source of a sample, and its number there."""
        number = int(np.searchsorted(self._ends, index, side="right"))
        return number, index - (int(self._ends[number - 1]) if number else 0)

    def sample_name(self, index: int) -> str:
        """What a sample is called in the quarantine list."""
        number, place = self.locate(index)
        row = self.sources[number].row(place)
        return f"source {number}: {row.scene_id:06d}_{row.im_id:06d}_{row.gt:06d}"

    def __getitem__(self, key: SampleKey | SupportsInt) -> dict[str, Tensor | str]:
        """Make an item. DataQualityError: too many samples are bad."""
        if not 0 <= int(key) < len(self):
            raise IndexError(f"row {int(key)} of {len(self)}")
        key = key if isinstance(key, SampleKey) else SampleKey(int(key), 0, self.seed)
        number, place = self.locate(int(key))
        size, first = len(self.sources[number]), int(key) - place
        for step in range(size):
            item = self._read(number, first, (place + step) % size, key)
            if item is not None:
                return item
        raise DataQualityError(f"none of the {size} samples of source {number} is usable")

    def _read(self, number: int, first: int, place: int, key: SampleKey) -> dict[str, Tensor | str] | None:
        """The item of a sample with the randomness of a key, or None if the sample is bad."""
        if first + place in self.quarantine:
            return None
        try:
            sample = self.sources[number].read(place)
            return self._make(sample, number, key.generator())
        except BadSampleError as error:
            self.quarantine.add(first + place, str(error))
            return None

    def _make(self, sample: Sample, number: int, generator: torch.Generator) -> dict[str, Tensor | str]:
        path = template_path(self.template_folders[number], sample.object_id)
        symmetries = torch.from_numpy(self.sources[number].models[sample.object_id].symmetries)
        turned = turn(sample, self._draw_angle(generator))
        chosen = select_templates(turned.pose[None], self.templates.table(path), symmetries, self.selection, generator)
        templates = self.templates.views(path, chosen.indices[0])
        query = self._crop_query(sample, turned._replace(pose=chosen.poses[0]), generator)
        return {
            **stack(query, templates),
            "d_ref": chosen.d_ref[0].float(),
            "reference_rotation": chosen.reference_rotation[0].float(),
            "template_indices": chosen.indices[0],
            "template_types": chosen.types[0],
            "query_depth": query.depth,
            "template_depth": torch.from_numpy(templates.depth),
            "M_query": query.M.float(),
            "K_original_query": torch.from_numpy(sample.K).float(),
            "bboxes": query.box.float(),
            "diameter": torch.tensor(sample.diameter, dtype=torch.float32),
            "object_id": torch.tensor(sample.object_id),
            "sample_id": sample.key,
        }

    def _draw_angle(self, generator: torch.Generator) -> Tensor:
        """Radians, ()."""
        share = 2 * torch.rand((), generator=generator, dtype=torch.float64) - 1
        return share * math.radians(self.in_plane_augmentation_deg)

    def _crop_query(self, sample: Sample, turned: Turned, generator: torch.Generator) -> Query:
        is_detected = self.mask_query == "jitter"
        box = turned.box
        if self.augment or is_detected:
            box = jitter_box(box, self.detection.box_jitter, generator)
        crop = square_crop(box[None], self.image_size, PADDING)[0]
        M = crop @ turned.affine
        picture, depth, mask = cut_out(sample, M, self.image_size)
        if not mask.any():
            raise BadSampleError(f"{sample.key}: no pixel of object {sample.object_id} is seen in its box")
        if is_detected:
            shown = jitter_mask(mask, self.detection, generator)
        else:
            shown = mask if self.mask_query == "gt" else torch.ones_like(mask)
        if self.augment:
            scale = float(M[:2, :2].det().abs().sqrt())
            picture = jitter_colours(picture, self.colours, scale, generator)
        image = picture.permute(2, 0, 1).float().div_(255) * shown
        K = crop @ torch.from_numpy(sample.K)
        return Query(image, depth, mask & shown, K, turned.pose, M, box)


class Turned(NamedTuple):
    """A sample that is turned about its camera's axis.

    Args:
        affine: (3, 3) turned pixels from the picture's. pose: (4, 4), turned. box: (4,) in the turned picture. float64.
    """

    affine: Tensor
    pose: Tensor
    box: Tensor


class Query(NamedTuple):
    """A query as the network sees it: `image` (3, H, W) in [0, 1], `depth` (H, W), `mask` (H, W) bool, `K` (3, 3),
    `pose` (4, 4), and the crop `M` (3, 3) of the `box` (4,).
    """

    image: Tensor
    depth: Tensor
    mask: Tensor
    K: Tensor
    pose: Tensor
    M: Tensor
    box: Tensor


class TemplateCache:
    """Template sets of objects and the tables of their poses, read when they are first asked for.

    Sets are kept in memory until they fill `max_bytes`; of the others only the views that are asked for are read, which
    takes a tenth of the time of a whole set.

    Args:
        image_size: side in pixels that the templates must have.
    """

    def __init__(self, image_size: int, max_bytes: int) -> None:
        self.image_size, self.max_bytes = image_size, max_bytes
        self._tables: dict[Path, PoseTable] = {}
        self._sets: dict[Path, TemplateSet] = {}
        self._free = max_bytes

    def table(self, path: Path) -> PoseTable:
        """The poses of a set; ValueError if its pictures have another size."""
        if path not in self._tables:
            templates = TemplateSet.load(path)
            height, width = templates.depth.shape[1:]
            if (height, width) != (self.image_size, self.image_size):
                raise ValueError(
                    f"the templates in {path} have {width}x{height} pixels, `image_size` is {self.image_size}: render"
                    f" them with python -m data_prep.bop render_templates --size {self.image_size}"
                )
            size = templates.rgba.nbytes + templates.depth.nbytes
            if size <= self._free:
                self._sets[path] = templates
                self._free -= size
            self._tables[path] = PoseTable.of(torch.from_numpy(templates.camera_from_object))
        return self._tables[path]

    def views(self, path: Path, indices: Tensor) -> TemplateSet:
        """Some views of a set, in this order."""
        if path in self._sets:
            return self._sets[path].subset(indices.numpy())
        return TemplateSet.load(path, indices.tolist())

    def __getstate__(self) -> dict[str, object]:
        return {**self.__dict__, "_tables": {}, "_sets": {}, "_free": self.max_bytes}  # a spawned worker reads its own


def turn(sample: Sample, angle: Tensor) -> Turned:
    """Turn a sample by an angle () in radians: its pose is turned, and its camera stays.

    The affine is K R_z K^-1, exact whatever the focal lengths.
    """
    K, pose = torch.from_numpy(sample.K), torch.from_numpy(sample.camera_from_object)
    box = torch.from_numpy(sample.bbox_visib).double()
    if not angle:
        return Turned(torch.eye(3, dtype=torch.float64), pose, box)
    rotation = rotation_z(angle)
    affine = K @ rotation @ inverse_affine(K)
    pixels = torch.from_numpy(sample.mask).nonzero().flip(-1).double()
    if not len(pixels):
        raise BadSampleError(f"{sample.key}: no pixel of object {sample.object_id} is seen")
    places = pixels @ affine[:2, :2].mT + affine[:2, 2]
    box = torch.cat([places.amin(0), places.amax(0) + 1])
    return Turned(affine, make_pose(rotation, torch.zeros(3, dtype=torch.float64)) @ pose, box)


def cut_out(sample: Sample, affine: Tensor, size: int) -> tuple[Tensor, Tensor, Tensor]:
    """A sample through an affine (3, 3) float64: picture (size, size, 3) uint8, depth (size, size) metres, mask (size,
    size) bool; outside of the picture all three are 0.
    """
    height, width = sample.mask.shape
    edges = torch.tensor([[-1.0, -1], [-1, size], [size, -1], [size, size]], dtype=torch.float64)
    inverse = inverse_affine(affine)
    corners = edges @ inverse[:2, :2].mT + inverse[:2, 2]
    # only what the crop needs is converted: pictures are large, and crops small
    limits = torch.tensor([width, height])
    low = (corners.amin(0).floor().long() - 1).clamp(min=0)
    low = torch.minimum(low, limits - 1)
    high = torch.maximum(torch.minimum(corners.amax(0).ceil().long() + 2, limits), low + 1)
    (left, top), (right, bottom) = low.tolist(), high.tolist()
    window = slice(top, bottom), slice(left, right)
    shift = torch.eye(3, dtype=torch.float64)
    shift[:2, 2] = low
    local = (affine @ shift)[None]

    picture = torch.from_numpy(sample.rgb[window]).permute(2, 0, 1).float()[None]
    surface = np.stack([sample.depth[window], sample.mask[window].astype(np.float32)])
    colours = warp(picture, local, size)[0].permute(1, 2, 0)
    depth, mask = warp(torch.from_numpy(surface)[None], local, size, mode="nearest")[0]
    return colours.round().clamp(0, 255).byte().contiguous(), depth, mask > 0.5


def stack(query: Query, templates: TemplateSet) -> dict[str, Tensor]:
    """Pictures, masks, cameras and poses of the query and of its templates."""
    rgba = torch.from_numpy(templates.rgba).permute(0, 3, 1, 2)
    K = torch.from_numpy(templates.K).expand(len(templates), 3, 3)
    return {
        "images": torch.cat([query.image[None], rgba[:, :3].float().div_(255)]),
        "masks": torch.cat([query.mask[None], rgba[:, 3] > 0]),
        "K": torch.cat([query.K[None], K]).float(),
        "poses": torch.cat([query.pose[None], torch.from_numpy(templates.camera_from_object)]).float(),
    }


def _folders(templates_dir: str | Path | Sequence[str | Path], count: int) -> list[Path]:
    if isinstance(templates_dir, str | Path):
        return [Path(templates_dir)] * count
    if len(templates_dir) != count:
        raise ValueError(f"{count} sources, but {len(templates_dir)} folders in `templates_dir`")
    return [Path(folder) for folder in templates_dir]
