"""python -m data_prep.images encode ..."""

from backlot.command_line import run_command

COMMANDS = {
    "encode": ("data_prep.images.commands:encode", "pictures -> latents of a VAE"),
}


def main(argv: list[str] | None = None) -> None:
    run_command(COMMANDS, "data_prep.images", argv)


if __name__ == "__main__":
    main()
