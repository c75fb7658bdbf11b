"""What `python -m evaluation.shortcut_scene` does: open the scenes, measure, print a table, write JSON."""

from __future__ import annotations

import sys

from backlot.command_line import fail, input_errors
from backlot.loading import load_pipeline
from data_prep.scenes.dataset import SceneDataset
from data_prep.scenes.format import read_metadata
from evaluation.shortcut_scene.measure import LAYOUT_METRICS, SHAPE_METRICS, evaluate, needed_conditions
from evaluation.shortcut_scene.settings import Settings
from evaluation.table import format_mean, format_table, output_file, write_json
from pipelines.shortcut_scene.pipeline import ShortcutScenePipeline

TITLES = {
    "coverage": "coverage at 0.15 m",
    "distance": "matched distance, m",
    "collision": "colliding pairs",
    "floor_gap": "floor gap, m",
    "log_scale_error": "|log scale| error",
    "rotation_error_deg": "rotation error, deg",
    "chamfer_scene": "Chamfer, scene, m",
    "f_score_scene": "F-score, scene",
    "occupancy_iou_scene": "voxel IoU, scene",
    "chamfer_object": "Chamfer, object",
    "f_score_object": "F-score, object",
    "occupancy_iou_object": "voxel IoU, object",
    "iou_b": "IoU of boxes",
}


def open_dataset(settings: Settings, pipeline: ShortcutScenePipeline) -> SceneDataset:
    """All objects of all scenes, in the order of the files."""
    return SceneDataset(
        settings.data,
        settings.split,
        conditions=needed_conditions(pipeline),
        max_objects_per_scene=sys.maxsize,
        shuffle_objects=False,
    )


def has_floor(dataset: SceneDataset) -> bool:
    """Whether z = 0 is the floor in the frame of these scenes."""
    return read_metadata(dataset.root / dataset.split / dataset.scene_ids[0]).get("frame", "floor") == "floor"


def format_report(result: dict) -> str:
    """A line per metric, a column per way of sampling; mean and standard error over scenes."""
    columns = {"true": result["true"], "independent": result["independent_draws"]}
    for kind in ("shortcut", "flow"):
        columns |= {f"{kind} {steps}": report for steps, report in result[kind].items()}
    names = [name for name in (*LAYOUT_METRICS, *SHAPE_METRICS) if any(name in report for report in columns.values())]
    cells = {TITLES[name]: [format_cell(report.get(name)) for report in columns.values()] for name in names}
    return format_table(list(columns), cells, width=16)


def format_cell(value: dict[str, float | None] | None) -> str:
    return "-" if value is None else format_mean(value["mean"], value["stderr"], digits=3)


def show(result: dict) -> None:
    """Print the table and all that a figure of it depends on."""
    print(
        f"{result['data']}, split {result['split']}: {result['num_scenes']} scenes, {result['num_draws']} draws, seed "
        f"{result['seed']}, guidance {result['guidance_scale']:g}; columns: sampler and steps; mean ± standard error"
    )
    print(f"alignment: {result['alignment']}; objects are matched by {result['matching']}\n")
    print(format_report(result))


def report(settings: Settings) -> None:
    """Measure all scenes of the split."""
    output = output_file(settings.output, settings.model_dir)
    pipeline = load_pipeline(ShortcutScenePipeline, settings.model_dir, settings.device, settings.dtype)
    if settings.meshes and pipeline.vae is None:
        fail(f"--meshes: the pipeline of {settings.model_dir} has no VAE")
    with input_errors():
        dataset = open_dataset(settings, pipeline)
        measured = evaluate(
            pipeline,
            dataset,
            settings.steps,
            settings.steps if settings.flow else (),
            settings.num_draws,
            with_shapes=settings.meshes,
            has_floor=has_floor(dataset),
            quarter_turns=settings.quarter_turns,
            guidance_scale=settings.guidance_scale,
            num_scenes=settings.num_scenes,
            seed=settings.seed,
            batch_size=settings.batch_size,
            show_progress=True,
        )
        names = {"model": str(settings.model_dir), "data": str(settings.data), "split": settings.split}
        result = names | {"dtype": settings.dtype} | measured
        show(result)
        write_json(output, result)
    print(f"written to {output}")
