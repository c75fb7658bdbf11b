"""The `official` preset against arrays computed with the paper's JAX code; every random number is injected."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from objectives.rectified_flow import interpolate, velocity_target
from objectives.settings import ObjectiveConfig
from objectives.shortcut import Draws, bootstrap_targets, draw, dyadic_level_counts, shortcut_loss

ARRAYS = np.load(Path(__file__).parents[1] / "fixtures" / "shortcut_targets.npz")
CASES = {case["name"]: case for case in json.loads(str(ARRAYS["index_json"]))["cases"]}
CLASS_OFFSETS = torch.tensor([(7 * c % 13) / 13 - 0.5 for c in range(11)])


def stand_in_network(gain: float):
    """f_g(x, t, k, y) of the reference; our step size d is its level k = -log2 d."""

    def network(sample, t, step_size, conditions):
        level, t = -torch.log2(step_size).reshape(-1, 1, 1, 1), t.reshape(-1, 1, 1, 1)
        offset = CLASS_OFFSETS[conditions["class_labels"]].reshape(-1, 1, 1, 1)
        waves = 1.5 * torch.tanh(0.8 * sample) * (1 + 0.05 * level) + torch.sin(1.3 * t + 0.4)
        return gain * (waves + offset - 0.3 * sample * t)

    return network


def load(name: str):
    case = CASES[name]
    arrays = {key: torch.from_numpy(ARRAYS[f"{name}/{key}"]) for key in (
        "images", "labels", "noise_full", "noise_bst", "drop_mask", "x_t", "v_t", "t", "dt_base", "labels_out"
    )}  # fmt: skip
    flags = case["model"]
    config = ObjectiveConfig(
        preset="official",
        bootstrap_fraction=1 / flags["bootstrap_every"],
        denoise_timesteps=flags["denoise_timesteps"],
        bootstrap_guidance_scale=flags["cfg_scale"] if flags["bootstrap_cfg"] else None,
    )
    return case, arrays, config


@pytest.mark.parametrize("name", ["sc_every4", "sc_cfg"])
def test_shortcut_targets_equal_the_reference(name):
    case, arrays, config = load(name)
    batch, count = case["B"], case["B"] // case["model"]["bootstrap_every"]
    own = draw(arrays["images"], config)
    assert own.num_bootstrap == count
    # levels are no draw in this preset, so ours must already be theirs
    torch.testing.assert_close(-torch.log2(own.step_size), arrays["dt_base"])
    drop = torch.cat([torch.zeros(count, dtype=torch.bool), arrays["drop_mask"][: batch - count]])
    draws = Draws(
        noise=torch.cat([arrays["noise_bst"], arrays["noise_full"][: batch - count]]),
        t=arrays["t"],
        step_size=own.step_size,
        drop=drop,
        rows=own.rows,
        num_bootstrap=count,
        guidable=own.guidable,
    )
    seen = {}

    def network(sample, t, step_size, conditions):
        seen.update(sample=sample, labels=conditions["class_labels"])
        return torch.zeros_like(sample).requires_grad_()

    labels = arrays["labels"].long()
    null = {"class_labels": torch.full_like(labels, 10)}
    teacher = stand_in_network(case["ema_gain"])
    loss, metrics = shortcut_loss(
        network, teacher, arrays["images"], {"class_labels": labels}, null, draws, config
    )  # fmt: skip
    torch.testing.assert_close(seen["sample"], arrays["x_t"], atol=1e-5, rtol=0)
    assert torch.equal(seen["labels"], arrays["labels_out"].long())
    # the network above predicts 0, so the loss is the mean square of the target
    torch.testing.assert_close(loss, arrays["v_t"].square().mean(), atol=1e-5, rtol=0)
    boot = slice(0, count)
    targets = bootstrap_targets(
        teacher,
        arrays["x_t"][boot],
        draws,
        {"class_labels": labels[boot]},
        {"class_labels": null["class_labels"][boot]},
        config,
    )
    torch.testing.assert_close(targets, arrays["v_t"][boot], atol=1e-5, rtol=0)
    flow = velocity_target(draws.noise[count:], arrays["images"][own.rows[count:]], config.path_eps)
    torch.testing.assert_close(flow, arrays["v_t"][count:], atol=1e-5, rtol=0)
    torch.testing.assert_close(metrics["loss_bootstrap"], arrays["v_t"][boot].square().mean(), atol=1e-5, rtol=0)


def test_naive_targets_equal_the_reference():
    _, arrays, config = load("naive")
    noisy = interpolate(arrays["noise_full"], arrays["images"], arrays["t"], config.path_eps)
    torch.testing.assert_close(noisy, arrays["x_t"], atol=1e-5, rtol=0)
    target = velocity_target(arrays["noise_full"], arrays["images"], config.path_eps)
    torch.testing.assert_close(target, arrays["v_t"], atol=1e-5, rtol=0)
    labels = torch.where(arrays["drop_mask"], 10, arrays["labels"])
    assert torch.equal(labels, arrays["labels_out"])


@pytest.mark.parametrize(
    ("batch", "every", "bias", "counts"),
    [
        (256, 8, False, [8, 4, 4, 4, 4, 4, 4]),
        (256, 4, False, [10, 9, 9, 9, 9, 9, 9]),
        (64, 8, False, [2, 1, 1, 1, 1, 1, 1]),
        (256, 4, True, [28, 16, 4, 4, 4, 4, 4]),
        (32, 8, False, [4, 0, 0, 0, 0, 0, 0]),
    ],
)
def test_level_counts_of_the_paper_code(batch, every, bias, counts):
    config = ObjectiveConfig(preset="official", bootstrap_fraction=1 / every, bootstrap_dt_bias=bias)
    assert dyadic_level_counts(batch // every, config) == counts
    draws = draw(torch.zeros(batch, 1, 2, 2), config)
    levels = -torch.log2(draws.step_size[: draws.num_bootstrap])
    assert levels.long().bincount(minlength=7).tolist() == counts
    assert len(draws.guidable) == counts[6]
