"""Configuration: typed sections, YAML files, command-line overrides, and errors a person can act on.

Light on purpose (no torch): a typo is answered before anything heavy is imported or any file is touched.
"""

from __future__ import annotations

import difflib
import re
import reprlib
import stat
import sys
from pathlib import Path
from typing import ClassVar, TypeVar

import yaml
from pydantic import BaseModel, ConfigDict, ValidationError
from pydantic_settings import BaseSettings, PydanticBaseSettingsSource, SettingsConfigDict, SettingsError

from backlot.command_line import EXIT_INPUT

MAX_FILE_BYTES = 100_000
MAX_VALUES = 5_000
"""In one file, after its YAML aliases are written out."""
MAX_DEPTH = 20
MAX_PROBLEMS = 50
"""So many are explained; the rest are counted."""


class Section(BaseModel):
    """One section of a configuration: unknown keys are errors, values never change, the docstring is the help."""

    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True, allow_inf_nan=False)


class Settings(BaseSettings):
    """The root of a configuration; a program adds its sections."""

    model_config = SettingsConfigDict(
        extra="forbid", frozen=True, use_attribute_docstrings=True, cli_parse_none_str="null", cli_avoid_json=True
    )
    aliases: ClassVar[dict[str, str]] = {}
    """Further names on the command line, and the keys they stand for."""

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
    keys = _keys(config_class)
    files, overrides, problems = _split_arguments(argv, keys, config_class.aliases)
    values: dict = {}
    for file in files:
        _merge(values, _read_yaml(file, problems))
    try:
        config = config_class(_cli_parse_args=overrides, **values)
    except ValidationError as error:
        details = error.errors(include_url=False)
        problems += [_explain(detail, keys) for detail in details[:MAX_PROBLEMS]]
        if len(details) > MAX_PROBLEMS:
            problems.append(f"and {len(details) - MAX_PROBLEMS} more")
    except SettingsError as error:
        problems.append(str(error))
    if problems:
        lines = "\n".join(f"  {problem}" for problem in problems)
        print(f"configuration refused:\n{lines}", file=sys.stderr)
        raise SystemExit(EXIT_INPUT)
    return config


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
) -> tuple[list[str], list[str], list[str]]:
    """Separate --config files from overrides, spell out short keys, and collect what is not understood."""
    files, overrides, problems = [], [], []
    arguments = iter(argv)
    for argument in arguments:
        if argument in ("-h", "--help"):
            overrides.append("--help")
            continue
        if not argument.startswith("--"):
            problems.append(f"unexpected argument {argument!r} (expected --key value)")
            continue
        name, equals, value = argument[2:].partition("=")
        name = aliases.get(name, name)
        if not equals:
            value = next(arguments, None)
        if value is None:
            problems.append(f"--{name} lacks a value")
        elif name == "config":
            files.append(value)
        else:
            matches = [name] if name in keys else [key for key in keys if key.rpartition(".")[2] == name]
            if len(matches) == 1:
                overrides.append(f"--{matches[0]}={value}")
            elif matches:
                problems.append(f"--{name} is ambiguous: {', '.join('--' + key for key in matches)}")
            else:
                problems.append(f"unknown key --{name}{_suggest(name, keys)}")
    return files, overrides, problems


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


def _merge(into: dict, values: dict) -> None:
    for key, value in values.items():
        if isinstance(value, dict) and isinstance(into.get(key), dict):
            _merge(into[key], value)
        else:
            into[key] = value


def _explain(detail: dict, keys: list[str]) -> str:
    """One pydantic error as one line: key, value, what is allowed."""
    key = ".".join(str(part) for part in detail["loc"])
    if detail["type"] == "extra_forbidden":
        return f"unknown key {key}{_suggest(key, keys)}"
    if detail["type"] == "missing":
        return f"{key} is required"
    message = detail["msg"].removeprefix("Value error, ")
    if isinstance(detail["input"], dict):
        return f"{key}: {message}" if key else message
    # reprlib: a few lines of YAML aliases can stand for gigabytes
    return f"{key} = {reprlib.repr(detail['input'])}: {message[0].lower()}{message[1:]}"


def _suggest(key: str, keys: list[str]) -> str:
    """The nearest known key, compared in full and by its last part."""
    leaves = {known.rpartition(".")[2]: known for known in keys}
    close = difflib.get_close_matches(key, keys, 1, 0.75)
    close = close or [leaves[leaf] for leaf in difflib.get_close_matches(key.rpartition(".")[2], leaves, 1, 0.6)]
    return f"; did you mean {close[0]}?" if close else ""
