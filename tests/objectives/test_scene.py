"""What the corrected rules promise, with random cases, and what each switch of the reference changes."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from objectives import scene
from objectives.rectified_flow import interpolate
from objectives.settings import SceneObjectiveConfig
from objectives.shortcut import bootstrap_targets

WIDTHS = {"6drotation_normalized": (1, 6), "scale": (1, 3), "shape": (4, 5), "translation": (1, 3)}


def make_scenes(batch: int, num_objects: int, seed: int = 0) -> tuple[dict, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    data = {k: torch.randn(batch, num_objects, *v, generator=generator) for k, v in WIDTHS.items()}
    counts = torch.randint(1, num_objects + 1, (batch, 1), generator=generator)
    return data, torch.arange(num_objects) < counts


def known(batch: int) -> dict:
    return {"unconditional": torch.zeros(batch, dtype=torch.bool)}


def linear_network(calls: list | None = None):
    """Velocities that depend on everything a network is given."""

    def network(sample, t, step_size, conditions):
        if calls is not None:
            calls.append((t.clone(), step_size.clone(), conditions["unconditional"].clone()))
        shift = torch.where(conditions["unconditional"], -0.5, 0.5)
        shift = shift.reshape(-1, 1, 1, 1)
        t, step_size = (x.reshape(*x.shape, *(1,) * (4 - x.ndim)) for x in (t, step_size))
        return {k: 0.3 * x.mean(1, keepdim=True) - 0.7 * x + t + 2 * step_size + shift for k, x in sample.items()}

    return network


def run(config: SceneObjectiveConfig, batch: int = 6, seed: int = 0, step: int = 10**6, calls: list | None = None):
    data, mask = make_scenes(batch, 4, seed)
    torch.manual_seed(seed)
    draws = scene.draw(data, mask, config, step, torch.Generator().manual_seed(seed))
    conditions = known(batch)
    null = scene.without_condition(conditions)
    network = linear_network(calls)
    return draws, scene.scene_loss(network, network, data, mask, conditions, null, draws, config)[:2]


configs = st.builds(
    SceneObjectiveConfig,
    self_consistency_prob=st.floats(0, 1),
    ratio_cfg_samples=st.floats(0, 1),
    independent_t=st.booleans(),
    time_law=st.sampled_from(["uniform", "logit_normal"]),
    logit_mean=st.floats(-2, 2),
    pure_noise_prob=st.floats(0, 1),
    condition_dropout_prob=st.floats(0, 0.99),
    fm_in_shortcut_target_prob=st.floats(0, 1),
)


@settings(max_examples=150, deadline=None)
@given(configs, st.integers(1, 9), st.integers(0, 2**31))
def test_corrected_draws_stay_on_the_ladder(config, batch, seed):
    data, mask = make_scenes(batch, 3, seed)
    torch.manual_seed(seed)
    draws = scene.draw(data, mask, config, 0, torch.Generator().manual_seed(seed))
    count = draws.num_bootstrap
    assert abs(count - batch * config.self_consistency_prob) < 1
    t, size = draws.t, draws.step_size
    assert (t + size <= 1).all()
    assert (t >= 0).all()
    size = size[:count]
    level = -torch.log2(size)
    assert (level == level.round()).all()
    assert (level >= 0).all()
    assert (level <= 6).all()
    assert (torch.remainder(t[:count], size) == 0).all()
    assert (draws.step_size[count:] == 0).all()
    assert not draws.drop[:count].any()
    if t.ndim == 2:  # self-consistency rows share their time even so
        assert (t[:count] == t[:count, :1]).all()
        assert (size == size[:, :1]).all()
    # the finest half step is asked for as infinitesimal
    if config.fm_in_shortcut_target_prob == 0:
        assert torch.equal(draws.queried, torch.where(size == 1 / 64, 0.0, size / 2))
    assert all(row < count for row in draws.guidable)
    assert all(bool((size[row] == 1 / 64).all()) for row in draws.guidable)


@settings(max_examples=60, deadline=None)
@given(configs, st.integers(1, 7), st.integers(0, 2**31))
def test_losses_are_finite_and_padding_has_no_say(config, batch, seed):
    data, mask = make_scenes(batch, 4, seed)
    torch.manual_seed(seed)
    draws = scene.draw(data, mask, config, 0, torch.Generator().manual_seed(seed))

    def network(sample, t, step_size, conditions):  # blind to other objects: padding cannot reach them
        return {k: 0.5 * x + conditions["unconditional"].reshape(-1, 1, 1, 1) for k, x in sample.items()}

    def loss(data):
        conditions = known(batch)
        null = scene.without_condition(conditions)
        return scene.scene_loss(network, network, data, mask, conditions, null, draws, config)[0]

    other = {k: torch.where(mask[..., None, None], x, 1e3) for k, x in data.items()}
    value = loss(data)
    assert torch.isfinite(value)
    torch.testing.assert_close(loss(other), value)


def test_share_of_self_consistency_and_guidance_in_small_batches():
    config = SceneObjectiveConfig(self_consistency_prob=0.25, ratio_cfg_samples=0.5)
    for batch in (1, 2, 3):
        data, mask = make_scenes(batch, 2)
        draws = [scene.draw(data, mask, config, 0, torch.Generator().manual_seed(seed)) for seed in range(2000)]
        assert sum(d.num_bootstrap for d in draws) / 2000 == pytest.approx(0.25 * batch, abs=0.03)
        assert sum(len(d.guidable) for d in draws) / 2000 == pytest.approx(0.125 * batch / 7, abs=0.01)


def test_every_level_is_drawn_equally_often():
    sizes = torch.cat([scene.draw_step_sizes(5, SceneObjectiveConfig()) for _ in range(1400)])
    counts = torch.bincount(-torch.log2(sizes).long(), minlength=7)
    assert len(counts) == 7
    assert counts.min() > 900
    assert counts.max() < 1100


def test_warmup_is_flow_matching_alone():
    config = SceneObjectiveConfig(self_consistency_prob=0.9, fm_warmup_steps=5)
    assert run(config, step=4)[0].num_bootstrap == 0
    assert run(config, step=5)[0].num_bootstrap > 0


def test_processes_share_coins_but_not_noise():
    config = SceneObjectiveConfig(self_consistency_prob=0.5)
    data, mask = make_scenes(5, 3)
    drawn = []
    for rank in (0, 1):
        torch.manual_seed(rank)
        drawn.append(scene.draw(data, mask, config, 3, torch.Generator().manual_seed(7)))
    a, b = drawn
    assert a.num_bootstrap == b.num_bootstrap
    assert a.guidable == b.guidable
    assert torch.equal(a.step_size, b.step_size)
    assert not torch.equal(a.noise["shape"], b.noise["shape"])
    assert not torch.equal(a.t, b.t)


def test_guidance_changes_the_named_modalities_at_the_finest_step_only():
    config = SceneObjectiveConfig(self_consistency_prob=1, ratio_cfg_samples=1, cfg_modalities=["shape", "scale"])
    data, mask = make_scenes(14, 3)
    draws = scene.draw(data, mask, config, 0, torch.Generator().manual_seed(0))
    noisy = interpolate(draws.noise, data, draws.t)
    conditions = known(14)
    given = conditions, scene.without_condition(conditions)
    guided = bootstrap_targets(linear_network(), noisy, draws, *given, config)
    plain = bootstrap_targets(linear_network(), noisy, draws, *given, config.model_copy(update={"guidance_scale": 1}))
    for name in WIDTHS:
        changed = (guided[name] - plain[name]).abs().flatten(1).amax(1) > 1e-5
        expected = (draws.step_size == 1 / 64) if name in ("shape", "scale") else torch.zeros(14, dtype=torch.bool)
        assert torch.equal(changed, expected)


# what the rules of the reference are seen to do, and the corrected ones never
FAULTS = {
    "steps beyond the data": lambda draws: bool((draws.t + draws.step_size > 1).any()),
    "steps of 2": lambda draws: bool((draws.step_size == 2).any()),
    "the finest half step by its size": lambda draws: bool((draws.queried == 1 / 128).any()),
    "guidance at large steps": lambda draws: any(draws.step_size[row] > 1 / 64 for row in draws.guidable),
    "conditions dropped on self-consistency rows": lambda draws: bool(draws.drop[: draws.num_bootstrap].any()),
    "all modalities guided": lambda draws: draws.guided_modalities is None,
}


@pytest.mark.parametrize("fault", FAULTS)
def test_only_the_reference_has_its_faults(fault):
    base = {"self_consistency_prob": 0.8, "condition_dropout_prob": 0.5, "mode": "object"}
    configs = [SceneObjectiveConfig(**base, rules=rules) for rules in ("corrected", "reference")]
    seen = [any(FAULTS[fault](run(config, 16, seed)[0]) for seed in range(12)) for config in configs]
    assert seen == [False, True]


def test_the_reference_fills_its_teacher_and_law_of_t():
    config = SceneObjectiveConfig(rules="reference")
    assert (config.teacher, config.time_law, config.sync_draws) == ("live", "logit_normal", False)
    assert SceneObjectiveConfig(rules="reference", time_law="uniform").time_law == "uniform"
    corrected = SceneObjectiveConfig()
    assert (corrected.teacher, corrected.time_law, corrected.sync_draws) == ("ema", "uniform", True)


def test_the_reference_tells_flow_rows_twice_the_step_size():
    largest = [
        run(SceneObjectiveConfig(self_consistency_prob=0, fm_eps_max=0.1, rules=rules), 500)[0].step_size.max().item()
        for rules in ("corrected", "reference")
    ]
    assert largest == pytest.approx([0.1, 0.2], rel=0.02)


def test_floor_never_reaches_a_small_batch_of_objects():
    config = SceneObjectiveConfig(mode="object", rules="reference")
    assert all(run(config, 3, seed)[0].num_bootstrap == 0 for seed in range(50))
    assert any(run(SceneObjectiveConfig(mode="object"), 3, seed)[0].num_bootstrap for seed in range(50))


def test_normalisation_by_rows_and_by_kind():
    settings = {"self_consistency_prob": 0.5, "shortcut_loss_weight": 3, "guidance_scale": 1}
    draws, (by_rows, metrics) = run(SceneObjectiveConfig(**settings))
    data, mask = make_scenes(6, 4, 0)
    network, conditions = linear_network(), known(6)
    reference = SceneObjectiveConfig(**settings, rules="reference")
    by_kind = scene.scene_loss(network, network, data, mask, conditions, conditions, draws, reference)[0]
    consistency, flow = (metrics[k] for k in ("self_consistency_loss", "flow_matching_loss"))
    assert draws.num_bootstrap == 3
    torch.testing.assert_close(by_rows, (3 * consistency[0] + flow[0]) / 6)
    torch.testing.assert_close(by_kind, 3 * consistency[0] / 3 + flow[0] / 3)


def test_rows_weigh_by_their_objects_on_request():
    data, mask = make_scenes(2, 3)
    mask = torch.tensor([[True, False, False], [True, True, True]])
    config = SceneObjectiveConfig(self_consistency_prob=0, loss_weights={"shape": 1.0} | dict.fromkeys(WIDTHS, 1.0))
    draws = scene.draw(data, mask, config, 0)
    zero = lambda sample, *_: {k: torch.zeros_like(x) for k, x in sample.items()}  # noqa: E731
    arguments = zero, zero, data, mask, known(2), known(2), draws, config
    errors = {k: (data[k] - draws.noise[k]).square().mean((2, 3)) for k in data}
    total = sum(errors.values())
    per_scene = scene.scene_loss(*arguments)[0]
    torch.testing.assert_close(per_scene, (total[0, 0] + total[1].mean()) / 2)
    config = config.model_copy(update={"reduction": "object"})
    loss, _, weight = scene.scene_loss(*arguments[:-1], config)
    torch.testing.assert_close(loss / weight, (total[0, 0] + total[1].sum()) / 4)


def test_metrics_are_sums_and_counts_that_add_up():
    draws, (_, metrics) = run(SceneObjectiveConfig(self_consistency_prob=0.5), batch=8)
    for kind, count in (
        ("self_consistency_loss", draws.num_bootstrap),
        ("flow_matching_loss", 8 - draws.num_bootstrap),
    ):
        assert metrics[kind][1] == count
        parts = torch.stack([v for k, v in metrics.items() if k.startswith(kind) and ("/D=" in k or "/t=" in k)])
        torch.testing.assert_close(parts.sum(0), metrics[kind])


def test_pairing_shortens_the_way_and_keeps_the_noise():
    data, mask = make_scenes(5, 4)
    noise = {k: torch.randn_like(v) for k, v in data.items()}
    paired = scene.pair_objects(data, noise, mask)

    def way(x):
        return ((x["translation"] - noise["translation"]).square().sum((2, 3)) * mask).sum(1)

    assert (way(paired) <= way(data) + 1e-6).all()
    assert (way(paired) < way(data)).any()
    for i in range(5):
        count = int(mask[i].sum())
        for name in data:  # whole objects move, and padding stays
            before = sorted(map(tuple, data[name][i, :count].flatten(1).tolist()))
            assert sorted(map(tuple, paired[name][i, :count].flatten(1).tolist())) == before
            assert torch.equal(paired[name][i, count:], data[name][i, count:])
        swapped = {k: v[i : i + 1, [1, 0, *range(2, 4)]] for k, v in data.items()} if count > 1 else None
        if swapped is not None:
            again = scene.pair_objects(swapped, {k: v[i : i + 1] for k, v in noise.items()}, mask[i : i + 1])
            assert all(torch.equal(again[k][0], paired[k][i]) for k in data)


def test_a_users_reverse_fn_is_accepted_and_its_mistakes_named():
    data, mask = make_scenes(3, 2)
    seen = []

    def reverse_fn(x_t, t, cond, d):
        seen.append((t, d))
        return {k: torch.zeros_like(v) for k, v in x_t.items()}

    network = scene.from_reverse_fn(reverse_fn)
    config = SceneObjectiveConfig(self_consistency_prob=0.5)
    draws = scene.draw(data, mask, config, 0)
    scene.scene_loss(network, network, data, mask, known(3), known(3), draws, config)
    torch.testing.assert_close(seen[-1][0], draws.t * 1000)
    torch.testing.assert_close(seen[-1][1], draws.step_size * 1000)
    for wrong, message in (
        (lambda x, t, c, d: {"shape": x["shape"]}, "must return a dict of"),
        (lambda x, t, c, d: x["shape"], "it returned Tensor"),
        (lambda x, t, c, d: x | {"scale": x["scale"][..., :1]}, r"scale of shape \(3, 2, 1, 3\)"),
    ):
        with pytest.raises(ValueError, match=message):
            scene.from_reverse_fn(wrong)(data, draws.t, draws.step_size, {})


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"cfg_modalities": ["form"]}, "`cfg_modalities` names form"),
        ({"loss_weights": {"size": 1.0}}, "`loss_weights` names size"),
        ({"mode": "object", "pairing": "hungarian"}, "an object alone has one slot"),
        ({"mode": "object", "independent_t": True}, "independent_t"),
    ],
)
def test_contradictions_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        SceneObjectiveConfig(**settings)


def test_the_guides_names():
    config = SceneObjectiveConfig(cfg_strength="2.0", batch_mode="false")
    assert config.guidance_scale == 3
    assert config.mode == "object"
