"""Numbers of a config.json, checked."""

from __future__ import annotations

from typing import Any

from jaxclt.errors import InputError

__all__ = ["number", "whole"]


def whole(hf: dict[str, Any], key: str, default: int | None = None) -> int:
    """An integer field.

    Raises:
      InputError: if it is none, or missing without a default.
    """
    value = hf.get(key)
    value = default if value is None else value
    if not isinstance(value, int) or isinstance(value, bool):
        raise InputError(f"config.json: {key} must be an integer, not {value!r}")
    return value


def number(hf: dict[str, Any], key: str, default: float | None = None) -> float:
    """A positive number, or the default where the field is missing or null.

    Raises:
      InputError: if it is something else.
    """
    value = hf.get(key)
    value = default if value is None else value
    if not isinstance(value, int | float) or isinstance(value, bool) or value <= 0:
        raise InputError(f"config.json: {key} must be a positive number, not {value!r}")
    return float(value)
