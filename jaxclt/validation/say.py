"""How numbers of a validation report are written, in its verdict and its tables."""

from __future__ import annotations

from typing import Any

import numpy as np

__all__ = ["BY", "next_layer", "percent", "show", "with_interval"]

# Who predicts what features do.
BY = {
    "response": "the graph's total effects by response",
    "derivative": "the model's own derivative",
    "finite": "the local replacement model (attention and norms live, gates held)",
    "local": "the local replacement model (norms live, gates held)",
    "value": "the graph's total effects",
    "last_norm": "the same, the last norm to first order",
}


def show(x: float | None, digits: int = 2) -> str:
    """A number, or a dash."""
    return "-" if x is None else f"{x:.{digits}f}"


def percent(x: float | None) -> str:
    """A share, or a dash."""
    return "-" if x is None else f"{x:.0%}"


def with_interval(found: dict[str, Any]) -> str:
    """A rank correlation with its interval."""
    low, high = found.get("interval", [None, None])
    return f"{show(found['spearman'])} [{show(low)}, {show(high)}]"


def next_layer(found: dict[str, Any], layers: list[int], name: str) -> float | None:
    """Mean of a measure of perturbations one layer after them."""
    rows = zip(found[name], layers, strict=True)
    values = [v for row, layer in rows for v in row[layer + 1 : layer + 2]]
    kept = [v for v in values if v is not None]
    return float(np.mean(kept)) if kept else None


def shown_astray(report: dict[str, Any]) -> bool:
    """Whether the lead without any feature makes shares of it mislead."""
    found = report["shown"]
    if found["sufficiency"] is None:
        return False
    m, share = found["live"]["m"], found["sufficiency"]
    return m["all"] <= m["none"] or not 0 <= share <= 1.5


def shown_in_words(report: dict[str, Any]) -> str:
    """The shown graph kept alone and dropped alone, in the live semantics."""
    found = report["shown"]
    m, random = found["live"]["m"], found["live"]["random"]["sufficiency"]["mean"]
    said = (
        f"The {found['n']} features shown (of {found['n_active']}), kept alone, make "
        f"{report['contrast']} {show(m['keep'], 1)} where it is {show(m['all'], 1)}; "
        f"dropped alone, {show(m['drop'], 1)}; without any feature it is "
        f"{show(m['none'], 1)}"
    )
    if shown_astray(report):
        return f"{said}: others work against them, do not read shares into it."
    return (
        f"{said} (sufficiency {percent(found['sufficiency'])}, as many at random "
        f"{percent(random)}; necessity {percent(found['necessity'])})."
    )
