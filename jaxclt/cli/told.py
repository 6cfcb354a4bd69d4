"""The story of a graph in the terminal: a paragraph, and a bar for each token."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from rich.console import RenderableType
from rich.table import Table
from rich.text import Text

__all__ = ["told"]

_BAR = 24  # characters of the longest


def told(report: Mapping[str, Any]) -> list[RenderableType]:
    """What `jaxclt trace` says first, as far as the report has it."""
    if "story" not in report:
        return []
    story = report["story"]
    paragraph = Text(" ".join([*story["text"], story["trust"]]))
    return [paragraph, *([_bars(report)] if report["tokens"] else [])]


def _bars(report: Mapping[str, Any]) -> Table:
    from jaxclt.graph.nodes import quoted

    tokens = report["tokens"]
    most = max((abs(token["effect"] or 0) for token in tokens), default=0) or 1
    made = Table(box=None, padding=(0, 2, 0, 0), title_justify="left")
    made.add_column("token", overflow="ellipsis", no_wrap=True, max_width=20)
    made.add_column("without it", justify="right", no_wrap=True)
    made.add_column("", no_wrap=True)
    made.add_column("graph's share", justify="right", no_wrap=True)
    for token in tokens:
        effect = token["effect"] or 0
        length = round(_BAR * abs(effect) / most)
        color = "red" if effect < 0 else "blue"
        share = token["share"]
        made.add_row(
            Text(quoted(token["token"])),
            f"{effect:+.2f}",
            Text("█" * length or "▏", style=color),
            "" if share is None else f"{share:.0%}",
        )
    return made
