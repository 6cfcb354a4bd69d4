"""Predicted against measured effects in one line of numbers (maths 16.11)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np

from jaxclt.files.json_text import rounded
from jaxclt.graph.agreement import pearson, sign_agreement, slope, spearman
from jaxclt.validation.stats import bootstrap, ratio_interval

__all__ = ["line", "token_agreement", "within_2"]


def within_2(x: np.ndarray, y: np.ndarray) -> float:
    """Share of pairs of which y is between half and twice x; nan if there is none."""
    return float(_near(x, y).mean()) if x.size else np.nan


def _near(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    return (x * y > 0) & (np.abs(y) <= 2 * np.abs(x)) & (np.abs(x) <= 2 * np.abs(y))


def line(
    predicted_BX: np.ndarray, measured_BX: np.ndarray, key: jax.Array
) -> dict[str, Any]:
    """How predictions of B patches agree with what they did, as JSON.

    ``spearman`` and ``pearson``; ``sign``, the share of right signs among the larger
    half of the predictions; ``slope`` of measured on predicted; ``within_2``, the share
    within a factor of two; ``n`` patches. ``interval`` is Spearman's, ``intervals``
    has all of them (95%, patches drawn again). None where there is nothing to say.

    Args:
      predicted_BX: effects of each patch on X things.
      measured_BX: likewise.
      key: PRNG key.
    """
    x, y = (np.asarray(a, np.float64) for a in (predicted_BX, measured_BX))
    found = {
        "spearman": spearman(x, y),
        "pearson": pearson(x, y),
        "sign": sign_agreement(x, y),
        "slope": slope(x, y),
        "within_2": within_2(x, y),
    }
    intervals = _intervals(x, y, key)
    return {
        **{name: rounded(value) for name, value in found.items()},
        "n": len(x),
        "interval": intervals["spearman"],
        "intervals": intervals,
    }


def _intervals(
    x_BX: np.ndarray, y_BX: np.ndarray, key: jax.Array
) -> dict[str, list[float | None]]:
    large_BX = np.zeros(x_BX.shape)
    if x_BX.size:
        large_BX[np.abs(x_BX) >= np.median(np.abs(x_BX))] = 1
    same_BX = large_BX * (np.sign(x_BX) == np.sign(y_BX))
    shares = {
        "slope": (x_BX * y_BX, x_BX * x_BX),
        "sign": (same_BX, large_BX),
        "within_2": (1.0 * _near(x_BX, y_BX), np.ones(x_BX.shape)),
    }
    found = {
        "spearman": bootstrap(spearman, x_BX, y_BX, key),
        "pearson": bootstrap(pearson, x_BX, y_BX, key),
    } | {
        name: ratio_interval(top_BX.sum(1), bottom_BX.sum(1), key)
        for name, (top_BX, bottom_BX) in shares.items()
    }
    return {name: [rounded(x) for x in ends] for name, ends in found.items()}


def token_agreement(
    tokens: Sequence[Mapping[str, Any]], massive: np.ndarray
) -> dict[str, Any] | None:
    """How the graph's shares of tokens rank what the model loses without each, as JSON.

    Shares have no sign: Spearman with the sizes of the effects, of all tokens and
    without those at massive positions, on which heads rest that have nothing to attend
    to. None without shares.

    Args:
      tokens: ``position``, ``effect`` and ``share`` of each, as a story has them.
      massive: positions.
    """
    if any(token["share"] is None or token["effect"] is None for token in tokens):
        return None
    share_T, effect_T = (
        np.array([token[x] for token in tokens], np.float64)
        for x in ("share", "effect")
    )
    other_T = ~np.isin([token["position"] for token in tokens], massive)
    return {
        "n": len(tokens),
        "spearman": rounded(spearman(share_T, np.abs(effect_T))),
        "without_massive": rounded(
            spearman(share_T[other_T], np.abs(effect_T[other_T]))
        ),
        "massive": massive.tolist(),
    }
