"""Measure layout adapters on drawn scenes that no model has seen: objects in their boxes, colours, shapes, identities.

    python -m evaluation.layout_flux runs/stage1 --base_model outputs/base --data data/unseen
    python -m evaluation.layout_flux stage1=runs/stage1 stage2=runs/stage2 stage3=runs/stage3 --data data/unseen \\
        --num_layouts 256 --num_shuffled 128 --num_swapped 128 --output metrics.json

--data takes what `python -m data_prep.layouts prepare --source procedural` writes, of held-out identities. Each model
is compared with the one before it, and one that has a feedback bridge with itself without it, on the same layouts and
noise. Definitions: evaluation/layout_flux/metrics.py; public benchmarks: python -m evaluation.layout_flux.benchmarks
"""

from __future__ import annotations

from backlot.command_line import parse
from evaluation.layout_flux.settings import Settings


def main(argv: list[str] | None = None) -> None:
    settings = parse(Settings, argv, "python -m evaluation.layout_flux", __doc__)

    from evaluation.layout_flux.report import report

    report(settings)


if __name__ == "__main__":
    main()
