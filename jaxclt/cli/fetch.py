"""`jaxclt fetch`: known models, and what is published."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Annotated, Any

from rich.console import RenderableType
from rich.text import Text
from tyro.conf import Positional, arg

from jaxclt.cli.common import answer
from jaxclt.cli.flags import AsJson, Debug
from jaxclt.cli.progress import Run

if TYPE_CHECKING:
    from jaxclt.io.published import Pair

__all__ = ["FetchFlags", "run_fetch"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class FetchFlags:
    """Download a known model into the user cache and verify its checksum."""

    name: Annotated[Positional[str], arg(metavar="[NAME]")] = ""
    """Name of the model."""
    list: bool = False
    """List the known names, and published pairs of a model and a dictionary."""
    accept_terms: bool = False
    """I have read and accept the terms of the model (see --list)."""
    json: AsJson = False
    debug: Debug = False


def run_fetch(flags: FetchFlags, run: Run) -> None:
    """Fetch a model, or list what there is."""
    from jaxclt.io.fetch import fetch

    if flags.list or not flags.name:
        _list(flags.json)
        return
    accepted = flags.accept_terms
    path = str(fetch(flags.name, progress=run.line, accept_terms=accepted))
    answer(flags.json, {"name": flags.name, "path": path}, path)


def _list(as_json: bool) -> None:
    from jaxclt.io.bundled import MODELS
    from jaxclt.io.fetch import KNOWN_MODELS
    from jaxclt.io.published import pairs

    known: dict[str, Any] = dict.fromkeys(MODELS, "bundled, Apache-2.0")
    known |= {
        name: f"{model.licence}, {model.terms}" if model.terms else model.licence
        for name, model in KNOWN_MODELS.items()
    }
    shown: list[RenderableType] = [
        f"{name}  ({licence})" for name, licence in known.items()
    ]
    shown.append(
        Text("\npublished dictionaries, below the model of each:", style="bold")
    )
    model = ""
    for pair in pairs():
        if pair.model != model:
            model = pair.model
            shown.append(Text(model, style="bold"))
        shown.append(f"  {_row(pair)}")
    rows = [dataclasses.asdict(pair) for pair in pairs()]
    answer(as_json, {"models": known, "pairs": rows}, *shown)


def _row(pair: Pair) -> str:
    """One line of the list."""
    size = [pair.kind, pair.layout]
    size += [] if pair.features is None else [f"{pair.features:,} features"]
    size += [] if pair.size_gb is None else [f"{pair.size_gb:g} GB"]
    said = [", ".join(size), f"licence: {pair.licence}", pair.note]
    return f"{pair.dictionary}  ({'; '.join(filter(None, said))})"
