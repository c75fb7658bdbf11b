"""`python -m evaluation.vpog measure`: all figures of a pipeline as tables and metrics.json."""

from __future__ import annotations

from backlot.command_line import input_errors
from data_prep.bop.results import write_results
from evaluation.table import format_table, write_json
from evaluation.vpog.errors import pose_figures
from evaluation.vpog.measure import Measured, best_of, measure, summarise, to_results
from evaluation.vpog.predict import open_pipeline, open_protocol
from evaluation.vpog.score import COLUMNS, cell, pose_cells, show_poses, write_note
from evaluation.vpog.settings import MeasureSettings

ANSWERS = {
    "errors": "pipeline",
    "second_pass": "with a second pass",
    "class_only": "classes without flow",
    "nearest_template": "nearest template",
}


def show(measured: Measured) -> None:
    """Print all that was measured."""
    rows = {title: pose_cells(pose_figures(getattr(measured, name))) for name, title in ANSWERS.items()}
    print(format_table(COLUMNS, rows) + "\n")
    show_poses(measured.errors)
    figures = summarise(measured)
    names = ("within_one_patch", "exact", "seen_recall", "unseen_f1")
    print("\n" + format_table(names, {"patches": [cell(figures[name]) for name in names]}))
    print(f"\nretrieval's view error: median {cell(figures['view_error_deg'], 1)} deg")
    best = ", ".join(f"{number}: {value:.1f}" for number, value in best_of(measured.hypotheses).items())
    print(f"rotation error of the best of so many hypotheses, deg: {best}")
    if figures["in_plane"]:
        turns = ", ".join(f"{turn}: {value:.1f}" for turn, value in figures["in_plane"]["by_turn"].items())
        print(f"rotation error when turned in the picture, deg: {turns}")


def run(settings: MeasureSettings) -> None:
    """The command."""
    with input_errors():
        settings.out.mkdir(parents=True, exist_ok=True)
        protocol = open_protocol(settings)
        measured = measure(
            open_pipeline(settings),
            protocol,
            num_turned=settings.num_turned,
            num_patch_samples=settings.num_patch_samples,
            show_progress=True,
        )
        write_results(settings.out / "results.csv", to_results(measured.answers))
        write_note(settings.out / "results.csv", protocol.dataset, protocol.targets)
        write_json(settings.out / "metrics.json", summarise(measured))
    show(measured)
    print(f"\nwritten to {settings.out}")
