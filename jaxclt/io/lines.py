"""JSON lines that grow while a run goes on, and survive its being killed."""

from __future__ import annotations

import contextlib
import json
import os
from pathlib import Path
from typing import Any

from jaxclt.errors import InputError
from jaxclt.io.json_file import (
    MOST_DATA,
    Schema,
    check_json,
    parse_object,
    read_bounded,
)

__all__ = ["append_line", "read_lines"]


def read_lines(path: Path, schema: Schema | None = None) -> list[dict[str, Any]]:
    """The objects in a file; none if there is no file.

    Lines that are no JSON object, such as a last one that was half written, or not of
    the schema are passed over.

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
    line = json.dumps(row).encode() + b"\n"
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
