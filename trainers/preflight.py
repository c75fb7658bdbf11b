"""Try a run before it is sent off: configuration, model, data, an update, a checkpoint that loads again.

    python -m trainers.preflight trainers/train_vpog.py --config configs/vpog/tiny.yaml [--key value ...]

Starts the script with your configuration for one update in a folder that is thrown away, and once more from its
checkpoint for a second one. Prints a line per check; the first that fails has the script's own message, and its exit
code is the answer (2: your input is wrong, 3: not finite).
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
from pathlib import Path

from backlot.command_line import EXIT_CRASH, EXIT_DONE, fail, leave
from trainers.common import checkpoints

CHECKS = ("configuration", "model", "data", "update", "checkpoint")
SHORT = {
    "training.num_epochs": "null",
    "training.checkpointing_epochs": "null",
    "training.checkpointing_steps": "1",
    "training.lr_scheduler": "constant",
    "training.lr_warmup_steps": "0",
    "training.lr_decay_steps": "0",
    "training.logging_steps": "1",
    "training.report_to": "[]",
    "validation.validation_steps": "null",
}
"""What makes a run short without changing what it computes."""
MAX_LINES = 12


def run_script(script: Path, arguments: list[str], folder: Path, updates: int) -> subprocess.CompletedProcess:
    """The script with the user's arguments, for so many updates, continued from what is in the folder."""
    given = SHORT | {"training.output_dir": str(folder), "training.max_train_steps": str(updates)}
    given["training.resume_from_checkpoint"] = "auto"
    short = [part for key, value in given.items() for part in (f"--{key}", value)]
    return subprocess.run([sys.executable, str(script), *arguments, *short], capture_output=True, text=True)


def failed_check(message: str, folder: Path) -> str:
    """Which check a failure belongs to, by what the script said and how far it came."""
    said = message.strip().splitlines()[-1] if message.strip() else ""
    if message.startswith("configuration"):
        return "configuration"
    for name in ("model", "data"):
        if said.startswith(name):
            return name
    return "checkpoint" if (folder / "metrics.jsonl").is_file() else "update"


def report(passed: tuple[str, ...]) -> None:
    for name in passed:
        print(f"{name:>13}  ok", flush=True)


def preflight(script: Path, arguments: list[str], folder: Path) -> None:
    """Run the checks; SystemExit with the script's own code where one fails."""
    for updates in (1, 2):
        ended = run_script(script, arguments, folder, updates)
        if ended.returncode:
            failed = failed_check(ended.stderr, folder)
            report(CHECKS[: CHECKS.index(failed)])
            lines = ended.stderr.strip().splitlines()[-MAX_LINES:]
            code = ended.returncode if ended.returncode > 0 else 128 - ended.returncode
            raise leave(code, "\n".join([f"{failed:>13}  failed", *lines]))
        if (written := checkpoints.find_latest(folder)) is None or checkpoints.step_of(written) != updates:
            report(CHECKS[:-1])
            raise leave(EXIT_CRASH, f"{CHECKS[-1]:>13}  failed: none was written that verifies")
    report(CHECKS)


def main(argv: list[str] | None = None) -> int:
    argv = sys.argv[1:] if argv is None else list(argv)
    if not argv or argv[0] in ("-h", "--help"):
        print(__doc__)
        return EXIT_DONE
    script = Path(argv[0])
    if not (script.is_file() and script.name.startswith("train_") and script.suffix == ".py"):
        fail(f"{script} is no training script: trainers/train_<system>.py --config FILE")
    with tempfile.TemporaryDirectory(prefix="preflight-") as folder:
        preflight(script, argv[1:], Path(folder) / "run")
    return EXIT_DONE


if __name__ == "__main__":
    sys.exit(main())
