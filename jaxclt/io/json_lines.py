"""Files with a JSON object on each line: the one reader of all that hold texts."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from jaxclt.errors import InputError

__all__ = ["json_rows", "text_of"]


def json_rows(path: Path, errors: str = "strict") -> Iterator[tuple[int, Any]]:
    """The values on the lines of a file with their line numbers; blank lines are not.

    Lines end where files end them: a text may hold U+2028 and its like as they are.

    Args:
      path: of a .jsonl file.
      errors: what becomes of bytes that are no UTF-8, as for `open`.

    Raises:
      InputError: if the file cannot be read, or a line is not JSON; names the line.
    """
    try:
        with path.open("rb") as file:
            for number, line in enumerate(file, 1):
                if line.strip():
                    yield number, _parsed(path, number, line, errors)
    except OSError as error:
        raise InputError(f"cannot read {path}: {error.strerror or error}") from error


def _parsed(path: Path, number: int, line: bytes, errors: str) -> Any:
    try:
        return json.loads(line.decode("utf-8-sig", errors))
    except json.JSONDecodeError as error:
        why = f"line {number}, column {error.colno}: {error.msg}"
    except UnicodeDecodeError:
        why = f"line {number} is not UTF-8 text"
    except (RecursionError, ValueError):  # a number of thousands of digits
        why = f"line {number} is nested or long beyond reason"
    raise InputError(f"{path}:{number} is not JSON ({why})")


def text_of(row: dict[str, Any], key: str, place: str) -> str:
    """The text under a key, as UTF-8 can hold it; none at all reads as "".

    Args:
      row: of a .jsonl file or a dataset.
      key: where the text is; null, as many data sets have it, is no text.
      place: file and line, for the error.

    Raises:
      InputError: for anything else than a text or null.
    """
    value = row[key]
    if value is None:
        return ""
    if not isinstance(value, str):
        kind = type(value).__name__
        raise InputError(f"{place}: `{key}` is no text but {kind}: only texts are read")
    # JSON may escape half a character, which is damage like bytes that are no UTF-8.
    return value.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
