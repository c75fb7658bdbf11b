"""A run's folder: one process at a time, what it was started with, and the pipeline at its end."""

from __future__ import annotations

import importlib.metadata
import platform
import shutil
import subprocess
from pathlib import Path
from typing import IO

from diffusers import DiffusionPipeline, ModelMixin

from backlot.command_line import EXIT_INPUT, leave
from backlot.config import dump_config
from backlot.files import LockedError, lock, write_json
from trainers.common.checkpoints import list_checkpoints
from trainers.common.config import RunConfig

PACKAGES = ("torch", "accelerate", "diffusers", "transformers", "safetensors", "numpy")


def refuse_to_overwrite(run_dir: Path, resume: str | None) -> None:
    """Stop before a run meets checkpoints in its folder that it was not told to continue."""
    continues = resume in ("latest", "auto") or (
        resume is not None and Path(resume).resolve().parent == run_dir.resolve()
    )
    if not continues and list_checkpoints(run_dir):
        raise leave(
            EXIT_INPUT,
            f"{run_dir} holds checkpoints: add --resume_from_checkpoint latest, or choose another --output_dir",
        )


def claim(run_dir: Path) -> IO[str]:
    """The folder's lock, for this process alone."""
    try:
        return lock(run_dir / "lock")
    except LockedError as error:
        raise leave(EXIT_INPUT, f"{run_dir} is in use by process {error}") from None


def write_description(run_dir: Path, config: RunConfig, num_processes: int, device: str) -> None:
    """config.yaml (loadable again) and environment.json (versions and commit)."""
    (run_dir / "config.yaml").write_text(dump_config(config), encoding="utf-8")
    git = subprocess.run(
        ["git", "describe", "--always", "--dirty", "--abbrev=40"],
        cwd=Path(__file__).parent,
        capture_output=True,
        text=True,
        check=False,
    )
    write_json(
        run_dir / "environment.json",
        {
            "python": platform.python_version(),
            "packages": {name: importlib.metadata.version(name) for name in PACKAGES},
            "git_commit": git.stdout.strip() or None,
            "num_processes": num_processes,
            "device": device,
        },
    )


def export_pipeline(run_dir: Path, pipeline: DiffusionPipeline | ModelMixin) -> None:
    """Put the pipeline into the run folder. `model_index.json` comes last: without it the folder is no pipeline."""
    temporary = run_dir / "export.tmp"
    shutil.rmtree(temporary, ignore_errors=True)
    pipeline.save_pretrained(temporary)
    (run_dir / "model_index.json").unlink(missing_ok=True)
    for source in sorted(temporary.iterdir(), key=lambda path: path.name == "model_index.json"):
        target = run_dir / source.name
        if target.is_dir():
            shutil.rmtree(target)
        source.rename(target)
    temporary.rmdir()
