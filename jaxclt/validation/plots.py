"""Pictures of patches and validations; matplotlib without a display.

Token text is untrusted: it is drawn literally, never as mathematics.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from jaxclt.files.atomic import atomic_path

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from jaxclt.patching.patch import PatchResult

__all__ = ["draw_effects", "draw_faithfulness", "draw_patch", "draw_ranks"]


def _figure(n: int, *, height: float = 3.4) -> tuple[Figure, list[Axes]]:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(4.2 * n, height), layout="constrained")
    axes = figure.subplots(1, n, squeeze=False)[0]
    return figure, list(axes)


def _save(figure: Figure, path: Path) -> None:
    with atomic_path(path) as temporary:
        figure.savefig(temporary, format="png", dpi=120)


def _plain(text: str, most: int = 24) -> str:
    """Token text as one short line."""
    shown = repr(text)[1:-1]
    return shown if len(shown) <= most else shown[: most - 3] + "..."


def draw_patch(
    path: Path,
    curve: dict[str, Any],
    result: PatchResult,
    sweep: dict[str, Any] | None = None,
    *,
    most: int = 5,
) -> None:
    """Target probability against the factor, and against the end layer if swept."""
    figure, axes = _figure(1 if sweep is None else 2)
    probability = np.asarray(curve["probability"], float)  # nan where it diverged
    for k, target in enumerate(result.targets[:most]):
        axes[0].plot(
            curve["scale"], probability[:, k], marker=".", label=_plain(target["token"])
        )
    axes[0].axvline(1, color="grey", linewidth=0.8)
    axes[0].set_xlabel("factor on the edited features (0 ablates, 1 clean)")
    axes[0].set_ylabel("probability")
    axes[0].set_title(f"{result.mode}, layers {result.layers[0]}-{result.layers[1]}")
    if sweep is not None:
        ends = np.asarray(sweep["probability"], float)
        for k in range(min(most, ends.shape[1])):
            axes[1].plot(sweep["last_layers"], ends[:, k], marker=".")
            axes[1].axhline(result.targets[k]["p_before"], color="grey", linewidth=0.5)
        axes[1].set_xlabel("last layer of the range")
        axes[1].set_title("end-layer sweep")
    legend = axes[0].legend(fontsize=8)
    for text in legend.get_texts():
        text.set_parse_math(False)
    _save(figure, path)


def draw_effects(path: Path, scatter: dict[str, Any]) -> None:
    """Predicted against measured change of the targets, a panel for each mode."""
    modes = list(scatter)
    figure, axes = _figure(len(modes))
    for ax, mode in zip(axes, modes, strict=True):
        points = scatter[mode]
        x, y = np.asarray(points["predicted"]), np.asarray(points["measured"])
        control = np.asarray(points["control"], bool)
        for mine, name in ((~control, "top"), (control, "random")):
            ax.plot(x[mine].ravel(), y[mine].ravel(), ".", markersize=3, label=name)
        both = np.concatenate([x.ravel(), y.ravel()])
        low, high = (both.min(), both.max()) if len(both) else (0.0, 1.0)
        ax.plot([low, high], [low, high], color="grey", linewidth=0.8)
        size = max(float(np.abs(both).max(initial=0)), 1e-9)
        power = 10.0 ** np.floor(np.log10(size))
        ticks = [-power, -power / 10, 0, power / 10, power]
        ax.set_xscale("symlog", linthresh=power / 100)
        ax.set_yscale("symlog", linthresh=power / 100)
        ax.set_xticks(ticks, [f"{tick:g}" for tick in ticks])
        ax.set_yticks(ticks, [f"{tick:g}" for tick in ticks])
        ax.set_title(mode)
        ax.set_xlabel("predicted change of the logit")
    axes[0].set_ylabel("measured")
    axes[0].legend(fontsize=8)
    _save(figure, path)


def draw_ranks(path: Path, points: dict[str, Any]) -> None:
    """Divergence of ablations against influence, activation and direct edge."""
    names = ("influence", "activation", "direct")
    figure, axes = _figure(len(names))
    kl = np.maximum(np.asarray(points["kl"]), 1e-12)
    for ax, name in zip(axes, names, strict=True):
        ax.loglog(np.maximum(np.asarray(points[name]), 1e-12), kl, ".", markersize=3)
        ax.set_xlabel(name)
    axes[0].set_ylabel("KL of the ablation, nats")
    _save(figure, path)


def draw_faithfulness(path: Path, found: dict[str, Any], layers: list[int]) -> None:
    """Heat maps: perturbed layer by measured layer, cosine above and nmse below."""
    from matplotlib.figure import Figure

    kinds = list(found)
    figure = Figure(figsize=(2.6 * len(kinds), 5.2), layout="constrained")
    axes = figure.subplots(2, len(kinds), squeeze=False)
    for column, kind in enumerate(kinds):
        for row, (name, low, high) in enumerate((("cosine", 0, 1), ("nmse", 0, 2))):
            ax = axes[row][column]
            values = np.array(found[kind][name], np.float64)
            image = ax.imshow(
                values, vmin=low, vmax=high, aspect="auto", interpolation="nearest"
            )
            ax.set_yticks(range(len(layers)), [str(layer) for layer in layers])
            ax.set_title(f"{kind.replace('_', ' ')}\n{name}", fontsize=8)
            ax.set_xlabel("measured layer", fontsize=8)
            if column == len(kinds) - 1:
                figure.colorbar(image, ax=ax)
    axes[0][0].set_ylabel("perturbed layer", fontsize=8)
    _save(figure, path)
