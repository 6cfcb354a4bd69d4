"""Where features fired in text: the result of one streaming pass."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np

__all__ = ["Examples", "Excerpts", "Shown", "by_size"]


@dataclasses.dataclass(frozen=True)
class Excerpts:
    """E places in text for each of U features, one window at most once a feature.

    Attributes:
      value_UE: activation at the peak; 0 where there is no excerpt.
      window_UE: int32, which window of the text; -1 where there is none.
      pos_UE: int32, position of the peak in its window.
      start_UE: int32, position where the excerpt starts.
      act_UEC: activations of the C tokens from there; 0 after the end of the text.
    """

    value_UE: np.ndarray
    window_UE: np.ndarray
    pos_UE: np.ndarray
    start_UE: np.ndarray
    act_UEC: np.ndarray


def by_size(sides: Sequence[Excerpts]) -> Excerpts:
    """The E places with the largest activations, from the E largest of each side.

    A window counts once, at the larger of its peaks: the same as if windows had been
    ranked by size from the start.
    """
    if len(sides) == 1:
        return sides[0]
    E = sides[0].window_UE.shape[1]
    window_UJ = np.concatenate([side.window_UE for side in sides], 1)
    size_UJ = np.abs(np.concatenate([side.value_UE for side in sides], 1))
    # Equal peaks of a window: the one above zero, which comes first.
    order_UJ = np.lexsort((-size_UJ, window_UJ), axis=1)
    sorted_UJ = np.take_along_axis(window_UJ, order_UJ, 1)
    again_UJ = np.zeros(window_UJ.shape, bool)
    again_UJ[:, 1:] = sorted_UJ[:, 1:] == sorted_UJ[:, :-1]
    none_UJ = window_UJ < 0
    none_UJ |= np.take_along_axis(again_UJ, np.argsort(order_UJ, axis=1), 1)
    best_UE = np.lexsort((window_UJ, -size_UJ, none_UJ), axis=1)[:, :E]
    side_UE, place_UE = np.divmod(best_UE, E)
    side_UE[np.take_along_axis(none_UJ, best_UE, 1)] = len(sides)

    def taken(name: str, empty: int) -> np.ndarray:
        found = np.full_like(getattr(sides[0], name), empty)
        for z, side in enumerate(sides):
            at = np.nonzero(side_UE == z)
            found[at] = getattr(side, name)[at[0], place_UE[at]]
        return found

    return Excerpts(
        **{
            f.name: taken(f.name, -1 if f.name == "window_UE" else 0)
            for f in dataclasses.fields(Excerpts)
        }
    )


class Shown(NamedTuple):
    """One excerpt as it is shown to people and judges."""

    window: int
    tokens: tuple[str, ...]
    acts: tuple[float, ...]
    peak: int  # index into both


@dataclasses.dataclass(frozen=True, kw_only=True)
class Examples:
    """What U features did over a text of W windows.

    Attributes:
      layer_U: int32.
      feature_U: int32.
      token_WS: the windows, int32, -1 after the text.
      n_tokens: positions that counted.
      count_U: int64, positions on which each feature was active.
      min_U: least activation where active; 0 if never.
      max_U: largest activation where active; 0 if never.
      histogram_UB: int64 counts of activations in B equal bins over ``edge_U2``, of
        the windows 0, `histogram_every`, 2 `histogram_every`, ...
      edge_U2: lower and upper end of the histogram.
      top: the windows with the largest activations by size, largest first.
      drawn: windows drawn at random among those with any activation, largest first.
      fired_UW: uint8, bit-packed along W (`numpy.packbits`, little): whether a feature
        was active anywhere in a window.
      histogram_every: one in this many windows is in the histograms.
      sides: `top` of activations above zero, and of those below; empty for dictionaries
        that have none below.
    """

    layer_U: np.ndarray
    feature_U: np.ndarray
    token_WS: np.ndarray
    n_tokens: int
    count_U: np.ndarray
    min_U: np.ndarray
    max_U: np.ndarray
    histogram_UB: np.ndarray
    edge_U2: np.ndarray
    top: Excerpts
    drawn: Excerpts
    fired_UW: np.ndarray
    histogram_every: int = 1
    sides: tuple[Excerpts, ...] = ()

    @property
    def frequency(self) -> np.ndarray:
        """Share of the positions on which each feature was active."""
        return self.count_U / max(self.n_tokens, 1)

    def fired(self, u: int, window: int) -> bool:
        """Whether feature `u` (its row) was active anywhere in a window."""
        return bool(self.fired_UW[u, window // 8] >> (window % 8) & 1)

    def shown(
        self,
        excerpts: Excerpts,
        u: int,
        e: int,
        text: Callable[[Sequence[int]], Sequence[str]],
    ) -> Shown:
        """One excerpt as it is shown, cut where the text ends.

        Args:
          excerpts: `top`, `drawn` or one of `sides`.
          u: row of the feature.
          e: which of its excerpts; `excerpts.window_UE[u, e]` must not be -1.
          text: turns token ids into strings (`Tokenizer.token_strings`).
        """
        window, start = int(excerpts.window_UE[u, e]), int(excerpts.start_UE[u, e])
        token_C = self.token_WS[window, start : start + excerpts.act_UEC.shape[2]]
        ids = token_C[token_C >= 0].tolist()
        acts = excerpts.act_UEC[u, e, : len(ids)].tolist()
        peak = int(excerpts.pos_UE[u, e]) - start
        return Shown(window, tuple(text(ids)), tuple(acts), peak)
