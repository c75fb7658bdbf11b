"""Parameter groups, learning-rate schedules and the moving average, against their formulas."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from pipelines.shortcut import ShortcutDiT
from trainers.common.config import TrainingConfig
from trainers.common.ema import EMA
from trainers.common.optimization import create_lr_scheduler, create_optimizer, set_schedule_step


def config(**values) -> TrainingConfig:
    return TrainingConfig(**{"output_dir": "o", "max_train_steps": 20, "train_batch_size": 1, **values})


def schedule(steps: int, training: TrainingConfig, start: int = 0) -> list[float]:
    """The rate of each update from `start` on, as a run uses it."""
    optimizer = torch.optim.AdamW([nn.Parameter(torch.zeros(1))], lr=training.learning_rate)
    scheduler = create_lr_scheduler(optimizer, training)
    set_schedule_step(scheduler, start)
    rates = []
    for _ in range(steps):
        rates.append(scheduler.get_last_lr()[0])
        assert optimizer.param_groups[0]["lr"] == rates[-1]
        optimizer.step()
        scheduler.step()
    return rates


# ---- parameters ----


def test_matrices_decay_and_biases_norms_and_embeddings_do_not():
    model = ShortcutDiT(sample_size=8, in_channels=1, hidden_size=32, num_layers=1, num_attention_heads=4)
    optimizer = create_optimizer(model, config(adam_weight_decay=0.3))
    decayed, kept = optimizer.param_groups
    assert (decayed["weight_decay"], kept["weight_decay"]) == (0.3, 0.0)
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    decayed_names = {names[id(p)] for p in decayed["params"]}
    kept_names = {names[id(p)] for p in kept["params"]}
    assert decayed_names | kept_names == set(names.values())
    assert not decayed_names & kept_names
    assert all(name.endswith(".weight") for name in decayed_names)
    assert "class_embedder.weight" in kept_names
    assert all(name.endswith(".bias") for name in kept_names - {"class_embedder.weight"})


def test_decay_all_parameters_leaves_one_group():
    model = nn.Sequential(nn.Embedding(3, 4), nn.Linear(4, 4))
    groups = create_optimizer(model, config(decay_all_parameters=True)).param_groups
    assert [len(group["params"]) for group in groups] == [3]


def test_frozen_parameters_are_left_out():
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    model[0].requires_grad_(False)
    groups = create_optimizer(model, config()).param_groups
    assert {id(p) for group in groups for p in group["params"]} == {id(p) for p in model[1].parameters()}


def test_a_frozen_model_is_refused():
    with pytest.raises(ValueError, match="no parameter that requires a gradient"):
        create_optimizer(nn.Linear(2, 2).requires_grad_(False), config())


def test_adam_follows_the_configuration():
    training = config(learning_rate=3e-4, adam_beta1=0.8, adam_beta2=0.95, adam_epsilon=1e-6)
    group = create_optimizer(nn.Linear(2, 2), training).param_groups[0]
    assert (group["lr"], group["betas"], group["eps"]) == (3e-4, (0.8, 0.95), 1e-6)


def test_8bit_adam_without_bitsandbytes_is_refused_in_one_line(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "bitsandbytes", None)
    with pytest.raises(SystemExit, match=r"use_8bit_adam needs bitsandbytes: pip install 'backlot\[gpu\]'"):
        create_optimizer(nn.Linear(2, 2), config(use_8bit_adam=True))


# ---- schedule ----

FORMULAS = {
    "constant": lambda n: 1.0,
    "constant_with_warmup": lambda n: min(1.0, n / 5),
    "linear": lambda n: n / 5 if n < 5 else (20 - n) / 15,
    "cosine": lambda n: n / 5 if n < 5 else 0.5 * (1 + math.cos(math.pi * (n - 5) / 15)),
    "warmup_stable_decay": lambda n: min(1.0, n / 5, (20 - n) / 4),
    "inverse_sqrt": lambda n: (1 - 0.999 ** (n + 1)) / math.sqrt(1 + n / 200_000),
}


@pytest.mark.parametrize("name", FORMULAS)
def test_schedules_are_counted_in_updates(name):
    training = config(learning_rate=2e-3, lr_scheduler=name, lr_warmup_steps=5, lr_decay_steps=4)
    assert schedule(20, training) == pytest.approx([2e-3 * FORMULAS[name](n) for n in range(20)], abs=1e-12)


def test_inverse_sqrt_far_from_its_start():
    training = config(learning_rate=1.0, lr_scheduler="inverse_sqrt", max_train_steps=10**6)
    assert schedule(1, training, start=200_000) == pytest.approx([1 / math.sqrt(2)], rel=1e-9)
    assert schedule(1, training, start=600_000) == pytest.approx([0.5], rel=1e-9)


@pytest.mark.parametrize("name", FORMULAS)
@pytest.mark.parametrize("start", [1, 4, 5, 13])
def test_a_schedule_continues_where_it_stopped(name, start):
    training = config(lr_scheduler=name, lr_warmup_steps=5, lr_decay_steps=4)
    assert schedule(20 - start, training, start) == schedule(20, training)[start:]


def test_an_extended_schedule_is_the_one_of_the_longer_run():
    longer = config(lr_scheduler="cosine", max_train_steps=40)
    assert schedule(20, longer, start=20) == schedule(40, longer)[20:]
    assert schedule(1, longer, start=20)[0] > schedule(1, config(lr_scheduler="cosine"), start=19)[0]


# ---- EMA ----


def test_ema_has_its_closed_form():
    model = nn.Linear(3, 2)
    start, decay = model.weight.detach().clone(), 0.9
    ema = EMA(model, decay)
    history = []
    for step in range(12):
        with torch.no_grad():
            model.weight.copy_(torch.randn(2, 3))
        history.append(model.weight.detach().clone())
        ema.update(model, step)
    n = len(history)
    expected = decay**n * start + sum((1 - decay) * decay ** (n - 1 - i) * w for i, w in enumerate(history))
    torch.testing.assert_close(ema.model.weight, expected)


def test_the_ramp_starts_low_and_ends_at_the_decay():
    model = nn.Linear(1, 1, bias=False)
    ema = EMA(model, decay=0.5, ramp=True)
    for step in range(20):
        with torch.no_grad():
            ema.model.weight.fill_(0)
            model.weight.fill_(1)
        ema.update(model, step)
        assert ema.model.weight.item() == pytest.approx(1 - min(0.5, (1 + step) / (10 + step)), abs=1e-6)


def test_zero_decay_keeps_the_live_weights():
    model = nn.Linear(3, 3)
    ema = EMA(model, decay=0.0)
    with torch.no_grad():
        model.weight.normal_()
    ema.update(model, 0)
    torch.testing.assert_close(ema.model.weight, model.weight, rtol=0, atol=1e-7)


def test_buffers_are_copied_and_training_mode_and_gradients_are_off():
    model = nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3), nn.Dropout(0.5))
    ema = EMA(model, decay=0.9)
    model(torch.randn(8, 3) + 5)
    ema.update(model, 0)
    assert torch.equal(ema.model[1].running_mean, model[1].running_mean)
    assert model.training
    assert not any(module.training for module in ema.model.modules())
    output = ema(torch.randn(2, 3))
    assert not output.requires_grad
    assert not any(p.requires_grad for p in ema.model.parameters())


def test_calling_the_ema_uses_the_runs_precision():
    ema = EMA(nn.Linear(3, 3), 0.9, autocast=lambda: torch.autocast("cpu", torch.bfloat16))
    assert ema(torch.randn(2, 3)).dtype == torch.bfloat16
