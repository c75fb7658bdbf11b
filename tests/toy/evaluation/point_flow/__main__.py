"""Measure a trained flow on points: how far what it draws is from what it should draw, by number of steps.

    python -m evaluation.point_flow outputs/point-flow --data data/points --steps 1 4 16

--data takes what `python -m data_prep.points synth` writes. The metric is defined in evaluation/point_flow/metrics.py.
"""

from __future__ import annotations

from backlot.command_line import parse
from evaluation.point_flow.settings import Settings


def main(argv: list[str] | None = None) -> None:
    settings = parse(Settings, argv, "python -m evaluation.point_flow", __doc__)

    from evaluation.point_flow.report import report

    report(settings)


if __name__ == "__main__":
    main()
