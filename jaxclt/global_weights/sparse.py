"""Co-activation sums of all features, held for the pairs that ever fire together."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import jax
import numpy as np
from jax import Array
from scipy.sparse import csr_array

from jaxclt.errors import InputError
from jaxclt.global_weights.statistics import (
    Encoders,
    Plan,
    Sums,
    feature_sums,
    watch,
)
from jaxclt.precision import jit
from jaxclt.types import LMParams

__all__ = ["MOST_BYTES", "check_size", "sparse_sums"]

MOST_BYTES = 4 << 30


@partial(jit, static_argnames="plan")
def _watch(
    params: LMParams, enc: Encoders, token_WS: Array, mask_WS: Array, *, plan: Plan
) -> tuple[Array, Array, Sums]:
    seen = watch(params, enc, token_WS, mask_WS, plan=plan)
    return seen.a_UT, seen.scale_LT, feature_sums(seen)


def sparse_sums(
    params: LMParams,
    enc: Encoders,
    token_WS: Array | np.ndarray,
    mask_WS: Array | np.ndarray,
    *,
    plan: Plan,
) -> Sums:
    """The sums of `token_sums` for pairs, as sparse float64 matrices on the host.

    Costs a step for each pair of features that fire on a token, so it suits sparse
    dictionaries: a few hundred active features a token. Heads are not used.
    """
    a_UT, scale_LT, found = _watch(params, enc, token_WS, mask_WS, plan=plan)
    scale = np.asarray(scale_LT, np.float64) if plan.scaled else None
    pairs = _pairs(csr_array(np.asarray(a_UT, np.float64)), plan.starts, scale)
    return jax.tree.map(lambda x: np.asarray(x, np.float64), found) | pairs


def _pairs(
    a_UT: csr_array, starts: Sequence[int], scale_LT: np.ndarray | None
) -> dict[str, Any]:
    on_UT = a_UT.copy()
    on_UT.data[:] = 1.0
    a_TU, on_TU = a_UT.T.tocsr(), on_UT.T.tocsr()
    names = ["ind", "act", "both"]
    if scale_LT is not None:
        names += ["ind_norm", "act_norm"]
    found: dict[str, list[csr_array]] = {name: [] for name in names}
    for layer in range(len(starts) - 1):
        here, below = slice(*starts[layer : layer + 2]), slice(0, starts[layer])
        source, source_on = a_TU[:, below], on_TU[:, below]
        target, target_on = a_UT[here], on_UT[here]
        found["ind"].append(target_on @ source)
        found["act"].append(target @ source)
        found["both"].append(target_on @ source_on)
        if scale_LT is not None:
            for name, left in (("ind_norm", target_on), ("act_norm", target)):
                scaled = left.copy()
                scaled.data *= scale_LT[layer, scaled.indices]
                found[name].append(scaled @ source)
    return {
        name: tuple(csr_array(tile) for tile in tiles) for name, tiles in found.items()
    }


def check_size(sums: Sums) -> None:
    """Stop before memory runs out.

    Raises:
      InputError: if more pairs fire together than can be held.
    """
    tiles = [
        tile
        for value in sums.values()
        if isinstance(value, tuple)
        for tile in value
        if isinstance(tile, csr_array)
    ]
    size = sum(tile.data.nbytes + tile.indices.nbytes for tile in tiles)
    if size > MOST_BYTES:
        n = sum(tile.nnz for tile in sums["both"])
        raise InputError(
            f"{n:,} pairs of features fire together, whose sums take {size / 1e9:.1f} "
            f"GB, more than the {MOST_BYTES / 1e9:.1f} GB that are held: choose a "
            "subset, for example --features top:4096"
        )
