"""Where features fired in text: the result of one streaming pass."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np

__all__ = ["Examples", "Excerpts", "Shown"]


@dataclasses.dataclass(frozen=True)
class Excerpts:
    """E places in text for each of U features, one window at most once a feature.

    Attributes:
      value_UE: activation at the peak; 0 where there is no excerpt.
      window_UE: int32, which window of the text; -1 where there is none.
      pos_UE: int32, position of the peak in its window.
      start_UE: int32, position where the excerpt starts.
      act_UEC: activations of the C tokens from there; 0 behind the window's text.
    """

    value_UE: np.ndarray
    window_UE: np.ndarray
    pos_UE: np.ndarray
    start_UE: np.ndarray
    act_UEC: np.ndarray


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
      token_WS: the windows, int32, -1 behind the text.
      n_tokens: positions that counted.
      count_U: int64, positions on which each feature was active.
      min_U: least activation where active; 0 if never.
      max_U: largest activation where active; 0 if never.
      histogram_UB: int64 counts of activations in B equal bins over ``edge_U2``, of
        the windows 0, `histogram_every`, 2 `histogram_every`, ...
      edge_U2: lower and upper end of the histogram.
      top: the windows with the largest activations, largest first.
      drawn: windows drawn at random among those with any activation, largest first.
      fired_UW: uint8, bit-packed along W (`numpy.packbits`, little): whether a feature
        was active anywhere in a window.
      histogram_every: of so many windows one is in the histograms.
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
          excerpts: `top` or `drawn`.
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
