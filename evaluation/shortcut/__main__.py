"""Measure a trained shortcut model at several step counts.

    python -m evaluation.shortcut outputs/shortcut-digits
    python -m evaluation.shortcut outputs/celeba --dataset_name imagefolder --path photos --num_samples 50000 \\
        --steps 1 2 4 8 32 128 --mode shortcut flow --inception_weights inception-2015-12-05.pt

Writes results.jsonl (a row per setting), grid.png (a row of samples per setting, a class and its noise per column) and
loss_by_level_and_time.json. Digits are compared by energy distance and by Frechet distance in a small classifier's
features, other pictures by FID and KID, and by energy distance where they are small.
"""

from __future__ import annotations

from backlot.command_line import parse
from evaluation.shortcut.settings import Settings


def main(argv: list[str] | None = None) -> None:
    settings = parse(Settings, argv, "python -m evaluation.shortcut", __doc__)

    from evaluation.shortcut.report import report

    report(settings)


if __name__ == "__main__":
    main()
