"""What `python -m evaluation.point_flow` does: open the points, measure, print a table, write JSON."""

from __future__ import annotations

import torch

from backlot.command_line import input_errors
from backlot.loading import load_pipeline
from data_prep.points.format import read_points
from evaluation.point_flow.measure import evaluate
from evaluation.point_flow.metrics import wasserstein
from evaluation.point_flow.settings import Settings
from evaluation.table import format_mean, format_table, output_file, write_json
from pipelines.point_flow.pipeline import PointFlowPipeline


def report(settings: Settings) -> None:
    """Measure the distance from the points of the split, beside that of noise."""
    output = output_file(settings.output, settings.model_dir)
    pipeline = load_pipeline(PointFlowPipeline, settings.model_dir, settings.device, settings.dtype)
    with input_errors():
        true = read_points(settings.data, settings.split)
        noise = torch.randn(true.shape, generator=torch.Generator().manual_seed(settings.seed))
        distances = {"noise": wasserstein(noise, true)}
        measured = evaluate(pipeline, true, settings.steps, settings.seed, settings.batch_size)
        distances |= {f"{count} step{'s' * (count > 1)}": distance for count, distance in measured.items()}
        cells = [format_mean(distance, None, digits=4) for distance in distances.values()]
        print(f"{settings.data}, split {settings.split}: {len(true)} points, seed {settings.seed}")
        print(format_table(list(distances), {"Wasserstein distance": cells}))
        names = {"model": str(settings.model_dir), "data": str(settings.data), "split": settings.split}
        write_json(output, names | {"num_points": len(true), "seed": settings.seed, "wasserstein": distances})
    print(f"written to {output}")
