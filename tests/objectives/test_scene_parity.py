"""The `reference` rules against arrays computed with SAM 3D Objects' own classes; every random number is injected."""

from __future__ import annotations

import itertools
import json
from pathlib import Path

import numpy as np
import pytest
import torch

from objectives.rectified_flow import euler_step, interpolate, take, velocity_target
from objectives.scene import scene_loss
from objectives.settings import SceneObjectiveConfig
from objectives.shortcut import Draws, bootstrap_targets

FIXTURES = Path(__file__).parents[1] / "fixtures"
WEIGHTS = {key: torch.from_numpy(value) for key, value in np.load(FIXTURES / "scene_weights.npz").items()}
SETTINGS = ["fm_object", "scene_fm", "obj_mixed_cfg", "scene_sc_cfg"]


def toy_network(cross: bool, calls: list | None = None):
    """The reference's stand-in network on (B, N, tokens, C), t and d of shape (B,) or (B, N)."""

    def network(sample, t, step_size, conditions):
        if calls is not None:
            calls.append((t * 1000, step_size * 1000, conditions["unconditional"]))
        time, step = (x.reshape(*x.shape, *(1,) * (4 - x.ndim)) for x in (t, step_size))
        known = (~conditions["unconditional"]).double()[:, None, None, None]
        velocity = {}
        for name, x in sample.items():
            w = {key: WEIGHTS[f"{name}/{key}"] for key in "AMOabP"}
            pooled = x.mean(2, keepdim=True)
            h = x @ w["A"] + 0.3 * pooled @ w["M"]
            if cross:
                h = h + 0.2 * pooled.mean(1, keepdim=True) @ w["O"]
            velocity[name] = torch.tanh(h) + torch.sin(time) * w["a"] + step * w["b"]
            velocity[name] = velocity[name] + known * (conditions["cond"] @ w["P"])[:, :, None]
        return velocity

    return network


def load(setting: str):
    arrays = np.load(FIXTURES / f"scene_loss_{setting}.npz")
    flags = json.loads(str(arrays["config_json"]))
    scene = flags.get("batch_mode", False)

    def group(prefix: str):
        """Rows of the reference are objects: of one scene, or scenes of one object each."""
        found = {
            k.removeprefix(prefix + "/"): torch.from_numpy(arrays[k]) for k in arrays if k.startswith(prefix + "/")
        }
        return {k: v[None] if scene else v[:, None] for k, v in found.items()}

    return arrays, flags, scene, group


def inject(arrays, scene: bool, group, config: SceneObjectiveConfig):
    """The reference's draws in our order: self-consistency rows first."""
    t, d, chosen = (torch.from_numpy(arrays[key]) for key in ("t", "d", "sc_index"))
    count = len(chosen)
    if scene:
        rows, t, d, count = torch.tensor([0]), t[None], d[None], int(count > 0)
    else:
        rows = torch.cat([chosen, torch.tensor([i for i in range(len(t)) if i not in chosen.tolist()]).long()])
    named = torch.from_numpy(arrays["eps_uniform"]).reshape(d.shape) * 2 * config.fm_eps_max
    step_size = torch.where(d == 0, named, 2 * d)[rows]
    coins = arrays["draws_given"].tolist()
    if scene:
        guided = list(range(count)) if coins and coins[0] < config.ratio_cfg_samples else []
    else:
        guided = list(range(int(count * config.ratio_cfg_samples)))
    partial = len(guided) < count
    return Draws(
        noise=take(group("x0"), rows),
        t=t[rows],
        step_size=step_size,
        drop=torch.zeros(len(rows), dtype=torch.bool),
        rows=rows,
        num_bootstrap=count,
        guidable=guided,
        queried=d[rows][:count],
        guided=torch.ones(len(guided), dtype=torch.bool),
        guided_modalities=None if partial else tuple(config.cfg_modalities),
    )


def reference_config(scene: bool, flags: dict) -> SceneObjectiveConfig:
    weights = dict.fromkeys(("6drotation_normalized", "scale", "shape", "translation"), 1.0)
    return SceneObjectiveConfig(
        rules="reference",
        mode="scene" if scene else "object",
        guidance_scale=1 + flags["self_consistency_cfg_strength"],
        ratio_cfg_samples=flags["ratio_cfg_samples_in_self_consistency_target"],
        loss_weights=weights,
    )


@pytest.mark.parametrize("setting", SETTINGS)
def test_losses_equal_the_reference(setting):
    arrays, flags, scene, group = load(setting)
    config = reference_config(scene, flags)
    draws = inject(arrays, scene, group, config)
    data = group("x1")
    num_rows = 1 if scene else flags["B"]
    cond = torch.from_numpy(arrays["cond"]).reshape(num_rows, -1, 3)
    conditions = {"cond": cond, "unconditional": torch.zeros(num_rows, dtype=torch.bool)}
    null = conditions | {"unconditional": torch.ones(num_rows, dtype=torch.bool)}
    mask = torch.ones(data["shape"].shape[:2], dtype=torch.bool)
    calls = []
    network = toy_network(flags["cross"], calls)
    loss, metrics, _ = scene_loss(network, network, data, mask, conditions, null, draws, config)

    close = {"rtol": 0, "atol": 1e-9}
    torch.testing.assert_close(loss, torch.tensor(float(arrays["loss"]), dtype=torch.float64), **close)
    for name, kind in (("loss_fm", "flow_matching_loss"), ("loss_sc", "self_consistency_loss")):
        total, count = metrics[kind].tolist()
        assert abs(total / max(count, 1) - float(arrays[name])) < 1e-9
    # the student's call, row for row
    noisy = interpolate(draws.noise, take(data, draws.rows), draws.t)
    target = velocity_target(draws.noise, take(data, draws.rows))
    prediction = network(noisy, draws.t, draws.step_size, take(conditions, draws.rows))
    for name in data:
        torch.testing.assert_close(noisy[name], take(group("x_t"), draws.rows)[name], **close)
        torch.testing.assert_close(prediction[name], take(group("student_v"), draws.rows)[name], **close)
        flow = slice(draws.num_bootstrap, None)
        torch.testing.assert_close(target[name][flow], take(group("fm_target"), draws.rows)[name][flow], **close)
    if draws.num_bootstrap:
        boot = slice(0, draws.num_bootstrap)
        given = (take(x, draws.rows[boot]) for x in (conditions, null))
        wanted = bootstrap_targets(network, take(noisy, boot), draws, *given, config)
        for name, value in group("sc_target").items():
            torch.testing.assert_close(wanted[name], value, **close)
        # times and step sizes of the half steps; we ask for both kinds in one call
        torch.testing.assert_close(calls[0][0].flatten()[: len(arrays["call1/t"])], torch.tensor(arrays["call1/t"]))
        torch.testing.assert_close(calls[0][1].flatten()[: len(arrays["call1/d"])], torch.tensor(arrays["call1/d"]))
        assert calls[0][2].sum() == (1 if scene else len(arrays["call2/t"]))


@pytest.mark.parametrize("setting", ["euler_s4_sc_rt1_fwd", "euler_s4_fm_rt3_fwd"])
def test_samples_equal_the_reference(setting):
    arrays = np.load(FIXTURES / "scene_sampling.npz")
    x = {k.removeprefix("x0/"): torch.from_numpy(arrays[k])[None] for k in arrays if k.startswith("x0/")}
    conditions = {"cond": torch.from_numpy(arrays["cond"])[None], "unconditional": torch.tensor([False])}
    times, d = arrays[f"{setting}/t_seq"], float(arrays[f"{setting}/d"])
    network = toy_network(cross=True)

    def float32(value: float) -> torch.Tensor:  # the reference hands time over in single precision
        return torch.tensor([1000 * value], dtype=torch.float32) / 1000

    for start, end in itertools.pairwise(times):
        velocity = network(x, float32(start), float32(d), conditions)
        x = euler_step(x, velocity, torch.tensor([end - start]))
    for name, value in x.items():
        wanted = torch.from_numpy(arrays[f"{setting}/y/{name}"])[None]
        torch.testing.assert_close(value, wanted, rtol=0, atol=1e-9)
