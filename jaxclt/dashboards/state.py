"""What a pass over text has seen so far, on the host: best windows, counts, histograms.

A kept excerpt never moves: a feature's ranking points to where its excerpts lie, and a
newcomer is written over the one that it drives out. A batch thus costs what enters with
it, which is little once some windows were seen.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np

from jaxclt.dashboards.examples import Excerpts

__all__ = ["Best", "Histogram", "Newcomers", "Seen"]

_LEAST = -(2**20)  # a power of two below any of a float
_LATE = np.iinfo(np.int32).max
_ROWS = 4096  # features whose excerpts are put in order together


@dataclasses.dataclass(frozen=True)
class Newcomers:
    """Windows of one batch for U features, by number of window.

    Z is the sides of zero: above, and below if activations may be there.

    Attributes:
      value_ZUW: activation at the peak of a side, 0 if the feature has none there.
      pos_ZUW: position of the peak.
      start_ZUW: where the excerpt starts.
      window_W: numbers of the windows, ascending.
      act_LZWCN: excerpts as the device made them.
      layer_U: first index into them.
      column_U: last index into them.
    """

    value_ZUW: np.ndarray
    pos_ZUW: np.ndarray
    start_ZUW: np.ndarray
    window_W: np.ndarray
    act_LZWCN: np.ndarray
    layer_U: np.ndarray
    column_U: np.ndarray


@dataclasses.dataclass
class Best:
    """The K windows of each feature with the largest keys, largest first.

    Equal keys are in the order of their windows. A key of 0 stands for no window.
    """

    key_UK: np.ndarray
    slot_UK: np.ndarray  # where in the rest, which is not in order
    value_UK: np.ndarray
    window_UK: np.ndarray
    pos_UK: np.ndarray
    start_UK: np.ndarray
    act_UKC: np.ndarray

    @classmethod
    def empty(cls, U: int, K: int, C: int, key: Any, value: Any) -> Best:
        """No window yet, for keys and activations of these dtypes."""
        return cls(
            key_UK=np.zeros((U, K), key),
            slot_UK=np.tile(np.arange(K, dtype=np.int16), (U, 1)),
            value_UK=np.zeros((U, K), value),
            window_UK=np.full((U, K), -1, np.int32),
            pos_UK=np.zeros((U, K), np.int32),
            start_UK=np.zeros((U, K), np.int32),
            act_UKC=np.zeros((U, K, C), value),
        )

    def add(self, key_UW: np.ndarray, new: Newcomers, side_UW: np.ndarray) -> None:
        """Take in those of a batch that are among the best.

        Args:
          key_UW: what windows are ranked by; 0 keeps a window out.
          new: the windows, later ones than all before.
          side_UW: the side of zero whose peak and excerpt to keep.
        """
        K = self.key_UK.shape[1]
        if not K:
            return
        # Strictly above the last: of equals the earlier window stays.
        row_R = np.flatnonzero((key_UW > self.key_UK[:, -1:]).any(1))
        if not len(row_R):
            return
        key_RJ = np.concatenate([self.key_UK[row_R], key_UW[row_R]], 1)
        order_RJ = np.argsort(-key_RJ, axis=1, kind="stable")
        keep_RK, out_RW = order_RJ[:, :K], order_RJ[:, K:]
        # As many old ones leave a row as newcomers enter it: pair them up.
        row_E, rank_E = np.nonzero(keep_RK >= K)
        leaver_E = out_RW[out_RW < K]
        old_RK = np.minimum(keep_RK, K - 1)
        slot_RK = np.take_along_axis(self.slot_UK[row_R], old_RK, 1)
        slot_E = self.slot_UK[row_R[row_E], leaver_E]
        slot_RK[row_E, rank_E] = slot_E
        self.slot_UK[row_R] = slot_RK
        self.key_UK[row_R] = np.take_along_axis(key_RJ, keep_RK, 1)
        u_E, w_E = row_R[row_E], keep_RK[row_E, rank_E] - K
        z_E = side_UW[u_E, w_E]
        self.value_UK[u_E, slot_E] = new.value_ZUW[z_E, u_E, w_E]
        self.window_UK[u_E, slot_E] = new.window_W[w_E]
        self.pos_UK[u_E, slot_E] = new.pos_ZUW[z_E, u_E, w_E]
        self.start_UK[u_E, slot_E] = new.start_ZUW[z_E, u_E, w_E]
        self.act_UKC[u_E, slot_E] = new.act_LZWCN[
            new.layer_U[u_E], z_E, w_E, :, new.column_U[u_E]
        ]

    def excerpts(self) -> Excerpts:
        """The windows, largest activation by size first, then by number.

        Puts the excerpts in that order in place, they are most of the memory: the
        ranking is void then.
        """
        late_UK = np.where(self.window_UK < 0, _LATE, self.window_UK)
        order_UK = np.lexsort((late_UK, -np.abs(self.value_UK)), axis=1)

        def ordered(x_UK: np.ndarray) -> np.ndarray:
            return np.take_along_axis(x_UK, order_UK, 1)

        for start in range(0, len(order_UK), _ROWS):
            part = slice(start, start + _ROWS)
            order_RK1 = order_UK[part][..., None]
            self.act_UKC[part] = np.take_along_axis(self.act_UKC[part], order_RK1, 1)
        return Excerpts(
            value_UE=ordered(self.value_UK),
            window_UE=ordered(self.window_UK),
            pos_UE=ordered(self.pos_UK),
            start_UE=ordered(self.start_UK),
            act_UEC=self.act_UKC,
        )


@dataclasses.dataclass
class Histogram:
    """Counts in equal bins whose range is a power of two that doubles when exceeded.

    Doubling merges bins pairwise, exactly: the counts are as if the last range had been
    known from the start, however activations were batched.
    """

    count_UB: np.ndarray
    power_U: np.ndarray  # the range ends at 2 to this
    signed: bool  # and starts at 0, or at minus that

    @classmethod
    def empty(cls, U: int, bins: int, *, signed: bool) -> Histogram:
        """No activation yet; a range below all that is ever seen."""
        return cls(np.zeros((U, bins), np.int64), np.full(U, _LEAST, np.int32), signed)

    @property
    def zero(self) -> int:
        """The bin that starts at 0, which is also how many bins are above it."""
        bins = self.count_UB.shape[1]
        return bins // 2 if self.signed else 0

    def _scaled(self, a: np.ndarray, power: np.ndarray) -> np.ndarray:
        """Activations in bins. Rounds before the power of two, so alike for all."""
        above = self.count_UB.shape[1] - self.zero
        return np.ldexp(a * a.dtype.type(above), -power)

    def reach(self, size_U: np.ndarray) -> None:
        """Double ranges until they hold activations of this size."""
        power_U = np.frexp(size_U)[1].astype(np.int32)
        above = self.count_UB.shape[1] - self.zero
        power_U += self._scaled(size_U, power_U) >= above
        grow_U = np.where(size_U > 0, np.maximum(power_U - self.power_U, 0), 0)
        row_R = np.flatnonzero(grow_U)
        self.power_U[row_R] += grow_U[row_R]
        row_R = row_R[self.count_UB[row_R].any(1)]
        for shift in np.unique(grow_U[row_R]).tolist():
            row_Q = row_R[grow_U[row_R] == shift]
            old_QB = self.count_UB[row_Q]
            new_QB = np.zeros_like(old_QB)
            for b in range(old_QB.shape[1]):
                into = (b - self.zero) >> min(shift, 62)
                new_QB[:, into + self.zero] += old_QB[:, b]
            self.count_UB[row_Q] = new_QB

    def add(self, a_TR: np.ndarray, row: slice) -> None:
        """Count activations that are not zero; their ranges hold them already.

        Args:
          a_TR: activations of some features.
          row: which features.
        """
        B, n = self.count_UB.shape[1], a_TR.shape[1]
        t_E, column_E = np.nonzero(a_TR)
        place_E = self._scaled(a_TR[t_E, column_E], self.power_U[row][column_E])
        bin_E = np.floor(place_E).astype(np.int64) + self.zero
        bin_E += column_E * B
        self.count_UB[row] += np.bincount(bin_E, minlength=n * B).reshape(n, B)

    @property
    def edges(self) -> np.ndarray:
        """Lower and upper end of each range; 0 and 0 for a feature never active."""
        high_U = np.where(self.power_U == _LEAST, 0.0, np.ldexp(1.0, self.power_U))
        return np.stack([-high_U if self.signed else np.zeros_like(high_U), high_U], 1)


@dataclasses.dataclass
class Seen:
    """Everything kept of the windows so far; `tops` are of the sides of zero."""

    tops: tuple[Best, ...]
    drawn: Best
    histogram: Histogram
    count_U: np.ndarray
    low_U: np.ndarray
    high_U: np.ndarray
    fired_UW: np.ndarray  # bits

    def arrays(self) -> dict[str, np.ndarray]:
        """All arrays by name, to save and to load into."""
        found = {}
        for name in ("count_U", "low_U", "high_U", "fired_UW"):
            found[name] = getattr(self, name)
        for name in ("count_UB", "power_U"):
            found[f"histogram.{name}"] = getattr(self.histogram, name)
        parts = dict(zip(("top", "below"), self.tops, strict=False))
        for part, best in (parts | {"drawn": self.drawn}).items():
            for field in dataclasses.fields(best):
                found[f"{part}.{field.name}"] = getattr(best, field.name)
        return found

    def add(
        self,
        new: Newcomers,
        priority_UW: np.ndarray,
        count_U: np.ndarray,
        low_U: np.ndarray,
        high_U: np.ndarray,
    ) -> None:
        """Take in a batch, all but the histograms' counts."""
        size_ZUW = np.abs(new.value_ZUW)
        size_UW, side_UW = size_ZUW.max(0), size_ZUW.argmax(0)
        for z, top in enumerate(self.tops):
            top.add(size_ZUW[z], new, np.full_like(side_UW, z))
        self.drawn.add(priority_UW, new, side_UW)
        self.histogram.reach(size_UW.max(1))
        self.count_U += count_U
        np.minimum(self.low_U, low_U, out=self.low_U)
        np.maximum(self.high_U, high_U, out=self.high_U)
        for w, window in enumerate(new.window_W.tolist()):
            bit_U = (size_UW[:, w] > 0).astype(np.uint8) << (window % 8)
            self.fired_UW[:, window // 8] |= bit_U
