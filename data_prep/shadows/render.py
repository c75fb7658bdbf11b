"""Render objects, their masks and their soft shadows with Mitsuba 3, to train and to measure shadow generation.

A folder holds `objects/<stem>.png` (RGBA), `masks/<stem>.png` (its alpha), `shadows/<stem>.png` (16 bits, linear,
65535 = all direct light is gone), `metadata.json` with the light of each stem, and `dataset.json` with the settings.
Stem 000123_2 is light 2 of view 123. Shards `shard-00000.tar` hold `<stem>.image.png`, `.mask.png`, `.shadow.png` and
`.metadata.json` instead.

Every sample is a function of the settings and its number: any number of workers writes the same bytes, and a run that
was killed goes on with the same command. More `--num_samples` extend a folder. What the maps mean and how they are
rendered is said in `data_prep/shadows/path_tracing.py`.
"""

from __future__ import annotations

import hashlib
import importlib.util
import io
import json
import multiprocessing
import multiprocessing.connection
import os
import signal
import tarfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path

import numpy as np
from PIL import Image
from tqdm import tqdm

from backlot.files import write_file

DATASET_NAME, METADATA_NAME = "dataset.json", "metadata.json"
FORMAT_VERSION = 1
LIMITS = {"theta": (0.0, 45.0), "phi": (0.0, 360.0), "size": (2.0, 8.0), "camera": (5.0, 20.0)}
FOLDERS = {"image": "objects", "mask": "masks", "shadow": "shadows"}
FLUSH_SECONDS = 10.0
# Streams of random numbers.
LIGHT, VIEW, LOOK, POSE, RENDER = 11, 12, 13, 14, 15
NEEDED = ("mitsuba", "trimesh", "shapely", "mapbox_earcut")

Angles = tuple[float, float, float]


@dataclass(frozen=True)
class Settings:
    """Everything that the content of a data set depends on, but for the number of samples."""

    image_size: int = 512
    seed: int = 0
    meshes: str | None = None
    """folder of the user's meshes; procedural objects without"""
    theta: tuple[float, float] = LIMITS["theta"]
    phi: tuple[float, float] = LIMITS["phi"]
    size: tuple[float, float] = LIMITS["size"]
    camera: tuple[float, float] = (6.3, 8.3)
    grid: str = "continuous"
    spp: int = 64
    lights_per_view: int = 4
    shadow_bits: int = 16
    tracks: bool = False
    format: str = "folder"
    shard_size: int = 1000
    variant: str = "scalar_rgb"

    def check(self) -> None:
        """ValueError that names the first flag out of range."""
        for name, (low, high) in LIMITS.items():
            first, last = getattr(self, name)
            if not low <= first <= last <= high:
                raise ValueError(f"--{name} takes LO <= HI within [{low:g}, {high:g}], got {first:g} {last:g}")
        for name, low in {"image_size": 8, "seed": 0, "spp": 1, "lights_per_view": 1, "shard_size": 1}.items():
            if getattr(self, name) < low:
                raise ValueError(f"--{name} must be at least {low}, got {getattr(self, name)}")
        if self.grid == "integer":
            for name in ("theta", "phi", "size"):
                low, high = getattr(self, name)
                if np.ceil(low) > np.floor(high):
                    raise ValueError(f"--grid integer: no whole number within --{name} {low:g} {high:g}")


@dataclass(frozen=True)
class Shot:
    """One view: an object before a camera, under one or more lights."""

    number: int
    stems: tuple[str, ...]
    lights: tuple[Angles, ...]
    mesh: str | None = None
    """path below the folder of meshes"""
    digest: str = ""
    track: str | None = None

    @property
    def stream(self) -> str:
        return "S" if self.track is None else "T"


@dataclass(frozen=True)
class Sample:
    """One stem: encoded pictures by name (`image`, `mask`, `shadow`) and its entry of the metadata."""

    pictures: dict[str, bytes]
    metadata: dict[str, object]


def seeds(settings: Settings, shot: Shot, *stream: int) -> np.random.SeedSequence:
    return np.random.SeedSequence([settings.seed, ord(shot.stream), shot.number, *stream])


# --- what is rendered -----------------------------------------------------------------------------------------------


def random_light(settings: Settings, view: int, number: int) -> Angles:
    """Theta and phi in degrees and size, as they are stored: rounded to 4 digits."""
    rng = np.random.default_rng(np.random.SeedSequence([settings.seed, LIGHT, view, number]))
    ranges = (settings.theta, settings.phi, settings.size)
    if settings.grid == "integer":
        return tuple(float(rng.integers(np.ceil(low), np.floor(high) + 1)) for low, high in ranges)
    return tuple(round(float(rng.uniform(low, high)), 4) for low, high in ranges)


def plan_samples(settings: Settings, num_samples: int) -> list[Shot]:
    shots = []
    for view, start in enumerate(range(0, num_samples, settings.lights_per_view)):
        numbers = range(min(settings.lights_per_view, num_samples - start))
        stems = tuple(f"{view:06d}_{number}" for number in numbers)
        shots.append(Shot(view, stems, tuple(random_light(settings, view, number) for number in numbers)))
    return shots


def plan_tracks(num_models: int) -> list[Shot]:
    """The grids of the public benchmark; with its 50 models also its numbers: 150, 270 and 135 samples."""
    few = max(1, round(0.3 * num_models))
    tracks = {
        "softness_control": (num_models, [(30.0, 0.0, size) for size in (2.0, 4.0, 8.0)]),
        "direction_control_horz": (few, [(35.0, float(phi), 2.0) for phi in range(0, 360, 20)]),
        "direction_control_vert": (few, [(float(theta), 0.0, 2.0) for theta in range(5, 50, 5)]),
    }
    shots: list[Shot] = []
    for track, (models, lights) in tracks.items():
        for model in range(models):
            stems = tuple(f"{track}_{model * len(lights) + number:03d}" for number in range(len(lights)))
            shots.append(Shot(len(shots), stems, tuple(lights), track=track))
    return shots


def deal_meshes(shots: list[Shot], files: Sequence, seed: int) -> list[Shot]:
    """Give each shot a mesh of the user: all of them in random order before any comes again."""
    dealt = []
    for shot in shots:
        turn, place = divmod(shot.number, len(files))
        rng = np.random.default_rng(np.random.SeedSequence([seed, POSE, turn]))
        file = files[rng.permutation(len(files))[place]]
        dealt.append(replace(shot, mesh=file.name, digest=file.digest))
    return dealt


def render_shot(settings: Settings, shot: Shot) -> dict[str, Sample]:
    """Make the object of a shot, render it and its shadows, and encode the pictures; by stem."""
    from data_prep.shadows.looks import has_colours, random_look
    from data_prep.shadows.meshes import MeshFile, procedural_object, user_object
    from data_prep.shadows.path_tracing import Camera, Light, render_view

    if shot.mesh is None:
        thing = procedural_object(settings.seed, shot.number, shot.stream)
    else:
        file = MeshFile(shot.mesh, shot.digest)
        thing = user_object(settings.meshes, file, np.random.default_rng(seeds(settings, shot, POSE)))
    distance = np.random.default_rng(seeds(settings, shot, VIEW)).uniform(*settings.camera)
    view = render_view(
        thing.mesh,
        Camera(float(distance)),
        [Light(*angles) for angles in shot.lights],
        look=random_look(np.random.default_rng(seeds(settings, shot, LOOK)), has_colours(thing.mesh)),
        image_size=settings.image_size,
        spp=settings.spp,
        seeds=[int(seeds(settings, shot, RENDER, k).generate_state(1)[0]) for k in range(len(shot.lights) + 1)],
        variant=settings.variant,
    )
    picture = encode(np.concatenate([view.picture, view.alpha[..., None]], axis=2), 8)
    mask = encode(view.alpha, 8)
    samples = {}
    for stem, angles, shadow in zip(shot.stems, shot.lights, view.shadows, strict=True):
        border = np.concatenate([shadow[[0, -1]].ravel(), shadow[:, [0, -1]].ravel()])
        metadata = {
            **dict(zip(("theta", "phi", "size"), angles, strict=True)),
            **{"object_id": thing.object_id, "clipped": bool(border.max() > 0.1), "family": thing.family},
            **({} if shot.track is None else {"track": shot.track}),
        }
        pictures = {"image": picture, "mask": mask, "shadow": encode(shadow, settings.shadow_bits)}
        samples[stem] = Sample(pictures, metadata)
    return samples


def encode(values: np.ndarray, bits: int) -> bytes:
    """PNG of values in [0, 1]: (H, W, 4) as RGBA, (H, W) as grey of 8 or 16 bits."""
    whole = np.rint(np.asarray(values, np.float64) * (2**bits - 1)).astype(np.uint16 if bits == 16 else np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(whole).save(buffer, format="PNG")
    return buffer.getvalue()


# --- the data set ---------------------------------------------------------------------------------------------------


def render_dataset(
    out: str | Path,
    *,
    num_samples: int = 1500,
    num_models: int = 50,
    num_workers: int = 1,
    progress: bool = True,
    variant: str = "auto",
    **settings: object,
) -> int:
    """Render a data set, or what is missing of it. Returns the number of its samples.

    Args:
        out: folder; it is made.
        num_samples: of random lights; the tracks have numbers of their own.
        num_models: objects of the first track; the others have 0.3 times as many.
        num_workers: processes; 1 renders in this one.
        progress: show a bar with rate and remaining time.
        variant: of Mitsuba, or "auto".
        settings: the other fields of `Settings`.

    Raises:
        ValueError: a setting is out of range, the folder holds a data set of other settings, or a mesh is broken.
        ModuleNotFoundError: a library is missing.
    """
    for name, value in {"num_samples": num_samples, "num_models": num_models, "num_workers": num_workers}.items():
        if value < 1:
            raise ValueError(f"--{name} must be at least 1, got {value}")
    chosen = Settings(**settings)
    chosen.check()
    for name in NEEDED:
        if importlib.util.find_spec(name) is None:
            raise ModuleNotFoundError(f"{name} is missing: pip install 'backlot[render]'", name=name)
    from data_prep.shadows.meshes import find_meshes, load_mesh
    from data_prep.shadows.path_tracing import choose_variant

    out = Path(out)
    found = read_record(out)
    if found is not None and variant == "auto":
        variant = found["settings"]["variant"]
    chosen = replace(chosen, variant=choose_variant(variant))
    shots = plan_tracks(num_models) if chosen.tracks else plan_samples(chosen, num_samples)
    files = []
    if chosen.meshes is not None:
        files = find_meshes(chosen.meshes)
        shots = deal_meshes(shots, files, chosen.seed)
    record = record_of(chosen, files, sum(len(shot.stems) for shot in shots))
    if found is None:
        for file in files:  # before hours of rendering, not after
            load_mesh(Path(chosen.meshes) / file.name)
    else:
        check_record(out, found, record)
    out.mkdir(parents=True, exist_ok=True)
    write_file(out / DATASET_NAME, json.dumps(record, indent=1).encode())
    if progress:
        print(f"rendering with {chosen.variant} in {num_workers} {'processes' if num_workers > 1 else 'process'}")
    write = write_folder if chosen.format == "folder" else write_shards
    with renderers(chosen, num_workers) as render, tqdm(disable=not progress, unit="sample", desc="render") as bar:
        bar.reset(total=record["num_samples"])
        write(out, chosen, shots, render, bar)
    return record["num_samples"]


Renders = Callable[[Sequence[Shot]], Iterator[dict[str, Sample]]]


@contextmanager
def renderers(settings: Settings, num_workers: int) -> Iterator[Renders]:
    """A function that renders shots and yields their samples in order, in this process or in several."""
    work = partial(render_shot, settings)
    if num_workers == 1:
        yield partial(map, work)
        return
    threads = max(1, (os.cpu_count() or 1) // num_workers)
    executor = ProcessPoolExecutor(
        num_workers, multiprocessing.get_context("spawn"), initializer=start_worker, initargs=(settings, threads)
    )
    try:
        yield partial(executor.map, work)
    finally:
        executor.shutdown(cancel_futures=True)


def start_worker(settings: Settings, threads: int) -> None:
    from data_prep.shadows.path_tracing import mitsuba, set_threads

    signal.signal(signal.SIGINT, signal.SIG_DFL)  # Ctrl-C reaches all: no tracebacks from here
    threading.Thread(target=end_with_parent, daemon=True).start()
    mitsuba(settings.variant)
    set_threads(threads)


def end_with_parent() -> None:
    """Leave when the process that started this one is gone, however it went."""
    multiprocessing.connection.wait([multiprocessing.parent_process().sentinel])
    os._exit(1)


def write_folder(out: Path, settings: Settings, shots: Sequence[Shot], render: Renders, bar: tqdm) -> None:
    paths = {name: out / folder for name, folder in FOLDERS.items()}
    for path in paths.values():
        path.mkdir(exist_ok=True)
    for leftover in (file for path in (out, *paths.values()) for file in path.glob("*.tmp")):
        leftover.unlink()
    metadata = read_json(out / METADATA_NAME) or {}
    there = [{file.stem for file in path.glob("*.png")} for path in paths.values()]
    done = set(metadata).intersection(*there)
    missing = [shot for shot in shots if not done.issuperset(shot.stems)]
    bar.update(sum(len(shot.stems) for shot in shots) - sum(len(shot.stems) for shot in missing))
    flushed = time.monotonic()
    for samples in render(missing):
        for stem, sample in samples.items():
            for name, picture in sample.pictures.items():
                write_file(paths[name] / f"{stem}.png", picture, durable=False)
            metadata[stem] = sample.metadata
        bar.update(len(samples))
        if time.monotonic() - flushed > FLUSH_SECONDS:
            write_metadata(out, metadata)
            flushed = time.monotonic()
    write_metadata(out, metadata)


def write_metadata(out: Path, metadata: dict[str, dict[str, object]]) -> None:
    os.sync()  # what the metadata names must be on the disk before they are
    write_file(out / METADATA_NAME, json.dumps(dict(sorted(metadata.items())), indent=1).encode())


def write_shards(out: Path, settings: Settings, shots: Sequence[Shot], render: Renders, bar: tqdm) -> None:
    for leftover in out.glob("*.tmp"):
        leftover.unlink()
    shards: list[list[Shot]] = [[]]
    for shot in shots:
        if shards[-1] and sum(len(each.stems) for each in [*shards[-1], shot]) > settings.shard_size:
            shards.append([])
        shards[-1].append(shot)
    missing = {}
    for number, shard in enumerate(shards):
        path = out / f"shard-{number:05d}.tar"
        if path.is_file():
            bar.update(sum(len(shot.stems) for shot in shard))
        else:
            missing[path] = shard
    views = render([shot for shard in missing.values() for shot in shard])
    for path, shard in missing.items():
        samples: dict[str, Sample] = {}
        for _ in shard:
            view = next(views)
            samples |= view
            bar.update(len(view))
        write_file(path, tar_of(samples))


def tar_of(samples: dict[str, Sample]) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", format=tarfile.USTAR_FORMAT) as tar:
        for stem, sample in samples.items():
            members = {f"{stem}.{name}.png": picture for name, picture in sample.pictures.items()}
            members[f"{stem}.metadata.json"] = json.dumps(sample.metadata).encode()
            for name, data in members.items():
                header = tarfile.TarInfo(name)
                header.size = len(data)
                tar.addfile(header, io.BytesIO(data))
    return buffer.getvalue()


# --- what a folder holds --------------------------------------------------------------------------------------------


def record_of(settings: Settings, files: Sequence, num_samples: int) -> dict[str, object]:
    """The content of `dataset.json`. The user's meshes stand there by content, not by path."""
    values = asdict(settings)
    if files:
        values["meshes"] = hashlib.sha256(json.dumps([asdict(file) for file in files]).encode()).hexdigest()
    if settings.format == "folder":
        del values["shard_size"]
    return json.loads(json.dumps({"format_version": FORMAT_VERSION, "num_samples": num_samples, "settings": values}))


def read_json(path: Path) -> dict | None:
    if not path.is_file():
        return None
    try:
        content = json.loads(path.read_bytes())
    except ValueError:
        content = None
    if not isinstance(content, dict):
        raise ValueError(f"{path} is damaged: remove it to render again what it describes")
    return content


def read_record(out: Path) -> dict | None:
    """The record of the folder `out`; None if it is new or empty."""
    record = read_json(out / DATASET_NAME)
    if record is None:
        if out.is_dir() and any(not path.name.endswith(".tmp") for path in out.iterdir()):
            raise ValueError(f"{out} holds files but no {DATASET_NAME}: choose another --out")
        return None
    if record.get("format_version") != FORMAT_VERSION or not isinstance(record.get("settings"), dict):
        raise ValueError(f"{out / DATASET_NAME} is not of format version {FORMAT_VERSION}: choose another --out")
    return record


def check_record(out: Path, found: dict, wanted: dict) -> None:
    """ValueError if the folder was made with other settings, or holds more samples than are wanted."""
    for name, here in wanted["settings"].items():
        there = found["settings"].get(name)
        if there != here:
            raise ValueError(f"{out} was made with --{name} {there}, not {here}: choose another --out")
    there, here = found.get("num_samples"), wanted["num_samples"]
    if there != here and (wanted["settings"]["format"] != "folder" or wanted["settings"]["tracks"] or there > here):
        raise ValueError(f"{out} was made for {there} samples, not {here}: choose another --out")
