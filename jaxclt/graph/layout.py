"""Where the nodes of a graph stand: its columns, its rows, one number for each node.

Columns are sources, kind by kind; features come first, and nothing else has inputs.
Rows are what is explained: features, then targets. Nodes are numbered as columns, and
target k is node N + k, after the last. No other file computes an offset.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Any, TypeVar

import numpy as np

from jaxclt.graph.kinds import KINDS, SOURCES, NodeKind

__all__ = ["Layout", "check_sources"]

_Number = TypeVar("_Number", int, np.ndarray)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Layout:
    """Places of all nodes, from counts alone."""

    n_features: int
    n_layers: int
    n_tokens: int
    n_targets: int = 0
    sources: tuple[str, ...] = SOURCES  # kinds that have columns, in their order

    def shape(self, kind: str) -> tuple[int, ...]:
        """How many nodes of a kind there are along each of its axes."""
        size = {
            "A": self.n_features,
            "L": self.n_layers,
            "T": self.n_tokens,
            "K": self.n_targets,
        }
        return tuple(size[axis] for axis in KINDS[kind].axes)

    @functools.cached_property
    def nodes(self) -> dict[str, slice]:
        """Numbers of the nodes of every kind, targets last; of sources, columns."""
        found, start = {}, 0
        for kind in (*self.sources, "target"):
            stop = start + math.prod(self.shape(kind))
            found[kind] = slice(start, stop)
            start = stop
        return found

    @property
    def n_columns(self) -> int:
        """N."""
        return self.nodes["target"].start

    @property
    def target_rows(self) -> slice:
        """Rows of the targets; the row of a feature has the number of its column."""
        return slice(self.n_features, self.n_features + self.n_targets)

    def ends(self, *ends: str | None) -> np.ndarray:
        """Columns whose kind counts as one of these, bool [N]; None: walks go on."""
        return self._columns(lambda kind: kind.ends in ends)

    def kept_by(self, convention: str) -> np.ndarray:
        """Columns that pruning by a convention keeps whatever their influence, [N]."""
        return self._columns(lambda kind: convention in kind.kept_by)

    def _columns(self, test: Callable[[NodeKind], bool]) -> np.ndarray:
        wanted_N = np.zeros(self.n_columns, bool)
        for kind in self.sources:
            wanted_N[self.nodes[kind]] = test(KINDS[kind])
        return wanted_N

    def kind(self, node: int) -> str:
        """Name of a node's kind."""
        return next(kind for kind, at in self.nodes.items() if node < at.stop)

    def at(self, kind: str, *place: Any) -> Any:
        """Numbers of nodes from their places along the kind's axes, broadcast."""
        index = 0
        for i, n in zip(place, self.shape(kind), strict=True):
            index = index * n + i
        return self.nodes[kind].start + index

    def place(self, node: int) -> dict[str, int]:
        """A node's place along the axes of its kind, by their letters."""
        kind = self.kind(node)
        index = np.unravel_index(node - self.nodes[kind].start, self.shape(kind))
        return dict(zip(KINDS[kind].axes, map(int, index), strict=True))

    def places(self, layer_A: np.ndarray, pos_A: np.ndarray) -> np.ndarray:
        """Layer and position of every column, [2, N].

        Kinds without layers, such as embeddings, are in layer -1, and those without
        positions at the first.

        Args:
          layer_A: layers of the features.
          pos_A: their positions.
        """
        found = []
        for kind in self.sources:
            axes, shape = KINDS[kind].axes, self.shape(kind)
            along = dict(zip(axes, np.indices(shape), strict=True))
            if axes == "A":
                along = {"L": layer_A, "T": pos_A}
            at = {"L": np.full(shape, -1), "T": np.zeros(shape, int)} | along
            found.append(np.stack([at["L"], at["T"]]).reshape(2, -1))
        return np.concatenate(found, axis=1)

    def row_of(self, node: _Number) -> _Number:
        """Rows of features and targets."""
        return node - (node >= self.n_columns) * (self.n_columns - self.n_features)

    def node_of(self, row: _Number) -> _Number:
        """The features and targets that rows belong to."""
        return row + (row >= self.n_features) * (self.n_columns - self.n_features)


def check_sources(sources: tuple[str, ...]) -> None:
    """Raise ValueError unless these kinds can be the columns of a graph, in order."""
    unknown = set(sources) - (set(KINDS) - {"target"})
    if unknown:
        raise ValueError(f"it has nodes of a kind that is not known: {min(unknown)}")
    if sources[:1] != ("feature",) or len(set(sources)) < len(sources):
        raise ValueError("its kinds of nodes are not features first, each once")
