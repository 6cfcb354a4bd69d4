"""Published pairs of a model and a dictionary: a table, `published.toml`."""

from __future__ import annotations

import dataclasses
import functools
import re
import tomllib
from collections.abc import Iterator, Mapping
from importlib import resources
from typing import Any, Literal

from jaxclt.io.hub import parse_hub_ref

__all__ = ["Pair", "dashboards", "pairs", "repositories", "supplement"]

_CHOICE = re.compile(r"\{([^{}]*)\}")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Pair:
    """A dictionary on the hub, and the model it was trained on."""

    model: str
    dictionary: str  # as `load_dictionary` takes it
    kind: str  # CLT or PLT
    layout: str  # a format of `jaxclt.io.formats.layouts`
    features: int | None = None  # of each layer
    size_gb: float | None = None
    licence: str = "see its page"
    note: str = ""
    config: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    whole: bool = False  # `config` is that of every folder of the repository
    dashboards: str = ""  # address of a feature's, with {layer} and {feature}


@functools.cache
def pairs() -> tuple[Pair, ...]:
    """All rows of the table, in its order; one for each of the choices in braces."""
    text = resources.files("jaxclt.io").joinpath("published.toml").read_text("utf-8")
    found = []
    for row in tomllib.loads(text)["pair"]:
        names = zip(_spell(row["model"]), _spell(row["dictionary"]), strict=True)
        for model, dictionary in names:
            found.append(Pair(**{**row, "model": model, "dictionary": dictionary}))
    return tuple(found)


def repositories(what: Literal["model", "dictionary"]) -> set[str]:
    """Names of the repositories in one column of the table."""
    refs = (parse_hub_ref(getattr(pair, what)) for pair in pairs())
    return {ref.repo for ref in refs if ref is not None}


def supplement(name: str) -> Mapping[str, Any]:
    """What the config.yaml of a published dictionary leaves unsaid."""
    ref = parse_hub_ref(name)
    for pair in pairs():
        listed = parse_hub_ref(pair.dictionary)
        if ref is None or listed is None or listed.repo != ref.repo:
            continue
        if pair.whole or listed.folder == ref.folder:
            return pair.config
    return {}


def dashboards(name: str) -> str:
    """Where features of a published dictionary are shown, "" if that is not known.

    Returns:
      An https address with {layer} and {feature} in it.
    """
    ref = parse_hub_ref(name)
    for pair in pairs():
        listed = parse_hub_ref(pair.dictionary)
        if ref and listed and (ref.repo, ref.folder) == (listed.repo, listed.folder):
            return pair.dashboards
    return ""


def _spell(text: str) -> Iterator[str]:
    """``a{b,c}`` as ``ab`` and ``ac``."""
    found = _CHOICE.search(text)
    if found is None:
        yield text
        return
    for choice in found[1].split(","):
        yield from _spell(text[: found.start()] + choice + text[found.end() :])
