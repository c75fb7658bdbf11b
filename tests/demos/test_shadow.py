"""The shadow demo: its report and metrics.json on a tiny data set; and, slowly, what the README promises."""

from __future__ import annotations

import base64
import io
import json
import re

import pytest
import runs
import torch
from PIL import Image

from backlot.codecs import PixelCodec
from demos import common, scene, shadow, shortcut
from pipelines.shadow_sdxl import ShadowSDXLPipeline, ShadowUNet, create_scheduler

PICTURE = re.compile(r'<img src="data:image/png;base64,([^"]+)"')


def untrained() -> ShadowSDXLPipeline:
    torch.manual_seed(0)
    shape = {"block_out_channels": (16, 16, 16), "layers_per_block": 1, "transformer_layers_per_block": 1}
    unet = ShadowUNet(8, 12, **shape, attention_head_dim=(1, 1, 1), norm_num_groups=8)
    pipeline = ShadowSDXLPipeline(unet, PixelCodec(block_size=2), create_scheduler("flow"))
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    """Report and metrics of an untrained network, by the demo's own functions on a few renders of 16 pixels."""
    folder = tmp_path_factory.mktemp("demo")
    small = {"image_size": 16, "camera": (6.0, 7.5), "lights_per_view": 4, "num_workers": 1, "variant": "scalar_rgb"}
    with pytest.MonkeyPatch.context() as patch:
        for name, value in {"VIEW": small, "NUM_TRAIN": 8, "NUM_TEST": 32, "NUM_SHOWN": 8, "FINE": 32}.items():
            patch.setattr(shadow, name, value)
        shadow.render(folder / "data", shadow.NUM_TRAIN)
        (folder / "run").mkdir()
        rows = [{"step": i, "loss": 1 / i} for i in range(1, 9)]
        (folder / "run" / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        metrics = shadow.measure(untrained(), folder / "data")
        shadow.write_report(folder, untrained(), metrics)
    return folder, metrics


def test_metrics_have_the_promised_keys(written):
    _, metrics = written
    keys = {"one_step", "four_steps", "phi_shuffled", "baselines", "direction_error_deg", "seam"}
    assert keys <= metrics.keys()
    for row in ("one_step", "four_steps", "phi_shuffled"):
        assert {"zncc", "iou", "rmse", "s_rmse"} <= metrics[row].keys()
    zero, mean_map = (metrics["baselines"][name] for name in ("zero", "mean_map"))
    assert (zero["iou"], zero["zncc"]) == (0, 0)
    assert mean_map["zncc"] > 0.3
    assert metrics["num_objects"] == 8
    assert metrics["seam"] < 1e-5
    json.dumps(metrics)


def test_train_and_test_share_no_object(written):
    folders = [json.loads((written[0] / "data" / name / "metadata.json").read_text()) for name in ("train", "test")]
    train, test = ({entry["object_id"] for entry in metadata.values()} for metadata in folders)
    assert not train & test


def test_the_report_needs_no_network_and_its_pictures_decode(written):
    text = (written[0] / "report.html").read_text()
    assert "http:" not in text
    assert "https:" not in text
    pictures = PICTURE.findall(text)
    assert len(pictures) == text.count("<img") == 7
    for data in pictures:
        assert min(Image.open(io.BytesIO(base64.b64decode(data))).size) > 100


@pytest.mark.parametrize("demo", [shortcut, shadow, scene], ids=lambda module: module.__name__)
def test_a_foreign_folder_is_left_alone(tmp_path, monkeypatch, capsys, demo):
    monkeypatch.chdir(runs.ROOT)
    (tmp_path / "letters").mkdir()
    with pytest.raises(SystemExit, match="2"):
        demo.main(["--output_dir", str(tmp_path)])
    assert capsys.readouterr().err == f"error: {tmp_path} exists and is no earlier demo: choose another --output_dir\n"
    assert (tmp_path / "letters").is_dir()


def test_the_exit_code_of_a_training_that_fails_is_passed_on(tmp_path, monkeypatch, capfd):
    monkeypatch.chdir(runs.ROOT)
    monkeypatch.setattr(scene, "RUNS", {"scene": ["--model.bananas", "7"]})
    with pytest.raises(SystemExit) as stopped:
        scene.train(tmp_path / "data", tmp_path / "vae", tmp_path, 1)
    assert stopped.value.code == 2
    assert "unknown key --model.bananas" in capfd.readouterr().err
    with pytest.raises(SystemExit) as stopped:
        raise common.child_failed(-9, "killed")
    assert stopped.value.code == 137
    assert capfd.readouterr().err == "killed\n"


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_one_step_on_unseen_objects(tmp_path):
    shadow.main(["--output_dir", str(tmp_path / "demo")])
    metrics = json.loads((tmp_path / "demo" / "metrics.json").read_text())
    one = metrics["one_step"]
    assert one["zncc"] >= 0.93
    assert one["iou"] >= 0.55
    assert one["rmse"] <= 0.042
    assert metrics["direction_error_deg"] <= 8
    assert metrics["phi_shuffled"]["zncc"] <= 0.6
    assert metrics["seam"] < 1e-5
    assert metrics["size_sweep"]["monotone"]
