"""The mathematics of layout training: noise levels, what is left out, alpha, identity, what lies outside the boxes."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from objectives import layout
from objectives.layout_settings import DropoutConfig, IdentityConfig, TimestepConfig

FLUX_SCHEDULER = {
    "use_dynamic_shifting": True,
    "shift": 3.0,
    "base_image_seq_len": 256,
    "max_image_seq_len": 4096,
    "base_shift": 0.5,
    "max_shift": 1.15,
}
NONE_DROPPED = DropoutConfig(layout=0, instance=0, instance_text=0, clip=0, dino=0, prompt=0)


# ---- noise levels ----


@pytest.mark.parametrize(
    ("tokens", "mu", "factor"), [(256, 0.5, 1.65), (1024, 0.63, 1.88), (2304, 0.847, 2.33), (4096, 1.15, 3.16)]
)
def test_the_shift_is_flux_own(tokens, mu, factor):
    found = layout.scheduler_shift(FLUX_SCHEDULER, tokens)
    assert found == pytest.approx(mu, abs=0.005)
    assert math.exp(found) == pytest.approx(factor, abs=0.01)


def test_shifted_levels_are_those_the_scheduler_generates_with():
    from diffusers import FlowMatchEulerDiscreteScheduler

    scheduler = FlowMatchEulerDiscreteScheduler(**FLUX_SCHEDULER)
    plain = np.linspace(1.0, 0.1, 10)
    mu = layout.scheduler_shift(scheduler.config, 1024)
    scheduler.set_timesteps(sigmas=plain, mu=mu)
    torch.testing.assert_close(layout.shift_sigmas(torch.tensor(plain), mu).float(), scheduler.sigmas[:-1])


def test_a_scheduler_with_a_constant_shift_has_it_at_every_size():
    mu = layout.scheduler_shift(FLUX_SCHEDULER | {"use_dynamic_shifting": False}, 4096)
    assert layout.shift_sigmas(torch.tensor(0.5), mu) == pytest.approx(0.75)  # 3 u / (1 + 2 u)


def test_shares_of_low_noise_at_a_thousand_pixels():
    """At 4,096 tokens one level in eight is below 0.5; with p_low 0.4 nearly half are."""
    torch.manual_seed(0)
    mu = layout.scheduler_shift(FLUX_SCHEDULER, 4096)
    plain = layout.draw_sigmas(200_000, TimestepConfig(), mu)
    assert float((plain < 0.5).float().mean()) == pytest.approx(0.125, abs=0.004)
    low = layout.draw_sigmas(200_000, TimestepConfig(), mu, p_low=0.4, sigma_max=0.5)
    assert float((low < 0.5).float().mean()) == pytest.approx(0.475, abs=0.006)
    only = layout.draw_sigmas(10_000, TimestepConfig(), mu, p_low=1.0, sigma_max=0.5)
    assert 0.02 <= only.min() < 0.03
    assert 0.49 < only.max() <= 0.5


@pytest.mark.parametrize("scheme", ["logit_normal", "uniform"])
def test_levels_lie_between_data_and_noise(scheme):
    torch.manual_seed(0)
    levels = layout.draw_sigmas(10_000, TimestepConfig(weighting_scheme=scheme), 0.0)
    assert 0 < levels.min() < levels.max() <= 1
    assert float(levels.mean()) == pytest.approx(0.5, abs=0.01)
    assert float(levels.std()) == pytest.approx({"logit_normal": 0.208, "uniform": 0.289}[scheme], abs=0.01)


# ---- conditions that are left out ----


def test_conditions_are_left_out_as_often_as_asked_and_independently():
    torch.manual_seed(0)
    kept = layout.draw_kept(20_000, 5, DropoutConfig())
    assert float(kept.objects.float().mean()) == pytest.approx(0.9 * 0.9, abs=0.01)
    assert float((~kept.objects.any(1)).float().mean()) == pytest.approx(0.1, abs=0.01)  # the whole layout
    for name, chance in (("text", 0.1), ("clip", 0.3), ("dino", 0.3), ("prompt", 0.1)):
        assert float(getattr(kept, name).float().mean()) == pytest.approx(1 - chance, abs=0.01), name
    both = (~kept.clip & ~kept.dino).float().mean()
    assert float(both) == pytest.approx(0.3 * 0.3, abs=0.01)


# ---- alpha ----


def test_the_prior_is_least_at_three_quarters_and_one_quarter():
    valid = torch.ones(1, 2, dtype=torch.bool)
    foreground = torch.tensor([[True, False]])
    alpha = torch.tensor([[0.75, 0.25]], requires_grad=True)
    layout.alpha_prior(alpha, foreground, valid).backward()
    torch.testing.assert_close(alpha.grad, torch.zeros(1, 2))
    other = torch.tensor([[0.5, 0.5]], requires_grad=True)
    loss = layout.alpha_prior(other, foreground, valid)
    loss.backward()
    assert loss.item() == pytest.approx(math.log(2))
    assert other.grad[0, 0] < 0 < other.grad[0, 1]  # up for the foreground, down for the background


def test_padding_has_no_say_in_the_prior_and_neither_has_the_batch():
    torch.manual_seed(0)
    alpha, foreground = 0.05 + 0.9 * torch.rand(4, 3), torch.rand(4, 3) < 0.5
    valid = torch.tensor([[1, 1, 1], [1, 0, 0], [1, 1, 0], [0, 0, 0]]).bool()
    whole = layout.alpha_prior(alpha, foreground, valid)
    singles = [layout.alpha_prior(alpha[i : i + 1], foreground[i : i + 1], valid[i : i + 1]) for i in range(4)]
    torch.testing.assert_close(whole, torch.stack(singles).mean())
    torch.testing.assert_close(layout.alpha_prior(torch.where(valid, alpha, 0.95), foreground, valid), whole)
    assert singles[3] == 0


def test_alpha_is_described_over_what_is_valid():
    valid = torch.tensor([[True, True, False]])
    told, values = layout.describe_alpha(torch.tensor([[0.5, 0.2, 0.9]]), valid)
    assert told["metrics/alpha_mean"].tolist() == pytest.approx([0.7, 2])
    assert told["metrics/alpha_fg_ratio"].tolist() == [1, 2]  # exactly 0.5 counts as foreground
    assert values.isnan().tolist() == [[False, False, True]]


# ---- identity ----

BOXES = np.array(
    [[[0, 0, 0.5, 0.5], [0.5, 0.5, 1, 0.6], [0, 0, 0, 0]], [[0.2, 0.2, 0.9, 0.9], [0, 0, 1, 1], [0, 0.5, 0.5, 1]]]
)
CROPS = IdentityConfig(min_box_px=8, max_per_image=2, max_per_step=4)


def all_kept(number: int = 2) -> layout.Kept:
    return layout.draw_kept(number, 3, NONE_DROPPED)


def test_crops_are_large_enough_and_of_pictures_with_little_noise():
    levels = torch.tensor([0.1, 0.6])
    assert layout.choose_crops(BOXES, levels, all_kept(), (32, 32), CROPS) == [(0, 0)]  # the second box is 3 px high
    assert layout.choose_crops(BOXES, levels.flip(0), all_kept(), (8, 8), CROPS) == [(1, 1)]
    assert layout.choose_crops(0 * BOXES, levels, all_kept(), (32, 32), CROPS) == []


def test_no_crop_of_an_object_whose_identity_is_not_told():
    levels, kept = torch.tensor([0.1, 0.1]), all_kept()
    kept.dino[1, 1], kept.objects[1, 0] = False, False
    assert layout.choose_crops(BOXES, levels, kept, (32, 32), CROPS) == [(0, 0), (1, 2)]


def test_there_are_never_more_crops_than_allowed_and_every_object_has_its_turn():
    torch.manual_seed(0)
    levels, few = torch.tensor([0.1, 0.1]), IdentityConfig(min_box_px=8, max_per_image=2, max_per_step=2)
    chosen = [layout.choose_crops(BOXES, levels, all_kept(), (32, 32), few) for _ in range(50)]
    assert {len(each) for each in chosen} == {2}
    assert {pair for each in chosen for pair in each} == {(0, 0), (1, 0), (1, 1), (1, 2)}
    two = [layout.choose_crops(BOXES, levels, all_kept(), (32, 32), CROPS) for _ in range(50)]
    assert {len(each) for each in two} == {3}


def test_the_identity_loss_is_the_weighted_mean_of_distances():
    embeddings = torch.tensor([[1.0, 0.0], [0.0, 2.0]], requires_grad=True)
    references = torch.tensor([[3.0, 0.0], [1.0, 0.0]])
    alpha, sigmas = torch.tensor([0.9, 0.6], requires_grad=True), torch.tensor([0.1, 0.4])
    loss, cosines = layout.identity_loss(embeddings, references, alpha, sigmas)
    assert cosines.tolist() == [1, 0]
    assert loss.item() == pytest.approx(0.36 * 0.6 / (0.81 + 0.36))
    loss.backward()
    assert embeddings.grad.abs().sum() > 0
    assert alpha.grad is None  # or everything would become background


class Mean:
    """An encoder of crops: their mean colour."""

    factor = 2

    def __call__(self, latents: torch.Tensor, boxes: list) -> torch.Tensor:
        return torch.stack([latents[picture].flatten(1).mean(1) * float(box[2]) for picture, box in boxes])


class Boxes:
    def __init__(self, values: np.ndarray):
        self.values = values


def test_the_identity_term_compares_each_crop_with_its_own_reference():
    torch.manual_seed(0)
    clean = torch.randn(2, 4, 16, 16, requires_grad=True)
    references = torch.randn(2, 3, 4)
    batch = {"identity_boxes": Boxes(BOXES), "dino_embeds": references}
    alpha, levels = torch.full((2, 3), 0.7), torch.tensor([0.1, 0.6])
    loss, told = layout.identity_term(clean, alpha, batch, levels, all_kept(), Mean(), CROPS)
    cosine = torch.cosine_similarity(clean[0].flatten(1).mean(1), references[0, 0], dim=0)
    torch.testing.assert_close(loss, 0.7 * (1 - cosine))
    torch.testing.assert_close(told["metrics/dino_similarity_mean"], torch.stack([cosine.detach(), torch.tensor(1.0)]))
    loss.backward()
    assert clean.grad[0].abs().sum() > 0 == clean.grad[1].abs().sum()


def test_without_a_foreground_the_identity_term_is_a_zero_that_can_be_differentiated():
    clean = torch.randn(2, 4, 16, 16, requires_grad=True)
    batch = {"identity_boxes": Boxes(0 * BOXES), "dino_embeds": torch.randn(2, 3, 4)}
    loss, told = layout.identity_term(clean, torch.rand(2, 3), batch, torch.zeros(2), all_kept(), Mean(), CROPS)
    assert loss == 0
    loss.backward()
    assert not clean.grad.any()
    assert all(pair.tolist() == [0, 0] for pair in told.values())


def test_the_loss_grows_to_its_weight():
    assert [layout.ramp(step, 4) for step in (0, 1, 3, 9)] == [0.25, 0.5, 1, 1]
    assert layout.ramp(0, 0) == 1


def test_the_clean_latents_are_found_again_from_the_true_velocity():
    data, noise, sigmas = torch.randn(3, 4, 2, 2), torch.randn(3, 4, 2, 2), torch.tensor([0.1, 0.5, 0.9])
    noisy = (1 - sigmas)[:, None, None, None] * data + sigmas[:, None, None, None] * noise
    torch.testing.assert_close(layout.denoised(noisy, noise - data, sigmas), data)


def test_the_ratio_is_that_of_the_two_gradients():
    velocity = torch.randn(2, 3, requires_grad=True)
    v = velocity * 1.0
    ratio = layout.gradient_ratio((3 * v).sum(), v.sum() * 2, v)
    assert ratio.tolist() == pytest.approx([1.5, 1])
    with torch.no_grad():
        assert layout.gradient_ratio(v.sum(), v.sum(), v.detach()).tolist() == [0, 0]


# ---- outside the boxes ----


def test_outside_is_what_no_token_of_a_box_covers():
    boxes = np.array([[[0, 0, 0.5, 0.5], [0, 0, 0, 0]], [[0.3, 0.3, 0.31, 0.31], [0.9, 0.9, 1, 1]]])
    outside = layout.outside_boxes(boxes, 8, 8)
    assert outside.shape == (2, 1, 8, 8)
    assert outside[0, 0].long().tolist() == [[int(x >= 4 or y >= 4) for x in range(8)] for y in range(8)]
    assert outside[1].sum() == 64 - 2 * 4  # a token each: 2 x 2 cells
    assert not outside[1, 0, 2:4, 2:4].any()
    assert not outside[1, 0, 6:, 6:].any()


def test_changes_inside_the_boxes_cost_nothing_and_outside_their_mean_square():
    outside = layout.outside_boxes(BOXES[:1, :1], 8, 8)
    before = torch.randn(1, 4, 8, 8, requires_grad=True)
    change = torch.where(outside, 0.0, torch.randn(1, 4, 8, 8))
    assert layout.region_preservation(before + change, before, outside) == 0
    velocity = (before.detach() + 0.5).requires_grad_()
    loss = layout.region_preservation(velocity, before, outside)
    assert loss.item() == pytest.approx(0.25)
    loss.backward()
    assert before.grad is None
    assert torch.equal(velocity.grad[0, 0] != 0, outside[0, 0])
    assert layout.region_preservation(velocity, before, torch.zeros_like(outside)) == 0
