"""The caption format, the depth rule, and embeddings of the older naming."""

import copy

import numpy as np
import pytest
import torch

from data_prep.layouts.format import CLIP, DINO, depth_label, find_phrase, parse_caption, read_older

GOOD = {
    "version": 1,
    "image_id": "a-1",
    "image_path": "images/a-1.png",
    "width": 64,
    "height": 64,
    "global_caption": "a red disc and a blue square",
    "objects": [
        {"object_id": 0, "category_name": "disc", "caption": "a red disc", "bbox": [0.1, 0.2, 0.5, 0.6]},
        {"object_id": 1, "caption": "a blue square", "bbox": [0.5, 0.5, 1, 1], "phrase_span": [15, 28]},
    ],
}


def changed(place: tuple, value: object) -> dict:
    values = copy.deepcopy(GOOD)
    inner = values
    for key in place[:-1]:
        inner = inner[key]
    inner[place[-1]] = value
    return values


def test_a_caption_written_by_hand_is_completed():
    caption = parse_caption(GOOD, "it")
    assert [each.depth_label for each in caption.objects] == ["foreground", "foreground"]
    assert [each.is_foreground for each in caption.objects] == [True, True]
    assert caption.objects[1].phrase_span == [15, 28]


@pytest.mark.parametrize(
    ("place", "value", "message"),
    [
        (("objects", 0, "bbox"), [0.5, 0.2, 0.1, 0.6], "x1 < x2"),
        (("objects", 0, "bbox"), [0.1, 0.2, 0.5, 1.01], "y2 <= 1"),
        (("objects", 0, "bbox"), [0.1, 0.2, 0.5], "at least 4 items"),
        (("objects", 0, "bbox"), [0.1, 0.2, float("nan"), 0.5], "finite"),
        (("objects", 0, "bbox"), [0.1, 0.2, 0.11, 0.5], "smaller than a pixel"),
        (("objects", 0, "caption"), "  ", "`caption` is empty"),
        (("objects", 1, "object_id"), 0, "same `object_id`"),
        (("objects", 1, "phrase_span"), [20, 29], "outside the caption"),
        (("objects", 1, "is_foreground"), False, "`is_foreground` is False"),
        (("objects", 1, "depth_label"), "front", "foreground"),
        (("objects",), [], "at least 1 item"),
        (("global_caption",), "", "is empty"),
        (("image_id",), "../a", "match pattern"),
        (("version",), 2, "`version`"),
    ],
)
def test_a_wrong_caption_is_named_in_one_line(place, value, message):
    with pytest.raises(ValueError, match=message) as error:
        parse_caption(changed(place, value), "captions/a-1.json")
    assert "captions/a-1.json" in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("box", "label"),
    [
        ([0, 0, 0.5, 0.3], "foreground"),  # large, though high up
        ([0.1, 0.85, 0.15, 0.9], "foreground"),  # low, though tiny
        ([0.4, 0.5, 0.45, 0.55], "background"),  # tiny
        ([0.4, 0.1, 0.6, 0.3], "background"),  # high up
        ([0.4, 0.4, 0.6, 0.6], "midground"),
    ],
)
def test_depth_is_guessed_from_area_and_height_in_this_order(box, label):
    assert depth_label(box) == label


def test_a_phrase_is_found_where_it_is_the_only_one():
    assert find_phrase("A red disc and a blue square", "a blue square.") == [15, 28]
    assert find_phrase("a dog and a dog", "a dog") is None
    assert find_phrase("a dog", "a cat") is None


def test_older_embeddings_are_read_and_what_is_missing_is_never_zero(tmp_path):
    folder = tmp_path / DINO
    folder.mkdir(parents=True)
    np.save(folder / "a_obj0.npy", np.arange(4, dtype=np.float32))
    torch.save(torch.arange(4.0)[None] + 1, folder / "a_obj1.pt")
    assert read_older(tmp_path, DINO, "a", 2).equal(torch.stack([torch.arange(4.0), torch.arange(4.0) + 1]))
    with pytest.raises(ValueError, match=r"a_obj2.npy or .pt is missing"):
        read_older(tmp_path, DINO, "a", 3)
    with pytest.raises(ValueError, match="is missing"):
        read_older(tmp_path, CLIP, "a", 1)
    (folder / "a_obj1.pt").write_bytes((folder / "a_obj1.pt").read_bytes()[:100])
    with pytest.raises(ValueError, match="is damaged"):
        read_older(tmp_path, DINO, "a", 2)
    np.save(folder / "b_obj0.npy", np.array([{"a": 1}]), allow_pickle=True)
    with pytest.raises(ValueError, match="is damaged"):
        read_older(tmp_path, DINO, "b", 1)


class Harmful:
    """Runs what it likes when it is unpickled."""

    def __reduce__(self):
        return print, ("unpickled",)


def test_older_embeddings_run_no_code(tmp_path, capsys):
    (tmp_path / DINO).mkdir(parents=True)
    torch.save(Harmful(), tmp_path / DINO / "a_obj0.pt")
    with pytest.raises(ValueError, match="is damaged"):
        read_older(tmp_path, DINO, "a", 1)
    assert "unpickled" not in capsys.readouterr().out
