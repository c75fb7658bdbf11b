"""Boxes, masks and colours as detectors and cameras give them."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from PIL import Image, ImageFilter
from pydantic import ValidationError
from scipy import ndimage

from data_prep.bop.augmentation import jitter_box, jitter_colours, jitter_mask
from data_prep.bop.item_settings import ColourSettings, DetectionSettings

SIZE = 64
NEVER = {f"{name}_probability": 0.0 for name in ("blur", "sharpness", "contrast", "brightness", "colour")}


def generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def disc(radius: float = 18.0) -> torch.Tensor:
    rows = torch.arange(SIZE) - SIZE / 2
    return rows[:, None] ** 2 + rows**2 < radius**2


def picture(seed: int = 0) -> torch.Tensor:
    """(H, W, 3) uint8, neither flat nor grey."""
    noise = np.random.default_rng(seed).uniform(0, 255, (SIZE, SIZE, 3))
    return torch.from_numpy(ndimage.gaussian_filter(noise, (3, 3, 0)).clip(0, 255).astype(np.uint8))


def changed(settings: ColourSettings, seed: int) -> torch.Tensor:
    return jitter_colours(picture(), settings, 1.0, generator(seed))


def iou(first: torch.Tensor, second: torch.Tensor) -> float:
    return float((first & second).sum() / (first | second).sum())


def test_masks_grow_shrink_and_stay_near_the_truth():
    """Without holes, both directions come as often, and no outline moves by more than 1.5 times `mask_growth`."""
    settings = DetectionSettings(mask_growth=0.05, max_holes=0)
    masks = [jitter_mask(disc(), settings, generator(seed)) for seed in range(100)]
    areas = torch.tensor([int(mask.sum()) for mask in masks]) / int(disc().sum())
    assert 30 <= int((areas > 1).sum()) <= 70
    assert areas.min() < 0.85
    assert areas.max() > 1.15
    reach = 1.5 * 0.05 * SIZE + 1
    assert not any((mask & ~disc(18 + reach)).any() or (~mask & disc(18 - reach)).any() for mask in masks)


def test_outlines_waver():
    """A grown disc is no disc: its radius differs round about."""
    mask = jitter_mask(disc(), DetectionSettings(mask_growth=0.1, max_holes=0), generator(3))
    v, u = (mask ^ torch.from_numpy(ndimage.binary_erosion(mask.numpy()))).nonzero().unbind(1)
    radii = torch.hypot(v - SIZE / 2, u - SIZE / 2)
    assert radii.max() - radii.min() > 2


def test_holes():
    """With nothing else, all that is missing lies in as many holes as drawn, and nothing is added."""
    settings = DetectionSettings(mask_growth=0, max_holes=3, hole_size=0.1)
    masks = [jitter_mask(disc(), settings, generator(seed)) for seed in range(60)]
    assert not any((mask & ~disc()).any() for mask in masks)
    missing = [ndimage.label((disc() & ~mask).numpy())[1] for mask in masks]
    assert set(missing) == {0, 1, 2, 3}
    assert max(int((disc() & ~mask).sum()) for mask in masks) <= 3 * 3.15 * (0.1 * SIZE + 1) ** 2


def test_something_is_always_left():
    tiny = torch.zeros(SIZE, SIZE, dtype=torch.bool)
    tiny[30, 30] = True
    settings = DetectionSettings(mask_growth=0.2, max_holes=8, hole_size=0.3)
    assert all((jitter_mask(tiny, settings, generator(seed)) & tiny).any() for seed in range(40))


def test_typical_masks_are_those_of_a_good_detector():
    values = [iou(jitter_mask(disc(), DetectionSettings(), generator(seed)), disc()) for seed in range(100)]
    assert 0.8 < np.mean(values) < 0.97
    assert min(values) > 0.6


def test_boxes_move_by_shares_of_their_sides():
    box = torch.tensor([-20.0, 10, 80, 30], dtype=torch.float64)
    moved = torch.stack([jitter_box(box, 0.1, generator(seed)) for seed in range(300)]) - box
    limits = torch.tensor([10.0, 2, 10, 2], dtype=torch.float64)
    assert (moved.abs() <= limits).all()
    assert (moved.abs().amax(0) > 0.9 * limits).all()
    assert (moved.mean(0).abs() < 0.12 * limits).all()
    assert moved.dtype == torch.float64


def test_colours_change_as_often_as_asked():
    """0.8 of all, less those for which none of the five is drawn (0.6 0.7 0.7 0.5 0.7 = 0.10 of them)."""
    share = np.mean([not torch.equal(changed(ColourSettings(), seed), picture()) for seed in range(300)])
    assert abs(share - 0.8 * 0.9) < 0.09
    never = ColourSettings(augmentation_probability=0)
    assert all(torch.equal(changed(never, seed), picture()) for seed in range(20))


@pytest.mark.parametrize("name", ["blur", "sharpness", "contrast", "brightness", "colour"])
def test_each_change_alone(name):
    settings = ColourSettings(**NEVER | {f"{name}_probability": 1.0}, augmentation_probability=1)
    results = [changed(settings, seed) for seed in range(12)]
    assert sum(not torch.equal(result, picture()) for result in results) >= 11
    assert not all(torch.equal(result, results[0]) for result in results)
    assert not any(
        torch.equal(changed(ColourSettings(**NEVER, augmentation_probability=1), seed), result)
        for seed, result in enumerate(results)
        if not torch.equal(result, picture())
    )


def test_brightness_stays_in_its_range():
    only = NEVER | {"brightness_probability": 1.0, "brightness_factor": (0.1, 0.5)}
    settings = ColourSettings(**only, augmentation_probability=1)
    factors = torch.tensor(
        [float(changed(settings, seed).double().mean() / picture().double().mean()) for seed in range(100)]
    )
    assert factors.min() > 0.09
    assert factors.max() < 0.51
    assert abs(factors.mean() - 0.3) < 0.04


def test_blur_is_counted_in_pixels_of_the_uncropped_picture():
    only = NEVER | {"blur_probability": 1.0, "blur_radius": (2, 2)}
    settings = ColourSettings(**only, augmentation_probability=1)
    blurred = jitter_colours(picture(), settings, 0.5, generator(0))
    expected = Image.fromarray(picture().numpy()).filter(ImageFilter.GaussianBlur(1))
    assert np.array_equal(blurred.numpy(), np.array(expected))


def test_switching_one_thing_off_leaves_the_draws_of_what_follows():
    drawn = []
    for settings in (ColourSettings(), ColourSettings(augmentation_probability=0), ColourSettings(**NEVER)):
        source = generator(5)
        jitter_colours(picture(), settings, 1.0, source)
        drawn.append(torch.rand(1, generator=source))
    assert drawn[0] == drawn[1] == drawn[2]
    assert all(torch.equal(changed(ColourSettings(), 7), changed(ColourSettings(), 7)) for _ in range(2))


def test_ranges_are_checked():
    with pytest.raises(ValidationError, match="`contrast_factor` must be two numbers"):
        ColourSettings(contrast_factor=(2.0, 0.5))
