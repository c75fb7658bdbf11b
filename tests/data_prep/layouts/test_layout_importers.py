"""Other people's layouts: boxes come out as x1 y1 x2 y2 in 0..1, pictures keep their proportions."""

import io
import json

import numpy as np
import pytest
from PIL import Image

from data_prep.layouts.format import read_caption
from data_prep.layouts.importers import fit_object, open_source, write_sample


@pytest.fixture
def folder(tmp_path):
    """Where samples are written."""
    for name in ("images", "captions"):
        (tmp_path / "out" / name).mkdir(parents=True)
    return tmp_path / "out"


def picture(width: int = 100, height: int = 50, box: tuple = (20, 10, 40, 30)) -> bytes:
    """White, with a red rectangle."""
    pixels = np.full((height, width, 3), 255, np.uint8)
    x1, y1, x2, y2 = box
    pixels[y1:y2, x1:x2] = (255, 0, 0)
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG")
    return buffer.getvalue()


def test_coco_boxes_are_turned_once_and_crowds_and_specks_are_left_out(tmp_path, folder):
    (tmp_path / "a.png").write_bytes(picture())
    annotations = [
        {"image_id": 7, "category_id": 1, "bbox": [20, 10, 20, 20], "iscrowd": 0},
        {"image_id": 7, "category_id": 2, "bbox": [0, 0, 100, 50], "iscrowd": 1},
        {"image_id": 7, "category_id": 2, "bbox": [50, 20, 4, 4], "iscrowd": 0},
        {"image_id": 7, "category_id": 2, "bbox": [65, 20, 30, 20], "iscrowd": 0},
    ]
    content = {
        "images": [{"id": 7, "file_name": "a.png", "width": 100, "height": 50}],
        "categories": [{"id": 1, "name": "apple"}, {"id": 2, "name": "dog"}],
        "annotations": annotations,
    }
    (tmp_path / "instances.json").write_text(json.dumps(content))
    [sample] = open_source("coco", tmp_path / "instances.json", tmp_path)
    assert [each["bbox"] for each in sample.objects] == [[0.2, 0.2, 0.4, 0.6], [0.65, 0.4, 0.95, 0.8]]
    assert sample.global_caption == "an apple and a dog"
    write_sample(folder, sample, 32)
    caption = read_caption(folder, "a")
    assert [each.caption for each in caption.objects] == ["an apple"]  # a third of the dog is inside the centre square
    assert caption.objects[0].phrase_span == [0, 8]
    with pytest.raises(ValueError, match="no COCO file"):
        list(open_source("coco", _write(tmp_path / "b.json", {"images": []}), tmp_path))


def _write(path, content):
    path.write_text(json.dumps(content))
    return path


def test_a_picture_keeps_its_proportions_and_its_boxes_follow(tmp_path, folder):
    """The box of the red rectangle still is the red rectangle."""
    (tmp_path / "a.png").write_bytes(picture(90, 60, (30, 10, 50, 50)))
    row = {
        "file_name": "a.png",
        "width": 90,
        "height": 60,
        "global_caption": "a bar",
        "bbox_list": "[[30, 10, 50, 50]]",
        "region_captions": "['a bar']",
        "detail_region_captions": "['a red bar, upright']",
    }
    [sample] = open_source("layoutsam", _write(tmp_path / "rows.json", [row]), tmp_path)
    write_sample(folder, sample, 60)
    caption = read_caption(folder, "a")
    pixels = np.asarray(Image.open(folder / caption.image_path)).astype(int)
    assert pixels.shape == (60, 60, 3)
    rows, columns = np.nonzero(pixels[..., 1] < 128)
    found = [columns.min(), rows.min(), columns.max() + 1, rows.max() + 1]
    assert np.abs(np.array(caption.objects[0].bbox) * 60 - found).max() <= 1
    assert caption.objects[0].caption == "a red bar, upright"
    assert caption.objects[0].phrase_span == [0, 5]


def test_a_row_that_is_wrong_is_one_bad_sample_and_no_crash(tmp_path):
    good = {"file_name": "a.png", "width": 10, "height": 10, "global_caption": "x", "region_captions": "['x']"}
    rows = [
        {**good, "bbox_list": "[[1, 1, 9, 9]]"},
        {**good, "bbox_list": "__import__('os')"},
        {**good, "bbox_list": "[[1, 1, 9, 9], [2, 2, 3, 3]]"},
        {**good, "bbox_list": "[[1, 1, 9]]"},
        {"width": 3},
    ]
    path = tmp_path / "rows.jsonl"
    path.write_text("\n".join(map(json.dumps, rows)))
    samples = list(open_source("layoutsam", path, tmp_path))
    assert [sample.problem is None for sample in samples] == [True, False, False, False, False]
    with pytest.raises(ValueError, match=r"row 1 of rows\.jsonl"):
        write_sample(tmp_path, samples[1], 16)
    with pytest.raises(ValueError, match="picture cannot be read"):
        write_sample(tmp_path, samples[0], 16)


DENSE = {
    **{"id": 3, "prompt": "bars", "width": 100, "height": 50},
    "annos": [
        [{"bbox": [20.0, 10.0, 40.0, 30.0], "category_name": "bar", "caption": "a red bar"}],
        [{"bbox": [0.0, 0.0, 50.0, 50.0], "category_name": "bar", "caption": "a bar"}],
    ],
}


def test_denselayout_annotations_may_be_nested_lists(tmp_path):
    (tmp_path / "3.jpg").write_bytes(picture())
    [sample] = open_source("denselayout", _write(tmp_path / "test.json", [DENSE]), tmp_path)
    assert [each["bbox"] for each in sample.objects] == [[0.2, 0.2, 0.4, 0.6], [0, 0, 0.5, 1]]
    assert (sample.image_id, sample.read()) == ("3", picture())
    [sample] = open_source("denselayout", tmp_path / "test.json", None)
    assert "--images" in sample.problem


@pytest.mark.slow
def test_rows_of_parquet_may_hold_their_pictures(tmp_path):
    import pyarrow.parquet

    row = {**DENSE, "image": {"bytes": picture(), "path": None}}
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist([row]), tmp_path / "test.parquet")
    [sample] = open_source("denselayout", tmp_path, None)
    assert sample.read() == picture()


def test_an_object_that_is_mostly_cut_off_is_left_out():
    assert fit_object({"bbox": [0.0, 0.0, 0.5, 1.0]}, (100, 50))["bbox"] == [0, 0, 0.5, 1]
    assert fit_object({"bbox": [0.0, 0.0, 0.4, 1.0]}, (100, 50)) is None
    assert fit_object({"bbox": [0.5, 0.5, 0.5, 0.9]}, (50, 50)) is None
    assert fit_object({"bbox": [-0.2, 0.0, 0.8, 1.0]}, (50, 50))["bbox"] == [0, 0, 0.8, 1]
