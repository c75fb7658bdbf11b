"""Measure a trained scene model: are all objects there, in place, apart from one another and supported.

    python -m evaluation.shortcut_scene outputs/scene --data data/scenes
    python -m evaluation.shortcut_scene outputs/scene --data data/scenes --steps 1 4 32 --flow --meshes

--data takes what `python -m data_prep.scenes encode` writes, and --split one of its splits. --flow also samples with
plain Euler, at the same step counts. --meshes adds Chamfer distance, F-score and intersection over union (slow).
Metrics are defined in evaluation/shortcut_scene/metrics.py; nothing is aligned before it is measured.
"""

from __future__ import annotations

from backlot.command_line import parse
from evaluation.shortcut_scene.settings import Settings


def main(argv: list[str] | None = None) -> None:
    settings = parse(Settings, argv, "python -m evaluation.shortcut_scene", __doc__)

    from evaluation.shortcut_scene.report import report

    report(settings)


if __name__ == "__main__":
    main()
