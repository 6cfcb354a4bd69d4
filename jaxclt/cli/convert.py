"""`jaxclt convert`: a dictionary in another tool's format; registered in cli."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Annotated, Literal

import tyro
from rich.console import Console
from rich.table import Table
from rich.text import Text

from jaxclt.cli.progress import Run, long_command, progress
from jaxclt.files.json_text import to_json

__all__ = ["ConvertConfig", "run_convert"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class ConvertConfig:
    """Write a dictionary in another format, one layer in memory at a time.

    Refuses if anything would be lost, unless --lossy names it.
    """

    source: Annotated[tyro.conf.Positional[str], tyro.conf.arg(metavar="SOURCE")]
    """Directory in any known format, a bundled name, or a hub id
    organisation/name[//folder][@revision]."""
    out: Annotated[tyro.conf.Positional[Path], tyro.conf.arg(metavar="OUT")]
    """Directory to create."""
    to: Annotated[
        Literal[
            "circuit-tracer", "gemma-scope", "gemma-scope-2", "saelens", "sparsify"
        ],
        tyro.conf.arg(metavar="FORMAT"),
    ]
    """circuit-tracer, gemma-scope (npz), gemma-scope-2, saelens or sparsify."""
    lossy: tuple[str, ...] = ()
    """What may be lost, by the names that the refusal gives."""
    json: bool = False
    """Print the result as JSON on stdout."""
    debug: bool = False
    """Show tracebacks."""


@long_command
def run_convert(config: ConvertConfig, say: Console, run: Run) -> None:
    """Convert, and say what was written and what was lost."""
    from jaxclt.io.convert import convert

    with progress(say, "converting", "layers/s", run.look) as on_layer:
        report = convert(
            config.source, config.out, config.to, lossy=config.lossy, on_layer=on_layer
        )
    if config.json:
        print(to_json(report))  # noqa: T201
        return
    table = Table(title="converted", show_header=False)
    rows = {
        "from": report["from"],
        "to": report["to"],
        "layers": f"{report['layers']}, {report['features']:,} features each",
        "size": f"{report['bytes'] / 1e6:,.1f} MB",
    }
    rows |= {f"lost: {name}": why for name, why in report["lost"].items()}
    for name, value in rows.items():
        table.add_row(name, Text(value))
    Console().print(table)
    Console().print(report["out"], markup=False, soft_wrap=True)
