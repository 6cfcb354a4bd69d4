"""Edges of a prompt row by row, from the targets' side.

First the targets' rows, then those of features in the order of their influence, until
the tolerance or the cap is reached. Where not all columns fit in memory, those of a
pool of features are kept, chosen by a first look.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from jaxclt.graph.bank import RowTargets
from jaxclt.graph.explore import arrived_influence, next_features
from jaxclt.graph.prompt import (
    Computed,
    Prompt,
    add_written,
    counted,
    cut_columns,
    row_totals,
)
from jaxclt.graph.rows import Puller, edge_rows, pull_flops, visits

__all__ = ["pull_some"]


def pull_some(
    p: Prompt,
    puller: Puller,
    pool_size: int,
    work: dict[str, Any],
    on_rows: Callable[[int, int], None],
) -> Computed:
    """The targets' rows, then features' in order of influence until a limit."""
    A, K = len(p.active.layer_A), p.n_targets
    n_rows, looked_at = min(p.n_selected, pool_size) + K, 0
    if p.shortlist is not None:
        looked_at = K
    elif pool_size < A:
        looked_at = K + min(_SCOUTS, A)
    count = counted(on_rows, n_rows + looked_at)
    pool_A = np.arange(A)
    if p.shortlist is not None:
        pool_A = p.shortlist(p.active, _first_visits(p, puller, count))[:pool_size]
        work |= {"shortlist": len(pool_A)}
    elif pool_size < A:
        pool_A = _scout(p, puller, pool_size, count)
    rows = _PooledRows(p, puller, pool_A, count)
    if p.n_selected >= len(pool_A) and p.config.tolerance <= 0:
        rows.compute(np.arange(len(pool_A)))
    rows.compute_targets()
    while rows.done < len(rows.edge_RN) and not p.stop():
        visit_A, outside = rows.visits()
        n = min(rows.at_once, len(rows.edge_RN) - rows.done)
        enough = p.config.tolerance - outside
        chosen, unexplored = next_features(visit_A, rows.open_A, n, enough=enough)
        if unexplored + outside <= p.config.tolerance:
            break
        rows.compute(chosen)
    done = rows.feature_R[: rows.done]
    computed = p.feature_rows(pool_A[done[done >= 0]]).followed_by(p.target_rows())
    flops = pull_flops(p, puller.bank, puller.plan, computed)
    if rows.done < len(rows.edge_RN) and p.stop():
        if rows.done == K:
            raise KeyboardInterrupt  # nothing to keep
        work |= {"stopped": True}
    return rows.finished(work | {"tflop": flops / 1e12})


_SCOUTS = 128  # rows looked at, not kept, before a pool is chosen


def _scout(
    p: Prompt, puller: Puller, size: int, on_rows: Callable[[int], None]
) -> np.ndarray:
    """Features to keep columns of when not all fit: those with most influence so far.

    The influence that the targets and the first features in its order pass on; what
    stays outside the pool is summed into the rest, so that no bound is touched.
    """
    visit_A = _first_visits(p, puller, on_rows)
    first = np.sort(np.argsort(-visit_A, kind="stable")[:_SCOUTS])
    visit_A += visits(
        puller,
        p.feature_rows(first),
        visit_A[first],
        p.is_node_LT,
        on_rows=on_rows,
        stop=p.stop,
    )
    return np.sort(np.argsort(-visit_A, kind="stable")[:size])


def _first_visits(
    p: Prompt, puller: Puller, on_rows: Callable[[int], None]
) -> np.ndarray:
    """Influence that the targets pass on directly, [A]."""
    targets, weight_K = p.target_rows(), p.target_weights()
    return visits(puller, targets, weight_K, p.is_node_LT, on_rows=on_rows)


def _move_up(array_R: np.ndarray, rows: np.ndarray) -> None:
    """Some rows to the front, in order and in place; zeros where they were."""
    for to, row in enumerate(rows):
        if to < row:
            array_R[to] = array_R[row]
            array_R[row] = 0


class _PooledRows:
    """Rows computed on demand, kept in the order of computation.

    Features are named by their place in the pool, target k by -1 - k.
    """

    def __init__(
        self,
        p: Prompt,
        puller: Puller,
        pool_A: np.ndarray,
        on_rows: Callable[[int], None],
    ) -> None:
        self.p, self.puller, self.pool_A, self.on_rows = p, puller, pool_A, on_rows
        width = len(pool_A)
        n_rows = min(p.n_selected, width) + p.n_targets
        self.edge_RN = np.zeros((n_rows, p.layout(width).n_columns), p.error_LTD.dtype)
        self.rest_R, self.rest_abs_R = np.zeros(n_rows), np.zeros(n_rows)
        self.total_R = np.zeros(n_rows)
        self.feature_R = np.full(n_rows, width, np.int64)
        self.open_A = np.ones(width, bool)
        self.done = 0
        self.ignored = p.ignored_columns(width)
        # Many rows at once make chunks that are narrow in layer, hence cheap.
        quarter = max(512, -(-p.n_selected // 4))
        self.at_once = p.config.rows_per_update or quarter

    def compute(self, feature: np.ndarray) -> None:
        """Append the rows of some features; of those finished before a stop."""
        new = slice(self.done, self.done + len(feature))
        rows = self.p.feature_rows(self.pool_A[feature])
        reached = np.flatnonzero(self._edges(rows, new, self.p.stop))
        if len(reached) < len(feature):
            for array_R in (self.edge_RN, self.rest_R, self.rest_abs_R):
                _move_up(array_R[new], reached)
        self._append(feature[reached])
        self.open_A[feature[reached]] = False

    def compute_targets(self) -> None:
        """Append the rows of all targets, stop or not: there is no graph without."""
        K = self.p.n_targets
        new = slice(self.done, self.done + K)
        self._edges(self.p.target_rows(), new, lambda: False)
        rests = self.rest_R[new], self.rest_abs_R[new]
        add_written(self.p, self.pool_A, self.edge_RN[new], *rests)
        self._append(-1 - np.arange(K))

    def _edges(
        self, targets: RowTargets, new: slice, stop: Callable[[], bool]
    ) -> np.ndarray:
        return edge_rows(
            self.puller,
            targets,
            self.edge_RN[new],
            pool_A=None if len(self.pool_A) == self.puller.n_features else self.pool_A,
            rest_R=self.rest_R[new],
            rest_abs_R=self.rest_abs_R[new],
            on_rows=self.on_rows,
            stop=stop,
        )

    def _append(self, feature: np.ndarray) -> None:
        new = slice(self.done, self.done + len(feature))
        total_R = row_totals(self.edge_RN[new], self.ignored)
        self.total_R[new] = total_R + self.rest_abs_R[new]
        self.feature_R[new] = feature
        self.done = new.stop

    def visits(self) -> tuple[np.ndarray, float]:
        """Influence that has arrived at the pool, and at everything outside it."""
        n = slice(0, self.done)
        weight_K = self.p.target_weights()
        layer_A = self.p.active.layer_A[self.pool_A]
        visit_A = arrived_influence(
            self.edge_RN[n], self.total_R[n], self.feature_R[n], weight_K, layer_A
        )
        feature_R = self.feature_R[n]
        visit_R = np.concatenate([visit_A, weight_K[::-1]])[feature_R]
        total_R = np.where(self.total_R[n] > 0, self.total_R[n], 1)
        return visit_A, float((visit_R * self.rest_abs_R[n] / total_R).sum())

    def finished(self, work: dict[str, Any]) -> Computed:
        """Rows and columns of the explored features; everything else in the rest."""
        feature_R = self.feature_R[: self.done]
        # Features in order, then targets (-1 - k) in order.
        order = np.lexsort((np.abs(feature_R), feature_R < 0))
        in_order = (order == np.arange(len(order))).all()
        edge_RN = self.edge_RN[: self.done]
        rest_R, rest_abs_R = self.rest_R[order], self.rest_abs_R[order]
        selected = np.sort(feature_R[feature_R >= 0])
        edge_RN = cut_columns(
            edge_RN if in_order else edge_RN[order],
            len(self.pool_A),
            selected,
            self.ignored,
            rest_R,
            rest_abs_R,
        )
        return Computed(
            selected=self.pool_A[selected],
            edge_RN=edge_RN,
            rest_R=rest_R,
            rest_abs_R=rest_abs_R,
            work=work,
        )
