"""Pictures of several objects with light, shadows and occlusion, written as BOP scenes.

Objects stand on the floor of a room, float in it, or float before a picture. A scene shows the same objects in each of
its pictures, otherwise placed, lit and seen. Everything is a function of seed, split and number, whatever
the number of processes. Lengths of a scene are in metres, or relative to its largest diameter where that is said.
"""

from __future__ import annotations

import functools
import os
import sys
import zlib
from collections.abc import Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Self

import numpy as np
import trimesh
from PIL import Image, ImageDraw
from pydantic import Field, model_validator
from scipy.ndimage import gaussian_filter
from scipy.spatial import ConvexHull
from scipy.spatial.transform import Rotation
from tqdm import tqdm
from trimesh.visual import TextureVisuals
from trimesh.visual.material import SimpleMaterial

from backlot.config import Section
from backlot.files import json_sha256, read_json, write_json
from backlot.mesh_views import Light, Views, instance_masks, render_views
from backlot.samples import derive_seed
from backlot.views import look_at_poses, view_directions
from data_prep.bop.format import CAMERA_NAME, RenderedFrame, RenderedObject, mask_box, write_scene, write_targets
from data_prep.bop.models import ModelInfo, Models, read_models, write_models
from data_prep.bop.procedural import make_objects

RECIPE_NAME = "query_scenes.json"
SYMMETRIC_SHARE = 4  # one object in so many
ANCHOR_VIEWS = 42  # from which turns in the picture are counted
PLAN_HEIGHT = 64  # pixels of the picture in which occlusion is judged before anything is rendered
PLACE_TRIES, SCENE_TRIES = 24, 8
SHRINK = 0.9  # of the objects, when they do not fit
APART = 0.42  # of the sum of two diameters: how near their centres may be
INSIDE = 0.85  # of an object: the least share of it within the picture
LIFT = 0.004  # diameters between the floor and what stands on it
ELEVATION, ROLL, YAW = (25.0, 75.0), 12.0, 40.0  # degrees: of the camera over the floor; of the room in the picture
FLOOR, WALL, WALL_DISTANCE = 9.0, 12.0, (1.5, 4.0)  # diameters: half a side of the floor; height; beyond what is seen
TEXTURE_SIZE, ROOM_DETAIL = 384, 2.5  # texels along floor and wall; how much finer than a backdrop's their patterns are
NO_ROOM = 0.25  # share of scenes before a picture
FLOATING = 0.3  # share of the pictures of a room in which nothing stands
GREY = (0.2126, 0.7152, 0.0722)


class SceneSettings(Section):
    """What query scenes look like."""

    image_size: tuple[int, int] = (640, 480)
    """width and height of the pictures in pixels"""
    images_per_scene: int = Field(25, ge=1)
    """pictures of the same objects"""
    num_objects: tuple[int, int] = (3, 6)
    """least and greatest of a picture"""
    object_sizes: tuple[float, float] = (0.33, 0.6)
    """diameters of objects in heights of the picture, least and greatest"""
    focal: tuple[float, float] = (1.0, 2.4)
    """focal lengths in heights of the picture, least and greatest; longer ones stand further off"""
    in_plane_degrees: float = Field(180, ge=0, le=180)
    """greatest turn in the picture, either way, from the nearest of 42 views"""
    occluded_share: float = Field(0.45, ge=0, le=1)
    """of the objects: are placed where they hide 20 to 60 % of another, or are so hidden"""
    hidden: tuple[float, float] = (0.2, 0.6)
    """what is hidden of these, least and greatest; the greatest holds for all"""
    shadows: bool = True
    """objects throw shadows on each other and the room"""
    supersample: int = Field(2, ge=1, le=8)
    """rays along a side of a pixel"""
    noise: float = Field(0.02, ge=0, le=0.5)
    """greatest deviation of a pixel, of the range of colours"""
    blur: float = Field(0.006, ge=0, le=0.1)
    """greatest deviation of the blur in heights of the picture"""

    @model_validator(mode="after")
    def check(self) -> Self:
        """Ranges the right way round."""
        for name in ("num_objects", "object_sizes", "focal", "hidden"):
            low, high = getattr(self, name)
            if not 0 <= low <= high:
                raise ValueError(f"`{name}` must be a least and a greatest number, got {low} {high}")
        if self.num_objects[0] < 1 or not 0 < self.object_sizes[0] <= self.object_sizes[1] <= 1 or self.hidden[1] >= 1:
            raise ValueError("`num_objects` begin with 1, `object_sizes` lie in (0, 1], `hidden` in [0, 1)")
        if min(self.image_size) < 8:
            raise ValueError(f"`image_size` must be at least 8 8, got {self.image_size[0]} {self.image_size[1]}")
        return self


# --- a dataset ------------------------------------------------------------------------------------------------------


def make_dataset(
    root: str | Path,
    seed: int,
    num_objects: int,
    num_images: int,
    image_size: tuple[int, int] | None = None,
    *,
    split: str = "train",
    num_symmetric: int | None = None,
    settings: SceneSettings | None = None,
    num_workers: int | None = None,
) -> None:
    """Make objects and a split of pictures of them: models, scenes and test_targets_bop19.json.

    Args:
        seed: of objects and pictures.
        image_size: width and height, instead of that of the settings.
        num_symmetric: objects with symmetries among all; a quarter by default.
        num_workers: processes; by default as many as there are processors, at most four.

    Raises:
        ValueError: the folder holds something that was made in another way.
    """
    settings = settings or SceneSettings()
    if image_size is not None:
        settings = SceneSettings(**(settings.model_dump() | {"image_size": image_size}))
    num_symmetric = num_objects // SYMMETRIC_SHARE if num_symmetric is None else num_symmetric
    recipe = {"seed": seed, "num_objects": num_objects, "num_symmetric": num_symmetric}
    if claim(Path(root) / "models", recipe):
        write_models(root, *make_objects(seed, num_objects, num_symmetric))
    make_scenes(root, seed, num_images, settings, split=split, num_workers=num_workers)
    write_targets(root, split)


def claim(folder: Path, recipe: Mapping[str, object]) -> bool:
    """Say in a folder what it is about to hold; returns whether it was not claimed before.

    Raises:
        ValueError: it holds what was made in another way.
    """
    path = folder / RECIPE_NAME
    if path.is_file():
        if (found := read_json(path)) != recipe:
            names = ", ".join(sorted(key for key in recipe if found.get(key) != recipe[key]))
            raise ValueError(f"{folder} was made with other values of {names}: remove it or choose another folder")
        return not (folder / "models_info.json").is_file()
    if folder.is_dir() and any(folder.iterdir()):
        raise ValueError(f"{folder} holds what was not made here: choose another folder")
    folder.mkdir(parents=True, exist_ok=True)
    write_json(path, dict(recipe))
    return True


def make_scenes(
    root: str | Path,
    seed: int,
    num_images: int,
    settings: SceneSettings,
    *,
    split: str = "train",
    num_workers: int | None = None,
) -> None:
    """Make a split of pictures of the objects in the folder `models`; what is there already is left as it is.

    Raises:
        ValueError: the split was made in another way, or the models are not usable.
    """
    root = Path(root)
    models = read_models(root / "models")
    if not models:
        raise ValueError(f"{root / 'models'} has no objects")
    drawn = json_sha256({str(key): model.diameter for key, model in models.items()})
    claim(root / split, {"seed": seed, "models": drawn, **settings.model_dump(mode="json")})
    numbers = range(-(-num_images // settings.images_per_scene))
    todo = [
        number for number in numbers if not is_whole(root, split, number, scene_length(number, num_images, settings))
    ]
    work = partial(
        make_scene, root=root, split=split, seed=seed, num_images=num_images, models=models, settings=settings
    )
    show = partial(tqdm, total=len(todo), desc=f"{split} scenes", unit="scene", disable=not sys.stderr.isatty())
    num_workers = min(os.cpu_count() or 1, 4) if num_workers is None else num_workers
    if num_workers > 1 and len(todo) > 1:
        with ProcessPoolExecutor(num_workers) as pool:
            for _ in show(pool.map(work, todo)):
                pass
    else:
        for number in show(todo):
            work(number)


def scene_length(number: int, num_images: int, settings: SceneSettings) -> int:
    return min(settings.images_per_scene, num_images - number * settings.images_per_scene)


def is_whole(root: Path, split: str, number: int, count: int) -> bool:
    path = root / split / f"{number:06d}" / CAMERA_NAME
    return path.is_file() and len(read_json(path)) == count


def make_scene(
    number: int, root: Path, split: str, seed: int, num_images: int, models: Models, settings: SceneSettings
) -> None:
    """Draw, render and write one scene."""
    seed = derive_seed(seed, zlib.crc32(split.encode()))
    scene = draw_scene(seed, number, models, settings)
    plans = [
        draw_plan(seed, number, image, scene, settings) for image in range(scene_length(number, num_images, settings))
    ]
    write_scene(root, split, number, render_plans(scene, plans, settings))


# --- what a scene shows ---------------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class Thing:
    """An object of a scene: its mesh in metres, `corners` (P, 3) of its convex hull, some of them, and diameter."""

    object_id: int
    mesh: trimesh.Trimesh
    corners: np.ndarray
    diameter: float


@dataclass(frozen=True, eq=False)
class SceneDraft:
    """The objects of a scene and its `room`, z up, floor at 0, wall at y = `wall`; None = they are before a picture."""

    things: tuple[Thing, ...]
    room: trimesh.Trimesh | None
    wall: float

    @property
    def unit(self) -> float:
        """The largest diameter in metres."""
        return max(thing.diameter for thing in self.things)


def load_thing(model: ModelInfo) -> Thing:
    mesh = model.load_mesh()
    farthest = (mesh.vertices @ view_directions(162).T).argmax(0)
    return Thing(model.object_id, mesh, np.asarray(mesh.vertices[np.unique(farthest)]), model.diameter)


def draw_scene(seed: int, number: int, models: Models, settings: SceneSettings) -> SceneDraft:
    """The objects and the room of a scene."""
    rng = np.random.default_rng(derive_seed(seed, number))
    low, high = settings.num_objects
    count = int(rng.integers(low, high + 1))
    things = tuple(load_thing(models[key]) for key in choose_objects(seed, number * high, count, sorted(models)))
    unit = max(thing.diameter for thing in things)
    wall = unit * rng.uniform(*WALL_DISTANCE)
    room = None if rng.random() < NO_ROOM else build_room(rng, unit, wall)
    return SceneDraft(things, room, wall)


def choose_objects(seed: int, position: int, count: int, ids: Sequence[int]) -> list[int]:
    """The next different objects from a position of an endless row in which all are equally frequent."""
    places = range(position, position + count)
    orders = {
        turn: np.random.default_rng(derive_seed(seed, turn, 0)).permutation(ids)
        for turn in {p // len(ids) for p in places}
    }
    return list(dict.fromkeys(int(orders[place // len(ids)][place % len(ids)]) for place in places))


def build_room(rng: np.random.Generator, unit: float, wall: float) -> trimesh.Trimesh:
    """A floor and the wall behind it, papered with one picture, whose left half is the floor's."""
    half, height = FLOOR * unit, WALL * unit
    points = np.array(
        [
            *([-half, -half, 0], [half, -half, 0], [half, wall, 0], [-half, wall, 0]),
            *([-half, wall, 0], [half, wall, 0], [half, wall, height], [-half, wall, height]),
        ]
    )
    left = np.array([[0.01, 0.01], [0.49, 0.01], [0.49, 0.99], [0.01, 0.99]])
    uv = np.concatenate([left, left + np.array([0.5, 0])])
    halves = [draw_texture(rng, (TEXTURE_SIZE, TEXTURE_SIZE), detail=ROOM_DETAIL) for _ in range(2)]
    faces = [[0, 1, 2], [0, 2, 3], [4, 5, 6], [4, 6, 7]]
    visual = TextureVisuals(uv=uv, material=SimpleMaterial(image=Image.fromarray(np.concatenate(halves, axis=1))))
    return trimesh.Trimesh(points, faces, visual=visual, process=False)


def draw_texture(rng: np.random.Generator, size: tuple[int, int], detail: float = 1.0) -> np.ndarray:
    """Tiles, planks, marble, terrazzo or clouds of colour: (height, width, 3) sRGB bytes.

    Args:
        detail: how much finer than usual it is.
    """
    height, width = size
    row, column = np.meshgrid(np.arange(height) / height, np.arange(width) / height, indexing="ij")
    colors = rng.uniform(0.15, 0.95, (3, 1)) + rng.normal(scale=rng.choice([0.03, 0.2]), size=(3, 3))
    cloud, grain = clouds(rng, size, 3 * detail), clouds(rng, size, 24 * detail)
    period = detail * rng.integers(4, 11)
    kind = rng.integers(5)
    if kind == 0:
        level = (np.floor(row * period) + np.floor(column * period)) % 2
    elif kind == 1:
        level = (np.floor(row * period) * 0.618034 + 0.3 * grain) % 1
    elif kind == 2:
        level = 0.5 + 0.5 * np.sin(2 * np.pi * (period * (row + column) / 2 + 1.5 * cloud))
    elif kind == 3:
        level = (clouds(rng, size, 16 * detail) > 0.8) + 0.5 * (clouds(rng, size, 24 * detail) > 1.0)
    else:
        level = 0.5 + 0.5 * cloud
    level = np.clip(level, 0, 1)[..., None]
    mixed = (1 - level) * colors[0] + level * colors[1] + 0.12 * cloud[..., None] * colors[2] + 0.04 * grain[..., None]
    return np.rint(255 * np.clip(mixed, 0.02, 1)).astype(np.uint8)


def clouds(rng: np.random.Generator, size: tuple[int, int], cells: float) -> np.ndarray:
    """Smooth noise (height, width) of about unit variance with this many cells along its height."""
    rows, columns = (np.arange(length) * cells / size[0] for length in size)
    coarse = gaussian_filter(rng.normal(size=(int(rows[-1]) + 4, int(columns[-1]) + 4)), 0.5) * 2
    top, left = rows.astype(np.int64), columns.astype(np.int64)
    down, right = smooth(rows - top)[:, None], smooth(columns - left)
    bands = coarse[:, left] * (1 - right) + coarse[:, left + 1] * right
    return bands[top] * (1 - down) + bands[top + 1] * down


def smooth(x: np.ndarray) -> np.ndarray:
    return x * x * (3 - 2 * x)


# --- where everything is in a picture -------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class Plan:
    """A picture to render: `K` (3, 3); `poses` camera_from_object (O, 4, 4), those of the things and the room's."""

    K: np.ndarray
    poses: np.ndarray
    light: Light
    seed: int


@dataclass(frozen=True, eq=False)
class Stage:
    """Where objects can be: before a camera, above the plane `up` . x = -`height` where there is a room.

    Attributes:
        distance: metres to what the middle of the picture shows.
        room: camera_from_room (4, 4).
        wall: distance of the wall from the room's origin.
        standing: whether objects stand on the floor.
    """

    K: np.ndarray
    distance: float
    room: np.ndarray | None
    wall: float
    standing: bool


def draw_plan(seed: int, number: int, image: int, scene: SceneDraft, settings: SceneSettings) -> Plan:
    """Camera, poses and light of a picture."""
    rng = np.random.default_rng(derive_seed(seed, number, image, 1))
    size = rng.uniform(*settings.object_sizes) / SHRINK
    poses = None
    while poses is None:
        size *= SHRINK
        for _ in range(SCENE_TRIES):
            stage = draw_stage(rng, scene, size, settings)
            poses = place_things(rng, scene, stage, settings)
            if poses is not None:
                break
    if stage.room is not None:
        poses = [*poses, stage.room]
    light = draw_light(rng, stage.room)
    return Plan(stage.K, np.stack(poses), light, derive_seed(seed, number, image, 2))


def draw_stage(rng: np.random.Generator, scene: SceneDraft, size: float, settings: SceneSettings) -> Stage:
    """A camera that sees objects of mean diameter in `size` heights of the picture, and the room before it."""
    width, height = settings.image_size
    focal = height * rng.uniform(*settings.focal)
    middle = (np.array([width, height]) - 1) / 2 + rng.uniform(-0.03, 0.03, 2) * height
    K = np.array([[focal, 0, middle[0]], [0, focal, middle[1]], [0, 0, 1]])
    distance = focal * float(np.mean([thing.diameter for thing in scene.things])) / (size * height)
    if scene.room is None:
        return Stage(K, distance, None, 0.0, False)
    elevation, roll, yaw = np.radians([rng.uniform(*ELEVATION), rng.uniform(-ROLL, ROLL), rng.uniform(-YAW, YAW)])
    standing = rng.random() >= FLOATING
    turn = Rotation.from_euler("z", roll).as_matrix()
    up = turn @ [0, -np.cos(elevation), -np.sin(elevation)]
    ahead = turn @ [0, -np.sin(elevation), np.cos(elevation)]
    ahead = Rotation.from_rotvec(yaw * up).as_matrix() @ ahead
    room = np.eye(4)
    room[:3, :3] = np.stack([np.cross(ahead, up), ahead, up], axis=1)
    room[2, 3] = distance
    if not standing:
        room[:3, 3] -= up * scene.unit * rng.uniform(0.8, 1.5)
    return Stage(K, distance, room, scene.wall, standing)


def place_things(
    rng: np.random.Generator, scene: SceneDraft, stage: Stage, settings: SceneSettings
) -> list[np.ndarray] | None:
    """Poses of all objects, or None if one finds no place."""
    sketch = Sketch(stage.K, settings)
    poses: list[np.ndarray] = []
    for thing in scene.things:
        crowded = bool(poses) and rng.random() < settings.occluded_share
        candidates = draw_poses(rng, thing, draw_pixels(rng, sketch, crowded, settings), stage, settings)
        fits = np.flatnonzero(~touching(candidates, thing, poses, scene) & sized(candidates, thing, stage, settings))
        for attempt in fits:
            pose = candidates[attempt]
            must_hide = crowded and attempt < PLACE_TRIES // 2
            if sketch.add(thing.corners @ pose[:3, :3].T + pose[:3, 3], pose[2, 3], must_hide):
                poses.append(pose)
                break
        else:
            return None
    return poses


def draw_pixels(rng: np.random.Generator, sketch: Sketch, crowded: bool, settings: SceneSettings) -> np.ndarray:
    """Where the centre of an object may appear: (PLACE_TRIES, 2) anywhere, or near objects that are there."""
    size = np.array(settings.image_size)
    if not crowded:
        return rng.uniform(0.12, 0.88, (PLACE_TRIES, 2)) * size
    places = np.stack(sketch.centres)[rng.integers(len(sketch.centres), size=PLACE_TRIES)]
    angle = rng.uniform(0, 2 * np.pi, PLACE_TRIES)
    reach = rng.uniform(0.35, 0.8, PLACE_TRIES) * np.mean(settings.object_sizes) * size[1]
    places = places + reach[:, None] * np.stack([np.cos(angle), np.sin(angle)], axis=1)
    return np.clip(places, 0.1 * size, 0.9 * size)


def draw_poses(
    rng: np.random.Generator, thing: Thing, pixels: np.ndarray, stage: Stage, settings: SceneSettings
) -> np.ndarray:
    """camera_from_object (P, 4, 4) of an object that appears about pixels (P, 2); depth 0 where it has no place."""
    rays = np.column_stack([pixels, np.ones(len(pixels))]) @ np.linalg.inv(stage.K).T
    rotation = shortest(np.array([0.0, 0.0, 1.0]), rays) @ draw_views(
        rng, len(rays), np.radians(settings.in_plane_degrees)
    )
    depth = stage.distance * rng.uniform(0.8, 1.3, len(rays))
    if stage.room is not None:
        ahead, up, origin = stage.room[:3, 1], stage.room[:3, 2], stage.room[:3, 3]
        rest = (up @ rotation @ thing.corners.T).min(-1) - LIFT * thing.diameter
        ground = (up @ origin - rest) / np.minimum(rays @ up, -1e-9)
        if stage.standing:
            depth = ground
        beyond = depth * (rays @ ahead) - ahead @ origin + thing.diameter / 2 > stage.wall
        depth = np.where(beyond | (depth > ground), 0.0, depth)
    poses = np.tile(np.eye(4), (len(rays), 1, 1))
    poses[:, :3, :3], poses[:, :3, 3] = rotation, depth[:, None] * rays
    return poses


def sized(poses: np.ndarray, thing: Thing, stage: Stage, settings: SceneSettings) -> np.ndarray:
    """Whether an object in poses (P, 4, 4) appears about as large as it should."""
    low, high = settings.object_sizes
    size = stage.K[0, 0] * thing.diameter / np.maximum(poses[:, 2, 3], 1e-9) / settings.image_size[1]
    return (0.8 * low <= size) & (size <= 1.2 * high)


def touching(poses: np.ndarray, thing: Thing, others: Sequence[np.ndarray], scene: SceneDraft) -> np.ndarray:
    """Whether an object in poses (P, 4, 4) would come too near to one that is there."""
    result = np.zeros(len(poses), bool)
    for other, there in zip(others, scene.things, strict=False):
        apart = np.linalg.norm(poses[:, :3, 3] - other[:3, 3], axis=1)
        result |= apart < APART * (thing.diameter + there.diameter)
    return result


@functools.cache
def anchors() -> tuple[np.ndarray, np.ndarray]:
    directions = view_directions(ANCHOR_VIEWS)
    return directions, look_at_poses(directions, 1.0)[:, :3, :3]


def draw_views(rng: np.random.Generator, count: int, in_plane: float) -> np.ndarray:
    """Rotations (count, 3, 3): seen from directions evenly on the sphere, turned in the picture by at most `in_plane`
    radians from the nearest template, which is tilted on the shortest way.
    """
    towards = rng.normal(size=(count, 3))
    towards /= np.linalg.norm(towards, axis=1, keepdims=True)
    directions, rotations = anchors()
    nearest = (towards @ directions.T).argmax(1)
    tilt = shortest(directions[nearest], towards)
    turn = Rotation.from_euler("z", rng.uniform(-in_plane, in_plane, (count, 1))).as_matrix()
    return turn @ rotations[nearest] @ tilt.transpose(0, 2, 1)


def shortest(start: np.ndarray, end: np.ndarray) -> np.ndarray:
    """The smallest rotations (P, 3, 3) that take unit vectors (P, 3) or (3,) to the directions (P, 3), not opposite."""
    end = end / np.linalg.norm(end, axis=1, keepdims=True)
    x, y, z = np.cross(start, end).T
    zero = np.zeros_like(x)
    skew = np.stack([zero, -z, y, z, zero, -x, -y, x, zero], axis=1).reshape(-1, 3, 3)
    return np.eye(3) + skew + skew @ skew / (1 + (start * end).sum(-1))[:, None, None]


class Sketch:
    """Convex outlines of objects in a small picture, to judge what hides what before anything is rendered."""

    def __init__(self, intrinsics: np.ndarray, settings: SceneSettings) -> None:
        width, height = settings.image_size
        self.scale = PLAN_HEIGHT / height
        self.margin = PLAN_HEIGHT // 2
        self.size = round(width * self.scale), PLAN_HEIGHT
        self.K, self.hidden = intrinsics, settings.hidden
        self.centres: list[np.ndarray] = []
        self.depths: list[float] = []
        self.outlines: list[np.ndarray] = []

    def add(self, corners: np.ndarray, depth: float, crowded: bool) -> bool:
        """Add an object if it is inside the picture, and hides and is hidden as it should.

        Args:
            corners: (P, 3) of its hull, in the camera's axes.
            crowded: something must be hidden, of it or by it.
        """
        if corners[:, 2].min() <= 0:
            return False
        pixels = corners @ self.K.T
        pixels = pixels[:, :2] / pixels[:, 2:]
        outline = self.draw(pixels[ConvexHull(pixels).vertices])
        m, (width, height) = self.margin, self.size
        if outline[m : m + height, m : m + width].sum() < INSIDE * outline.sum():
            return False
        outlines, depths = [*self.outlines, outline], [*self.depths, depth]
        shares = hidden_shares(outlines, depths)
        before = [*hidden_shares(self.outlines, self.depths), 0.0]
        change = max(new - old for new, old in zip(shares, before, strict=True))
        low, high = self.hidden
        if max(shares) > high or (crowded and change < low):
            return False
        self.outlines, self.depths = outlines, depths
        self.centres.append(pixels.mean(0))
        return True

    def draw(self, polygon: np.ndarray) -> np.ndarray:
        """Its pixels, and those of a margin: (H + 2 margin, W + 2 margin) bool."""
        width, height = self.size
        picture = Image.new("1", (width + 2 * self.margin, height + 2 * self.margin))
        ImageDraw.Draw(picture).polygon([tuple(p) for p in polygon * self.scale + self.margin], fill=1)
        return np.asarray(picture)


def hidden_shares(outlines: Sequence[np.ndarray], depths: Sequence[float]) -> list[float]:
    """What nearer outlines cover of each."""
    shares = []
    for outline, depth in zip(outlines, depths, strict=True):
        nearer = [other for other, there in zip(outlines, depths, strict=True) if there < depth]
        covered = np.logical_or.reduce(nearer) & outline if nearer else np.zeros_like(outline)
        shares.append(float(covered.sum() / max(outline.sum(), 1)))
    return shares


def draw_light(rng: np.random.Generator, room: np.ndarray | None) -> Light:
    """A lamp on the camera's side, above the floor and before the wall."""
    while True:
        direction = rng.normal(size=3)
        direction /= np.linalg.norm(direction)
        if direction[2] > 0.2:
            continue
        if room is None or (direction @ room[:3, 2] > 0.35 and direction @ room[:3, 1] < -0.1):
            break
    colour = rng.uniform(0.8, 1.3) * rng.uniform(0.88, 1.0, 3)
    return Light(tuple(direction.tolist()), float(rng.uniform(0.25, 0.6)), tuple(colour.tolist()))


# --- pictures -------------------------------------------------------------------------------------------------------


def render_plans(scene: SceneDraft, plans: Sequence[Plan], settings: SceneSettings) -> list[RenderedFrame]:
    """The pictures of a scene, with masks."""
    width, height = settings.image_size
    meshes = [thing.mesh for thing in scene.things]
    count, pad = len(meshes), height // 3
    poses, K = np.stack([plan.poses for plan in plans]), np.stack([plan.K for plan in plans])
    views = render_views(
        meshes if scene.room is None else [*meshes, scene.room],
        poses,
        K,
        (height, width),
        light=[plan.light for plan in plans],
        supersample=settings.supersample,
        shadows=settings.shadows,
        backend="zbuffer",
    )
    shifted = np.array([[1, 0, pad], [0, 1, pad], [0, 0, 1]]) @ K
    silhouettes = instance_masks(meshes, poses[:, :count], shifted, (height + 2 * pad, width + 2 * pad))
    return [build_frame(scene, plans[k], k, views, silhouettes[k], pad, settings) for k in range(len(plans))]


def build_frame(
    scene: SceneDraft, plan: Plan, number: int, views: Views, silhouettes: np.ndarray, pad: int, settings: SceneSettings
) -> RenderedFrame:
    """One picture; `silhouettes` (O, H + 2 pad, W + 2 pad) reach beyond its edges."""
    visible = views.masks(len(scene.things))[number]
    height, width = visible.shape[1:]
    objects = []
    for thing, pose, seen, whole in zip(scene.things, plan.poses, visible, silhouettes, strict=False):
        box = mask_box(whole) - pad
        mask = whole[pad : pad + height, pad : pad + width]
        objects.append(RenderedObject(thing.object_id, pose, mask, seen & mask, box, int(whole.sum())))
    rng = np.random.default_rng(plan.seed)
    rgb = photograph(rng, views.rgb[number], views.instances[number] >= 0, settings)
    return RenderedFrame(number, rgb, views.depth[number], plan.K, objects)


def photograph(rng: np.random.Generator, rgb: np.ndarray, covered: np.ndarray, settings: SceneSettings) -> np.ndarray:
    """What the camera makes of a rendering (H, W, 3): a picture behind it, blur, colour balance and noise."""
    if not covered.all():
        rgb = np.where(covered[..., None], rgb, draw_texture(rng, covered.shape))
    picture = rgb.astype(np.float32) / 255
    blur = rng.uniform(0, settings.blur) * len(rgb)
    picture = gaussian_filter(picture, (blur, blur, 0))
    saturation, balance = rng.uniform(0.85, 1.1), rng.uniform(0.92, 1.05, 3).astype(np.float32)
    grey = picture @ np.array(GREY, np.float32)
    picture = (grey[..., None] + saturation * (picture - grey[..., None])) * balance
    deviation = rng.uniform(0, settings.noise)
    picture += deviation * np.sqrt(0.3 + picture.clip(0)) * rng.standard_normal(picture.shape, np.float32)
    return np.rint(255 * np.clip(picture, 0, 1)).astype(np.uint8)
