"""How much of a prediction a graph explains: replacement, completeness, path length.

Circuit Tracing (2025), section 5.2. In the walk of `jaxclt.graph.influence`, weights of
the targets normalised: E is the probability that it ends unexplained (in an error node,
in something pruned, unattributed or outside the graph), lambda its mean length. Then

    replacement  = embeddings / (embeddings + E)        bias endings are left out
    completeness = 1 - E / lambda

and of the targets' own inputs alone, without the walk,

    completeness_logit_edges = from features and embeddings / from all but the bias

On a pruned graph the shares stay those of the full graph and everything dropped counts
as error: nothing is renormalised, nothing cancels.

How far a truncated graph can be off is maths 10.3-10.6: `Scores.replacement_at_most`
and `completeness_at_most`. Scores of a pruned graph need no bound: those of the same
nodes and edges in the exact graph are the same.
"""

from __future__ import annotations

import dataclasses

import numpy as np

from jaxclt.graph.blocks import submatrix
from jaxclt.graph.graph import Graph, Pruning
from jaxclt.graph.influence import influence_series, solve_walk
from jaxclt.graph.prune import kept_rows
from jaxclt.graph.shares import shares_total
from jaxclt.precision import jit

__all__ = ["Scores", "path_length_curve", "scores"]

_series = jit(influence_series, static_argnames="n_layers")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Scores:
    """Scores of one graph, all in [0, 1] except the lengths."""

    replacement: float
    completeness: float  # the paper's: over targets that have inputs
    completeness_ct: float  # circuit-tracer's: over all nodes, systematically higher
    completeness_logit_edges: float  # over the edges into the targets alone
    mean_path_length: float  # of embedding-to-target paths; nan if there are none
    mean_walk_length: float  # lambda, over all endings
    embedding_share: float  # of the walk's endings; the four sum to 1
    error_share: float
    bias_share: float
    unexplored_share: float  # rest of the graph: pruned, unattributed, not a node
    replacement_at_most: float  # of the exact graph, with every feature explored
    completeness_at_most: float


def scores(graph: Graph, pruning: Pruning | None = None) -> Scores:
    """Scores of the full graph, or of what a pruning keeps of it.

    Args:
      graph: attributed; a hand-made one needs nothing but its edges and sums.
      pruning: what is kept; None scores everything.
    """
    A = graph.n_features
    weight_K = graph.target_prob_K / graph.target_prob_K.sum()
    total_R = shares_total(graph)
    edge_RN, bias_R = graph.edge_RN, graph.bias_R
    ends = ("error", "input", "bias")
    end_EN = np.stack([graph.layout.ends(end) for end in ends])
    if pruning is not None:
        # Only what is kept carries the walk on; shares stay those of the full graph.
        row = np.flatnonzero(kept_rows(graph, pruning.keep_N))
        col = np.flatnonzero(pruning.keep_N)
        edge_RN = submatrix(edge_RN, row, col)
        edge_RN *= submatrix(pruning.keep_edge_RN, row, col)
        total_R, bias_R = total_R[row], bias_R[row]
        end_EN = end_EN[:, col]
        A = int(pruning.keep_N[graph.feature_cols].sum())
    error_N, input_N, bias_N = end_EN
    visit_N, length_N = solve_walk(edge_RN, total_R, weight_K)
    open_A = total_R[:A] > 0  # rows that pass the walk on
    visit_R = np.concatenate([np.where(open_A, visit_N[:A], 0), weight_K])
    safe_R = np.where(total_R > 0, total_R, 1)
    embedding = float(visit_N[input_N].sum())
    paths = float(length_N[input_N].sum())
    error = float(visit_N[error_N].sum())
    paper = graph.meta.convention == "paper"
    bias = float((visit_R / safe_R) @ np.abs(bias_R)) if paper else 0.0
    bias += float(visit_N[bias_N].sum())
    unexplored, left_out = 1.0 - embedding - error - bias, 0.0
    if pruning is None:
        # The same without the rounding of a difference, so that nothing is zero.
        if paper:
            left_out = float((visit_R / safe_R) @ graph.rest_abs_R)
        unexplored = left_out + float(visit_N[:A][~open_A].sum())
        unexplored += float(weight_K[total_R[A:] == 0].sum())
    unexplored = max(0.0, unexplored)
    lost, length = error + unexplored, float(visit_R.sum())
    explained = max(embedding + lost, 1e-30)
    replacement, completeness = embedding / explained, 1 - lost / length
    most = replacement, completeness
    if pruning is None and graph.rest_abs_R.any():
        # circuit-tracer's shares leave the rest out: then nothing is known about it.
        left_out = left_out if paper else 1.0
        most = (
            min(1.0, replacement + left_out / explained),
            1 - max(0.0, lost - left_out) / (length + left_out * graph.n_layers),
        )
    return Scores(
        replacement=replacement,
        completeness=completeness,
        completeness_ct=1 - lost / (length + 1),
        completeness_logit_edges=_logit_edges(graph, edge_RN[A:, ~(error_N | bias_N)]),
        mean_path_length=paths / embedding if embedding > 0 else float("nan"),
        mean_walk_length=length,
        embedding_share=embedding,
        error_share=error,
        bias_share=bias,
        unexplored_share=unexplored,
        replacement_at_most=most[0],
        completeness_at_most=most[1],
    )


def _logit_edges(graph: Graph, kept_KM: np.ndarray) -> float:
    """Share of what targets read, but for the bias, that some of their edges are."""
    read_K = graph.row_strength[graph.target_rows].astype(np.float64)
    is_bias_N = graph.layout.ends("bias")
    read_K -= np.abs(graph.edge_RN[graph.target_rows, is_bias_N]).sum(1)
    if graph.meta.convention == "paper":
        read_K += graph.rest_abs_R[graph.target_rows]
    kept_K = np.abs(kept_KM).sum(1, dtype=np.float64)
    weight_K = graph.target_prob_K
    return float(weight_K @ kept_K / max(weight_K @ read_K, 1e-30))


def path_length_curve(graph: Graph) -> np.ndarray:
    """Share of embedding influence carried by paths of at most l edges, [L + 1].

    Circuit Tracing (2025), section 5.2.2; entry l - 1 belongs to length l.
    """
    weight_K = graph.target_prob_K / graph.target_prob_K.sum()
    term_LN = _series(
        graph.edge_RN,
        shares_total(graph).astype(graph.edge_RN.dtype),
        weight_K.astype(graph.edge_RN.dtype),
        n_layers=graph.n_layers,
    )
    reach_L = np.asarray(term_LN)[:, graph.layout.ends("input")].sum(1)
    curve = np.cumsum(reach_L, dtype=np.float64)
    return curve / curve[-1] if curve[-1] > 0 else curve
