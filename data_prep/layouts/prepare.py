"""From drawn scenes or somebody's layouts to what training reads: scenes | import, captions, clip, dino, vae, text,
manifest.

Each step goes on where it was interrupted, leaves alone what is there and valid, and refuses what was made of something
else. The manifest is removed before anything is changed and written last: a folder that has one is whole.
"""

from __future__ import annotations

import hashlib
import json
import shutil
import sys
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import torch
from tqdm import tqdm

from backlot.codecs import DTYPES, vae_scale_factor
from backlot.files import json_sha256, lock, write_file, write_json
from backlot.fingerprint import fingerprint, fingerprint_files
from backlot.loading import default_device
from backlot.samples import derive_seed
from data_prep.layouts.encode import KINDS, Encoding, Entry, encode_samples, recipes_of
from data_prep.layouts.format import (
    CAPTIONS,
    FORMAT_VERSION,
    IMAGES,
    MANIFEST_NAME,
    META_NAME,
    REFERENCES,
    REPORT_NAME,
    SPLITS_NAME,
    caption_path,
    inside,
    read_caption,
    read_meta,
)
from data_prep.layouts.importers import is_whole, open_source, write_parts, write_sample
from data_prep.layouts.procedural import ProceduralSettings, draw_scene, render, render_reference
from data_prep.layouts.settings import PrepareSettings
from pipelines.layout_flux.encoders import LayoutEncoders
from pipelines.layout_flux.tiny import save_tiny_models

NUM_SCENES = 1000
MODELS = "models"
FLUX_PATCH = 2
"""Latent cells along the side of a token."""


@dataclass
class Report:
    """How many samples are whole, and which were dropped, and why."""

    num_samples: int = 0
    dropped: dict[str, str] = field(default_factory=dict)


def prepare(settings: PrepareSettings) -> Report:
    """Make or complete the prepared layouts in `settings.output_dir`.

    Raises:
        ValueError, OSError: one line: an argument or the source is wrong, or the folder holds something else.
        LockedError: another process is at it.
    """
    folder = settings.output_dir
    folder.mkdir(parents=True, exist_ok=True)
    with lock(folder / "prepare.lock"):
        return _prepare(settings, folder)


def _prepare(settings: PrepareSettings, folder: Path) -> Report:
    encoders = open_encoders(settings, folder)
    cell = vae_scale_factor(encoders.vae) * FLUX_PATCH
    if settings.side % cell:
        raise ValueError(f"--resolution must be a multiple of {cell}, a token's side in pixels, got {settings.side}")
    recipes = {
        "source": source_recipe(settings),
        **recipes_of(encoders, settings.sequence_length, settings.adopt_embeddings),
    }
    claim(folder, recipes, settings)
    report = Report()
    image_ids = draw(settings, folder) if settings.source == "procedural" else take(settings, folder, report)
    entries = list(validate(folder, image_ids, report))
    work = Encoding(
        folder,
        encoders,
        recipes,
        settings.batch_size,
        settings.num_workers,
        settings.sequence_length,
        older=settings.path if settings.adopt_embeddings else None,
        dropped=report.dropped,
    )
    entries = encode_samples(work, entries)
    report.num_samples = len(entries)
    write_manifest(folder, entries, settings, report)
    return report


def open_encoders(settings: PrepareSettings, folder: Path) -> LayoutEncoders:
    """The models; tiny ones are written to `models` once."""
    device = default_device() if settings.device is None else torch.device(settings.device)
    dtype = DTYPES[settings.dtype or ("float32" if device.type == "cpu" else "bfloat16")]
    models = settings.models
    if models == "tiny":
        models = folder / MODELS
        if not models.is_dir():
            temporary = models.with_name(f"{MODELS}.tmp")
            shutil.rmtree(temporary, ignore_errors=True)
            save_tiny_models(temporary)
            temporary.rename(models)
    return LayoutEncoders.load(models, device, dtype, settings.vae, settings.model_root)


def claim(folder: Path, recipes: dict[str, dict], settings: PrepareSettings) -> None:
    """Say what the folder is about to hold; the manifest goes.

    Raises:
        ValueError: it holds something else.
    """
    meta = {"format_version": FORMAT_VERSION, "recipes": recipes, "evaluation_only": settings.is_for_evaluation}
    if (folder / META_NAME).is_file() and not settings.overwrite:
        found = read_meta(folder)
        for step, recipe in recipes.items():
            old = found.recipes.get(step, {})
            if changed := sorted(name for name in recipe.keys() | old.keys() if recipe.get(name) != old.get(name)):
                before, now = (str(values.get(changed[0]))[:60] for values in (old, recipe))
                raise ValueError(
                    f"{folder} was prepared with another {changed[0]} ({step}: {before}, now {now}): --overwrite makes"
                    " all anew"
                )
        if found.evaluation_only != settings.is_for_evaluation:
            raise ValueError(
                f"{folder} was prepared with evaluation_only {found.evaluation_only}: --overwrite changes it"
            )
    (folder / MANIFEST_NAME).unlink(missing_ok=True)
    if settings.overwrite:
        for name in (CAPTIONS, IMAGES, REFERENCES, *KINDS.values()):
            shutil.rmtree(folder / name, ignore_errors=True)
    for name in (CAPTIONS, IMAGES, REFERENCES):
        (folder / name).mkdir(exist_ok=True)
    write_json(folder / META_NAME, meta)


def source_recipe(settings: PrepareSettings) -> dict:
    """What the pictures and captions depend on, besides their number."""
    recipe = {"source": settings.source, "resolution": settings.side}
    if settings.source == "procedural":
        drawn = procedural_settings(settings).model_dump(mode="json")
        return {**recipe, "seed": settings.seed, "held_out": settings.held_out, "drawn": json_sha256(drawn)}
    path = settings.path
    if not path.exists():
        raise ValueError(f"--path {path} does not exist")
    if path.resolve() == settings.output_dir.resolve():
        raise ValueError(f"--output_dir must be another folder than --path {path}")
    below = path / CAPTIONS if settings.source == "folder" else path
    names = sorted(each.name for each in below.iterdir() if each.is_file()) if below.is_dir() else [path.name]
    return {**recipe, "files": fingerprint_files(below if below.is_dir() else path.parent, names)}


# --- pictures and captions ------------------------------------------------------------------------------------------


def procedural_settings(settings: PrepareSettings) -> ProceduralSettings:
    return ProceduralSettings.preset(settings.profile, image_size=settings.side)


def draw(settings: PrepareSettings, folder: Path) -> list[str]:
    """Draw the scenes that are not there yet; the ids of all."""
    count = settings.num_samples or NUM_SCENES
    todo = [number for number in range(count) if not is_whole(folder, scene_id(number))]
    work = partial(
        draw_one, folder=folder, drawn=procedural_settings(settings), seed=settings.seed, held_out=settings.held_out
    )
    show = partial(tqdm, total=len(todo), desc="scenes", unit="sample", disable=not sys.stderr.isatty())
    if settings.num_workers > 1 and todo:
        with ProcessPoolExecutor(settings.num_workers) as pool:
            for _ in show(pool.map(work, todo, chunksize=32)):
                pass
    else:
        for number in show(todo):
            work(number)
    return [scene_id(number) for number in range(count)]


def scene_id(number: int) -> str:
    return f"scene-{number:06d}"


def draw_one(number: int, folder: Path, drawn: ProceduralSettings, seed: int, held_out: bool) -> None:
    """Draw a scene and another view of each of its objects."""
    image_id = scene_id(number)
    scene = draw_scene(derive_seed(seed, number), drawn, held_out)
    pictures, references = {f"{IMAGES}/{image_id}.png": render(scene)}, []
    for place, each in enumerate(scene.objects):
        path = f"{REFERENCES}/{image_id}_{place}.png"
        pictures[path], box = render_reference(each.identity, derive_seed(seed, number, place), drawn)
        references.append((path, box))
    write_parts(folder, scene.to_caption(image_id, f"{IMAGES}/{image_id}.png", references), pictures)


def take(settings: PrepareSettings, folder: Path, report: Report) -> list[str]:
    """Import the samples that are not there yet; the ids of all that could be."""
    image_ids: dict[str, None] = {}
    samples = open_source(settings.source, settings.path, settings.images)
    for sample in tqdm(samples, desc="import", unit="sample", disable=not sys.stderr.isatty()):
        if settings.num_samples and len(image_ids) == settings.num_samples:
            break
        if sample.image_id in image_ids:
            report.dropped[f"{sample.image_id} (again)"] = "another sample has this id"
            continue
        try:
            if not is_whole(folder, sample.image_id):
                write_sample(folder, sample, settings.side)
            image_ids[sample.image_id] = None
        except ValueError as error:
            report.dropped[sample.image_id] = " ".join(str(error).split())
    if not image_ids:
        reasons = "; ".join(f"{name}: {reason}" for name, reason in list(report.dropped.items())[:1])
        raise ValueError(f"{settings.path} holds no usable sample{f' ({reasons})' if reasons else ''}")
    return list(image_ids)


def validate(folder: Path, image_ids: list[str], report: Report) -> Iterator[Entry]:
    """The samples whose captions are valid; the others are dropped."""
    for image_id in image_ids:
        try:
            caption = read_caption(folder, image_id)
        except ValueError as error:
            report.dropped[image_id] = str(error)
            continue
        names = [caption.image_path, *(each.reference.image_path for each in caption.objects if each.reference)]
        sizes = [inside(folder, name).stat().st_size for name in names]
        digest = hashlib.sha256(caption_path(folder, image_id).read_bytes()).hexdigest()
        yield Entry(image_id, fingerprint([digest, *sizes]))


# --- the end --------------------------------------------------------------------------------------------------------


def split_ids(image_ids: list[str], settings: PrepareSettings) -> dict[str, list[str]]:
    """A hash of an id decides whether it is for training: more samples never move one to the other side."""
    if settings.is_for_evaluation:
        return {"test": image_ids}
    splits: dict[str, list[str]] = {"train": [], "validation": []}
    for image_id in image_ids:
        draw = int.from_bytes(hashlib.sha256(image_id.encode()).digest()[:8], "big") / 2**64
        splits["train" if draw < settings.train_split else "validation"].append(image_id)
    return splits


def write_manifest(folder: Path, entries: list[Entry], settings: PrepareSettings, report: Report) -> None:
    """Write splits, report and, last, the manifest.

    Raises:
        ValueError: every sample was dropped.
    """
    write_json(folder / REPORT_NAME, {"num_samples": report.num_samples, "dropped": report.dropped})
    if not entries:
        name, reason = next(iter(report.dropped.items()))
        raise ValueError(f"no sample is left ({name}: {reason}); {folder / REPORT_NAME} lists all")
    write_json(folder / SPLITS_NAME, split_ids([entry.image_id for entry in entries], settings))
    lines = "".join(json.dumps({"image_id": entry.image_id, "key": entry.key}) + "\n" for entry in entries)
    write_file(folder / MANIFEST_NAME, lines)
