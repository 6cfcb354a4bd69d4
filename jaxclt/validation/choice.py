"""Which features a validation patches: influential ones, random ones, and groups."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import jax
import numpy as np

from jaxclt.errors import check_at_least, check_finite, check_positive
from jaxclt.graph.graph import Graph
from jaxclt.graph.supernodes import with_features
from jaxclt.types import Supernode

__all__ = ["Choice", "ValidateOptions", "by_influence", "choose", "named_groups"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class ValidateOptions:
    """How much to patch.

    Raises:
      InputError: for a value out of its range.
    """

    n_features: int = 100  # most influential ones, and as many at random
    n_small: int = 25  # of each, also patched a little
    small: float = 0.8  # factor of the small patch
    n_live: int = 25  # of each, patched with attention patterns live
    live_factor: float = 0.9  # of the small patch there
    n_patterns: int = 8  # whose attention patterns are compared
    n_replacement: int = 16  # patched in the replacement model alone
    n_watched: int = 60  # features whose activations are watched
    n_groups: int = 8  # features at several positions, if no supernodes are given
    n_layers: int = 3  # perturbed layers
    n_perturbed: int = 30  # of a kind and layer
    size: float = 0.1  # of a perturbation, share of the feature's activation
    rise: float = 0.1  # of the activation, of an absolute perturbation
    foil: int | None = None  # token that the answer is compared with
    seed: int = 0

    def __post_init__(self) -> None:
        least = {0: ("n_replacement", "n_watched", "n_groups"), 3: ("n_features",)}
        least[0] += ("n_patterns",)
        least[1] = ("n_small", "n_live", "n_layers", "n_perturbed")
        for bound, names in least.items():
            check_at_least(bound, **{name: getattr(self, name) for name in names})
        check_positive(size=self.size, rise=self.rise)
        check_finite(small=self.small, live_factor=self.live_factor, seed=self.seed)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Choice:
    """What is patched; features by their slots in the graph."""

    node_B: np.ndarray  # the most influential, then the control set
    control_B: np.ndarray  # bool
    watch_W: np.ndarray  # whose activations are watched
    groups: list[tuple[str, np.ndarray]]  # names and members, ablated together
    left_out: dict[str, list[str]]  # members of groups that are no features here

    def small(self, n: int) -> np.ndarray:
        """Places in the batch of the first n of both sets."""
        top, control = (np.flatnonzero(self.control_B == c) for c in (False, True))
        return np.concatenate([top[:n], control[:n]])


def by_influence(graph: Graph) -> np.ndarray:
    """Slots of the features that reach the targets, most influential first.

    What the others do is nothing, and rounding is nothing to rank.
    """
    score_A = graph.influence_N[graph.feature_cols]
    order = np.argsort(-score_A, kind="stable")
    return order[(graph.value_A[order] != 0) & (score_A[order] > 0)]


def choose(
    graph: Graph,
    options: ValidateOptions,
    groups: Sequence[Supernode] | None,
    key: jax.Array,
) -> Choice:
    """Draw what is patched.

    Args:
      graph: to validate.
      options: how much.
      groups: supernodes; None or empty takes features that are active at several
        positions, each with all its positions.
      key: of the control set.
    """
    order = by_influence(graph)
    top, rest = order[: options.n_features], order[options.n_features :]
    shuffled = np.asarray(jax.random.permutation(key, len(rest)))
    node_B = np.concatenate([top, rest[shuffled[: options.n_features]]])
    found, left_out = _repeated(graph, options.n_groups), {}
    if groups:
        found, left_out = named_groups(graph, groups)
    return Choice(
        node_B=node_B,
        control_B=np.arange(len(node_B)) >= len(top),
        watch_W=order[graph.layer_A[order] > 0][: options.n_watched],
        groups=found,
        left_out=left_out,
    )


def named_groups(
    graph: Graph, groups: Sequence[Supernode]
) -> tuple[list[tuple[str, np.ndarray]], dict[str, list[str]]]:
    """Slots of the features of supernodes, and by name the members that are none."""
    place = zip(graph.layer_A, graph.pos_A, graph.feature_A, strict=True)
    slot = {tuple(map(int, p)): a for a, p in enumerate(place)}
    found, left_out = [], {}
    for group in groups:
        nodes = with_features(graph, group).nodes
        members = np.unique([slot[n] for n in nodes if n in slot]).astype(int)
        if len(members):
            found.append((group.name, members))
        if rest := [n for n in nodes if n not in slot]:
            left_out[group.name] = [
                n if isinstance(n, str) else ":".join(map(str, n)) for n in rest
            ]
    return found, left_out


def _repeated(graph: Graph, n: int) -> list[tuple[str, np.ndarray]]:
    """The n most influential features that are active at several positions."""
    score_A = graph.influence_N[graph.feature_cols]
    same: dict[tuple[int, int], list[int]] = {}
    for a in np.flatnonzero(graph.value_A != 0).tolist():
        same.setdefault((int(graph.layer_A[a]), int(graph.feature_A[a])), []).append(a)
    several = [(score_A[a].sum(), name, a) for name, a in same.items() if len(a) > 1]
    several.sort(key=lambda item: (-item[0], item[1]))
    return [
        (f"feature {feature} of layer {layer} at all positions", np.array(a))
        for _, (layer, feature), a in several[:n]
    ]
