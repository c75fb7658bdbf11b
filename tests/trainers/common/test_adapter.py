"""A part that trains on a frozen base a thousand times its size: what is kept, averaged, saved, refused, exported."""

from __future__ import annotations

import copy
import json
from pathlib import Path

import pytest
import runs
import torch
from diffusers import ConfigMixin, ModelMixin
from diffusers.configuration_utils import register_to_config
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from backlot.samples import SampleKey
from trainers.common.checkpoints import size_of

WIDTH, LAYERS, RANK = 512, 32, 8


class Adapter(ModelMixin, ConfigMixin):
    """Adds a low-rank change to its input, nothing at first."""

    @register_to_config
    def __init__(self, width: int = WIDTH, rank: int = RANK):
        super().__init__()
        self.down = nn.Linear(width, rank)
        self.up = nn.Linear(rank, width)
        self.register_buffer("strength", torch.ones(()))
        nn.init.zeros_(self.up.weight)

    def forward(self, hidden_states: Tensor) -> Tensor:
        return hidden_states + self.strength * self.up(self.down(hidden_states))


class Adapted(ModelMixin, ConfigMixin):
    """An adapter before a base, so that its gradient comes through all of the base."""

    @register_to_config
    def __init__(self, layers: int = LAYERS):
        super().__init__()
        self.adapter = Adapter()
        self.base = nn.Sequential(*(layer for _ in range(layers) for layer in (nn.Linear(WIDTH, WIDTH), nn.Tanh())))
        self.base.register_buffer("statistics", torch.randn(WIDTH))

    def forward(self, hidden_states: Tensor) -> Tensor:
        return self.base(self.adapter(hidden_states)) + self.base.statistics


class Vectors(torch.utils.data.Dataset):
    """Ten inputs with an answer, varied at random."""

    def __len__(self) -> int:
        return 10

    def __getitem__(self, key: SampleKey) -> dict[str, Tensor]:
        values = torch.randn(2, WIDTH, generator=torch.Generator().manual_seed(int(key)))
        return {"input": values[0] + 0.1 * torch.randn(WIDTH, generator=key.generator()), "answer": values[1]}


def create(seed: int = 0, layers: int = LAYERS) -> Adapted:
    torch.manual_seed(seed)
    return Adapted(layers)


def open_run(folder: Path, model: Adapted, **training) -> object:
    settings = {"learning_rate": 1e-2, "logging_steps": 1, "ema_decay": 0.5, **training}
    return runs.open_run(folder, Vectors(), model, trained=model.adapter, **settings)


def loss(run, batch: dict[str, Tensor]) -> tuple[Tensor, dict]:
    noisy = batch["input"] + 0.1 * torch.randn_like(batch["input"])
    return (run.model(noisy) - batch["answer"]).square().mean(), {}


def frozen_state(network: Adapted) -> dict[str, Tensor]:
    return {name: tensor for name, tensor in network.state_dict().items() if name.startswith("base.")}


class LiveBytes(TorchDispatchMode):
    """The most bytes alive at once of what operators have made."""

    def __init__(self):
        super().__init__()
        self.alive: dict[int, tuple[StorageWeakRef, int]] = {}
        self.peak = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        given = {t.untyped_storage()._cdata for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)}
        result = func(*args, **(kwargs or {}))
        self.alive = {key: value for key, value in self.alive.items() if not value[0].expired()}
        for tensor in tree_leaves(result):
            if isinstance(tensor, Tensor) and tensor.untyped_storage()._cdata not in given:
                storage = tensor.untyped_storage()
                self.alive[storage._cdata] = (StorageWeakRef(storage), storage.nbytes())
        self.peak = max(self.peak, sum(size for _, size in self.alive.values()))
        return result


def test_no_second_base_is_ever_in_memory(tmp_path):
    """Start, updates, an averaged answer and a checkpoint together need less than a quarter of the base."""
    model = create()
    base_bytes = sum(tensor.nbytes for tensor in frozen_state(model).values())
    with LiveBytes() as live:
        run = open_run(tmp_path / "run", model, max_train_steps=2)
        runs.train_on(run, loss)
        run.ema(torch.ones(1, WIDTH))
        runs.save_and_close(run)
    assert live.peak < base_bytes / 4
    mine, theirs = (dict(network.named_parameters()) for network in (run.network, run.ema.model))
    for name, parameter in mine.items():
        assert (parameter.data_ptr() == theirs[name].data_ptr()) == name.startswith("base."), name
    assert run.ema.model.base.statistics.data_ptr() == run.network.base.statistics.data_ptr()


def test_the_counter_sees_a_second_base():
    model = create()
    base_bytes = sum(tensor.nbytes for tensor in frozen_state(model).values())
    with LiveBytes() as live:
        copy.deepcopy(model)
    assert live.peak >= base_bytes


def test_a_checkpoint_is_no_larger_than_what_trains(tmp_path):
    model = create()
    run = open_run(tmp_path / "run", model, max_train_steps=1)
    runs.train_on(run, loss)
    weights = sum(tensor.nbytes for tensor in model.adapter.state_dict().values())
    base_bytes = sum(tensor.nbytes for tensor in frozen_state(model).values())
    assert base_bytes > 900 * weights
    runs.save_and_close(run)
    assert size_of(tmp_path / "run/checkpoint-1") < 1.1 * 4 * weights  # weights, average and two moments


def test_the_base_never_moves_and_every_part_of_the_adapter_does(tmp_path):
    model = create()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    run = open_run(tmp_path / "run", model, max_train_steps=3)
    runs.train_on(run, loss)
    averaged = run.ema.model.state_dict()
    for name, tensor in model.state_dict().items():
        if name.startswith("adapter.") and name != "adapter.strength":
            assert not torch.equal(tensor, before[name]), name
            assert not torch.equal(averaged[name], tensor), name
        else:
            assert torch.equal(tensor, before[name]), name
            assert torch.equal(averaged[name], tensor), name
    assert [name for name, parameter in model.base.named_parameters() if parameter.grad is not None] == []
    assert list(run._names().values()) == ["down.weight", "down.bias", "up.weight", "up.bias"]
    runs.save_and_close(run)


def resume_in_the_middle(folder: Path, prepare=lambda model: None) -> None:
    """Six updates, and three and three on a base that is made anew: equal bit for bit."""
    for name, plan in (("straight", [6]), ("broken", [3, 6])):
        for number, last in enumerate(plan):
            model = create()
            prepare(model)
            settings = {"max_train_steps": last, "gradient_accumulation_steps": 2, "logging_steps": 2}
            run = open_run(folder / name, model, **settings, resume_from_checkpoint="latest" if number else None)
            runs.train_on(run, loss)
            runs.save_and_close(run)
    straight, broken = (folder / name for name in ("straight", "broken"))
    assert runs.differing(*(runs.tensors_of(each / "checkpoint-6") for each in (straight, broken))) == []
    assert runs.rows_of(straight) == runs.rows_of(broken)


def test_three_updates_and_three_after_a_resume_are_six(tmp_path):
    resume_in_the_middle(tmp_path)


@pytest.mark.parametrize("change", ["a weight", "a buffer"])
def test_another_base_is_refused(tmp_path, capsys, change):
    run = open_run(tmp_path / "run", create(), max_train_steps=1)
    runs.train_on(run, loss)
    runs.save_and_close(run)
    other = create()
    with torch.no_grad():
        (other.base[6].weight if change == "a weight" else other.base.statistics).flatten()[3] += 1e-6
    with pytest.raises(SystemExit) as exit_:
        open_run(tmp_path / "run", other, max_train_steps=2, resume_from_checkpoint="latest")
    assert exit_.value.code == 2
    assert "the checksum of the frozen base" in capsys.readouterr().err
    settings = {"max_train_steps": 2, "resume_from_checkpoint": "latest", "resume_with_changes": ["frozen"]}
    allowed = open_run(tmp_path / "run", other, **settings)
    assert allowed.step == 1
    runs.save_and_close(allowed)


def test_the_averaged_adapter_can_be_exported_alone(tmp_path):
    run = open_run(tmp_path / "run", create(), max_train_steps=2)
    runs.train_on(run, loss)
    run.finish(run.ema.part)
    weights = load_file(tmp_path / "run/diffusion_pytorch_model.safetensors")
    assert weights.keys() == Adapter().state_dict().keys()
    exported = Adapter.from_pretrained(tmp_path / "run")
    stored = runs.tensors_of(tmp_path / "run/checkpoint-2")
    for name, tensor in exported.state_dict().items():
        assert torch.equal(tensor, stored[f"ema/{name}"]), name
    assert json.loads((tmp_path / "run/config.json").read_text())["_class_name"] == "Adapter"


def test_what_trains_may_be_pieces_of_the_network(tmp_path):
    """Low-rank changes that lie here and there in a base are named by a module of their own that holds them."""
    model = create(layers=2)
    model.base.append(Adapter())
    pieces = nn.ModuleDict({"first": model.adapter, "last": model.base[-1]})
    run = runs.open_run(tmp_path / "run", Vectors(), model, trained=pieces, learning_rate=1e-2, ema_decay=0.5)
    runs.train_on(run, loss)
    assert run.ema.part["last"] is run.ema.model.base[-1]
    assert run.ema.model.base[0].weight is run.network.base[0].weight
    assert not torch.equal(run.ema.part["last"].up.weight, pieces["last"].up.weight)
    runs.save_and_close(run)
    stored = runs.tensors_of(tmp_path / "run/checkpoint-4")
    assert torch.equal(stored["model/last.up.weight"], pieces["last"].up.weight)
    assert not [name for name in stored if "base" in name]


# ---- a quantised base ----


def to_nf4(model: Adapted) -> None:
    nn4 = pytest.importorskip("bitsandbytes").nn
    for number, layer in enumerate(model.base):
        if isinstance(layer, nn.Linear):
            quantised = nn4.Linear4bit(WIDTH, WIDTH, compute_dtype=torch.float32, quant_type="nf4")
            quantised.load_state_dict(layer.state_dict())
            model.base[number] = quantised.to("cpu")  # this is where it is quantised


def to_int8(model: Adapted) -> None:
    quantization = pytest.importorskip("torchao.quantization")
    quantization.quantize_(model.base, quantization.Int8WeightOnlyConfig())


def to_int4(model: Adapted) -> None:
    quantization = pytest.importorskip("torchao.quantization")
    granularity = quantization.PerGroup(32)  # a byte per value: what packs two into one needs a GPU
    quantization.quantize_(model.base, quantization.IntxWeightOnlyConfig(torch.int4, granularity=granularity))


@pytest.mark.parametrize("quantise", [to_nf4, to_int8, to_int4])
class TestQuantised:
    def test_three_updates_and_three_after_a_resume_are_six(self, tmp_path, quantise):
        resume_in_the_middle(tmp_path, quantise)

    def test_no_second_base_and_another_one_is_refused(self, tmp_path, capsys, quantise):
        model = create()
        quantise(model)
        with LiveBytes() as live:
            run = open_run(tmp_path / "run", model, max_train_steps=2)
        runs.train_on(run, loss)  # torchao keeps weights as floats for the backward pass
        with live:
            runs.save_and_close(run)
        assert live.peak < LAYERS * WIDTH * WIDTH / 2  # what the weights have in four bits
        assert run.ema.model.base[0].weight is run.network.base[0].weight
        assert [name for name in runs.tensors_of(tmp_path / "run/checkpoint-2") if "base" in name] == []
        other = create()
        with torch.no_grad():
            other.base[6].weight[3, 3] += 1
        quantise(other)
        with pytest.raises(SystemExit) as exit_:
            open_run(tmp_path / "run", other, max_train_steps=3, resume_from_checkpoint="latest")
        assert exit_.value.code == 2
        assert "the checksum of the frozen base" in capsys.readouterr().err
