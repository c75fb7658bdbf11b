"""The commands of `python -m evaluation.vpog`. A command's libraries are loaded once its arguments are understood."""

from __future__ import annotations

from backlot.command_line import parse
from evaluation.vpog.settings import MeasureSettings, PredictSettings, ScoreSettings


def measure(argv: list[str] | None = None) -> None:
    """Measure a pipeline on the scenes of a BOP dataset whose poses are known.

        python -m evaluation.vpog measure --model outputs/vpog --dataset data/unseen --out outputs/vpog/evaluation

    Its poses are compared with those of the nearest template and of patch classes without flow, with a second pass, and
    with turns in the picture; patches with their labels. Written are metrics.json, results.csv and what `score` needs.
    """
    settings = parse(MeasureSettings, argv, "python -m evaluation.vpog measure", measure.__doc__)

    from evaluation.vpog.report import run

    run(settings)


def predict(argv: list[str] | None = None) -> None:
    """Estimate the poses of the objects of a BOP dataset and write them as the BOP challenge takes them.

        python -m evaluation.vpog predict --dataset data/ycbv --detections cnos.json --out vpog_ycbv-test.csv

    Without --detections the true masks are taken, jittered as a detector's are. Beside the csv lies a JSON file that
    notes the dataset, so that `python -m evaluation.vpog score` finds it.
    """
    settings = parse(PredictSettings, argv, "python -m evaluation.vpog predict", predict.__doc__)

    from evaluation.vpog.predict import run

    run(settings)


def score(argv: list[str] | None = None) -> None:
    """Hold a csv file of poses against a BOP dataset: MSSD, MSPD, VSD, ADD(-S), AR.

        python -m evaluation.vpog score results.csv
        python -m evaluation.vpog score vpog_ycbv-test.csv --dataset data/ycbv --output figures.json

    Definitions: evaluation/vpog/metrics.py; figures: `pose_figures` in evaluation/vpog/errors.py
    """
    settings = parse(ScoreSettings, argv, "python -m evaluation.vpog score", score.__doc__)

    from evaluation.vpog.score import run

    run(settings)
