"""What every program shares: exit codes, errors of one line, and the grammar of arguments. Loads without torch."""

from __future__ import annotations

import argparse
import difflib
import inspect
import pkgutil
import sys
import types
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Literal, NoReturn, TypeVar, Union, get_args, get_origin

from pydantic import BaseModel, ValidationError
from pydantic.fields import FieldInfo

EXIT_DONE = 0
EXIT_CRASH = 1
"""A fault of ours, with a traceback."""
EXIT_INPUT = 2
"""Arguments, configuration, data or a model are wrong; one line says what."""
EXIT_NONFINITE = 3
"""Values that are not finite ended a run."""
EXIT_RESUME = 75
"""A checkpoint is written (EX_TEMPFAIL): start the same command again."""
DtypeName = Literal["float32", "bfloat16", "float16"]
DTYPE_NAMES = get_args(DtypeName)
left_with: int | None = None
"""The code of the last `leave`: what is registered for the end of the process cannot see it otherwise."""

S = TypeVar("S", bound=BaseModel)


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


class Positional:
    """Marks a setting that is given by its place: `folder: Annotated[Path, Positional]`."""


class Parser(argparse.ArgumentParser):
    """Answers a wrong argument with one line; no abbreviations."""

    def __init__(self, **settings):
        super().__init__(
            **settings,
            allow_abbrev=False,
            argument_default=argparse.SUPPRESS,
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )

    def error(self, message: str) -> NoReturn:
        fail(message.removeprefix("argument "))


def parse(settings_class: type[S], argv: list[str] | None, program: str, description: str) -> S:
    """The settings of a program from its arguments; --help is answered, and so is, with exit code 2, what is wrong.

    A setting is given as `--key value` or `--key=value`, a list as `--key 1 2 4`, a truth value as `--key` or, where it
    is true by default, `--no_key`, None as `null`. Each problem has a line on stderr: key, value and what is allowed.

    Args:
        settings_class: a `backlot.config.Section` without sections of its own.
        program: as it is started, for the usage.
    """
    argv = sys.argv[1:] if argv is None else list(argv)
    parser = Parser(prog=program, description=inspect.cleandoc(description))
    actions = [action for name, field in settings_class.model_fields.items() for action in _add(parser, name, field)]
    if {"-h", "--help"} & set(argv):
        parser.print_help()
        raise SystemExit(EXIT_DONE)
    for action in actions:
        action.required = False  # pydantic names what is missing, together with all that is wrong
    given, unknown = parser.parse_known_args(argv)
    values = {name: _read(value, settings_class.model_fields[name]) for name, value in vars(given).items()}
    flags = [flag for action in actions for flag in action.option_strings]
    problems = _explain_unknown(unknown, flags)
    try:
        settings = settings_class(**values)
    except ValidationError as error:
        problems += [_explain(detail, settings_class) for detail in error.errors()]
    if problems:
        raise leave(EXIT_INPUT, "\n".join(f"error: {problem}" for problem in problems))
    return settings


def run_command(commands: dict[str, tuple[str, str]], program: str, argv: list[str] | None = None) -> None:
    """`python -m PROGRAM COMMAND ...`: hand over to the function of a command.

    Args:
        commands: name -> (`module:function`, what it does); the module is imported when its command is called, and the
            function takes the arguments behind the command.
    """
    argv = sys.argv[1:] if argv is None else list(argv)
    if argv and argv[0] in commands:
        pkgutil.resolve_name(commands[argv[0]][0])(argv[1:])
        return
    described = "\n".join(f"  python -m {program} {name:<9} {does}" for name, (_, does) in commands.items())
    if argv and argv[0] in ("-h", "--help"):
        print(described)
        return
    hint = f"unknown command {argv[0]!r}{_suggest(argv[0], list(commands))}" if argv else "a command is missing"
    fail(f"{hint}; the commands are {', '.join(commands)}")


def _without_none(annotation: type) -> type:
    """`X` of `X | None`."""
    if get_origin(annotation) in (Union, types.UnionType):
        (annotation,) = (part for part in get_args(annotation) if part is not type(None))
    return annotation


def _add(parser: Parser, name: str, field: FieldInfo) -> list[argparse.Action]:
    """One setting as an argument; argparse only tells arguments apart, values are read by pydantic."""
    kind, required = _without_none(field.annotation), field.is_required()
    text = (field.description or "").replace("\n", " ").replace("%", "%%")
    if kind is bool:
        actions = [parser.add_argument(f"--{name}", action="store_true", help=text)]
        if field.default:
            actions.append(parser.add_argument(f"--no_{name}", dest=name, action="store_false", help=f"not --{name}"))
        return actions
    options = {}
    if get_origin(kind) is tuple:
        parts = get_args(kind)
        options["nargs"] = "+" if parts[-1] is ... else len(parts)
        kind = parts[0]
    if get_origin(kind) is Literal:
        options["metavar"] = f"{{{','.join(map(str, get_args(kind)))}}}"
    if not required and field.default is not None:
        default = field.default if isinstance(field.default, tuple) else (field.default,)
        text += f" [{' '.join(f'{value:g}' if isinstance(value, float) else str(value) for value in default)}]"
    if Positional in field.metadata:
        options.setdefault("metavar", name.upper())
        if not required:
            options["nargs"] = "?"
        return [parser.add_argument(name, help=text, **options)]
    return [parser.add_argument(f"--{name}", required=required, help=text, **options)]


def _read(value: str | bool | list[str], field: FieldInfo) -> str | int | bool | list[str] | None:
    """What pydantic takes: None for `null`, and the number that a choice of numbers is written as."""
    if value == "null" and type(None) in get_args(field.annotation):
        return None
    kind = _without_none(field.annotation)
    if get_origin(kind) is Literal:
        return {str(choice): choice for choice in get_args(kind)}.get(value, value)
    return value


def _explain(detail: dict, settings_class: type[BaseModel]) -> str:
    """One pydantic error as one line: key, value, what is allowed."""
    message = detail["msg"].removeprefix("Value error, ")
    if not detail["loc"]:
        return message
    name = detail["loc"][0]
    key = name.upper() if Positional in settings_class.model_fields[name].metadata else f"--{name}"
    if detail["type"] == "missing":
        return f"{key} is required"
    value = detail["input"]
    value = " ".join(map(str, value)) if isinstance(value, list | tuple) else value
    return " ".join(f"{key} {value}: {message[0].lower()}{message[1:]}".split())


def _explain_unknown(arguments: list[str], flags: list[str]) -> list[str]:
    """A line for each flag that does not exist; what stands behind one is taken for its value."""
    problems = []
    for argument in arguments:
        name = argument.partition("=")[0]
        if name.startswith("-"):
            problems.append(f"unknown key {name}{_suggest(name, flags)}")
        elif not problems:
            problems.append(f"unexpected argument {argument!r}")
    return problems


def _suggest(name: str, known: list[str]) -> str:
    close = difflib.get_close_matches(name, known, 1, 0.6)
    return f"; did you mean {close[0]}?" if close else ""
