"""Prepared layouts as items to train on: latents, prompts, and the embeddings of what stands in each box."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import SupportsInt

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor
from torch.utils.data import Dataset

from backlot.crops import HostBoxes
from backlot.fingerprint import fingerprint
from backlot.pictures import BAD_IMAGE_ERRORS, decode_image
from data_prep.layouts.format import (
    CLIP,
    DEPTHS,
    DINO,
    EMPTY_PROMPT,
    LATENTS,
    SPLITS_NAME,
    TEXTS,
    Caption,
    caption_path,
    inside,
    read_caption,
    read_json_object,
    read_manifest,
    read_meta,
    read_tensors,
    tensor_path,
)

SPLITS = ("train", "validation", "test", "all")
MAX_OBJECTS = 50


class LayoutDataset(Dataset):
    """What `python -m data_prep.layouts prepare` wrote.

    An item, N being `max_objects`; rows behind the objects are padding, zeros:

        latents (C, h, w)                  scaled as FLUX takes them
        prompt_embeds (L, T), pooled_prompt_embeds (P,)
        boxes                              `HostBoxes` (N, 4), x1 y1 x2 y2 in 0..1
        valid (N,) bool                    an object, no padding
        text_embeds (N, P)                 CLIP of category and caption
        clip_embeds (N, E), dino_embeds (N, F)  of its reference, or of its own place in the picture
        has_reference (N,) bool            these embeddings exist
        depth_labels (N,) int64            0 foreground, 1 midground, 2 background
        is_foreground (N,) bool
        phrase_spans (N, 2) int64          T5 positions of its phrase, half open; (0, 0) if not known
        sample_id str

    Of a picture with more objects the largest are kept, in their order. Embeddings and latents are float32.

    Args:
        folder: with `manifest.jsonl`.
        split: one of `SPLITS`.
        max_objects: N, at least 1.
        keep_in_memory: read each sample once.

    Raises:
        ValueError: an argument is out of range, the folder is not prepared, the split is empty, or the data are for
            evaluation only and `split` is train. Reading an item raises it for a damaged sample.
    """

    def __init__(
        self, folder: str | Path, *, split: str = "train", max_objects: int = MAX_OBJECTS, keep_in_memory: bool = False
    ):
        if split not in SPLITS:
            raise ValueError(f"`split` must be one of {', '.join(SPLITS)}, got {split!r}")
        if max_objects < 1:
            raise ValueError(f"`max_objects` must be at least 1, got {max_objects}")
        self.folder, self.split, self.max_objects = Path(folder), split, max_objects
        self.meta = read_meta(self.folder)
        if self.meta.evaluation_only and split in ("train", "validation"):
            raise ValueError(
                f"{folder} is for evaluation only (a benchmark, or held-out identities), never to be trained on: its"
                " samples are in the splits test and all"
            )
        rows = list(read_manifest(self.folder))
        chosen = {row["image_id"] for row in rows}
        if split != "all":
            splits = read_json_object(self.folder / SPLITS_NAME)
            chosen &= set(splits.get(split, []))
        self._rows = [row for row in rows if row["image_id"] in chosen]
        if not self._rows:
            raise ValueError(f"`split` {split!r} of {folder} is empty")
        self.sample_ids = [row["image_id"] for row in self._rows]
        self._kept: dict[int, dict] | None = {} if keep_in_memory else None

    @functools.cached_property
    def fingerprint(self) -> str:
        """Of the samples and of the models that encoded them; the folder may be moved."""
        return fingerprint([sorted(map(repr, self.meta.recipes.items())), *(sorted(row.items()) for row in self._rows)])

    @functools.cached_property
    def empty_prompt(self) -> tuple[Tensor, Tensor]:
        """What stands for a prompt that is left out: (L, T) and (P,), float32."""
        path = tensor_path(self.folder, TEXTS, EMPTY_PROMPT)
        try:
            tensors = load_file(path)
        except (OSError, SafetensorError) as error:
            raise ValueError(f"{path} is missing or damaged: {error}") from None
        return tensors["t5"].float(), tensors["pooled"].float()

    def __len__(self) -> int:
        return len(self._rows)

    def caption(self, row: int) -> Caption:
        """What stands where in the picture of a row."""
        return read_caption(self.folder, self.sample_ids[row])

    def caption_values(self, row: int) -> dict:
        """The whole caption file of a row, with what its source wrote beside a `Caption`."""
        return read_json_object(caption_path(self.folder, self.sample_ids[row]))

    def picture(self, row: int) -> np.ndarray:
        """(H, W, 3) uint8."""
        return read_picture(inside(self.folder, self.caption(row).image_path))

    def references(self, row: int) -> list[tuple[np.ndarray, list[float]] | None]:
        """Of each object the picture (H, W, 3) uint8 that holds its reference, and its box there; None without one."""
        references = [each.reference for each in self.caption(row).objects]
        return [each and (read_picture(inside(self.folder, each.image_path)), each.bbox) for each in references]

    def __getitem__(self, key: SupportsInt) -> dict[str, Tensor | HostBoxes | str]:
        """Read one sample; ValueError names it if it is damaged."""
        row = int(key)
        if not 0 <= row < len(self):
            raise IndexError(f"row {row} of {len(self)}")
        if self._kept is None:
            return self._read(self.sample_ids[row])
        if row not in self._kept:
            self._kept[row] = self._read(self.sample_ids[row])
        return dict(self._kept[row])

    def _read(self, image_id: str) -> dict[str, Tensor | HostBoxes | str]:
        caption = read_caption(self.folder, image_id, pictures=False)
        read = functools.partial(read_tensors, self.folder, image_id=image_id, num_objects=len(caption.objects))
        (clip, _), (dino, _), (texts, _) = (read(kind) for kind in (CLIP, DINO, TEXTS))
        latents, how = read(LATENTS)
        places = self._keep(caption)
        objects, kept = [caption.objects[place] for place in places], torch.tensor(places)
        boxes = np.zeros((self.max_objects, 4), np.float32)
        boxes[: len(objects)] = [each.bbox for each in objects]
        return {
            "latents": (latents["mean"].float() - float(how["shift"])) * float(how["scale"]),
            "prompt_embeds": texts["t5"].float(),
            "pooled_prompt_embeds": texts["pooled"].float(),
            "boxes": HostBoxes(boxes),
            "valid": self._pad(torch.ones(len(objects), dtype=torch.bool)),
            "text_embeds": self._pad(clip["text"].float()[kept]),
            "clip_embeds": self._pad(clip["image"].float()[kept]),
            "dino_embeds": self._pad(dino["cls"].float()[kept]),
            "has_reference": self._pad((clip["valid"] & dino["valid"])[kept]),
            "depth_labels": self._pad(torch.tensor([DEPTHS.index(each.depth_label) for each in objects])),
            "is_foreground": self._pad(torch.tensor([each.is_foreground for each in objects])),
            "phrase_spans": self._pad(texts["span_tokens"].long()[kept]),
            "sample_id": image_id,
        }

    def _keep(self, caption: Caption) -> list[int]:
        """The places of the largest objects, at most `max_objects`, in their order."""
        areas = [(x2 - x1) * (y2 - y1) for x1, y1, x2, y2 in (each.bbox for each in caption.objects)]
        return sorted(sorted(range(len(areas)), key=lambda place: -areas[place])[: self.max_objects])

    def _pad(self, rows: Tensor) -> Tensor:
        """(n, ...) -> (max_objects, ...), zeros behind."""
        padded = rows.new_zeros(self.max_objects, *rows.shape[1:])
        padded[: len(rows)] = rows
        return padded


def read_picture(path: Path) -> np.ndarray:
    """(H, W, 3) uint8; ValueError, one line, if it is no picture."""
    try:
        return np.array(decode_image(path.read_bytes()))
    except BAD_IMAGE_ERRORS as error:
        raise ValueError(f"{path} is no picture: {error}") from None
