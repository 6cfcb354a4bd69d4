"""Supernode graphs: named groups of nodes and the shares of input between them.

With A' the edges over the sums of their rows' absolute inputs (`shares_total`), and f
the fraction of a node's input that comes from outside its own group, group t gets from
group s (Circuit Tracing 2025, sections 3.4 and J; maths 13.3)

    S(t, s) = sum over n in t of  f(n) * (sum over m in s of A'(n, m))  /  sum of f(n)

so that members which only hand on what their own group wrote do not count. A' is
positive where m strengthens n (`Graph.side_R`), so members on both sides of zero add up
and the signs along a path multiply. A group without any input from outside (only tokens
or errors, or closed in itself) has no links to it: 0 / 0 is 0.

Scores are those of the walk of `jaxclt.graph.scores` in which only grouped features
carry on: what reaches any other feature counts as error (maths 13.7). They depend on
which features are grouped and not on how. `blur` is how far the influences that a
reader gets by walking the small graph are off: 0 for groups of one.

The graph of a paper's figure shows S with its sign; `size_GG` is the same of absolute
edges, so ``|edge_GG| < size_GG`` where members cancel.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Literal

import numpy as np

from jaxclt.errors import InputError, on_one_line
from jaxclt.graph.blocks import submatrix
from jaxclt.graph.effects import total_effects
from jaxclt.graph.graph import Graph, Pruning
from jaxclt.graph.influence import solve_influence
from jaxclt.graph.nodes import find_node, node_name, short_name
from jaxclt.graph.prune import kept_rows
from jaxclt.graph.scores import scores
from jaxclt.graph.shares import shares_total
from jaxclt.types import Supernode

__all__ = [
    "SupernodeGraph",
    "describe_supernodes",
    "input_by_token",
    "suggest_supernodes",
    "supernode_graph",
]

_CUTS = 24  # places in the tree of merges that are scored
_APART = 3.0  # distance of nodes that must not share a group; others are within 0..2


@dataclasses.dataclass(frozen=True, kw_only=True)
class SupernodeGraph:
    """A small graph of groups; G axes are groups in the order they were given.

    Rows are targets and columns sources, as in `Graph`.
    """

    names: tuple[str, ...]
    members: tuple[np.ndarray, ...]  # columns of the graph; target k is N + k
    edge_GG: np.ndarray  # S, signed: positive where the source strengthens the target
    size_GG: np.ndarray  # S of absolute edges, the group's links to itself included
    outside_G: np.ndarray  # share of the members' input that is not from the group
    influence_G: np.ndarray  # visits of the members by the walk, targets' own included
    norm: str
    replacement: float
    completeness: float
    blur: float


def supernode_graph(
    graph: Graph,
    groups: Sequence[Supernode],
    *,
    norm: Literal["total", "external"] = "total",
) -> SupernodeGraph:
    """Contract a graph to named groups of its nodes.

    Args:
      graph: attributed.
      groups: of features, errors, embeddings and targets; a node belongs to one at
        most. Ungrouped features count as error in the scores; ungrouped tokens and
        targets stay what they are there.
      norm: what shares are taken of: ``total``, all input of a node (bias and what is
        not in the graph included, by the graph's convention); ``external``, the input
        from outside its group, links inside a group then being zero (the published
        viewer's rule).

    Returns:
      The small graph.

    Raises:
      InputError: for an unknown norm, a name given twice, an empty group, a node that
        is not in the graph, or one that two groups share.
    """
    if norm not in ("total", "external"):
        raise InputError(f"norm={norm!r}: choose total or external")
    members = _members(graph, groups)
    edge_GG, size_GG, outside_G = _contract(graph, members, norm=norm)
    influence_G, blur = _read(graph, members, _visits(graph, members))
    score = scores(graph, _only(graph, members))
    return SupernodeGraph(
        names=tuple(group.name for group in groups),
        members=tuple(members),
        edge_GG=edge_GG,
        size_GG=size_GG,
        outside_G=outside_G,
        influence_G=influence_G,
        norm=norm,
        replacement=score.replacement,
        completeness=score.completeness,
        blur=blur,
    )


def describe_supernodes(small: SupernodeGraph, *, k: int = 20) -> str:
    """The k strongest links between groups, a line each, then what the graph explains.

    A line gives the share of all influence that takes the link (visits of its target
    times its share), the sign (+ strengthens the target), the two groups, and its share
    of the target's input.

    Raises:
      InputError: if `k` is below 1.
    """
    if k < 1:
        raise InputError(f"k={k}: ask for at least one link")
    through_GG = small.influence_G[:, None] * np.abs(small.edge_GG)
    np.fill_diagonal(through_GG, 0)
    order = np.argsort(-through_GG, axis=None, kind="stable")[:k]
    lines = []
    for target, source in zip(*np.unravel_index(order, through_GG.shape), strict=True):
        if through_GG[target, source] == 0:
            break
        edge = small.edge_GG[target, source]
        lines.append(
            f"{100 * through_GG[target, source]:6.2f}% {'+' if edge > 0 else '-'}  "
            f"{on_one_line(small.names[source])} -> "
            f"{on_one_line(small.names[target])}  "
            f"({100 * abs(edge):.0f}% of its input)"
        )
    lines.append(
        f"replacement {small.replacement:.3f}, completeness {small.completeness:.3f}, "
        f"blur {small.blur:.3f}"
    )
    return "\n".join(lines)


def suggest_supernodes(
    graph: Graph,
    *,
    same_position: bool = True,
    same_sign: bool = True,
    distance: float | None = None,
    blur: float = 0.1,
) -> list[Supernode]:
    """Group the kept features by where their input comes from and what they do.

    A feature's profile is how every token strengthens it and its own effect on every
    target, signed, all paths counted and gates as they are; each half is scaled to
    length 1. Two features are as far apart as 1 minus the mean cosine of the halves;
    groups are the average-linkage clusters (maths 13.8). Tokens that have influence and
    all targets come along as groups of one: `supernode_graph` takes the result as it
    is.

    Args:
      graph: attributed; `graph.pruning` says which features to group.
      same_position: groups do not reach over positions.
      same_sign: nor over features whose effects on the targets, weighted by these,
        differ in sign.
      distance: where to cut the tree of merges, in 0..2; None takes the fewest groups
        whose `SupernodeGraph.blur` is at most `blur`.
      blur: see `distance`.

    Returns:
      Groups of features, the most influential first, each named after its strongest
      member; then tokens, then targets.

    Raises:
      InputError: if `distance` or `blur` is out of range.
    """
    if distance is not None and not 0 <= distance <= 2:
        raise InputError(f"distance={distance}: give a number in 0..2")
    if not blur >= 0:
        raise InputError(f"blur={blur}: give a number of at least 0")
    kept_B = np.flatnonzero(graph.pruning.keep_N[graph.feature_cols])
    alone, single = list(kept_B[:, None]), _singles(graph)
    if len(kept_B) < 2:
        return _named(graph, alone, single)
    tree = _tree(graph, kept_B, same_position=same_position, same_sign=same_sign)

    from scipy.cluster.hierarchy import fcluster

    def cut(height: float) -> list[np.ndarray]:
        label_B = fcluster(tree, height, criterion="distance")
        return [kept_B[label_B == label] for label in np.unique(label_B)]

    if distance is not None:
        return _named(graph, cut(distance), single)
    height = np.unique(tree[tree[:, 2] <= 2, 2])
    if len(height) > _CUTS:
        height = height[np.linspace(0, len(height) - 1, _CUTS).round().astype(int)]
    visit_X = _visits(graph, [kept_B, *single])
    for at in height[::-1]:
        found = cut(float(at))
        if _read(graph, [*found, *single], visit_X)[1] <= blur:
            return _named(graph, found, single)
    return _named(graph, alone, single)


def with_features(graph: Graph, group: Supernode) -> Supernode:
    """The supernode with features that it names as (layer, position, feature).

    What stays a name has no activation: errors, tokens and targets.

    Raises:
      InputError: for a name that the graph does not have.
    """
    nodes: list[tuple[int, int, int] | str] = []
    for node in group.nodes:
        at = find_node(graph, node) if isinstance(node, str) else -1
        nodes.append(graph.feature(at) if 0 <= at < graph.n_features else node)
    return dataclasses.replace(group, nodes=tuple(nodes))


# -- groups ----------------------------------------------------------------------------


def _members(graph: Graph, groups: Sequence[Supernode]) -> list[np.ndarray]:
    """Node numbers of every group, ascending."""
    owner: dict[int, str] = {}
    found = []
    for g, group in enumerate(groups):
        if group.name in [other.name for other in groups[:g]]:
            raise InputError(f"two supernodes are called {group.name!r}: rename one")
        if not group.nodes:
            raise InputError(f"supernode {group.name!r} has no members")
        index = {find_node(graph, _called(graph, node)) for node in group.nodes}
        for i in sorted(index):
            if i in owner:
                raise InputError(
                    f"{node_name(graph, i)} is in the supernodes {owner[i]!r} and "
                    f"{group.name!r}: a node belongs to one"
                )
            owner[i] = group.name
        found.append(np.array(sorted(index)))
    return found


def _called(graph: Graph, node: tuple[int, int, int] | str) -> str:
    if isinstance(node, str):
        return node
    layer, pos, feature = node
    pos += graph.n_tokens if -graph.n_tokens <= pos < 0 else 0
    return f"{layer}:{pos}:{feature}"


def _row(graph: Graph, node: np.ndarray) -> np.ndarray:
    """Rows of the nodes that have one: features and targets."""
    A, N = graph.n_features, graph.layout.n_columns
    return graph.layout.row_of(node[(node < A) | (node >= N)])


def _only(graph: Graph, members: Sequence[np.ndarray]) -> Pruning:
    """All nodes but the ungrouped features, and every edge between what is left."""
    keep_N = ~graph.layout.ends(None)
    for node in members:
        keep_N[node[node < graph.n_features]] = True
    return Pruning(
        keep_N=keep_N,
        keep_edge_RN=kept_rows(graph, keep_N)[:, None] & keep_N[None],
        node_threshold=1.0,
        edge_threshold=1.0,
    )


def _contract(
    graph: Graph, members: Sequence[np.ndarray], *, norm: str
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """S with sign [G, G], S of absolute edges [G, G], shares from outside [G]."""
    G, N = len(members), graph.edge_RN.shape[1]
    group_N = np.full(N, -1)
    for g, node in enumerate(members):
        group_N[node[node < N]] = g
    col_C = np.flatnonzero(group_N >= 0)
    one_CG = (group_N[col_C][:, None] == np.arange(G)[None]).astype(np.float64)
    beyond_R = np.zeros(len(graph.edge_RN))  # input that is no column of the graph
    if graph.meta.convention == "paper":
        beyond_R += np.abs(graph.bias_R) + graph.rest_abs_R
    edge_GG, size_GG, outside_G = np.zeros((G, G)), np.zeros((G, G)), np.zeros(G)
    for g, node in enumerate(members):
        row_M = _row(graph, node)
        own = node[node < N]
        inside_M = _strength(graph.edge_RN, row_M, own)
        # Summed by itself: a difference would leave rounding where nothing is.
        outside_M = _strength(graph.edge_RN, row_M, np.setdiff1d(np.arange(N), own))
        outside_M += beyond_R[row_M]
        fed_M = inside_M + outside_M > 0
        row_M, outside_M = row_M[fed_M], outside_M[fed_M]
        total_M = inside_M[fed_M] + outside_M
        f_M = outside_M / total_M
        if not f_M.sum() > 0:
            continue
        outside_G[g] = f_M.mean()
        # f over what shares are taken of: total, or f * total.
        weight_M = f_M / total_M
        if norm == "external":
            weight_M = np.where(f_M > 0, 1 / total_M, 0)
        weight_M /= f_M.sum()
        edge_MC = submatrix(graph.edge_RN, row_M, col_C).astype(np.float64)
        edge_GG[g] = (weight_M * graph.side_R[row_M]) @ edge_MC @ one_CG
        size_GG[g] = weight_M @ np.abs(edge_MC) @ one_CG
    if norm == "external":
        np.fill_diagonal(edge_GG, 0)
        np.fill_diagonal(size_GG, 0)
    return edge_GG, size_GG, outside_G


def _strength(edge_RN: np.ndarray, row: np.ndarray, col: np.ndarray) -> np.ndarray:
    """Sum of absolute edges of some rows over some columns, float64."""
    return np.abs(submatrix(edge_RN, row, col).astype(np.float64)).sum(1)


def _visits(graph: Graph, members: Sequence[np.ndarray]) -> np.ndarray:
    """Visits of all nodes, then targets; the walk ends in ungrouped features."""
    weight_K = graph.target_prob_K.astype(np.float64) / graph.target_prob_K.sum()
    keep_N = _only(graph, members).keep_N
    row, col = np.flatnonzero(kept_rows(graph, keep_N)), np.flatnonzero(keep_N)
    edge = submatrix(graph.edge_RN, row, col)
    visit_X = np.zeros(len(keep_N) + graph.n_targets)
    visit_X[col] = solve_influence(edge, shares_total(graph)[row], weight_K)
    visit_X[len(keep_N) :] = weight_K
    return visit_X


def _read(
    graph: Graph, members: Sequence[np.ndarray], visit_X: np.ndarray
) -> tuple[np.ndarray, float]:
    """Visits of every group [G], and how far those read off the small graph are off.

    Off is the sum of the differences over the sum of the visits. A path has no more
    edges than layers plus one, so the small graph is walked so far and no further.
    """
    G, N = len(members), graph.edge_RN.shape[1]
    exact_G = np.array([visit_X[node].sum() for node in members])
    grouped = np.concatenate([np.zeros(0, int), *members])
    loose = np.setdiff1d(np.arange(N, N + graph.n_targets), grouped)
    every = [*members, *(np.array([k]) for k in loose)]
    size_GG = _contract(graph, every, norm="total")[1]
    step_G = np.array([visit_X[node[node >= N]].sum() for node in every])
    read_G = step_G.copy()
    for _ in range(graph.n_layers + 1):
        step_G = step_G @ size_GG
        read_G += step_G
    off = np.abs(read_G[:G] - exact_G).sum() / max(float(exact_G.sum()), 1e-30)
    return exact_G, float(off)


# -- suggestions -----------------------------------------------------------------------


def _tree(
    graph: Graph, kept_B: np.ndarray, *, same_position: bool, same_sign: bool
) -> np.ndarray:
    """Merges of the kept features by their profiles, as scipy's linkage gives them."""
    # A third of a second to import, which only suggestions need.
    from scipy.cluster.hierarchy import linkage
    from scipy.spatial.distance import squareform

    input_BT = (input_by_token(graph) * graph.side_R[: graph.n_features, None])[kept_B]
    effect_BK = total_effects(graph).T[kept_B].astype(np.float64)
    distance_BB = 1 - (_cosine(input_BT) + _cosine(effect_BK)) / 2
    key_BX = np.zeros((len(kept_B), 2))
    if same_position:
        key_BX[:, 0] = graph.pos_A[kept_B]
    if same_sign:
        key_BX[:, 1] = np.sign(effect_BK @ graph.target_prob_K.astype(np.float64))
    apart_BB = (key_BX[:, None] != key_BX[None]).any(2)
    distance_BB = np.where(apart_BB, _APART, np.clip(distance_BB, 0, 2))
    np.fill_diagonal(distance_BB, 0)
    return linkage(squareform(distance_BB, checks=False), method="average")


def input_by_token(graph: Graph) -> np.ndarray:
    """Signed total effect of every token on every feature, [A, T], float64.

    All paths counted, gates as they are: the other end of `solve_total_effect`.
    """
    A = graph.n_features
    value_A = np.where(graph.value_A == 0, 1, graph.value_A).astype(np.float64)
    # Effects over activations, row by row: a copy of the whole matrix can be large.
    effect_AT = graph.edge_RN[:A, graph.embed_cols].astype(np.float64)
    for a in range(A):
        effect_AT[a] += graph.edge_RN[a, :a] @ effect_AT[:a]
        effect_AT[a] /= value_A[a]
    return effect_AT * value_A[:, None]


def _cosine(x_BX: np.ndarray) -> np.ndarray:
    size_B = np.linalg.norm(x_BX, axis=1)
    x_BX = x_BX / np.where(size_B > 0, size_B, 1)[:, None]
    return x_BX @ x_BX.T


def _singles(graph: Graph) -> list[np.ndarray]:
    """Tokens that have influence, then all targets, one each."""
    is_input_N = graph.layout.ends("input")
    used = np.flatnonzero(is_input_N & (graph.influence_N > 0))
    target = graph.layout.at("target", np.arange(graph.n_targets))
    return [np.array([i]) for i in (*used, *target)]


def _named(
    graph: Graph, found: Sequence[np.ndarray], single: Sequence[np.ndarray]
) -> list[Supernode]:
    """Groups of features by influence, called after their strongest; then singles."""
    influence_N, groups = graph.influence_N, []
    for node in sorted(found, key=lambda node: -influence_N[node].sum()):
        name = node_name(graph, int(node[np.argmax(influence_N[node])]))
        more = f" +{len(node) - 1}" if len(node) > 1 else ""
        groups.append(Supernode(name + more, tuple(map(graph.feature, node))))
    for (i,) in single:
        name, short = node_name(graph, int(i)), short_name(graph, int(i))
        if name in {group.name for group in groups}:
            name = f"{name} ({short})"
        groups.append(Supernode(name, (short,)))
    return groups
