"""`jaxclt demo`: its flags, and what it prints; registered in cli."""

from __future__ import annotations

import dataclasses
import time
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from rich.console import Console
from rich.table import Table
from rich.text import Text

from jaxclt.cli.compiled import use_compilation_cache
from jaxclt.cli.progress import Run, lines, long_command, progress
from jaxclt.files.json_text import to_json

if TYPE_CHECKING:
    from jaxclt.cli.tour import DemoResult

__all__ = ["DemoConfig", "run_demo_command"]

NEXT = """next, on a real model (98 MB, Apache-2.0):
  jaxclt trace "The Eiffel Tower is in the city of" --model smollm2-135m \\
      --dictionary neurons:32 --out out/eiffel
and here:
  jaxclt trace "calc: 8+7=" --model addition --dictionary addition-clt --out out/15
  jaxclt patch {out} --group "{group}" --scale 0"""


@dataclasses.dataclass(frozen=True, kw_only=True)
class DemoConfig:
    """The whole method on a bundled model that adds: no download, under a minute."""

    out: Path = Path("out/demo")
    """Directory to write to."""
    json: bool = False
    """Print the result as JSON on stdout."""
    debug: bool = False
    """Show tracebacks."""


@long_command
def run_demo_command(config: DemoConfig, say: Console, run: Run) -> None:
    """Run the demo and show what came out."""
    started = time.perf_counter()
    use_compilation_cache()
    from jaxclt.cli.tour import run_demo

    run.own(config.out, makes="trace")
    found = run_demo(
        config.out,
        say=lines(say),
        progress=partial(progress, say, look=run.look),
    )
    seconds = time.perf_counter() - started
    if config.json:
        print(to_json(_as_json(found, config.out, seconds)))  # noqa: T201
        return
    _show(found, config.out, seconds)


def _as_json(found: DemoResult, out: Path, seconds: float) -> dict:
    return {
        "report": found.report,
        "patch": found.swapped.to_json(),
        "validation": {"verdict": found.validation["verdict"]},
        "page": str(out / "index.html"),
        "seconds": round(seconds, 2),
    }


def _show(found: DemoResult, out: Path, seconds: float) -> None:
    from jaxclt.graph.supernodes import describe_supernodes

    console, report = Console(), found.report

    def lines(title: str, text: str) -> None:
        console.print(f"\n{title}", style="bold", markup=False)
        for line in text.splitlines():
            console.print(f"  {line}", markup=False, soft_wrap=True, highlight=False)

    full, proof = report["scores"]["full"], report["certificate"]
    table = Table(show_header=False)
    token, probability = report["top_tokens"][0]
    for name, value in {
        "answer": f"{token} (p {probability:.3f})",
        "graph": f"{report['graph']['features_active']} features, all of them; shown "
        f"{report['graph']['kept_nodes']} nodes",
        "replacement score": f"{full['replacement']:.3f}",
        "completeness": f"{full['completeness']:.3f}",
        "row error (max)": f"{proof['max_relative_row_error']:.1e}",
    }.items():
        table.add_row(name, Text(value))
    console.print(table)
    lines("strongest paths", "\n".join(report["paths"]))
    lines(
        "features of one family as one node (share of influence, sign, share of input)",
        describe_supernodes(found.supernodes, k=8),
    )
    swapped = found.swapped
    before, after = swapped.top_before[0], swapped.top_after[0]
    lines(
        "patch: the last-digit features get what they have at another last digit",
        f"{len(swapped.edits)} features changed: {before[0]} (p {before[1]:.2f}) "
        f"-> {after[0]} (p {after[1]:.2f})",
    )
    lines("what the graph predicted, against patches", found.validation["verdict"])
    page = (out / "index.html").resolve().as_uri()
    console.print(f"\npage: {page}", markup=False, soft_wrap=True)
    group = next(
        (n for n in found.supernodes.names if not n.startswith(("token", "output"))), ""
    )
    console.print(
        f"\n{NEXT.format(out=out, group=group)}", markup=False, soft_wrap=True
    )
    console.print(f"\n{seconds:.0f} s in all", markup=False)
