"""Weights handed over between runs arrive whole, or not at all with the reason in one line."""

from __future__ import annotations

import json
import logging
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file, save_model
from torch import nn

from pipelines.shortcut import ShortcutDiT, ShortcutPipeline, ShortcutScheduler
from pipelines.shortcut_scene import SceneShortcutTransformer
from trainers.common import checkpoints
from trainers.common.weights import load_weights


def network(seed: int = 0, **shape) -> ShortcutDiT:
    torch.manual_seed(seed)
    shape = {"sample_size": 8, "in_channels": 1, "hidden_size": 16, "num_layers": 1, "num_attention_heads": 2} | shape
    model = ShortcutDiT(**shape)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_()
    return model


def equal(one: nn.Module, other: nn.Module) -> bool:
    state = other.state_dict()
    return all(torch.equal(value, state[name]) for name, value in one.state_dict().items())


def write_checkpoint(run_dir, step: int, ema: nn.Module | None, model: nn.Module):
    run_dir.mkdir(exist_ok=True)
    folder = checkpoints.begin(run_dir, step)
    save_model(model, str(folder / "model.safetensors"))
    if ema is not None:
        save_model(ema, str(folder / "ema.safetensors"))
    return checkpoints.commit(folder)


# ---- where weights lie ----


@pytest.mark.parametrize("shard", ["10GB", "4KB"], ids=["one file", "several files"])
@pytest.mark.parametrize("part", ["model", "transformer"])
def test_a_model_and_a_pipeline(tmp_path, part, shard):
    given = network(1)
    given.save_pretrained(tmp_path / "model", max_shard_size=shard)
    assert (len(list((tmp_path / "model").glob("*.safetensors"))) > 1) == (shard == "4KB")
    ShortcutPipeline(given, ShortcutScheduler()).save_pretrained(tmp_path / "pipeline", max_shard_size=shard)
    for folder in ("model", "pipeline", "pipeline/transformer"):
        model = network(2)
        assert load_weights(model, tmp_path / folder, part=part) == []
        assert equal(model, given), folder


def test_a_run_hands_over_its_newest_intact_checkpoint(tmp_path, caplog):
    run_dir = tmp_path / "run"
    for step in (2, 10):
        newest = write_checkpoint(run_dir, step, network(step), network(step + 1))
    model = network()
    load_weights(model, run_dir)
    assert equal(model, network(10))
    load_weights(model, str(run_dir), weights="model")
    assert equal(model, network(11))
    load_weights(model, run_dir / "checkpoint-2")
    assert equal(model, network(2))
    (newest / "ema.safetensors").write_bytes(b"torn")
    load_weights(model, run_dir, weights="model")
    assert equal(model, network(3))
    with pytest.raises(ValueError, match=r"checkpoint-10 is damaged: ema.safetensors: 4 bytes"):
        load_weights(model, newest)


def test_a_run_without_intact_checkpoints_hands_over_what_it_exported(tmp_path):
    checkpoint = write_checkpoint(tmp_path, 2, None, network(1))
    (checkpoint / "model.safetensors").write_bytes(b"torn")
    with pytest.raises(ValueError, match="holds no weights"):
        load_weights(network(), tmp_path)
    ShortcutPipeline(network(5), ShortcutScheduler()).save_pretrained(tmp_path)
    model = network()
    load_weights(model, tmp_path)
    assert equal(model, network(5))


def test_a_run_without_average_hands_over_its_live_weights(tmp_path, caplog):
    write_checkpoint(tmp_path, 2, None, network(1))
    model = network()
    with caplog.at_level(logging.INFO):
        load_weights(model, tmp_path)
    assert equal(model, network(1))
    assert "holds no moving average" in caplog.text


def test_a_pipeline_of_several_networks_wants_a_name(tmp_path):
    (tmp_path / "model_index.json").write_text('{"transformer": [], "vae": [], "scheduler": []}')
    for seed, name in enumerate(("transformer", "vae")):
        network(seed).save_pretrained(tmp_path / name)
    with pytest.raises(ValueError, match="holds no model, but transformer, vae"):
        load_weights(network(), tmp_path)
    with pytest.raises(ValueError, match="holds no unet, but transformer, vae"):
        load_weights(network(), tmp_path, part="unet")
    model = network()
    load_weights(model, tmp_path, part="vae")
    assert equal(model, network(1))


def test_a_real_run_is_read(finished_run):
    folder = finished_run / "checkpoint-6"
    model = ShortcutDiT.from_config(ShortcutDiT.load_config(finished_run, subfolder="transformer"))
    exported = ShortcutDiT.from_pretrained(finished_run, subfolder="transformer")
    for path in (finished_run, folder, finished_run / "transformer", folder / "ema.safetensors"):
        with torch.no_grad():
            [parameter.zero_() for parameter in model.parameters()]
        assert load_weights(model, path) == []
        assert equal(model, exported)


# ---- what does not fit ----


def test_what_does_not_fit_is_named_and_changes_nothing(tmp_path):
    network(1, num_layers=2, hidden_size=32).save_pretrained(tmp_path)
    model = network()
    names = r"\w[\w.]+ \(.*?\) instead of \(.*?\)"
    wanted = r"does not fit: unexpected: blocks.1.\S+, blocks.1.\S+, blocks.1.\S+ and \d+ more; "
    with pytest.raises(ValueError, match=wanted + rf"of another shape: {names}, {names}, {names} and \d+ more$"):
        load_weights(model, tmp_path)
    network(1).save_pretrained(tmp_path)
    deeper = network(num_layers=2)
    with pytest.raises(
        ValueError, match=r"does not fit: missing: blocks.1.\S+, blocks.1.\S+, blocks.1.\S+ and \d+ more$"
    ):
        load_weights(deeper, tmp_path)
    assert equal(model, network())
    assert equal(deeper, network(num_layers=2))


def test_without_strict_the_rest_is_left_alone_and_named(tmp_path):
    save_file(
        {"0.weight": torch.ones(2, 2), "0.bias": torch.ones(3), "9.bias": torch.ones(1)}, tmp_path / "w.safetensors"
    )
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    before = {name: value.clone() for name, value in model.state_dict().items()}
    left = load_weights(model, tmp_path / "w.safetensors", strict=False)
    assert left == ["0.bias", "1.bias", "1.weight", "9.bias"]
    assert torch.equal(model[0].weight, torch.ones(2, 2))
    assert all(torch.equal(model.state_dict()[name], before[name]) for name in ("0.bias", "1.bias", "1.weight"))
    with pytest.raises(ValueError, match="holds no weights of this network"):
        load_weights(nn.Conv2d(1, 1, 1), tmp_path / "w.safetensors", strict=False)


def test_only_tensors_with_a_prefix_count(tmp_path):
    given = nn.ModuleDict({"encoder": nn.Linear(2, 2), "head": nn.Linear(2, 5)})
    model = nn.ModuleDict({"encoder": nn.Linear(2, 2), "decoder": nn.Linear(2, 7)})
    save_model(given, str(tmp_path / "w.safetensors"))
    assert load_weights(model, tmp_path / "w.safetensors", prefixes=["encoder."]) == []
    assert equal(model["encoder"], given["encoder"])
    with pytest.raises(ValueError, match=r"missing: decoder.weight, decoder.bias$"):
        load_weights(model, tmp_path / "w.safetensors", prefixes=["encoder.", "decoder."])


def test_new_layers_may_be_lacking_but_nothing_else(tmp_path):
    given = nn.ModuleDict({"body": nn.Linear(2, 2)})
    save_model(given, str(tmp_path / "w.safetensors"))
    model = nn.ModuleDict({"body": nn.Linear(2, 2), "scene_attention": nn.Linear(2, 2)})
    left = load_weights(model, tmp_path / "w.safetensors", may_lack=["scene_attention"])
    assert left == ["scene_attention.bias", "scene_attention.weight"]
    assert equal(model["body"], given["body"])
    save_model(nn.ModuleDict({"scene_attention": nn.Linear(3, 2)}), str(tmp_path / "w.safetensors"))
    with pytest.raises(
        ValueError, match=r"missing: body.weight, body.bias; of another shape: scene_attention.weight \(2, 3\)"
    ):
        load_weights(model, tmp_path / "w.safetensors", may_lack=["scene_attention"])


def test_shared_tensors_are_stored_once(tmp_path):
    def tied() -> nn.ModuleDict:
        model = nn.ModuleDict({"a": nn.Linear(3, 3), "b": nn.Linear(3, 3)})
        model["b"].weight = model["a"].weight
        return model

    given, model = tied(), tied()
    save_model(given, str(tmp_path / "w.safetensors"))
    assert len(load_file(tmp_path / "w.safetensors")) == 3
    assert load_weights(model, tmp_path / "w.safetensors") == []
    assert equal(model, given)
    assert model["a"].weight is model["b"].weight


def test_a_scene_network_starts_from_one_of_single_objects(tmp_path):
    shape = {"shape_tokens": 8, "hidden_size": 16, "num_layers": 2, "num_attention_heads": 2, "condition": "none"}
    objects = SceneShortcutTransformer(**shape, attention_scope=["object"], use_shortcut=False)
    objects.save_pretrained(tmp_path / "transformer")
    scenes = SceneShortcutTransformer(**shape)
    new = ["scene_attention", "registers", "step_embedder"]
    left = load_weights(scenes, tmp_path, part="transformer", may_lack=new)
    assert {part for part in new for name in left if part in name} == set(new)
    assert all(torch.equal(value, scenes.state_dict()[name]) for name, value in objects.state_dict().items())
    slots = SceneShortcutTransformer(**shape, object_condition="slot")
    with pytest.raises(ValueError, match=r"missing: slots.weight$"):
        load_weights(slots, tmp_path, part="transformer", may_lack=new)


def test_weights_take_the_networks_dtype(tmp_path):
    given = nn.Linear(4, 4)
    save_file({name: value.half() for name, value in given.state_dict().items()}, tmp_path / "w.safetensors")
    model = nn.Linear(4, 4)
    load_weights(model, tmp_path / "w.safetensors")
    assert model.weight.dtype == torch.float32
    assert torch.equal(model.weight, given.weight.half().float())
    assert model.weight.requires_grad


# ---- what is no weights ----


@pytest.mark.parametrize("name", ["diffusion_pytorch_model.bin", "pytorch_model.bin", "model.pt", "last.ckpt", "x.pth"])
def test_pickles_are_refused_by_name(tmp_path, name):
    torch.save(nn.Linear(2, 2).state_dict(), tmp_path / name)
    for path in (tmp_path, tmp_path / name):
        with pytest.raises(ValueError, match=f"{name} is a pickle"):
            load_weights(nn.Linear(2, 2), path)


def test_damage_is_one_line(tmp_path):
    network().save_pretrained(tmp_path, max_shard_size="4KB")
    index = tmp_path / "diffusion_pytorch_model.safetensors.index.json"
    first = min(tmp_path.glob("*.safetensors"))
    content = first.read_bytes()
    shutil.copy(first, tmp_path.parent / "outside.safetensors")
    for damage, message in (
        (lambda: first.write_bytes(content[: len(content) // 2]), f"{first.name} is damaged"),
        (first.unlink, f"{first.name} is missing"),
        (lambda: index.write_text(json.dumps({"weight_map": {"a": "../outside.safetensors"}})), "outside its folder"),
        (lambda: index.write_text(json.dumps({"weight_map": {"a": 3}})), "index.json is damaged"),
        (lambda: index.write_text("[" * 50), "index.json is damaged"),
    ):
        damage()
        with pytest.raises(ValueError, match=message) as error:
            load_weights(network(), tmp_path)
        assert "\n" not in str(error.value)
    with pytest.raises(ValueError, match="no such folder"):
        load_weights(network(), tmp_path / "nowhere")
