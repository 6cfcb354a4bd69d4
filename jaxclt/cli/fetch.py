"""`jaxclt fetch`: known models, and what is published; registered in cli."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Annotated, Any

import tyro
from rich.console import Console

from jaxclt.cli.progress import lines
from jaxclt.files.json_text import to_json

if TYPE_CHECKING:
    from jaxclt.io.published import Pair

__all__ = ["FetchConfig", "run_fetch"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class FetchConfig:
    """Get a known model into the user cache, checksum verified."""

    name: Annotated[tyro.conf.Positional[str], tyro.conf.arg(metavar="[NAME]")] = ""
    """Name of the model."""
    list: bool = False
    """List the known names, and published pairs of a model and a dictionary."""
    accept_terms: bool = False
    """I have read and accept the terms of the model (see --list)."""
    json: bool = False
    """Print the result as JSON on stdout."""
    debug: bool = False
    """Show tracebacks."""


def run_fetch(config: FetchConfig, say: Console) -> None:
    """Fetch a model, or list what there is."""
    from jaxclt.io.fetch import fetch

    if config.list or not config.name:
        _list(config.json)
        return
    path = fetch(
        config.name,
        progress=lines(say),
        accept_terms=config.accept_terms,
    )
    if config.json:
        print(to_json({"name": config.name, "path": str(path)}))  # noqa: T201
    else:
        Console().print(str(path), markup=False, soft_wrap=True)


def _list(as_json: bool) -> None:
    from jaxclt.io.bundled import MODELS
    from jaxclt.io.fetch import KNOWN_MODELS
    from jaxclt.io.published import pairs

    known: dict[str, Any] = dict.fromkeys(MODELS, "bundled, Apache-2.0")
    known |= {
        name: f"{model.licence}, {model.terms}" if model.terms else model.licence
        for name, model in KNOWN_MODELS.items()
    }
    if as_json:
        rows = [dataclasses.asdict(pair) for pair in pairs()]
        print(to_json({"models": known, "pairs": rows}))  # noqa: T201
        return
    console = Console()
    for name, licence in known.items():
        console.print(f"{name}  ({licence})", markup=False)

    console.print("\npublished dictionaries, below the model of each:", style="bold")
    model = ""
    for pair in pairs():
        if pair.model != model:
            model = pair.model
            console.print(model, style="bold", markup=False)
        console.print(f"  {_row(pair)}", markup=False, soft_wrap=True, highlight=False)


def _row(pair: Pair) -> str:
    """One line of the list."""
    size = [pair.kind, pair.layout]
    size += [] if pair.features is None else [f"{pair.features:,} features"]
    size += [] if pair.size_gb is None else [f"{pair.size_gb:g} GB"]
    said = [", ".join(size), f"licence: {pair.licence}", pair.note]
    return f"{pair.dictionary}  ({'; '.join(filter(None, said))})"
