"""Numbers of a config file, checked."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from jaxclt.errors import InputError, shown

__all__ = ["number", "whole"]

_MOST = 1 << 62  # beyond any size
_LARGEST = sys.float_info.max


def whole(
    config: Mapping[str, Any],
    name: str,
    default: int | None = None,
    *,
    where: str | Path = "config.json",
    least: int | None = None,
) -> int:
    """A whole number.

    Args:
      config: what the file holds.
      name: the field.
      default: where the field is missing or null; None: it must be there.
      where: the file, for the message.
      least: the smallest that makes sense.

    Raises:
      InputError: if it is missing or anything else.
    """
    value = config.get(name)
    value = default if value is None else value
    low, high = (-_MOST, _MOST) if least is None else (least, 1 << 40)
    # True is not 1, and 2.0 is not a size
    if not isinstance(value, int) or isinstance(value, bool) or not low <= value < high:
        bound = "" if least is None else f" from {least}"
        raise InputError(
            f"{where}: {name} must be a whole number{bound}, not {shown(value)}"
        )
    return value


def number(hf: dict[str, Any], key: str, default: float | None = None) -> float:
    """A positive finite number, or the default where the field is missing or null.

    Raises:
      InputError: if it is something else.
    """
    value = hf.get(key)
    value = default if value is None else value
    if (
        not isinstance(value, int | float)
        or isinstance(value, bool)
        or not 0 < value <= _LARGEST
    ):
        raise InputError(
            f"config.json: {key} must be a positive number, not {shown(value)}"
        )
    return float(value)
