"""The command that casts shadows: what it writes, sweeps, presets, error texts; and the page in a browser."""

from __future__ import annotations

import sys

import numpy as np
import pytest
import torch
from PIL import Image

from backlot.codecs import PixelCodec
from pipelines.shadow_sdxl import ShadowSDXLPipeline, ShadowUNet, composite, create_scheduler
from pipelines.shadow_sdxl import demo as demo_program
from pipelines.shadow_sdxl.generate import PRESETS, TIMES_OF_DAY, cast_shadows, main

WIDTH, HEIGHT = 24, 16


def build() -> ShadowSDXLPipeline:
    """A small pipeline for 16 pixels with every layer awake, so that it listens to the light."""
    torch.manual_seed(0)
    unet = ShadowUNet(
        sample_size=8,
        latent_channels=12,
        block_out_channels=(16, 16, 16),
        layers_per_block=1,
        transformer_layers_per_block=1,
        attention_head_dim=(1, 1, 1),
        norm_num_groups=8,
    ).eval()
    with torch.no_grad():
        for parameter in unet.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    pipeline = ShadowSDXLPipeline(unet, PixelCodec(block_size=2), create_scheduler("flow"))
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def draw_object() -> Image.Image:
    """A red box with half-transparent edges at rows and columns 5 and 10."""
    pixels = np.zeros((HEIGHT, WIDTH, 4), np.uint8)
    pixels[5:11, 5:11] = (210, 40, 20, 128)
    pixels[6:10, 6:10, 3] = 255
    return Image.fromarray(pixels)


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    folder = tmp_path_factory.mktemp("model")
    build().save_pretrained(folder)
    return folder


@pytest.fixture
def cup(tmp_path):
    """The object in a file, and where the results go."""
    draw_object().save(tmp_path / "object.png")
    return tmp_path / "object.png", tmp_path / "out" / "cup.png"


def generate(model, cup, arguments: str = "") -> dict[str, np.ndarray]:
    """Run the command; the pixels of what it wrote, by file name."""
    image, output = cup
    main([str(model), "--image", str(image), "--output", str(output), "--device", "cpu", *arguments.split()])
    written = {path.name: np.asarray(Image.open(path)) for path in sorted(output.parent.iterdir())}
    for path in output.parent.iterdir():
        path.unlink()
    return written


def cast_one(theta=30.0, phi=45.0, size=4.0, seed=0, **settings) -> Image.Image:
    generator = torch.Generator().manual_seed(seed)
    return build()(draw_object(), None, theta, phi, size, generator=generator, **settings).images[0]


def distance(picture, expected) -> float:
    return float(np.linalg.norm(np.asarray(picture, float) - np.asarray(expected, float)))


def test_one_light_gives_map_composite_and_visualization(model, cup, capsys):
    written = generate(model, cup)
    assert list(written) == ["cup.png", "cup_composite.png", "cup_visualization.png"]
    shadow = cast_one()
    assert np.array_equal(written["cup.png"], np.asarray(shadow))
    assert written["cup.png"].shape == (HEIGHT, WIDTH)
    assert written["cup.png"].dtype == np.uint8
    assert np.array_equal(written["cup_composite.png"], np.asarray(composite(draw_object(), shadow)))
    assert tuple(written["cup_composite.png"][7, 7]) == (210, 40, 20)
    rows = written["cup_visualization.png"]
    pictures = [rows[:, i : i + WIDTH] for i in range(rows.shape[1] - WIDTH)]
    for expected in ("cup.png", "cup_composite.png"):
        expected = np.broadcast_to(written[expected].reshape(HEIGHT, WIDTH, -1), (HEIGHT, WIDTH, 3))
        assert any(np.array_equal(strip[i : i + HEIGHT], expected) for strip in pictures for i in range(6)), "shown"
    out = capsys.readouterr().out
    assert "theta 30, phi 45, size 4" in out
    assert "1 shadow in" in out


def test_every_option_arrives(model, cup):
    plain = generate(model, cup)["cup.png"]
    expected = {
        "--theta 10": cast_one(theta=10),
        "--phi -90": cast_one(phi=-90),
        "--size 7.5": cast_one(size=7.5),
        "--steps 3": cast_one(num_inference_steps=3),
        "--seed 5": cast_one(seed=5),
        "--intensity 0.25": cast_one(intensity=0.25),
        "--resolution 24": cast_one(resolution=24),
    }
    for arguments, shadow in expected.items():
        measured = generate(model, cup, arguments)["cup.png"]
        assert np.array_equal(measured, np.asarray(shadow)), arguments
        assert not np.array_equal(measured, plain), arguments


def test_background_tint_and_blur_are_the_composites(model, cup, tmp_path):
    ground = Image.fromarray(np.random.default_rng(0).integers(0, 256, (HEIGHT, WIDTH, 3), dtype=np.uint8))
    ground.save(tmp_path / "ground.png")
    written = generate(model, cup, f"--background {tmp_path}/ground.png --tint #203040")
    expected = composite(draw_object(), cast_one(), ground, tint="#203040")
    assert np.array_equal(written["cup_composite.png"], np.asarray(expected))
    assert np.array_equal(written["cup.png"], np.asarray(cast_one()))
    written = generate(model, cup, "--background white --blur 2")
    sharp = composite(draw_object(), cast_one(), "white")
    corner = np.s_[:5, 12:]
    assert np.asarray(written["cup_composite.png"])[corner].std() < np.asarray(sharp)[corner].std() / 2
    assert np.array_equal(written["cup.png"], np.asarray(cast_one()))
    Image.new("RGB", (100, 31), "blue").save(tmp_path / "other.png")  # cut to fit
    assert tuple(
        generate(model, cup, f"--background {tmp_path}/other.png --intensity 0")["cup_composite.png"][0, 0]
    ) == (
        0,
        0,
        255,
    )


def test_a_mask_of_ones_own_goes_before_alpha(model, cup, tmp_path):
    mask = np.zeros((HEIGHT, WIDTH), np.uint8)
    mask[2:14, 2:14] = 255
    Image.fromarray(mask).save(tmp_path / "mask.png")
    written = generate(model, cup, f"--mask {tmp_path}/mask.png")
    generator = torch.Generator().manual_seed(0)
    shadow = build()(draw_object(), Image.fromarray(mask), generator=generator).images[0]
    assert np.array_equal(written["cup.png"], np.asarray(shadow))
    assert not np.array_equal(written["cup.png"], np.asarray(cast_one()))


def test_a_sweep_writes_every_combination_and_a_grid(model, cup, capsys):
    written = generate(model, cup, "--theta 10 40 --phi 0 90 180 --size 2")
    assert len(written) == 6 * 3 + 1
    one = cast_one(40, 90, 2)
    # six at once are rounded otherwise than one alone, which is little beside what the light changes
    others = [written[f"cup_theta{theta}_phi{phi}_size2.png"] for theta, phi in ((10, 90), (40, 0), (40, 180))]
    assert distance(written["cup_theta40_phi90_size2.png"], one) < 0.2 * min(distance(other, one) for other in others)
    expected = written["cup_theta40_phi90_size2_composite.png"]
    assert distance(expected, composite(draw_object(), one)) < 0.01 * np.linalg.norm(expected)
    grid = written["cup_grid.png"]  # two rows of three; this one lies in the second row, second column
    gap = 3
    top, left = gap + HEIGHT + gap, grid.shape[1] - gap - 2 * (WIDTH + gap) + gap
    assert np.array_equal(grid[top : top + HEIGHT, left : left + WIDTH], expected)
    assert grid.shape[0] == 2 * (HEIGHT + gap) + gap
    assert "6 shadows in" in capsys.readouterr().out


def test_sizes_alone_stand_side_by_side(model, cup):
    sizes = generate(model, cup, "--size 2 4 6 8")["cup_grid.png"]
    assert sizes.shape[0] < 2 * HEIGHT < 4 * WIDTH < sizes.shape[1]


def test_presets_and_times_of_day(model, cup):
    size, intensity = PRESETS["overcast"]
    written = generate(model, cup, "--preset overcast")
    assert np.array_equal(written["cup.png"], np.asarray(cast_one(size=size, intensity=intensity)))
    written = generate(model, cup, "--preset overcast --intensity 1 --size 2")  # what is given wins
    assert np.array_equal(written["cup.png"], np.asarray(cast_one(size=2)))
    written = generate(model, cup, "--preset sunny --time_of_day dawn noon")
    for name in ("dawn", "noon"):
        light = (*TIMES_OF_DAY[name], PRESETS["sunny"][0])
        shadow = cast_one(*light, intensity=PRESETS["sunny"][1])
        assert np.array_equal(written["cup_theta{:g}_phi{:g}_size{:g}.png".format(*light)], np.asarray(shadow))
    assert sorted(PRESETS) == ["indoor", "overcast", "studio", "sunny"]
    assert len(TIMES_OF_DAY) == 5


def test_batches_of_lights_change_nothing():
    pipeline, lights = build(), [(10.0, 0.0, 2.0), (20.0, 90.0, 4.0), (30.0, 200.0, 8.0)]
    maps = cast_shadows(pipeline, draw_object(), None, lights, batch_size=2)
    for shadow, light in zip(maps, lights, strict=True):
        difference = np.asarray(shadow).astype(int) - np.asarray(cast_one(*light))
        assert np.abs(difference).max() <= 1


def test_pictures_without_alpha_are_warned_about(model, cup, caplog):
    flat = Image.new("RGB", (WIDTH, HEIGHT), "white")
    flat.paste((200, 30, 10), (5, 5, 11, 11))
    flat.save(cup[0])
    written = generate(model, cup)
    assert "the picture has neither mask nor alpha" in caplog.text
    assert tuple(written["cup_composite.png"][7, 7]) == (200, 30, 10)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("--image nowhere.png", "--image nowhere.png: there is no such file"),
        ("--image TEXT", "--image TEXT: it cannot be read as a picture"),
        ("--image OBJECT --mask OTHER", "`mask` must have the size of its image, (24, 16), got (8, 8)"),
        ("--image OBJECT --theta 46", "--theta 46: input should be less than or equal to 45"),
        ("--image OBJECT --size 1", "--size 1: input should be greater than or equal to 2"),
        ("--image OBJECT --phi nan", "--phi nan: input should be a finite number"),
        ("--image OBJECT --intensity -1", "--intensity -1: input should be greater than or equal to 0"),
        ("--image OBJECT --steps 0", "--steps 0: input should be greater than or equal to 1"),
        ("--image OBJECT --tint colourless", "--tint colourless: unknown color specifier: 'colourless'"),
        ("--image OBJECT --background nothing", "--background nothing: neither a colour nor a file"),
        ("--image OBJECT --preset rainy", "--preset rainy: input should be 'studio', 'sunny', 'overcast' or 'indoor'"),
        ("--image OBJECT --time_of_day noon --phi 3", "--time_of_day sets theta and phi: give either"),
        ("--image OBJECT --resolution 18", "`resolution` must be a multiple of 8, got 18"),
        ("--image OBJECT --output shadow.jpg", "--output shadow.jpg: must end in .png"),
        ("--image OBJECT --output TEXT/x.png", "--output TEXT/x.png: "),
        ("--image OBJECT --device abacus", "cannot be loaded on abacus"),
        ("", "--image is required"),
    ],
)
def test_a_wrong_argument_is_one_line_and_exit_code_2(model, cup, tmp_path, arguments, message, capsys):
    Image.new("L", (8, 8)).save(tmp_path / "other.png")
    (tmp_path / "text.png").write_text("not a picture")
    places = {"OBJECT": str(cup[0]), "OTHER": str(tmp_path / "other.png"), "TEXT": str(tmp_path / "text.png")}
    for name, path in places.items():
        arguments, message = arguments.replace(name, path), message.replace(name, path)
    with pytest.raises(SystemExit) as stop:
        main([str(model), "--output", str(tmp_path / "x.png"), *arguments.split()])
    assert stop.value.code == 2
    (line,) = [line for line in capsys.readouterr().err.splitlines() if "error" in line]
    assert line.startswith("error: ")
    assert message in line
    assert not (tmp_path / "x.png").exists()


# --- the page ---------------------------------------------------------------------------------------------------------


def test_without_gradio_the_page_says_what_to_install(model, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "gradio", None)
    with pytest.raises(SystemExit) as stop:
        demo_program.main([str(model)])
    assert stop.value.code == 2
    assert capsys.readouterr().err == "error: gradio is not installed: pip install 'backlot[demo]'\n"


def test_what_sliders_cannot_give_is_refused():
    for values, message in {
        ("theta", 46): r"`theta` must be in \[0, 45\], got 46",
        ("steps", 9): r"`steps` must be in \[1, 8\], got 9",
        ("intensity", float("nan")): r"`intensity` must be in \[0.1, 1\], got nan",
    }.items():
        with pytest.raises(ValueError, match=message):
            demo_program.check_ranges(**dict([values]))
    assert demo_program.parse_colour("rgba(12.6, 300, 0, 0.5)") == (13, 255, 0)
    assert demo_program.parse_colour("#102030") == (16, 32, 48)
    for text in ("rgba(1, 2)", "rgb(a, b, c)", "nothing"):
        with pytest.raises(ValueError, match="`background` must be a colour, got"):
            demo_program.parse_colour(text)
    for theta, phi, size in demo_program.PRESETS.values():
        demo_program.check_ranges(theta=theta, phi=phi, size=size)


def test_the_page_answers(tmp_path):
    pytest.importorskip("gradio")
    client = pytest.importorskip("gradio_client")
    draw_object().save(tmp_path / "object.png")
    page = demo_program.create_page(build())
    page.launch(server_name="127.0.0.1", prevent_thread_lock=True, quiet=True)
    try:
        visitor = client.Client(page.local_url, verbose=False, download_files=str(tmp_path))
        image = client.handle_file(tmp_path / "object.png")
        result, shadow, report = visitor.predict(image, None, 30, 45, 4, 1, 0.5, 7, "#aabbcc", None, api_name="/cast")
        expected = cast_one(seed=7)
        assert np.array_equal(np.asarray(Image.open(shadow)), np.asarray(expected))
        picture = composite(draw_object(), expected, "#aabbcc", intensity=0.5)
        assert np.array_equal(np.asarray(Image.open(result)), np.asarray(picture))
        assert report.startswith("24x16 pixels, ")
        refused = [
            ((image, None, 46, 45, 4, 1, 1, 0, "#fff", None), "46"),
            ((image, None, 30, 45, 4, 1, 1, 0, "sky", None), "`background` must be a colour, got 'sky'"),
            ((None, None, 30, 45, 4, 1, 1, 0, "#fff", None), "Put in a picture of an object first"),
        ]
        for arguments, message in refused:
            with pytest.raises(client.exceptions.AppError, match=message):
                visitor.predict(*arguments, api_name="/cast")
        lights = [block.fn() for block in page.fns.values() if not block.inputs]
        assert lights == list(demo_program.PRESETS.values())
    finally:
        page.close()
