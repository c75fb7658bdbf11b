"""Files of public layout benchmarks, their scores in closed form, tiny real detectors, and the commands."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
import yaml
from PIL import Image, ImageDraw

from evaluation.layout_flux.benchmarks import Instance, Request, read_benchmark
from evaluation.layout_flux.benchmarks.__main__ import main
from evaluation.layout_flux.benchmarks.detection import (
    Detector,
    Segmenter,
    drop_overlapping,
    find_coloured,
    find_instances,
)
from evaluation.layout_flux.benchmarks.formats import read_requests, write_requests
from evaluation.layout_flux.benchmarks.scores import (
    box_ious,
    colour_mask,
    gather_answers,
    questions,
    score_coco_mig,
    score_layoutsam,
    score_lgs,
)

LAYOUTSAM = {
    "global_caption": "a harbour at dusk",
    "bbox_list": "[[100, 50, 300, 250], [0, 0, 400, 40]]",
    "region_captions": "['cargo ship', 'sky']",
    "detail_region_captions": "['a yellow cargo ship with rust', 'an orange sky']",
    "file_name": "sa_1.jpg",
    "width": 400,
    "height": 250,
}
DENSE = {
    "id": 17,
    "prompt": "a desk",
    "width": 200,
    "height": 100,
    "annos": [
        [{"bbox": [20, 10, 60, 50], "category_name": "cup", "caption": "a blue cup"}],
        [{"bbox": [100, 0, 220, 100], "category_name": "lamp", "caption": "lamp"}],
    ],
}
MIG_YAML = {
    "a photo of a red cat and a red cat and a blue teddy bear": {
        "a red cat": [[0.0, 0.0, 0.5, 0.5], [0.5, 0.0, 1.0, 0.5]],
        "a blue teddy bear": [[0.0, 0.5, 1.0, 1.0]],
        "coco_id": "6",
    }
}
MIG_JSON = {"3": {"caption": "a photo of a red cat ", "segment": [{"bbox": [0, 0, 0.5, 1], "label": "a red cat"}]}}


def write(path, content):
    path.write_text(yaml.safe_dump(content) if path.suffix == ".yaml" else json.dumps(content))
    return path


# --- files ----------------------------------------------------------------------------------------------------------


def test_layoutsam_holds_lists_as_text_and_pixels(tmp_path):
    (request,) = read_benchmark("layoutsam", write(tmp_path / "rows.json", [LAYOUTSAM]))
    assert (request.id, request.prompt, request.width, request.height) == ("0000", "a harbour at dusk", 1024, 1024)
    assert request.instances[0] == Instance("cargo ship", "a yellow cargo ship with rust", (0.25, 0.2, 0.75, 1.0))
    assert request.instances[1].box == (0, 0, 1, 0.16)


@pytest.mark.parametrize("suffix", [".jsonl", ".parquet"])
def test_denselayout_may_nest_its_annotations(tmp_path, suffix):
    path = tmp_path / f"test-00000{suffix}"
    if suffix == ".parquet":
        import pyarrow
        import pyarrow.parquet

        table = pyarrow.Table.from_pylist([{**DENSE, "image": b"never read"}])
        pyarrow.parquet.write_table(table, path)
    else:
        path.write_text(json.dumps(DENSE) + "\n")
    for place in (path, tmp_path):
        (request,) = read_benchmark("denselayout", place)
        assert (request.id, request.prompt) == ("17", "a desk")
        assert [each.label for each in request.instances] == ["cup", "lamp"]
        assert request.instances[0].box == (0.1, 0.1, 0.3, 0.5)
        assert request.instances[1].box == (0.5, 0, 1, 1)  # cut to the picture


def test_coco_mig_comes_by_prompt_or_by_id(tmp_path):
    (request,) = read_benchmark("cocomig", write(tmp_path / "mig_bench_anno.yaml", MIG_YAML))
    assert (request.id, request.width) == ("6", 512)
    assert sorted(each.label for each in request.instances) == ["blue teddy bear", "red cat", "red cat"]
    (request,) = read_benchmark("cocomig", write(tmp_path / "mig_bench.json", MIG_JSON))
    assert (request.id, request.prompt) == ("3", "a photo of a red cat")
    assert request.instances == (Instance("red cat", "a red cat", (0, 0, 0.5, 1)),)


def test_requests_survive_their_file(tmp_path):
    requests = read_benchmark("denselayout", write(tmp_path / "rows.json", [DENSE]))
    write_requests(requests, tmp_path / "requests.jsonl")
    assert read_requests(tmp_path / "requests.jsonl") == requests
    assert not Instance("x", "x", (0.5, 0.5, 0.5, 1)).is_drawable


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("layoutsam", [LAYOUTSAM, {"width": 1, "height": 1}], "row 1: region_captions is missing"),
        ("layoutsam", [{**LAYOUTSAM, "region_captions": "['one']"}], "row 0: 2 boxes, 1 captions and 2 detailed"),
        ("layoutsam", [{**LAYOUTSAM, "bbox_list": "__import__('os')"}], "row 0: malformed node"),
        ("denselayout", [DENSE, DENSE], "the id '17' occurs more than once"),
        ("denselayout", [], "holds no request"),
        ("cocomig", {"3": {"caption": "a cat"}}, "entry '3': KeyError 'coco_id'"),
        ("cocomig", [1], "holds no requests by id or by prompt"),
    ],
)
def test_what_is_not_as_the_format_says_is_named(tmp_path, name, content, message):
    with pytest.raises(ValueError, match=message):
        read_benchmark(name, write(tmp_path / "file.json", content))


# --- scores ---------------------------------------------------------------------------------------------------------


def make_request(*boxes, label="red cup", caption="a red cup", name="0"):
    return Request(name, "a scene", 100, 100, tuple(Instance(label, caption, box) for box in boxes))


def found(*boxes, **others):
    return {"boxes": [list(box) for box in boxes], "scores": [0.9] * len(boxes), **others}


HALF = (0.0, 0.0, 0.5, 1.0)
THREE_QUARTERS = (0.0, 0.0, 0.75, 1.0)  # IoU with HALF is 2 / 3
QUARTER = (0.0, 0.0, 0.2, 1.0)  # 0.4
YES = {"color": "Yes.", "texture": "yes", "shape": "No", "spatial": "Yes"}


def test_ious():
    assert box_ious(HALF, [HALF, THREE_QUARTERS, (0.5, 0, 1, 1), (0.3, 0.3, 0.3, 0.3)]) == pytest.approx(
        [1, 2 / 3, 0, 0]
    )
    assert box_ious((0, 0, 0, 0), [(0, 0, 0, 0)]) == [0]
    assert len(box_ious(HALF, [])) == 0


def test_lgs_counts_ious_from_a_half_on_over_all_boxes():
    request = make_request(HALF, HALF, HALF)
    detections = {"0": [found(QUARTER, THREE_QUARTERS), found(QUARTER), found()]}
    result = score_lgs([request], detections)
    assert result == {"num_pictures": 1, "num_missing": 0, "num_instances": 3, "iou": pytest.approx(2 / 9)}
    answered = score_lgs([request], detections, {"0": [YES, YES, YES]})
    assert answered["color"] == answered["texture"] == pytest.approx(2 / 9)  # the others are not where they should be
    assert answered["shape"] == 0


def test_lgs_gives_no_attributes_where_the_caption_is_the_label():
    request = make_request(HALF, caption="red cup")
    result = score_lgs([request], {"0": [found(HALF)]}, {"0": [YES]})
    assert (result["iou"], result["color"]) == (1, 0)


def test_pictures_without_detections_are_counted_and_left_out():
    requests = [make_request(HALF), make_request(HALF, name="1")]
    result = score_lgs(requests, {"1": [found(HALF)]})
    assert (result["num_pictures"], result["num_missing"], result["iou"]) == (1, 1, 1)
    with pytest.raises(ValueError, match="picture 1: 1 objects, detections of 2"):
        score_lgs(requests, {"1": [found(HALF)] * 2})


def test_layoutsam_counts_attributes_where_the_object_is():
    request = make_request(HALF, HALF)
    absent = {**YES, "spatial": "No"}
    result = score_layoutsam([request], {"0": [YES, absent]})
    shares = {name: result[name] for name in ("spatial", "color", "texture", "shape")}
    assert shares == {"spatial": 0.5, "color": 0.5, "texture": 0.5, "shape": 0}


def test_coco_mig_by_number_of_objects():
    one, two = make_request(HALF), make_request(HALF, HALF, name="1")
    right, wrong = found(THREE_QUARTERS, colour_share=0.2), found(THREE_QUARTERS, colour_share=0.19)
    result = score_coco_mig([one, two], {"0": [right], "1": [right, wrong]})
    assert result["success_rate"] == 0.5
    assert result["instance_success_rate"] == pytest.approx(2 / 3)
    assert result["miou"] == pytest.approx(4 / 9)
    assert result["levels"]["1"] == {"success_rate": 1, "instance_success_rate": 1, "miou": pytest.approx(2 / 3)}
    assert result["levels"]["2"]["success_rate"] == 0
    assert score_coco_mig([one], {"0": [found(QUARTER)]})["miou"] == pytest.approx(0.4)  # its program's quirk
    with pytest.raises(ValueError, match="made with --segmenter"):
        score_coco_mig([one], {"0": [found(HALF)]})


@pytest.mark.parametrize(
    ("colour", "rgb"),
    [
        ("red", (220, 20, 30)),
        ("red", (220, 20, 10)),
        ("blue", (30, 60, 200)),
        ("green", (30, 160, 40)),
        ("yellow", (240, 220, 30)),
        ("black", (10, 10, 10)),
        ("white", (245, 245, 245)),
        ("brown", (120, 70, 30)),
    ],
)
def test_colours_of_coco_mig(colour, rgb):
    pixels = np.array([[rgb, (128, 128, 128)]], np.uint8)
    assert colour_mask(pixels, colour).tolist() == [[True, False]]
    others = {"red", "blue", "green", "yellow", "black", "white", "brown"} - {colour}
    assert not any(colour_mask(pixels, other)[0, 0] for other in others)


def test_questions_are_about_boxes_or_about_what_was_found():
    request = make_request(HALF, HALF, HALF)
    asked = questions([request])
    assert [each["name"] for each in asked[:4]] == ["spatial", "color", "texture", "shape"]
    assert asked[0]["box"] == list(HALF)
    assert asked[0]["question"].startswith('Is the subject "red cup" present in the image?')
    assert '"a red cup"' in asked[1]["question"]
    detections = {"0": [found(THREE_QUARTERS), found(QUARTER), found()]}
    asked = questions([request], detections)
    assert [(each["instance"], each["name"]) for each in asked] == [(0, "color"), (0, "texture"), (0, "shape")]
    assert asked[0]["box"] == list(THREE_QUARTERS)
    assert questions([make_request(HALF, caption="red cup")], {"0": [found(HALF)]}) == []
    answers = gather_answers([request], [{**each, "answer": "Yes"} for each in asked])
    assert score_lgs([request], detections, answers)["color"] == pytest.approx(2 / 9)
    with pytest.raises(ValueError, match="lacks answer"):
        gather_answers([request], asked)
    with pytest.raises(ValueError, match="object 7 of 0, which nobody asked for"):
        gather_answers([request], [{**asked[0], "instance": 7, "answer": "Yes"}])


# --- detectors ------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def detector_folder(tmp_path_factory):
    """GroundingDINO as its repository holds it, small and random."""
    from transformers import (
        BertConfig,
        BertTokenizerFast,
        GroundingDinoConfig,
        GroundingDinoForObjectDetection,
        GroundingDinoImageProcessorPil,
        GroundingDinoProcessor,
        SwinConfig,
    )

    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", ".", "red", "cup", "cat", "bear"]
    backbone = SwinConfig(
        embed_dim=8,
        depths=[1, 1, 1, 1],
        num_heads=[1, 1, 2, 2],
        window_size=4,
        out_features=["stage2", "stage3", "stage4"],
    )
    text = BertConfig(
        vocab_size=len(words), hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16
    )
    layers = {f"{side}_{name}": n for side in ("encoder", "decoder") for name, n in (("ffn_dim", 16), ("layers", 2))}
    config = GroundingDinoConfig(
        backbone_config=backbone.to_dict(), text_config=text.to_dict(), d_model=32, num_queries=12, **layers
    )
    folder = tmp_path_factory.mktemp("detector")
    torch.manual_seed(0)
    GroundingDinoForObjectDetection(config).save_pretrained(folder)
    tokenizer = BertTokenizerFast(vocab={word: number for number, word in enumerate(words)})
    side = {"shortest_edge": 64, "longest_edge": 96}
    GroundingDinoProcessor(GroundingDinoImageProcessorPil(size=side), tokenizer).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def segmenter_folder(tmp_path_factory):
    """SAM as its repository holds it, small and random."""
    from transformers import SamConfig, SamImageProcessorPil, SamModel, SamProcessor

    vision = {
        "hidden_size": 16,
        "output_channels": 16,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "image_size": 64,
        "mlp_dim": 16,
        "window_size": 2,
        "global_attn_indexes": [0],
        "num_pos_feats": 8,
    }
    prompt = {"hidden_size": 16, "image_size": 64, "mask_input_channels": 4, "image_embedding_size": 4}
    mask = {
        "hidden_size": 16,
        "mlp_dim": 16,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "iou_head_hidden_dim": 16,
        "iou_head_depth": 2,
    }
    folder = tmp_path_factory.mktemp("segmenter")
    torch.manual_seed(0)
    config = SamConfig(vision_config=vision, prompt_encoder_config=prompt, mask_decoder_config=mask)
    SamModel(config).save_pretrained(folder)
    side = {"longest_edge": 64}
    processor = SamImageProcessorPil(size=side, pad_size={"height": 64, "width": 64}, mask_size={"longest_edge": 16})
    SamProcessor(processor).save_pretrained(folder)
    return folder


def test_detections_are_fractions_and_obey_the_thresholds(detector_folder):
    detector = Detector(str(detector_folder))
    picture = Image.new("RGB", (80, 64), "red")
    boxes, scores = detector.find(picture, "Red cup.", (0.0, 0.25))
    assert boxes.shape == (len(scores), 4)
    assert len(scores) > 0
    assert (boxes >= 0).all()
    assert (boxes <= 1).all()
    limit = float(np.median(scores))
    assert len(detector.find(picture, "red cup", (limit, 0.25))[1]) == int((scores > limit).sum())
    assert detector.find(picture, "red cup", (1.0, 0.25))[0].shape == (0, 4)
    request = make_request(HALF, HALF)
    each = find_instances(picture, request, detector)
    assert each[0] == each[1]
    json.dumps(each, allow_nan=False)


def test_overlapping_detections_keep_the_best():
    boxes = np.array([HALF, (0.0, 0.0, 0.45, 1.0), THREE_QUARTERS])
    assert drop_overlapping(boxes, np.array([0.5, 0.9, 0.7])).tolist() == [1, 2]
    assert drop_overlapping(boxes[:0], np.zeros(0)).tolist() == []


def test_colours_are_measured_on_what_fills_the_box(detector_folder, segmenter_folder):
    detector, segmenter = Detector(str(detector_folder)), Segmenter(str(segmenter_folder))
    picture = Image.new("RGB", (64, 48), "blue")
    ImageDraw.Draw(picture).rectangle((0, 0, 31, 47), fill="red")
    mask = segmenter.segment(picture, HALF)
    assert mask.shape == (48, 64)
    assert mask.dtype == bool
    request = make_request(HALF, label="red cup")
    (instance,) = find_coloured(picture, request, detector, segmenter)
    pixels = np.asarray(picture)[mask]
    expected = float((pixels[:, 0] > 200).mean()) if mask.any() else 0.0
    assert instance["colour_share"] == pytest.approx(expected)
    with pytest.raises(ValueError, match="'pink cup' does not begin with a colour"):
        find_coloured(picture, make_request(HALF, label="pink cup"), detector, segmenter)


# --- commands -------------------------------------------------------------------------------------------------------


def test_from_annotations_to_scores(tmp_path, detector_folder, capsys):
    dense = write(tmp_path / "dense.json", [DENSE, {**DENSE, "id": 18}])
    requests, pictures, detections = tmp_path / "requests.jsonl", tmp_path / "pictures", tmp_path / "detections"
    main(["requests", "--benchmark", "denselayout", "--path", str(dense), "--output", str(requests)])
    assert "2 requests, 4 objects" in capsys.readouterr().out
    pictures.mkdir()
    Image.new("RGB", (80, 40), "red").save(pictures / "17.jpg")
    common = ["--requests", str(requests)]
    detect = ["detect", "--benchmark", "denselayout", *common, "--pictures", str(pictures), "--output", str(detections)]
    main([*detect, "--detector", str(detector_folder), "--device", "cpu"])
    assert [file.name for file in detections.iterdir()] == ["17.json"]
    (detections / "17.json").write_text(json.dumps({"instances": [found((0.1, 0.1, 0.3, 0.5)), found()]}))
    main([*detect, "--detector", str(detector_folder), "--device", "cpu"])  # what is there is not made again
    asked, answered, output = (tmp_path / name for name in ("asked.jsonl", "answered.jsonl", "scores.json"))
    folders = ["--pictures", str(pictures), "--detections", str(detections)]
    main(["questions", "--benchmark", "denselayout", *common, *folders, "--output", str(asked)])
    rows = [json.loads(line) for line in asked.read_text().splitlines()]
    assert [(row["id"], row["instance"], row["name"]) for row in rows] == [
        ("17", 0, "color"),
        ("17", 0, "texture"),
        ("17", 0, "shape"),
    ]
    answered.write_text("".join(json.dumps({**row, "answer": "Yes"}) + "\n" for row in rows))
    score = [
        "score",
        "--benchmark",
        "denselayout",
        *common,
        "--detections",
        str(detections),
        "--answers",
        str(answered),
    ]
    main([*score, "--output", str(output)])
    content = json.loads(output.read_text())
    assert (content["iou"], content["shape"], content["num_missing"]) == (0.5, 0.5, 1)
    assert "denselayout: 1 pictures, 2 objects; 1 pictures are missing and left out" in capsys.readouterr().out


def test_a_missing_detector_is_one_line(tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    requests = tmp_path / "requests.jsonl"
    write_requests([make_request(HALF)], requests)
    Image.new("RGB", (8, 8)).save(tmp_path / "0.jpg")
    arguments = ["--requests", str(requests), "--pictures", str(tmp_path), "--output", str(tmp_path / "found")]
    with pytest.raises(SystemExit) as stop:
        main(["detect", "--benchmark", "denselayout", *arguments, "--detector", str(tmp_path / "nowhere")])
    assert stop.value.code == 2
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert line.startswith("the detector is not available: ")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("requests --benchmark denselayout --path nowhere.json --output x.jsonl", "nowhere.json"),
        (
            "requests --benchmark coco --path x --output y",
            "--benchmark coco: input should be 'layoutsam', 'dense",
        ),
        ("detect --benchmark layoutsam --requests R --pictures . --output y", "layoutsam needs no detector"),
        ("detect --benchmark denselayout --requests R --pictures nowhere --output y", "0.jpg would be the first"),
        ("questions --benchmark cocomig --requests R --pictures . --output y", "cocomig asks nothing"),
        (
            "questions --benchmark denselayout --requests R --pictures . --output y",
            "--detections belong to denselayout",
        ),
        ("score --benchmark layoutsam --requests R", "layoutsam needs --answers"),
        ("score --benchmark cocomig --requests R", "cocomig needs --detections"),
        ("score --benchmark cocomig --requests R --detections nowhere", "0.json would be the first"),
        ("score --benchmark cocomig --requests BAD --detections .", "row 0: not a request"),
    ],
)
def test_a_wrong_argument_is_one_line_and_exit_code_2(arguments, message, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write_requests([make_request(HALF)], tmp_path / "R")
    (tmp_path / "R").rename("R.jsonl")
    (tmp_path / "BAD.jsonl").write_text('{"id": 1}\n')
    words = [{"R": "R.jsonl", "BAD": "BAD.jsonl"}.get(word, word) for word in arguments.split()]
    with pytest.raises(SystemExit) as stop:
        main(words)
    assert stop.value.code == 2
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert message in line
