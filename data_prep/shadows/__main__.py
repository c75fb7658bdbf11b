"""python -m data_prep.shadows render|check|encode ..."""

from backlot.command_line import run_command

COMMANDS = {
    "render": ("data_prep.shadows.commands:render", "objects, masks and shadows by path tracing"),
    "check": ("data_prep.shadows.commands:check", "name every bad sample"),
    "encode": ("data_prep.shadows.commands:encode", "pictures -> latents of a VAE"),
}


def main(argv: list[str] | None = None) -> None:
    run_command(COMMANDS, "data_prep.shadows", argv)


if __name__ == "__main__":
    main()
