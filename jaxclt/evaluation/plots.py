"""Pictures of an evaluation: layers, graphs, perturbations; no display is needed."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from jaxclt.files.atomic import atomic_path

__all__ = ["draw_faithfulness", "draw_graphs", "draw_layers"]

Row = dict[str, Any]


def _figure(n: int) -> tuple[Any, list[Any]]:
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    figure = Figure(figsize=(4.2 * n, 3.6), layout="constrained")
    axes = figure.subplots(1, n, squeeze=False)[0]
    for ax in axes:
        ax.spines[["top", "right"]].set_visible(False)
        ax.grid(alpha=0.25)
        ax.xaxis.set_major_locator(MaxNLocator(integer=True))
    return figure, list(axes)


def _save(figure: Any, axes: Sequence[Any], path: Path) -> None:
    if not any(ax.has_data() for ax in axes):
        return  # the measure was not asked for
    axes[0].legend(fontsize=7)
    with atomic_path(path) as file:
        figure.savefig(file, format="png", dpi=130)


def _name(row: Row) -> str:
    """A legend's entry: the last part of a path."""
    return row["dictionary"].rstrip("/").rsplit("/", 1)[-1]


def draw_layers(path: Path, rows: Sequence[Row]) -> None:
    """FVU by layer, and what replacing that layer alone does."""
    figure, axes = _figure(3)
    for ax, key, title in zip(
        axes,
        ("fvu_L", "l0_L", "layer_kl_L"),
        (
            "unexplained variance",
            "active features of a token",
            "KL, it alone replaced",
        ),
        strict=True,
    ):
        for row in rows:
            if row.get(key):
                ax.plot(row[key], label=_name(row), lw=1.4)
        ax.set(title=title, xlabel="layer")
        if key != "fvu_L":
            ax.set_yscale("symlog", linthresh=1e-3 if key == "layer_kl_L" else 1.0)
    _save(figure, axes, path)


def draw_graphs(path: Path, rows: Sequence[Row]) -> None:
    """Path lengths and the pruning frontier (the paper's figures 22 and 28)."""
    figure, axes = _figure(2)
    for row in rows:
        if not row.get("curve"):
            continue
        label = _name(row)
        axes[0].plot(range(1, len(row["curve"]) + 1), row["curve"], label=label, lw=1.4)
        step = row["frontier"]
        axes[1].plot(
            [x["nodes"] for x in step],
            [x["completeness"] for x in step],
            marker=".",
            label=label,
            lw=1.4,
        )
    axes[0].set(
        title="influence of embeddings by paths of at most so many edges",
        xlabel="edges",
        ylim=(0, 1.02),
    )
    axes[0].title.set_fontsize(9)
    axes[1].set(title="pruning", xlabel="features kept", ylabel="completeness")
    axes[1].set_xscale("log")
    _save(figure, axes, path)


def draw_faithfulness(path: Path, rows: Sequence[Row]) -> None:
    """Cosine and NMSE of perturbations by layers downstream (figure 36)."""
    figure, axes = _figure(2)
    for row in rows:
        found = row.get("faithfulness", {}).get("upstream")
        if not found:
            continue
        for ax, what in zip(axes, ("cosine", "nmse"), strict=True):
            at = {int(d): v for d, v in found[what].items()}
            if what == "nmse":
                at.pop(0, None)  # nothing yet, and the axis is logarithmic
            ax.plot(list(at), list(at.values()), label=_name(row), lw=1.4)
    axes[0].set(
        title="cosine of responses", xlabel="layers downstream", ylim=(-0.05, 1.05)
    )
    axes[1].set(title="NMSE of responses", xlabel="layers downstream")
    axes[1].set_yscale("log")
    _save(figure, axes, path)
