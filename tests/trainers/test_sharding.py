"""FSDP2 on two processes (gloo): every script trains as under DDP, and stops, resumes and exports as ever.

One launch makes all runs (two_shards.py); the tests read what they left.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import runs
import torch
from diffusers import FluxPipeline
from layout_data import write_data
from PIL import Image
from safetensors import safe_open
from scene_samples import write_scenes
from shadow_samples import write_folder
from test_train_shape_vae import write_shapes
from two_shards import IN_LESS, OVERFLOWS, SYSTEMS, Adapter, digest, stored

from backlot.samples import DataOrder
from pipelines.layout_flux import load_adapter
from pipelines.shadow_sdxl import ShadowSDXLPipeline
from pipelines.shortcut import ShortcutPipeline
from pipelines.shortcut_scene import OccupancyVAE, ShortcutScenePipeline
from trainers.common import checkpoints

PROGRAM = Path(__file__).parent / "two_shards.py"
FSDP2 = """
compute_environment: LOCAL_MACHINE
distributed_type: FSDP
use_cpu: false
num_machines: 1
num_processes: {processes}
mixed_precision: 'no'
fsdp_config:
  fsdp_version: {version}
  fsdp_auto_wrap_policy: TRANSFORMER_BASED_WRAP
  fsdp_reshard_after_forward: true
  fsdp_state_dict_type: SHARDED_STATE_DICT
"""
EXPORTED = {
    "shortcut": lambda folder: ShortcutPipeline.from_pretrained(folder).transformer,
    "shortcut_scene": lambda folder: ShortcutScenePipeline.from_pretrained(folder).transformer,
    "shadow_sdxl": lambda folder: ShadowSDXLPipeline.from_pretrained(folder).unet,
    "shape_vae": OccupancyVAE.from_pretrained,
    "layout_flux": load_adapter,
}


def launch(folder: Path, *arguments: str, processes: int = 2, version: int = 2) -> subprocess.CompletedProcess:
    """`accelerate launch` with an FSDP section."""
    launcher = folder / "fsdp.yaml"
    launcher.write_text(FSDP2.format(processes=processes, version=version))
    command = [sys.executable, "-m", "accelerate.commands.launch", "-q", "--config_file", str(launcher)]
    paths = (runs.ROOT, runs.ROOT / "tests", PROGRAM.parent)
    settings = {"OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(map(str, paths)), "CUDA_VISIBLE_DEVICES": ""}
    return subprocess.run(
        [*command, "--main_process_port", "0", *arguments],
        cwd=runs.ROOT,
        env={name: value for name, value in os.environ.items() if name != "ACCELERATE_USE_CPU"} | settings,
        capture_output=True,
        text=True,
        timeout=280,
        check=False,
    )


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """All runs of two_shards.py, and what each rank found in rank-<rank>.json."""
    folder = tmp_path_factory.mktemp("shards")
    write_scenes(folder / "data/scenes", {"train": 10, "val": 3}, stats=True)
    write_shapes(folder / "data/shapes/train", 5, seed=0)
    write_shapes(folder / "data/shapes/val", 4, seed=1)
    write_folder(folder / "data/shadows", num_objects=10, lights=2, image_size=16, seed=0)
    write_folder(folder / "data/others", num_objects=2, lights=2, image_size=16, seed=1)
    write_data(folder / "data/layouts")
    result = launch(folder, str(PROGRAM), str(folder))
    assert result.returncode == 0, result.stdout + result.stderr
    return folder


@pytest.fixture(scope="module")
def found(folder) -> list[dict]:
    return [json.loads((folder / f"rank-{rank}.json").read_text()) for rank in (0, 1)]


def assert_rows_agree(mine: Path, others: Path, bound: float) -> None:
    """Loss and gradient norm, relative to those of the other run; parts of them, which may be tiny, beside the loss."""
    mine, others = runs.rows_of(mine), runs.rows_of(others)
    assert [row.keys() for row in mine] == [row.keys() for row in others]
    for row, other in zip(mine, others, strict=True):
        for name, value in row.items():
            beside = 0.0 if name in ("loss", "grad_norm") else bound * other.get("loss", 1.0)
            assert value == pytest.approx(other[name], rel=bound, abs=max(beside, 1e-7)), (row["step"], name)


# ---- 1: the scripts ----


@pytest.mark.parametrize("system", SYSTEMS)
def test_losses_and_gradient_norms_are_those_of_ddp(folder, found, system):
    assert found[0]["launched"] == "true"  # by the launch file itself
    rows = runs.rows_of(folder / system / "straight")
    assert [row["step"] for row in rows if "loss" in row] == [1, 2, 3, 4, 5, 6]
    assert all(row["grad_norm"] > 0 for row in rows if "loss" in row)
    assert_rows_agree(folder / system / "straight", folder / system / "whole", 1e-6)


@pytest.mark.parametrize("system", SYSTEMS)
def test_three_updates_and_three_after_a_resume_are_six(folder, system):
    straight, broken = (folder / system / name for name in ("straight", "broken"))
    assert runs.differing(*(runs.tensors_of(run / "checkpoint-6") for run in (straight, broken))) == []
    assert runs.differing(*(runs.tensors_of(run / "checkpoint-3") for run in (straight, broken))) == []
    assert runs.rows_of(straight) == runs.rows_of(broken)
    assert runs.tensors_of(straight / "checkpoint-3").keys() == runs.tensors_of(straight / "checkpoint-6").keys()
    assert runs.differing(stored(straight / "checkpoint-3"), stored(straight / "checkpoint-6")) != []


@pytest.mark.parametrize("system", SYSTEMS)
def test_each_process_holds_a_share_of_every_part(folder, system):
    """`distributed_type: FSDP` on a CPU is FSDP, in the network's blocks too."""
    whole, straight = (folder / system / name / "checkpoint-6" for name in ("whole", "straight"))
    names = {f"{part}-{rank:05d}-of-00002.safetensors" for part in ("model", "ema", "optimizer") for rank in (0, 1)}
    assert {path.name for path in straight.glob("*.safetensors")} == names
    sizes = [(straight / f"model-{rank:05d}-of-00002.safetensors").stat().st_size for rank in (0, 1)]
    assert max(sizes) < 0.7 * (whole / "model.safetensors").stat().st_size
    one, all_of_it = stored(straight), stored(whole)
    all_of_it = {name: value for name, value in all_of_it.items() if not name.startswith("layout_adapter/")}
    assert {name: value.shape for name, value in one.items()} == {name: v.shape for name, v in all_of_it.items()}
    for name, value in all_of_it.items():
        if name.startswith("ema/"):
            torch.testing.assert_close(one[name], value, rtol=1e-5, atol=1e-6, msg=name)


@pytest.mark.parametrize("system", SYSTEMS)
def test_the_export_is_that_of_ddp(folder, system):
    folders = [folder / system / name for name in ("whole", "straight")]
    skipped = {"metrics.jsonl", "exit.json", "environment.json", "config.yaml", "lock"}
    files = [
        sorted(
            str(p.relative_to(f))
            for p in f.rglob("*")
            if p.is_file() and "checkpoint-" not in str(p) and "samples" not in str(p) and p.name not in skipped
        )
        for f in folders
    ]
    assert files[0] == files[1]
    assert any(name.endswith(".safetensors") for name in files[0])
    for name in files[0]:
        if name.endswith(".json"):
            assert (folders[0] / name).read_text() == (folders[1] / name).read_text(), name
    whole, sharded = (EXPORTED[system](f) for f in folders)
    assert type(whole) is type(sharded)
    average = stored(folders[1] / "checkpoint-6")
    for name, value in whole.state_dict().items():
        torch.testing.assert_close(sharded.state_dict()[name], value, rtol=0, atol=1e-6, msg=name)
        assert torch.equal(sharded.state_dict()[name], average[f"ema/{name}"]), name


def test_checkpoints_hold_safetensors_and_json_only_and_verify(folder, found):
    found = sorted(folder.rglob("checkpoint-*"))
    assert len(found) > 20
    for checkpoint in found:
        assert checkpoints.verify(checkpoint) == []
        for path in checkpoint.iterdir():
            if path.suffix == ".json":
                json.loads(path.read_text())
            else:
                with safe_open(path, framework="pt") as file:  # refuses anything else
                    assert file.keys(), path


@pytest.mark.parametrize(("system", "precision"), IN_LESS.items())
def test_half_precision_trains_as_under_ddp(folder, found, system, precision):
    home = folder / precision / system
    assert_rows_agree(home / "sharded", home / "ddp", 1e-3)
    loss, exact = (runs.rows_of(run)[0]["loss"] for run in (home / "ddp", folder / system / "whole"))
    assert loss != exact


def test_layouts_have_identities_to_learn_and_pictures_to_show(folder, found):
    """Of each update one process has nobody to recognise; pictures are drawn by parts of the network by themselves."""
    rows = [row for row in runs.rows_of(folder / "layout_flux/straight") if "loss" in row]
    assert sum("loss/dino_identity" in row for row in rows) >= 3
    names = {path.name for path in (folder / "layout_flux/whole/samples/inference").iterdir()}
    assert "predicted-000006.png" in names
    for name in names:
        whole, sharded = (
            np.asarray(Image.open(folder / "layout_flux" / run / "samples/inference" / name), dtype=float)
            for run in ("whole", "straight")
        )
        assert np.abs(whole - sharded).max() <= 1, name


def test_layouts_on_two_ranks_have_different_noise_and_equal_weights(found):
    for run in ("whole", "straight"):
        first, second = (rank[f"layout_flux/{run}"] for rank in found)
        assert first["weights"] == second["weights"]
        assert len(set(first["noise"] + second["noise"])) == 12


def test_a_stage_of_layouts_goes_on_from_a_sharded_one(folder, found):
    """Whose checkpoints are shares, and whose base was trained sharded and exported whole."""
    stage1 = stored(folder / "layout_flux/stage1/checkpoint-2")
    given = {name: value for name, value in stage1.items() if name.startswith("ema/")}
    exported = load_adapter(folder / "layout_flux/stage1")
    assert given.keys() == {f"ema/{name}" for name in exported.state_dict()}
    for run in ("whole", "straight"):
        assert found[0][f"layout_flux/{run}"]["begun"] == digest(given)
    base = stored(folder / "layout_flux/base/checkpoint-2")
    transformer = FluxPipeline.from_pretrained(folder / "layout_flux/base").transformer
    for name, value in transformer.state_dict().items():
        assert torch.equal(value, base[f"ema/{name}"]), name


# ---- 2: another number of processes ----


def test_two_processes_then_one_then_two_lose_nothing(folder, found):
    """State as loaded is state as saved, bit for bit, and the samples are those of one stream."""
    first, second = found
    assert [kind for kind, _, _ in first["changes"]] == ["sharded", "alone", "alone", "sharded", "sharded"]
    for _, count, differing in first["changes"] + second["changes"]:
        assert (count, differing) == (first["changes"][0][1], [])
    of_step = lambda rank, step: [i for s, indices in rank["seen"] if s == step for i in indices]  # noqa: E731
    seen = [i for step in range(6) for rank in (first, second) for i in of_step(rank, step)]
    assert [len(of_step(second, step)) for step in range(6)] == [4, 4, 0, 0, 4, 4]
    assert seen == DataOrder(24, seed=0).keys(0, 40)


# ---- 3: not finite on one rank ----


def test_a_nan_on_one_rank_stops_both_before_the_update(found):
    for rank in found:
        stopped = rank["stop"]
        assert stopped["code"] == 3
        assert stopped["weights"][0] != stopped["weights"][1] == stopped["weights"][2]
        assert stopped["checkpoints"] == []


def test_a_nan_on_one_rank_is_skipped_by_both(found):
    for rank in found:
        skipped = rank["skip"]
        assert skipped["code"] == 0
        assert len(skipped["weights"]) == 5
        assert skipped["weights"][1] == skipped["weights"][2]
        assert len(set(skipped["weights"])) == 4


# ---- 4: an adapter ----


def test_an_adapter_trains_as_it_does_whole(folder, found):
    """The average as teacher between forward and backward pass, in validation and in the export."""
    home = folder / "adapter"
    assert_rows_agree(home / "straight", home / "whole", 1e-6)
    rows = runs.rows_of(home / "straight")
    assert rows[0]["teacher"] != rows[-2]["teacher"]
    assert [row["step"] for row in rows if "validation/error" in row] == [2, 4, 6]
    whole, sharded = (Adapter.from_pretrained(home / name).state_dict() for name in ("whole", "straight"))
    average, weights = stored(home / "straight/checkpoint-6"), stored(home / "whole/checkpoint-6")
    for name, value in whole.items():
        torch.testing.assert_close(sharded[name], value, rtol=0, atol=1e-6, msg=name)
        assert torch.equal(sharded[name], average[f"ema/{name}"])
        assert not torch.equal(average[f"ema/{name}"], average[f"model/{name}"])
        torch.testing.assert_close(average[f"model/{name}"], weights[f"model/{name}"], rtol=0, atol=1e-5)


def test_a_checkpoint_of_an_adapter_holds_the_adapter_only(folder, found):
    names = set(Adapter().state_dict())
    for run in ("whole", "straight"):
        held = stored(folder / "adapter" / run / "checkpoint-6")
        for part in ("model", "ema"):
            assert {name.removeprefix(f"{part}/") for name in held if name.startswith(f"{part}/")} == names
        moments = {f"optimizer/{name}/{key}" for name in names for key in ("exp_avg", "exp_avg_sq", "step")}
        assert {name for name in held if name.startswith("optimizer/")} == moments
    for rank in found:
        for run in ("whole", "straight", "broken", "kept"):
            assert (rank[f"adapter/{run}"]["frozen"], rank[f"adapter/{run}"]["changed"]) == (8, [])


def test_an_adapter_resumes_where_it_stopped(folder, found):
    straight, broken = (folder / "adapter" / name for name in ("straight", "broken"))
    assert runs.differing(*(runs.tensors_of(run / "checkpoint-6") for run in (straight, broken))) == []
    assert runs.rows_of(straight) == runs.rows_of(broken)


def test_the_base_is_never_gathered_whole(found):
    """At most one block while it is used (two in the backward pass, which looks ahead), and none after."""
    for rank in found:
        assert rank["adapter/whole"]["notes"]["forward"] == 4  # the notes are right: not sharded, all blocks are whole
        for run in ("straight", "broken"):
            notes = rank[f"adapter/{run}"]["notes"]
            assert notes["forward"] == 1
            assert 1 <= notes["backward"] <= 2
            assert all(rank[f"adapter/{run}"]["shards"])


def test_blocks_that_stay_gathered_change_nothing(folder, found):
    """`fsdp_reshard_after_forward: false`: the average takes their place all the same, and they can be saved."""
    assert found[0]["adapter/kept"]["notes"]["forward"] == 4
    straight, kept = (folder / "adapter" / name for name in ("straight", "kept"))
    assert runs.differing(*(runs.tensors_of(run / "checkpoint-6") for run in (straight, kept))) == []
    assert runs.rows_of(straight) == runs.rows_of(kept)
    live = folder / "no-average/checkpoint-2"  # saved just after a validation that gathered the live weights
    assert len(list(live.glob("model-*-of-00002.safetensors"))) == 2
    assert checkpoints.verify(live) == []


# ---- 5: float16 ----


def test_an_overflow_on_one_rank_halves_the_scale_of_both(found):
    for rank in found:
        weights = [state[0] for state in rank["fp16"]["states"]]
        scales = [state[1]["value"] for state in rank["fp16"]["states"]]
        assert scales == [2.0 ** (16 - min(step, OVERFLOWS)) for step in range(8)]
        assert len(set(weights[: OVERFLOWS + 1])) == 1  # before the first update, and before the first sound one
        assert len(set(weights)) == 3
        assert rank["fp16"]["failures"] == 0
    assert found[0]["fp16"] == found[1]["fp16"]


def test_a_nan_under_a_loss_scale_is_a_failure(found):
    assert [rank["fp16"]["nan"] for rank in found] == [3, 3]


def test_float16_resumes_where_it_stopped_scale_included(folder, found):
    straight, broken = (folder / "fp16" / name / "checkpoint-8" for name in ("straight", "broken"))
    assert runs.differing(runs.tensors_of(straight), runs.tensors_of(broken)) == []
    scales = [json.loads((c / "run_state.json").read_text())["loss_scale"] for c in (straight, broken)]
    assert scales == [{"value": 2048.0, "tracker": 3}] * 2


# ---- 6: launch files that cannot run as asked ----


@pytest.mark.parametrize(
    ("asked", "problem"),
    [({"version": 2}, "FSDP needs at least two processes"), ({"version": 1}, "set fsdp_version: 2")],
)
def test_a_launch_that_cannot_run_as_asked_is_refused(tmp_path, asked, problem):
    result = launch(tmp_path, "trainers/train_shortcut.py", *runs.command_line(tmp_path / "run"), processes=1, **asked)
    assert "failed (exitcode: 2)" in result.stderr  # of the script; the launcher's own is 1
    assert re.search(f"^refused: .*{problem}", result.stderr, re.MULTILINE)
    assert not (tmp_path / "run").exists()
