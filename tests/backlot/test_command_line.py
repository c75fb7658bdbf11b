"""The grammar of every program: settings from arguments, and what is said where they are wrong."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal, Self

import pytest
from pydantic import Field, model_validator

from backlot import command_line
from backlot.command_line import Positional, parse, run_command
from backlot.config import Section


class Example(Section):
    folder: Annotated[Path, Positional]
    """what is read; 100 % of it"""
    name: str
    """of the output"""
    steps: tuple[Annotated[int, Field(ge=1)], ...] = (1, 4)
    """counts"""
    limits: tuple[float, float] = (0.0, 1.0)
    """least and greatest"""
    kind: Literal["plain", "striped"] = "plain"
    """of the pattern"""
    bits: Literal[8, 16] = 8
    """of a pixel"""
    rate: float | None = Field(0.5, gt=0, le=1)
    """share"""
    flip: bool = True
    """also mirrored"""
    overwrite: bool = False
    """what is there"""

    @model_validator(mode="after")
    def _ordered(self) -> Self:
        if self.limits[0] > self.limits[1]:
            raise ValueError("--limits takes LOW <= HIGH")
        return self


def read(*argv: str) -> Example:
    return parse(Example, list(argv), "python -m example", "An example.\n\n    python -m example DIR\n\nIts 5 %.")


def refused(capsys, *argv: str) -> list[str]:
    """The lines on stderr; exit code 2."""
    with pytest.raises(SystemExit) as stopped:
        read(*argv)
    assert stopped.value.code == 2
    return capsys.readouterr().err.splitlines()


def test_every_kind_of_setting():
    assert read("here", "--name", "x") == Example(folder=Path("here"), name="x")
    given = read(
        *("--name=x", "--steps", "1", "2", "8", "--limits", "-1.5", "2e3", "--kind=striped", "--bits", "16"),
        *("--rate", "null", "--no_flip", "--overwrite", "here"),
    )
    expected = {"steps": (1, 2, 8), "limits": (-1.5, 2000.0), "kind": "striped", "bits": 16, "rate": None}
    assert given == Example(folder=Path("here"), name="x", **expected, flip=False, overwrite=True)
    assert read("here", "--name", "x", "--rate", "1e-4", "--steps=3").steps == (3,)
    assert read("here", "--name", "x", "--no_flip", "--flip").flip  # the last one wins


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        ("--steps 4 0", "--steps 0: input should be greater than or equal to 1"),
        ("--steps many", "--steps many: input should be a valid integer, unable to parse string as an integer"),
        ("--steps", "--steps: expected at least one argument"),
        ("--limits 1", "--limits: expected 2 arguments"),
        ("--limits 2 1", "--limits takes LOW <= HIGH"),
        ("--limits 0 inf", "--limits inf: input should be a finite number"),
        ("--kind dotted", "--kind dotted: input should be 'plain' or 'striped'"),
        ("--bits 9", "--bits 9: input should be 8 or 16"),
        ("--rate 2", "--rate 2: input should be less than or equal to 1"),
        ("--name", "--name: expected one argument"),
        ("--overwrite=yes", "--overwrite: ignored explicit argument 'yes'"),
        ("--overwirte", "unknown key --overwirte; did you mean --overwrite?"),
        ("--over", "unknown key --over; did you mean --overwrite?"),
        ("--stepz=3", "unknown key --stepz; did you mean --steps?"),
        ("--banana split", "unknown key --banana"),
        ("-x", "unknown key -x"),
        ("there", "unexpected argument 'there'"),
    ],
)
def test_each_problem_has_one_line(capsys, arguments, line):
    assert refused(capsys, "here", "--name", "x", *arguments.split()) == [f"error: {line}"]


def test_all_problems_are_named_at_once(capsys):
    assert refused(capsys, "--rate", "0", "--setps=2", "--bits", "9") == [
        "error: unknown key --setps; did you mean --steps?",
        "error: FOLDER is required",
        "error: --name is required",
        "error: --bits 9: input should be 8 or 16",
        "error: --rate 0: input should be greater than 0",
    ]


def test_help_tells_what_is_needed_and_what_is_default(capsys):
    with pytest.raises(SystemExit) as stopped:
        read("--rate", "wrong", "--help")
    assert stopped.value.code == 0
    text = capsys.readouterr().out
    assert " --name NAME " in text.partition("options:")[0]  # without brackets: it must be given
    assert "\n    python -m example DIR\n" in text
    assert "Its 5 %.\n" in text
    for line in ("what is read; 100 % of it", "counts [1 4]", "--kind {plain,striped}", "share [0.5]", "--no_flip"):
        assert line in text


def greet(argv: list[str]) -> None:
    print("hello", *argv)


def test_commands_are_handed_over(capsys, monkeypatch):
    monkeypatch.setattr(command_line, "greet", greet, raising=False)
    commands = {"greet": ("backlot.command_line:greet", "say hello"), "part": ("no.such.module:main", "never loaded")}
    run_command(commands, "example", ["greet", "you", "--help"])
    assert capsys.readouterr().out == "hello you --help\n"
    run_command(commands, "example", ["--help"])
    assert "python -m example greet     say hello\n" in capsys.readouterr().out
    for argv, line in (
        ([], "a command is missing; the commands are greet, part"),
        (["great"], "unknown command 'great'; did you mean greet?; the commands are greet, part"),
    ):
        with pytest.raises(SystemExit, match="2"):
            run_command(commands, "example", argv)
        assert capsys.readouterr().err == f"error: {line}\n"
