"""Measure a trained shadow model, against an empty map, the mean map, and itself told the wrong direction.

    python -m evaluation.shadow_sdxl outputs/shadow --data data/test --train_data data/train
    python -m evaluation.shadow_sdxl outputs/shadow --data data/shadows --split validation
    ... --benchmark data/tracks --steps 1 4 20 --num_draws 10 --metric_resolution 1024

--data takes what `python -m data_prep.shadows render` writes. Where that was trained on, --split validation keeps to
the 5 % of its objects that were held out. --benchmark takes the three tracks: the public benchmark's tars, or what
render --tracks makes. Metrics are defined in evaluation/shadow_sdxl/metrics.py.
"""

from __future__ import annotations

from backlot.command_line import parse
from evaluation.shadow_sdxl.settings import Settings


def main(argv: list[str] | None = None) -> None:
    settings = parse(Settings, argv, "python -m evaluation.shadow_sdxl", __doc__)

    from evaluation.shadow_sdxl.report import report

    report(settings)


if __name__ == "__main__":
    main()
