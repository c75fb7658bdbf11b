"""python -m data_prep.bop render_templates|index|check|make_scenes ..."""

from backlot.command_line import run_command

COMMANDS = {
    "render_templates": ("data_prep.bop.commands:render_templates", "meshes -> views of each object from all sides"),
    "index": ("data_prep.bop.commands:index", "what lies where in tar shards or scenes, found once"),
    "check": ("data_prep.bop.commands:check", "name every bad sample, or what is wrong with a csv file of results"),
    "make_scenes": ("data_prep.bop.commands:make_scenes", "made objects in made scenes, as a BOP dataset"),
}


def main(argv: list[str] | None = None) -> None:
    run_command(COMMANDS, "data_prep.bop", argv)


if __name__ == "__main__":
    main()
