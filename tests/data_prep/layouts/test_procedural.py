"""Drawn scenes: what they promise about objects, marks, captions and other views."""

from __future__ import annotations

import json
from dataclasses import replace
from itertools import combinations

import numpy as np
import pytest
from pydantic import ValidationError

from data_prep.layouts.procedural import (
    BACKGROUND_TONE,
    BODY_COLOURS,
    GLYPHS,
    MARK_COLOURS,
    MARK_PATTERNS,
    NUM_MARKS,
    SHAPES,
    Identity,
    ProceduralSettings,
    Scene,
    all_identities,
    draw_distractors,
    draw_scene,
    in_mark,
    inside,
    is_held_out,
    mask_box,
    render,
    render_amodal_masks,
    render_masks,
    render_reference,
)

DEMO = ProceduralSettings.preset("demo")
CAPTION = "a blue triangle, a cyan square, a magenta square and a yellow disc"
SMALL_FULL = ProceduralSettings.preset("full", image_size=160)


@pytest.fixture(scope="module")
def scenes() -> list[Scene]:
    return [draw_scene(seed, DEMO) for seed in range(200)]


def test_colours_of_the_demo_are_far_apart():
    tones = [(BACKGROUND_TONE + step,) * 3 for step in (-10, 10)]
    colours = np.array([*(BODY_COLOURS[name] for name in DEMO.colours), *MARK_COLOURS.values()], float)
    apart = [np.linalg.norm(a - b) for a, b in combinations(colours, 2)]
    apart += [np.linalg.norm(a - np.array(b)) for a in colours for b in tones]
    assert min(apart) >= 95  # of 255


def test_a_seed_gives_one_scene_and_another_seed_another(scenes):
    assert draw_scene(3, DEMO) == scenes[3] != scenes[4]
    assert (render(scenes[3]) == render(draw_scene(3, DEMO))).all()
    assert draw_scene(3, DEMO, held_out=True) != scenes[3]


def test_held_out_identities_are_a_fifth_and_show_up_nowhere_else(scenes):
    held_out = all_identities(DEMO, held_out=True)
    assert len(held_out) + len(all_identities(DEMO, held_out=False)) == 4 * 6 * NUM_MARKS
    assert 0.15 < len(held_out) / (4 * 6 * NUM_MARKS) < 0.25
    assert not any(is_held_out(each.identity) for scene in scenes for each in scene.objects)
    unseen = [draw_scene(seed, DEMO, held_out=True) for seed in range(50)]
    assert all(is_held_out(each.identity) for scene in unseen for each in scene.objects)


def test_demo_scenes_keep_to_their_ranges(scenes):
    assert {len(scene.objects) for scene in scenes} == {2, 3, 4}
    for scene in scenes:
        assert len({each.colour for each in scene.objects}) == len(scene.objects)
        assert sorted(each.z_order for each in scene.objects) == list(range(len(scene.objects)))
        for each, mask, amodal in zip(scene.objects, render_masks(scene), render_amodal_masks(scene), strict=True):
            assert mask_box(amodal) == pytest.approx(each.box)
            assert mask.sum() / amodal.sum() == pytest.approx(each.visible, abs=1e-3)
            assert each.visible >= 0.5
            assert 10 <= round(32 * each.side) <= 17
            assert max(x2 - x1 for x1, x2 in (each.box[::2], each.box[1::2])) == pytest.approx(each.side)


def test_nearer_objects_are_larger_and_lower_and_about_half_are_foreground(scenes):
    objects = [each for scene in scenes for each in scene.objects]
    assert 0.35 <= np.mean([each.is_foreground for each in objects]) <= 0.65
    assert min(np.mean([each.depth_label == label for each in objects]) for label in ("midground", "background")) > 0.1
    for measure in (lambda each: each.side, lambda each: each.box[3]):
        near = np.mean([measure(max(scene.objects, key=lambda each: each.z_order)) for scene in scenes])
        far = np.mean([measure(min(scene.objects, key=lambda each: each.z_order)) for scene in scenes])
        assert near > far + 0.05


def test_masks_are_those_of_the_picture(scenes):
    for scene in scenes[:50]:
        picture, masks = render(scene), render_masks(scene)
        assert masks.sum(0).max() == 1
        bare = render(replace(scene, objects=()))
        assert (picture[~masks.any(0)] == bare[~masks.any(0)]).all()
        for each, mask in zip(scene.objects, masks, strict=True):
            allowed = [BODY_COLOURS[each.colour], MARK_COLOURS[each.identity.mark_colour]]
            assert (picture[mask][:, None] == np.array(allowed)).all(2).any(1).all()


def test_every_mark_can_be_seen_and_no_caption_names_it(scenes):
    shown = set()
    for scene in scenes:
        picture = render(scene)
        for each, mask in zip(scene.objects, render_masks(scene), strict=True):
            marked = (picture[mask] == MARK_COLOURS[each.identity.mark_colour]).all(1).sum()
            assert 4 <= marked <= 0.7 * mask.sum()
            shown.add(each.identity.mark)
        assert not any(name in scene.global_caption for name in (*MARK_COLOURS, *MARK_PATTERNS))
    assert shown == set(range(NUM_MARKS))


def test_captions_hold_the_objects_in_their_spans(scenes):
    assert draw_scene(1, DEMO).global_caption == CAPTION
    for scene in [*scenes, *(draw_scene(seed, SMALL_FULL) for seed in range(10))]:
        for each in scene.objects:
            start, end = each.phrase_span
            assert scene.global_caption[start:end] == each.caption
    assert Identity("letter K", "orange", "striped", 0).caption == "a striped orange letter K"
    assert Identity("disc", "orange", "flat", 0).caption == "an orange disc"


@pytest.mark.parametrize("settings", [DEMO, SMALL_FULL], ids=["demo", "full"])
def test_a_caption_file_gives_the_scene_back(settings):
    scene = draw_scene(11, settings)
    references = [("references/a.png", (0.1, 0.2, 0.5, 0.6)), *[None] * (len(scene.objects) - 1)]
    caption = json.loads(json.dumps(scene.to_caption("0011", "images/0011.png", references)))
    again = Scene.from_caption(caption)
    assert again == scene
    assert (render(again) == render(scene)).all()
    first = caption["objects"][0]
    assert first["bbox"] == pytest.approx(scene.objects[0].box)
    assert first["reference"]["image_path"].endswith("a.png")
    assert (caption["image_id"], caption["width"]) == ("0011", settings.image_size)
    with pytest.raises(ValueError, match="no `procedural`"):
        Scene.from_caption({"image_id": "7"})


def test_references_show_the_identity_from_elsewhere():
    identity = Identity("square", "red", "flat", 9)
    views = [render_reference(identity, seed, DEMO) for seed in range(40)]
    sizes = []
    for picture, box in views:
        assert all(0 <= x <= 1 for x in box)
        ours = (picture[:, :, None] == np.array([BODY_COLOURS["red"], MARK_COLOURS["white"]])).all(3)
        assert ours[..., 0].sum() > 20
        assert ours[..., 1].sum() >= 4
        assert mask_box(ours.any(2)) == pytest.approx(box)
        sizes.append(box[2] - box[0])
    assert len({picture.tobytes() for picture, _ in views}) == 40
    assert max(sizes) - min(sizes) > 0.2


def test_distractors_differ_by_their_marks_alone():
    identity = Identity("disc", "blue", "flat", 5)
    others = draw_distractors(identity, seed=2)
    assert len({each.mark for each in others} | {5}) == 16
    assert {each.caption for each in others} == {identity.caption}


@pytest.mark.parametrize("shape", SHAPES)
def test_shapes_fill_their_square_and_show_every_mark(shape):
    centres = (np.arange(64) + 0.5) / 32 - 1
    u, v = np.meshgrid(centres, centres)
    body = inside(shape, u, v)
    x1, y1, x2, y2 = mask_box(body)
    assert max(x2 - x1, y2 - y1) >= (0.9 if shape != "star" else 0.85)
    assert all((body & in_mark(shape, pattern, u, v)).sum() >= 0.03 * body.sum() for pattern in MARK_PATTERNS)


def test_full_scenes_show_every_kind(scenes):
    drawn = [draw_scene(seed, SMALL_FULL) for seed in range(60)]
    objects = [each for scene in drawn for each in scene.objects]
    assert {scene.background.kind for scene in drawn} == set(SMALL_FULL.backgrounds)
    assert {each.identity.texture for each in objects} == set(SMALL_FULL.textures)
    assert {each.colour for each in objects} == set(BODY_COLOURS)
    assert 0.03 < np.mean([each.shape in GLYPHS for each in objects]) < 0.3
    picture = render(drawn[0])
    assert (picture.shape, picture.dtype) == ((160, 160, 3), np.uint8)
    assert all(each.visible >= 0.4 for each in objects)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ({"shapes": ("blob",)}, "`shapes` must name"),
        ({"min_objects": 5}, "`min_objects` must be at most `max_objects`"),
        ({"min_side": 0.1}, "at least 8 pixels"),
        ({"colours": ("red", "blue")}, "at most the number of colours, 2"),
    ],
)
def test_settings_that_cannot_be_drawn_are_refused(overrides, message):
    with pytest.raises(ValidationError, match=message):
        ProceduralSettings.preset("demo", **overrides)
    with pytest.raises(ValueError, match="must be one of full, demo"):
        ProceduralSettings.preset("other")
