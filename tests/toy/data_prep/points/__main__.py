"""python -m data_prep.points synth ..."""

from backlot.command_line import run_command

COMMANDS = {
    "synth": ("data_prep.points.commands:synth", "eight clouds of points on a circle"),
}


def main(argv: list[str] | None = None) -> None:
    run_command(COMMANDS, "data_prep.points", argv)


if __name__ == "__main__":
    main()
