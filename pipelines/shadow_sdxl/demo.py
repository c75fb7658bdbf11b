"""A page to try the light on an object of one's own, at http://127.0.0.1:7860.

pip install 'backlot[demo]'
python -m pipelines.shadow_sdxl.demo MODEL
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import TYPE_CHECKING

from PIL import Image, ImageColor, ImageOps
from pydantic import Field

from backlot.command_line import fail, parse
from backlot.program_settings import TypedModelSettings

if TYPE_CHECKING:
    import gradio

    from pipelines.shadow_sdxl.pipeline import ShadowSDXLPipeline

PRESETS = {"Morning": (15, 90, 3), "Noon": (5, 180, 2), "Evening": (35, 270, 6), "Soft": (25, 180, 8)}
RANGES = {"steps": (1, 8), "intensity": (0.1, 1.0), "seed": (0, 2**31 - 1)}  # beside those of the light
MAX_FILE_SIZE = 32 * 2**20
MAX_SIDE = 4096


class Settings(TypedModelSettings):
    port: int = Field(7860, ge=1, le=65535)
    """to serve"""
    host: str = "127.0.0.1"
    """address to serve; 0.0.0.0 lets other machines in"""


def check_ranges(**values: float) -> None:
    """ValueError for what no slider can give; requests need not come from the page."""
    from pipelines.shadow_sdxl.light import LIGHT_RANGES

    for name, value in values.items():
        low, high = (LIGHT_RANGES | RANGES)[name]
        if not low <= value <= high:
            raise ValueError(f"`{name}` must be in [{low:g}, {high:g}], got {value!r}")


def parse_colour(text: str) -> tuple[int, int, int]:
    """What a colour field gives: #aabbcc, a name, or rgba(12.5, 30, 255, 1), which Pillow does not take."""
    numbers = text.removeprefix("rgba(").removeprefix("rgb(").removesuffix(")").split(",")
    try:
        if text.startswith("rgb"):
            red, green, blue = (min(255, max(0, round(float(value)))) for value in numbers[:3])
            return red, green, blue
        return ImageColor.getrgb(text)[:3]
    except ValueError:
        raise ValueError(f"`background` must be a colour, got {text!r}") from None


def create_page(pipeline: ShadowSDXLPipeline) -> gradio.Blocks:
    """The page around a loaded pipeline; `launch()` serves it. One request is computed at a time.

    Its endpoint `/cast` takes object, mask (both pictures), theta, phi, size, steps, intensity, seed, background
    colour and background picture, and returns the composite, the map and a line of text.

    Raises:
        ModuleNotFoundError: gradio is not installed.
    """
    import gradio
    import torch

    from pipelines.shadow_sdxl.pipeline import composite, find_mask

    pipeline.set_progress_bar_config(disable=True)

    def cast(image, mask, theta, phi, size, steps, intensity, seed, colour, picture):
        if image is None:
            raise gradio.Error("Put in a picture of an object first", print_exception=False)
        began = time.perf_counter()
        try:
            if max(image.size) > MAX_SIDE:
                raise ValueError(f"`image` must have at most {MAX_SIDE} pixels a side, got {max(image.size)}")
            check_ranges(theta=theta, phi=phi, size=size, steps=steps, intensity=intensity, seed=seed)
            alpha = find_mask(image) if mask is None else mask
            ground = Image.new("RGB", image.size, parse_colour(colour))
            if picture is not None:
                ground = ImageOps.fit(picture, image.size)
            generator = torch.Generator().manual_seed(int(seed))
            shadow = pipeline(
                image, alpha, theta, phi, size, num_inference_steps=int(steps), generator=generator
            ).images[0]
            result = composite(image, shadow, ground, alpha, intensity)
        except ValueError as error:
            raise gradio.Error(str(error), print_exception=False) from None
        seconds = time.perf_counter() - began
        return result, shadow, f"{image.width}x{image.height} pixels, {seconds:.2f} s on {pipeline.device}"

    with gradio.Blocks(title="Shadows", analytics_enabled=False) as page:
        gradio.Markdown("## Shadows\nAn object with an alpha channel, or with a mask, and the light you choose.")
        with gradio.Row():
            with gradio.Column():
                image = gradio.Image(type="pil", image_mode=None, format="png", label="Object", height=256)
                with gradio.Accordion("Mask (without one: the alpha channel)", open=False):
                    mask = gradio.Image(type="pil", image_mode="L", format="png", label="Mask", height=192)
                with gradio.Row():
                    buttons = {name: gradio.Button(name, size="sm") for name in PRESETS}
                theta = gradio.Slider(0, 45, 30, step=1, label="theta: light from overhead, degrees")
                phi = gradio.Slider(0, 360, 45, step=5, label="phi: 0 = light from the right, 90 = from behind")
                size = gradio.Slider(2, 8, 4, step=0.5, label="size of the light: 2 = hard, 8 = soft")
                intensity = gradio.Slider(0.1, 1, 1, step=0.05, label="intensity")
                steps = gradio.Slider(1, 8, 1, step=1, label="steps")
                seed = gradio.Number(0, precision=0, minimum=0, maximum=RANGES["seed"][1], label="seed")
                colour = gradio.ColorPicker("#e8e4dc", label="Background")
                with gradio.Accordion("Picture as background", open=False):
                    picture = gradio.Image(type="pil", format="png", label="Background", height=192)
                button = gradio.Button("Cast the shadow", variant="primary")
            with gradio.Column():
                result = gradio.Image(format="png", label="Composite")
                shadow = gradio.Image(format="png", image_mode="L", label="Shadow map")
                report = gradio.Textbox(label="Time", interactive=False)

        lights = [theta, phi, size]
        inputs = [image, mask, *lights, steps, intensity, seed, colour, picture]
        outputs = [result, shadow, report]
        button.click(cast, inputs, outputs, api_name="cast", concurrency_limit=1, concurrency_id="network")
        for name, preset in buttons.items():
            preset.click(lambda light=PRESETS[name]: light, None, lights, api_name=False).then(
                cast, inputs, outputs, api_name=False, concurrency_limit=1, concurrency_id="network"
            )
    return page


def main(argv: Sequence[str] | None = None) -> None:
    settings = parse(Settings, argv, "python -m pipelines.shadow_sdxl.demo", __doc__)
    try:
        import gradio  # noqa: F401  # before minutes of loading
    except ModuleNotFoundError as error:
        fail(f"{error.name} is not installed: pip install 'backlot[demo]'")

    from backlot.loading import load_pipeline
    from pipelines.shadow_sdxl.pipeline import ShadowSDXLPipeline

    page = create_page(load_pipeline(ShadowSDXLPipeline, settings.model_dir, settings.device, settings.dtype))
    try:
        page.launch(server_name=settings.host, server_port=settings.port, share=False, max_file_size=MAX_FILE_SIZE)
    except OSError:
        fail(f"{settings.host} port {settings.port} cannot be served: give another --port or --host")


if __name__ == "__main__":
    main()
