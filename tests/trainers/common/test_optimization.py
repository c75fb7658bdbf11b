"""Parameter groups, learning-rate schedules and the moving average, against their formulas."""

from __future__ import annotations

import math
import sys

import pytest
import torch
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

from backlot.config import dump_config, load_config
from pipelines.shortcut import ShortcutDiT
from trainers.common.config import RunConfig, TrainingConfig
from trainers.common.ema import EMA
from trainers.common.optimization import (
    base_learning_rate,
    check_optimizer,
    create_lr_scheduler,
    create_optimizer,
    set_schedule_step,
)


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


@pytest.mark.parametrize("function", [check_optimizer, lambda c: create_optimizer(nn.Linear(2, 2), c)])
def test_8bit_adam_without_bitsandbytes_is_refused_in_one_line(function, monkeypatch):
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    with pytest.raises(ValueError, match=r"^training.use_8bit_adam needs bitsandbytes: pip install 'backlot\[gpu\]'$"):
        function(config(use_8bit_adam=True))
    check_optimizer(config())


@pytest.mark.parametrize(
    ("step", "message"),
    [
        ("raise RuntimeError('no library\\nfor this\\ndevice')", r"cannot run on cpu: no library for this device$"),
        ("pass", "does not change weights on cpu"),
    ],
)
def test_8bit_adam_that_does_not_work_here_is_refused_in_one_line(step, message, monkeypatch, tmp_path):
    """A stand-in for the package as an old version or a broken installation behaves."""
    package = tmp_path / "bitsandbytes/optim"
    package.mkdir(parents=True)
    (tmp_path / "bitsandbytes/__init__.py").write_text("from . import optim")
    (package / "__init__.py").write_text(
        "import torch\nclass AdamW8bit(torch.optim.SGD):\n    def step(self):\n        " + step
    )
    for name in [name for name in sys.modules if name.split(".")[0] == "bitsandbytes"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(ValueError, match=message):
        check_optimizer(config(use_8bit_adam=True), torch.device("cpu"))
    for name in ("bitsandbytes", "bitsandbytes.optim"):
        del sys.modules[name]


def test_8bit_adam_that_works_is_accepted_and_trains():
    pytest.importorskip("bitsandbytes")
    training = config(use_8bit_adam=True, learning_rate_factors={"1.": 0.5})
    check_optimizer(training, torch.device("cpu"))
    model = nn.Sequential(nn.Linear(64, 64), nn.Linear(64, 64))
    before = [p.detach().clone() for p in model.parameters()]
    optimizer = create_optimizer(model, training)
    model(torch.randn(4, 64)).square().mean().backward()
    optimizer.step()
    assert not any(torch.equal(p, q) for p, q in zip(model.parameters(), before, strict=True))


# ---- learning rates of parts ----


def rates(model: nn.Module, training: TrainingConfig) -> dict[str, float]:
    groups = create_optimizer(model, training).param_groups
    by_id = {id(p): group["lr"] for group in groups for p in group["params"]}
    assert sum(len(group["params"]) for group in groups) == len(by_id)
    return {name: by_id[id(p)] for name, p in model.named_parameters()}


def two_parts() -> nn.ModuleDict:
    return nn.ModuleDict({"encoder": nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3)), "head": nn.Linear(3, 2)})


def test_the_longest_prefix_rules():
    factors = {"encoder.": 0.1, "encoder.1.bias": 4.0, "encoder.1": 0.5}
    assert rates(two_parts(), config(learning_rate=1e-3, learning_rate_factors=factors)) == pytest.approx(
        {
            "encoder.0.weight": 1e-4, "encoder.0.bias": 1e-4,
            "encoder.1.weight": 5e-4, "encoder.1.bias": 4e-3,
            "head.weight": 1e-3, "head.bias": 1e-3,
        }
    )  # fmt: skip


def test_parts_keep_their_decay_and_the_unscaled_rate_comes_first():
    training = config(learning_rate=1e-3, adam_weight_decay=0.2, learning_rate_factors={"encoder.": 0.1})
    groups = create_optimizer(two_parts(), training).param_groups
    assert [(g["lr"], g["weight_decay"], len(g["params"])) for g in groups] == [
        (1e-3, 0.2, 1),
        (1e-3, 0.0, 1),
        (1e-4, 0.2, 2),
        (1e-4, 0.0, 2),
    ]


def test_a_factor_of_1_changes_nothing():
    plain, factored = (create_optimizer(two_parts(), config(learning_rate_factors=f)) for f in ({}, {"head.": 1.0}))
    assert [len(g["params"]) for g in plain.param_groups] == [len(g["params"]) for g in factored.param_groups]


def test_the_first_update_is_scaled():
    """AdamW's first step has the length of the learning rate in every element."""
    model = nn.ModuleDict({"slow": nn.Linear(4, 4), "fast": nn.Linear(4, 4)})
    training = config(learning_rate=1e-2, adam_weight_decay=0, learning_rate_factors={"slow.": 0.25, "fast.": 2.0})
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    optimizer = create_optimizer(model, training)
    (model["slow"](torch.ones(1, 4)) + model["fast"](torch.ones(1, 4))).sum().backward()
    optimizer.step()
    for name, p in model.named_parameters():
        length = 2.5e-3 if name.startswith("slow") else 2e-2
        torch.testing.assert_close((p - before[name]).abs(), torch.full_like(p, length), rtol=1e-3, atol=0)


@pytest.mark.parametrize("factors", [{"encoder.": 0.1}, {"encoder.": 0.1, "head.": 3.0}], ids=["some", "all"])
def test_the_schedule_multiplies_all_and_the_logged_rate_is_the_unscaled_one(factors):
    training = config(learning_rate=2e-3, lr_scheduler="cosine", lr_warmup_steps=5, learning_rate_factors=factors)
    optimizer = create_optimizer(two_parts(), training)
    scheduler = create_lr_scheduler(optimizer, training)
    plain = schedule(20, config(learning_rate=2e-3, lr_scheduler="cosine", lr_warmup_steps=5))
    for step in range(20):
        assert base_learning_rate(scheduler, training) == plain[step]
        if len(factors) == 1:
            assert scheduler.get_last_lr()[0] == plain[step]
        assert {round(group["lr"] / 2e-3, 9) for group in optimizer.param_groups} == {
            round(factor * plain[step] / 2e-3, 9) for factor in {0.1, factors.get("head.", 1)}
        }
        optimizer.step()
        scheduler.step()


@pytest.mark.parametrize("factors", [{"decoder.": 0.1}, {"head.": 0.1, "encoder": 0.5}])
def test_a_prefix_that_matches_nothing_that_trains_is_an_error(factors):
    model = two_parts()
    model["encoder"].requires_grad_(False)
    with pytest.raises(ValueError, match=f"no parameter that trains begins with '{list(factors)[-1]}'"):
        create_optimizer(model, config(learning_rate_factors=factors))


@pytest.mark.parametrize("factor", [0, -1, "inf"])
def test_a_factor_is_positive_and_finite(factor):
    with pytest.raises(ValueError, match="learning_rate_factors"):
        config(learning_rate_factors={"a": factor})


def test_factors_are_read_from_yaml_and_the_command_line(tmp_path):
    file = tmp_path / "config.yaml"
    training = "output_dir: o, max_train_steps: 1, train_batch_size: 2, learning_rate_factors: {encoder.: 1e-1}"
    file.write_text(f"training: {{{training}}}")
    read = load_config(RunConfig, ["--config", str(file)])
    assert read.training.learning_rate_factors == {"encoder.": 0.1}
    file.write_text(dump_config(read))
    override = '--training.learning_rate_factors={"encoder.": 0.3, "head.": 2}'
    again = load_config(RunConfig, ["--config", str(file), override])
    assert again.training.learning_rate_factors == {"encoder.": 0.3, "head.": 2.0}


@pytest.fixture
def one_process():
    """A group of this process alone, for sharded parameters."""
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


def test_sharded_parameters_are_chosen_by_the_shape_of_the_whole(one_process):
    def create() -> nn.Sequential:
        return nn.Sequential(nn.Embedding(6, 4), nn.Linear(4, 4), nn.LayerNorm(4))

    training = config(learning_rate_factors={"1.": 0.5})
    whole, sharded = create(), fully_shard(create(), mesh=init_device_mesh("cpu", (1,)))
    optimizer = create_optimizer(sharded, training)
    assert all(isinstance(p, DTensor) for group in optimizer.param_groups for p in group["params"])
    described = [
        [(g["lr"], g["weight_decay"], [tuple(p.shape) for p in g["params"]]) for g in o.param_groups]
        for o in (create_optimizer(whole, training), optimizer)
    ]
    assert described[0] == described[1]
    assert described[0][0][1] == 0  # all of factor 1 are a table and a norm
    sharded(torch.arange(6)).sum().backward()
    optimizer.step()


# ---- schedule ----

FORMULAS = {
    "constant": lambda n: 1.0,
    "constant_with_warmup": lambda n: min(1.0, n / 5),
    "linear": lambda n: n / 5 if n < 5 else (20 - n) / 15,
    "cosine": lambda n: n / 5 if n < 5 else 0.5 * (1 + math.cos(math.pi * (n - 5) / 15)),
    "warmup_stable_decay": lambda n: min(1.0, n / 5, (20 - n) / 4),
    "inverse_sqrt": lambda n: (1 - 0.999 ** (n + 1)) / math.sqrt(1 + n / 200_000),
}


def lengths(name: str) -> dict[str, int]:
    """Of warm-up and decay, where the schedule has them."""
    decay = {"lr_decay_steps": 4} if name == "warmup_stable_decay" else {}
    return decay | ({} if name in ("constant", "inverse_sqrt") else {"lr_warmup_steps": 5})


@pytest.mark.parametrize(("name", "key"), [("constant", "warmup"), ("inverse_sqrt", "warmup"), ("cosine", "decay")])
def test_a_length_that_a_schedule_does_not_have_is_refused(name, key):
    with pytest.raises(ValueError, match=f"`lr_{key}_steps` has no effect on lr_scheduler {name}"):
        config(lr_scheduler=name, **{f"lr_{key}_steps": 3})


@pytest.mark.parametrize("name", FORMULAS)
def test_schedules_are_counted_in_updates(name):
    training = config(learning_rate=2e-3, lr_scheduler=name, **lengths(name))
    assert schedule(20, training) == pytest.approx([2e-3 * FORMULAS[name](n) for n in range(20)], abs=1e-12)


def test_inverse_sqrt_far_from_its_start():
    training = config(learning_rate=1.0, lr_scheduler="inverse_sqrt", max_train_steps=10**6)
    assert schedule(1, training, start=200_000) == pytest.approx([1 / math.sqrt(2)], rel=1e-9)
    assert schedule(1, training, start=600_000) == pytest.approx([0.5], rel=1e-9)


@pytest.mark.parametrize("name", FORMULAS)
@pytest.mark.parametrize("start", [1, 4, 5, 13])
def test_a_schedule_continues_where_it_stopped(name, start):
    training = config(lr_scheduler=name, **lengths(name))
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
