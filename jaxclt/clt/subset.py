"""Which features take part in a global graph."""

from __future__ import annotations

import dataclasses
from typing import Protocol

import numpy as np

from jaxclt.errors import InputError

__all__ = ["FeatureSizes", "Subset"]


class FeatureSizes(Protocol):
    """How many features there are: a `CLTConfig`, or an `Encoder` of anything."""

    @property
    def n_layers(self) -> int:
        """Layers."""
        ...

    @property
    def n_features(self) -> int:
        """Features of a layer."""
        ...


@dataclasses.dataclass(frozen=True)
class Subset:
    """Features of a dictionary, by layer, then index.

    Attributes:
      layer_U: layers, int32.
      feature_U: indices in their layer, int32.
      n_layers: of the dictionary.
    """

    layer_U: np.ndarray
    feature_U: np.ndarray
    n_layers: int

    @classmethod
    def of(cls, place_U2: np.ndarray, cfg: FeatureSizes) -> Subset:
        """Features given as (layer, index) rows in any order, doubles dropped.

        Raises:
          InputError: if there are none, or the dictionary lacks one.
        """
        place_U2 = np.unique(np.asarray(place_U2, np.int64).reshape(-1, 2), axis=0)
        if not len(place_U2):
            raise InputError("no features are given: name at least one")
        layer_U, feature_U = place_U2.T
        for what, index_U, size in (
            ("layer", layer_U, cfg.n_layers),
            ("feature", feature_U, cfg.n_features),
        ):
            wrong = index_U[(index_U < 0) | (index_U >= size)]
            if len(wrong):
                raise InputError(
                    f"there is no {what} {wrong[0]}: the dictionary has 0 to {size - 1}"
                )
        return cls(layer_U.astype(np.int32), feature_U.astype(np.int32), cfg.n_layers)

    @classmethod
    def everything(cls, cfg: FeatureSizes) -> Subset:
        """All features of a dictionary."""
        layer_LF, feature_LF = np.indices((cfg.n_layers, cfg.n_features), np.int32)
        return cls(layer_LF.ravel(), feature_LF.ravel(), cfg.n_layers)

    def __len__(self) -> int:
        return len(self.layer_U)

    @property
    def starts(self) -> tuple[int, ...]:
        """Where each layer starts, and the end: L + 1 numbers."""
        ends = np.searchsorted(self.layer_U, np.arange(self.n_layers + 1))
        return tuple(ends.tolist())

    def of_layer(self, layer: int) -> slice:
        """The slots of one layer."""
        starts = self.starts
        return slice(starts[layer], starts[layer + 1])

    def features(self, layer: int) -> np.ndarray:
        """Indices of the subset's features of one layer, ascending."""
        return self.feature_U[self.of_layer(layer)]

    def slot(self, layer: int, feature: int) -> int:
        """Where a feature stands.

        Raises:
          InputError: if it does not take part.
        """
        if 0 <= layer < self.n_layers:
            here = self.of_layer(layer)
            at = here.start + int(np.searchsorted(self.feature_U[here], feature))
            if at < here.stop and self.feature_U[at] == feature:
                return at
        raise InputError(
            f"feature {layer}:{feature} is not among the {len(self)} features of these "
            "statistics: name it in `features` and gather them again"
        )
