"""Tensors in files: rows from several of them, what is missing or of another shape, checksums; and skeletons."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.testing._internal.two_tensor import TwoTensor

from trainers.common.sharding import fill_skeleton, rows, skeleton, state_tensors
from trainers.common.state import (
    Part,
    Rows,
    all_finite,
    checksum,
    frozen_tensors,
    load_optimizer,
    load_tensors,
    optimizer_state,
    snapshot,
    write,
)

TABLE = torch.arange(21.0).reshape(7, 3)
SHARES = [(0, 4), (4, 7), (7, 7)]  # the last process has none


@pytest.fixture
def shared(tmp_path):
    """A part in three files: a table cut by rows, and a scalar of the first process."""
    for rank, (first, last) in enumerate(SHARES):
        pieces = {"table": Rows(TABLE[first:last].clone(), first, 7)}
        if rank == 0:
            pieces["scale"] = Rows(torch.tensor(2.5), 0, 1)
        write(tmp_path, "model", pieces, rank, len(SHARES))
    return tmp_path


@pytest.mark.parametrize("first", range(8))
@pytest.mark.parametrize("last", range(8))
def test_any_rows_are_read_from_whatever_files_hold_them(shared, first, last):
    with Part(shared, "model") as part:
        assert torch.equal(part.read("table", first, last), TABLE[first:last])


def test_whole_tensors_and_scalars_are_read(shared):
    target = {"table": torch.zeros(7, 3), "scale": torch.tensor(0.0)}
    load_tensors(shared, "model", target)
    assert torch.equal(target["table"], TABLE)
    assert target["scale"] == 2.5
    with Part(shared, "model") as part:
        assert part.names() == {"table", "scale"}
        assert part.is_of("table", torch.Size([7, 3]))
        assert not part.is_of("table", torch.Size([3, 3]))
        assert not part.is_of("scale", torch.Size([]))


@pytest.mark.parametrize("rank", range(3))
def test_a_missing_file_is_an_error(shared, rank):
    (shared / f"model-{rank:05d}-of-00003.safetensors").unlink()
    with pytest.raises(ValueError, match="holds no model, or not all files of it"):
        Part(shared, "model")


def test_missing_rows_are_an_error(shared):
    write(shared, "model", {"table": Rows(TABLE[5:7].clone(), 5, 7)}, 1, 3)
    with Part(shared, "model") as part:
        with pytest.raises(ValueError, match="lacks rows of model 'table'"):
            part.read("table", 0, 7)
        assert torch.equal(part.read("table", 5, 7), TABLE[5:])
        with pytest.raises(ValueError, match="has no model 'other'"):
            part.read("other")


@pytest.mark.parametrize(
    ("target", "problem"),
    [
        ({"table": torch.zeros(7, 3)}, "is of another network: it has scale"),
        ({"table": torch.zeros(7, 3), "scale": torch.tensor(0.0), "more": torch.zeros(1)}, "it lacks more"),
        ({"table": torch.zeros(8, 3), "scale": torch.tensor(0.0)}, "'table' has 7 rows, not 8"),
        ({"table": torch.zeros(7, 2), "scale": torch.tensor(0.0)}, r"has the shape \(7, 3\), not \(7, 2\)"),
        ({"table": torch.zeros(7, 3), "scale": torch.zeros(1)}, r"has the shape \(\), not \(1,\)"),
        ({"table": torch.tensor(0.0), "scale": torch.tensor(0.0)}, "'table' has 7 rows, not 1"),
    ],
)
def test_another_network_is_refused(shared, target, problem):
    with pytest.raises(ValueError, match=problem):
        load_tensors(shared, "model", target)


def test_parts_are_told_apart_by_their_whole_name(tmp_path):
    for number, part in enumerate(("model", "model_teacher", "model-2")):
        write(tmp_path, part, {"x": Rows(torch.tensor([float(number)]), 0, 1)})
    for number, name in enumerate(("model", "model_teacher", "model-2")):
        with Part(tmp_path, name) as part:
            assert part.read("x") == number


def test_a_snapshot_stays_as_it_was():
    tensor = torch.zeros(3, 2)
    taken = snapshot({"x": tensor, "t": torch.ones(2, 3).T}, is_main=True)
    tensor += 1
    assert (taken["x"].tensor == 0).all()
    assert (taken["x"].first, taken["x"].total, taken["x"].nbytes) == (0, 3, 24)
    assert taken["t"].tensor.is_contiguous()
    assert snapshot({"x": tensor}, is_main=False) == {}  # what is whole is written once
    assert rows(torch.tensor(1.0))[1:] == (0, 1)


def test_moments_come_back_under_the_names_of_their_parameters(tmp_path):
    def trained() -> tuple[nn.Module, torch.optim.Optimizer, dict[int, str]]:
        torch.manual_seed(0)
        network = nn.Linear(3, 2)
        optimizer = torch.optim.AdamW(network.parameters(), fused=True)
        return network, optimizer, {id(p): name for name, p in network.named_parameters()}

    network, optimizer, names = trained()
    network(torch.ones(1, 3)).sum().backward()
    optimizer.step()
    tensors, values = optimizer_state(optimizer, names)
    assert tensors.keys() == {f"{n}/{k}" for n in ("weight", "bias") for k in ("step", "exp_avg", "exp_avg_sq")}
    write(tmp_path, "optimizer", snapshot(tensors, is_main=True))
    _, other, other_names = trained()
    load_optimizer(tmp_path, other, other_names, values | {"bias": {"note": 3}})
    again, more = optimizer_state(other, other_names)
    assert all(torch.equal(again[name], value) for name, value in tensors.items())
    assert more == {"bias": {"note": 3}}
    with pytest.raises(ValueError, match="the optimiser's state of weight, which does not train"):
        load_optimizer(tmp_path, other, {i: n for i, n in other_names.items() if n == "bias"}, {})


# ---- finite ----


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("place", [0, 17, 40])
def test_one_value_that_is_not_finite_is_seen(value, dtype, place):
    tensor = torch.full((41,), 65504.0).to(dtype)
    assert all_finite([torch.ones(3), tensor, torch.tensor(7), torch.empty(0, 3)])
    tensor[place] = value
    assert not all_finite([torch.ones(3), tensor])


def test_nothing_is_finite():
    assert all_finite([])
    assert all_finite([torch.empty(0), torch.tensor([1, 2])])


# ---- checksums ----

KINDS = [torch.float32, torch.bfloat16, torch.float16, torch.float64, torch.int64, torch.uint8, torch.bool]


@pytest.mark.parametrize("dtype", KINDS)
def test_one_changed_bit_changes_the_checksum(dtype):
    tensor = (torch.arange(11) % 2).to(dtype)
    before, raw = checksum([("x", tensor)]), tensor.view(torch.uint8)
    seen = {before}
    for place in range(len(raw)):
        for bit in range(1 if dtype == torch.bool else 8):
            raw[place] ^= 1 << bit
            seen.add(checksum([("x", tensor)]))
            raw[place] ^= 1 << bit
    assert len(seen) == 1 + len(raw) * (1 if dtype == torch.bool else 8)
    assert checksum([("x", tensor)]) == before == checksum([("x", tensor.clone())])


def test_order_names_shapes_and_types_belong_to_the_checksum():
    tensor = torch.arange(6.0).reshape(2, 3)
    variants = [tensor, tensor.flip(0), tensor.T, tensor.flatten(), tensor.to(torch.bfloat16), tensor.int()]
    assert len({checksum([("x", variant)]) for variant in variants} | {checksum([("y", tensor)])}) == 7
    assert checksum([("x", tensor.T.contiguous().T)]) == checksum([("x", tensor)])  # not how it lies in memory
    assert checksum([("x", torch.tensor(1.0))]) != checksum([("x", torch.tensor(2.0))])
    assert checksum([("x", torch.empty(0, 3))]) == checksum([("x", torch.empty(0, 3))])


def test_signs_that_change_in_pairs_do_not_cancel():
    tensor = torch.ones(4, dtype=torch.float64)
    other = tensor * torch.tensor([-1.0, 1.0, -1.0, 1.0])
    assert checksum([("x", tensor)]) != checksum([("x", other)])


def test_large_tensors_are_summed_in_chunks_that_do_not_commute():
    tensor = torch.zeros(2**20 + 8, dtype=torch.uint8)
    seen = []
    for place in (0, 2**20):
        tensor[place] = 1
        seen.append(checksum([("x", tensor)]))
        tensor[place] = 0
    assert len({*seen, checksum([("x", tensor)])}) == 3


def test_a_weight_made_of_several_tensors_has_a_checksum_of_all():
    inner, outer = torch.ones(2, 2), torch.zeros(2, 2)
    both = checksum([("x", TwoTensor(inner, outer))])
    assert both == checksum([("x", TwoTensor(inner.clone(), outer.clone()))])
    assert both != checksum([("x", TwoTensor(inner, outer + 1))])
    assert both != checksum([("x", TwoTensor(inner + 1, outer))])


def test_frozen_tensors_are_those_outside_the_part_that_trains():
    network = nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2))
    names = [name for name, _ in frozen_tensors(network, network[0])]
    assert names == ["1.weight", "1.bias", "1.running_mean", "1.running_var", "1.num_batches_tracked"]
    network[1].register_buffer("scratch", torch.zeros(1), persistent=False)
    assert [name for name, _ in frozen_tensors(network, network[0])] == names


# ---- skeletons ----


class Tied(nn.Module):
    def __init__(self):
        super().__init__()
        self.first = nn.Linear(2, 2, bias=False)
        self.second = nn.Linear(2, 2, bias=False)
        self.second.weight = self.first.weight
        self.register_buffer("mean", torch.zeros(2))

    def forward(self, x):
        return self.second(self.first(x)) + self.mean


def test_a_skeleton_holds_no_memory_and_is_filled_wherever_a_weight_is_used():
    network = Tied()
    bones = skeleton(network)
    assert type(bones) is Tied
    assert all(parameter.is_meta for parameter in bones.parameters())
    assert not any(parameter.is_meta for parameter in network.parameters())
    network.mean += 3
    for name, tensor in state_tensors(network):
        fill_skeleton(bones, name, tensor.detach().clone())
    assert bones.first.weight is bones.second.weight
    assert torch.equal(bones(torch.eye(2)), network(torch.eye(2)))
