"""A page on which boxes are drawn and filled, at http://127.0.0.1:7860.

pip install 'backlot[demo]'
python -m pipelines.layout_flux.demo --model black-forest-labs/FLUX.1-dev --adapter runs/checkpoints/stage3
"""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from PIL import Image, ImageDraw
from pydantic import Field

from backlot.command_line import fail, input_errors, parse
from pipelines.layout_flux.generate import LayoutFile, LoadSettings, arguments_of, check_layout, load

if TYPE_CHECKING:
    import gradio

    from pipelines.layout_flux.pipeline import FluxLayoutPipeline

RANGES = {
    "steps": (1, 50),
    "guidance_scale": (0, 10),
    "layout_scale": (0, 2),
    "identity_scale": (0, 2),
    "grounding_ratio": (0, 1),
    "seed": (0, 2**31 - 1),
}
MAX_FILE_SIZE = 32 * 2**20
MAX_SIDE = 2048
CANVAS_SIDE = 640
"""Of the longer side of what boxes are drawn on, in pixels."""
PAPER, INK, PENDING = (245, 243, 238), (70, 70, 70), (230, 120, 20)
EXAMPLE = [
    {"prompt": "a red disc", "box": [0.1, 0.15, 0.45, 0.5]},
    {"prompt": "a striped blue square", "box": [0.4, 0.4, 0.95, 0.95]},
]


class Settings(LoadSettings):
    references: bool = True
    """whether pictures of objects can be given; needs CLIP's vision tower and DINOv2"""
    port: int = Field(7860, ge=1, le=65535)
    """to serve"""
    host: str = "127.0.0.1"
    """address to serve; 0.0.0.0 lets other machines in"""


def check_ranges(**values: float) -> None:
    """ValueError for what no slider can give; requests need not come from the page."""
    for name, value in values.items():
        low, high = RANGES[name]
        if not low <= value <= high:
            raise ValueError(f"`{name}` must be in [{low:g}, {high:g}], got {value!r}")


def read_objects(text: str) -> list[dict[str, Any]]:
    """The objects in the page's text field; ValueError if it is no list of them."""
    try:
        objects = json.loads(text or "[]")
    except (ValueError, RecursionError) as error:
        raise ValueError(f"the objects are not JSON: {error}") from None
    if not isinstance(objects, list) or not all(isinstance(each, dict) for each in objects):
        raise ValueError("the objects must be a list of {...}")
    return objects


def write_objects(objects: list[dict[str, Any]]) -> str:
    """One line per object."""
    return "[\n" + ",\n".join("  " + json.dumps(each) for each in objects) + "\n]" if objects else "[]"


def understand(
    prompt: str, text: str, pictures: Sequence[Image.Image], width: int, height: int
) -> tuple[LayoutFile, list]:
    """What the page asks for: the layout and its objects' pictures.

    Args:
        text: objects as in a layout file; only that `reference` is the number of one of the `pictures`.

    Raises:
        ValueError: what is wrong with it.
    """
    if max(width, height) > MAX_SIDE:
        raise ValueError(f"`width` and `height` must be at most {MAX_SIDE}, got {width} and {height}")
    objects, references = [], []
    for each in read_objects(text):
        number = each.pop("reference", None)
        is_number = isinstance(number, int) and not isinstance(number, bool) and 1 <= number <= len(pictures)
        if number is not None and not is_number:
            raise ValueError(f"`reference` must be the number of a picture, 1 to {len(pictures)}, got {number!r}")
        objects.append(each)
        references.append(None if number is None else pictures[number - 1].convert("RGB"))
    return check_layout({"prompt": prompt, "objects": objects, "width": width, "height": height}), references


def add_corner(
    text: str, corner: tuple[float, float] | None, point: tuple[float, float], prompt: str, reference: int | None
) -> tuple[str, tuple[float, float] | None]:
    """A click on the canvas: the first of two is remembered, the second makes a box.

    Args:
        text: the objects. corner: where the first click was, if this is the second. point: this click; both in [0, 1].
        prompt, reference: of the new object.

    Returns:
        The objects, and the corner to remember.
    """
    if corner is None:
        return text, point
    (x1, x2), (y1, y2) = (sorted(round(value, 3) for value in pair) for pair in zip(corner, point, strict=True))
    if x1 == x2 or y1 == y2:
        return text, None
    added = {"prompt": prompt.strip() or "object", "box": [x1, y1, x2, y2]}
    if reference:
        added["reference"] = int(reference)
    return write_objects([*read_objects(text), added]), None


def canvas_size(width: int, height: int) -> tuple[int, int]:
    """The picture's proportions."""
    return tuple(max(16, round(side * CANVAS_SIDE / max(width, height))) for side in (width, height))


def draw_canvas(text: str, corner: tuple[float, float] | None, width: int, height: int) -> Image.Image:
    """The boxes on paper, and the corner that waits for its second."""
    from pipelines.layout_flux.overlay import font_for

    canvas = Image.new("RGB", canvas_size(width, height), PAPER)
    draw, font = ImageDraw.Draw(canvas), font_for(canvas)
    for number, each in enumerate(read_objects(text), 1):
        box = each.get("box")
        if isinstance(box, list) and len(box) == 4 and all(isinstance(value, int | float) for value in box):
            (x1, x2), (y1, y2) = sorted((box[0], box[2])), sorted((box[1], box[3]))
            corners = tuple(value * side for value, side in zip((x1, y1, x2, y2), canvas.size * 2, strict=True))
            draw.rectangle(corners, outline=INK, width=2)
            draw.text((corners[0] + 6, corners[1] + 4), f"{number} {each.get('prompt', '')}", font=font, fill=INK)
    if corner is not None:
        x, y = (value * side for value, side in zip(corner, canvas.size, strict=True))
        draw.ellipse((x - 5, y - 5, x + 5, y + 5), fill=PENDING)
    return canvas


def draw_picture(
    pipeline: FluxLayoutPipeline,
    prompt: str,
    text: str,
    gallery: Sequence[tuple[Image.Image, str | None]] | None,
    width: int,
    height: int,
    steps: int,
    guidance_scale: float,
    layout_scale: float,
    identity_scale: float,
    grounding_ratio: float,
    seed: int,
) -> tuple[Image.Image, Image.Image, str]:
    """The picture, the same with its boxes, and how long it took; ValueError for what no page can ask for."""
    import torch

    from pipelines.layout_flux.overlay import draw_boxes

    began = time.perf_counter()
    scales = {"guidance_scale": guidance_scale, "layout_scale": layout_scale, "identity_scale": identity_scale}
    scales["grounding_ratio"] = grounding_ratio
    check_ranges(steps=steps, seed=seed, **scales)
    layout, references = understand(prompt, text, [picture for picture, _ in gallery or ()], int(width), int(height))
    output = pipeline(
        **arguments_of(layout, references if any(references) else None),
        **scales,
        width=layout.width,
        height=layout.height,
        num_inference_steps=int(steps),
        generator=torch.Generator().manual_seed(int(seed)),
    )
    (image,), seconds = output.images, time.perf_counter() - began
    boxes, texts = [each.box for each in layout.objects], [each.prompt for each in layout.objects]
    boxed = draw_boxes(image, boxes, output.alpha[0] if output.alpha else [], texts)
    return image, boxed, f"{image.width}x{image.height} pixels, {seconds:.2f} s on {pipeline.device}"


def create_page(pipeline: FluxLayoutPipeline, width: int = 1024, height: int = 1024, steps: int = 28) -> gradio.Blocks:
    """The page around a loaded pipeline; `launch()` serves it. One request is computed at a time.

    Its endpoint `/draw` takes prompt, objects (JSON), pictures of objects, width, height, steps, guidance_scale,
    layout_scale, identity_scale, grounding_ratio and seed, and returns the picture, the same with boxes, and a line of
    text.

    Raises:
        ModuleNotFoundError: gradio is not installed.
    """
    import gradio

    pipeline.set_progress_bar_config(disable=True)

    @contextmanager
    def shown():
        """Within, what is wrong with the input is said on the page."""
        try:
            yield
        except ValueError as error:
            raise gradio.Error(str(error), print_exception=False) from None

    @shown()
    def draw(*values):
        return draw_picture(pipeline, *values)

    @shown()
    def show(text, corner, width, height):
        return draw_canvas(text, corner, width, height)

    def click(text, corner, prompt, reference, width, height, event):
        point = tuple(value / side for value, side in zip(event.index, canvas_size(width, height), strict=True))
        with shown():
            text, corner = add_corner(text, corner, point, prompt, reference)
            return text, corner, draw_canvas(text, corner, width, height)

    click.__annotations__["event"] = gradio.SelectData  # by which gradio hands it over; it is imported only here

    @shown()
    def take_back(text, corner, width, height):
        text = text if corner is not None else write_objects(read_objects(text)[:-1])
        return text, None, draw_canvas(text, None, width, height)

    with gradio.Blocks(title="Layouts", analytics_enabled=False) as page:
        gradio.Markdown("## Layouts\nSay what is in the picture, then click two corners of a box for each object.")
        corner = gradio.State(None)
        with gradio.Row():
            with gradio.Column():
                prompt = gradio.Textbox("a red disc and a striped blue square on grey", label="Prompt", lines=2)
                with gradio.Row():
                    name = gradio.Textbox("a red disc", label="Next object")
                    number = gradio.Number(None, precision=0, minimum=1, label="its picture (number, or none)")
                canvas = gradio.Image(format="png", interactive=False, label="Click two corners")
                back = gradio.Button("Take the last box back", size="sm")
                objects = gradio.Textbox(write_objects(EXAMPLE), label="Objects", lines=4)
                gallery = gradio.Gallery(type="pil", format="png", label="Pictures of objects", height=160)
                settings = create_settings(gradio, width, height, steps)
                button = gradio.Button("Draw", variant="primary")
            with gradio.Column():
                image = gradio.Image(format="png", label="Picture")
                boxed = gradio.Image(format="png", label="Boxes: red foreground, blue background")
                report = gradio.Textbox(label="Time", interactive=False)
        size = settings[:2]
        inputs, outputs = [prompt, objects, gallery, *settings], [image, boxed, report]
        button.click(draw, inputs, outputs, api_name="draw", concurrency_limit=1, concurrency_id="network")
        drawn = [objects, corner, canvas]
        canvas.select(click, [objects, corner, name, number, *size], drawn, api_name=False)
        back.click(take_back, [objects, corner, *size], drawn, api_name=False)
        gradio.on(
            [page.load, *(field.change for field in (objects, *size))],
            show,
            [objects, corner, *size],
            canvas,
            api_name=False,
        )
    return page


def create_settings(gradio, width: int, height: int, steps: int) -> list:
    """Fields of the page, in the order in which `draw_picture` takes them."""
    with gradio.Row():
        sides = [
            gradio.Number(value, precision=0, minimum=16, maximum=MAX_SIDE, label=name)
            for name, value in (("width", width), ("height", height))
        ]
        seed = gradio.Number(0, precision=0, minimum=0, maximum=RANGES["seed"][1], label="seed")
    with gradio.Accordion("Strengths", open=False):
        sliders = [
            gradio.Slider(*RANGES[name], value, step=step, label=label)
            for name, value, step, label in (
                ("steps", steps, 1, "steps"),
                ("guidance_scale", 3.5, 0.1, "guidance"),
                ("layout_scale", 1, 0.05, "boxes"),
                ("identity_scale", 1, 0.05, "identities"),
                ("grounding_ratio", 0.3, 0.05, "share of the steps in which boxes act"),
            )
        ]
    return [*sides, *sliders, seed]


def main(argv: Sequence[str] | None = None) -> None:
    settings = parse(Settings, argv, "python -m pipelines.layout_flux.demo", __doc__)
    try:
        import gradio  # noqa: F401  # before minutes of loading
    except ModuleNotFoundError as error:
        fail(f"{error.name} is not installed: pip install 'backlot[demo]'")

    with input_errors():
        page = create_page(load(settings, settings.references, needs_adapter=True))
    try:
        page.launch(server_name=settings.host, server_port=settings.port, share=False, max_file_size=MAX_FILE_SIZE)
    except OSError:
        fail(f"{settings.host} port {settings.port} cannot be served: give another --port or --host")


if __name__ == "__main__":
    main()
