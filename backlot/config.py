"""Configuration: typed sections, YAML files, command-line overrides, and errors a person can act on.

Light on purpose (no torch): a typo is answered before anything heavy is imported or any file is touched.
"""

from __future__ import annotations

import difflib
import re
import reprlib
import stat
import sys
from collections.abc import Iterable, Iterator
from itertools import islice
from pathlib import Path
from typing import ClassVar, TypeVar

import yaml
from pydantic import BaseModel, ConfigDict, ValidationError
from pydantic_settings import BaseSettings, PydanticBaseSettingsSource, SettingsConfigDict, SettingsError

from backlot.command_line import EXIT_INPUT, leave

MAX_FILE_BYTES = 100_000
MAX_VALUES = 5_000
"""In one file, after its YAML aliases are written out."""
MAX_DEPTH = 20
MAX_PROBLEMS = 50
"""So many are explained; the rest are counted."""
MAX_SUGGESTIONS = 5
"""So many keys of an unknown section are compared with the known ones."""


class Section(BaseModel):
    """One section of a configuration: unknown keys are errors, values never change, the docstring is the help."""

    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True, allow_inf_nan=False)


class Settings(BaseSettings):
    """The root of a configuration; a program adds its sections."""

    model_config = SettingsConfigDict(
        extra="forbid", frozen=True, use_attribute_docstrings=True, cli_parse_none_str="null", cli_avoid_json=True
    )
    aliases: ClassVar[dict[str, str]] = {}
    """Further names, in files and on the command line, and the keys they stand for."""

    @classmethod
    def settings_customise_sources(
        cls,
        settings_cls: type[BaseSettings],
        init_settings: PydanticBaseSettingsSource,
        **_: PydanticBaseSettingsSource,
    ) -> tuple[PydanticBaseSettingsSource, ...]:
        return (init_settings,)  # nothing from the environment


ConfigT = TypeVar("ConfigT", bound=Settings)


def load_config(config_class: type[ConfigT], argv: list[str] | None = None) -> ConfigT:
    """Read `--config FILE` (repeatable, later files win), then `--section.key value` overrides.

    A key's last part is enough where it is unique (`--learning_rate 1e-4`). Whatever is wrong is printed, all of it,
    one line each, and the process exits with code 2.
    """
    argv = sys.argv[1:] if argv is None else list(argv)
    keys, aliases = _keys(config_class), config_class.aliases
    files, overrides, names, problems = _split_arguments(argv, keys, aliases)
    given: dict[str, str] = {}
    values: dict = {}
    for file in files:
        _merge(values, _nest(file, _spread(_read_yaml(file, problems), keys, aliases), given, problems))
    for key in [key for key in values if key.startswith("_")]:  # pydantic-settings would take them as its own
        problems.append(f"unknown key {key}")
        del values[key]
    given |= {key: name if name in aliases else key for key, name in names.items()}
    try:
        config = config_class(_cli_parse_args=overrides, **values)
    except ValidationError as error:
        details = error.errors(include_url=False)
        problems += [_explain(detail, [*keys, *aliases], given) for detail in details[:MAX_PROBLEMS]]
        if len(details) > MAX_PROBLEMS:
            problems.append(f"and {len(details) - MAX_PROBLEMS} more")
    except SettingsError as error:
        problems.append(str(error))
    except SystemExit:  # after --help
        if aliases:
            print("\nfurther names:", *(f"  --{alias} is --{key}" for alias, key in aliases.items()), sep="\n")
        raise
    if problems:
        raise _refused(problems)
    return config


def checked(config: ConfigT, changes: dict[str, dict]) -> ConfigT:
    """The configuration with other values, all of it checked again; refused as `load_config` does if it no longer fits.

    Args:
        changes: section -> key -> value.
    """
    values: dict = {}
    _merge(values, config.model_dump())
    _merge(values, changes)
    try:
        return type(config)(**values)
    except ValidationError as error:
        keys = [*_keys(type(config)), *config.aliases]
        raise _refused([_explain(detail, keys, {}) for detail in error.errors(include_url=False)]) from None


def _refused(problems: list[str]) -> SystemExit:
    lines = "\n".join(f"  {problem}" for problem in problems)
    return leave(EXIT_INPUT, f"configuration refused:\n{lines}")


def dump_config(config: Settings) -> str:
    """The resolved configuration as YAML that `load_config` reads back to the same values."""
    return yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False, allow_unicode=True)


def _keys(model: type[BaseModel], prefix: str = "") -> list[str]:
    """Every leaf key of a configuration class in dotted form."""
    keys = []
    for name, field in model.model_fields.items():
        if isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel):
            keys += _keys(field.annotation, f"{prefix}{name}.")
        else:
            keys.append(prefix + name)
    return keys


def _split_arguments(
    argv: list[str], keys: list[str], aliases: dict[str, str]
) -> tuple[list[str], list[str], dict[str, str], list[str]]:
    """Separate --config files from overrides, spell out short keys and aliases, and collect what is not understood.

    Returns: files, overrides as `--key=value`, the name that each key was given by, problems.
    """
    files, overrides, problems = [], [], []
    given: dict[str, tuple[str, str]] = {}
    arguments = iter(argv)
    for argument in arguments:
        if argument in ("-h", "--help"):
            overrides.append("--help")
            continue
        if not argument.startswith("--"):
            problems.append(f"unexpected argument {argument!r} (expected --key value)")
            continue
        name, equals, value = argument[2:].partition("=")
        if not equals:
            value = next(arguments, None)
        if value is None:
            problems.append(f"--{name} lacks a value")
        elif name == "config":
            files.append(value)
        else:
            key = aliases.get(name, name)
            matches = [key] if key in keys else [known for known in keys if known.rpartition(".")[2] == key]
            if len(matches) == 1:
                before, value_before = given.get(matches[0], (name, value))
                if value_before != value and before != name and aliases.keys() & {before, name}:
                    problems.append(_contradiction(f"--{before}", value_before, f"--{name}", value))
                given[matches[0]] = (name, value)
                overrides.append(f"--{matches[0]}={value}")
            elif matches:
                problems.append(f"--{name} is ambiguous: {', '.join('--' + key for key in matches)}")
            else:
                problems.append(f"unknown key --{name}{_suggest(name, [*keys, *aliases])}")
    return files, overrides, {key: name for key, (name, _) in given.items()}, problems


class _Loader(yaml.SafeLoader):
    """The YAML of a configuration: bounded, without tags, each key once and text.

    Decimal numbers, true, false and null are what they are; all else is the text that stands there, `yes`, `no`,
    `1:30`, `010` and dates too, which YAML 1.1 would turn into something else.
    """

    yaml_implicit_resolvers: ClassVar[dict] = {}

    def __init__(self, text: str):
        super().__init__(text)
        self.depth = self.size = 0
        self.sizes: dict[int, int] = {}

    def compose_node(self, parent: yaml.Node | None, index: int | yaml.Node | None) -> yaml.Node:
        event, size_before = self.peek_event(), self.size
        self.depth += 1
        self.size += 1
        is_alias = isinstance(event, yaml.AliasEvent)
        if self.depth > MAX_DEPTH:
            raise yaml.MarkedYAMLError(None, None, f"nested deeper than {MAX_DEPTH} levels", event.start_mark)
        if not is_alias and event.tag:
            raise yaml.MarkedYAMLError(None, None, "tags (!...) are not understood", event.start_mark)
        node = super().compose_node(parent, index)
        if not is_alias:
            self.sizes[id(node)] = self.size - size_before
        elif id(node) in self.sizes:
            self.size += self.sizes[id(node)]
        else:
            raise yaml.MarkedYAMLError(None, None, f"*{event.anchor} stands inside &{event.anchor}", event.start_mark)
        if self.size > MAX_VALUES:
            raise yaml.MarkedYAMLError(None, None, f"more than {MAX_VALUES} values", event.start_mark)
        self.depth -= 1
        return node

    def compose_mapping_node(self, anchor: str | None) -> yaml.MappingNode:
        node = super().compose_mapping_node(anchor)
        seen = set()
        for key, _ in node.value:
            if not isinstance(key, yaml.ScalarNode):
                raise yaml.MarkedYAMLError(None, None, "a key is text", key.start_mark)
            if key.value in seen:
                raise yaml.MarkedYAMLError(None, None, f"key {reprlib.repr(key.value)} is given twice", key.start_mark)
            seen.add(key.value)
            if key.tag != YAML_TAG + "merge":
                key.tag = YAML_TAG + "str"
        return node


YAML_TAG = "tag:yaml.org,2002:"
# Each is a part of what YAML 1.1 reads so: text that `dump_config` writes without quotes stays text.
for _kind, _pattern, _first in (
    ("bool", "true|True|TRUE|false|False|FALSE", "tTfF"),
    ("null", "~|null|Null|NULL|", ["~", "n", "N", ""]),
    ("int", "[-+]?(0|[1-9][0-9_]{0,39})", "-+0123456789"),
    ("float", r"[-+]?[0-9][0-9_]*\.[0-9_]*([eE][-+][0-9]+)?|\.[0-9][0-9_]*([eE][-+][0-9]+)?", "-+.0123456789"),
    ("float", r"[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN)", "-+."),
    ("merge", "<<", "<"),
):
    _Loader.add_implicit_resolver(YAML_TAG + _kind, re.compile(f"({_pattern})\\Z"), list(_first))


def _read_yaml(file: str, problems: list[str]) -> dict:
    path = Path(file)
    try:
        if not stat.S_ISREG(path.stat().st_mode):  # reading a device or a pipe might never end
            problems.append(f"--config {file}: not a file")
            return {}
        with path.open("rb") as stream:
            content = stream.read(MAX_FILE_BYTES + 1)
        if len(content) > MAX_FILE_BYTES:
            problems.append(f"{file}: larger than {MAX_FILE_BYTES} bytes, not a configuration")
            return {}
        values = _Loader(content.decode("utf-8")).get_single_data()
    except OSError as error:
        problems.append(f"--config {file}: {error.strerror}")
        return {}
    except yaml.MarkedYAMLError as error:
        line = f"line {error.problem_mark.line + 1}: " if error.problem_mark else ""
        problems.append(f"{file} is not YAML: {line}{' '.join(error.problem.split())}")
        return {}
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        problems.append(f"{file} is not YAML: {' '.join(str(error).split())}")
        return {}
    if not isinstance(values, dict):
        problems.append(f"{file} must hold sections of `key: value` lines")
        return {}
    return values


def _spread(
    values: dict, keys: list[str], aliases: dict[str, str], place: tuple[str, ...] = (), spelled: str = ""
) -> Iterator[tuple[tuple[str, ...], object, str]]:
    """Every value of a file as (path of the key, value, dotted name it was given by).

    An alias, and a key in dotted form, is understood wherever sections spell it out.
    """
    for part, value in values.items():
        name = f"{spelled}.{part}" if spelled else part
        key = aliases.get(name, name)
        here = tuple(key.split(".")) if name in aliases or name in keys else (*place, part)
        if isinstance(value, dict) and value:
            yield from _spread(value, keys, aliases, here, name)
        else:
            yield here, value, name


def _nest(
    file: str,
    values: Iterable[tuple[tuple[str, ...], object, str]],
    given: dict[str, str],
    problems: list[str],
) -> dict:
    """The sections of one file; a key under two names with two values, or with a value and keys, is a problem."""
    found: dict[tuple[str, ...], tuple[object, str]] = {}
    for place, value, name in values:
        before, name_before = found.setdefault(place, (value, name))
        if before != value:
            problems.append(f"{file}: {_contradiction(name_before, before, name, value)}")
        given[".".join(place)] = name
    nested: dict = {}
    for place, (value, name) in sorted(found.items(), key=lambda item: len(item[0])):
        into = nested
        for part in place[:-1]:
            into = into.setdefault(part, {}) if isinstance(into, dict) else into
        if isinstance(into, dict):
            into[place[-1]] = {} if value == {} else value  # what a YAML alias shares must not be filled twice
        else:
            problems.append(f"{file}: {name} = {reprlib.repr(value)} stands in a section that is {reprlib.repr(into)}")
    return nested


def _contradiction(name: str, value: object, other_name: str, other_value: object) -> str:
    value, other_value = reprlib.repr(value), reprlib.repr(other_value)
    return f"{name} = {value} and {other_name} = {other_value} are the same key: give one of them"


def _merge(into: dict, values: dict) -> None:
    for key, value in values.items():
        if isinstance(value, dict) and isinstance(into.get(key), dict):
            _merge(into[key], value)
        else:
            into[key] = value


def _explain(detail: dict, names: list[str], given: dict[str, str]) -> str:
    """One pydantic error as one line: key, value, what is allowed."""
    key = ".".join(str(part) for part in detail["loc"])
    if detail["type"] == "extra_forbidden":
        inner = _spread(detail["input"], [], {}, (), key) if isinstance(detail["input"], dict) else ()
        written = [*(name for _, _, name in islice(inner, MAX_SUGGESTIONS)), key]
        found = next((name for name in written if _suggest(name, names)), key)
        return f"unknown key {found}{_suggest(found, names)}"
    if detail["type"] == "missing":
        return f"{key} is required"
    message = detail["msg"].removeprefix("Value error, ")
    if isinstance(detail["input"], dict):
        return f"{key}: {message}" if key else message
    if given.get(key, key) != key:
        key = f"{given[key]} ({key})"
    # reprlib: a few lines of YAML aliases can stand for gigabytes
    return f"{key} = {reprlib.repr(detail['input'])}: {message[0].lower()}{message[1:]}"


def _suggest(key: str, keys: list[str]) -> str:
    """The nearest known key, compared in full and by its last part."""
    leaves = {known.rpartition(".")[2]: known for known in keys}
    close = difflib.get_close_matches(key, keys, 1, 0.75)
    close = close or [leaves[leaf] for leaf in difflib.get_close_matches(key.rpartition(".")[2], leaves, 1, 0.6)]
    return f"; did you mean {close[0]}?" if close else ""
