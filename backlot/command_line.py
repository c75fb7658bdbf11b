"""What every program shares: exit codes, errors of one line, and the grammar of arguments. Loads without torch."""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import NoReturn

EXIT_DONE = 0
EXIT_CRASH = 1
"""A fault of ours, with a traceback."""
EXIT_INPUT = 2
"""Arguments, configuration, data or a model are wrong; one line says what."""
EXIT_NONFINITE = 3
"""Values that are not finite ended a run."""
EXIT_RESUME = 75
"""A checkpoint is written (EX_TEMPFAIL): start the same command again."""
DTYPE_NAMES = ("float32", "bfloat16", "float16")
left_with: int | None = None
"""The code of the last `leave`: what is registered for the end of the process cannot see it otherwise."""


def leave(code: int, message: str) -> SystemExit:
    """An exit with one line on stderr: `raise leave(EXIT_INPUT, "...")`."""
    global left_with
    left_with = code
    print(message, file=sys.stderr, flush=True)
    return SystemExit(code)


def fail(message: str) -> NoReturn:
    """One line and exit code 2: an argument, or what it names, is wrong."""
    raise leave(EXIT_INPUT, f"error: {message}")


@contextmanager
def input_errors(what: str = "error") -> Iterator[None]:
    """Inside, an OSError, ValueError or ImportError is the input's fault: one line that begins with `what`, exit 2."""
    try:
        yield
    except (OSError, ValueError, ImportError) as error:
        raise leave(EXIT_INPUT, f"{what}: {' '.join(str(error).split())}") from error


class Parser(argparse.ArgumentParser):
    """Answers a wrong argument with one line; no abbreviations."""

    def __init__(self, **settings):
        super().__init__(**settings, allow_abbrev=False)

    def error(self, message: str) -> NoReturn:
        fail(message)


def number(kind: type, lowest: float, highest: float = math.inf) -> Callable[[str], int | float]:
    """An argparse type: a finite number in [lowest, highest]."""
    allowed = f"at least {lowest:g}" if highest == math.inf else f"in [{lowest:g}, {highest:g}]"

    def parse(text: str) -> int | float:
        value = kind(text)
        if not lowest <= value <= highest or abs(value) == math.inf:
            raise argparse.ArgumentTypeError(f"must be {allowed}, got {text}")
        return value

    parse.__name__ = kind.__name__  # argparse names it where the text is no number
    return parse


def run_command(commands: dict[str, tuple[str, str]], program: str, argv: list[str] | None = None) -> None:
    """`python -m PROGRAM COMMAND ...`: hand over to the `main(argv)` of the command's module.

    Args:
        commands: name -> (module, what it does); a module is imported when it is called.
    """
    import importlib

    argv = sys.argv[1:] if argv is None else list(argv)
    if argv and argv[0] in commands:
        importlib.import_module(commands[argv[0]][0]).main(argv[1:])
        return
    described = "\n".join(f"  python -m {program} {name:<9} {does}" for name, (_, does) in commands.items())
    if argv and argv[0] in ("-h", "--help"):
        print(described)
        return
    given = f"unknown command {argv[0]!r}" if argv else "a command is missing"
    fail(f"{given}; there are\n{described}")
