"""The layout demo: its page and metrics.json of untrained networks; and, slowly, all of it and what it promises."""

from __future__ import annotations

import base64
import html
import io
import json
import re

import numpy as np
import pytest
import runs
import torch
from layout_samples import wake
from PIL import Image
from torch.utils.tensorboard import SummaryWriter

from data_prep.layouts.dataset import LayoutDataset
from demos import common, layout, layout_figures, layout_page
from evaluation.layout_flux import KEYS, Sampling, Variants, draw
from pipelines.layout_flux import FluxLayoutAdapter
from pipelines.layout_flux.files import save_adapter
from pipelines.layout_flux.settings import TransformerConfig
from pipelines.layout_flux.stages import create_base

PICTURE = re.compile(r'<img src="data:image/png;base64,([^"]+)"')
SHAPE = TransformerConfig(num_single_layers=1, num_attention_heads=2, attention_head_dim=24, axes_dims_rope=(8, 8, 8))
PARTS = {
    "stage1": {"modulation_hidden": None, "bridge_rank": None},
    "stage2": {"modulation_hidden": 16, "bridge_rank": None},
    "stage3": {"modulation_hidden": 16, "bridge_rank": 8},
}
SMALL = {
    "VARIANTS": Variants(num_layouts=8, num_shuffled=4, num_swapped=6, num_without_feedback=4),
    "SAMPLING": Sampling(num_inference_steps=2),
}
IDENTITY = {"identity_retrieval", "identity_shuffled", "dino_similarity"}


def write_models(folder) -> None:
    """A base and an adapter of every stage, with noise in place of training."""
    base = create_base(str(folder / "data" / layout.MODELS), layout.VAE, SHAPE)
    wake(base.transformer, 0.05)
    base.save_pretrained(folder / "base")
    item = LayoutDataset(folder / "data", split="all", max_objects=4)[0]
    widths = {f"{name}_embed_dim": item[f"{name}_embeds"].shape[-1] for name in ("text", "clip", "dino")}
    for stage, parts in PARTS.items():
        torch.manual_seed(1)
        given = {**widths, **parts, "layout_double_blocks": "every 1", "lora_rank": 4, "lora_alpha": 4}
        adapter = FluxLayoutAdapter.for_transformer(base.transformer, base_model=str(folder / "base"), **given)
        wake(adapter, 0.1)
        save_adapter(adapter, folder / stage)


def write_logs(run_dir) -> None:
    """What a run of four updates leaves behind."""
    run_dir.mkdir(exist_ok=True)
    keys = ("loss/flow_matching", "metrics/alpha_mean", "metrics/dino_similarity_mean")
    rows = [{"step": step, **dict.fromkeys(keys, 1 / step)} for step in range(1, 5)]
    (run_dir / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    writer = SummaryWriter(run_dir / "tensorboard")
    for step in (1, 2, 4):
        writer.add_scalar("loss/total", 1 / step, step)
        writer.add_histogram("metrics/timesteps", torch.tensor([step, 3.0 * step]), step)
        writer.add_image("inference/predicted", torch.zeros(3, 4, 4), step)
    writer.close()


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    """Page and metrics, by the demo's own functions."""
    folder = tmp_path_factory.mktemp("demo")
    with pytest.MonkeyPatch.context() as patch:
        for name, value in SMALL.items():
            patch.setattr(layout, name, value)
        layout.prepare_scenes(folder, 4)
        write_models(folder)
        for name in ("base", *layout_figures.STAGES):
            write_logs(folder / name)
        models = layout.load(folder)
        measured = layout.measure_all(models)
        metrics = layout.summarise_all(measured, folder)
        layout_page.write_page(folder, models.protocol, models.pipelines["stage3"], measured, metrics)
    return folder, metrics, measured, models


def test_metrics_have_the_promised_keys(written):
    _, metrics, _, _ = written
    for name in layout_figures.NAMES:
        assert set(KEYS) <= metrics[name].keys()
    for name in layout_figures.STAGES:  # what a model is not told is measured all the same
        assert None not in [metrics[name][key] for key in IDENTITY]
    assert metrics["num_layouts"] == 8
    assert {"stage2 - stage1", "stage3 - stage2", "stage3, bridge on - off"} <= metrics["comparisons"].keys()
    assert metrics["comparisons"]["stage2 - stage1"]["dino_similarity"]["count"] > 0
    json.dumps(metrics, allow_nan=False)


def test_the_first_stage_is_shown_no_reference(written):
    _, metrics, measured, models = written
    drift = measured["stage1"].drift
    assert drift.columns["inside"].max() == 0
    assert metrics["stage1"]["outside_drift"] is None
    assert measured["stage2"].drift.columns["inside"].max() > 0
    items = [each.item for each in models.protocol.examples]
    given = {"sampling": models.protocol.sampling, **models.protocol.noise}
    blind = draw(models.pipelines["stage1"], [layout_page.without_references(item) for item in items], **given)
    assert np.array_equal(measured["stage1"].pictures["plain"], blind.pictures)
    assert not np.array_equal(draw(models.pipelines["stage1"], items, **given).pictures, blind.pictures)


def test_tags_begin_and_end(written):
    tags = written[1]["tensorboard"]["stage2"]
    assert tags["loss/total"] == {"kind": "scalar", "start": 1.0, "end": 0.25, "first_step": 1, "last_step": 4}
    assert (tags["metrics/timesteps"]["start"], tags["metrics/timesteps"]["end"]) == pytest.approx((2, 8))
    assert tags["inference/predicted"]["end"] == "samples/inference/predicted-000004.png"


def test_the_page_needs_no_network_and_its_pictures_decode(written):
    text = (written[0] / "report.html").read_text()
    assert "http:" not in text
    assert "https:" not in text
    pictures = [Image.open(io.BytesIO(base64.b64decode(data))) for data in PICTURE.findall(text)]
    assert len(pictures) == text.count("<img") >= 10
    assert min(min(picture.size) for picture in pictures) > 100
    assert all(html.escape(goal.what) in text for goal in layout_figures.find_goals(written[1]))


def test_a_reference_changes_nothing_but_its_object(written):
    item = written[3].protocol.examples[0].item
    embeds = {name: torch.ones_like(item[name][0]) for name in ("clip_embeds", "dino_embeds")}
    changed = layout_page.with_reference(item, 1, embeds)
    for name, values in embeds.items():
        assert torch.equal(changed[name][1], values)
        assert torch.equal(changed[name][0], item[name][0])
    assert not layout_page.with_reference(item, 1, None)["has_reference"][1]


def test_goals_are_reached_or_missed():
    reached = layout_figures.goal("x", "≥", 0.5, 0.5, [0.4, 0.6])
    assert reached.reached
    assert not layout_figures.goal("x", ">", 0, 0.0).reached
    assert not layout_figures.goal("x", "≤", 0.1, None, [None, None]).reached
    assert layout_page.tell_goal(reached) == ["x", "≥ 0.5", "0.500 [0.400, 0.600]", "reached"]


def test_a_shorter_run_keeps_its_shares():
    counts = layout.shortened(layout.CONFIGS["stage1"], 18)
    assert counts["training.max_train_steps"] == 18
    assert 0 <= counts["training.lr_warmup_steps"] < counts["training.lr_decay_steps"] <= 9
    assert counts["training.logging_steps"] == 1
    assert set(layout.CONFIGS) == {"base", *layout_figures.STAGES}
    assert all(common.planned_updates(runs.ROOT / config) > 18 for config in layout.CONFIGS.values())


def test_a_foreign_folder_is_left_alone(tmp_path, capsys):
    (tmp_path / "letters").mkdir()
    with pytest.raises(SystemExit, match="2"):
        layout.main(["--output_dir", str(tmp_path)])
    assert capsys.readouterr().err == f"error: {tmp_path} exists and is no earlier demo: choose another --output_dir\n"
    assert (tmp_path / "letters").is_dir()


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_a_small_demo_writes_everything(tmp_path, monkeypatch):
    monkeypatch.chdir(runs.ROOT)
    for name, value in SMALL.items():
        monkeypatch.setattr(layout, name, value)
    layout.main(["--output_dir", str(tmp_path / "demo"), "--num_train", "128", "--max_train_steps", "4"])
    metrics = json.loads((tmp_path / "demo/metrics.json").read_text())
    assert {"prepare", "train base", "train stage3", "measure", "report", "total"} <= metrics["seconds"].keys()
    assert {"loss/total", "metrics/alpha_mean", "metrics/alpha_distribution"} <= metrics["tensorboard"]["stage1"].keys()
    assert {"loss/dino_identity", "inference/predicted"} <= metrics["tensorboard"]["stage2"].keys()
    assert metrics["tensorboard"]["stage3"]["metrics/feedback_magnitude"]["end"] > 0
    first = metrics["tensorboard"]["stage1"]["inference/predicted"]["start"]
    assert (tmp_path / "demo/stage1" / first).is_file()
    assert "data:image/png;base64," in (tmp_path / "demo/report.html").read_text()


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_the_demo_reaches_its_figures(tmp_path, monkeypatch):
    monkeypatch.chdir(runs.ROOT)
    layout.main(["--output_dir", str(tmp_path / "demo")])
    metrics = json.loads((tmp_path / "demo/metrics.json").read_text())
    assert [goal["what"] for goal in metrics["goals"] if not goal["reached"]] == []
