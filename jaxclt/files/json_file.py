"""JSON of ours and of other tools: within bounds and of the right types, or refused.

Whatever a file may hold (too much, too deep, no UTF-8, another value than an object),
the answer is one line that names the file.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jsonschema_rs

from jaxclt.errors import InputError, shown

__all__ = [
    "COUNT", "MOST", "MOST_DATA", "TEXT", "TEXTS", "Schema", "check_json", "find_json",
    "json_schema", "named", "parse_json", "parse_object", "read_bounded", "read_json",
    "record",
]  # fmt: skip

MOST = 1 << 26  # bytes of a file that describes something
MOST_DATA = 1 << 30  # bytes of one that holds data: a graph, a log
DEEPEST = 64  # lists and objects in each other
_CHUNK = 1 << 20
_NESTS = {dict, list}

Schema = jsonschema_rs.Draft202012Validator


def read_json(path: Path, *, most: int = MOST) -> dict[str, Any]:
    """A JSON object from a file.

    Args:
      path: the file.
      most: bytes that it may have.

    Raises:
      InputError: if the file is missing, is not JSON, or does not hold an object.
    """
    return parse_object(read_bounded(path, most), path)


def find_json(path: Path, *, most: int = MOST) -> dict[str, Any] | None:
    """The same, or None where there is no file."""
    return read_json(path, most=most) if os.path.exists(path) else None


def read_bounded(path: Path, most: int) -> bytes:
    """All bytes of a file, unless there are more than `most`.

    Raises:
      InputError: if there are, or it cannot be read.
    """
    pieces, size = [], 0
    try:
        with path.open("rb") as file:
            # by pieces: a pipe does not say how long it is
            while size <= most and (piece := file.read(_CHUNK)):
                pieces.append(piece)
                size += len(piece)
    except OSError as error:
        raise InputError(f"cannot read {path}: {error.strerror or error}") from error
    if size > most:
        raise InputError(
            f"{path} holds more than {most / 1e6:.0f} MB, too much for what it should "
            "be: correct or replace it"
        )
    return b"".join(pieces)


def parse_json(text: str | bytes, where: object, *, line: int = 1) -> Any:
    """The value that a JSON text stands for.

    Args:
      text: UTF-8 if bytes.
      where: its file, or line, for the message.
      line: number of its first line in the file.

    Raises:
      InputError: if it is not JSON, or nested deeper than anybody writes it.
    """
    try:
        if isinstance(text, bytes):
            text = text.decode("utf-8-sig")
        value = json.loads(text)
        opened = text.count("[") + text.count("{")  # most texts have few
        deep = opened > DEEPEST and _too_deep(value)
    except RecursionError:
        deep, value = True, None
    except json.JSONDecodeError as error:
        at = f"line {error.lineno + line - 1} column {error.colno}"
        raise InputError(f"{where} is not JSON ({error.msg}: {at})") from error
    except UnicodeDecodeError as error:
        raise InputError(f"{where} is not UTF-8 text") from error
    except ValueError as error:  # a number of thousands of digits
        raise InputError(f"{where} is not JSON ({str(error)[:60]})") from error
    if deep:
        raise InputError(
            f"{where} is nested deeper than the {DEEPEST} levels that are read"
        )
    return value


def parse_object(text: str | bytes, where: object) -> dict[str, Any]:
    """The object that a JSON text stands for; see `parse_json`."""
    value = parse_json(text, where)
    if not isinstance(value, dict):
        raise InputError(f"{where} must hold a JSON object")
    return value


def _too_deep(value: Any) -> bool:
    level = [value] if type(value) in _NESTS else []
    for _ in range(DEEPEST):
        level = [
            inner
            for outer in level
            for inner in (outer.values() if type(outer) is dict else outer)
            if type(inner) in _NESTS
        ]
    return bool(level)


# Parts of schemas, as https://json-schema.org has them.
TEXT = {"type": "string"}
TEXTS = {"type": "array", "items": TEXT}
COUNT = {"type": "integer", "minimum": 0, "maximum": 1 << 53}


def named(value: Mapping[str, Any]) -> dict[str, Any]:
    """An object whose keys may be any, and whose values are alike."""
    return {"type": "object", "additionalProperties": value}


def record(
    must: Mapping[str, Any], may: Mapping[str, Any] | None = None
) -> dict[str, Any]:
    """An object with keys that must be there, and keys that may be.

    Others may be there too: newer versions write more.
    """
    return {
        "type": "object",
        "required": list(must),
        "properties": {**must, **(may or {})},
    }


def json_schema(schema: dict[str, Any]) -> Schema:
    """What `check_json` takes."""
    return Schema(schema, mask="it")


def check_json(value: Any, schema: Schema, where: object) -> None:
    """Whether a parsed JSON value has the types that are read of it.

    Args:
      value: the value.
      schema: from `json_schema`.
      where: its file, for the message.

    Raises:
      InputError: naming the first wrong value by its path, as ``$.nodes[3].layer``.
    """
    try:
        error = next(schema.iter_errors(value), None)
    except ValueError as wrong:  # something in it that JSON has no word for
        raise InputError(f"{where}: $: {wrong}") from wrong
    if error is None:
        return
    steps = (
        f"[{x}]" if isinstance(x, int) else f".{shown(x).strip(chr(39))}"
        for x in error.instance_path
    )
    said = error.message
    if said.startswith("it "):
        said = shown(error.instance) + said.removeprefix("it")
    raise InputError(f"{where}: ${''.join(steps)}: {said}")
