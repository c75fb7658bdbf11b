"""Where `tensorboard --logdir runs/logs` finds each run by its stage and the time it was started."""

from __future__ import annotations

import os
from datetime import datetime, timedelta
from pathlib import Path


def link_logs(logging_dir: Path, stage: str, run_dir: Path, now: datetime) -> Path:
    """A folder `stage<N>_YYYYMMDD_HHMMSS` that is the log of a run; a run that goes on keeps the one it has.

    Args:
        logging_dir: made if it is not there.
        stage: `1`, `2`, `3` or `base`.
        run_dir: its `tensorboard` is meant, which need not exist yet.

    Raises:
        OSError: no link can be made there.
    """
    logging_dir.mkdir(parents=True, exist_ok=True)
    name, target = f"stage{stage}_" if stage != "base" else "base_", (run_dir / "tensorboard").resolve()
    for link in sorted(logging_dir.glob(f"{name}*")):
        if link.is_symlink() and link.resolve() == target:
            return link
    link = logging_dir / f"{name}{now:%Y%m%d_%H%M%S}"
    while os.path.lexists(link):  # another run of that second
        now += timedelta(seconds=1)
        link = logging_dir / f"{name}{now:%Y%m%d_%H%M%S}"
    link.symlink_to(os.path.relpath(target, logging_dir.resolve()), target_is_directory=True)
    return link
