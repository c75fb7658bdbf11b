"""Exports: what their index may name."""

from __future__ import annotations

import json
import warnings
from pathlib import Path

import pytest
import torch
from diffusers import FlowMapEulerDiscreteScheduler

from backlot.codecs import PixelCodec
from backlot.command_line import EXIT_INPUT
from backlot.loading import load_pipeline
from pipelines.shadow_sdxl import ShadowSDXLPipeline, ShadowUNet, create_scheduler
from pipelines.shortcut import ShortcutDiT, ShortcutPipeline, ShortcutScheduler
from pipelines.shortcut_scene import PoseCodec, SceneShortcutTransformer, ShortcutScenePipeline


def create_shortcut() -> ShortcutPipeline:
    network = ShortcutDiT(8, 1, 2, hidden_size=16, num_layers=1, num_attention_heads=2, num_classes=10)
    return ShortcutPipeline(network, ShortcutScheduler(), PixelCodec(in_channels=1))


def create_shadow() -> ShadowSDXLPipeline:
    unet = ShadowUNet(
        sample_size=8,
        latent_channels=12,
        block_out_channels=(16, 16, 16),
        layers_per_block=1,
        transformer_layers_per_block=1,
        attention_head_dim=(1, 1, 1),
        norm_num_groups=8,
    )
    return ShadowSDXLPipeline(unet, PixelCodec(block_size=2), create_scheduler("flow"))


def create_scene() -> ShortcutScenePipeline:
    network = SceneShortcutTransformer(
        shape_tokens=8, shape_channels=4, hidden_size=16, num_layers=1, num_attention_heads=2, condition="none"
    )
    return ShortcutScenePipeline(network, FlowMapEulerDiscreteScheduler(), PoseCodec())


CASES = {
    "shortcut": (create_shortcut, "vae", "pipelines.codecs"),
    "shadow": (create_shadow, "vae", "pipelines.codecs"),
    "scene": (create_scene, "codec", "trainers.nowhere.codec"),
    "folder": (create_shortcut, "transformer", "pipelines.shortcut_old.transformer"),
    "foreign": (create_shortcut, "scheduler", "os.path"),
}


def name_module(folder: Path, part: str, module: str) -> None:
    """Edit an export: this part is of another module."""
    path = folder / "model_index.json"
    index = json.loads(path.read_text())
    index[part][0] = module
    path.write_text(json.dumps(index))


@pytest.mark.parametrize("name", CASES)
def test_exports_of_an_older_layout_are_refused_in_one_line(tmp_path, capsys, name):
    create, part, module = CASES[name]
    pipeline = create()
    pipeline.save_pretrained(tmp_path)
    with warnings.catch_warnings():
        warnings.simplefilter("error", FutureWarning)
        load_pipeline(type(pipeline), tmp_path, "cpu")
    name_module(tmp_path, part, module)
    message = (
        rf"{tmp_path} is an export of an older layout: its {part} names the module \'{module}\'.*--resume_from_chec"
    )
    with pytest.raises(ValueError, match=message) as caught:
        type(pipeline).from_pretrained(tmp_path)
    assert "\n" not in str(caught.value)
    capsys.readouterr()
    with pytest.raises(SystemExit) as stopped:
        load_pipeline(type(pipeline), tmp_path, "cpu")
    assert stopped.value.code == EXIT_INPUT
    (line,) = capsys.readouterr().err.splitlines()
    assert line == f"error: {caught.value}"


def test_a_complete_export_gives_the_same_weights(tmp_path):
    pipeline = create_shortcut()
    pipeline.save_pretrained(tmp_path)
    loaded = ShortcutPipeline.from_pretrained(tmp_path)
    for name, value in pipeline.transformer.state_dict().items():
        assert torch.equal(loaded.transformer.state_dict()[name], value)


@pytest.mark.parametrize("text", ["", "[]", "{", "[" * 100_000])
def test_a_damaged_index_is_refused(tmp_path, capsys, text):
    (tmp_path / "model_index.json").write_text(text)
    with pytest.raises(SystemExit) as stopped:
        load_pipeline(ShortcutPipeline, tmp_path)
    assert stopped.value.code == EXIT_INPUT
    assert "model_index.json is damaged" in capsys.readouterr().err
