"""Prepared layouts for tests: a few drawn scenes of 32 pixels, encoded by tiny models; and a run's way to them."""

from __future__ import annotations

from pathlib import Path

from data_prep.layouts.commands import prepare


def write_data(folder: Path, num_samples: int = 14, *others: str) -> Path:
    """Prepare scenes in `folder`; returns the folder of the models that encoded them."""
    given = ["--profile", "demo", "--models", "tiny", "--num_samples", str(num_samples), "--train_split", "0.72"]
    prepare([*given, "--device", "cpu", "--output_dir", str(folder), *others])
    return folder / "models"


def locations(data: Path, base: Path | None) -> list[str]:
    """Arguments of train_layout_flux: the data of `write_data` and their models; a base, None where it is trained."""
    models = data / "models"
    given = [f"--model.pretrained_model_name_or_path={base or models}", f"--data.output_dir={data}"]
    return [*given, f"--dino.encoder={models / 'dino'}", f"--dino.decoder={models / 'taesd'}"]
