"""Which checkpoint a run continues, and whether it may."""

from __future__ import annotations

import json
from pathlib import Path

from backlot.config import Settings
from trainers.common import checkpoints
from trainers.common.config import IDENTITY, RunConfig
from trainers.common.saving import STATE_NAME


def choose_checkpoint(run_dir: Path, wanted: str) -> tuple[Path | None, str | None]:
    """The checkpoint that `resume_from_checkpoint` names, or what is wrong with it.

    None and no problem: `auto` in a folder without checkpoints.
    """
    if wanted in ("latest", "auto"):
        found = checkpoints.find_latest(run_dir)
        # `auto` starts afresh only where there is nothing at all: a folder of damaged checkpoints is an error.
        lacks = found is None and (wanted == "latest" or bool(checkpoints.list_checkpoints(run_dir)))
        return found, f"no intact checkpoint in {run_dir}" if lacks else None
    checkpoint = Path(wanted)
    problems = checkpoints.verify(checkpoint) if checkpoint.is_dir() else ["no such folder"]
    if problems:
        return None, f"cannot resume from {checkpoint}: {'; '.join(problems)}"
    if checkpoint.resolve().parent == run_dir.resolve():
        newest = checkpoints.find_latest(run_dir)
        if newest is not None and checkpoints.step_of(newest) > checkpoints.step_of(checkpoint):
            return None, f"{newest} is newer than {checkpoint}: continue an older one in another --output_dir"
    return checkpoint, None


def read_state(checkpoint: Path, config: RunConfig, identity: dict) -> dict:
    """run_state.json of a verified checkpoint; ValueError names what makes this run another experiment."""
    state = json.loads((checkpoint / STATE_NAME).read_text(encoding="utf-8"))
    allowed = set(config.training.resume_with_changes)
    differences = config.differences(state["config"])
    if "training.seed" in allowed or any(line.startswith("training.seed:") for line in differences):
        allowed.add("seed")  # that of the order; allowed, or refused, once
    for key, now in identity.items():
        then = state[key]
        if then != now and key not in allowed and None not in (then, now):
            differences.append(f"{key} ({IDENTITY[key]}): {then!r} then, {now!r} now")
    if differences:
        raise ValueError(
            f"this is another experiment ({'; '.join(differences)}): start a new run, or allow a change with "
            "--training.resume_with_changes"
        )
    return state


def describe_state(state: dict, optimizer_values: dict, config: Settings) -> dict:
    """run_state.json."""
    return state | {"optimizer": optimizer_values, "config": config.model_dump(mode="json")}


def best_of(rows: list[dict], step: int) -> dict[str, float]:
    """The first row with the highest score up to a step: what best.json says, also where that is lost."""
    best: dict[str, float] = {}
    for row in rows:
        for key, score in row.items():
            if key.endswith("/score") and row["step"] <= step and score > best.get("score", float("-inf")):
                best = {"step": row["step"], "score": score}
    return best
