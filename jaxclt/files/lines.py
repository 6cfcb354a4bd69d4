"""Files with a JSON value on each line: texts, and what grows while a run goes on."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from jaxclt.errors import InputError
from jaxclt.files.json_file import (
    MOST_DATA,
    Schema,
    check_json,
    parse_json,
    parse_object,
    read_bounded,
)
from jaxclt.files.json_text import to_json

__all__ = ["append_line", "json_rows", "read_lines", "text_of"]


def read_lines(path: Path, schema: Schema | None = None) -> list[dict[str, Any]]:
    """The objects in a file; none if there is no file.

    Lines that are not a JSON object of the schema, such as a last one that was half
    written, are passed over.

    Raises:
      InputError: if the file cannot be read.
    """
    if not path.exists():
        return []
    found = []
    for line in read_bounded(path, MOST_DATA).split(b"\n"):
        with contextlib.suppress(InputError):
            row = parse_object(line, path)
            if schema is not None:
                check_json(row, schema, path)
            found.append(row)
    return found


def append_line(path: Path, row: dict[str, Any]) -> None:
    """Add one object, on disk when this returns.

    A line that was half written before gets an end first. Lines of several processes
    do not mix, since each is written at once.

    Raises:
      InputError: if the file cannot be written.
    """
    line = to_json(row).encode() + b"\n"
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("a+b", buffering=0) as file:
            size = file.seek(0, os.SEEK_END)
            if size:
                file.seek(size - 1)
                if file.read(1) != b"\n":
                    line = b"\n" + line
            file.write(line)
            os.fsync(file.fileno())
    except OSError as error:
        raise InputError(f"cannot write {path}: {error.strerror or error}") from error


def json_rows(path: Path, errors: str = "strict") -> Iterator[tuple[int, Any]]:
    """The values on the lines of a file with their line numbers; blank lines are not.

    Lines end where files end them: a text may hold U+2028 and its like as they are.

    Args:
      path: of a .jsonl file.
      errors: what becomes of bytes that are not UTF-8, as for `open`.

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
    text = line if errors == "strict" else line.decode("utf-8-sig", errors)
    return parse_json(text, f"{path}:{number}", line=number)


def text_of(row: dict[str, Any], key: str, place: str) -> str:
    """The text under a key, as UTF-8 can hold it; none at all reads as "".

    Args:
      row: of a .jsonl file or a dataset.
      key: where the text is; null, as many data sets have it, reads as "".
      place: file and line, for the error.

    Raises:
      InputError: for anything else than a text or null.
    """
    value = row[key]
    if value is None:
        return ""
    if not isinstance(value, str):
        kind = type(value).__name__
        raise InputError(f"{place}: `{key}` is {kind}, not text: only text is read")
    # JSON may escape half a character, which is damage like bytes that are not UTF-8.
    return value.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
