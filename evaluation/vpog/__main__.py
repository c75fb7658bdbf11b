"""python -m evaluation.vpog measure|predict|score ..."""

from __future__ import annotations

from backlot.command_line import run_command

COMMANDS = {
    "measure": ("evaluation.vpog.commands:measure", "all figures of a pipeline, beside simpler answers: metrics.json"),
    "predict": ("evaluation.vpog.commands:predict", "poses of a BOP dataset's objects as csv"),
    "score": ("evaluation.vpog.commands:score", "what a csv file of poses is worth"),
}


def main(argv: list[str] | None = None) -> None:
    run_command(COMMANDS, "evaluation.vpog", argv)


if __name__ == "__main__":
    main()
