"""python -m data_prep.scenes synth|build|encode|verify|stats|example ...

The format is described in `data_prep/scenes/format.py`; trainers/train_shape_vae.py trains the VAE.
"""

from backlot.command_line import run_command

COMMANDS = {
    "synth": ("data_prep.scenes.commands:synth", "objects of many kinds on a floor, with pictures"),
    "build": ("data_prep.scenes.commands:build", "scenes of your own from GLB files"),
    "glb": ("data_prep.scenes.commands:build", "the same as build"),
    "encode": ("data_prep.scenes.commands:encode", "shapes -> latents, and their statistics"),
    "prepare": ("data_prep.scenes.commands:prepare", "the same as encode, in the names of the guide"),
    "verify": ("data_prep.scenes.commands:verify", "name every bad scene; exit code 2 if there is one"),
    "stats": ("data_prep.scenes.commands:stats", "fit the codec again, and describe the scenes"),
    "example": ("data_prep.scenes.commands:example", "random objects, to see the format"),
}


def main(argv: list[str] | None = None) -> None:
    run_command(COMMANDS, "data_prep.scenes", argv)


if __name__ == "__main__":
    main()
