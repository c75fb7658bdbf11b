"""What the shortcut objective must hold to whatever the network is."""

from __future__ import annotations

import pytest
import torch
from pydantic import ValidationError

from objectives import distillation, reflow
from objectives.rectified_flow import euler_step, flow_matching_loss, interpolate, squared_error
from objectives.settings import ObjectiveConfig
from objectives.shortcut import bootstrap_targets, describe, draw, shortcut_loss

PRESETS = ("mixture", "official", "continuous")


def exact_flow_to(point: float):
    """The exact network for data that is one constant: every step's mean velocity is (point - x) / (1 - t)."""

    def network(sample, t, step_size, conditions):
        return (point - sample) / (1 - t).reshape(-1, 1, 1, 1).clamp_min(1e-6)

    return network


def batch(size: int = 64, point: float = 0.5):
    labels = {"class_labels": torch.arange(size) % 10}
    return torch.full((size, 1, 4, 4), point), labels, {"class_labels": torch.full((size,), 10)}


@pytest.mark.parametrize("preset", PRESETS)
def test_the_exact_flow_has_no_loss(preset):
    data, conditions, null = batch()
    config = ObjectiveConfig(preset=preset, target_clip=None, path_eps=0)
    draws = draw(data, config)
    network = exact_flow_to(0.5)
    loss, metrics = shortcut_loss(network, network, data, conditions, null, draws, config)
    assert loss < 1e-8
    assert metrics["loss_bootstrap"] < 1e-8
    # ... and a wrong one has
    assert shortcut_loss(exact_flow_to(0.6), network, data, conditions, null, draws, config)[0] > 1e-3


@pytest.mark.parametrize("preset", PRESETS)
def test_steps_stay_inside_the_unit_interval(preset):
    config = ObjectiveConfig(preset=preset)
    for seed in range(50):
        torch.manual_seed(seed)
        draws = draw(torch.zeros(48, 1, 2, 2), config)
        boot = slice(0, draws.num_bootstrap)
        assert (draws.t + draws.step_size <= 1 + 1e-6).all()
        assert (draws.t >= 0).all()
        assert (draws.step_size[boot] >= 1 / 128 - 1e-7).all()


def test_a_share_of_the_flow_rows_starts_at_noise_alone():
    config = ObjectiveConfig(pure_noise_prob=0.6, bootstrap_fraction=0.5)
    draws = draw(torch.zeros(4000, 1), config)
    at_noise = (draws.t[draws.num_bootstrap :] == 0).float().mean()
    assert at_noise == pytest.approx(0.6, abs=0.04)
    assert (draws.step_size[draws.num_bootstrap :] == 0).all()


def test_sigma_squared_weighs_rows_by_the_noise_that_is_left():
    torch.manual_seed(0)
    data, results = torch.zeros(8, 2), []
    for weighting in ("none", "sigma_squared"):
        config = ObjectiveConfig(loss_weighting=weighting, target_clip=None, condition_dropout_prob=0)
        draws = draw(data, config)
        draws.noise, draws.t = torch.ones(8, 2), torch.full((8,), 0.75)

        def off_by_two(sample, t, step_size, conditions):
            return torch.full_like(sample, 1.0)  # the exact velocity is -1

        zeros = torch.zeros(8)
        results.append(shortcut_loss(off_by_two, off_by_two, data, zeros, zeros, draws, config)[1])
    assert results[0]["loss_flow"] == pytest.approx(4)
    assert results[1]["loss_flow"] == pytest.approx(4 / 16)


def test_mixture_always_trains_the_one_step_row():
    for size in (16, 64, 128):
        for seed in range(20):
            torch.manual_seed(seed)
            draws = draw(torch.zeros(size, 1, 2, 2), ObjectiveConfig())
            boot = slice(0, draws.num_bootstrap)
            assert ((draws.step_size[boot] == 1) & (draws.t[boot] == 0)).any()


def test_small_micro_batches_of_an_update_share_out_the_levels():
    # 8 processes of 32 rows: 4 bootstrap rows each, fewer than levels, but 32 together
    config = ObjectiveConfig(preset="official", bootstrap_guidance_scale=1.5)
    draws = [draw(torch.zeros(32, 1), config, part, 8) for part in range(8)]
    levels = torch.cat([-torch.log2(d.step_size[:4]) for d in draws]).long()
    assert levels.bincount(minlength=7).tolist() == [8, 4, 4, 4, 4, 4, 4]
    guided = [-torch.log2(d.step_size[row]).item() for d in draws for row in d.guidable]
    assert guided == [6.0] * 4
    assert "NEVER TRAINED" not in describe(32, 8, config)
    assert "NEVER TRAINED" in describe(32, 1, config)


def test_a_single_dyadic_row_visits_every_level():
    seen = set()
    for seed in range(100):
        torch.manual_seed(seed)
        seen.add(float(draw(torch.zeros(4, 1), ObjectiveConfig()).step_size[0]))
    assert seen == {2.0**-level for level in range(7)}


def test_mixture_levels_are_balanced_over_many_batches():
    config = ObjectiveConfig(dyadic_fraction=1.0)
    counts = torch.zeros(7)
    for seed in range(700):
        torch.manual_seed(seed)
        draws = draw(torch.zeros(36, 1, 1, 1), config)  # 9 bootstrap rows on 7 levels
        counts += (-torch.log2(draws.step_size[:9])).round().long().bincount(minlength=7)
    torch.testing.assert_close(counts / counts.sum(), torch.full((7,), 1 / 7), atol=0.01, rtol=0)


def test_log_uniform_steps_are_uniform_in_the_logarithm():
    torch.manual_seed(0)
    config = ObjectiveConfig(dyadic_fraction=0.0)
    steps = torch.cat([draw(torch.zeros(64, 1), config).step_size[:16] for _ in range(200)])
    share = torch.histc(-torch.log2(steps), 7, 0, 7) / len(steps)
    torch.testing.assert_close(share, torch.full((7,), 1 / 7), atol=0.01, rtol=0)


def test_rows_of_both_parts_are_disjoint_and_cover_the_batch():
    draws = draw(torch.zeros(32, 1), ObjectiveConfig())
    assert draws.rows.tolist() == list(range(32))
    reused = draw(torch.zeros(32, 1), ObjectiveConfig(preset="official"))
    assert reused.rows.tolist() == [*range(4), *range(28)]
    assert len({float(x) for x in reused.noise}) == 32  # their noise differs all the same


@pytest.mark.parametrize("preset", ["mixture", "official"])
def test_no_teacher_call_falls_between_the_flow_and_the_smallest_step(preset):
    config = ObjectiveConfig(preset=preset)
    smallest = config.flow_step_size
    data, conditions, null = batch(128)
    asked = []

    def teacher(sample, t, step_size, conditions):
        asked.append(step_size)
        return torch.zeros_like(sample)

    for seed in range(20):
        torch.manual_seed(seed)
        shortcut_loss(teacher, teacher, data, conditions, null, draw(data, config), config)
    asked = torch.cat(asked)
    assert ((asked == smallest) | (asked > 1 / 128)).all()
    assert (asked == smallest).any()


def test_guidance_enters_only_at_the_smallest_step():
    config = ObjectiveConfig(bootstrap_guidance_scale=3.0, target_clip=None)
    data, conditions, null = batch(128)
    torch.manual_seed(0)
    draws = draw(data, config)
    boot = slice(0, draws.num_bootstrap)

    def teacher(sample, t, step_size, conditions):
        return torch.where(conditions["class_labels"] == 10, 1.0, 2.0).reshape(-1, 1, 1, 1).expand_as(sample)

    labels, nulls = ({"class_labels": c["class_labels"][boot]} for c in (conditions, null))
    targets = bootstrap_targets(teacher, data[boot], draws, labels, nulls, config)
    small = draws.step_size[boot] <= 2 / 128 * (1 + 1e-4)
    expected = torch.where(small, 1 + 3.0 * (2 - 1), 2.0)
    assert small.sum() >= 2
    torch.testing.assert_close(targets[:, 0, 0, 0], expected)


def test_conditions_are_dropped_on_flow_rows_only_and_labels_stay_as_they_were():
    data, conditions, null = batch(128)
    before = conditions["class_labels"].clone()
    config = ObjectiveConfig(condition_dropout_prob=0.5)
    torch.manual_seed(0)
    draws = draw(data, config)
    assert not draws.drop[: draws.num_bootstrap].any()
    assert 0.3 < draws.drop[draws.num_bootstrap :].float().mean() < 0.7
    network = exact_flow_to(0.5)
    shortcut_loss(network, network, data, conditions, null, draws, config)
    assert torch.equal(conditions["class_labels"], before)
    assert draw(data, ObjectiveConfig(condition_dropout_prob=1.0)).drop.all()


def test_a_dict_of_tensors_is_a_sample_too():
    torch.manual_seed(0)
    images, conditions, null = batch(32)
    scene = {"shape": images, "pose": torch.full((32, 7), 0.5)}

    def network(sample, t, step_size, conditions):
        return {key: (0.5 - x) / (1 - t).reshape(-1, *(1,) * (x.ndim - 1)).clamp_min(1e-6) for key, x in sample.items()}

    config = ObjectiveConfig(target_clip=None, bootstrap_guidance_scale=2.0)
    loss, _ = shortcut_loss(network, network, scene, conditions, null, draw(scene, config), config)
    assert loss < 1e-8


def test_the_teacher_gets_no_gradient_and_the_logged_parts_add_up():
    data, conditions, null = batch(64)
    weight = torch.tensor(0.3, requires_grad=True)
    teacher_weight = torch.tensor(0.2, requires_grad=True)

    def network(w):
        return lambda sample, t, step_size, conditions: w * sample

    config = ObjectiveConfig()
    draws = draw(data, config)
    loss, parts = shortcut_loss(network(weight), network(teacher_weight), data, conditions, null, draws, config)
    loss.backward()
    assert weight.grad is not None
    assert teacher_weight.grad is None
    share = draws.num_bootstrap / 64
    merged = share * parts["loss_bootstrap"] + (1 - share) * parts["loss_flow"]
    torch.testing.assert_close(loss.detach(), merged)
    split, parts = shortcut_loss(
        network(weight), network(weight), data, conditions, null, draws, ObjectiveConfig(loss_reduction="split")
    )
    torch.testing.assert_close(split.detach(), parts["loss_bootstrap"] + parts["loss_flow"])


def test_the_midpoint_and_the_target_are_clipped():
    config = ObjectiveConfig(target_clip=2.0)
    data, conditions, null = batch(16)
    draws = draw(data, config)
    rows = slice(0, draws.num_bootstrap)
    seen = []

    def teacher(sample, t, step_size, conditions):
        seen.append(sample)
        return torch.full_like(sample, 100.0)

    labels, nulls = ({"class_labels": c["class_labels"][rows]} for c in (conditions, null))
    targets = bootstrap_targets(teacher, data[rows], draws, labels, nulls, config)
    assert (seen[1] <= 2.0).all()
    assert (seen[1] == 2.0).any()
    assert torch.equal(targets, torch.full_like(targets, 2.0))


def test_data_outside_the_clip_is_measured():
    data, conditions, null = batch(64, point=9.0)
    network = exact_flow_to(9.0)
    config = ObjectiveConfig()
    _, metrics = shortcut_loss(network, network, data, conditions, null, draw(data, config), config)
    assert metrics["flow_target_outside_clip"] > 0.9


def test_path_ends():
    noise, data = torch.randn(2, 8, 3)
    torch.testing.assert_close(interpolate(noise, data, torch.zeros(8)), noise)
    torch.testing.assert_close(interpolate(noise, data, torch.ones(8)), data)
    torch.testing.assert_close(squared_error(noise, data), (noise - data).square().mean(1))


def test_flow_matching_of_the_exact_flow_has_no_loss():
    data, conditions, _ = batch()
    noise, t = torch.randn_like(data), torch.rand(64) * 0.99
    loss, _ = flow_matching_loss(exact_flow_to(0.5), noise, data, t, conditions, step_size=0.0, path_eps=0.0)
    assert loss < 1e-6


def test_progressive_target_is_two_teacher_steps_and_guides_only_in_the_first_phase():
    config = ObjectiveConfig(name="progressive", teacher_model="x", distillation_guidance_scale=2.0, target_clip=None)
    data, conditions, null = batch()
    noise = torch.randn_like(data)
    network = exact_flow_to(0.5)
    t = distillation.lattice_times(64, 2**6, torch.device("cpu"))
    loss, _ = distillation.progressive_loss(network, network, noise, data, t, conditions, null, 0, 700, config)
    assert loss < 1e-8
    calls = []

    def teacher(sample, t, step_size, conditions):
        calls.append((int(conditions["class_labels"][0]), float(step_size[0])))
        return torch.zeros_like(sample)

    distillation.progressive_loss(teacher, teacher, noise, data, t, conditions, null, 0, 700, config)
    assert calls == [(10, 1 / 128), (0, 1 / 128)] * 2 + [(0, 2 / 128)]
    calls.clear()
    distillation.progressive_loss(teacher, teacher, noise, data, t * 0, conditions, null, 699, 700, config)
    assert calls == [(0, 0.5), (0, 0.5), (0, 1.0)]


def test_phases_follow_the_global_step():
    config = ObjectiveConfig(name="consistency")
    starts = [step for step in range(720) if distillation.starts_phase(step, 720, config)]
    assert starts == [0, 102, 204, 306, 408, 510, 612]  # seven phases, whatever does not divide goes to the last
    assert distillation.phase(719, 720, config) == 6


def test_consistency_of_the_exact_flow_has_no_loss_with_and_without_a_teacher():
    config = ObjectiveConfig(name="consistency", target_clip=None)
    data, conditions, _ = batch()
    noise, network = torch.randn_like(data), exact_flow_to(0.5)
    t = distillation.lattice_times(64, 8, torch.device("cpu"))
    for teacher in (None, network):
        gap = torch.full_like(t, 1 / 8)
        loss, _ = distillation.consistency_loss(network, network, noise, data, t, gap, conditions, config, teacher)
        assert loss < 1e-6


def test_live_reflow_learns_its_own_samples_at_step_size_one():
    config = ObjectiveConfig(name="live_reflow")
    data, conditions, null = batch(16)
    noise, network = torch.randn_like(data), exact_flow_to(0.5)
    told = []

    def recorded(sample, t, step_size, conditions):
        told.append(step_size)
        return network(sample, t, step_size, conditions)

    loss, metrics = reflow.live_reflow_loss(
        recorded, noise, data, torch.rand(16) * 0.9, conditions, null, 4, config
    )  # fmt: skip
    assert loss < 1e-6
    assert metrics["loss_reflow"] < 1e-6
    assert len(told) == 9
    assert told[-1].tolist() == [1.0] * 4 + [0.0] * 12


def test_euler_steps_of_the_exact_flow_reach_the_data():
    sample, network = torch.randn(4, 1, 2, 2), exact_flow_to(0.5)
    for i in range(4):
        t, d = torch.full((4,), i / 4), torch.full((4,), 0.25)
        sample = euler_step(sample, network(sample, t, d, None), d)
    torch.testing.assert_close(sample, torch.full_like(sample, 0.5))


def test_presets_fill_keys_and_explicit_keys_win():
    assert ObjectiveConfig(preset="official").bootstrap_fraction == 0.125
    assert ObjectiveConfig(preset="official", bootstrap_fraction=0.5).bootstrap_fraction == 0.5
    assert ObjectiveConfig(preset="continuous").target_clip is None
    with pytest.raises(ValidationError, match="power of two, not 100"):
        ObjectiveConfig(denoise_timesteps=100)
    with pytest.raises(ValidationError, match="teacher_model"):
        ObjectiveConfig(name="progressive")


def test_a_micro_batch_of_one_is_refused():
    with pytest.raises(ValueError, match="at least 2 rows"):
        draw(torch.zeros(1, 3), ObjectiveConfig())
