"""Every program but the training scripts: help, what is said to an unknown key, and how soon."""

from __future__ import annotations

import importlib
import subprocess
import sys
from typing import get_args

import pytest
import runs


def find_programs(*folders: str) -> list[str]:
    """What `python -m` runs, by what stands at its end; with its commands where it has some."""
    programs = []
    for file in sorted(file for folder in folders for file in (runs.ROOT / folder).rglob("*.py")):
        if 'if __name__ == "__main__":' in file.read_text():
            name = ".".join(file.relative_to(runs.ROOT).with_suffix("").parts)
            commands = getattr(importlib.import_module(name), "COMMANDS", {}) if name.endswith("__main__") else {}
            name = name.removesuffix(".__main__")
            programs += [name, *(f"{name} {command}" for command in commands)]
    return programs


LIGHT = find_programs("data_prep", "evaluation", "pipelines")
HEAVY = find_programs("benchmarks", "demos")
WITH_COMMANDS = {program.split()[0] for program in LIGHT if " " in program}


@pytest.fixture(autouse=True)
def _quiet_libraries(monkeypatch):
    """transformers warns through a handler that the test which loaded it first has closed."""
    monkeypatch.setenv("TRANSFORMERS_VERBOSITY", "error")
    if "transformers" in sys.modules:
        from transformers.utils import logging

        before = logging.get_verbosity()
        logging.set_verbosity_error()
        yield
        logging.set_verbosity(before)
    else:
        yield


def run(program: str, *arguments: str) -> int:
    """A program in this process; its exit code."""
    name, *command = program.split()
    package = (runs.ROOT / name.replace(".", "/")).is_dir()
    module = importlib.import_module(f"{name}.__main__" if package else name)
    try:
        module.main([*command, *arguments])
    except SystemExit as stopped:
        return stopped.code or 0
    return 0


def test_programs_are_found():
    assert {"data_prep.scenes encode", "evaluation.shortcut", "pipelines.shadow_sdxl.generate"} <= set(LIGHT)
    assert {"demos.scene", "benchmarks.loop_overhead"} <= set(HEAVY)


@pytest.mark.parametrize("program", [*LIGHT, *HEAVY])
def test_help(program, capsys):
    assert run(program, "--help") == 0
    printed = capsys.readouterr()
    assert f"python -m {program.replace('glb', 'build')}" in printed.out
    assert printed.err == ""


@pytest.mark.parametrize("program", [program for program in [*LIGHT, *HEAVY] if program not in WITH_COMMANDS])
def test_an_unknown_key_is_one_line_and_exit_code_2(program, capsys, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    assert run(program, "--bananas", "7") == 2
    printed = capsys.readouterr()
    lines = printed.err.splitlines()
    assert lines[0] == "error: unknown key --bananas"
    assert all(line.endswith(" is required") or "give --data" in line for line in lines[1:])
    assert (printed.out, list(tmp_path.iterdir())) == ("", [])


def test_help_is_given_without_torch():
    code = "import sys, test_programs\nfor program in test_programs.LIGHT: test_programs.run(program, '--help')\n"
    code += "print([name for name in ('torch', 'diffusers', 'trimesh', 'mitsuba', 'gradio') if name in sys.modules])"
    path = {"PYTHONPATH": f"{runs.ROOT}:{runs.ROOT / 'tests'}"}
    result = subprocess.run(
        [sys.executable, "-c", code], cwd=runs.ROOT, env=path, capture_output=True, text=True, check=True
    )
    assert result.stdout.endswith("\n[]\n")


def test_what_settings_repeat_is_what_the_libraries_say():
    """Settings load without torch, so they write down again what modules that need it hold."""
    from data_prep.images.dataset import DATASET_NAMES
    from data_prep.scenes import format as scenes
    from data_prep.scenes.commands import Split
    from data_prep.shadows import commands as shadow_commands
    from data_prep.shadows import dataset as shadows
    from evaluation.shadow_sdxl.metrics import HAZE
    from evaluation.shadow_sdxl.settings import Settings as ShadowSettings
    from evaluation.shortcut.settings import Settings as ImageSettings
    from evaluation.shortcut_scene.measure import STEPS
    from evaluation.shortcut_scene.settings import Settings as SceneSettings
    from pipelines.shadow_sdxl.generate import Settings as GenerateSettings
    from pipelines.shadow_sdxl.light import LIGHT_RANGES

    def choices(settings: type, name: str) -> tuple:
        return get_args(settings.model_fields[name].annotation)

    assert choices(ImageSettings, "dataset_name") == DATASET_NAMES
    assert choices(ShadowSettings, "split") == choices(shadow_commands.Encode, "split") == shadows.SPLITS
    assert choices(SceneSettings, "split") == get_args(Split) == scenes.SPLITS
    assert shadow_commands.Encode.model_fields["fill"].default == shadows.FILL
    assert ShadowSettings.model_fields["haze"].default == HAZE
    assert SceneSettings.model_fields["steps"].default == STEPS
    for name in ("theta", "size"):
        low, high = LIGHT_RANGES[name]
        for value, allowed in ((low, True), (high, True), (low - 0.1, False), (high + 0.1, False)):
            settings = {"model_dir": "x", "image": "x", "output": "x.png", name: (value,)}
            if allowed:
                GenerateSettings(**settings)
            else:
                with pytest.raises(ValueError, match=name):
                    GenerateSettings(**settings)
