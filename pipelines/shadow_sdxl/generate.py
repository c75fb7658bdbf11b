"""Cast the shadow of an object: the map, the object on a background with it, and a picture that shows how.

    python -m pipelines.shadow_sdxl.generate MODEL --image cup.png --theta 30 --phi 45 --size 4 --output out/cup.png
    ... --phi 0 45 90 135 180 225 270 315        a sweep: every combination of the given values, and a grid
    ... --preset overcast --time_of_day evening  hardness and strength of the shadow, direction of the light

The object's mask is its alpha channel, or --mask. Written are cup.png (the map: 8-bit grey, white = full shadow),
cup_composite.png and cup_visualization.png; of a sweep cup_theta30_phi45_size4.png and so on, and cup_grid.png.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal, Self

from PIL import Image, ImageColor, ImageFilter, ImageOps
from pydantic import Field, field_validator, model_validator

from backlot.command_line import fail, input_errors, parse
from backlot.program_settings import TypedModelSettings

if TYPE_CHECKING:
    from pipelines.shadow_sdxl.pipeline import ShadowSDXLPipeline

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


class Settings(TypedModelSettings):
    image: Path
    """the object, best with an alpha channel"""
    mask: Path | None = None
    """white where the object is; the image's alpha channel without one"""
    theta: tuple[Annotated[float, Field(ge=0, le=45)], ...] = (THETA,)
    """light from overhead, 0 to 45 degrees"""
    phi: tuple[Annotated[float, Field(ge=-360, le=360)], ...] = (PHI,)
    """0 = from the right, 90 = from behind"""
    size: tuple[Annotated[float, Field(ge=2, le=8)], ...] | None = None
    """of the light, 2 = hard to 8 = soft; 4 or that of the preset if left out"""
    time_of_day: tuple[Literal[tuple(TIMES_OF_DAY)], ...] | None = None
    """sets theta and phi"""
    preset: Literal[tuple(PRESETS)] | None = None
    """sets size and intensity, unless they are given"""
    steps: int = Field(1, ge=1)
    """network calls per map"""
    intensity: float | None = Field(None, ge=0, le=10)
    """multiplies the map; 1 or that of the preset if left out"""
    tint: str = "#000000"
    """colour of full shadow"""
    background: str = "#e8e4dc"
    """a colour, or a picture, which is cut to fit"""
    blur: float = Field(0.0, ge=0, le=1000)
    """of the composite's shadow, in pixels"""
    seed: int = Field(0, ge=0)
    """the noise, the same for every light"""
    resolution: int | None = Field(None, ge=1)
    """side of the square the network sees; that of its training if left out"""
    batch_size: int = Field(4, ge=1)
    """lights that go through it together"""
    output: Path
    """a .png file; others are named after it"""

    @field_validator("tint")
    @classmethod
    def _is_colour(cls, value: str) -> str:
        ImageColor.getrgb(value)
        return value

    @field_validator("output")
    @classmethod
    def _is_png(cls, value: Path) -> Path:
        if value.suffix.lower() != ".png":
            raise ValueError("must end in .png")
        return value

    @model_validator(mode="after")
    def _one_direction(self) -> Self:
        if self.time_of_day and {"theta", "phi"} & self.model_fields_set:
            raise ValueError("--time_of_day sets theta and phi: give either")
        return self


def choose_lights(settings: Settings) -> tuple[list[list[Light]], float]:
    """Every combination of the given values, in the rows and columns of the grid, and the intensity."""
    size, intensity = PRESETS.get(settings.preset, (SIZE, INTENSITY))
    sizes = settings.size or [size]
    if settings.time_of_day:
        directions = [[TIMES_OF_DAY[name] for name in settings.time_of_day]]
    elif len(settings.phi) > 1:
        directions = [[(theta, phi) for phi in settings.phi] for theta in settings.theta]
    else:
        directions = [[(theta, settings.phi[0]) for theta in settings.theta]]
    rows = [[(*direction, size) for direction in row] for row in directions for size in sizes]
    if len(rows[0]) == 1:  # only sizes vary: side by side
        rows = [[row[0] for row in rows]]
    return rows, intensity if settings.intensity is None else settings.intensity


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
    import torch

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
    settings = parse(Settings, argv, "python -m pipelines.shadow_sdxl.generate", __doc__)
    rows, intensity = choose_lights(settings)
    lights = [light for row in rows for light in row]
    image = open_picture(settings.image, "--image")
    background = open_background(settings.background, image.size)
    mask = open_picture(settings.mask, "--mask").convert("L") if settings.mask else None
    with input_errors(f"error: --output {settings.output}"):
        settings.output.parent.mkdir(parents=True, exist_ok=True)

    from backlot.loading import load_pipeline
    from pipelines.shadow_sdxl.pipeline import ShadowSDXLPipeline, find_mask

    mask = mask or find_mask(image)
    pipeline = load_pipeline(ShadowSDXLPipeline, settings.model_dir, settings.device, settings.dtype)
    pipeline.set_progress_bar_config(disable=True)
    began = time.perf_counter()
    with input_errors():
        maps = cast_shadows(
            pipeline,
            image,
            mask,
            lights,
            batch_size=settings.batch_size,
            seed=settings.seed,
            num_inference_steps=settings.steps,
            resolution=settings.resolution,
            intensity=intensity,
        )
    seconds = time.perf_counter() - began
    save(settings, image, mask, background, rows, maps)
    print(f"{len(lights)} shadow{'s' * (len(lights) > 1)} in {seconds:.2f} s on {pipeline.device}")


def save(
    settings: Settings,
    image: Image.Image,
    mask: Image.Image,
    background: Image.Image,
    rows: list[list[Light]],
    maps: list[Image.Image],
) -> None:
    """Map, composite and visualization of each light, and the grid of a sweep; their names are printed."""
    from backlot.pictures import image_grid
    from pipelines.shadow_sdxl.pipeline import composite

    base, grid = settings.output.with_suffix(""), [[] for _ in rows]
    object_alone = composite(image, Image.new("L", image.size), "#808080", mask)
    places = [(i, light) for i, row in enumerate(rows) for light in row]
    for (row, light), shadow in zip(places, maps, strict=True):
        name = "{}_theta{:g}_phi{:g}_size{:g}".format(base, *light) if len(maps) > 1 else str(base)
        blurred = shadow.filter(ImageFilter.GaussianBlur(settings.blur)) if settings.blur else shadow
        picture = composite(image, blurred, background, mask, tint=settings.tint)
        pictures = [shrink(each) for each in (object_alone, mask, shadow, picture)]
        shadow.save(f"{name}.png")
        picture.save(f"{name}_composite.png")
        image_grid([pictures], [describe(light)]).save(f"{name}_visualization.png")
        grid[row].append(pictures[-1])
        print(f"{name}.png: {describe(light)}")
    if len(maps) > 1:
        image_grid(grid, [describe(*row) for row in rows]).save(f"{base}_grid.png")
        print(f"{base}_grid.png")


if __name__ == "__main__":
    main()
