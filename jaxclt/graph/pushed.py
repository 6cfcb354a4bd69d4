"""All edges of a prompt at once, from the sources' side.

Every column, then the rows and columns of the most influential features.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import numpy as np
from jax.sharding import Mesh

from jaxclt.graph.bank import Bank, RowTargets, readers
from jaxclt.graph.columns import Columns, edge_columns
from jaxclt.graph.explore import arrived_influence, next_features
from jaxclt.graph.packing import pack
from jaxclt.graph.plan import Plan
from jaxclt.graph.prompt import Computed, Prompt, counted, cut_columns, row_totals

__all__ = ["PushSide", "push_all", "push_side"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class PushSide:
    """All sources, all targets."""

    columns: Columns
    rows: RowTargets
    bank: Bank  # of the rows


def push_side(p: Prompt) -> PushSide:
    """Sources and targets of a prompt, packed."""
    rows = p.all_rows()
    return PushSide(
        columns=Columns(p),
        rows=rows,
        bank=pack(readers(rows, p.cfg.n_layers), len(p.recording.token_T)),
    )


def push_all(
    p: Prompt,
    push: PushSide,
    plan: Plan,
    mesh: Mesh,
    work: dict[str, Any],
    on_rows: Callable[[int, int], None],
) -> Computed:
    """Every edge, then the rows and columns of the most influential features."""
    A, N = len(p.active.layer_A), push.columns.layout.n_columns
    edge_RN = np.zeros((len(push.rows.pos_R), N), p.error_LTD.dtype)
    complete = edge_columns(
        push.columns,
        push.rows,
        push.bank,
        edge_RN,
        plan=plan,
        mesh=mesh,
        on_columns=counted(on_rows, N),
        stop=p.stop,
    )
    if not complete:
        raise KeyboardInterrupt  # a graph needs all columns: nothing to keep
    for k, edge_N in p.written():
        edge_RN[A + k] += edge_N
    ignored = p.ignored_columns(A)
    selected = np.arange(A)
    if p.n_selected < A:
        visit_A = arrived_influence(
            edge_RN,
            row_totals(edge_RN, ignored),
            np.concatenate([np.arange(A), -1 - np.arange(p.n_targets)]),
            p.target_weights(),
            p.active.layer_A,
        )
        selected, _ = next_features(visit_A, np.ones(A, bool), p.n_selected)
        edge_RN = edge_RN[np.concatenate([selected, np.arange(A, len(edge_RN))])]
    rest_R = np.zeros(len(edge_RN))
    rest_abs_R = rest_R.copy()
    edge_RN = cut_columns(edge_RN, A, selected, ignored, rest_R, rest_abs_R)
    return Computed(
        selected=selected,
        edge_RN=edge_RN,
        rest_R=rest_R,
        rest_abs_R=rest_abs_R,
        work=work,
    )
