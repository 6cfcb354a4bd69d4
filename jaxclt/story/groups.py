"""Groups of shown features: which, what they are called, what ablating them does."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import numpy as np

from jaxclt.graph.graph import Graph
from jaxclt.graph.nodes import node_id, quoted
from jaxclt.graph.supernodes import suggest_supernodes
from jaxclt.naming.words import label_of
from jaxclt.patching.how import How
from jaxclt.validation.ablations import Bench
from jaxclt.validation.held_live import LOCAL

__all__ = ["Group", "choose_groups", "grouped", "measured_groups"]

FEATURES, GROUPS = 60, 7  # the most influential that are grouped, and groups told
_DISTANCE = 1.0  # profiles that point apart are not grouped


@dataclasses.dataclass(frozen=True, kw_only=True)
class Group:
    """Features that rest on the same tokens and do the same to the answer.

    Attributes:
      name: words for it, by what its members write and read; untrusted.
      nodes: slots of its features.
      share: of all influence on the targets that features hold.
      predicted: change of the lead by ablating it, by the local replacement model.
      measured: the same in the model.
    """

    name: str
    nodes: tuple[int, ...]
    share: float
    predicted: float | None = None
    measured: float | None = None

    def ids(self, graph: Graph) -> list[str]:
        """Its features' ids in graph.json."""
        return [node_id(graph, node) for node in self.nodes]


def choose_groups(
    graph: Graph, sink: Sequence[int], change_A: np.ndarray | None = None
) -> list[Group]:
    """The groups of the most influential features, most influential first.

    Args:
      graph: attributed and pruned.
      sink: positions that are left out.
      change_A: what features are chosen by instead of influence (`change_from`).
    """
    cols = graph.feature_cols
    shown_A = graph.pruning.keep_N[cols] & ~np.isin(graph.pos_A, np.asarray(sink, int))
    weight_A = graph.influence_N[cols] if change_A is None else change_A
    order = np.argsort(-np.where(shown_A, weight_A, -1), kind="stable")
    return grouped(graph, order[: min(FEATURES, int(shown_A.sum()))])


def grouped(graph: Graph, nodes: np.ndarray, most: int = GROUPS) -> list[Group]:
    """Some features in groups, most influential first.

    Args:
      graph: attributed and pruned.
      nodes: slots of features.
      most: groups.
    """
    cols = graph.feature_cols
    keep_N = graph.pruning.keep_N.copy()
    keep_N[cols] = False
    keep_N[nodes] = True
    few = dataclasses.replace(graph.pruning, keep_N=keep_N)
    found = suggest_supernodes(
        dataclasses.replace(graph, pruning=few), distance=_DISTANCE
    )
    slot = {graph.feature(int(a)): int(a) for a in nodes}
    total = float(graph.influence_N[cols].sum()) or 1.0
    groups: dict[str, Group] = {}
    for one in found:
        if len(groups) == most or isinstance(one.nodes[0], str):
            break
        members = tuple(slot[node] for node in one.nodes)  # pyright: ignore
        share = float(graph.influence_N[list(members)].sum()) / total
        name = group_name(graph, members)
        name = name if name not in groups else f"{name} ({len(groups) + 1})"
        groups[name] = Group(name=name, nodes=members, share=share)
    return list(groups.values())


def group_name(graph: Graph, nodes: Sequence[int]) -> str:
    """What the members say together, and where they stand."""
    said: dict[str, dict[str, float]] = {"raises": {}, "lowers": {}}
    reads: dict[tuple[int, str], float] = {}
    own = []
    for node in nodes:
        layer, pos, feature = graph.feature(node)
        if label := graph.meta.labels.get(f"{layer}:{feature}"):
            own.append(label)
        found = graph.meta.said.get(f"{layer}:{pos}:{feature}", {})
        weight = float(graph.influence_N[node])
        for name, sums in said.items():
            for token, z in found.get(name, ()):
                sums[token] = sums.get(token, 0.0) + weight * z
        for at, token, share in found.get("reads", ()):
            reads[at, token] = reads.get((at, token), 0.0) + weight * share
    where = sorted({int(graph.pos_A[node]) for node in nodes})
    places = ", ".join(quoted(graph.meta.tokens[pos]) for pos in where[:2])
    if own:
        return f"{', '.join(dict.fromkeys(own[:2]))} at {places}"
    together: dict[str, Any] = {
        name: sorted(sums.items(), key=lambda row: -row[1])
        for name, sums in said.items()
    }
    ranked = sorted(reads.items(), key=lambda row: -row[1])
    together["reads"] = [[at, token, share] for (at, token), share in ranked[:3]]
    label = label_of(together)
    if not label:
        layer, _, feature = graph.feature(nodes[0])
        label = f"L{layer} feature {feature}"
    return f"{label} at {places}"


def measured_groups(bench: Bench, groups: Sequence[Group]) -> list[Group]:
    """The same groups with the change of the lead, predicted and measured."""
    if not groups:
        return []
    change = bench.together([group.nodes for group in groups])
    done = bench.patch(change, How())
    local = bench.patch(change, LOCAL, everywhere=True)

    def lead(found: Any, g: int) -> float | None:
        if not found.fine_B[g]:
            return None
        return float(found.change_BK[g] @ bench.weight_K)

    return [
        dataclasses.replace(group, predicted=lead(local, g), measured=lead(done, g))
        for g, group in enumerate(groups)
    ]
