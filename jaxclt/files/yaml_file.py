"""YAML files of other tools: within bounds, or refused in one line."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml

from jaxclt.errors import InputError
from jaxclt.files.json_file import read_bounded

__all__ = ["read_yaml"]

_MOST = 1 << 20  # bytes: what describes a dictionary is a page or two
_MOST_ALL = 1 << 21  # values and characters, an alias as all that it stands for
# What yaml's constructors raise on values that have not the form their tag says.
_WRONG = (yaml.YAMLError, ValueError, LookupError, AttributeError, TypeError)


def read_yaml(file: Path) -> dict[str, Any]:
    """A YAML file that holds a mapping.

    Raises:
      InputError: if it is missing or holds anything else.
    """
    try:
        config = _load(read_bounded(file, _MOST).decode("utf-8-sig"))
    except (*_WRONG, RecursionError, OverflowError) as error:
        raise InputError(f"{file} is not valid YAML; correct or replace it") from error
    if not isinstance(config, dict):
        raise InputError(f"{file} must be a mapping of names to values")
    return config


def _load(text: str) -> Any:
    loader = yaml.SafeLoader(text)
    try:
        root = loader.get_single_node()
        if root is None:
            return None
        if _size(root, {}) > _MOST_ALL:
            raise ValueError("its aliases stand for too much")
        return loader.construct_document(root)
    finally:
        loader.dispose()


def _size(node: yaml.Node, known: dict[int, int]) -> int:
    """Values and characters in a node, those of an alias each time that it stands."""
    if id(node) not in known:
        known[id(node)] = _MOST_ALL + 1  # what holds itself has no end
        inner = node.value if isinstance(node, yaml.CollectionNode) else ()
        parts = [x for y in inner for x in (y if isinstance(y, tuple) else (y,))]
        own = 1 if parts else 1 + len(node.value)
        known[id(node)] = own + sum(_size(x, known) for x in parts)
    return known[id(node)]
