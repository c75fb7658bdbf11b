"""A new system adds folders and files and changes no shared one: tests/toy, added to a copy of this tree."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import runs

TOY = runs.ROOT / "tests/toy"
OF_THIS_TEST = ("conftest.py", "README.md")
COPIED = ("*.py", "*.cfg", "*.toml", "*.yaml")


def files_below(folder: Path) -> set[Path]:
    return {
        path.relative_to(folder) for path in folder.rglob("*") if path.is_file() and "__pycache__" not in path.parts
    }


@pytest.fixture(scope="module")
def copy(tmp_path_factory) -> Path:
    """What git tracks of this tree that Python needs, and the toy system in its places."""
    target = tmp_path_factory.mktemp("copy")
    listed = subprocess.run(
        ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard", *COPIED],
        cwd=runs.ROOT,
        capture_output=True,
        text=True,
        check=True,
    )
    names = [Path(name) for name in listed.stdout.split("\0") if name and not name.startswith("tests/toy/")]
    toy = [name for name in files_below(TOY) if str(name) not in OF_THIS_TEST]
    for source, chosen in ((runs.ROOT, names), (TOY, toy)):
        for name in filter(lambda name: (source / name).is_file(), chosen):
            (target / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(source / name, target / name)
    return target


def test_no_shared_file_changes():
    """Nothing of the toy stands where the repository has a file."""
    assert sorted(str(name) for name in files_below(TOY) if (runs.ROOT / name).exists()) == ["README.md"]


def test_the_house_takes_in_a_new_system(copy):
    """The rules of the house, every configuration, every program's help and the system's own tests, in the copy."""
    own = [str(name) for name in sorted(files_below(TOY)) if name.name.startswith("test_")]
    configurations = "tests/backlot/test_config.py::test_every_configuration_loads_with_its_script"
    # how long the scripts of this tree are is no matter of the new one
    lengths = "tests/test_architecture.py::test_scripts_stay_short[trainers/{}]"
    others = [f"--deselect={lengths.format(path.name)}" for path in (runs.ROOT / "trainers").glob("train_*.py")]
    command = [sys.executable, "-m", "pytest", "-vv", "-p", "no:cacheprovider", *others]
    command += ["tests/test_architecture.py", "tests/test_programs.py", configurations, *own]
    settings = {"PYTHONPATH": str(copy), "OMP_NUM_THREADS": "1", "PYTHONDONTWRITEBYTECODE": "1"}
    result = subprocess.run(
        command, cwd=copy, env=os.environ | settings, capture_output=True, text=True, timeout=280, check=False
    )
    assert result.returncode == 0, result.stdout + result.stderr
    for part in ("trainers/train_point_flow.py", "point_flow/tiny", "data_prep.points synth", "evaluation.point_flow"):
        assert part in result.stdout, part  # the house's own tests saw the new system
