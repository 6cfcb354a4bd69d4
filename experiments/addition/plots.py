"""The pictures of the case study."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
import task
from families import Label

matplotlib.use("Agg")
from matplotlib.figure import Figure

from jaxclt.graph.supernodes import SupernodeGraph

COLOUR = {
    "last digit": "#c2571a",
    "magnitude": "#2a6f97",
    "operand": "#6a994e",
    "sum": "#7a5195",
}


def operand_plots(
    a_LNF: np.ndarray,
    labels: dict[tuple[int, int], Label],
    path: Path,
    *,
    per_family: int = 6,
) -> None:
    """The best fitted features of every family, as 100 x 100 activation maps."""
    families = sorted({x.family for x in labels.values()})
    figure = Figure(figsize=(2 * per_family, 2.3 * len(families)), layout="constrained")
    panels = figure.subplots(len(families), per_family, squeeze=False)
    for row, family in zip(panels, families, strict=True):
        these = [place for place, x in labels.items() if x.family == family]
        these.sort(key=lambda place: -labels[place].fit)
        # labels that differ say more than the six best of one kind
        texts: dict[str, tuple[int, int]] = {}
        for place in these:
            texts.setdefault(labels[place].text, place)
        for panel in row:
            panel.set_axis_off()
        for panel, (layer, feature) in zip(row, texts.values(), strict=False):
            plot_N = a_LNF[layer, :, feature]
            panel.imshow(plot_N.reshape(task.N, task.N).T, origin="lower", cmap="magma")
            found = labels[layer, feature]
            panel.set_title(
                f"{found.text[:30]}\nL{layer} {feature}, fit {found.fit:.2f}",
                fontsize=7,
            )
        row[0].set_axis_on()
        row[0].set_xlabel("a", fontsize=7)
        row[0].set_ylabel(f"{family}\nb", fontsize=8)
        row[0].tick_params(labelsize=6)
    figure.savefig(path, dpi=110)


def supernode_picture(
    small: SupernodeGraph,
    place: dict[str, tuple[float, float, str]],
    path: Path,
    *,
    least: float = 0.05,
) -> None:
    """Groups at their places (x, y, pathway); links above a share of the input."""
    figure = Figure(figsize=(9, 6), layout="constrained")
    panel = figure.subplots()
    panel.set_axis_off()
    index = {name: g for g, name in enumerate(small.names)}
    for target, (x1, y1, _) in place.items():
        for source, (x0, y0, _) in place.items():
            edge = small.edge_GG[index[target], index[source]]
            if abs(edge) >= least and y1 > y0:
                panel.annotate(
                    "",
                    (x1, y1 - 0.12),
                    (x0, y0 + 0.12),
                    arrowprops={
                        "arrowstyle": "-|>",
                        "lw": 0.5 + 6 * abs(edge),
                        "color": "0.45" if edge > 0 else "#b23a48",
                        "linestyle": "-" if edge > 0 else "--",
                        "alpha": min(1.0, 0.35 + abs(edge)),
                    },
                )
    for name, (x, y, pathway) in place.items():
        panel.text(
            x,
            y,
            name,
            ha="center",
            va="center",
            fontsize=8,
            bbox={
                "boxstyle": "round,pad=0.35",
                "fc": "white",
                "ec": COLOUR.get(pathway, "0.3"),
                "lw": 1.6,
            },
        )
    xs, ys = zip(*[(x, y) for x, y, _ in place.values()], strict=True)
    panel.set_xlim(min(xs) - 1, max(xs) + 1)
    panel.set_ylim(min(ys) - 0.5, max(ys) + 0.5)
    figure.savefig(path, dpi=120)


def swap_bars(found: dict[str, dict[str, Any]], path: Path) -> None:
    """Hit rates with their intervals, dictionary by dictionary."""
    names = list(next(iter(found.values()))["swaps"])
    figure = Figure(figsize=(8, 3.2), layout="constrained")
    panels: Sequence[Any] = figure.subplots(1, 2, sharey=True)
    for panel, (what, title) in zip(
        panels,
        {
            "answer": "answer as predicted",
            "last_digit": "last digit as predicted",
        }.items(),
        strict=True,
    ):
        for i, (dictionary, one) in enumerate(found.items()):
            x = np.arange(len(names)) + 0.38 * (i - (len(found) - 1) / 2)
            rows = [one["swaps"][name][what] for name in names]
            y = np.array([r["share"] for r in rows])
            error = np.abs(np.array([r["interval"] for r in rows]).T - y)
            panel.bar(x, y, 0.36, label=dictionary, yerr=error, capsize=2)
        panel.set_xticks(
            range(len(names)), [n.replace(", ", "\n") for n in names], fontsize=6
        )
        panel.set_title(title, fontsize=9)
        panel.set_ylim(0, 1)
    panels[0].legend(fontsize=7)
    figure.savefig(path, dpi=120)
