"""`jaxclt convert`: a dictionary in another tool's format."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Annotated, Literal

from tyro.conf import Positional, arg

from jaxclt.cli.common import answer, table
from jaxclt.cli.flags import AsJson, Debug
from jaxclt.cli.progress import Run

__all__ = ["ConvertFlags", "run_convert"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class ConvertFlags:
    """Write a dictionary in another format, one layer in memory at a time.

    Refuses if anything would be lost, unless --lossy names it.
    """

    source: Annotated[Positional[str], arg(metavar="SOURCE")]
    """Directory in any known format, a bundled name, or a hub id
    organisation/name[//folder][@revision]."""
    out: Annotated[Positional[Path], arg(metavar="OUT")]
    """Directory to create."""
    to: Annotated[
        Literal[
            "circuit-tracer",
            "gemma-scope",
            "gemma-scope-2",
            "saelens",
            "sparsify",
            "jaxclt",
        ],
        arg(metavar="FORMAT"),
    ]
    """circuit-tracer, gemma-scope (npz), gemma-scope-2, saelens, sparsify, or jaxclt,
    which can say all that a transcoder here can be."""
    lossy: tuple[str, ...] = ()
    """What may be lost, by the names that the refusal gives."""
    json: AsJson = False
    debug: Debug = False


def run_convert(flags: ConvertFlags, run: Run) -> None:
    """Convert, and say what was written and what was lost."""
    from jaxclt.io.convert import convert_dictionary

    with run.progress("converting", "layers/s") as on_layer:
        report = convert_dictionary(
            flags.source, flags.out, flags.to, lossy=flags.lossy, on_layer=on_layer
        )
    rows = {
        "from": report["from"],
        "to": report["to"],
        "layers": f"{report['layers']}, {report['features']:,} features each",
        "size": f"{report['bytes'] / 1e6:,.1f} MB",
    }
    rows |= {f"lost: {name}": why for name, why in report["lost"].items()}
    answer(flags.json, report, table("converted", rows), report["out"])
