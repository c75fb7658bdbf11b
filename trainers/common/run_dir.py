"""A run's folder: one process at a time, what it was started with, how it ended, and the pipeline at its end."""

from __future__ import annotations

import atexit
import importlib.metadata
import json
import logging
import os
import platform
import subprocess
import sys
import time
from pathlib import Path
from types import TracebackType

from diffusers import DiffusionPipeline, ModelMixin

from backlot import command_line
from backlot.command_line import EXIT_CRASH, EXIT_INPUT, leave
from backlot.config import dump_config
from backlot.files import LockedError, lock, write_file, write_json
from trainers.common.checkpoints import discard, list_checkpoints
from trainers.common.config import RunConfig
from trainers.common.processes import Processes

PACKAGES = ("torch", "accelerate", "diffusers", "transformers", "safetensors", "numpy")
SECONDS_FOR_THE_LAST = 120
"""How long a resubmitted run waits for the one that is just ending."""
EXIT_NAME = "exit.json"
OWN_FILES = {
    "config.yaml",
    "environment.json",
    "metrics.jsonl",
    "quarantine.jsonl",
    "tracking.json",
    "best.json",
    EXIT_NAME,
    "lock",
    "samples",
    "tensorboard",
    "wandb",
}
LOGS = (".log", ".out", ".err", ".txt", ".tmp")
logger = logging.getLogger(__name__)


class RunFolder:
    """The folder of a run, claimed by its main process from now until it ends.

    Args:
        config: `training.output_dir` names it.
        processes: the main one claims; the others wait for it.
    """

    def __init__(self, config: RunConfig, processes: Processes):
        self.path, self.is_main = config.training.output_dir, processes.is_main
        self._lock = None
        if self.is_main:
            waits = config.training.resume_from_checkpoint in ("auto", "latest")
            self._lock = self._claim(SECONDS_FOR_THE_LAST if waits else 0)
            self.check(config)  # the one that has just ended may have left something
            (self.path / EXIT_NAME).unlink(missing_ok=True)
            atexit.register(self._at_exit)
        else:
            self._excepthook, sys.excepthook = sys.excepthook, self._on_crash
        processes.wait()

    @staticmethod
    def check(config: RunConfig) -> None:
        """Refuse a folder in which this run would overwrite something (exit code 2)."""
        folder, resume = config.training.output_dir, config.training.resume_from_checkpoint
        if not os.path.lexists(folder):
            return
        if not folder.is_dir():
            raise leave(EXIT_INPUT, f"{folder} is no folder: choose another --output_dir")
        continues = resume in ("latest", "auto") or (
            resume is not None and Path(resume).resolve().parent == folder.resolve()
        )
        found = list_checkpoints(folder)
        if found and not continues:
            raise leave(
                EXIT_INPUT,
                f"{folder} holds checkpoints: add --resume_from_checkpoint latest, or choose another --output_dir",
            )
        if not found:
            foreign = sorted(path.name for path in folder.iterdir() if not _is_own(path))
            if foreign:
                raise leave(
                    EXIT_INPUT,
                    f"{folder} holds {foreign[0]!r}, which a run would overwrite or mix with its own: "
                    "choose an empty or new --output_dir",
                )

    def _claim(self, seconds: float):
        give_up = time.monotonic() + seconds
        while True:
            try:
                return lock(self.path / "lock")
            except LockedError as error:
                if time.monotonic() >= give_up:
                    raise leave(EXIT_INPUT, f"{self.path} is in use by process {error}") from None
                time.sleep(0.2)
            except OSError as error:
                raise leave(EXIT_INPUT, f"{self.path} cannot be written: {error}") from error

    def describe(self, config: RunConfig, num_processes: int, device: str) -> None:
        """config.yaml (loadable again) and environment.json (versions and commit)."""
        write_file(self.path / "config.yaml", dump_config(config))
        write_json(
            self.path / "environment.json",
            {
                "python": platform.python_version(),
                "packages": {name: importlib.metadata.version(name) for name in PACKAGES},
                "git_commit": _commit(),
                "num_processes": num_processes,
                "device": device,
            },
        )

    def write_exit(self, code: int) -> None:
        """Say how the run ended: launchers return 1 for every code but 0. A crash of any process is never made good."""
        path = self.path / EXIT_NAME
        try:
            if not (path.exists() and path.read_text().strip() == json.dumps({"code": EXIT_CRASH})):
                write_file(path, json.dumps({"code": code}) + "\n")
        except OSError as error:  # a full disk must not hide why the run ends
            logger.warning("%s could not be written: %s", path, error)

    def _at_exit(self) -> None:
        """An end that the run did not see coming: refused by the script, or an exception."""
        if self.path.is_dir() and self._lock is not None:
            self.write_exit(EXIT_CRASH if command_line.left_with is None else command_line.left_with)

    def _on_crash(self, kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
        """An exception of another process than the main one, which would take its going for a stop."""
        if self.path.is_dir():
            self.write_exit(EXIT_CRASH)
        self._excepthook(kind, error, trace)

    def release(self) -> None:
        if not self.is_main:
            sys.excepthook = self._excepthook
        if self._lock is not None:
            atexit.unregister(self._at_exit)
            self._lock.close()
            self._lock = None


def _commit() -> str | None:
    """The commit of this code, if it lies in a checkout and there is a git."""
    command = ["git", "describe", "--always", "--dirty", "--abbrev=40"]
    try:
        git = subprocess.run(command, cwd=Path(__file__).parent, capture_output=True, text=True, check=False)
    except OSError:
        return None
    return git.stdout.strip() or None


def _is_own(path: Path) -> bool:
    """Whether an entry of a folder without checkpoints may be there when a run begins."""
    if path.name in OWN_FILES or path.suffix in LOGS or path.name.endswith(".deleted"):
        return path.name != "config.yaml" or (path.parent / "environment.json").exists()
    return False


def export_pipeline(run_dir: Path, pipeline: DiffusionPipeline | ModelMixin) -> None:
    """Put the pipeline into the run folder. `model_index.json` comes last: without it the folder is no pipeline."""
    temporary = run_dir / "export.tmp"
    discard(temporary)
    pipeline.save_pretrained(temporary)
    (run_dir / "model_index.json").unlink(missing_ok=True)
    for source in sorted(temporary.iterdir(), key=lambda path: path.name == "model_index.json"):
        target = run_dir / source.name
        discard(target)
        source.rename(target)
    temporary.rmdir()
