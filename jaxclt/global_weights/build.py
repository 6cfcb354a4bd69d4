"""From a dictionary and statistics to global weights."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
from scipy.sparse import csr_array

from jaxclt.clt.coder import Bound, Dictionary
from jaxclt.errors import InputError
from jaxclt.global_weights.ranking import GlobalWeights, Kind
from jaxclt.global_weights.statistics import Coactivation, Matrix
from jaxclt.global_weights.weights import (
    embedding_weights,
    logit_weights,
    virtual_tiles,
)
from jaxclt.io.model import Model

__all__ = ["bound_of", "build", "virtual_blocks"]


def bound_of(dictionary: Dictionary, model: Model) -> Bound:
    """A dictionary that has global weights, on its model.

    Raises:
      InputError: for one with gates, and for a model in less than float32.
    """
    on = Bound(dictionary, model.params, model.cfg)
    if on.coder.gated:
        raise InputError(
            f"dictionary {dictionary.name}: a neuron's gate depends on the prompt, so "
            "neurons have no global weights; give a transcoder"
        )
    if on.dtype.itemsize < 4:
        raise InputError(
            f"statistics need float32, the model is {on.dtype}: load it "
            'with dtype="float32"'
        )
    return on


def build(
    on: Bound,
    statistics: Coactivation,
    *,
    kind: Kind = "twera",
) -> GlobalWeights:
    """Virtual weights for everything that the statistics hold.

    Dense statistics of U features take U^2 / 2 weights in the model's dtype, sparse
    ones a weight for each pair that fires together.
    """
    subset = statistics.subset
    fill = _sparse if statistics.sparse else _dense
    virtual = fill(statistics, virtual_blocks(on, statistics), on.dtype)
    input_virtual_UY = output_virtual_YU = None
    live = np.unique(subset.layer_U).tolist()
    if len(statistics.input_Y):
        input_virtual_UY = np.concatenate(
            [
                embedding_weights(on, i, subset.features(i), statistics.input_Y)
                for i in live
            ]
        )
    if len(statistics.output_Y):
        output_virtual_YU = np.concatenate(
            [
                logit_weights(on, i, subset.features(i), statistics.output_Y).T
                for i in live
            ],
            axis=1,
        )
    return GlobalWeights(
        statistics=statistics,
        virtual=virtual,
        kind=kind,
        input_virtual_UY=input_virtual_UY,
        output_virtual_YU=output_virtual_YU,
    )


Blocks = Iterator[tuple[int, int, np.ndarray]]


def virtual_blocks(on: Bound, statistics: Coactivation) -> Blocks:
    """All virtual weights of the statistics' features, as `interference` takes them.

    Yields:
      First target slot, first source slot, weights without padding.
    """
    starts = statistics.subset.starts
    for t, s, value_RN in virtual_tiles(on, statistics.subset):
        rows, columns = starts[t + 1] - starts[t], starts[s + 1] - starts[s]
        yield starts[t], starts[s], np.asarray(value_RN)[:rows, :columns]


def _dense(
    statistics: Coactivation, blocks: Blocks, dtype: np.dtype
) -> tuple[Matrix, ...]:
    found = [np.zeros(tile.shape, dtype) for tile in statistics.sums["both"]]
    for row, column, value_RN in blocks:
        tile = found[statistics.subset.layer_U[row]]
        tile[:, column : column + value_RN.shape[1]] = value_RN
    return tuple(found)


def _sparse(
    statistics: Coactivation, blocks: Blocks, dtype: np.dtype
) -> tuple[Matrix, ...]:
    pattern = [csr_array(tile).tocsc() for tile in statistics.sums["both"]]
    data = [np.zeros(tile.nnz, dtype) for tile in pattern]
    for row, column, value_RN in blocks:
        layer = statistics.subset.layer_U[row]
        tile, n = pattern[layer], value_RN.shape[1]
        ends = tile.indptr[column : column + n + 1]
        of = np.repeat(np.arange(n), np.diff(ends))
        row_of = tile.indices[ends[0] : ends[-1]]
        data[layer][ends[0] : ends[-1]] = value_RN[row_of, of]
    for tile, weight in zip(pattern, data, strict=True):
        tile.data = weight
    return tuple(tile.tocsr() for tile in pattern)
