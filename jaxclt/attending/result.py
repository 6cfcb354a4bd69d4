"""One cell as a notebook and the command line show it."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

from jaxclt.attending.apart import Apart

__all__ = ["Attention"]

_SHOWN = 8  # nodes of a side, and pairs


@dataclasses.dataclass(frozen=True, kw_only=True)
class Attention:
    """Why a head attends from one token to another; prints as text."""

    apart: Apart  # factors and sums of all nodes
    said: dict[str, Any]  # as a cell of attention.json
    contrast: str  # what its effects are on, without control characters

    def to_dict(self) -> dict[str, Any]:
        """As JSON: a cell of attention.json."""
        return self.said

    def __str__(self) -> str:
        """Its score by nodes and pairs, as plain text."""
        cell, apart = self.apart.cell, self.apart
        lines = [
            self.said["text"],
            f"attention {apart.weight:.1%}; score {apart.score:.4g}, "
            f"{apart.against:+.4g} from the mean of its row "
            f"(pairs sum to it within {apart.relative_error:.0e})",
        ]
        if math.isfinite(cell.effect):
            moved, more = f"{cell.effect:+.4g}", f"{cell.pattern_effect:+.4g}"
            on = f"effect on {self.contrast}"
            lines.append(
                f"{on}: {moved} by what it moves, {more} for one more of score"
            )
        for side in ("query", "key"):
            lines.append(f"the {side} is made of: part of the score")
            nodes = self.said[f"{side}_nodes"][:_SHOWN]
            lines += [f"  {part:+10.4g}  {name}" for _, name, part in nodes]
        lines.append("pairs, query x key: part of the score, and against the mean key")
        for _, _, query, key, score, against in self.said["pairs"][:_SHOWN]:
            lines.append(f"  {score:+10.4g} {against:+10.4g}  [{query}] x [{key}]")
        return "\n".join(lines)
