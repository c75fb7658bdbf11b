"""Made scenes: a few shapes on a floor, none in another, now and then one on top of another, and their pictures.

A folder of scenes as `data_prep.scenes.format` describes it, and `synth.json` with the settings. Every scene is a
function of the settings, its split and its number: any number of workers writes the same bytes, and a run that was
stopped goes on with the same call. Larger counts extend a folder.

Objects stand upright, turned about z. Conditionals: `image`; `pointmap` and `masks` of what is visible of each object;
`cond_tokens` (N, 12), the descriptors of all objects in no order: translation, log side lengths, 6D rotation.
"""

from __future__ import annotations

import json
import multiprocessing
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path

import numpy as np
import trimesh
from tqdm import tqdm

from backlot.files import write_json
from backlot.rendering import SEEN_REACH, Camera, Rendering, object_color, render, to_bytes
from data_prep.scenes.format import CONDITIONS, SPLITS, pack_occupancy, write_scene
from data_prep.scenes.shapes import FAMILIES, FLAT_TOPS, Shape, occupancy, random_shape

RECORD_NAME = "synth.json"
FORMAT_VERSION = 1
HALF_EXTENTS = (0.14, 0.34)  # metres, as all lengths
CARRIER_EXTENTS, CARRIED_EXTENTS = (0.24, 0.34), (0.10, 0.20)
CENTRES = 0.95
MARGIN = 0.02  # between footprints
EDGE = 0.01  # of a carrier's top that stays free
PALETTE_SIZE, TINT = 10, 0.05
TRIES = 100  # places for an object, before all are drawn anew
CHECK_SIZE, CHECK_PIXELS = 32, 3  # every object shows so many pixels in a picture of this size


@dataclass(frozen=True)
class Settings:
    """Everything that a scene depends on, but for its split and number."""

    seed: int = 0
    image_size: int = 32
    supersample: int = 2
    resolution: int = 16
    num_objects: tuple[int, int] = (2, 5)
    stack_prob: float = 0.25
    families: tuple[str, ...] = tuple(FAMILIES)
    footprints: str = "circles"
    isotropic_scale: bool = False
    conditionals: tuple[str, ...] = CONDITIONS

    def check(self) -> None:
        """ValueError that names the first setting out of range."""
        for name, low in {"seed": 0, "image_size": 8, "supersample": 1, "resolution": 2}.items():
            value = getattr(self, name)
            if not isinstance(value, int) or value < low:
                raise ValueError(f"`{name}` must be a whole number of at least {low}, got {value!r}")
        if self.resolution % 2:
            raise ValueError(f"`resolution` must be even, got {self.resolution}")
        if len(self.num_objects) != 2 or not 1 <= self.num_objects[0] <= self.num_objects[1] <= 8:
            raise ValueError(f"`num_objects` must be two numbers, 1 <= LOW <= HIGH <= 8, got {self.num_objects}")
        if not 0 <= self.stack_prob <= 1:
            raise ValueError(f"`stack_prob` must lie in [0, 1], got {self.stack_prob}")
        for name, known in {"families": tuple(FAMILIES), "conditionals": CONDITIONS}.items():
            unknown = [each for each in getattr(self, name) if each not in known]
            if unknown:
                raise ValueError(f"`{name}` has the unknown {', '.join(unknown)}; known are {', '.join(known)}")
        if not self.families or len(set(self.families)) < len(self.families):
            raise ValueError(f"`families` must name one or more, each once, got {', '.join(self.families) or 'none'}")
        if self.stack_prob and not set(self.families) & set(FLAT_TOPS):
            raise ValueError(f"`stack_prob` above 0 needs one of the families {', '.join(FLAT_TOPS)}")
        if self.footprints not in ("circles", "boxes"):
            raise ValueError(f"`footprints` must be circles or boxes, got {self.footprints!r}")


@dataclass(frozen=True, eq=False)
class Thing:
    """An object: a shape of half side lengths `half` (3,), turned by `yaw` in radians, its middle at `centre` (3,).

    `carrier` is the number of the object it stands on, None on the floor; `color` sRGB in [0, 1].
    """

    shape: Shape
    half: np.ndarray
    yaw: float
    centre: np.ndarray
    color: tuple[float, ...]
    carrier: int | None = None

    @property
    def rotation(self) -> np.ndarray:
        cos, sin = np.cos(self.yaw), np.sin(self.yaw)
        return np.array([[cos, -sin, 0], [sin, cos, 0], [0, 0, 1]])

    def mesh(self) -> trimesh.Trimesh:
        """Its surface in the scene."""
        mesh = self.shape.mesh()
        vertices = (mesh.vertices * (2 * self.half)) @ self.rotation.T + self.centre
        return trimesh.Trimesh(vertices, mesh.faces, process=False, validate=False)

    def occupied(self, points: np.ndarray) -> np.ndarray:
        """Which points (..., 3) of the scene lie in it."""
        return self.shape.occupied((points - self.centre) @ self.rotation / (2 * self.half))


# --- where things stand ---------------------------------------------------------------------------------------------


def plan_scene(settings: Settings, split: str, number: int) -> list[Thing]:
    """The objects of a scene, always the same ones; each can be seen from the fixed camera."""
    rng = scene_rng(settings, split, number)
    count = int(rng.integers(settings.num_objects[0], settings.num_objects[1] + 1))
    stacked = count > 1 and rng.random() < settings.stack_prob
    while True:
        things = draw_things(settings, count, stacked, rng)
        if things is not None and all_visible(things):
            return things


def scene_rng(settings: Settings, split: str, number: int) -> np.random.Generator:
    return np.random.default_rng(np.random.SeedSequence([settings.seed, SPLITS.index(split), number]))


def draw_things(settings: Settings, count: int, stacked: bool, rng: np.random.Generator) -> list[Thing] | None:
    """`count` objects, of different families as far as there are enough; None where one found no place."""
    names = list(rng.permutation(settings.families))
    if stacked:
        carrier = rng.choice([name for name in settings.families if name in FLAT_TOPS])
        names.remove(carrier)
        names.insert(0, carrier)
    colors = [object_color(number) for number in rng.permutation(PALETTE_SIZE)]
    things: list[Thing] = []
    for place in range(count):
        shape = random_shape(str(names[place % len(names)]), rng)
        color = tuple(float(x) for x in np.clip(colors[place] + rng.uniform(-TINT, TINT, 3), 0, 1).round(4))
        thing = Thing(shape, np.zeros(3), 0.0, np.zeros(3), color)
        if stacked and place == count - 1:
            thing = put_on(thing, things[0], rng)
        else:
            thing = put_down(thing, things, CARRIER_EXTENTS if stacked and not place else HALF_EXTENTS, settings, rng)
        if thing is None:
            return None
        things.append(thing)
    order = rng.permutation(count)
    places = np.argsort(order)
    return [
        thing if thing.carrier is None else replace(thing, carrier=int(places[thing.carrier]))
        for thing in (things[i] for i in order)
    ]


def put_down(
    thing: Thing, others: Sequence[Thing], extents: tuple[float, float], settings: Settings, rng: np.random.Generator
) -> Thing | None:
    """The same on the floor, of random size, its footprint clear of the others'; None if no place was found."""
    half = np.r_[rng.uniform(*extents, 2), rng.uniform(*HALF_EXTENTS)]
    yaw = float(rng.uniform(0, np.pi / 2))
    gap = circle_gap if settings.footprints == "circles" else box_gap
    for _ in range(TRIES):
        thing = replace(thing, half=half, yaw=yaw, centre=np.r_[rng.uniform(-CENTRES, CENTRES, 2), half[2]])
        within = np.abs(footprint(thing)).max() <= SEEN_REACH
        if within and all(gap(thing, other) >= MARGIN for other in others):
            return thing
    return None


def put_on(thing: Thing, carrier: Thing, rng: np.random.Generator) -> Thing | None:
    """The same, smaller, on top of a carrier, nowhere beyond its edge; None if no place was found."""
    for _ in range(TRIES):
        thing = replace(thing, half=rng.uniform(*CARRIED_EXTENTS, 3), yaw=float(rng.uniform(0, np.pi / 2)))
        offset = carrier.rotation @ np.r_[rng.uniform(-1, 1, 2) * carrier.half[:2], carrier.half[2] + thing.half[2]]
        thing = replace(thing, centre=carrier.centre + offset, carrier=0)
        corners = (footprint(thing) - carrier.centre[:2]) @ carrier.rotation[:2, :2] / (carrier.half[:2] - EDGE)
        order = np.inf if carrier.shape.top == "square" else 2
        if (np.linalg.norm(corners, order, axis=1) <= 1).all():
            return thing
    return None


def footprint(thing: Thing) -> np.ndarray:
    """The corners (4, 2) of the box that it fills, seen from above."""
    corners = np.array([[-1, -1], [1, -1], [1, 1], [-1, 1]]) * thing.half[:2]
    return corners @ thing.rotation[:2, :2].T + thing.centre[:2]


def circle_gap(one: Thing, other: Thing) -> float:
    """Distance between the circles about two footprints, negative where they overlap."""
    distance = np.hypot(*(one.centre - other.centre)[:2])
    return float(distance - np.hypot(*one.half[:2]) - np.hypot(*other.half[:2]))


def box_gap(one: Thing, other: Thing) -> float:
    """Width of the broadest straight lane along a side that separates two footprints, negative where none does."""
    axes = np.concatenate([one.rotation[:2, :2].T, other.rotation[:2, :2].T])
    mine, theirs = footprint(one) @ axes.T, footprint(other) @ axes.T
    return float(np.maximum(mine.min(0) - theirs.max(0), theirs.min(0) - mine.max(0)).max())


def all_visible(things: Sequence[Thing]) -> bool:
    picture = take_picture(things, CHECK_SIZE)
    return bool((picture.masks(len(things)).sum(axis=(1, 2)) >= CHECK_PIXELS).all())


def take_picture(things: Sequence[Thing], size: int, supersample: int = 1, shadows: bool = False) -> Rendering:
    """What the fixed camera sees."""
    meshes = [thing.mesh() for thing in things]
    return render(meshes, [thing.color for thing in things], Camera.floor_view(), size, supersample, shadows=shadows)


# --- what is written ------------------------------------------------------------------------------------------------


def poses(translations: np.ndarray, sides: np.ndarray, rotations: np.ndarray) -> dict[str, np.ndarray]:
    """Pose modalities, float32, of N objects: middles (N, 3), side lengths (N, 3), rotations (N, 3, 3)."""
    six = rotations[:, :, :2].swapaxes(1, 2).reshape(-1, 6)
    values = {"translation": translations, "scale": np.log(sides), "6drotation_normalized": six}
    return {name: value[:, None].astype(np.float32) for name, value in values.items()}


def descriptors(tensors: dict[str, np.ndarray], rng: np.random.Generator) -> np.ndarray:
    """(N, 12): translation, log side lengths and 6D rotation of all objects, in random order."""
    rows = [tensors[name][:, 0] for name in ("translation", "scale", "6drotation_normalized")]
    return rng.permutation(np.concatenate(rows, axis=1))


def picture_conditionals(picture: Rendering, num_objects: int) -> dict[str, np.ndarray]:
    """A rendering as conditionals: image uint8, pointmap float16, masks uint8."""
    return {
        "image": np.ascontiguousarray(to_bytes(picture.rgb).transpose(2, 0, 1)),
        "pointmap": np.ascontiguousarray(picture.pointmap.transpose(2, 0, 1), np.float16),
        "masks": picture.masks(num_objects).astype(np.uint8),
    }


def camera_metadata(camera: Camera, size: int) -> dict[str, object]:
    return {
        "intrinsics": camera.intrinsics.tolist(),
        "scene_from_camera": camera.scene_from_camera.tolist(),
        "image_size": size,
    }


def scene_name(number: int) -> str:
    return f"{number:06d}"


def make_scene(settings: Settings, out: Path, job: tuple[str, int]) -> None:
    """Draw, render and write scene `number` of a split."""
    split, number = job
    things = plan_scene(settings, split, number)
    half = np.stack([thing.half for thing in things])
    sides = 2 * half
    if settings.isotropic_scale:
        sides = np.repeat(sides.max(axis=1, keepdims=True), 3, axis=1)
    grids = [
        occupancy(thing.shape, settings.resolution, 2 * thing.half / side)
        for thing, side in zip(things, sides, strict=True)
    ]
    tensors = poses(np.stack([t.centre for t in things]), sides, np.stack([t.rotation for t in things]))
    conditionals = {}
    if {"image", "pointmap", "masks"} & set(settings.conditionals):
        supersample = settings.supersample if "image" in settings.conditionals else 1
        picture = take_picture(things, settings.image_size, supersample)
        conditionals |= picture_conditionals(picture, len(things))
    # a stream of its own: the order of the descriptors does not depend on how often the scene was drawn
    order = np.random.default_rng(np.random.SeedSequence([settings.seed, SPLITS.index(split), number, 1]))
    conditionals["cond_tokens"] = descriptors(tensors, order)
    metadata = {
        "scene_id": scene_name(number),
        "num_objects": len(things),
        "object_ids": [f"{thing.shape.family}_{i}" for i, thing in enumerate(things)],
        "families": [thing.shape.family for thing in things],
        "carriers": [thing.carrier for thing in things],
        "colors": [list(thing.color) for thing in things],
        "frame": "floor",
        "scene_shift": [0.0, 0.0, 0.0],
        "scene_scale": 1.0,
        "camera": camera_metadata(Camera.floor_view(), settings.image_size),
        "shape_layout": "tokens_channels",
        "isotropic_scale": settings.isotropic_scale,
        "resolution": settings.resolution,
    }
    write_scene(
        out / split / scene_name(number),
        tensors={"occupancy": pack_occupancy(np.stack(grids)), **tensors},
        conditionals={name: conditionals[name] for name in settings.conditionals} or None,
        metadata=metadata,
        kind="shapes",
    )


def is_complete(folder: Path) -> bool:
    """Whether all of a scene is there; its metadata are written last, and with conditionals if it has any."""
    return (folder / "metadata.json").is_file() and (folder / "shapes.safetensors").is_file()


def build_synth(
    out: str | Path,
    num_train: int = 4000,
    num_val: int = 200,
    num_test: int = 0,
    *,
    seed: int = 0,
    image_size: int = 32,
    supersample: int = 2,
    resolution: int = 16,
    num_objects: Sequence[int] = (2, 5),
    stack_prob: float = 0.25,
    families: Sequence[str] = tuple(FAMILIES),
    footprints: str = "circles",
    isotropic_scale: bool = False,
    conditionals: Sequence[str] = CONDITIONS,
    num_workers: int = 0,
    progress: bool = True,
) -> int:
    """Make a folder of scenes, or what is missing of it. Returns the number of scenes asked for.

    Args:
        out: folder; it is made.
        num_train, num_val, num_test: scenes of each split.
        image_size, supersample: side of the pictures; their colours are averages of this many squared rays.
        resolution: side of the occupancy grids.
        num_objects: the fewest and the most of a scene.
        stack_prob: share of scenes in which one object stands on another.
        families: of `scene_shapes.FAMILIES`.
        footprints: on the floor, `circles` about them or the `boxes` themselves are disjoint.
        isotropic_scale: one size per object, the longest side, instead of three.
        conditionals: which to write, of image, pointmap, masks, cond_tokens.
        num_workers: processes; 0 and 1 work in this one.
        progress: show a bar.

    Raises:
        ValueError: a setting is out of range, or the folder holds scenes of other settings.
    """
    counts = {"train": num_train, "val": num_val, "test": num_test}
    for name, value in {
        **{f"num_{split}": count for split, count in counts.items()},
        "num_workers": num_workers,
    }.items():
        if value < 0:
            raise ValueError(f"`{name}` must not be negative, got {value}")
    chosen = Settings(
        *(seed, image_size, supersample, resolution, tuple(num_objects), stack_prob, tuple(families), footprints),
        *(isotropic_scale, tuple(conditionals)),
    )
    chosen.check()
    out = Path(out)
    write_record(out, chosen)
    jobs = [(split, number) for split, count in counts.items() for number in range(count)]
    missing = [job for job in jobs if not is_complete(out / job[0] / scene_name(job[1]))]
    work = partial(make_scene, chosen, out)
    with tqdm(
        total=len(jobs), initial=len(jobs) - len(missing), disable=not progress, unit="scene", desc="synth"
    ) as bar:
        if num_workers < 2 or len(missing) < 2:
            for job in missing:
                work(job)
                bar.update()
        else:
            with ProcessPoolExecutor(num_workers, multiprocessing.get_context("spawn")) as executor:
                for _ in executor.map(work, missing, chunksize=max(1, min(32, len(missing) // (4 * num_workers)))):
                    bar.update()
    return len(jobs)


def write_record(out: Path, settings: Settings) -> None:
    """Keep the settings beside the scenes; ValueError if scenes of others are there already."""
    path = out / RECORD_NAME
    if path.exists():
        found = asdict(read_settings(out))
        differing = [name for name, value in asdict(settings).items() if value != found[name]]
        if differing:
            described = ", ".join(f"{name} {found[name]!r}" for name in differing)
            raise ValueError(f"{out} holds scenes made with {described}; choose these, or another folder")
        return
    if any((out / split).is_dir() and any((out / split).iterdir()) for split in SPLITS):
        raise ValueError(f"{out} holds scenes already, and no {RECORD_NAME} that would say how they were made")
    out.mkdir(parents=True, exist_ok=True)
    write_json(path, {"version": FORMAT_VERSION, **asdict(settings)})


def read_settings(root: str | Path) -> Settings:
    """With which settings a folder of scenes was made; ValueError if it does not say so."""
    path = Path(root) / RECORD_NAME
    try:
        values = json.loads(path.read_text())
        version = values.pop("version")
        settings = Settings(**{name: tuple(v) if isinstance(v, list) else v for name, v in values.items()})
    except FileNotFoundError:
        raise ValueError(f"{root} has no {RECORD_NAME}: its scenes were not made by `data_prep.scenes synth`") from None
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise ValueError(f"{path} is damaged ({type(error).__name__}: {error})") from None
    if version != FORMAT_VERSION:
        raise ValueError(f"{path} is of version {version}, this is version {FORMAT_VERSION}: make the scenes anew")
    return settings


def true_scene(root: str | Path, split: str, scene_id: str) -> trimesh.Scene:
    """The very meshes that a made scene was rendered from, coloured and named as in its metadata."""
    scene = trimesh.Scene()
    for number, thing in enumerate(plan_scene(read_settings(root), split, int(scene_id))):
        mesh = thing.mesh()
        mesh.visual = trimesh.visual.ColorVisuals(mesh, face_colors=[*thing.color, 1.0])
        name = f"{thing.shape.family}_{number}"
        scene.add_geometry(mesh, node_name=name, geom_name=name)
    return scene
