"""The one place where JSON is written: no text of ours holds NaN or Infinity.

JSON has no word for them; what could not be measured is null.
"""

from __future__ import annotations

import json
import math
from typing import Any

import numpy as np

__all__ = ["finite", "number", "rounded", "to_json", "well_formed"]


def to_json(value: Any, **how: Any) -> str:
    """The text of a JSON value, numbers that are not finite as null.

    Args:
      value: of plain types; numpy's only where a number is not finite.
      **how: options of `json.dumps`, for example ``indent``.
    """
    try:
        return json.dumps(value, allow_nan=False, **how)
    except ValueError:  # of which a large document usually has none
        return json.dumps(finite(value), allow_nan=False, **how)


def number(x: Any) -> float | None:
    """A number for JSON: None for NaN and infinity."""
    return float(x) if math.isfinite(x) else None


def rounded(x: float | None) -> float | None:
    """A number for JSON with six decimals; None stays as it is."""
    return None if x is None or number(x) is None else round(float(x), 6)


def finite(value: Any) -> Any:
    """Copy a JSON value with numpy scalars made plain and NaN or infinity made null."""
    if isinstance(value, dict):
        return {well_formed(str(k)): finite(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [finite(v) for v in value]
    if isinstance(value, np.ndarray | np.generic):
        return finite(value.tolist())
    if isinstance(value, float):
        return number(value)
    return well_formed(value) if isinstance(value, str) else value


def well_formed(text: str) -> str:
    """Join surrogate pairs and replace lone ones, which no UTF-8 file can hold."""
    return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
