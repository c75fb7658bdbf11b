"""The command that draws a layout file: what it reads, what it writes, what it refuses; overlays; and the page."""

from __future__ import annotations

import json
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from flux_checkpoint import SIDE, create_adapter, write_flux
from PIL import Image

from pipelines.layout_flux import FluxLayoutPipeline, demo
from pipelines.layout_flux.files import save_adapter
from pipelines.layout_flux.generate import from_caption, main, parse_layout
from pipelines.layout_flux.overlay import BACKGROUND, FOREGROUND, draw_boxes

LAYOUT = {
    "prompt": "a red disc and a blue square",
    "width": SIDE,
    "height": SIDE,
    "objects": [
        {"prompt": "a red disc", "box": [0.1, 0.1, 0.5, 0.5]},
        {"prompt": "a blue square", "category": "square", "box": [0.4, 0.4, 1, 1]},
    ],
}
USUAL = "--num_inference_steps 2 --dtype float32 --device cpu --max_sequence_length 12".split()  # noqa: SIM905


@pytest.fixture(scope="module")
def flux(tmp_path_factory):
    return write_flux(tmp_path_factory.mktemp("flux"))


@pytest.fixture(scope="module")
def adapter(flux, tmp_path_factory):
    folder = tmp_path_factory.mktemp("adapter")
    pipeline = FluxLayoutPipeline.from_pretrained(flux)
    encoders = {"clip": str(flux / "clip_vision"), "dino": str(flux / "dino")}
    save_adapter(create_adapter(pipeline.transformer, encoders=encoders), folder)
    return folder


@pytest.fixture(scope="module")
def pipeline(flux, adapter):
    pipeline = FluxLayoutPipeline.from_pretrained(flux)
    pipeline.load_layout_adapter(adapter)
    pipeline.load_reference_encoders()
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


@pytest.fixture
def scene(tmp_path):
    """A folder with a picture of an object."""
    reference = Image.new("RGB", (20, 14), "grey")
    reference.paste("green", (4, 3, 15, 11))
    reference.save(tmp_path / "square.png")
    return tmp_path


def generate(flux, adapter, scene, layout=LAYOUT, arguments: str = "") -> dict[str, np.ndarray]:
    """Run the command; the pixels of what it wrote, by file name."""
    (scene / "layout.json").write_text(layout if isinstance(layout, str) else json.dumps(layout))
    output = scene / "out" / "scene.png"
    given = ["--model", str(flux), "--output", str(output), *([] if adapter is None else ["--adapter", str(adapter)])]
    main([str(scene / "layout.json"), *given, *USUAL, *arguments.split()])
    written = {path.name: np.asarray(Image.open(path)) for path in sorted(output.parent.iterdir())}
    for path in output.parent.iterdir():
        path.unlink()
    return written


def draw(pipeline, seed: int = 0, **arguments) -> np.ndarray:
    boxes = [each["box"] for each in LAYOUT["objects"]]
    usual = {"boxes": boxes, "box_prompts": ["a red disc", "square, a blue square"], "max_sequence_length": 12}
    usual |= {"height": SIDE, "width": SIDE, "num_inference_steps": 2, "prompt": LAYOUT["prompt"]}
    generator = torch.Generator().manual_seed(seed)
    return np.asarray(pipeline(**{**usual, **arguments}, generator=generator).images[0])


def test_a_picture_and_its_boxes(flux, adapter, scene, pipeline, capsys):
    written = generate(flux, adapter, scene)
    assert list(written) == ["scene.png", "scene_boxes.png"]
    assert np.array_equal(written["scene.png"], draw(pipeline))
    assert written["scene_boxes.png"].shape == (256, 256, 3)  # enlarged, that its texts can be read
    assert "1 picture in" in capsys.readouterr().out


def test_every_option_arrives(flux, adapter, scene, pipeline):
    plain = draw(pipeline)
    expected = {
        "--num_inference_steps 3": draw(pipeline, num_inference_steps=3),
        "--seed 5": draw(pipeline, seed=5),
        "--guidance_scale 1": draw(pipeline, guidance_scale=1.0),
        "--layout_scale 0.5": draw(pipeline, layout_scale=0.5),
        "--identity_scale 0": draw(pipeline, identity_scale=0.0),
        "--layout_guidance_scale 2": draw(pipeline, layout_guidance_scale=2.0),
        "--grounding_ratio 1": draw(pipeline, grounding_ratio=1.0),
        "--modulation_ratio 0": draw(pipeline, modulation_ratio=0.0),
        "--no_feedback": draw(pipeline, feedback=False),
        "--width 64": draw(pipeline, width=64),
    }
    for arguments, picture in expected.items():
        measured = generate(flux, adapter, scene, arguments=arguments)["scene.png"]
        assert np.array_equal(measured, picture), arguments
        assert not np.array_equal(measured, plain), arguments
    negative = generate(flux, adapter, scene, {**LAYOUT, "negative_prompt": "a ring"}, "--true_cfg_scale 3")
    assert np.array_equal(negative["scene.png"], draw(pipeline, negative_prompt="a ring", true_cfg_scale=3.0))


def test_everything_that_an_object_may_have(flux, adapter, scene, pipeline):
    square = Image.open(scene / "square.png")
    cases = [
        ({"reference": "square.png"}, {"reference_images": [None, square]}),
        (
            {"reference": {"image": "square.png", "box": [0.2, 0.2, 0.8, 0.8]}},
            {"reference_images": [None, (square, (0.2, 0.2, 0.8, 0.8))]},
        ),
        ({"phrase": "Blue"}, {"phrase_spans": [None, (17, 21)]}),
        ({"phrase": [0, 5]}, {"phrase_spans": [None, (0, 5)]}),
        ({"category": None}, {"box_prompts": ["a red disc", "a blue square"]}),
    ]
    plain = draw(pipeline)
    for change, arguments in cases:
        first, second = LAYOUT["objects"]
        layout = {**LAYOUT, "objects": [first, {**second, **change}]}
        measured = generate(flux, adapter, scene, layout)["scene.png"]
        assert np.array_equal(measured, draw(pipeline, **arguments)), change
        assert not np.array_equal(measured, plain), change
    objects = [{**each, "foreground": value} for each, value in zip(LAYOUT["objects"], (True, 0.2), strict=True)]
    written = generate(flux, adapter, scene, {**LAYOUT, "objects": objects})
    assert np.array_equal(written["scene.png"], draw(pipeline, foreground=[True, 0.2]))
    edges = [written["scene_boxes.png"][row, 200] for row in (255, 103)]  # the lower edge of the second, its upper one
    assert [tuple(edge) for edge in edges] == [BACKGROUND] * 2
    assert tuple(written["scene_boxes.png"][26, 100]) == FOREGROUND


def test_several_seeds_and_no_objects(flux, scene, pipeline):
    written = generate(flux, None, scene, {**LAYOUT, "objects": []}, "--num_images 2 --seed 3")
    names = ["scene_seed3.png", "scene_seed3_boxes.png", "scene_seed4.png", "scene_seed4_boxes.png"]
    assert list(written) == names
    for seed in (3, 4):
        alone = draw(pipeline, seed=seed, boxes=None, box_prompts=None).astype(int)
        assert np.abs(written[f"scene_seed{seed}.png"] - alone).max() <= 1


def test_an_exported_pipeline_and_offloading(flux, adapter, scene, pipeline, tmp_path):
    pipeline.save_pretrained(tmp_path / "export")
    assert np.abs(generate(tmp_path / "export", None, scene)["scene.png"].astype(int) - draw(pipeline)).max() <= 1
    offloaded = generate(flux, adapter, scene, arguments="--offload model")["scene.png"]
    assert np.array_equal(offloaded, draw(pipeline))


def test_a_caption_file_is_a_layout_file(scene):
    caption = {
        "version": 1,
        "image_id": "7",
        "global_caption": LAYOUT["prompt"],
        "width": SIDE,
        "height": 2 * SIDE,
        "objects": [
            {
                "object_id": 0,
                "category_name": "disc",
                "caption": "a red disc",
                "bbox": [0.1, 0.1, 0.5, 0.5],
                "phrase_span": [0, 10],
                "reference": {"image_path": "square.png", "bbox": [0, 0, 1, 1]},
                "depth_label": "foreground",
            }
        ],
    }
    layout = parse_layout(json.dumps(caption))
    (disc,) = layout.objects
    assert (layout.prompt, layout.width, layout.height) == (LAYOUT["prompt"], SIDE, 2 * SIDE)
    assert (disc.text, disc.box, layout.spans()) == ("disc, a red disc", (0.1, 0.1, 0.5, 0.5), [(0, 10)])
    assert str(disc.reference.image) == "square.png"
    with pytest.raises(ValueError, match="no caption file: KeyError 'bbox'"):
        from_caption({"global_caption": "", "objects": [{"caption": "a red disc"}]})


def with_object(**changes) -> dict:
    return {**LAYOUT, "objects": [{**LAYOUT["objects"][0], **changes}]}


@pytest.mark.parametrize(
    ("layout", "arguments", "message"),
    [
        ("{", "", "layout.json: not JSON: "),
        ("[]", "", "layout.json: it must hold an object with `prompt` and `objects`"),
        ({"objects": []}, "", "layout.json: prompt: Field required"),
        (with_object(box=[0, 0, 1, 1.5]), "", "objects.0.box.3: Input should be less than or equal to 1"),
        (with_object(box=[0.5, 0, 0.2, 1]), "", "objects.0: a box must be x1 y1 x2 y2 with x1 < x2 and y1 < y2, got"),
        (with_object(colour="red"), "", "objects.0.colour: Extra inputs are not permitted"),
        (with_object(phrase="a green ring"), "", "`phrase` 'a green ring' is not in the prompt"),
        (with_object(reference="nowhere.png"), "", "nowhere.png: there is no such file"),
        (with_object(reference="layout.json"), "", "layout.json: no picture: not an image of a known format"),
        (
            {**LAYOUT, "objects": [LAYOUT["objects"][0], {**LAYOUT["objects"][1], "foreground": True}]},
            "",
            "`foreground` must be given for every object, or for none",
        ),
        ({**LAYOUT, "width": 30}, "", "`height` and `width` must be multiples of 4, got 32 and 30"),
        (LAYOUT, "--adapter nowhere", "nowhere holds no layout adapter"),
        (LAYOUT, "--model nowhere", "nowhere"),
        (LAYOUT, "--output scene.jpg", "--output scene.jpg: must end in .png"),
        (LAYOUT, "--output FOLDER/layout.json/x.png", "error: --output "),
        (LAYOUT, "--grounding_ratio 2", "--grounding_ratio 2: input should be less than or equal to 1"),
    ],
)
def test_what_is_wrong_is_one_line_and_exit_code_2(flux, adapter, scene, layout, arguments, message, capsys):
    with pytest.raises(SystemExit) as stop:
        generate(flux, adapter, scene, layout, arguments.replace("FOLDER", str(scene)))
    assert stop.value.code == 2
    lines = [line for line in capsys.readouterr().err.splitlines() if "error" in line]
    assert len(lines) == 1
    assert lines[0].startswith("error: ")
    assert message in lines[0]


def test_a_missing_layout_and_a_missing_adapter(flux, scene, capsys):
    for arguments, message in (
        ([str(scene / "none.json")], "none.json: No such file or directory"),
        ([str(scene / "layout.json"), "--model", str(flux)], "has no layout adapter: give --adapter"),
    ):
        (scene / "layout.json").write_text(json.dumps(LAYOUT))
        with pytest.raises(SystemExit) as stop:
            main([*arguments, "--output", str(scene / "x.png"), *USUAL])
        assert stop.value.code == 2
        assert message in capsys.readouterr().err


def test_red_is_foreground_and_blue_is_not():
    image = Image.new("RGB", (512, 256), "white")
    boxes = [[0.0, 0.0, 0.25, 1.0], [0.5, 0.5, 1.0, 1.0]]
    drawn = np.asarray(draw_boxes(image, boxes, [0.5, 0.49], ["a red disc", None]))
    assert drawn.shape == (256, 512, 3)
    assert tuple(drawn[128, 0]) == tuple(drawn[255, 64]) == FOREGROUND
    assert tuple(drawn[128, 384]) == tuple(drawn[200, 511]) == BACKGROUND
    assert tuple(drawn[128, 192]) == tuple(drawn[220, 450]) == (255, 255, 255)
    assert np.asarray(image).min() == 255  # it is a copy


# --- the page -----------------------------------------------------------------------------------------------------


def test_without_gradio_the_page_says_what_to_install(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "gradio", None)
    with pytest.raises(SystemExit) as stop:
        demo.main([])
    assert stop.value.code == 2
    assert capsys.readouterr().err == "error: gradio is not installed: pip install 'backlot[demo]'\n"


def test_two_clicks_make_a_box():
    text, corner = demo.add_corner("[]", None, (0.5, 0.75), "a cat", 2)
    assert (text, corner) == ("[]", (0.5, 0.75))
    text, corner = demo.add_corner(text, corner, (0.25, 0.1), "a cat", 2)
    assert corner is None
    assert json.loads(text) == [{"prompt": "a cat", "box": [0.25, 0.1, 0.5, 0.75], "reference": 2}]
    assert demo.add_corner(text, (0.5, 0.5), (0.5, 0.9), "", None) == (text, None)  # no area
    more, _ = demo.add_corner(text, (0.0, 0.0), (0.5, 0.9), " ", None)
    assert json.loads(more)[1] == {"prompt": "object", "box": [0.0, 0.0, 0.5, 0.9]}
    canvas = np.asarray(demo.draw_canvas(text, (0.9, 0.9), 64, 32))
    assert canvas.shape == (320, 640, 3)
    assert tuple(canvas[100, 160]) == tuple(canvas[240, 200]) == demo.INK
    assert tuple(canvas[288, 576]) == demo.PENDING


def test_what_the_page_cannot_ask_for_is_refused():
    picture = Image.new("RGB", (4, 4))
    for text, message in (
        ("{", "the objects are not JSON"),
        ("{}", "the objects must be a list"),
        (
            '[{"prompt": "x", "box": [0, 0, 1, 1], "reference": "/etc/passwd"}]',
            "must be the number of a picture, 1 to 1",
        ),
        ('[{"prompt": "x", "box": [0, 0, 1, 1], "reference": 2}]', "must be the number of a picture, 1 to 1, got 2"),
        ('[{"prompt": "x", "box": [0, 0, 1, 2]}]', "objects.0.box.3"),
    ):
        with pytest.raises(ValueError, match=message):
            demo.understand("x", text, [picture], 32, 32)
    with pytest.raises(ValueError, match="`width` and `height` must be at most 2048, got 4096 and 32"):
        demo.understand("x", "[]", [], 4096, 32)
    with pytest.raises(ValueError, match=r"`steps` must be in \[1, 50\], got 99"):
        demo.check_ranges(steps=99)
    layout, references = demo.understand("x", demo.write_objects(demo.EXAMPLE), [], 32, 32)
    assert len(layout.objects) == len(references) == 2


def test_the_page_answers(pipeline, tmp_path, scene):
    pytest.importorskip("gradio")
    client = pytest.importorskip("gradio_client")
    page = demo.create_page(pipeline, SIDE, SIDE, 2)
    page.launch(server_name="127.0.0.1", prevent_thread_lock=True, quiet=True)
    try:
        visitor = client.Client(page.local_url, verbose=False, download_files=str(tmp_path))
        picture = {"image": client.handle_file(scene / "square.png"), "caption": None}
        objects = [dict(each) for each in LAYOUT["objects"]]
        objects[1]["reference"] = 1
        numbers = (SIDE, SIDE, 2, 1.0, 0.8, 0.9, 0.5, 7)
        answer = visitor.predict(LAYOUT["prompt"], json.dumps(objects), [picture], *numbers, api_name="/draw")
        scales = {"guidance_scale": 1.0, "layout_scale": 0.8, "identity_scale": 0.9, "grounding_ratio": 0.5}
        references = [None, Image.open(scene / "square.png")]
        expected = draw(pipeline, 7, **scales, reference_images=references, max_sequence_length=512)
        assert np.abs(np.asarray(Image.open(answer[0])).astype(int) - expected).max() <= 1
        assert Image.open(answer[1]).size == (256, 256)
        assert answer[2].startswith("32x32 pixels, ")
        for text, steps, message in (("{", 2, "the objects are not JSON"), ("[]", 99, "99")):
            with pytest.raises(client.exceptions.AppError, match=message):
                visitor.predict("x", text, [], SIDE, SIDE, steps, *numbers[3:], api_name="/draw")
        handlers = {block.fn.__name__: block for block in page.fns.values()}
        assert handlers["click"].collects_event_data
        text, corner = "[]", None
        for index in ([320, 64], [64, 320]):  # of a canvas of 640 x 640
            clicked = SimpleNamespace(index=index)
            text, corner, canvas = handlers["click"].fn(text, corner, "a cat", None, SIDE, SIDE, clicked)
        assert json.loads(text) == [{"prompt": "a cat", "box": [0.1, 0.1, 0.5, 0.5]}]
        assert tuple(np.asarray(canvas)[64, 200]) == demo.INK
        assert handlers["take_back"].fn(text, None, SIDE, SIDE)[:2] == ("[]", None)
        assert handlers["take_back"].fn(text, (0.1, 0.1), SIDE, SIDE)[:2] == (text, None)
    finally:
        page.close()
