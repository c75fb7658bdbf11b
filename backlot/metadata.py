"""What a data format says of a sample in JSON: models of it, and their errors in one line each. No torch here."""

from __future__ import annotations

import re
import reprlib

from pydantic import AfterValidator, BaseModel, ConfigDict, ValidationError


class Metadata(BaseModel):
    """Exact types and finite numbers; keys that are not known are passed over."""

    model_config = ConfigDict(strict=True, frozen=True, allow_inf_nan=False, extra="ignore")


def between(low: float, high: float) -> AfterValidator:
    """The rule that a number lies in [low, high]."""

    def check(value: float) -> float:
        if not low <= value <= high:
            raise ValueError(f"must be in [{low:g}, {high:g}]")
        return value

    return AfterValidator(check)


def describe_errors(error: ValidationError, source: str) -> list[str]:
    """One line for each error: the field of `source`, what is allowed and what is there."""
    return [_describe(detail, source) for detail in error.errors(include_url=False)]


def _describe(detail: dict, source: str) -> str:
    name = ".".join(str(part) for part in detail["loc"])
    if detail["type"] == "missing":
        return f"`{name}` is missing from {source}"
    message = re.sub(r"^\w+ should ", "must ", detail["msg"].removeprefix("Value error, "))
    if detail["type"] == "model_type":
        message = "must be a JSON object"
    if not name:
        return f"{source} {message}"
    return f"`{name}` of {source} {message}, got {reprlib.repr(detail['input'])}"
