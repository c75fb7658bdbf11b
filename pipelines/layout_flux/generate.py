"""Draw the picture that a layout file describes, and the same with its boxes.

    python -m pipelines.layout_flux.generate LAYOUT.json --adapter runs/checkpoints/stage3 --output out/scene.png

LAYOUT.json:

    {"prompt": "a red disc and a striped blue square on grey",
     "width": 1024, "height": 1024,
     "objects": [
       {"prompt": "a red disc", "box": [0.10, 0.15, 0.45, 0.50]},
       {"prompt": "a striped blue square", "box": [0.40, 0.40, 0.95, 0.95], "reference": "square.png"}]}

`box` is x1 y1 x2 y2 in 0 ... 1 from the left and the top. What an object may have: `category`; `reference`, a picture
of it beside the file, or {"image": ..., "box": [...]}; `foreground`, true, false or 0 ... 1, for all objects or none;
`phrase`, its words in the prompt where they are not its own prompt. The file may have `negative_prompt`. A caption
file of `data_prep.layouts` is a layout file, too.

Written are scene.png and scene_boxes.png: red boxes are foreground (alpha at least 0.5), blue ones background.
"""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, Self

from pydantic import Field, ValidationError, field_validator, model_validator

from backlot.command_line import DtypeName, Positional, fail, input_errors, parse
from backlot.config import Section
from backlot.program_settings import DeviceSettings

if TYPE_CHECKING:
    from PIL import Image

    from pipelines.layout_flux.pipeline import FluxLayoutPipeline

BASE = "black-forest-labs/FLUX.1-dev"
Share = Annotated[float, Field(ge=0, le=1)]
Box = tuple[Share, Share, Share, Share]


class Reference(Section):
    """A picture of an object, and where in it the object is."""

    image: Path
    box: Box = (0.0, 0.0, 1.0, 1.0)


class LayoutObject(Section):
    prompt: str = Field(min_length=1)
    box: Box
    category: str | None = None
    reference: Reference | None = None
    foreground: bool | Share | None = None
    phrase: str | tuple[int, int] | None = None

    @field_validator("reference", mode="before")
    @classmethod
    def _or_path(cls, value: object) -> object:
        return {"image": value} if isinstance(value, str) else value

    @model_validator(mode="after")
    def _is_box(self) -> Self:
        for x1, y1, x2, y2 in (self.box, *([self.reference.box] if self.reference else [])):
            if not (x1 < x2 and y1 < y2):
                raise ValueError(f"a box must be x1 y1 x2 y2 with x1 < x2 and y1 < y2, got {[x1, y1, x2, y2]}")
        return self

    @property
    def text(self) -> str:
        """What CLIP reads of it, as in training."""
        return f"{self.category}, {self.prompt}" if self.category else self.prompt


class LayoutFile(Section):
    prompt: str
    objects: tuple[LayoutObject, ...] = ()
    negative_prompt: str | None = None
    width: int | None = Field(None, ge=1)
    height: int | None = Field(None, ge=1)

    @model_validator(mode="after")
    def _foreground_of_all(self) -> Self:
        if len({each.foreground is None for each in self.objects}) > 1:
            raise ValueError("`foreground` must be given for every object, or for none")
        return self

    def spans(self) -> list[tuple[int, int] | None]:
        """Characters of the phrases that are given; None where the object's own prompt is to be looked for.

        Raises:
            ValueError: a phrase that the prompt does not hold.
        """
        found = []
        for each in self.objects:
            place = each.phrase
            if isinstance(place, str):
                start = self.prompt.lower().find(place.lower())
                if start < 0:
                    raise ValueError(f"`phrase` {place!r} is not in the prompt {self.prompt!r}")
                place = (start, start + len(place))
            found.append(place)
        return found


class LoadSettings(DeviceSettings):
    """What is loaded, and how it runs."""

    model: str = BASE
    """FLUX: hub id, folder, or exported layout pipeline"""
    adapter: str | None = None
    """layout adapter: folder, checkpoint, run or hub id; that of the model if left out"""
    clip: str | None = None
    """encodes reference pictures: CLIP's vision tower, hub id or folder; the adapter's if left out"""
    dino: str | None = None
    """and DINOv2"""
    dtype: DtypeName = "bfloat16"
    """that the networks compute in"""
    offload: Literal["none", "model", "sequential"] = "none"
    """keep networks in main memory while they wait"""


class Settings(LoadSettings):
    layout: Annotated[Path, Positional]
    """the layout, JSON"""
    output: Path = Path("layout.png")
    """a .png file; the one with boxes is named after it"""
    width: int | None = Field(None, ge=1)
    """of the picture in pixels; the file's if left out"""
    height: int | None = Field(None, ge=1)
    """likewise"""
    num_inference_steps: int = Field(28, ge=1)
    """network calls; 4 for FLUX.1-schnell"""
    guidance_scale: float = Field(3.5, ge=0)
    """of FLUX's own guidance"""
    true_cfg_scale: float = Field(1.0, ge=0)
    """above 1 with a negative prompt: away from it, for a second network call per step"""
    layout_scale: float = Field(1.0, ge=0)
    """strength of the boxes"""
    identity_scale: float = Field(1.0, ge=0)
    """strength of references and texts of objects"""
    layout_guidance_scale: float = Field(1.0, ge=0)
    """above 1: beyond the boxes' effect, for a second network call while they act"""
    grounding_ratio: float = Field(0.3, ge=0, le=1)
    """share of the steps in which boxes act"""
    modulation_ratio: float = Field(1.0, ge=0, le=1)
    """share of the steps in which identities act"""
    feedback: bool = True
    """whether the bridge acts"""
    max_sequence_length: int = Field(512, ge=1, le=512)
    """tokens of the prompt"""
    num_images: int = Field(1, ge=1)
    """pictures, with seeds that follow one another"""
    seed: int = Field(0, ge=0)
    """of the noise"""

    @field_validator("output")
    @classmethod
    def _is_png(cls, value: Path) -> Path:
        if value.suffix.lower() != ".png":
            raise ValueError("must end in .png")
        return value


def read_layout(path: Path) -> LayoutFile:
    """A layout file or a caption file; `fail` says what is wrong with it."""
    try:
        return parse_layout(path.read_text(encoding="utf-8"))
    except OSError as error:
        fail(f"{path}: {error.strerror}")
    except ValueError as error:
        fail(f"{path}: {error}")


def parse_layout(text: str) -> LayoutFile:
    """A layout from its JSON; ValueError says in one line what is wrong."""
    try:
        values = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"not JSON: {error}") from None
    if not isinstance(values, dict):
        raise ValueError("it must hold an object with `prompt` and `objects`")
    return check_layout(from_caption(values) if "global_caption" in values else values)


def check_layout(values: dict[str, Any]) -> LayoutFile:
    """A layout from its values; ValueError says in one line what is wrong."""
    try:
        layout = LayoutFile(**values)
    except ValidationError as error:
        raise ValueError(describe(error)) from None
    layout.spans()
    return layout


def describe(error: ValidationError) -> str:
    """All that is wrong, in one line."""
    return "; ".join(
        f"{'.'.join(map(str, detail['loc']))}: {detail['msg']}".removeprefix(": ").replace("Value error, ", "")
        for detail in error.errors()
    )


def from_caption(caption: dict[str, Any]) -> dict[str, Any]:
    """A caption file's values as those of a layout file; ValueError for what it lacks."""
    objects = []
    try:
        for each in caption["objects"]:
            reference = each.get("reference")
            objects.append(
                {
                    "prompt": each["caption"],
                    "category": each.get("category_name"),
                    "box": each["bbox"],
                    "reference": reference and {"image": reference["image_path"], "box": reference["bbox"]},
                    "phrase": each.get("phrase_span"),
                }
            )
    except (KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"no caption file: {type(error).__name__} {error}") from None
    return {
        "prompt": caption["global_caption"],
        "objects": objects,
        **{name: caption.get(name) for name in ("width", "height")},
    }


def open_references(layout: LayoutFile, folder: Path) -> list[tuple[Image.Image, Box] | None]:
    """The reference pictures, upright; paths are relative to the layout file, or to the data set that it lies in."""
    from backlot.pictures import BAD_IMAGE_ERRORS, decode_image

    pictures = []
    for each in layout.objects:
        if each.reference is None:
            pictures.append(None)
            continue
        places = (folder / each.reference.image, folder.parent / each.reference.image)
        path = next((place for place in places if place.is_file()), places[0])
        try:
            pictures.append((decode_image(path.read_bytes()), each.reference.box))
        except BAD_IMAGE_ERRORS as error:
            reason = "there is no such file" if isinstance(error, FileNotFoundError) else f"no picture: {error}"
            fail(f"reference {path}: {reason}")
    return pictures


def load(settings: LoadSettings, needs_references: bool, needs_adapter: bool) -> FluxLayoutPipeline:
    """The pipeline where it is to run, with what the layout needs; errors are the caller's."""
    from backlot.codecs import DTYPES
    from backlot.loading import default_device
    from pipelines.layout_flux.pipeline import FluxLayoutPipeline

    device = settings.device or default_device()
    pipeline = FluxLayoutPipeline.from_pretrained(settings.model, dtype=DTYPES[settings.dtype])
    if settings.adapter is not None:
        pipeline.load_layout_adapter(settings.adapter)
    if needs_adapter and pipeline.layout_adapter is None:
        raise ValueError(f"--model {settings.model} has no layout adapter: give --adapter")
    if needs_references and (pipeline.clip_vision is None or settings.clip or settings.dino):
        pipeline.load_reference_encoders(settings.clip, settings.dino)
    if settings.offload == "model":
        pipeline.enable_model_cpu_offload(device=device)
    elif settings.offload == "sequential":
        pipeline.enable_sequential_cpu_offload(device=device)
    else:
        pipeline.to(device)
    return pipeline


def arguments_of(layout: LayoutFile, references: list | None) -> dict[str, Any]:
    """Of the pipeline's call: what the file says."""
    arguments = {"prompt": layout.prompt, "negative_prompt": layout.negative_prompt}
    if layout.objects:
        given = [each.foreground for each in layout.objects]
        arguments |= {
            "boxes": [list(each.box) for each in layout.objects],
            "box_prompts": [each.text for each in layout.objects],
            "reference_images": references,
            "foreground": None if given[0] is None else given,
            "phrase_spans": layout.spans(),
        }
    return arguments


def main(argv: Sequence[str] | None = None) -> None:
    settings = parse(Settings, argv, "python -m pipelines.layout_flux.generate", __doc__)
    layout = read_layout(settings.layout)
    with input_errors(f"error: --output {settings.output}"):
        settings.output.parent.mkdir(parents=True, exist_ok=True)

    import torch

    references = open_references(layout, settings.layout.parent)
    has_references = any(reference is not None for reference in references)
    with input_errors():
        pipeline = load(settings, has_references, needs_adapter=bool(layout.objects))
    pipeline.set_progress_bar_config(disable=True)
    names = ("num_inference_steps", "guidance_scale", "true_cfg_scale", "layout_scale", "identity_scale")
    names += ("layout_guidance_scale", "grounding_ratio", "modulation_ratio", "feedback", "max_sequence_length")
    began = time.perf_counter()
    with input_errors():
        output = pipeline(
            **arguments_of(layout, references if has_references else None),
            **{name: getattr(settings, name) for name in names},
            width=settings.width or layout.width,
            height=settings.height or layout.height,
            num_images_per_prompt=settings.num_images,
            generator=[torch.Generator().manual_seed(settings.seed + i) for i in range(settings.num_images)],
        )
    seconds = time.perf_counter() - began
    save(settings, layout, output.images, output.alpha)
    print(f"{settings.num_images} picture{'s' * (settings.num_images > 1)} in {seconds:.2f} s")


def save(settings: Settings, layout: LayoutFile, images: list[Image.Image], alpha: list[list[float]] | None) -> None:
    """Each picture, and the same with its boxes; their names are printed."""
    from pipelines.layout_flux.overlay import draw_boxes

    base = settings.output.with_suffix("")
    boxes, texts = [each.box for each in layout.objects], [each.prompt for each in layout.objects]
    for i, image in enumerate(images):
        name = f"{base}_seed{settings.seed + i}" if len(images) > 1 else str(base)
        image.save(f"{name}.png")
        draw_boxes(image, boxes, alpha[i] if alpha else [], texts).save(f"{name}_boxes.png")
        print(f"{name}.png, {name}_boxes.png")


if __name__ == "__main__":
    main()
