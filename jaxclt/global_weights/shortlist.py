"""Which active features of a prompt to look at, guessed from the global circuit.

The influence that the targets pass on directly is computed exactly; from there it is
handed down the links of `jaxclt globals`, as if a feature's inputs were the sources
that are linked to it and active at its position. Only the order is used: which features
get a column and may get a row. What stays outside is summed into the rest of the graph,
so that its bounds hold however bad the guess is.
"""

from __future__ import annotations

import dataclasses

import numpy as np

from jaxclt.clt.active import Active
from jaxclt.global_weights.ranking import Links

__all__ = ["Shortlist"]

LINKED = 0.5  # share of a feature's input that its linked sources are taken to hold


@dataclasses.dataclass(frozen=True)
class Shortlist:
    """The most promising active features of any prompt.

    Attributes:
      links: between features, from `jaxclt.global_weights.files.load_globals`.
      size: features at most.
    """

    links: Links
    size: int

    def __call__(self, active: Active, visit_A: np.ndarray) -> np.ndarray:
        """Slots of the chosen features, ascending.

        Args:
          active: the prompt's active features.
          visit_A: influence that arrives at them from the targets directly.
        """
        A = len(active.layer_A)
        if self.size >= A:
            return np.arange(A)
        guess_A = self.guess(active, visit_A)
        return np.sort(np.argsort(-guess_A, kind="stable")[: self.size])

    def guess(self, active: Active, visit_A: np.ndarray) -> np.ndarray:
        """Influence of every active feature as far as the links tell, [A]."""
        source_E, target_E, size_E = self._edges(active)
        total_A = np.bincount(target_E, size_E, minlength=len(visit_A)) / LINKED
        share_E = size_E / np.where(total_A > 0, total_A, 1)[target_E]
        guess_A = np.array(visit_A, np.float64)
        layer_E = active.layer_A[target_E]
        for layer in np.unique(layer_E)[::-1]:
            here = layer_E == layer
            handed = guess_A[target_E[here]] * share_E[here]
            np.add.at(guess_A, source_E[here], handed)
        return guess_A

    def _edges(self, active: Active) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Links between features active at one position: slots, |a V|."""
        links = self.links
        width = 1 + max(
            int(x.max(initial=0))
            for x in (
                links.source_feature_P,
                links.target_feature_P,
                active.feature_A,
            )
        )
        code_A = active.layer_A.astype(np.int64) * width + active.feature_A
        source_P, target_P = (
            layer_P.astype(np.int64) * width + feature_P
            for layer_P, feature_P in (
                (links.source_layer_P, links.source_feature_P),
                (links.target_layer_P, links.target_feature_P),
            )
        )
        slot_C = np.full(width * (active.n_layers + 1), -1)
        found = []
        for pos in np.unique(active.pos_A):
            here = np.flatnonzero(active.pos_A == pos)
            slot_C[code_A[here]] = here
            source, target = slot_C[source_P], slot_C[target_P]
            both = np.flatnonzero((source >= 0) & (target >= 0))
            size = np.abs(links.virtual_P[both] * active.value_A[source[both]])
            found.append((source[both], target[both], size))
            slot_C[code_A[here]] = -1
        source_E, target_E, size_E = map(np.concatenate, zip(*found, strict=True))
        return source_E, target_E, size_E.astype(np.float64)
