"""Make, encode and check scenes.

    python -m data_prep.scenes synth --out data/scenes               objects of many kinds on a floor, with pictures
    python -m data_prep.scenes build --glb models --out data/scenes  scenes of your own from GLB files
    python -m data_prep.scenes encode data/scenes --vae outputs/vae  shapes -> latents, and their statistics
    python -m data_prep.scenes verify data/scenes                    name every bad scene; exit code 1 if there is one
    python -m data_prep.scenes stats data/scenes                     fit the codec again, and describe the scenes
    python -m data_prep.scenes example --out data/example            random objects, to see the format

The format is described in `data_prep/scenes/format.py`; trainers/train_shape_vae.py trains the VAE.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NoReturn

DEFAULT_ROOT = Path("data/scenes")


class Parser(argparse.ArgumentParser):
    """Answers a wrong argument with one line; no abbreviations."""

    def __init__(self, **settings):
        super().__init__(**settings, allow_abbrev=False)

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"error: {message}\n")


def number(kind: type, low: float, high: float = math.inf) -> Callable[[str], int | float]:
    """An argparse type: a number in [low, high]."""

    def parse(text: str) -> int | float:
        value = kind(text)
        if not low <= value <= high:
            allowed = f"at least {low:g}" if high == math.inf else f"in [{low:g}, {high:g}]"
            raise argparse.ArgumentTypeError(f"must be {allowed}, got {text}")
        return value

    parse.__name__ = kind.__name__  # argparse names it where the text is no number
    return parse


def synth(args: argparse.Namespace) -> None:
    from data_prep.scenes.synth import build_synth

    build_synth(
        args.out,
        num_train=args.num_train,
        num_val=args.num_val,
        num_test=args.num_test,
        seed=args.seed,
        image_size=args.image_size,
        resolution=args.resolution,
        num_objects=tuple(args.num_objects),
        stack_prob=args.stack_prob,
        isotropic_scale=args.isotropic_scale,
        num_workers=args.num_workers,
        **({"families": tuple(args.families)} if args.families else {}),
    )
    print(f"{args.num_train} scenes to train on, {args.num_val} to validate: {args.out}")


def build(args: argparse.Namespace) -> None:
    from data_prep.scenes.glb import build_glb

    count = build_glb(
        args.glb,
        args.out,
        args.split,
        val_fraction=args.val_fraction,
        resolution=args.resolution,
        image_size=args.image_size,
        isotropic_scale=args.isotropic_scale,
        bake_shear=args.bake_shear,
    )
    print(f"{count} scenes: {args.out}")


def encode(args: argparse.Namespace) -> None:
    from data_prep.scenes.encode import encode_scenes

    count = encode_scenes(
        args.root,
        args.vae,
        args.out,
        split=args.split,
        device=args.device,
        batch_size=args.batch_size,
        format=args.format,
        image_encoder=args.image_encoder,
        overwrite=args.overwrite,
    )
    print(f"{count} scenes encoded: {args.out or args.root}")


def verify(args: argparse.Namespace) -> None:
    from data_prep.scenes.check import verify

    problems = verify(args.scene_dir or args.root, args.vae, args.device)
    for problem in problems:
        print(problem)
    print(f"problems: {len(problems)}")
    if problems:
        raise SystemExit(1)


def stats(args: argparse.Namespace) -> None:
    from data_prep.scenes.check import print_stats
    from data_prep.scenes.encode import compute_stats

    print_stats(args.root)
    codec = compute_stats(args.root, args.mode)
    print(f"{args.root / codec.config_name}: {args.mode} codec of the train split")


def example(args: argparse.Namespace) -> None:
    """A scene of random objects in a row on the floor, one for each split, in the names of the guide."""
    import torch

    from data_prep.scenes.format import write_scene

    count, generator = args.num_objects, torch.Generator().manual_seed(args.seed)
    for split in ("train", "val"):
        size = torch.empty(count, 3).uniform_(0.2, 0.5, generator=generator)
        angle = torch.rand(count, generator=generator) * 2 * math.pi
        first = torch.stack([angle.cos(), angle.sin(), torch.zeros(count)], dim=1)
        second = torch.stack([-angle.sin(), angle.cos(), torch.zeros(count)], dim=1)
        place = torch.stack([torch.arange(count) - (count - 1) / 2, torch.zeros(count), size[:, 2] / 2], dim=1)
        tensors = {
            "shape": torch.randn(count, 64, 8, generator=generator),
            "translation": place[:, None],
            "scale": size.log()[:, None],
            "6drotation_normalized": torch.cat([first, second], dim=1)[:, None],
        }
        conditionals = {
            "image": torch.rand(3, 32, 32, generator=generator) * 2 - 1,
            "pointmap": torch.randn(3, 32, 32, generator=generator),
        }
        metadata = {
            "scene_id": "example",
            "num_objects": count,
            "object_ids": [f"object_{i}" for i in range(count)],
            "frame": "floor",
            "shape_layout": "tokens_channels",
        }
        folder = args.out / split / "example"
        write_scene(folder, tensors=tensors, conditionals=conditionals, metadata=metadata, format="pt")
        print(folder)


def add_encode(commands: argparse._SubParsersAction, name: str, help: str, names: dict[str, str]) -> None:
    """The command that encodes; `names` are the flags of its input, output and VAE."""
    command = commands.add_parser(name, help=help, description=help)
    if names["root"].startswith("--"):
        command.add_argument(names["root"], dest="root", type=Path, required=True, help="scenes with shapes")
    else:
        command.add_argument(names["root"], type=Path, nargs="?", default=DEFAULT_ROOT, help="scenes with shapes")
    command.add_argument(names["vae"], dest="vae", type=Path, required=True, help="folder of the occupancy VAE")
    command.add_argument(names["out"], dest="out", type=Path, help="where to; beside the shapes if left out")
    command.add_argument("--split", help="train, val or test; all of them if left out")
    command.add_argument("--device", help="where models run; the accelerator if there is one")
    command.add_argument("--batch_size", type=number(int, 1), default=64, help="objects per call")
    command.add_argument("--format", choices=("safetensors", "pt"), default="safetensors")
    command.add_argument(
        "--image_encoder", type=Path, help="folder of a vision model, whose tokens of the picture to add"
    )
    command.add_argument("--overwrite", action="store_true", help="encode again what another model has encoded")
    command.set_defaults(run=encode)


def create_parser() -> Parser:
    parser = Parser(prog="python -m data_prep.scenes", description=__doc__.split("\n")[0])
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    command = commands.add_parser("synth", help="make scenes of many kinds of objects, with pictures of them")
    command.add_argument("--out", type=Path, default=DEFAULT_ROOT)
    command.add_argument("--num_train", type=number(int, 1), default=4000)
    command.add_argument("--num_val", type=number(int, 1), default=200)
    command.add_argument("--num_test", type=number(int, 0), default=0)
    command.add_argument("--seed", type=number(int, 0), default=0)
    command.add_argument("--image_size", type=number(int, 8), default=32, help="side of the pictures in pixels")
    command.add_argument("--resolution", type=number(int, 4), default=16, help="side of the occupancy grids")
    command.add_argument("--num_objects", type=number(int, 1), nargs=2, default=[2, 5], metavar=("LOW", "HIGH"))
    command.add_argument("--stack_prob", type=number(float, 0, 1), default=0.25, help="share of scenes with a stack")
    command.add_argument("--families", nargs="+", help="kinds of objects; all if left out")
    command.add_argument("--isotropic_scale", action="store_true", help="shapes keep their aspect, one size per object")
    command.add_argument("--num_workers", type=number(int, 0), default=0, help="processes beside this one")
    command.set_defaults(run=synth)

    for name in ("build", "glb"):
        command = commands.add_parser(name, help="make scenes of GLB files, an object per node")
        command.add_argument("--glb", type=Path, required=True, help="a GLB file, or a folder of them")
        command.add_argument("--out", type=Path, default=DEFAULT_ROOT)
        command.add_argument("--split", choices=("train", "val", "test"), help="of all scenes; drawn if left out")
        command.add_argument("--val_fraction", type=number(float, 0, 1), default=0.1, help="share of val where drawn")
        command.add_argument("--resolution", type=number(int, 4), default=16, help="side of the occupancy grids")
        command.add_argument("--image_size", type=number(int, 8), default=32, help="side of the pictures in pixels")
        keeps_aspect = argparse.BooleanOptionalAction
        command.add_argument("--isotropic_scale", action=keeps_aspect, default=True, help="shapes keep their aspect")
        command.add_argument(
            "--bake_shear", action="store_true", help="put a node's shear into its mesh, not refuse it"
        )
        command.set_defaults(run=build)

    add_encode(
        commands, "encode", "encode shapes with an occupancy VAE", {"root": "root", "vae": "--vae", "out": "--out"}
    )
    guide = {"root": "--input_scenes", "vae": "--vae_checkpoint", "out": "--output_root"}
    add_encode(commands, "prepare", "the same as encode", guide)

    command = commands.add_parser("verify", help="name every bad scene; exit code 1 if there is one")
    command.add_argument("root", type=Path, nargs="?", default=DEFAULT_ROOT, help="all scenes, or the folder of one")
    command.add_argument("--scene_dir", type=Path, help="the same as root")
    command.add_argument("--vae", type=Path, help="also decode shapes with this VAE, and compare with the occupancy")
    command.add_argument("--device", help="where it runs; the accelerator if there is one")
    command.set_defaults(run=verify)

    command = commands.add_parser("stats", help="describe scenes, and fit the codec to those to train on")
    command.add_argument("root", type=Path, nargs="?", default=DEFAULT_ROOT)
    command.add_argument("--mode", choices=("zscore", "sam3d", "identity"), default="zscore", help="kind of codec")
    command.set_defaults(run=stats)

    command = commands.add_parser("example", help="write scenes of random objects, to see the format")
    command.add_argument("--out", type=Path, required=True)
    command.add_argument("--num_objects", type=number(int, 1), default=5)
    command.add_argument("--seed", type=number(int, 0), default=0)
    command.set_defaults(run=example)
    return parser


def main(argv: Sequence[str] | None = None) -> None:
    parser = create_parser()
    args = parser.parse_args(argv)
    try:
        args.run(args)
    except (OSError, ValueError) as error:
        parser.error(" ".join(str(error).split()))


if __name__ == "__main__":
    main()
