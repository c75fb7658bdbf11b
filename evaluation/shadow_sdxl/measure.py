"""How well a model casts shadows: its maps of a data set, and what is measured on them."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from tqdm import tqdm

from data_prep.shadows.dataset import ShadowDataset
from evaluation.shadow_sdxl.metrics import (
    HAZE,
    centroid_error,
    direction_error,
    edge_width,
    measure_maps,
    product_iou,
    psnr,
    soft_iou,
    softness_error,
    ssim,
)
from pipelines.shadow_sdxl.pipeline import ShadowSDXLPipeline

MIN_THETA = 12.0  # degrees; a light nearer to the zenith gives a shadow no direction
SHUFFLE_DEGREES = 120.0
SWEEP_SIZES = (2.0, 4.0, 6.0, 8.0)
SWEEP_SAMPLES = 32  # for the seam and the sweep of sizes

Items = Sequence[Mapping[str, Tensor | float]]


# --- predictions ----------------------------------------------------------------------------------------------------


def noise_generator(seed: int, index: int) -> torch.Generator:
    """The noise of one map: a function of (seed, index), on the CPU whatever the device."""
    return torch.Generator().manual_seed(
        int(np.random.SeedSequence((seed, index)).generate_state(1, np.uint64)[0] >> 1)
    )


def cast(
    pipeline: ShadowSDXLPipeline,
    samples: Items,
    *,
    num_inference_steps: int = 1,
    seed: int = 0,
    batch_size: int = 8,
    phi_offset: float = 0.0,
    first: int = 0,
) -> Tensor:
    """The shadow map of every sample, under the light of that sample; switches the pipeline's progress bar off.

    Sample i starts from noise made from (seed, first + i), so neither the batches nor its neighbours matter to it.

    Args:
        samples: items of `data_prep.ShadowDataset`, or the data set itself: `object_image` (3, R, R) in [-1, 1] on the
            network's own fill, `mask` (1, R, R) in [0, 1], and `theta`, `phi` (degrees) and `size`, scalars. Other keys
            are not read.
        num_inference_steps: equal steps.
        seed: at least 0.
        batch_size: samples that go through the network together.
        phi_offset: degrees by which the light is turned around the zenith.
        first: number of the first sample, where `samples` are a part of more.

    Returns:
        (N, 1, R, R) float32 in [0, 1] on the CPU, 1 = full shadow.

    Raises:
        ValueError: there are no samples, `batch_size` is below 1, or what the pipeline refuses.
    """
    if not len(samples) or batch_size < 1:
        raise ValueError(
            f"`samples` must not be empty and `batch_size` at least 1, got {len(samples)} and {batch_size}"
        )
    pipeline.set_progress_bar_config(disable=True)
    maps = []
    for start in range(0, len(samples), batch_size):
        rows = range(start, min(start + batch_size, len(samples)))
        items = [samples[row] for row in rows]
        images = pipeline(
            [item["object_image"] for item in items],
            [item["mask"] for item in items],
            theta=[float(item["theta"]) for item in items],
            phi=[float(item["phi"]) + phi_offset for item in items],
            size=[float(item["size"]) for item in items],
            num_inference_steps=num_inference_steps,
            resolution=items[0]["object_image"].shape[-1],
            generator=[noise_generator(seed, first + row) for row in rows],
            output_type="pt",
        ).images
        maps.append(images.float().cpu())
    return torch.cat(maps)


def compute_mean_map(dataset: ShadowDataset) -> Tensor:
    """The mean shadow map (1, H, W) of a data set, as a baseline that knows neither object nor light.

    Maps are read one by one and never kept.
    """
    total = torch.zeros(1, *dataset.picture_size, dtype=torch.double)
    for row in range(len(dataset)):
        total += dataset.shadow_map(row)
    return (total / len(dataset)).float()


def seam_error(
    pipeline: ShadowSDXLPipeline, samples: Items, *, num_inference_steps: int = 1, seed: int = 0, batch_size: int = 8
) -> float:
    """The largest difference, over pixels and samples, between a map at phi = 0 and at 360 from the same noise."""
    ends = [
        cast(
            pipeline,
            [{**sample, "phi": phi} for sample in samples],
            num_inference_steps=num_inference_steps,
            seed=seed,
            batch_size=batch_size,
        )
        for phi in (0.0, 360.0)
    ]
    return float((ends[0] - ends[1]).abs().max())


def sweep_sizes(
    pipeline: ShadowSDXLPipeline,
    samples: Items,
    *,
    sizes: Sequence[float] = SWEEP_SIZES,
    theta: float = 30.0,
    phi: float = 0.0,
    num_inference_steps: int = 1,
    seed: int = 0,
    batch_size: int = 8,
) -> list[float | None]:
    """The mean width of the penumbra in pixels (`metrics.edge_width`) for every size of the light, all else fixed.

    A model that has learnt what size means gives rising numbers. None where no map has an edge.
    """
    widths = []
    for size in sizes:
        lit = [{**sample, "theta": theta, "phi": phi, "size": size} for sample in samples]
        maps = cast(pipeline, lit, num_inference_steps=num_inference_steps, seed=seed, batch_size=batch_size)
        widths.append(finite(edge_width(maps).nanmean()))
    return widths


# --- measures -------------------------------------------------------------------------------------------------------


def measure(predicted: Tensor, true: Tensor, mask: Tensor, theta: Tensor, haze: float = HAZE) -> dict[str, Tensor]:
    """Everything that is measured of a map, each (B,); see `evaluation.shadow_sdxl.metrics` for the definitions.

    Args:
        predicted, true, mask: (B, 1, H, W) in [0, 1].
        theta: (B,) degrees.
        haze: predicted values up to this do not count in `iou`; `iou_with_haze` counts them all.

    Returns:
        `iou`, `rmse`, `s_rmse`, `zncc`; the same four `..._outside` of the mask; `iou_with_haze`, `iou_product`,
        `ssim`, `psnr`; `direction_error_deg` (NaN for theta up to `MIN_THETA`), `centroid_error_px`, `edge_width_px` of
        the prediction, `softness_error` (|log2| of the widths' ratio); `empty`, 1 for a prediction that is nowhere
        above `haze`. NaN where a metric has no meaning.
    """
    outside = measure_maps(predicted, true, haze, 1 - mask)
    return {
        **measure_maps(predicted, true, haze),
        **{f"{name}_outside": values for name, values in outside.items()},
        "iou_with_haze": soft_iou(predicted, true),
        "iou_product": product_iou(predicted, true, haze),
        "ssim": ssim(predicted, true),
        "psnr": psnr(predicted, true),
        "direction_error_deg": direction_error(predicted, true, mask).where(theta > MIN_THETA, torch.nan),
        "centroid_error_px": centroid_error(predicted, true, mask),
        "edge_width_px": edge_width(predicted),
        "softness_error": softness_error(predicted, true),
        "empty": (predicted.flatten(1).amax(1) <= haze).float(),
    }


@dataclass(frozen=True)
class Row:
    """One line of a report: a model's maps at some steps, with the light turned by `phi_offset` degrees."""

    name: str
    num_inference_steps: int
    phi_offset: float = 0.0


def evaluate(
    pipeline: ShadowSDXLPipeline,
    dataset: ShadowDataset,
    *,
    steps: Sequence[int] = (1, 4, 20),
    num_draws: int = 10,
    mean_map: Tensor | None = None,
    haze: float = HAZE,
    metric_resolution: int | None = None,
    seed: int = 0,
    batch_size: int = 8,
    show_progress: bool = False,
) -> dict:
    """Measure a model on a data set, against two baselines that know nothing and a control that is told the wrong phi.

    Args:
        dataset: square items, on the network's own fill.
        steps: step counts. The first also serves the control, the seam and the sweep of sizes.
        num_draws: noises per map; draw k is `cast` with seed + k. The paper takes 10.
        mean_map: (1, R, R), see `compute_mean_map`; that of `dataset` itself without one.
        haze: see `measure`.
        metric_resolution: also measure maps that are resized to this side (the paper: 1024).

    Returns:
        Numbers for JSON. `reports` holds, for `all` samples and for every track, a row for each of `zero`, `mean_map`,
        each step count (`"1"`, ...) and `phi_shuffled` (the first step count, phi + 120, against the unturned truth).
        A row has {"mean", "std"} of each name of `measure`, and of `direction_error_median_deg`: the mean over samples
        (median there), then mean and standard deviation over draws; None where nothing could be measured. The row
        `true` has the `edge_width_px` of the data. `resized_reports` are the same at `metric_resolution`. `seam` is
        `seam_error` and `size_sweep` is `sweep_sizes` of a few samples; `num_samples` counts by the reports' names.

    Raises:
        ValueError: the maps are not finite, or an argument is wrong.
    """
    if not steps or num_draws < 1:
        raise ValueError(f"`steps` must not be empty and `num_draws` at least 1, got {list(steps)} and {num_draws}")
    steps = list(dict.fromkeys(steps))
    mean_map = compute_mean_map(dataset) if mean_map is None else mean_map
    count, size = len(dataset), dataset.picture_size
    if tuple(mean_map.shape) != (1, *size):
        raise ValueError(f"`mean_map` must be {(1, *size)} like the maps, got {tuple(mean_map.shape)}")
    rows = [Row(str(number), number) for number in steps]
    rows.append(Row("phi_shuffled", steps[0], SHUFFLE_DEGREES))
    sides = [None] if metric_resolution is None else [None, metric_resolution]
    tables = {side: Table(count, num_draws) for side in sides}
    with tqdm(total=count * num_draws * len(rows), unit="map", disable=not show_progress) as progress:
        for start in range(0, count, batch_size):
            places = range(start, min(start + batch_size, count))
            measure_batch(pipeline, dataset, places, rows, tables, mean_map, haze, seed)
            progress.update(len(places) * num_draws * len(rows))

    few = [dataset[i * count // min(count, SWEEP_SAMPLES)] for i in range(min(count, SWEEP_SAMPLES))]
    common = {"num_inference_steps": steps[0], "seed": seed, "batch_size": batch_size}
    widths = sweep_sizes(pipeline, few, **common)
    reports = [table.report(dataset.tracks) for table in tables.values()]
    resized = {} if len(reports) == 1 else {"metric_resolution": metric_resolution, "resized_reports": reports[1]}
    return {
        "num_samples": {name: int(chosen.sum()) for name, chosen in groups_of(dataset.tracks).items()},
        "num_draws": num_draws,
        "resolution": size[0],
        "haze": haze,
        "seed": seed,
        "reports": reports[0],
        **resized,
        "seam": seam_error(pipeline, few, **common),
        "size_sweep": {
            "num_samples": len(few),
            "sizes": list(SWEEP_SIZES),
            "edge_width_px": widths,
            "monotone": None not in widths and all(a < b for a, b in itertools.pairwise(widths)),
        },
    }


def measure_batch(
    pipeline: ShadowSDXLPipeline,
    dataset: ShadowDataset,
    places: range,
    rows: Sequence[Row],
    tables: Mapping[int | None, Table],
    mean_map: Tensor,
    haze: float,
    seed: int,
) -> None:
    """Put what is measured of the samples at `places` into the tables, one for each side that maps are resized to."""
    # float64, which Apple's GPUs lack, keeps some of the metrics exact
    device = torch.device("cpu") if pipeline.device.type == "mps" else pipeline.device
    items = [dataset[place] for place in places]
    true, mask, theta = (
        torch.stack([item[name] for item in items]).to(device) for name in ("shadow_map", "mask", "theta")
    )
    targets = {side: (resize(true, side), resize(mask, side)) for side in tables}

    def add(row: str, draw: int, maps: Tensor) -> None:
        for side, table in tables.items():
            table.add(row, draw, places, measure(resize(maps, side), *targets[side], theta, haze))

    add("true", 0, true)
    add("zero", 0, torch.zeros_like(true))
    add("mean_map", 0, mean_map.to(device).expand_as(true))
    for row in rows:
        for draw in range(tables[None].num_draws):
            add(row.name, draw, cast_row(pipeline, items, row, seed + draw, places.start).to(device))


def cast_row(pipeline: ShadowSDXLPipeline, items: Items, row: Row, seed: int, first: int) -> Tensor:
    """The maps of a row for one batch; ValueError if they are not finite."""
    maps = cast(
        pipeline,
        items,
        num_inference_steps=row.num_inference_steps,
        seed=seed,
        batch_size=len(items),
        phi_offset=row.phi_offset,
        first=first,
    )
    if not maps.isfinite().all():
        raise ValueError(f"the maps of {row.num_inference_steps} steps are not finite, this model has diverged")
    return maps


def resize(maps: Tensor, side: int | None) -> Tensor:
    """(B, 1, H, W) -> (B, 1, side, side), or as they are."""
    if side is None or maps.shape[-2:] == (side, side):
        return maps
    return F.interpolate(maps, (side, side), mode="bilinear", antialias=side < maps.shape[-1]).clamp(0, 1)


class Table:
    """Every metric of every map: by row, draw and sample."""

    def __init__(self, num_samples: int, num_draws: int):
        self.num_draws, self.shape = num_draws, (num_draws, num_samples)
        self.values: dict[str, dict[str, np.ndarray]] = {}

    def add(self, row: str, draw: int, places: range, measured: Mapping[str, Tensor]) -> None:
        """Put in the metrics (B,) of the samples at `places`."""
        metrics = self.values.setdefault(row, {})
        for name, values in measured.items():
            kept = metrics.setdefault(name, np.full(self.shape, np.nan))
            kept[draw, places.start : places.stop] = values.cpu().numpy()

    def report(self, tracks: Sequence[str | None]) -> dict:
        """The means: of all samples, and of each track."""
        return {name: self._summarise(chosen) for name, chosen in groups_of(tracks).items()}

    def _summarise(self, chosen: np.ndarray) -> dict:
        summary = {}
        for row, metrics in self.values.items():
            summary[row] = {name: over_draws(values[:, chosen], np.mean) for name, values in metrics.items()}
            median = over_draws(metrics["direction_error_deg"][:, chosen], np.median)
            summary[row]["direction_error_median_deg"] = median
        summary["true"] = {"edge_width_px": summary["true"]["edge_width_px"]}
        return summary


def groups_of(tracks: Sequence[str | None]) -> dict[str, np.ndarray]:
    """Which samples (N,) belong to `all`, and to each track."""
    names = sorted({track for track in tracks if track})
    chosen = {name: np.array([track == name for track in tracks]) for name in names}
    return {"all": np.ones(len(tracks), bool), **chosen}


def over_draws(values: np.ndarray, average) -> dict[str, float | None]:
    """(draws, samples), NaN = not measured -> mean and standard deviation over draws of the average over samples."""
    kept = [row[~np.isnan(row)] for row in values]
    averages = [average(row) for row in kept if len(row)]
    if not averages:
        return {"mean": None, "std": None}
    return {"mean": float(np.mean(averages)), "std": float(np.std(averages))}


def finite(value: Tensor) -> float | None:
    """A number for JSON."""
    return None if value.isnan() else float(value)
