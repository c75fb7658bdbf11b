"""What `python -m evaluation.shadow_sdxl` does: open the data, measure, print tables, write JSON."""

from __future__ import annotations

from torch import Tensor

from backlot.command_line import input_errors
from backlot.loading import load_pipeline
from data_prep.shadows.dataset import ShadowDataset
from evaluation.shadow_sdxl.measure import SHUFFLE_DEGREES, compute_mean_map, evaluate
from evaluation.shadow_sdxl.settings import Settings
from evaluation.table import format_mean, format_table, output_file, write_json
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


def open_datasets(settings: Settings, pipeline: ShadowSDXLPipeline) -> dict[str, ShadowDataset]:
    """What is measured on, by the flag that named it; ValueError if it is not what it should be."""
    side = {"image_size": settings.resolution or pipeline.resolution, "fill": pipeline.unet.config.fill}
    datasets = {}
    if settings.data is not None:
        datasets["data"] = ShadowDataset(settings.data, split=settings.split, evaluation=True, **side)
    if settings.benchmark is not None:
        benchmark = ShadowDataset(settings.benchmark, split="all", evaluation=True, **side)
        if None in benchmark.tracks:
            stem = benchmark.stems[benchmark.tracks.index(None)]
            place = f"sample {stem!r} of --benchmark {settings.benchmark}"
            raise ValueError(f"{place} belongs to no track: give it as --data")
        datasets["benchmark"] = benchmark
    return datasets


def open_mean_map(settings: Settings, dataset: ShadowDataset) -> Tensor | None:
    """The mean map of --train_data, of the size of the data set's maps."""
    if settings.train_data is None:
        return None
    split = "train" if settings.split == "validation" else "all"
    return compute_mean_map(ShadowDataset(settings.train_data, split=split, image_size=dataset.picture_size[0]))


def describe(dataset: ShadowDataset, settings: Settings) -> dict:
    """What a reader must know of a data set to compare figures."""
    return {
        "path": str(dataset.path),
        "split": dataset.split,
        "num_objects": len(set(dataset.object_ids)),
        "fingerprint": dataset.fingerprint,
        "mean_map": f"that of {settings.train_data}" if settings.train_data else "that of the measured data themselves",
    }


def format_report(report: dict) -> str:
    """A line per metric, a column per row of the report; mean and deviation over draws."""
    rows = {name: row for name, row in report.items() if name != "true"}
    cells = {title: [format_cell(row[metric]) for row in rows.values()] for metric, title in TITLES.items()}
    return format_table([title_of(name) for name in rows], cells, width=18)


def title_of(row: str) -> str:
    if row == "phi_shuffled":
        return f"phi + {SHUFFLE_DEGREES:g}"
    return {"zero": "empty map", "mean_map": "mean map", "1": "1 step"}.get(row, f"{row} steps")


def format_cell(value: dict[str, float | None]) -> str:
    return format_mean(value["mean"], value["std"] or None, digits=4)


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


def report(settings: Settings) -> None:
    """Measure on all data that are named."""
    output = output_file(settings.output, settings.model_dir)
    pipeline = load_pipeline(ShadowSDXLPipeline, settings.model_dir, settings.device, settings.dtype)
    results = {}
    with input_errors():
        for name, dataset in open_datasets(settings, pipeline).items():
            measured = evaluate(
                pipeline,
                dataset,
                steps=settings.steps,
                num_draws=settings.num_draws,
                mean_map=open_mean_map(settings, dataset),
                haze=settings.haze,
                metric_resolution=settings.metric_resolution,
                seed=settings.seed,
                batch_size=settings.batch_size,
                show_progress=True,
            )
            results[name] = {"data": describe(dataset, settings), **measured}
            show(name, results[name])
        content = {"model": str(settings.model_dir), "dtype": settings.dtype, "steps": settings.steps, **results}
        write_json(output, content)
    print(f"written to {output}")
