"""What the demos share: their settings, folders, commands and losses."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import yaml
from pydantic import Field

from backlot.command_line import fail, leave
from backlot.config import Section

ONE_CORE = os.environ | {"ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1"}


class DemoSettings(Section):
    max_train_steps: int | None = Field(None, ge=1)
    """updates; those of the configuration if left out"""


def planned_updates(config: Path) -> int:
    """What a configuration file says of `max_train_steps`."""
    return yaml.safe_load(config.read_text(encoding="utf-8"))["training"]["max_train_steps"]


def empty_folder(folder: Path, sign: str) -> None:
    """Remove an earlier demo; `fail` where `folder` holds something else.

    Args:
        sign: what an earlier demo has in its folder.
    """
    if folder.exists() and not (folder / sign).exists():
        fail(f"{folder} exists and is no earlier demo: choose another --output_dir")
    shutil.rmtree(folder, ignore_errors=True)


def train_on_two(script: str, config: Path, *arguments: str) -> None:
    """The command a user would give, on two processes; the exit code of a failure is passed on."""
    command = [sys.executable, "-m", "accelerate.commands.launch", "-q", "--main_process_port", "0"]
    command += ["--config_file", "accelerate_configs/cpu_2proc.yaml", f"trainers/{script}.py"]
    code = subprocess.run([*command, "--config", str(config), *arguments], env=ONE_CORE, check=False).returncode
    if code:
        raise child_failed(code, f"{script} failed, see above")


def child_failed(code: int, message: str) -> SystemExit:
    """The exit of a demo whose child ended with `code`; negative is a signal, told as a shell tells it."""
    return leave(code if code > 0 else 128 - code, message)


def read_rows(run_dir: Path, key: str = "loss") -> list[dict]:
    """The rows of a run's metrics.jsonl so far that hold `key`."""
    path = run_dir / "metrics.jsonl"
    lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
    rows = [json.loads(line) for line in lines if line.endswith("}")]  # the last line may be half written
    return [row for row in rows if key in row]


def read_curve(run_dir: Path, key: str = "loss") -> list[tuple[int, float]]:
    """Update and loss of each log interval but the first, which is that of a network that knows nothing."""
    return [(row["step"], row[key]) for row in read_rows(run_dir, key)][1:]


def write_metrics(output_dir: Path, metrics: dict) -> None:
    (output_dir / "metrics.json").write_text(json.dumps(metrics, indent=1) + "\n", encoding="utf-8")
