"""The scene demo from data to report; the slow one holds the figures that the documentation gives."""

from __future__ import annotations

import json

import pytest
import runs
import trimesh

from demos import scene


@pytest.fixture
def small(monkeypatch):
    monkeypatch.chdir(runs.ROOT)
    for name, value in {"NUM_TRAIN": 24, "NUM_TEST": 6, "NUM_SHOWN": 2, "FINE": 32, "VAE_STEPS": 4}.items():
        monkeypatch.setattr(scene, name, value)


@pytest.mark.slow
def test_a_small_demo_writes_everything(tmp_path, small):
    scene.main(["--output_dir", str(tmp_path / "demo"), "--max_train_steps", "12"])
    metrics = json.loads((tmp_path / "demo/metrics.json").read_text())
    assert set(metrics["coverage"]) == set(metrics["collision"]) == {"object", "scene"}
    assert set(metrics["coverage"]["scene"]) == set(metrics["flow_matching"]) == {"1", "4", "32"}
    assert 0 <= metrics["vae_iou"] <= 1
    assert "data:image/png;base64," in (tmp_path / "demo/report.html").read_text()
    files = list((tmp_path / "demo/scenes").glob("*.glb"))
    assert len(files) == 2 * 6
    assert all(len(trimesh.load_scene(file).geometry) >= 2 for file in files)


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_the_demo_reaches_its_figures(tmp_path, monkeypatch):
    monkeypatch.chdir(runs.ROOT)
    scene.main(["--output_dir", str(tmp_path / "demo")])
    metrics = json.loads((tmp_path / "demo/metrics.json").read_text())
    coverage, collision = metrics["coverage"], metrics["collision"]
    assert coverage["scene"]["32"] >= 0.65
    assert coverage["scene"]["32"] >= coverage["object"]["32"] + 0.15
    assert collision["scene"]["32"] <= 0.05
    assert collision["scene"]["32"] <= collision["object"]["32"] / 4
    assert metrics["vae_iou"] >= 0.90
    assert coverage["scene"]["1"] > metrics["flow_matching"]["1"]
