"""How good a scene model is: its scenes of a data set, and what is measured on them."""

from __future__ import annotations

import hashlib
import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import trimesh
from torch import Tensor
from tqdm import tqdm

from backlot.rendering import object_color
from data_prep.scenes.dataset import SceneDataset
from data_prep.scenes.format import find_file, read_metadata, read_tensors, unpack_occupancy
from evaluation.shortcut_scene.metrics import (
    RADIUS,
    TAU,
    Boxes,
    chamfer,
    collision_rate,
    coverage_ceiling,
    f_score,
    fitted,
    floor_gaps,
    iou_b,
    match,
    occupancy_iou,
    pose_errors,
    voxelise,
)
from pipelines.shortcut_scene.meshes import mesh_from_logits, place
from pipelines.shortcut_scene.pipeline import ShortcutScenePipeline, build_scene, read_poses
from pipelines.shortcut_scene.vae import OccupancyVAE

STEPS = (1, 2, 4, 8, 32)
SCENE_POINTS, OBJECT_POINTS = 8192, 2048  # on surfaces, for Chamfer distance and F-score
SCENE_VOXELS = 64  # along each side of the grid of a scene
LAYOUT_METRICS = ("coverage", "distance", "collision", "floor_gap", "log_scale_error", "rotation_error_deg")
SHAPE_METRICS = (
    *("chamfer_scene", "f_score_scene", "occupancy_iou_scene"),
    *("chamfer_object", "f_score_object", "occupancy_iou_object", "iou_b"),
)


@dataclass(frozen=True)
class Objects:
    """The objects of a scene.

    Args:
        cubes: where their canonical cubes lie.
        shapes: (N, R, R, R) bool or logits of what is in them.
        is_fitted: shapes do not fill their cubes: boxes are measured from what is occupied.
    """

    cubes: Boxes
    shapes: np.ndarray | None = None
    is_fitted: bool = False

    @property
    def boxes(self) -> Boxes:
        """What of the scene each object takes up."""
        return fitted(self.cubes, self.occupancy) if self.is_fitted and self.shapes is not None else self.cubes

    @property
    def occupancy(self) -> np.ndarray:
        return self.shapes if self.shapes.dtype == bool else self.shapes > 0

    @property
    def logits(self) -> np.ndarray:
        return np.where(self.shapes, 10.0, -10.0) if self.shapes.dtype == bool else self.shapes

    def meshes(self) -> list[trimesh.Trimesh]:
        """Of each object, in its canonical cube."""
        return [mesh_from_logits(logits) for logits in self.logits]

    def scene(self, colors: Sequence[Sequence[float]] | None = None) -> trimesh.Scene:
        """With a named and coloured node for each; boxes where shapes are not known."""
        logits = None if self.shapes is None else self.logits
        return build_scene(self.cubes.centre, self.cubes.rotation, self.cubes.size, logits, colors)

    def placed(self, meshes: list[trimesh.Trimesh]) -> trimesh.Trimesh:
        """All of them where they lie in the scene, as one mesh."""
        poses = zip(self.cubes.rotation, np.log(self.cubes.size), self.cubes.centre, strict=True)
        return trimesh.util.concatenate([place(mesh, *pose) for mesh, pose in zip(meshes, poses, strict=True)])


# --- predictions ----------------------------------------------------------------------------------------------------


def noise_generator(seed: int, scene_id: str) -> torch.Generator:
    """The noise of one scene: a function of seed and name, on the CPU whatever the device."""
    digest = hashlib.sha256(f"{seed} {scene_id}".encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8]) >> 1)


def needed_conditions(pipeline: ShortcutScenePipeline) -> tuple[str, ...]:
    """What a data set must have for this model, by the names of `SceneDataset`."""
    config = pipeline.transformer.config
    if config.condition == "tokens":
        return ("cond_tokens",) if pipeline.image_encoder is None else ("image",)
    if config.condition == "none":
        return ()
    pointmap = ("pointmap",) if config.condition_channels == 6 else ()
    return ("image", *pointmap, *(("masks",) if config.object_condition == "mask" else ()))


def generate(
    pipeline: ShortcutScenePipeline,
    dataset: SceneDataset,
    steps: int,
    use_shortcut: bool = True,
    batch_size: int = 32,
    seed: int = 0,
    num_draws: int = 1,
    *,
    guidance_scale: float = 1.0,
    with_shapes: bool = False,
    num_scenes: int | None = None,
) -> list[list[Objects]]:
    """A scene for every scene of a data set, with as many objects; switches the pipeline's progress bar off.

    A scene's noise is made from seed + draw and its name, so neither the batches nor its neighbours matter to it.

    Args:
        dataset: as `data_prep.scenes.dataset.SceneDataset`, with what `needed_conditions` names.
        steps: equal steps.
        num_draws: noises per scene.
        with_shapes: decode shapes, too, by the pipeline's VAE.
        num_scenes: only the first ones.

    Returns:
        For every draw a list of scenes.

    Raises:
        ValueError: an argument is out of range, the scenes are not finite, or what data set and pipeline refuse.
    """
    drawn: list[list[Objects]] = [[] for _ in range(num_draws)]
    settings = {"use_shortcut": use_shortcut, "guidance_scale": guidance_scale, "with_shapes": with_shapes}
    for rows in batches(dataset, batch_size, num_scenes):
        items = [dataset[row] for row in rows]
        names = [dataset.scene_ids[row] for row in rows]
        for draw, scenes in enumerate(drawn):
            scenes += predict(pipeline, items, names, steps, seed=seed + draw, **settings)
    return drawn


def batches(dataset: SceneDataset, batch_size: int, num_scenes: int | None = None) -> Iterator[range]:
    """Rows of a data set that go through the network together."""
    if batch_size < 1 or (num_scenes is not None and num_scenes < 1):
        raise ValueError(f"`batch_size` and `num_scenes` must be at least 1, got {batch_size} and {num_scenes}")
    count = len(dataset) if num_scenes is None else min(len(dataset), num_scenes)
    for start in range(0, count, batch_size):
        yield range(start, min(start + batch_size, count))


def predict(
    pipeline: ShortcutScenePipeline,
    items: Sequence[dict[str, Tensor]],
    scene_ids: Sequence[str],
    steps: int,
    *,
    use_shortcut: bool,
    guidance_scale: float,
    with_shapes: bool,
    seed: int,
) -> list[Objects]:
    """The scenes of one batch of a data set's items; ValueError if they are not finite."""
    pipeline.set_progress_bar_config(disable=True)
    told = {name: [unpad(name, item) for item in items] for name in needed_conditions(pipeline)}
    output = pipeline(
        **told,
        num_objects=[int(item["object_mask"].sum()) for item in items],
        num_inference_steps=steps,
        use_shortcut=use_shortcut,
        guidance_scale=guidance_scale,
        generator=[noise_generator(seed, scene_id) for scene_id in scene_ids],
        output_type="np" if with_shapes else "latent",
    )
    if not all(x.isfinite().all() for x in output.latents.values()):
        raise ValueError(f"the scenes of {steps} steps are not finite, this model has diverged")
    poses = read_poses(output.latents)
    scenes = []
    for i, objects in enumerate(output.poses):
        cubes = to_boxes({name: x[i, : len(objects)] for name, x in poses.items()})
        shapes = output.scenes[i]["logits"] if with_shapes else None
        scenes.append(Objects(cubes, shapes, pipeline.codec.config.isotropic_scale))
    return scenes


def unpad(name: str, item: dict[str, Tensor]) -> Tensor:
    """A condition of a data set's item without what fills it up to the size of its batch."""
    value = item[name]
    if name == "masks" or (name == "cond_tokens" and value.ndim == 3):
        value = value[item["object_mask"]]
    return value[..., item["cond_mask"], :] if name == "cond_tokens" and "cond_mask" in item else value


def true_objects(
    pipeline: ShortcutScenePipeline, dataset: SceneDataset, row: int, item: dict[str, Tensor], with_shapes: bool = False
) -> Objects:
    """The scene of a data set's item; shapes as they were before encoding where that is stored, else as decoded."""
    raw = {name: item[name][item["object_mask"]] for name in pipeline.modalities if name in item}
    raw = raw if dataset.codec is None else dataset.codec.decode(raw)
    poses = read_poses({name: x[None] for name, x in raw.items()})
    cubes = to_boxes({name: x[0] for name, x in poses.items()})
    shapes = None
    if with_shapes:
        shapes = stored_occupancy(dataset, row)
        if shapes is None or shapes.shape != (len(cubes), *[pipeline.vae.config.sample_size] * 3):
            shapes = pipeline.decode_shapes(raw["shape"]) > 0
    return Objects(cubes, shapes, pipeline.codec.config.isotropic_scale)


def stored_occupancy(dataset: SceneDataset, row: int) -> np.ndarray | None:
    """The grids (N, R, R, R) that a scene's shapes were encoded from, if they are there."""
    folder = Path(dataset.root) / dataset.split / dataset.scene_ids[row]
    if find_file(folder, "shapes") is None:
        return None
    return unpack_occupancy(read_tensors(folder, "shapes")["occupancy"], read_metadata(folder)["resolution"])


def to_boxes(poses: dict[str, np.ndarray]) -> Boxes:
    return Boxes(*(poses[name].astype(float) for name in ("rotation", "size", "translation")))


def show(
    pipeline: ShortcutScenePipeline,
    dataset: SceneDataset,
    rows: Sequence[int],
    steps: Sequence[int],
    seed: int = 0,
    use_shortcut: bool = True,
) -> list[list[trimesh.Scene]]:
    """Scenes to look at: the true ones of some rows of a data set, then for each step count those of the model.

    The model takes shortcuts if it knows step sizes and `use_shortcut` is set. Its noise is that of `generate`. True
    objects have the colours of the scene's metadata, generated ones that of the nearest true one in a one-to-one match;
    without a VAE they are boxes.
    """
    items, names = [dataset[row] for row in rows], [dataset.scene_ids[row] for row in rows]
    has_vae = pipeline.vae is not None
    shown = [[true_objects(pipeline, dataset, *both, has_vae) for both in zip(rows, items, strict=True)]]
    use_shortcut = use_shortcut and pipeline.transformer.config.use_shortcut
    settings = {"use_shortcut": use_shortcut, "guidance_scale": 1.0, "seed": seed}
    shown += [predict(pipeline, items, names, count, with_shapes=has_vae, **settings) for count in steps]
    colors = [true_colors(dataset, row, len(objects.cubes)) for row, objects in zip(rows, shown[0], strict=True)]
    matches = [
        [match(true.cubes.centre, objects.cubes.centre)[0] for true, objects in zip(shown[0], scenes, strict=True)]
        for scenes in shown
    ]
    return [
        [objects.scene(known[order]) for objects, known, order in zip(scenes, colors, orders, strict=True)]
        for scenes, orders in zip(shown, matches, strict=True)
    ]


def true_colors(dataset: SceneDataset, row: int, count: int) -> np.ndarray:
    """(count, 3) sRGB in [0, 1]: what the scene's metadata say, or the palette."""
    given = read_metadata(Path(dataset.root) / dataset.split / dataset.scene_ids[row]).get("colors") or []
    return np.array(given if len(given) == count else [object_color(number) for number in range(count)])


# --- measures -------------------------------------------------------------------------------------------------------


def measure_layout(
    predicted: Objects, true: Objects, *, is_ordered: bool = False, has_floor: bool = True, quarter_turns: bool = False
) -> dict[str, float]:
    """What is measured of the poses of one scene; see `evaluation.shortcut_scene.metrics`.

    Args:
        is_ordered: prediction i is object i, otherwise they are matched by position.
        has_floor: z = 0 is one.
        quarter_turns: a box turned by 90 degrees with its sides exchanged is the same box.

    Returns:
        `LAYOUT_METRICS`: `coverage`, share of objects less than 0.15 m from their match; `distance` of the matches in
        m; `collision`, share of colliding pairs; `floor_gap` in m; `log_scale_error`, `rotation_error_deg` of the
        matches. All are means over the scene; NaN where there is nothing to measure.
    """
    rows, columns = pair(predicted, true, is_ordered)
    distances = np.linalg.norm(predicted.cubes.centre[rows] - true.cubes.centre[columns], axis=1)
    angles, ratios = pose_errors(predicted.cubes[rows], true.cubes[columns], quarter_turns)
    return {
        "coverage": float((distances < RADIUS).mean()),
        "distance": float(distances.mean()),
        **measure_coherence(predicted, has_floor),
        "log_scale_error": float(ratios.mean()),
        "rotation_error_deg": float(angles.mean()),
    }


def measure_coherence(objects: Objects, has_floor: bool = True) -> dict[str, float]:
    """`collision` and `floor_gap` of `measure_layout`, which need no truth."""
    boxes = objects.boxes
    return {"collision": collision_rate(boxes), "floor_gap": float(floor_gaps(boxes).mean()) if has_floor else np.nan}


def measure_shapes(predicted: Objects, true: Objects, *, is_ordered: bool = False) -> dict[str, float]:
    """What is measured of the shapes of one scene; slow, it makes meshes.

    Returns:
        `SHAPE_METRICS`. `..._scene`, of all objects together in the scene's frame: `chamfer` (sum of two means, m),
        `f_score` (tau 0.1 m), `occupancy_iou` of 64^3 voxels around both scenes. `..._object`, means over matched
        objects, each in its canonical cube of side 1, so that only shape counts. `iou_b`, of their axis-aligned boxes
        in the scene.
    """
    rows, columns = pair(predicted, true, is_ordered)
    meshes = predicted.meshes(), true.meshes()
    scenes = [
        surface(objects.placed(own), SCENE_POINTS) for objects, own in zip((predicted, true), meshes, strict=True)
    ]
    corners = np.concatenate([*predicted.boxes.bounds(), *true.boxes.bounds()])
    solids = [voxelise(x.cubes, x.occupancy, corners.min(0), corners.max(0), SCENE_VOXELS) for x in (predicted, true)]
    clouds = [[surface(mesh, OBJECT_POINTS) for mesh in own] for own in meshes]
    objects = [(clouds[0][i], clouds[1][j]) for i, j in zip(rows, columns, strict=True)]
    grids = [(predicted.occupancy[i], true.occupancy[j]) for i, j in zip(rows, columns, strict=True)]
    return {
        "chamfer_scene": chamfer(*scenes),
        "f_score_scene": f_score(*scenes, TAU),
        "occupancy_iou_scene": occupancy_iou(*solids),
        "chamfer_object": float(np.mean([chamfer(a, b) for a, b in objects])),
        "f_score_object": float(np.mean([f_score(a, b, TAU) for a, b in objects])),
        "occupancy_iou_object": float(np.mean([occupancy_iou(a, b) for a, b in grids])),
        "iou_b": float(iou_b(predicted.boxes[rows], true.boxes[columns]).mean()),
    }


@torch.no_grad()
def measure_vae(vae: OccupancyVAE, dataset: SceneDataset, num_scenes: int | None = None) -> float:
    """Mean `occupancy_iou` of a data set's stored grids with what the VAE makes of them, over objects.

    Raises:
        ValueError: a scene has no shapes.safetensors.
    """
    ious = []
    for rows in batches(dataset, 1, num_scenes):
        grids = stored_occupancy(dataset, rows[0])
        if grids is None:
            raise ValueError(f"scene {dataset.scene_ids[rows[0]]!r} has no shapes.safetensors to compare with")
        latents = vae.encode(torch.from_numpy(grids)[:, None].to(vae.device, vae.dtype)).latent_dist.mode()
        decoded = vae.decode(latents).sample[:, 0].cpu().numpy() > 0
        ious += [occupancy_iou(a, b) for a, b in zip(decoded, grids, strict=True)]
    return float(np.mean(ious))


def pair(predicted: Objects, true: Objects, is_ordered: bool) -> tuple[np.ndarray, np.ndarray]:
    """Indices of predicted objects and of the true ones that they are compared with."""
    if is_ordered:
        return (np.arange(len(true.cubes)),) * 2
    return match(predicted.cubes.centre, true.cubes.centre)


def surface(mesh: trimesh.Trimesh, count: int) -> np.ndarray:
    """Points (count, 3), the same every time."""
    return np.asarray(trimesh.sample.sample_surface(mesh, count, seed=0)[0])


def evaluate(
    pipeline: ShortcutScenePipeline,
    dataset: SceneDataset,
    steps: Sequence[int] = STEPS,
    flow_steps: Sequence[int] = (),
    num_draws: int = 1,
    *,
    with_shapes: bool = False,
    has_floor: bool = True,
    quarter_turns: bool = False,
    guidance_scale: float = 1.0,
    num_scenes: int | None = None,
    seed: int = 0,
    batch_size: int = 32,
    show_progress: bool = False,
) -> dict:
    """Measure a model on a data set, beside the true scenes and what independent draws of objects could reach.

    Args:
        dataset: with what `needed_conditions` names, and all objects of each scene.
        steps: step counts with shortcuts; flow steps for a network that does not know step sizes.
        flow_steps: step counts of plain Euler with the same weights.
        num_draws: noises per scene; draw k is `generate` with seed + k.
        with_shapes: `SHAPE_METRICS`, too; slow.
        has_floor, quarter_turns: see `measure_layout`.
        guidance_scale: of the pipeline.
        num_scenes: only the first ones.

    Returns:
        Numbers for JSON: `shortcut` and `flow` hold for each step count ("1", ...) {"mean", "stderr"} of every metric
        over scenes (of a scene the mean over draws), None where nothing could be measured; `true` the `collision` and
        `floor_gap` of the data; `independent_draws` the mean of 1 - (1 - 1/N)^N, the `coverage` that draws of single
        objects reach at best. Then what one must know to compare them: `num_scenes`, `num_draws`, `seed`,
        `guidance_scale`, `alignment`, `matching` (`position` or `order`), `radius` and `tau` in m.

    Raises:
        ValueError: an argument is wrong, or the scenes are not finite.
    """
    check_evaluation(pipeline, steps, flow_steps, num_draws, with_shapes)
    knows_steps = pipeline.transformer.config.use_shortcut
    rows = [("shortcut" if knows_steps else "flow", count) for count in steps] + [("flow", n) for n in flow_steps]
    rows = list(dict.fromkeys(rows))
    chunks = list(batches(dataset, batch_size, num_scenes))
    count = chunks[-1].stop
    # boxes of shapes that do not fill their cubes are not known without them
    needs_shapes = with_shapes or (pipeline.codec.config.isotropic_scale and pipeline.vae is not None)
    tables = {name: Table(num_draws, count) for name in (*rows, "true", "independent_draws")}
    is_ordered = has_order(pipeline, dataset[0])

    rules = {"is_ordered": is_ordered, "has_floor": has_floor, "quarter_turns": quarter_turns}
    settings = {"guidance_scale": guidance_scale, "with_shapes": needs_shapes}
    with tqdm(total=count * num_draws * len(rows), unit="scene", disable=not show_progress) as progress:
        for places in chunks:
            items, names = [dataset[place] for place in places], [dataset.scene_ids[place] for place in places]
            true = [true_objects(pipeline, dataset, *both, needs_shapes) for both in zip(places, items, strict=True)]
            for place, scene in zip(places, true, strict=True):
                tables["true"].add(0, place, measure_coherence(scene, has_floor))
                tables["independent_draws"].add(0, place, {"coverage": coverage_ceiling(len(scene.cubes))})
            for row, draw in itertools.product(rows, range(num_draws)):
                settings |= {"use_shortcut": row[0] == "shortcut", "seed": seed + draw}
                predicted = predict(pipeline, items, names, row[1], **settings)
                for place, ours, theirs in zip(places, predicted, true, strict=True):
                    tables[row].add(draw, place, compare(ours, theirs, with_shapes, **rules))
                progress.update(len(items))

    return {
        "num_scenes": count,
        "num_draws": num_draws,
        "seed": seed,
        "guidance_scale": guidance_scale,
        "alignment": "none",
        "matching": "order" if is_ordered else "position",
        "quarter_turns": quarter_turns,
        "radius": RADIUS,
        "tau": TAU,
        "true": tables["true"].report(),
        "independent_draws": tables["independent_draws"].report(),
        "shortcut": {str(n): tables[kind, n].report() for kind, n in rows if kind == "shortcut"},
        "flow": {str(n): tables[kind, n].report() for kind, n in rows if kind == "flow"},
    }


def check_evaluation(
    pipeline: ShortcutScenePipeline,
    steps: Sequence[int],
    flow_steps: Sequence[int],
    num_draws: int,
    with_shapes: bool,
) -> None:
    """ValueError for arguments of `evaluate` that leave nothing to measure."""
    if not steps and not flow_steps:
        raise ValueError("`steps` and `flow_steps` must not both be empty")
    if num_draws < 1:
        raise ValueError(f"`num_draws` must be at least 1, got {num_draws}")
    if with_shapes and pipeline.vae is None:
        raise ValueError("`with_shapes` must be False: this pipeline has no VAE")


def compare(
    predicted: Objects, true: Objects, with_shapes: bool, *, is_ordered: bool, has_floor: bool, quarter_turns: bool
) -> dict[str, float]:
    """`measure_layout`, and `measure_shapes` on request."""
    measured = measure_layout(predicted, true, is_ordered=is_ordered, has_floor=has_floor, quarter_turns=quarter_turns)
    return measured | (measure_shapes(predicted, true, is_ordered=is_ordered) if with_shapes else {})


def has_order(pipeline: ShortcutScenePipeline, item: dict[str, Tensor]) -> bool:
    """Whether the condition tells which object is which."""
    per_object = "cond_tokens" in needed_conditions(pipeline) and item["cond_tokens"].ndim == 3
    return per_object or pipeline.transformer.config.object_condition == "mask"


class Table:
    """Every metric of every scene, by draw and scene."""

    def __init__(self, num_draws: int, num_scenes: int):
        self.shape = num_draws, num_scenes
        self.values: dict[str, np.ndarray] = {}

    def add(self, draw: int, scene: int, measured: dict[str, float]) -> None:
        for name, value in measured.items():
            self.values.setdefault(name, np.full(self.shape, np.nan))[draw, scene] = value

    def report(self) -> dict[str, dict[str, float | None]]:
        """Mean and standard error over scenes of what each has as the mean over its draws."""
        return {name: over_scenes(values) for name, values in self.values.items()}


def over_scenes(values: np.ndarray) -> dict[str, float | None]:
    """(draws, scenes), NaN = not measured -> `mean` and `stderr`, None where there are none or only one."""
    known = ~np.isnan(values)
    scenes = known.any(0)
    means = np.where(known, values, 0).sum(0)[scenes] / known.sum(0)[scenes]
    if not len(means):
        return {"mean": None, "stderr": None}
    error = float(means.std(ddof=1) / np.sqrt(len(means))) if len(means) > 1 else None
    return {"mean": float(means.mean()), "stderr": error}
