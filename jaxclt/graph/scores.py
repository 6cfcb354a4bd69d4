"""How much of a prediction a graph explains: replacement, completeness, path length.

Circuit Tracing (2025), section 5.2. In the walk of `jaxclt.graph.influence`, weights of
the targets normalised: E is the probability that it ends unexplained (in an error node,
in something pruned, unattributed or outside the graph), lambda its mean length. Then

    replacement  = embeddings / (embeddings + E)        bias endings are left out
    completeness = 1 - E / lambda

On a pruned graph the shares stay those of the full graph and everything dropped counts
as error: nothing is renormalised, nothing cancels.
"""

from __future__ import annotations

import dataclasses

import jax
import numpy as np

from jaxclt.graph.graph import Graph, Pruning
from jaxclt.graph.influence import influence_series
from jaxclt.graph.prune import solve_influence

__all__ = ["Scores", "path_length_curve", "scores"]

_series = jax.jit(influence_series, static_argnames="n_layers")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Scores:
    """Scores of one graph, all in [0, 1] except the lengths."""

    replacement: float
    completeness: float  # the paper's: over targets that have inputs
    completeness_ct: float  # circuit-tracer's: over all nodes, systematically higher
    mean_path_length: float  # of embedding-to-target paths; nan if there are none
    mean_walk_length: float  # lambda, over all endings
    embedding_share: float  # of the walk's endings; the four sum to 1
    error_share: float
    bias_share: float
    unexplored_share: float  # rest of the graph: pruned, unattributed, not a node


def shares_total(graph: Graph) -> np.ndarray:
    """What row shares are taken of [R], by the graph's convention."""
    total_R = np.abs(graph.edge_RN).sum(1)
    if graph.meta.convention == "paper":
        total_R = total_R + np.abs(graph.bias_R) + graph.rest_abs_R
    return total_R


def scores(graph: Graph, pruning: Pruning | None = None) -> Scores:
    """Scores of the full graph, or of what a pruning keeps of it."""
    A, K = graph.n_features, graph.n_targets
    total_R = shares_total(graph)
    edge_RN = graph.edge_RN
    if pruning is not None:
        edge_RN = np.where(pruning.keep_edge_RN, edge_RN, 0)
    weight_K = graph.target_prob_K / graph.target_prob_K.sum()
    visit_N = solve_influence(edge_RN, total_R, weight_K)
    open_A = total_R[:A] > 0  # rows that pass the walk on
    visit_R = np.concatenate([np.where(open_A, visit_N[:A], 0), weight_K])
    safe_R = np.where(total_R > 0, total_R, 1)
    embedding = float(visit_N[graph.embed_cols].sum())
    error = float(visit_N[graph.error_cols].sum())
    bias = 0.0
    if graph.meta.convention == "paper":
        bias = float((visit_R / safe_R) @ np.abs(graph.bias_R))
    length = float(visit_R.sum())
    leak = 0.0 if K == 0 else float(weight_K[total_R[A:] == 0].sum())
    unexplored = max(0.0, 1.0 - embedding - error - bias)
    if pruning is None and graph.rest_abs_R.max(initial=0) == 0 and open_A.all():
        unexplored = leak  # exact zero instead of the rounding of a difference
    lost = error + unexplored
    return Scores(
        replacement=embedding / max(embedding + lost, 1e-30),
        completeness=1 - lost / length,
        completeness_ct=1 - lost / (length + 1),
        mean_path_length=_mean_path_length(
            graph, edge_RN, total_R, weight_K, embedding
        ),
        mean_walk_length=length,
        embedding_share=embedding,
        error_share=error,
        bias_share=bias,
        unexplored_share=unexplored,
    )


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
    curve = np.cumsum(np.asarray(term_LN)[:, graph.embed_cols].sum(1), dtype=np.float64)
    return curve / curve[-1] if curve[-1] > 0 else curve


def _mean_path_length(
    graph: Graph,
    edge_RN: np.ndarray,
    total_R: np.ndarray,
    weight_K: np.ndarray,
    embedding: float,
) -> float:
    """Mean edges on an embedding-to-target path, by one more substitution.

    With e the embedding share of each row and x the visits, the walk's expected length
    on paths that end in embeddings is ``sum_t x_t · reach_t`` where reach is the
    probability to end in an embedding from t: every visit is one more edge.
    """
    if embedding <= 0:
        return float("nan")
    A = graph.n_features
    safe_R = np.where(total_R > 0, total_R, 1)
    abs_RN = np.abs(edge_RN)
    to_embed_R = abs_RN[:, graph.embed_cols].sum(1) / safe_R
    reach_A = _reach(abs_RN[:A, :A], safe_R[:A], to_embed_R[:A])
    reach_K = to_embed_R[A:] + (abs_RN[A:, :A] / safe_R[A:, None]) @ reach_A
    visit_A = solve_influence(edge_RN, total_R, weight_K)[:A]
    return float((visit_A @ reach_A + weight_K @ reach_K) / embedding)


@jax.jit
def _reach(abs_AA: jax.Array, total_A: jax.Array, end_A: jax.Array) -> jax.Array:
    """Probability of ending where `end_A` says, from every feature: (I - Â)^-1 end."""
    system_AA = jax.numpy.diag(total_A) - abs_AA
    return jax.scipy.linalg.solve_triangular(system_AA, total_A * end_A, lower=True)
