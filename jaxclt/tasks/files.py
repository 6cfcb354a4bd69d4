"""Files of examples, a JSON object a line, in the form of the templates."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from jaxclt.errors import InputError, did_you_mean, shown
from jaxclt.files.atomic import write_text
from jaxclt.files.json_text import to_json
from jaxclt.files.lines import json_rows, text_of
from jaxclt.tasks.form import Example, Span

__all__ = ["read_tasks", "write_tasks"]

FORM = '{"prompt": "The keys", "answer": " are", "foil": " is"}'
_FIELDS = {field.name for field in dataclasses.fields(Example)}
_SPANS = {"spans": "prompt", "counterfactual_spans": "counterfactual"}


def read_tasks(path: str | os.PathLike[str]) -> list[Example]:
    """The examples of a .jsonl file.

    Lines have ``prompt``, ``answer`` and ``foil``, and may have ``counterfactual``,
    ``task``, ``spans`` and ``counterfactual_spans`` ({name: [from, to]}, characters).

    Raises:
      InputError: for a line that is no example; names it.
    """
    path = Path(path)
    rows = list(json_rows(path))  # closes the file, whatever the rows hold
    found = [_read(row, f"{path} line {n}") for n, row in rows]
    if not found:
        raise InputError(f"{path} holds no example: write {FORM} a line")
    return found


def _read(row: Any, place: str) -> Example:
    if not isinstance(row, dict):
        raise InputError(f"{place}: write an object such as {FORM}")
    for name in row:
        if name not in _FIELDS:
            hint = did_you_mean(name, _FIELDS)
            raise InputError(f"{place}: an example has no {shown(name)}{hint}")
    texts = {
        name: text_of({name: None} | row, name, place)
        for name in ("prompt", "answer", "foil", "counterfactual", "task")
    }
    for name in ("prompt", "answer", "foil"):
        if not texts[name]:
            raise InputError(f"{place}: `{name}` is missing: write {FORM}")
    if texts["answer"] == texts["foil"]:
        raise InputError(f"{place}: the foil is the answer: give another token")
    spans, there = (
        _spans(row.get(name), texts[of], f"{place}: `{name}`")
        for name, of in _SPANS.items()
    )
    return Example(**texts, spans=spans, counterfactual_spans=there)


def _spans(given: Any, text: str, place: str) -> Mapping[str, Span]:
    if given is None:
        return {}
    if not isinstance(given, dict):
        raise InputError(f'{place}: write {{"name": [from, to]}}')
    for name, span in given.items():
        whole = isinstance(span, list) and len(span) == 2
        if not whole or not all(type(x) is int for x in span):
            raise InputError(f"{place}: {shown(name)}: write [from, to], two numbers")
        if not 0 <= span[0] < span[1] <= len(text):
            raise InputError(
                f"{place}: {shown(name)} is {span[0]} to {span[1]}, of a text of "
                f"{len(text)} characters: give a part of it"
            )
    return {name: (span[0], span[1]) for name, span in given.items()}


def write_tasks(examples: Iterable[Example], path: str | os.PathLike[str]) -> None:
    """Write examples as `read_tasks` reads them."""
    rows = (to_json(dataclasses.asdict(x), ensure_ascii=False) for x in examples)
    write_text(Path(path), "".join(f"{row}\n" for row in rows))
