"""Measure a trained scene model: are all objects there, in place, apart from one another and supported.

    python -m evaluation.shortcut_scene outputs/scene --data data/scenes
    python -m evaluation.shortcut_scene outputs/scene --data data/scenes --steps 1 4 32 --flow --meshes

--data takes what `python -m data_prep.scenes encode` writes, and --split one of its splits. --flow also samples with
plain Euler, at the same step counts. --meshes adds Chamfer distance, F-score and intersection over union (slow).
Metrics are defined in evaluation/shortcut_scene/metrics.py; nothing is aligned before it is measured.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path

from backlot.codecs import DTYPES
from backlot.command_line import Parser, fail, number
from backlot.loading import load_pipeline
from data_prep.scenes.dataset import SceneDataset
from data_prep.scenes.format import SPLITS, read_metadata
from evaluation.shortcut_scene.measure import LAYOUT_METRICS, SHAPE_METRICS, STEPS, evaluate, needed_conditions
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


def create_parser() -> argparse.ArgumentParser:
    parser = Parser(prog="python -m evaluation.shortcut_scene", description=__doc__.split("\n")[0])
    parser.add_argument(
        "model_dir", type=Path, help="folder of an exported ShortcutScenePipeline, or of a finished run"
    )
    parser.add_argument("--data", type=Path, required=True, help="scenes, encoded")
    parser.add_argument("--split", choices=SPLITS, default="val", help="of --data")
    parser.add_argument("--steps", type=number(int, 1), nargs="+", default=list(STEPS), help="step counts")
    parser.add_argument("--flow", action="store_true", help="also plain Euler, without telling the step size")
    parser.add_argument("--meshes", action="store_true", help="also measure shapes (slow)")
    parser.add_argument("--num_scenes", type=number(int, 1), help="only the first ones; all by default")
    parser.add_argument("--num_draws", type=number(int, 1), default=1, help="noises per scene")
    parser.add_argument("--guidance_scale", type=number(float, 0), default=1.0, help="of the sampling")
    parser.add_argument(
        "--quarter_turns", action="store_true", help="boxes turned by 90 degrees with their sides exchanged are equal"
    )
    parser.add_argument("--seed", type=number(int, 0), default=0)
    parser.add_argument("--batch_size", type=number(int, 1), default=32)
    parser.add_argument("--device", help="the accelerator if there is one")
    parser.add_argument("--dtype", choices=DTYPES, default="float32")
    parser.add_argument("--output", type=Path, help="JSON with everything; MODEL_DIR/evaluation.json")
    return parser


def open_dataset(args: argparse.Namespace, pipeline: ShortcutScenePipeline) -> SceneDataset:
    """All objects of all scenes, in the order of the files."""
    return SceneDataset(
        args.data,
        args.split,
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
    lines = [" " * 22 + "".join(f"{name:>16}" for name in columns)]
    for name in names:
        cells = (format_cell(report.get(name)) for report in columns.values())
        lines.append(f"{TITLES[name]:<22}" + "".join(f"{cell:>16}" for cell in cells))
    return "\n".join(lines)


def format_cell(value: dict[str, float | None] | None) -> str:
    if value is None or value["mean"] is None:
        return "-"
    digits = 1 if abs(value["mean"]) >= 10 else 3
    error = f" ±{value['stderr']:.{digits}f}" if value["stderr"] is not None else ""
    return f"{value['mean']:.{digits}f}{error}"


def show(result: dict) -> None:
    """Print the table and all that a figure of it depends on."""
    print(
        f"{result['data']}, split {result['split']}: {result['num_scenes']} scenes, {result['num_draws']} draws, seed "
        f"{result['seed']}, guidance {result['guidance_scale']:g}; columns: sampler and steps; mean ± standard error"
    )
    print(f"alignment: {result['alignment']}; objects are matched by {result['matching']}\n")
    print(format_report(result))


def main(argv: Sequence[str] | None = None) -> None:
    args = create_parser().parse_args(argv)
    output = args.output or args.model_dir / "evaluation.json"
    if output.is_dir():
        fail(f"--output: {output} is a folder")
    pipeline = load_pipeline(ShortcutScenePipeline, args.model_dir, args.device, args.dtype)
    if args.meshes and pipeline.vae is None:
        fail(f"--meshes: the pipeline of {args.model_dir} has no VAE")
    try:
        dataset = open_dataset(args, pipeline)
        measured = evaluate(
            pipeline,
            dataset,
            args.steps,
            args.steps if args.flow else (),
            args.num_draws,
            with_shapes=args.meshes,
            has_floor=has_floor(dataset),
            quarter_turns=args.quarter_turns,
            guidance_scale=args.guidance_scale,
            num_scenes=args.num_scenes,
            seed=args.seed,
            batch_size=args.batch_size,
            show_progress=True,
        )
        result = {"model": str(args.model_dir), "data": str(args.data), "split": args.split, "dtype": args.dtype}
        result |= measured
        show(result)
        output.parent.mkdir(parents=True, exist_ok=True)
        output.write_text(json.dumps(result, indent=1, allow_nan=False) + "\n", encoding="utf-8")
    except (OSError, ValueError) as error:
        fail(str(error).splitlines()[0])
    print(f"written to {output}")


if __name__ == "__main__":
    main()
