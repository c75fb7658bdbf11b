"""Adapters on disk: what is written, where it is found, and what is refused."""

from __future__ import annotations

import json
import shutil

import pytest
import torch
import yaml
from diffusers import FluxPipeline, FluxTransformer2DModel
from flux_checkpoint import FLUX, create_adapter
from safetensors.torch import load_file, save_file

from backlot.files import file_sha256, write_json
from pipelines.layout_flux.files import load_adapter, save_adapter
from pipelines.layout_flux.lora import export_lora, import_lora


@pytest.fixture(scope="module")
def adapter():
    return create_adapter(FluxTransformer2DModel(**FLUX))


def same(loaded, adapter) -> bool:
    own, theirs = adapter.state_dict(), loaded.state_dict()
    return own.keys() == theirs.keys() and all(torch.equal(own[name], theirs[name]) for name in own)


def write_checkpoint(run, step: int, adapter, shift: float = 0.0) -> None:
    """As training writes it: weights and a manifest; the configuration lies in the run."""
    folder = run / f"checkpoint-{step}"
    folder.mkdir(parents=True)
    tensors = {name: tensor + shift for name, tensor in adapter.state_dict().items()}
    save_file(tensors, folder / "layout_adapter.safetensors", {"rows": "{}"})
    file = folder / "layout_adapter.safetensors"
    about = {file.name: {"bytes": file.stat().st_size, "sha256": file_sha256(file)}}
    write_json(folder / "manifest.json", {"format": 2, "step": step, "files": about})
    config = {name: value for name, value in adapter.config.items() if not name.startswith("_")}
    (run / "config.yaml").write_text(yaml.safe_dump({"stage": 1, "adapter": json.loads(json.dumps(config))}))


def test_an_adapter_is_one_file_in_float32_and_its_configuration(adapter, tmp_path):
    save_adapter(adapter, tmp_path / "new" / "folder")
    files = sorted(path.name for path in (tmp_path / "new" / "folder").iterdir())
    assert files == ["README.md", "config.json", "layout_adapter.safetensors"]
    assert "non-commercial licence" in (tmp_path / "new" / "folder" / "README.md").read_text()
    tensors = load_file(tmp_path / "new" / "folder" / "layout_adapter.safetensors")
    assert {tensor.dtype for tensor in tensors.values()} == {torch.float32}
    assert tensors.keys() == {name for names in adapter.parts().values() for name in names}
    for low_cpu_mem_usage in (True, False):
        loaded = load_adapter(tmp_path / "new" / "folder", low_cpu_mem_usage=low_cpu_mem_usage)
        assert same(loaded, adapter)
        assert not loaded.training
        assert {name: value for name, value in loaded.config.items() if name[0] != "_"} == {
            name: value for name, value in adapter.config.items() if name[0] != "_"
        }


def test_given_tensors_take_the_place_of_its_own(adapter, tmp_path):
    tensors = {name: tensor.to(torch.bfloat16) for name, tensor in adapter.state_dict().items()}
    save_adapter(adapter, tmp_path, tensors=tensors)
    loaded = load_adapter(tmp_path).state_dict()
    assert all(torch.equal(loaded[name], tensors[name].float()) for name in tensors)


def test_every_spelling_of_a_place(adapter, tmp_path):
    stage = tmp_path / "checkpoints" / "stage1"
    for step in (900, 10000):
        write_checkpoint(stage, step, adapter, shift=float(step == 900))
    for place in (
        stage,
        stage / "checkpoint-10000",
        stage / "checkpoint_10000",
        stage / "checkpoint_10000" / "model.pt",
        stage / "checkpoint-10000" / "layout_adapter.safetensors",
        str(stage),
    ):
        assert same(load_adapter(place), adapter), place
    assert same(load_adapter(tmp_path / "checkpoints", subfolder="stage1"), adapter)
    assert not same(load_adapter(stage / "checkpoint_900"), adapter)
    save_adapter(adapter, tmp_path / "other", "mine.safetensors")
    assert same(load_adapter(tmp_path / "other", weight_name="mine.safetensors"), adapter)
    adapter.save_pretrained(tmp_path / "export")  # as a finished run does
    assert same(load_adapter(tmp_path / "export"), adapter)
    (tmp_path / "pipeline").mkdir()
    shutil.copytree(tmp_path / "export", tmp_path / "pipeline" / "layout_adapter")
    assert same(load_adapter(tmp_path / "pipeline"), adapter)


def test_the_newest_whole_checkpoint_is_taken(adapter, tmp_path, caplog):
    for step in (900, 5000, 10000):
        write_checkpoint(tmp_path, step, adapter)
    file = tmp_path / "checkpoint-10000" / "layout_adapter.safetensors"
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(data)
    (tmp_path / "checkpoint-5000" / "manifest.json").unlink()
    (tmp_path / "checkpoint-20000.tmp").mkdir()
    assert same(load_adapter(tmp_path), adapter)
    assert "checkpoint-10000 holds no whole adapter (layout_adapter.safetensors: content changed)" in caplog.text
    assert "checkpoint-5000 holds no whole adapter (manifest.json: missing)" in caplog.text
    with pytest.raises(ValueError, match=r"checkpoint-10000 is damaged: layout_adapter.safetensors: content changed"):
        load_adapter(tmp_path / "checkpoint_10000")
    file.write_bytes(data[:100])
    with pytest.raises(ValueError, match=r"not of the size it had"):
        load_adapter(tmp_path / "checkpoint_10000")


def test_what_is_no_adapter_is_refused(adapter, tmp_path):
    for place in (tmp_path, tmp_path / "nowhere", tmp_path / "checkpoint_7", "a/b/c"):
        with pytest.raises(FileNotFoundError, match="holds no layout adapter"):
            load_adapter(place)
    save_adapter(adapter, tmp_path)
    tensors = load_file(tmp_path / "layout_adapter.safetensors")
    removed = dict(list(tensors.items())[1:])
    wrong = {**tensors, "alpha_predictor.linear_1.bias": torch.zeros(3)}
    for changed, message in (
        (removed, "is missing"),
        ({**tensors, "extra": torch.zeros(1)}, "extra is not one of its tensors"),
        (wrong, r"linear_1.bias has the shape \(3,\) instead of \(256,\)"),
    ):
        save_file(changed, tmp_path / "layout_adapter.safetensors")
        for low_cpu_mem_usage in (True, False):
            with pytest.raises(ValueError, match=f"does not fit its configuration: .*{message}"):
                load_adapter(tmp_path, low_cpu_mem_usage=low_cpu_mem_usage)
    (tmp_path / "layout_adapter.safetensors").write_bytes(b"not tensors")
    with pytest.raises(ValueError, match=r"layout_adapter.safetensors is damaged"):
        load_adapter(tmp_path)
    (tmp_path / "config.json").write_text('{"_class_name": "FluxTransformer2DModel"}')
    with pytest.raises(ValueError, match="describes FluxTransformer2DModel, not a FluxLayoutAdapter"):
        load_adapter(tmp_path)
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(ValueError, match=r"config.json cannot be read"):
        load_adapter(tmp_path)
    (tmp_path / "config.json").unlink()
    (tmp_path / "config.yaml").write_text("stage: 0\n")
    with pytest.raises(ValueError, match="has no section `adapter`"):
        load_adapter(tmp_path)


# --- the LoRA of its branch ---------------------------------------------------------------------------------------


def test_a_lora_goes_to_pefts_format_and_back(adapter, tmp_path):
    double = create_adapter(FluxTransformer2DModel(**FLUX), lora_alpha=8)  # of rank 4
    path = export_lora(double, tmp_path)
    tensors = load_file(path)
    assert all(name.startswith("transformer.transformer_blocks.") for name in tensors)
    pair = double.layout_heads["0"].lora["to_out_0"]
    place = "transformer.transformer_blocks.0.attn.to_out.0"
    assert torch.equal(tensors[f"{place}.lora_A.weight"], pair.down.weight)
    assert torch.equal(tensors[f"{place}.lora_B.weight"], 2 * pair.up.weight)
    x = torch.randn(3, 32)
    other = create_adapter(FluxTransformer2DModel(**FLUX), awake=False)
    import_lora(other, tmp_path)
    for block, head in double.layout_heads.items():
        for name, own in head.lora.items():
            assert torch.allclose(other.layout_heads[block].lora[name](x), own(x), atol=1e-6)
    bare = {name.removeprefix("transformer."): tensor for name, tensor in tensors.items()}
    save_file(bare, tmp_path / "bare.safetensors")
    again = create_adapter(FluxTransformer2DModel(**FLUX), awake=False, lora_alpha=8)
    import_lora(again, tmp_path / "bare.safetensors")
    assert same(again.layout_heads["2"].lora, double.layout_heads["2"].lora)


def test_an_imported_lora_is_never_half_or_nothing(adapter, tmp_path):
    path = export_lora(adapter, tmp_path)
    tensors = load_file(path)
    first = next(iter(tensors))
    for changed, message in (
        ({f"unet.{name}": tensor for name, tensor in tensors.items()}, "it lacks transformer_blocks.0.attn.add_k_proj"),
        ({name: tensor for name, tensor in tensors.items() if name != first}, r"it lacks .* \(1 in all\)"),
        ({**tensors, "transformer.x_embedder.lora_A.weight": torch.zeros(4, 16)}, "it holds besides x_embedder"),
        ({**tensors, first: torch.zeros(5, 32)}, r"it has of another shape .* \(1 in all\)"),
    ):
        save_file(changed, path)
        with pytest.raises(ValueError, match=message):
            import_lora(adapter, path)
    without = create_adapter(FluxTransformer2DModel(**FLUX), lora_rank=None)
    with pytest.raises(ValueError, match="this adapter has no LoRA"):
        export_lora(without, tmp_path / "none")


def test_diffusers_loads_an_exported_lora(adapter, tmp_path):
    pytest.importorskip("peft")
    export_lora(adapter, tmp_path)
    transformer = FluxTransformer2DModel(**FLUX)
    FluxPipeline.load_lora_into_transformer(*FluxPipeline.lora_state_dict(tmp_path, return_alphas=True), transformer)
    loaded = transformer.transformer_blocks[0].attn.to_q
    assert torch.equal(loaded.lora_A["default_0"].weight, adapter.layout_heads["0"].lora["to_q"].down.weight)
