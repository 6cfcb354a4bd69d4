"""The paper's claims about dictionaries, checked on the rows of an evaluation.

Circuit Tracing (2025), section 5.1: cross-layer transcoders have shorter paths than
per-layer ones and write with less error, and both are better than thresholded neurons.
Differences are of the same prompts or windows, and a claim holds only if the interval
of the difference leaves out zero.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from typing import Any, Literal

import jax
import numpy as np

from jaxclt.validation.stats import mean_interval, ratio_interval

__all__ = ["Claim", "check_claims"]

ALIKE = 1.5  # L0s that differ by more than this factor are not equal

Row = dict[str, Any]


@dataclasses.dataclass(frozen=True)
class Claim:
    """One comparison of two dictionaries.

    Attributes:
      text: the claim with its numbers.
      verdict: what the interval of the difference says.
      difference: of the first and the second, positive where the claim says so.
      interval: 95%.
    """

    text: str
    verdict: Literal["holds", "does not hold", "undecided"]
    difference: float
    interval: tuple[float, float]


def check_claims(
    rows: Sequence[Row], raw: Sequence[Row], key: jax.Array
) -> list[Claim]:
    """Every comparison that the rows allow.

    Each transcoder is compared with the thresholded neurons whose L0 is next to its
    own, each cross-layer one with every per-layer one.

    Args:
      rows: from `jaxclt.evaluation.evaluate.evaluate`.
      raw: the raw rows from there.
      key: draws resamples.
    """
    kinds = ("clt", "plt", "neurons")
    clts, plts, neurons = ([r for r in rows if r["kind"] == kind] for kind in kinds)
    found: list[Claim] = []
    for clt in clts:
        for plt in plts:
            found += _compared(clt, plt, raw, key, lengths=True)
    for one in [*clts, *plts]:
        own = max(one["l0"], 1e-9)
        near = sorted(neurons, key=lambda n: abs(np.log(n["l0"] / own)))[:1]
        for row in near:
            found += _compared(one, row, raw, key, lengths=False)
    return found


def _compared(
    a: Row, b: Row, raw: Sequence[Row], key: jax.Array, *, lengths: bool
) -> Iterator[Claim]:
    names = f"`{a['dictionary']}`", f"`{b['dictionary']}`"
    ratio = a["l0"] / max(b["l0"], 1e-9)
    unlike = "" if 1 / ALIKE < ratio < ALIKE else f", at {ratio:.2g} times its L0"
    for what, better, measure, value in _MEASURES:
        if what == "shorter paths" and not lengths:
            continue
        pair = [_values(raw, row["dictionary"], measure, value) for row in (a, b)]
        if any(len(x) < 2 for x, _ in pair) or len(pair[0][0]) != len(pair[1][0]):
            continue
        (top_a, n_a), (top_b, _) = pair
        sign = 1.0 if better == "higher" else -1.0
        each = sign * (top_a - top_b)
        if not n_a.sum():
            continue
        difference = float(each.sum() / n_a.sum())
        one_each = bool((n_a == 1).all())
        low, high = (
            mean_interval(each, key) if one_each else ratio_interval(each, n_a, key)
        )
        verdict = "holds" if low > 0 else "does not hold" if high < 0 else "undecided"
        values = [float(x.sum() / n.sum()) for x, n in pair]
        yield Claim(
            f"{names[0]} has {what} than {names[1]}: {values[0]:.3g} against "
            f"{values[1]:.3g}{unlike}",
            verdict,
            difference,
            (low, high),
        )


# What is claimed, which side is better, which raw rows tell, and what of them.
_MEASURES = (
    ("shorter paths", "lower", "graphs", "mean_path_length"),
    ("less unexplained variance", "lower", "reconstruction", "fvu"),
    ("a lower KL of the replacement model", "lower", "agreement", "kl"),
    ("a higher completeness", "higher", "graphs", "completeness"),
    ("a higher replacement score", "higher", "graphs", "replacement"),
)


def _values(
    raw: Sequence[Row], dictionary: str, measure: str, value: str
) -> tuple[np.ndarray, np.ndarray]:
    """Sums and counts by independent unit: a prompt, or a window of text."""
    lines = [
        line
        for line in raw
        if line["dictionary"] == dictionary and line["measure"] == measure
    ]
    if measure == "graphs":
        lines = [line["scores"] for line in lines]
    x = np.array([line[value] for line in lines], float)  # None becomes nan
    n = [line["n"] if measure == "agreement" else 1 for line in lines]
    return x, np.array(n, float)
