"""Automatic labels of feature nodes (maths 23.2).

A label is words for a reader, by one rule, the first that fits:

- ``says Paris, London, Rome``: the tokens that the node raises, where they are clear;
- ``lowers city, cities``: those that it lowers, likewise;
- ``reads " of", " city"``: the prompt's tokens that it rests on here.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from jaxclt.errors import on_one_line

__all__ = ["label_of"]

_WORDS, _LETTERS = 3, 14  # of a label, and of each of its words


def label_of(said: Mapping[str, Any]) -> str:
    """The automatic label of what a node says; empty if nothing fits.

    Args:
      said: ``raises`` and ``lowers``, tokens and numbers; ``reads``, positions, tokens
        and shares.
    """
    for verb, name in (("says", "raises"), ("lowers", "lowers")):
        if words := _words(said[name]):
            return f"{verb} {', '.join(words)}"
    if said["reads"]:
        return "reads " + ", ".join(f'"{_short(t)}"' for _, t, _ in said["reads"][:2])
    return ""


def _words(tokens: Sequence[Sequence[Any]]) -> list[str]:
    """The first few different words among tokens."""
    found: dict[str, str] = {}
    for text, _ in tokens:
        word = _short(text).strip()
        if word and "\ufffd" not in word:  # part of a character says nothing
            found.setdefault(word.casefold(), word)
    return list(found.values())[:_WORDS]


def _short(text: str) -> str:
    text = on_one_line(text)
    return text if len(text) <= _LETTERS else text[: _LETTERS - 1] + "…"
