"""Cast the shadow of an object: the map, the object on a background with it, and a picture that shows how.

    python -m pipelines.shadow_sdxl.generate MODEL --image cup.png --theta 30 --phi 45 --size 4 --output out/cup.png
    ... --phi 0 45 90 135 180 225 270 315        a sweep: every combination of the given values, and a grid
    ... --preset overcast --time_of_day evening  hardness and strength of the shadow, direction of the light

The object's mask is its alpha channel, or --mask. Written are cup.png (the map: 8-bit grey, white = full shadow),
cup_composite.png and cup_visualization.png; of a sweep cup_theta30_phi45_size4.png and so on, and cup_grid.png.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Sequence
from pathlib import Path

import torch
from PIL import Image, ImageColor, ImageFilter, ImageOps

from backlot.codecs import DTYPES
from backlot.command_line import Parser, fail, number
from backlot.loading import load_pipeline
from backlot.pictures import image_grid
from pipelines.shadow_sdxl.light import LIGHT_RANGES
from pipelines.shadow_sdxl.pipeline import ShadowSDXLPipeline, composite, find_mask

# size of the light and strength of the shadow
PRESETS = {"studio": (2.0, 0.9), "sunny": (3.0, 0.8), "overcast": (6.0, 0.6), "indoor": (8.0, 0.5)}
# theta and phi: the sun goes from the right to the left, behind the object
TIMES_OF_DAY = {
    "dawn": (45.0, 0.0),
    "morning": (30.0, 30.0),
    "noon": (5.0, 90.0),
    "afternoon": (30.0, 150.0),
    "dusk": (45.0, 180.0),
}
THETA, PHI, SIZE, INTENSITY = 30.0, 45.0, 4.0, 1.0
VISIBLE_SIDE = 256  # of the pictures in a grid

Light = tuple[float, float, float]


def create_parser() -> argparse.ArgumentParser:
    parser = Parser(prog="python -m pipelines.shadow_sdxl.generate", description=__doc__.split("\n")[0])
    parser.add_argument("model_dir", type=Path, help="folder of an exported ShadowSDXLPipeline, or of a finished run")
    parser.add_argument("--image", type=Path, required=True, help="the object, best with an alpha channel")
    parser.add_argument("--mask", type=Path, help="white where the object is; the image's alpha channel without one")
    theta, size = (number(float, *LIGHT_RANGES[name]) for name in ("theta", "size"))
    parser.add_argument("--theta", type=theta, nargs="+", help=f"light from overhead, 0 to 45 degrees [{THETA:g}]")
    parser.add_argument(
        "--phi", type=number(float, -360, 360), nargs="+", help=f"0 = from the right, 90 = from behind [{PHI:g}]"
    )
    parser.add_argument("--size", type=size, nargs="+", help=f"of the light, 2 = hard to 8 = soft [{SIZE:g}]")
    parser.add_argument("--time_of_day", choices=TIMES_OF_DAY, nargs="+", help="sets theta and phi")
    parser.add_argument("--preset", choices=PRESETS, help="sets size and intensity, unless they are given")
    parser.add_argument("--steps", type=number(int, 1), default=1, help="network calls per map")
    parser.add_argument("--intensity", type=number(float, 0, 10), help=f"multiplies the map [{INTENSITY:g}]")
    parser.add_argument("--tint", type=colour, default="#000000", help="colour of full shadow")
    parser.add_argument("--background", default="#e8e4dc", help="a colour, or a picture, which is cut to fit")
    parser.add_argument("--blur", type=number(float, 0, 1000), default=0.0, help="of the composite's shadow, in pixels")
    parser.add_argument("--seed", type=number(int, 0), default=0, help="the noise, the same for every light")
    parser.add_argument("--resolution", type=number(int, 1), help="side of the square the network sees")
    parser.add_argument("--batch_size", type=number(int, 1), default=4, help="lights that go through it together")
    parser.add_argument("--device", help="the accelerator if there is one")
    parser.add_argument("--dtype", choices=DTYPES, default="float32")
    parser.add_argument("--output", type=Path, required=True, metavar="OUT.png")
    return parser


def colour(text: str) -> str:
    ImageColor.getrgb(text)  # a ValueError is what argparse wants
    return text


def choose_lights(args: argparse.Namespace) -> tuple[list[list[Light]], float]:
    """Every combination of the given values, in the rows and columns of the grid, and the intensity."""
    if args.time_of_day and (args.theta or args.phi):
        fail("--time_of_day sets theta and phi: give either")
    size, intensity = PRESETS.get(args.preset, (SIZE, INTENSITY))
    thetas, phis, sizes = args.theta or [THETA], args.phi or [PHI], args.size or [size]
    if args.time_of_day:
        directions = [[TIMES_OF_DAY[name] for name in args.time_of_day]]
    elif len(phis) > 1:
        directions = [[(theta, phi) for phi in phis] for theta in thetas]
    else:
        directions = [[(theta, phis[0]) for theta in thetas]]
    rows = [[(*direction, size) for direction in row] for row in directions for size in sizes]
    if len(rows[0]) == 1:  # only sizes vary: side by side
        rows = [[row[0] for row in rows]]
    return rows, intensity if args.intensity is None else args.intensity


def open_picture(path: Path, flag: str) -> Image.Image:
    """Decode a picture, upright; `fail` names the flag."""
    try:
        with Image.open(path) as image:
            image.load()
            return ImageOps.exif_transpose(image)
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        reason = "there is no such file" if isinstance(error, FileNotFoundError) else "it cannot be read as a picture"
        fail(f"{flag} {path}: {reason}")


def open_background(text: str, size: tuple[int, int]) -> Image.Image:
    """A colour or a picture file -> RGB of the given width and height."""
    if Path(text).is_file():
        return ImageOps.fit(open_picture(Path(text), "--background").convert("RGB"), size)
    try:
        return Image.new("RGB", size, text)
    except ValueError:
        fail(f"--background {text}: neither a colour nor a file")


def cast_shadows(
    pipeline: ShadowSDXLPipeline,
    image: Image.Image,
    mask: Image.Image,
    lights: Sequence[Light],
    *,
    batch_size: int = 4,
    seed: int = 0,
    **settings,
) -> list[Image.Image]:
    """The map of one object under every light, all from the same noise.

    Args:
        lights: (theta, phi, size) each.
        settings: of the pipeline's call, such as `num_inference_steps` and `intensity`.
    """
    maps = []
    for start in range(0, len(lights), batch_size):
        theta, phi, size = (list(values) for values in zip(*lights[start : start + batch_size], strict=True))
        generators = [torch.Generator().manual_seed(seed) for _ in theta]
        maps += pipeline(image, mask, theta, phi, size, generator=generators, **settings).images
    return maps


def shrink(image: Image.Image) -> Image.Image:
    """At most `VISIBLE_SIDE` pixels a side."""
    factor = min(1.0, VISIBLE_SIDE / max(image.size))
    return image.convert("RGB").resize([max(1, round(side * factor)) for side in image.size])


def describe(*lights: Light) -> str:
    """What is equal once, what differs one after the other: theta 30, phi 0 90 180, size 4."""
    texts = []
    for name, values in zip(("theta", "phi", "size"), zip(*lights, strict=True), strict=True):
        values = values if len(set(values)) > 1 else values[:1]
        texts.append(f"{name} {' '.join(f'{value:g}' for value in values)}")
    return ", ".join(texts)


def main(argv: Sequence[str] | None = None) -> None:
    args = create_parser().parse_args(argv)
    rows, intensity = choose_lights(args)
    lights = [light for row in rows for light in row]
    if args.output.suffix.lower() != ".png":
        fail(f"--output must end in .png, got {args.output}")
    image = open_picture(args.image, "--image")
    mask = open_picture(args.mask, "--mask").convert("L") if args.mask else find_mask(image)
    background = open_background(args.background, image.size)
    base = args.output.with_suffix("")
    try:
        base.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        fail(f"--output {args.output}: {error.strerror}")
    pipeline = load_pipeline(ShadowSDXLPipeline, args.model_dir, args.device, args.dtype)
    pipeline.set_progress_bar_config(disable=True)
    settings = {"num_inference_steps": args.steps, "resolution": args.resolution, "intensity": intensity}
    began = time.perf_counter()
    try:
        maps = cast_shadows(pipeline, image, mask, lights, batch_size=args.batch_size, seed=args.seed, **settings)
    except ValueError as error:
        fail(str(error))
    seconds = time.perf_counter() - began

    grid = [[] for _ in rows]
    object_alone = composite(image, Image.new("L", image.size), "#808080", mask)
    places = [(i, light) for i, row in enumerate(rows) for light in row]
    for (row, light), shadow in zip(places, maps, strict=True):
        name = "{}_theta{:g}_phi{:g}_size{:g}".format(base, *light) if len(lights) > 1 else str(base)
        blurred = shadow.filter(ImageFilter.GaussianBlur(args.blur)) if args.blur else shadow
        picture = composite(image, blurred, background, mask, tint=args.tint)
        pictures = [shrink(each) for each in (object_alone, mask, shadow, picture)]
        shadow.save(f"{name}.png")
        picture.save(f"{name}_composite.png")
        image_grid([pictures], [describe(light)]).save(f"{name}_visualization.png")
        grid[row].append(pictures[-1])
        print(f"{name}.png: {describe(light)}")
    if len(lights) > 1:
        image_grid(grid, [describe(*row) for row in rows]).save(f"{base}_grid.png")
        print(f"{base}_grid.png")
    print(f"{len(lights)} shadow{'s' * (len(lights) > 1)} in {seconds:.2f} s on {pipeline.device}")


if __name__ == "__main__":
    main()
