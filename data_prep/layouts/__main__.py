"""python -m data_prep.layouts prepare|check ..."""

from backlot.command_line import run_command

COMMANDS = {
    "prepare": ("data_prep.layouts.commands:prepare", "scenes or somebody's layouts -> what training reads"),
    "check": ("data_prep.layouts.commands:check", "name every bad sample"),
}


def main(argv: list[str] | None = None) -> None:
    run_command(COMMANDS, "data_prep.layouts", argv)


if __name__ == "__main__":
    main()
