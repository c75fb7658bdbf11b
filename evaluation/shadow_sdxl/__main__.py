"""Measure a trained shadow model, against an empty map, the mean map, and itself told the wrong direction.

    python -m evaluation.shadow_sdxl outputs/shadow --data data/test --train_data data/train
    python -m evaluation.shadow_sdxl outputs/shadow --data data/shadows --split validation
    ... --benchmark data/tracks --steps 1 4 20 --num_draws 10 --metric_resolution 1024

--data takes what data_prep.shadows render writes. Where that was trained on, --split validation keeps to the 5 % of its
objects that were held out. --benchmark takes the three tracks: the public benchmark's tars, or what render_shadows
--tracks makes. Metrics are defined in evaluation/shadow_sdxl/metrics.py.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path

from torch import Tensor

from backlot.codecs import DTYPES
from backlot.command_line import Parser, fail, number
from backlot.loading import load_pipeline
from data_prep.shadows.dataset import SPLITS, ShadowDataset
from evaluation.shadow_sdxl.measure import SHUFFLE_DEGREES, compute_mean_map, evaluate
from evaluation.shadow_sdxl.metrics import HAZE
from pipelines.shadow_sdxl.pipeline import ShadowSDXLPipeline

TITLES = {
    "iou": "soft IoU, no haze",
    "iou_with_haze": "soft IoU",
    "iou_product": "product IoU, no haze",
    "rmse": "RMSE",
    "s_rmse": "scale-invariant RMSE",
    "zncc": "ZNCC",
    "iou_outside": "IoU beside object",
    "rmse_outside": "RMSE beside object",
    "s_rmse_outside": "s-RMSE beside object",
    "zncc_outside": "ZNCC beside object",
    "ssim": "SSIM",
    "psnr": "PSNR, dB",
    "direction_error_deg": "direction error, deg",
    "direction_error_median_deg": "  its median",
    "centroid_error_px": "centroid error, px",
    "edge_width_px": "penumbra, px",
    "softness_error": "softness error, |log2|",
    "empty": "share of empty maps",
}


def create_parser() -> argparse.ArgumentParser:
    parser = Parser(prog="python -m evaluation.shadow_sdxl", description=__doc__.split("\n")[0])
    parser.add_argument("model_dir", type=Path, help="folder of an exported ShadowSDXLPipeline, or of a finished run")
    parser.add_argument("--data", type=Path, help="shadow data: a folder, a tar or a folder of tars")
    parser.add_argument("--split", choices=SPLITS, default="all", help="of --data; validation: objects held out")
    parser.add_argument("--benchmark", type=Path, help="the three tracks, public or rendered; never split")
    parser.add_argument(
        "--train_data", type=Path, help="gives the mean map; the data that are measured on do without it"
    )
    parser.add_argument("--steps", type=number(int, 1), nargs="+", default=[1, 4, 20], help="step counts")
    parser.add_argument("--num_draws", type=number(int, 1), default=10, help="noises per map")
    parser.add_argument("--haze", type=number(float, 0, 1), default=HAZE, help="values up to this do not count in IoU")
    parser.add_argument("--resolution", type=number(int, 1), help="side of the maps; that of the model's training")
    parser.add_argument("--metric_resolution", type=number(int, 11), help="also measure maps resized to this side")
    parser.add_argument("--seed", type=number(int, 0), default=0)
    parser.add_argument("--batch_size", type=number(int, 1), default=8)
    parser.add_argument("--device", help="the accelerator if there is one")
    parser.add_argument("--dtype", choices=DTYPES, default="float32")
    parser.add_argument("--output", type=Path, help="JSON with everything; MODEL_DIR/evaluation.json")
    return parser


def open_datasets(args: argparse.Namespace, pipeline: ShadowSDXLPipeline) -> dict[str, ShadowDataset]:
    """What is measured on, by the flag that named it; ValueError if it is not what it should be."""
    settings = {"image_size": args.resolution or pipeline.resolution, "fill": pipeline.unet.config.fill}
    datasets = {}
    if args.data is not None:
        if args.split != "validation" and args.train_data and args.train_data.resolve() == args.data.resolve():
            raise ValueError(f"--data {args.data} is --train_data too: only its --split validation was not trained on")
        datasets["data"] = ShadowDataset(args.data, split=args.split, evaluation=True, **settings)
    if args.benchmark is not None:
        benchmark = ShadowDataset(args.benchmark, split="all", evaluation=True, **settings)
        if None in benchmark.tracks:
            stem = benchmark.stems[benchmark.tracks.index(None)]
            raise ValueError(f"sample {stem!r} of --benchmark {args.benchmark} belongs to no track: give it as --data")
        datasets["benchmark"] = benchmark
    return datasets


def open_mean_map(args: argparse.Namespace, dataset: ShadowDataset) -> Tensor | None:
    """The mean map of --train_data, of the size of the data set's maps."""
    if args.train_data is None:
        return None
    split = "train" if args.split == "validation" else "all"
    return compute_mean_map(ShadowDataset(args.train_data, split=split, image_size=dataset.picture_size[0]))


def describe(dataset: ShadowDataset, args: argparse.Namespace) -> dict:
    """What a reader must know of a data set to compare figures."""
    return {
        "path": str(dataset.path),
        "split": dataset.split,
        "num_objects": len(set(dataset.object_ids)),
        "fingerprint": dataset.fingerprint,
        "mean_map": f"that of {args.train_data}" if args.train_data else "that of the measured data themselves",
    }


def format_report(report: dict) -> str:
    """A line per metric, a column per row of the report; mean and deviation over draws."""
    rows = {name: row for name, row in report.items() if name != "true"}
    lines = [" " * 24 + "".join(f"{title_of(name):>18}" for name in rows)]
    for metric, title in TITLES.items():
        lines.append(f"{title:<24}" + "".join(f"{format_cell(row[metric]):>18}" for row in rows.values()))
    return "\n".join(lines)


def title_of(row: str) -> str:
    if row == "phi_shuffled":
        return f"phi + {SHUFFLE_DEGREES:g}"
    return {"zero": "empty map", "mean_map": "mean map", "1": "1 step"}.get(row, f"{row} steps")


def format_cell(value: dict[str, float | None]) -> str:
    if value["mean"] is None:
        return "-"
    digits = 2 if abs(value["mean"]) >= 10 else 4
    deviation = f" ±{value['std']:.{digits}f}" if value["std"] else ""
    return f"{value['mean']:.{digits}f}{deviation}"


def show(name: str, result: dict) -> None:
    """Print all that is known of one data set."""
    data, counts, sweep = result["data"], result["num_samples"], result["size_sweep"]
    print(
        f"{name}: {data['path']}, split {data['split']}, {counts['all']} samples of {data['num_objects']} objects,"
        f" {result['num_draws']} draws; mean map: {data['mean_map']}"
    )
    reports = [(result["resolution"], result["reports"])]
    if "resized_reports" in result:
        reports.append((result["metric_resolution"], result["resized_reports"]))
    for side, groups in reports:
        for group, report in groups.items():
            width = format_cell(report["true"]["edge_width_px"])
            print(f"\n{group}: {counts[group]} maps of {side}x{side}, true penumbra {width} px")
            print(format_report(report))
    pairs = zip(sweep["sizes"], sweep["edge_width_px"], strict=True)
    widths = ", ".join(f"{size:g}: {'-' if width is None else f'{width:.2f}'}" for size, width in pairs)
    print(f"\nseam |S(phi=0) - S(phi=360)|: {result['seam']:.2g}")
    print(f"penumbra in px by size of the light: {widths} ({'' if sweep['monotone'] else 'not '}monotone)\n")


def main(argv: Sequence[str] | None = None) -> None:
    args = create_parser().parse_args(argv)
    if args.data is None and args.benchmark is None:
        fail("give --data or --benchmark, or both")
    output = args.output or args.model_dir / "evaluation.json"
    if output.is_dir():
        fail(f"--output: {output} is a folder")
    pipeline = load_pipeline(ShadowSDXLPipeline, args.model_dir, args.device, args.dtype)
    results = {}
    try:
        for name, dataset in open_datasets(args, pipeline).items():
            measured = evaluate(
                pipeline,
                dataset,
                steps=args.steps,
                num_draws=args.num_draws,
                mean_map=open_mean_map(args, dataset),
                haze=args.haze,
                metric_resolution=args.metric_resolution,
                seed=args.seed,
                batch_size=args.batch_size,
                show_progress=True,
            )
            results[name] = {"data": describe(dataset, args), **measured}
            show(name, results[name])
        output.parent.mkdir(parents=True, exist_ok=True)
        content = {"model": str(args.model_dir), "dtype": args.dtype, "steps": args.steps, **results}
        output.write_text(json.dumps(content, indent=1, allow_nan=False) + "\n", encoding="utf-8")
    except (OSError, ValueError) as error:
        fail(str(error).splitlines()[0])
    print(f"written to {output}")


if __name__ == "__main__":
    main()
