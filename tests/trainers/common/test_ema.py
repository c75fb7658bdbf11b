"""The average: its closed form, what it copies and what it shares, and averages that take the live weights' place."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from trainers.common.ema import EMA, SwappedEMA


class Adapted(nn.Module):
    """A frozen base with a buffer, and the layer that trains, which has a buffer of its own."""

    def __init__(self):
        super().__init__()
        self.base = nn.Linear(3, 3).requires_grad_(False)
        self.register_buffer("offset", torch.ones(3))
        self.adapter = nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3))

    def forward(self, x):
        return self.base(x) + self.offset + self.adapter(x)


class Layers(nn.Module):
    """A list of layers that lie elsewhere in the network."""

    def __init__(self, *layers: nn.Module):
        super().__init__()
        self.layers = nn.ModuleList(layers)


@pytest.mark.parametrize("ramp", [False, True])
def test_the_closed_form_after_many_updates(ramp):
    network = nn.Linear(2, 2)
    ema = EMA(network, 0.9, ramp)
    start, live = network.weight.detach().clone(), torch.ones(2, 2)
    with torch.no_grad():
        network.weight.copy_(live)
    kept = 1.0
    for step in range(20):
        ema.update(network, step)
        kept *= min(0.9, (1 + step) / (10 + step)) if ramp else 0.9
    torch.testing.assert_close(ema.model.weight, kept * start + (1 - kept) * live)
    assert not any(parameter.requires_grad for parameter in ema.model.parameters())
    assert not ema.model.training


def test_decay_zero_follows_the_weights():
    network = nn.Linear(2, 2)
    ema = EMA(network, 0.0)
    nn.init.constant_(network.weight, 5.0)
    ema.update(network, 0)
    assert torch.equal(ema.model.weight, network.weight)


@pytest.mark.parametrize("listed", [False, True])
def test_what_is_frozen_is_shared_and_what_trains_is_copied(listed):
    network = Adapted()
    trained = Layers(network.adapter) if listed else network.adapter
    ema = EMA(network, 0.5, trained=trained)
    assert ema.model.base.weight.data_ptr() == network.base.weight.data_ptr()
    assert ema.model.offset.data_ptr() == network.offset.data_ptr()
    copied = ema.part.layers[0] if listed else ema.part
    assert copied is ema.model.adapter
    for (name, mine), theirs in zip(copied.state_dict().items(), network.adapter.state_dict().values(), strict=True):
        assert torch.equal(mine, theirs), name
        assert mine.data_ptr() != theirs.data_ptr(), name
    prefix = "layers.0." if listed else ""
    assert ema.tensors().keys() == {prefix + name for name in network.adapter.state_dict()}
    network(torch.randn(4, 3))  # changes the buffers
    nn.init.constant_(network.adapter[0].weight, 2.0)
    ema.update(trained, 0)
    assert torch.equal(ema.model.adapter[1].running_mean, network.adapter[1].running_mean)
    assert not torch.equal(ema.model.adapter[0].weight, network.adapter[0].weight)


def test_it_is_called_without_gradient_and_never_in_training_mode():
    network = nn.Sequential(nn.Linear(3, 3), nn.Dropout(0.5))
    ema = EMA(network, 0.5)
    x = torch.ones(2, 3, requires_grad=True)
    assert torch.equal(ema(x), ema(x))
    assert not ema(x).requires_grad


def swapped() -> tuple[Adapted, SwappedEMA, EMA]:
    """The same average twice, after an update: in the live weights' place, and in a copy."""
    torch.manual_seed(0)
    network = Adapted()
    both = [
        SwappedEMA(network, 0.5, False, torch.no_grad, network.adapter),
        EMA(network, 0.5, trained=network.adapter),
    ]
    with torch.no_grad():
        for parameter in network.adapter.parameters():
            parameter.add_(torch.randn_like(parameter))
    network(torch.randn(4, 3))
    for ema in both:
        ema.update(network.adapter, 0)
    return network, *both


def test_averages_take_the_place_of_the_live_weights_while_they_are_called():
    network, ema, plain = swapped()
    assert {n: v.tolist() for n, v in ema.tensors().items()} == {n: v.tolist() for n, v in plain.tensors().items()}
    x, before = torch.randn(4, 3), [p.detach().clone() for p in network.parameters()]
    assert torch.equal(ema(x), plain(x))
    assert all(torch.equal(a, b) for a, b in zip(before, network.parameters(), strict=True))
    assert network.training
    assert ema.model is network


def test_applied_may_be_entered_again_and_is_left_by_errors_too():
    network, ema, plain = swapped()
    live = network.adapter[0].weight.detach().clone()
    with ema.applied():
        with ema.applied():
            assert torch.equal(network.adapter[0].weight, plain.part[0].weight)
        assert torch.equal(network.adapter[0].weight, plain.part[0].weight)
        assert torch.equal(ema(torch.ones(2, 3)), plain(torch.ones(2, 3)))
        assert not network.training
    assert torch.equal(network.adapter[0].weight, live)
    with pytest.raises(KeyError), ema.applied():
        raise KeyError
    assert torch.equal(network.adapter[0].weight, live)
    assert network.training


def test_a_gradient_is_that_of_the_live_weights_though_the_average_was_called_in_between():
    network, ema, _ = swapped()
    network.eval()
    x = torch.randn(4, 3)
    gradients = []
    for calls in (False, True):
        hidden = network.adapter[0](network(x))
        if calls:
            ema(x)
        hidden.square().sum().backward()
        gradients.append(network.adapter[0].weight.grad.clone())
        network.zero_grad()
    assert torch.equal(*gradients)
