"""Configuration: typed sections, YAML files, command-line overrides, and errors a person can act on.

Light on purpose (no torch): a typo is answered before anything heavy is imported or any file is touched.
"""

from __future__ import annotations

import difflib
import reprlib
import sys
from pathlib import Path
from typing import ClassVar, TypeVar

import yaml
from pydantic import BaseModel, ConfigDict, ValidationError
from pydantic_settings import BaseSettings, PydanticBaseSettingsSource, SettingsConfigDict, SettingsError

from backlot.command_line import EXIT_INPUT

MAX_FILE_BYTES = 1_000_000


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
        problems += [_explain(detail, keys) for detail in error.errors()]
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


def _read_yaml(file: str, problems: list[str]) -> dict:
    path = Path(file)
    try:
        if path.stat().st_size > MAX_FILE_BYTES:
            problems.append(f"{file}: larger than {MAX_FILE_BYTES} bytes, not a configuration")
            return {}
        values = yaml.safe_load(path.read_text(encoding="utf-8"))
    except OSError as error:
        problems.append(f"--config {file}: {error.strerror}")
        return {}
    except (yaml.YAMLError, UnicodeDecodeError, RecursionError) as error:
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
