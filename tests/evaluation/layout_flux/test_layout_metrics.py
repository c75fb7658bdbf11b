"""Measures of layouts: nearly 1 on true pictures, and low for each way of being wrong."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from data_prep.layouts.procedural import (
    BODY_COLOURS,
    MARK_COLOURS,
    ProceduralSettings,
    Scene,
    draw_distractors,
    draw_scene,
    render,
    render_masks,
    render_reference,
)
from evaluation.layout_flux.metrics import (
    BACKGROUND,
    alpha_agreement,
    background_accuracy,
    box_iou,
    colours_swapped,
    cosine_similarity,
    drift_ratio,
    identity_retrieval,
    inside_boxes,
    leakage,
    mean_of,
    measure_objects,
    outside_drift,
    paired_gain,
    percentile_box,
    read_colours,
    swap_objects,
    swap_pairs,
)

DEMO = ProceduralSettings.preset("demo")


@pytest.fixture(scope="module")
def scenes() -> list[Scene]:
    return [draw_scene(seed, DEMO, held_out=True) for seed in range(60)]


def rows_of(pictures, scenes):
    return [row for pair in zip(pictures, scenes, strict=True) for row in measure_objects(*pair, DEMO)]


def shapes_changed(scene: Scene) -> Scene:
    """Each object in the next shape."""
    return replace(
        scene,
        objects=tuple(
            replace(
                each,
                identity=replace(
                    each.identity, shape=DEMO.shapes[(DEMO.shapes.index(each.shape) + 1) % len(DEMO.shapes)]
                ),
            )
            for each in scene.objects
        ),
    )


def marks_changed(scene: Scene, seed: int) -> Scene:
    """Each object with another mark."""
    objects = (replace(each, identity=draw_distractors(each.identity, seed)[0]) for each in scene.objects)
    return replace(scene, objects=tuple(objects))


def test_true_pictures_score_nearly_one(scenes):
    pictures = [render(scene) for scene in scenes]
    rows = rows_of(pictures, scenes)
    for key, least in {
        "colour_accuracy": 0.98,
        "mask_iou": 0.97,
        "box_iou": 0.9,
        "shape_accuracy": 0.98,
        "overlap_accuracy": 0.97,
    }.items():
        assert mean_of(rows, key) >= least, key
    assert {row["num_objects"] for row in rows} == {2, 3, 4}
    assert 0.5 < mean_of(rows, "overlapped") < 0.95
    assert all(row["visible"] == 1 for row in rows if row["nearer"])
    assert np.mean([background_accuracy(*pair, DEMO) for pair in zip(pictures, scenes, strict=True)]) >= 0.99


def test_noise_of_a_tenth_of_the_range_hardly_matters(scenes):
    rng = np.random.default_rng(0)
    pictures = [(render(s) + rng.normal(0, 25, (32, 32, 3))).clip(0, 255).astype(np.uint8) for s in scenes]
    rows = rows_of(pictures, scenes)
    assert min(mean_of(rows, key) for key in ("colour_accuracy", "mask_iou", "shape_accuracy")) >= 0.93


def test_other_scenes_and_empty_ones_score_low(scenes):
    others = [render(scene) for scene in (*scenes[1:], scenes[0])]
    rows = rows_of(others, scenes)
    assert mean_of(rows, "colour_accuracy") < 0.25
    assert mean_of(rows, "mask_iou") < 0.2
    assert mean_of(rows, "shape_accuracy") < 0.2
    empty = rows_of([render(replace(scene, objects=())) for scene in scenes], scenes)
    assert all(row[key] == 0 for row in empty for key in ("colour_accuracy", "mask_iou", "box_iou", "shape_accuracy"))


def test_a_wrong_shape_is_seen_and_its_colour_is_right(scenes):
    rows = rows_of([render(shapes_changed(scene)) for scene in scenes], scenes)
    assert mean_of(rows, "shape_accuracy") < 0.05
    assert mean_of(rows, "mask_iou") > 0.4


def test_marks_belong_to_their_bodies(scenes):
    right, marked = 0, 0
    for scene in scenes:
        picture = render(scene)
        reading = read_colours(picture, DEMO)
        assert (reading.owners == BACKGROUND)[~render_masks(scene).any(0)].all()
        for each, mask in zip(scene.objects, render_masks(scene), strict=True):
            mark = mask & (picture == MARK_COLOURS[each.identity.mark_colour]).all(2)
            right += (reading.owners[mark] == DEMO.colours.index(each.colour)).sum()
            marked += mark.sum()
    assert right / marked >= 0.95


def test_a_mark_without_a_body_belongs_to_nobody():
    picture = np.full((32, 32, 3), 188, np.uint8)
    picture[10:20, 10:20] = MARK_COLOURS["black"]
    assert not (read_colours(picture, DEMO).owners >= 0).any()
    assert (read_colours(picture, DEMO).owners == BACKGROUND).sum() == 32 * 32 - 100
    picture[9, 10:20] = BODY_COLOURS["red"]  # what is far from the body still belongs to nobody
    assert 0 < (read_colours(picture, DEMO).owners[10:20] >= 0).sum() < 60


def test_stray_objects_count_against_the_background(scenes):
    scene = next(scene for scene in scenes if not inside_boxes(scene)[:6, :6].any())
    picture = render(scene)
    picture[:6, :6] = BODY_COLOURS["red"]
    outside = (~inside_boxes(scene)).sum()
    assert background_accuracy(picture, scene, DEMO) == pytest.approx(1 - 36 / outside)


def test_boxes_leave_strays_out():
    mask = np.zeros((32, 32), bool)
    mask[8:20, 4:16] = True
    mask[31, 31] = True
    assert percentile_box(mask) == pytest.approx((4 / 32, 8 / 32, 16 / 32, 20 / 32))
    assert percentile_box(mask & (np.arange(32) > 30)) is None
    assert box_iou((0, 0, 1, 1), (0.5, 0, 1.5, 1)) == pytest.approx(1 / 3)
    assert box_iou((0, 0, 1, 1), (2, 2, 3, 3)) == 0


def test_lgs_counts_half_hits_only(scenes):
    rows = rows_of([np.roll(render(scene), 5, axis=1) for scene in scenes], scenes)
    assert all(row["lgs50"] == (row["box_iou"] if row["box_iou"] >= 0.5 else 0) for row in rows)
    assert 0 < mean_of(rows, "lgs50") < mean_of(rows, "box_iou") < 0.7


def test_swapped_prompts(scenes):
    judged = [(scene, *pair) for scene in scenes for pair in swap_pairs(scene)]
    assert len(judged) > 50
    pictures = [(render(scene), render(swap_objects(scene, i, j))) for scene, i, j in judged]
    right = [colours_swapped(*p, *j, DEMO) for p, j in zip(pictures, judged, strict=True)]
    assert np.mean(right) >= 0.95
    assert not any(colours_swapped(p[0], p[0], *j, DEMO) for p, j in zip(pictures, judged, strict=True))
    scene, i, j = judged[0]
    swapped = swap_objects(scene, i, j)
    start, end = swapped.objects[i].phrase_span
    assert swapped.global_caption[start:end] == scene.objects[j].caption == swapped.objects[i].caption


def test_identity_is_found_by_the_mark(scenes):
    def retrieve(pictures, wanted):
        found = []
        for number, (picture, scene) in enumerate(zip(pictures, wanted, strict=True)):
            references = [render_reference(each.identity, 500 + number, DEMO) for each in scene.objects]
            found += identity_retrieval(picture, scene, references, DEMO)
        return np.mean(found)

    some = scenes[:24]
    assert retrieve([render(scene) for scene in some], some) >= 0.95
    assert retrieve([render(marks_changed(scene, 3)) for scene in some], some) <= 0.15
    plain = [render(replace(scene, objects=())) for scene in some]
    assert retrieve(plain, some) == 0


def test_objects_without_a_reference_are_not_judged(scenes):
    found = identity_retrieval(render(scenes[0]), scenes[0], [None] * len(scenes[0].objects), DEMO)
    assert np.isnan(found).all()


def test_drift_compares_outside_with_inside(scenes):
    scene = scenes[0]
    first, second = render(scene), render(marks_changed(scene, 3))
    outside, inside = outside_drift(first, second, scene)
    assert outside == 0
    assert inside > 5
    noisy = second.copy()
    noisy[~inside_boxes(scene)] += 10
    assert outside_drift(first, noisy, scene)[0] == pytest.approx(10)
    assert drift_ratio([(1.0, 10.0), (3.0, 30.0)]) == pytest.approx(0.1)
    assert np.isnan(drift_ratio([outside_drift(first, first, scene)]))


def test_similarities_of_embeddings():
    own, other = np.eye(3), np.roll(np.eye(3), 1, axis=0)
    assert cosine_similarity(5 * own, own) == pytest.approx(1)
    assert leakage(own, own) == pytest.approx(0)
    assert leakage(own, other) == pytest.approx(0.5)  # each looks like one of the two others
    assert np.isnan(leakage(own[:1], own[:1])).all()


def test_alpha_agreement_counts_both_classes():
    found = alpha_agreement(np.array([0.9, 0.5, 0.4, 0.1]), np.array([True, True, True, False]))
    assert found["alpha_agreement"] == pytest.approx(0.75)
    assert found["alpha_agreement_foreground"] == pytest.approx(2 / 3)
    assert found["alpha_agreement_background"] == 1
    assert np.isnan(alpha_agreement(np.array([0.9]), np.array([True]))["alpha_agreement_background"])


def test_means_and_paired_intervals():
    rows = [{"a": 1.0, "n": 2}, {"a": float("nan"), "n": 2}, {"a": 4.0, "n": 3}]
    assert mean_of(rows, "a") == 2.5
    assert mean_of(rows, "a", lambda row: row["n"] == 2) == 1
    assert np.isnan(mean_of(rows, "a", lambda row: row["n"] == 7))
    rng = np.random.default_rng(0)
    before = rng.normal(size=400)
    mean, low, high = paired_gain(before + rng.normal(0.3, 0.5, 400), before)
    assert 0.2 < low < mean < high < 0.4
    with pytest.raises(ValueError, match="must be pairs"):
        paired_gain([1.0], [1.0, 2.0])
    with pytest.raises(ValueError, match="without a NaN"):
        paired_gain([float("nan")], [1.0])


def test_smooth_edges_are_no_other_colours():
    settings = ProceduralSettings.preset("full", image_size=96, min_side=0.2, textures=("flat",))
    scenes = [draw_scene(seed, settings) for seed in range(4)]
    rows = [row for scene in scenes for row in measure_objects(render(scene), scene, settings)]
    assert mean_of(rows, "colour_accuracy") >= 0.9
    assert mean_of(rows, "mask_iou") >= 0.85


def test_pictures_of_another_size_are_refused(scenes):
    with pytest.raises(ValueError, match=r"`picture` must be uint8 of \(32, 32, 3\)"):
        measure_objects(np.zeros((64, 64, 3), np.uint8), scenes[0], DEMO)
