"""From a dictionary and statistics to global weights."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import numpy as np
from scipy.sparse import csr_array

from jaxclt.clt.coder import Bound
from jaxclt.errors import InputError
from jaxclt.global_weights.attention import Head, head_block
from jaxclt.global_weights.ranking import GlobalWeights, Kind
from jaxclt.global_weights.statistics import Coactivation, Matrix
from jaxclt.global_weights.weights import (
    embedding_weights,
    logit_weights,
    virtual_tiles,
)
from jaxclt.lm.config import LMConfig

__all__ = ["build", "head_weights", "virtual_blocks"]


def build(
    on: Bound,
    statistics: Coactivation,
    *,
    kind: Kind = "twera",
    on_block: Callable[[int, int], None] = lambda done, total: None,
) -> GlobalWeights:
    """Virtual weights for everything that the statistics hold.

    Dense statistics of U features take U^2 / 2 weights in the model's dtype, sparse
    ones a weight for each pair that fires together.

    Args:
      on: the dictionary on its model.
      statistics: of the same dictionary.
      kind: what links are ranked by by default.
      on_block: progress, (pairs of layers done, in all).
    """
    subset = statistics.subset
    fill = _sparse if statistics.sparse else _dense
    virtual = fill(statistics, virtual_blocks(on, statistics, on_block), on.dtype)
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


def head_weights(
    on: Bound,
    statistics: Coactivation,
    head: Head,
    layer: int,
    feature: int,
    *,
    cfg: LMConfig,
) -> dict[str, np.ndarray]:
    """Weights [N] into a feature through one head, of all features below the head.

    Norm-aware: n ERA is the sum of the graphs' edges through this head alone.

    Args:
      on: the dictionary on its model.
      statistics: gathered with this head.
      head: layer and head.
      layer: of the target, at or above the head's.
      feature: its index.
      cfg: model shape.

    Returns:
      ``virtual era twera``, the sources in the order of the subset.

    Raises:
      InputError: if the head was not gathered, or the target lies below it.
    """
    subset, sums = statistics.subset, statistics.sums
    if head not in statistics.heads:
        raise InputError(
            f"head {head[0]}:{head[1]} was not gathered: name it in `heads`"
        )
    slot, first = subset.slot(layer, feature), subset.starts[head[0]]
    if slot < first:
        raise InputError(
            f"feature {layer}:{feature} lies below head {head[0]}:{head[1]}: choose a "
            "target of the head's layer or above"
        )
    at = statistics.heads.index(head)
    target = (layer, np.asarray([feature]))
    weight = [
        head_block(on, head, target, (of, subset.features(of)), cfg=cfg)[0]
        for of in range(head[0])
        if len(subset.features(of))
    ]
    virtual_N = np.concatenate(weight) if weight else np.zeros(0)
    total = float(sums["sum_U"][slot])
    ind_N, act_N = (sums[name][at][slot - first] for name in ("head_ind", "head_act"))
    return {
        "virtual": virtual_N,
        "era": ind_N / max(statistics.n_tokens, 1) * virtual_N,
        "twera": act_N * virtual_N / total if total else np.zeros_like(act_N),
    }


Blocks = Iterator[tuple[int, int, np.ndarray]]


def virtual_blocks(
    on: Bound,
    statistics: Coactivation,
    on_block: Callable[[int, int], None] = lambda done, total: None,
) -> Blocks:
    """All virtual weights of the statistics' features, as `interference` takes them.

    Yields:
      First target slot, first source slot, weights without padding.
    """
    starts = statistics.subset.starts
    for t, s, value_RN in virtual_tiles(on, statistics.subset, on_block):
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
