"""JSON lines that grow while a run goes on, and survive its being killed."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from jaxclt.errors import InputError
from jaxclt.json_text import to_json

__all__ = ["append_line", "read_lines"]


def read_lines(path: Path) -> list[dict[str, Any]]:
    """The objects in a file; none if there is no file.

    Lines that are no JSON object, such as a last one that was half written, are passed
    over.

    Raises:
      InputError: if the file cannot be read.
    """
    try:
        lines = path.read_bytes().split(b"\n")
    except FileNotFoundError:
        return []
    except OSError as error:
        raise InputError(f"cannot read {path}: {error.strerror or error}") from error
    found = []
    for line in lines:
        try:
            row = json.loads(line)
        except ValueError:
            continue
        if isinstance(row, dict):
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
