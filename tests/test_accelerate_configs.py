"""Every launch preset is one that Accelerate understands, says whom it is for, and needs nothing else to start."""

from __future__ import annotations

import os
import re
import subprocess
import sys

import pytest
import yaml
from accelerate.commands.config.config_args import load_config_from_file
from accelerate.commands.launch import _validate_launch_command, launch_command_parser
from accelerate.utils import launch
from runs import ROOT

FOLDER = ROOT / "accelerate_configs"
PRESETS = sorted(FOLDER.glob("*.yaml"))
README = (FOLDER / "README.md").read_text()
SHOW = """
import os, torch
from accelerate import Accelerator
several = int(os.environ.get("WORLD_SIZE", 1)) > 1
accelerator = Accelerator(cpu=several and not torch.cuda.is_available())
every = accelerator.gather(torch.tensor([accelerator.process_index])).tolist()
if accelerator.is_main_process:
    print(accelerator.distributed_type.value, accelerator.device.type, every, os.environ.get("ACCELERATE_USE_FSDP"))
accelerator.end_training()
"""


def requests(path, monkeypatch) -> dict[str, str]:
    """The environment in which `accelerate launch --config_file path` starts the script."""
    for name in [name for name in os.environ if name.startswith(("ACCELERATE_", "FSDP_"))]:
        monkeypatch.delenv(name)
    arguments = launch_command_parser().parse_args(["--config_file", str(path), "script.py"])
    arguments, defaults, _ = _validate_launch_command(arguments)
    arguments.main_process_port = 0
    if arguments.use_deepspeed:
        arguments.deepspeed_fields_from_accelerate_config = ",".join(defaults.deepspeed_config)
        return launch.prepare_deepspeed_cmd_env(arguments)[1]
    if arguments.multi_gpu or arguments.use_fsdp:
        return launch.prepare_multi_gpu_env(arguments)
    return launch.prepare_simple_launcher_cmd_env(arguments)[1]


@pytest.mark.parametrize("path", PRESETS, ids=lambda path: path.stem)
def test_a_preset_is_understood_and_described(path):
    preset = load_config_from_file(str(path))
    assert preset.num_processes >= 1
    assert preset.mixed_precision in ("no", "bf16", "fp16")
    assert f"`{path.name}`" in README
    assert path.read_text().startswith("# ")  # for which machine
    sizes = {int(number) for number in re.findall(r"x(\d+)_|_(\d)proc", path.stem) for number in number if number}
    assert preset.num_processes == max(sizes, default=1)


def test_the_table_names_no_file_that_is_not_there():
    assert sorted(set(re.findall(r"`(\w+\.yaml)`", README))) == [path.name for path in PRESETS]


@pytest.mark.parametrize("path", PRESETS, ids=lambda path: path.stem)
def test_what_a_preset_asks_of_the_trainer(path, monkeypatch):
    asked = requests(path, monkeypatch)
    assert asked["ACCELERATE_MIXED_PRECISION"] == load_config_from_file(str(path)).mixed_precision
    # ours is the one place for these: the launcher's would win in silence
    assert "ACCELERATE_GRADIENT_ACCUMULATION_STEPS" not in asked
    assert "ACCELERATE_GRADIENT_CLIPPING" not in asked
    assert asked.get("ACCELERATE_DYNAMO_BACKEND", "NO") == "NO"
    if "fsdp2" in path.stem:
        assert asked["ACCELERATE_USE_FSDP"] == "true"
        assert (asked["FSDP_VERSION"], asked["FSDP_RESHARD_AFTER_FORWARD"]) == ("2", "true")
        assert (asked["FSDP_AUTO_WRAP_POLICY"], asked["FSDP_STATE_DICT_TYPE"]) == (
            "TRANSFORMER_BASED_WRAP",
            "SHARDED_STATE_DICT",
        )
        assert "FSDP_TRANSFORMER_CLS_TO_WRAP" not in asked
        for feature in ("ACTIVATION_CHECKPOINTING", "OFFLOAD_PARAMS", "CPU_RAM_EFFICIENT_LOADING"):
            assert asked[f"FSDP_{feature}"] == "false"
    if "zero" in path.stem:
        assert asked["ACCELERATE_DEEPSPEED_ZERO_STAGE"] == path.stem[-1]
    if path.stem.startswith("cpu"):
        assert asked.get("ACCELERATE_USE_CPU") == "True" or asked["CUDA_VISIBLE_DEVICES"] == "-1,-1"
    else:
        assert asked.get("CUDA_VISIBLE_DEVICES") == os.environ.get("CUDA_VISIBLE_DEVICES")  # the cluster's choice


@pytest.mark.parametrize(("preset", "sharded"), [("cpu_2proc", "None"), ("cpu_2proc_fsdp2", "true")])
def test_two_processes_on_the_cpu_need_the_file_alone(tmp_path, preset, sharded):
    (tmp_path / "show.py").write_text(SHOW)
    command = [
        sys.executable,
        "-m",
        "accelerate.commands.launch",
        "-q",
        "--config_file",
        str(FOLDER / f"{preset}.yaml"),
    ]
    hidden = ("ACCELERATE_", "FSDP_", "OMP_")
    environment = {name: value for name, value in os.environ.items() if not name.startswith(hidden)}
    result = subprocess.run(
        [*command, str(tmp_path / "show.py")],
        env=environment,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert result.returncode == 0, result.stderr
    assert result.stdout.strip() == f"MULTI_CPU cpu [0, 1] {sharded}"


def test_the_memory_table_follows_its_formulas():
    rows = re.findall(r"^\| [^|]+ \| ([\d.]+) \| ([\d.]+) \|((?: [\d.]+ \|){5})$", README, re.MULTILINE)
    assert len(rows) == 5
    for trained, frozen, cells in rows:
        p, f = float(trained), float(frozen)
        one = 20 * p + 2 * f
        expected = [one, one / 8, one / 16, 8 * p + 16 * p / 8 + 2 * f, (20 * p + 2 * f) / 8]
        assert [float(cell) for cell in cells.split("|")[:-1]] == pytest.approx(expected, abs=0.051)


def test_presets_hold_no_key_that_is_given_twice():
    from backlot.config import _Loader

    for path in PRESETS:
        assert _Loader(path.read_text()).get_single_data() == yaml.safe_load(path.read_text())
