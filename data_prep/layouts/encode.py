"""The steps that run models over samples: crops by CLIP and DINOv2, pictures by the VAE, prompts by T5 and CLIP.

A step writes one file for each sample, whole or not at all, with a key of what it was made of in it: a file with the
right key is left as it is, one with another key is stale, and a sample that cannot be encoded is dropped with a reason.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import save
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm

from backlot.crops import RECIPE_SHA256
from backlot.files import json_sha256, write_file
from data_prep.layouts.dataset import read_picture
from data_prep.layouts.format import (
    CLIP,
    DINO,
    EMPTY_PROMPT,
    LATENTS,
    TEXTS,
    Caption,
    inside,
    read_caption,
    read_key,
    read_older,
    tensor_path,
)
from pipelines.layout_flux.encoders import LayoutEncoders, crop_for, crop_side, object_text, phrase_tokens

CHUNK = 256
"""Crops per call of a model, at most."""
KINDS = {"clip": CLIP, "dino": DINO, "vae": LATENTS, "text": TEXTS}


@dataclass(frozen=True)
class Entry:
    """A sample with a valid caption; `key` is of the caption and of its pictures' sizes."""

    image_id: str
    key: str


@dataclass
class Encoding:
    """What the steps have in common.

    Args:
        recipes: what each step's results depend on, from `recipes_of`.
        older: folder whose embeddings of crops are taken as they are.
        dropped: samples that could not be encoded, and why; the steps add to it.
    """

    folder: Path
    encoders: LayoutEncoders
    recipes: dict[str, dict]
    batch_size: int
    num_workers: int
    max_sequence_length: int
    older: Path | None = None
    dropped: dict[str, str] = field(default_factory=dict)


def recipes_of(encoders: LayoutEncoders, max_sequence_length: int, older: bool) -> dict[str, dict]:
    """What each step's results depend on, besides the sample."""
    models = {part: encoders.identity(part) for part in ("text_encoder", "tokenizer", "clip_vision", "dino", "vae")}
    crops, dtype = {"crops": "adopted" if older else RECIPE_SHA256}, {"dtype": str(encoders.dtype)}
    texts = {part: models[part] for part in ("text_encoder", "tokenizer")} | dtype
    return {
        "clip": {"clip_vision": models["clip_vision"], "side": crop_side(encoders.clip_processor), **texts, **crops},
        "dino": {"dino": models["dino"], "side": crop_side(encoders.dino_processor), **dtype, **crops},
        "vae": {"vae": models["vae"], **dtype},
        "text": {
            **{part: encoders.identity(part) for part in ("text_encoder_2", "tokenizer_2")},
            "max_sequence_length": max_sequence_length,
            **texts,
        },
    }


def encode_samples(work: Encoding, entries: Iterable[Entry]) -> list[Entry]:
    """Run all steps; each model is let go before the next is loaded. The samples that are whole.

    Raises:
        ValueError: a file was made of something else.
    """
    entries = list(entries)
    steps = {"clip": encode_clip, "dino": encode_dino, "vae": encode_vae, "text": encode_text}
    models = {"clip": ("clip_vision",), "dino": ("dino",), "vae": ("vae",), "text": ("text_encoder", "text_encoder_2")}
    for name, encode in steps.items():
        todo = _missing(work, name, entries)
        if todo or name == "text":
            encode(work, todo)
        work.encoders.forget(*models[name])
        entries = [entry for entry in entries if entry.image_id not in work.dropped]
    return entries


def _key(work: Encoding, step: str, entry: Entry) -> str:
    return f"{json_sha256(work.recipes[step])[:24]}-{entry.key[:24]}"


def _missing(work: Encoding, step: str, entries: list[Entry]) -> list[Entry]:
    """Samples without a whole file of this step; ValueError if there is one of other data."""
    todo = []
    for entry in entries:
        path = tensor_path(work.folder, KINDS[step], entry.image_id)
        found = read_key(path)
        if found is None:
            todo.append(entry)
        elif found != _key(work, step, entry):
            raise ValueError(
                f"{path} was made of another caption, picture or model than there is now: --overwrite makes all anew"
            )
    return todo


class _Inputs(Dataset):
    """What a step reads of each sample: its entry, and its input or the reason why there is none."""

    def __init__(self, folder: Path, entries: list[Entry], read: Callable[[Path, Caption], dict]):
        self.folder, self.entries, self.read = folder, entries, read

    def __len__(self) -> int:
        return len(self.entries)

    def __getitem__(self, row: int) -> tuple[Entry, dict | str]:
        entry = self.entries[row]
        try:
            return entry, self.read(self.folder, read_caption(self.folder, entry.image_id))
        except ValueError as error:
            return entry, str(error)


def _run(
    work: Encoding,
    step: str,
    todo: list[Entry],
    read: Callable[[Path, Caption], dict],
    encode: Callable[[list[dict]], list[dict[str, Tensor]]],
    metadata: dict[str, str] | None = None,
) -> None:
    """Read, encode and write samples, batch by batch.

    Args:
        read: the input of one sample, in a worker process.
        encode: the tensors of the samples of a batch.
    """
    inputs = _Inputs(work.folder, todo, read)
    loader = DataLoader(inputs, work.batch_size, collate_fn=list, num_workers=work.num_workers)
    (work.folder / KINDS[step]).mkdir(parents=True, exist_ok=True)
    with tqdm(total=len(todo), desc=step, unit="sample", disable=not sys.stderr.isatty()) as progress:
        for batch in loader:
            work.dropped.update({entry.image_id: given for entry, given in batch if isinstance(given, str)})
            good = [(entry, given) for entry, given in batch if not isinstance(given, str)]
            results = encode([given for _, given in good]) if good else []
            for (entry, _), tensors in zip(good, results, strict=True):
                if problem := _not_finite(tensors):
                    work.dropped[entry.image_id] = f"{step}: {problem}"
                    continue
                data = {name: tensor.cpu().contiguous() for name, tensor in tensors.items()}
                content = save(data, {**(metadata or {}), "key": _key(work, step, entry)})
                write_file(tensor_path(work.folder, KINDS[step], entry.image_id), content, durable=False)
            progress.update(len(batch))


def _not_finite(tensors: dict[str, Tensor]) -> str | None:
    names = [name for name, tensor in tensors.items() if tensor.is_floating_point() and not tensor.isfinite().all()]
    return f"{names[0]} has values that are not finite" if names else None


def _pixel_values(path: Path) -> Tensor:
    """(3, H, W) float32 in [-1, 1]."""
    return torch.from_numpy(read_picture(path)).permute(2, 0, 1).float().div_(127.5).sub_(1)


# --- crops ----------------------------------------------------------------------------------------------------------


def read_crops(folder: Path, caption: Caption, processor: object) -> Tensor:
    """The crops of a sample's objects, (n, 3, side, side): of their references, or of the picture itself."""
    own = inside(folder, caption.image_path)
    views = [
        (inside(folder, each.reference.image_path), each.reference.bbox) if each.reference else (own, each.bbox)
        for each in caption.objects
    ]
    pictures = {path: _pixel_values(path) for path in {path for path, _ in views}}
    return torch.stack([crop_for(processor, pictures[path], box) for path, box in views])


def _embed_crops(encode: Callable[[Tensor], Tensor], inputs: list[dict]) -> list[Tensor]:
    """Embeddings of all samples' crops, made in one go: a (n, width) tensor for each sample."""
    crops = torch.cat([given["crops"] for given in inputs])
    rows = torch.cat([encode(chunk).float().cpu() for chunk in crops.split(CHUNK)])
    return list(rows.split([len(given["crops"]) for given in inputs]))


def _adopted(older: Path, kind: str, caption: Caption, width: int) -> Tensor:
    """Embeddings of the older naming; ValueError if the models of today have another width."""
    rows = read_older(older, kind, caption.image_id, len(caption.objects))
    if rows.shape[1] != width:
        raise ValueError(f"its embeddings in {older / kind} have width {rows.shape[1]}, the model's have {width}")
    return rows


class _ReadClip:
    """Crops, or adopted embeddings, and the texts of objects."""

    def __init__(self, work: Encoding):
        self.older, self.processor = work.older, work.encoders.clip_processor
        self.width = work.encoders.clip_vision.config.projection_dim if self.older else 0

    def __call__(self, folder: Path, caption: Caption) -> dict:
        texts = {"texts": [object_text(each.category_name, each.caption) for each in caption.objects]}
        if self.older:
            return {"rows": _adopted(self.older, CLIP, caption, self.width), **texts}
        return {"crops": read_crops(folder, caption, self.processor), **texts}


class _ReadDino:
    """Crops, or adopted embeddings."""

    def __init__(self, work: Encoding):
        self.older, self.processor = work.older, work.encoders.dino_processor
        self.width = work.encoders.dino.config.hidden_size if self.older else 0

    def __call__(self, folder: Path, caption: Caption) -> dict:
        if self.older:
            return {"rows": _adopted(self.older, DINO, caption, self.width)}
        return {"crops": read_crops(folder, caption, self.processor)}


def encode_clip(work: Encoding, todo: list[Entry]) -> None:
    """CLIP of each object's crop and of its text."""

    def encode(inputs: list[dict]) -> list[dict[str, Tensor]]:
        images = [given["rows"] for given in inputs] if work.older else _embed_crops(work.encoders.clip_crops, inputs)
        distinct = list(dict.fromkeys(text for given in inputs for text in given["texts"]))
        embedded = torch.cat([work.encoders.clip_text(part) for part in batches(distinct, CHUNK)])
        places = {text: place for place, text in enumerate(distinct)}
        embedded = embedded.float().cpu()
        texts = [embedded[[places[text] for text in given["texts"]]] for given in inputs]
        return [
            {"image": image, "text": text, "valid": torch.ones(len(image), dtype=torch.bool)}
            for image, text in zip(images, texts, strict=True)
        ]

    _run(work, "clip", todo, _ReadClip(work), encode)


def encode_dino(work: Encoding, todo: list[Entry]) -> None:
    """DINOv2 of each object's crop."""

    def encode(inputs: list[dict]) -> list[dict[str, Tensor]]:
        rows = [given["rows"] for given in inputs] if work.older else _embed_crops(work.encoders.dino_crops, inputs)
        return [{"cls": cls, "valid": torch.ones(len(cls), dtype=torch.bool)} for cls in rows]

    _run(work, "dino", todo, _ReadDino(work), encode)


# --- pictures and prompts -------------------------------------------------------------------------------------------


def _read_pixels(folder: Path, caption: Caption) -> dict:
    pixels = _pixel_values(inside(folder, caption.image_path))
    if tuple(pixels.shape[1:]) != (caption.height, caption.width):
        raise ValueError(f"its picture has {pixels.shape[2]} x {pixels.shape[1]} pixels, not what its caption says")
    return {"pixels": pixels}


def encode_vae(work: Encoding, todo: list[Entry]) -> None:
    """The VAE's modes of whole pictures; half precision where the VAE computes in less than float32."""
    config = work.encoders.vae.config
    stored = torch.float32 if work.encoders.dtype == torch.float32 else torch.float16

    def encode(inputs: list[dict]) -> list[dict[str, Tensor]]:
        means = work.encoders.latents(torch.stack([given["pixels"] for given in inputs])).to(stored)
        return [{"mean": mean.clone()} for mean in means]

    metadata = {"shift": repr(config.shift_factor or 0.0), "scale": repr(config.scaling_factor), "normalised": "false"}
    _run(work, "vae", todo, _read_pixels, encode, metadata)


def _read_prompt(folder: Path, caption: Caption) -> dict:
    spans = [each.phrase_span and tuple(each.phrase_span) for each in caption.objects]
    return {"prompt": caption.global_caption, "spans": spans}


def encode_text(work: Encoding, todo: list[Entry]) -> None:
    """T5 and pooled CLIP embeddings of the prompts, and first of the empty one."""
    encoders, length = work.encoders, work.max_sequence_length

    def encode(inputs: list[dict]) -> list[dict[str, Tensor]]:
        prompts = [given["prompt"] for given in inputs]
        t5, pooled = encoders.t5(prompts, length), encoders.clip_text(prompts).float()
        counts = [min(len(ids), length) for ids in encoders.tokenizer_2(prompts)["input_ids"]]
        spans = [phrase_tokens(encoders.tokenizer_2, given["prompt"], given["spans"], length) for given in inputs]
        return [
            {
                "t5": t5[i].clone(),
                "t5_len": torch.tensor(counts[i]),
                "pooled": pooled[i].clone(),
                "span_tokens": torch.from_numpy(np.array(spans[i], np.int64).reshape(-1, 2)),
            }
            for i in range(len(inputs))
        ]

    empty = tensor_path(work.folder, TEXTS, EMPTY_PROMPT)
    key = json_sha256(work.recipes["text"])
    if read_key(empty) != key:
        [tensors] = encode([{"prompt": "", "spans": []}])
        empty.parent.mkdir(parents=True, exist_ok=True)
        write_file(empty, save({name: tensor.cpu() for name, tensor in tensors.items()}, {"key": key}))
    _run(work, "text", todo, _read_prompt, encode)


def batches(values: list, size: int) -> Iterator[list]:
    """Consecutive lists of at most `size` values."""
    for start in range(0, len(values), size):
        yield values[start : start + size]
