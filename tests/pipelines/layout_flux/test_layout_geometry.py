"""Layouts: tokens of boxes, groups of like sizes, Fourier features, phrases."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from layout_samples import GRID, NOT_A_BOX, OVERLAPPING, TEXT_LENGTH, see, tiny_adapter, tiny_flux, tiny_layout

from pipelines.layout_flux.attachment import phrase_weights
from pipelines.layout_flux.layout import box_features, covered_tokens, group_tokens, token_rectangles

# columns and rows x0, y0, x1, y1 on a grid of 6 rows and 8 columns, worked out by hand
RECTANGLES = {
    "full": ([0.0, 0.0, 1.0, 1.0], [0, 0, 8, 6]),
    "on the grid": ([0.25, 0.5, 0.5, 1.0], [2, 3, 4, 6]),
    "between": ([0.3, 0.4, 0.7, 0.6], [2, 2, 6, 4]),
    "rounded onto the grid": ([0.2500001, 0.4999999, 0.5000001, 0.9999999], [2, 3, 4, 6]),
    "smaller than a token": ([0.30, 0.40, 0.31, 0.41], [2, 2, 3, 3]),
    "a point between tokens": ([0.5, 0.5, 0.5 + 1e-7, 0.5 + 1e-7], [4, 3, 5, 4]),
    "at the far corner": ([0.9999, 0.9999, 1.0, 1.0], [7, 5, 8, 6]),
    "a point in the far corner": ([1.0, 1.0, 1.0, 1.0], [7, 5, 8, 6]),
    "along the left border": ([0.0, 0.2, 0.01, 0.9], [0, 1, 1, 6]),
}


@pytest.mark.parametrize("name", RECTANGLES)
def test_a_box_takes_every_token_that_it_touches_and_at_least_one(name):
    box, rectangle = RECTANGLES[name]
    assert token_rectangles(np.array(box, dtype=np.float32), GRID).tolist() == rectangle


def test_no_box_takes_none_or_a_token_outside():
    random = np.random.default_rng(0)
    points = random.uniform(0, 1, (4000, 2, 2)) ** random.choice([0.2, 1, 8], (4000, 1, 1))  # near the borders too
    corners = np.sort(points.astype(np.float32), axis=1)
    x0, y0, x1, y1 = token_rectangles(corners.reshape(-1, 4), GRID).T
    assert ((x0 >= 0) & (x0 < x1) & (x1 <= 8)).all()
    assert ((y0 >= 0) & (y0 < y1) & (y1 <= 6)).all()


def test_covered_tokens_are_those_of_the_rectangles_and_padding_covers_none():
    boxes = np.array([[*OVERLAPPING, NOT_A_BOX]], dtype=np.float32)
    covered = covered_tokens(boxes, GRID).view(1, 5, *GRID)
    for number, (x0, y0, x1, y1) in enumerate(token_rectangles(boxes[0, :4], GRID)):
        expected = torch.zeros(GRID, dtype=torch.bool)
        expected[y0:y1, x0:x1] = True
        assert torch.equal(covered[0, number], expected)
    assert not covered[0, 4].any()


def test_groups_hold_each_box_once_with_its_tokens_and_little_padding():
    random = np.random.default_rng(1)
    corners = np.sort(random.uniform(0, 1, (3, 20, 2, 2)), axis=2).reshape(3, 20, 4).astype(np.float32)
    corners[:, ::5] = 0  # padding in between
    grid = (32, 32)
    groups = group_tokens(corners, grid, torch.device("cpu"))
    covered = covered_tokens(corners, grid).flatten(0, 1)
    assert len(groups) <= 3
    seen = torch.cat([group.instances for group in groups]).tolist()
    assert sorted(seen) == np.flatnonzero(corners.reshape(-1, 4).any(-1)).tolist()
    for group in groups:
        inside = torch.ones_like(group.tokens, dtype=torch.bool) if group.inside is None else group.inside
        for instance, tokens, is_token in zip(group.instances, group.tokens, inside, strict=True):
            picture = instance // 20
            assert (tokens[is_token] - picture * 1024).tolist() == covered[instance].nonzero().flatten().tolist()
    longest = [group.tokens.shape[1] for group in groups]
    assert longest == sorted(longest, reverse=True)
    for group in groups[:-1]:
        lengths = group.tokens.shape[1] if group.inside is None else group.inside.sum(dim=1)
        assert torch.as_tensor(lengths).min() * 4 >= group.tokens.shape[1]


def test_boxes_alike_need_no_mask():
    (group,) = group_tokens(np.array([[[0, 0, 0.5, 0.5], [0.5, 0.5, 1, 1]]]), GRID, torch.device("cpu"))
    assert group.inside is None
    assert group.tokens.shape == (2, 12)


def test_fourier_features_are_1152_numbers_of_the_points_that_span_the_box():
    boxes = np.random.default_rng(2).uniform(0, 1, (2, 3, 4)).astype(np.float32)
    features = box_features(boxes, points=6, frequencies=8)
    assert features.shape == (2, 3, 1152)
    assert features.dtype == torch.float32
    x1, y1, x2, y2 = boxes[1, 2].astype(float)
    expected = []
    for row in range(6):
        for column in range(6):
            for value in (x1 + (x2 - x1) * column / 5, y1 + (y2 - y1) * row / 5):
                expected += [math.sin(value * 100 ** (k / 8)) for k in range(8)]
                expected += [math.cos(value * 100 ** (k / 8)) for k in range(8)]
    torch.testing.assert_close(features[1, 2], torch.tensor(expected), atol=1e-6, rtol=0)


def test_a_phrase_belongs_to_its_instance_and_is_shared_where_phrases_overlap():
    transformer = tiny_flux()
    spans = torch.tensor([[[0, 2], [1, 3], [0, 0], [5, 5]]])
    layout = tiny_layout(phrase_spans=spans)
    weights = phrase_weights(see(tiny_adapter(transformer), transformer, layout), TEXT_LENGTH)
    expected = torch.zeros(1, TEXT_LENGTH, 4)
    expected[0, 0, 0] = expected[0, 2, 1] = 1
    expected[0, 1, :2] = 0.5
    assert torch.equal(weights, expected)
    layout.valid = torch.tensor([[False, True, True, True]])
    weights = phrase_weights(see(tiny_adapter(transformer), transformer, layout), TEXT_LENGTH)
    expected[0, :2, 0], expected[0, 1, 1] = 0, 1
    assert torch.equal(weights, expected)


def test_layouts_repeat_picture_by_picture_and_keep_their_boxes_on_the_host():
    boxes = np.random.default_rng(3).uniform(0.1, 0.4, (2, 3, 4))
    boxes[..., 2:] += 0.5
    layout = tiny_layout(boxes.tolist())
    twice = layout.repeat(2)
    assert twice.boxes.shape == (4, 3, 4)
    for k, source in enumerate((0, 0, 1, 1)):
        assert np.array_equal(twice.boxes[k], layout.boxes[source])
        assert torch.equal(twice.text_embeds[k], layout.text_embeds[source])
        assert torch.equal(twice.phrase_spans[k], layout.phrase_spans[source])
    half = layout.to(torch.device("cpu"), torch.float16)
    assert half.clip_embeds.dtype == torch.float16
    assert half.valid.dtype == torch.bool
    assert half.phrase_spans.dtype == torch.int64
    assert half.boxes is layout.boxes
