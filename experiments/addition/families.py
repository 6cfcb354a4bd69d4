"""Operand plots, and what family of the paper each feature belongs to.

A feature's operand plot is its activation at one position on all 100 x 100 sums. Each
plot is fitted by conditional means over some partitions of the sums (by a, by the last
digit of a + b, by both last digits ...). Of the partitions whose adjusted R² comes near
the best one, the coarsest is the feature's family; the label names the cells where it
is on, and its own fit is the R² of just that on/off statement.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import numpy as np
import task

NEAR = 0.03  # adjusted R² that a coarser partition may lose
CLEAR = 0.5  # a label needs a fit of this much
RANGE = 20  # between the smallest and the largest sum of a feature about size
MOST_NAMED = 4  # cells that a label lists


@dataclasses.dataclass(frozen=True, kw_only=True)
class Partition:
    """A way to sort sums into cells."""

    name: str
    family: str  # of the paper
    pathway: str  # last digit, magnitude, operand, or sum, which joins both
    cell_N: np.ndarray
    text: str  # of one cell
    ordered: bool = True  # neighbouring cells make a range


def partitions() -> list[Partition]:
    """From coarse to fine."""
    a, b = task.all_pairs()
    s = a + b

    def one(name, family, pathway, cell, text, ordered=True) -> Partition:
        return Partition(
            name=name,
            family=family,
            pathway=pathway,
            cell_N=cell,
            text=text,
            ordered=ordered,
        )

    digit, size = "last digit", "magnitude"
    return [
        one("a digit", "ends in", digit, a % 10, "a ends in {}", False),
        one("b digit", "ends in", digit, b % 10, "b ends in {}", False),
        one("sum digit", "ends in", digit, s % 10, "sum ends in {}", False),
        one("a tens", "magnitude", size, a // 10, "a in {}0s"),
        one("b tens", "magnitude", size, b // 10, "b in {}0s"),
        one("sum tens", "magnitude", size, s // 10, "sum in {}0s"),
        one("a", "add x", "operand", a, "a = {}"),
        one("b", "add x", "operand", b, "b = {}"),
        one("digits", "lookup table", digit, a % 10 * 10 + b % 10, "_{}+_{}", False),
        one("tens", "magnitude", size, a // 10 * 10 + b // 10, "{}0s+{}0s", False),
        one("sum", "sum", "sum", s, "sum = {}"),
    ]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Label:
    """What a feature stands for at one position."""

    partition: str
    family: str
    pathway: str
    text: str
    fit: float  # R² of "on where the label says"
    family_fit: float  # R² of the family's conditional means

    @property
    def clear(self) -> bool:
        """Whether the label may be shown."""
        return self.fit >= CLEAR

    @property
    def belongs(self) -> bool:
        """Whether the feature is of its family, whatever its label says."""
        return self.family_fit >= CLEAR


def cell_means(plot_N: np.ndarray, cell_N: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Mean of each cell, and how many sums it has; empty cells are 0."""
    count = np.bincount(cell_N)
    return np.bincount(cell_N, plot_N) / np.maximum(count, 1), count


def explained(plot_N: np.ndarray, fitted_N: np.ndarray) -> float:
    """Share of the plot's variance."""
    return float(1 - np.mean((plot_N - fitted_N) ** 2) / plot_N.var())


def label(plot_N: np.ndarray, among: Sequence[Partition]) -> Label:
    """The family and label of an operand plot [N²] that is not constant."""
    n = len(plot_N)
    scored = []
    for part in among:
        mean_C, count_C = cell_means(plot_N, part.cell_N)
        fit = explained(plot_N, mean_C[part.cell_N])
        cells = int((count_C > 0).sum())
        scored.append((1 - (1 - fit) * (n - 1) / (n - cells), cells, fit, part, mean_C))
    best = max(adjusted for adjusted, *_ in scored)
    near = [x for x in scored if x[0] >= best - NEAR]
    _, _, fit, part, mean_C = min(near, key=lambda x: (x[1], -x[0]))
    on_C = mean_C >= mean_C.max() / 2
    on_N = on_C[part.cell_N]
    means = [
        plot_N[on_N == side].mean() if (on_N == side).any() else 0 for side in (0, 1)
    ]
    family, pathway = refine(np.flatnonzero(on_C), part)
    return Label(
        partition=part.name,
        family=family,
        pathway=pathway,
        text=describe(np.flatnonzero(on_C), part),
        fit=explained(plot_N, np.where(on_N, means[1], means[0])),
        family_fit=fit,
    )


def refine(on: np.ndarray, part: Partition) -> tuple[str, str]:
    """Family and pathway, given where the feature is on.

    Pairs of digits with one sum, and sums with one last digit, are about how the sum
    ends; sums that lie close together are about its size.
    """
    if (
        part.name == "digits"
        and len(on) > 1
        and len({sum(divmod(int(c), 10)) for c in on}) == 1
    ):
        return "ends in", "last digit"
    if part.name == "sum" and len(on) > 1 and len({int(c) % 10 for c in on}) == 1:
        return "ends in", "last digit"
    if part.name == "sum" and on[-1] - on[0] <= RANGE:
        return "sum in range", "magnitude"
    return part.family, part.pathway


def describe(on: np.ndarray, part: Partition) -> str:
    """The cells in words."""
    if part.name in ("digits", "tens"):
        return _pairs([divmod(int(c), 10) for c in on], part)
    lo, hi = int(on[0]), int(on[-1])
    if part.ordered and len(on) > 1 and len(on) == hi - lo + 1:
        if "tens" in part.name:
            return f"{part.name.split()[0]} in {lo}0..{hi}9"
        return f"{part.name} in {lo}..{hi}"
    head, _, tail = part.text.partition("{}")
    if len(on) <= MOST_NAMED or not part.ordered:
        return head + ",".join(map(str, on)) + tail
    last = sorted({int(c) % 10 for c in on})
    if part.name == "sum" and len(last) <= 2:
        return f"sum ends in {','.join(map(str, last))}, {lo}..{hi}"
    return f"{len(on)} values of {part.name} in {lo}..{hi}"


def _pairs(pairs: list[tuple[int, int]], part: Partition) -> str:
    """Pairs of digits: what they have in common, a list, or how many there are."""
    if len({x + y for x, y in pairs}) == 1 and len(pairs) > 1:
        return f"{part.name} add to {sum(pairs[0])}"
    if len(pairs) <= MOST_NAMED:
        return " or ".join(part.text.format(*pair) for pair in pairs)
    rows, columns = ({pair[i] for pair in pairs} for i in (0, 1))
    if len(pairs) == len(rows) * len(columns) and min(len(rows), len(columns)) < 10:
        return part.text.format(_set(rows), _set(columns))
    return f"{len(pairs)} pairs of {part.name}"


def _set(digits: set[int]) -> str:
    if len(digits) == 10:
        return "x"
    return (
        str(*digits)
        if len(digits) == 1
        else f"{{{','.join(map(str, sorted(digits)))}}}"
    )
