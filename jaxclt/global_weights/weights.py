"""Virtual weights: what a feature writes, read by the encoders above it.

    V[t, s] = <sum of s's decoders below t's layer, t's encoder>      l_s < l_t, else 0

Circuit Tracing (2025), section 4; maths 17.1. An encoder that reads after the norm has
its gain folded in, and a LayerNorm's removal of the mean; the denominator depends on
the token and stays outside: a local residual-direct edge is activation x V x reciprocal
denominator. A dictionary's linear skip is not part of V: with the norm between, it is
not one map for all tokens.

Every decoder is read once; what is held is one layer's decoders, all encoders and one
block of weights, never the square of all features.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from jaxclt.clt.coder import Bound
from jaxclt.clt.config import Shape
from jaxclt.clt.subset import Subset
from jaxclt.lm.run import token_vectors
from jaxclt.naming.vocabulary import highest, written_logits
from jaxclt.precision import jit

__all__ = [
    "Strongest",
    "Tile",
    "embedding_weights",
    "folded_encoder",
    "logit_weights",
    "strongest_virtual",
    "summed_writes",
    "virtual_block",
    "virtual_tiles",
]


def folded_encoder(
    on: Bound,
    layer: int,
    feature_R: np.ndarray | None = None,
) -> np.ndarray:
    """Encoder rows [R, D] of a layer's features (None: all of them) in the stream.

    The norm but its scale is folded in.
    """
    if feature_R is None:
        feature_R = np.arange(on.shape.n_features)
    return on.stream_rows(layer, feature_R)[0]


def writes_below(cfg: Shape, source: int, target: int) -> int:
    """How many of a source's decoders write below a target's encoder."""
    return min(target - source, cfg.n_writes(source))


@jit
def block(read_RD: Array, prefix_ND: Array) -> Array:
    """Virtual weights [R, N] of summed decoders and folded encoders."""
    with jax.named_scope("virtual_weights"):
        return read_RD @ prefix_ND.T


def virtual_block(
    on: Bound,
    target: tuple[int, np.ndarray],
    source: tuple[int, np.ndarray],
) -> np.ndarray:
    """Virtual weights [R, N] between features of two layers, given with the layers.

    Zero unless the source lies below.
    """
    (to, feature_R), (of, feature_N) = target, source
    feature_R, feature_N = np.asarray(feature_R), np.asarray(feature_N)
    if of >= to:
        return np.zeros((len(feature_R), len(feature_N)), on.dtype)
    read_RD = folded_encoder(on, to, feature_R)
    written_ND = summed_writes(on, of, to, feature_N)
    return np.asarray(block(jnp.asarray(read_RD), written_ND))


def summed_writes(
    on: Bound,
    source: int,
    target: int,
    feature_N: np.ndarray,
) -> Array:
    """What features of a layer write below the encoders of a higher one, [N, D]."""
    n = writes_below(on.shape, source, target)
    return jnp.asarray(on.decoders(source, feature_N)[:, :n].sum(1))


class Tile(NamedTuple):
    """One block of virtual weights: rows `target`, columns `source`."""

    target: int
    source: int
    value_RN: Array  # padded with zeros to one size for all pairs of layers


def virtual_tiles(
    on: Bound,
    subset: Subset,
    on_block: Callable[[int, int], None] = lambda done, total: None,
) -> Iterator[Tile]:
    """All blocks of virtual weights among some features, source layer by source layer.

    Args:
      on: the dictionary on its model.
      subset: the features.
      on_block: progress, (blocks done, blocks in all).

    Yields:
      Blocks of pairs of layers that both have features, each of the shape [U, U] with
      U the most features of a layer; rows and columns beyond a layer's are zero.
    """
    cfg, starts = on.shape, subset.starts
    count_L = np.diff(starts)
    width = int(count_L.max())
    live = [layer for layer in range(cfg.n_layers) if count_L[layer]]

    def padded(x: np.ndarray) -> np.ndarray:
        pad = [(0, width - len(x))] + [(0, 0)] * (x.ndim - 1)
        return np.pad(x, pad) if len(x) < width else x

    read = {
        layer: jnp.asarray(padded(folded_encoder(on, layer, subset.features(layer))))
        for layer in live[1:]
    }
    total, done = len(live) * (len(live) - 1) // 2, 0
    for i, source in enumerate(live[:-1]):
        rows_NMD = on.decoders(source, subset.features(source))
        written_ND, n = jnp.zeros_like(read[live[-1]]), 0
        for target in live[i + 1 :]:
            below = writes_below(cfg, source, target)
            for i_write in range(n, below):
                written_ND = _add(written_ND, padded(rows_NMD[:, i_write]))
            n = below
            yield Tile(target, source, block(read[target], written_ND))
            done += 1
            on_block(done, total)


_add = jit(jnp.add)


class Strongest(NamedTuple):
    """The k largest weights by size of every feature, strongest first.

    Slots are of the subset, -1 where there are fewer than k (a weight of exactly zero
    is none).
    """

    input_UK: np.ndarray  # source slots of each target, int32
    input_weight_UK: np.ndarray
    output_UK: np.ndarray  # target slots of each source, int32
    output_weight_UK: np.ndarray


Best = tuple[Array, Array]  # values and slots [width, k]


@partial(jit, static_argnames="k", donate_argnums=(1, 2))
def _update(
    x_RN: Array, of_target: Best, of_source: Best, first: Array, *, k: int
) -> tuple[Best, Best]:
    """The best so far with one more block; `first` are its first row's and column's."""

    def merge(best: Best, x_RN: Array, start: Array) -> Best:
        _, column_RK = highest(jnp.abs(x_RN), k)
        value_RK = jnp.take_along_axis(x_RN, column_RK, 1)
        slot_RK = column_RK.astype(start.dtype) + start
        slot_RK = jnp.where(value_RK == 0, -jnp.ones_like(slot_RK), slot_RK)
        value = jnp.concatenate([best[0], value_RK], 1)
        slot = jnp.concatenate([best[1], slot_RK], 1)
        _, order = jax.lax.top_k(jnp.abs(value), k)
        return tuple(jnp.take_along_axis(x, order, 1) for x in (value, slot))  # pyright: ignore

    return merge(of_target, x_RN, first[1]), merge(of_source, x_RN.T, first[0])


def strongest_virtual(
    on: Bound,
    subset: Subset,
    k: int,
    on_block: Callable[[int, int], None] = lambda done, total: None,
) -> Strongest:
    """The strongest inputs and outputs of every feature, by size of virtual weight.

    Streams `virtual_tiles`: memory is of one block and of the result.
    """
    count_L = np.diff(subset.starts)
    width, dtype = int(count_L.max()), on.dtype

    def none() -> Best:
        return jnp.zeros((width, k), dtype), -jnp.ones((width, k), jnp.int32)

    into: list[Best | None] = [none() if n else None for n in count_L]
    out: list[Best | None] = [none() if n else None for n in count_L]
    for tile in virtual_tiles(on, subset, on_block):
        t, s = tile.target, tile.source
        first = np.asarray([subset.starts[t], subset.starts[s]], np.int32)
        best_t, best_s = into[t], out[s]
        assert best_t is not None
        assert best_s is not None
        into[t], out[s] = _update(tile.value_RN, best_t, best_s, first, k=k)

    def gather(best: list[Best | None], part: int) -> np.ndarray:
        rows = [
            np.asarray(found[part])[:n]
            for found, n in zip(best, count_L, strict=True)
            if found is not None
        ]
        return np.concatenate(rows)

    return Strongest(gather(into, 1), gather(into, 0), gather(out, 1), gather(out, 0))


# -- the vocabulary --------------------------------------------------------------------


def embedding_weights(
    on: Bound,
    layer: int,
    feature_R: np.ndarray | None = None,
    token_Y: np.ndarray | None = None,
) -> np.ndarray:
    """Virtual weights [R, Y] from token embeddings to features ("embedding weights").

    Of the tokens alone: learned positions, which the embedding nodes of a graph hold as
    well, are left out.

    Args:
      on: the dictionary on its model.
      layer: of the features.
      feature_R: which; None for all.
      token_Y: which tokens; None for the whole vocabulary.
    """
    read_RD = jnp.asarray(folded_encoder(on, layer, feature_R))
    token_Y = np.arange(len(on.params.embed_VD)) if token_Y is None else token_Y
    return np.asarray(block(read_RD, token_vectors(on.params, jnp.asarray(token_Y))))


def logit_weights(
    on: Bound,
    layer: int,
    feature_N: np.ndarray | None = None,
    token_Y: np.ndarray | None = None,
) -> np.ndarray:
    """Virtual weights [N, Y] from features to demeaned logits ("output weights").

    The gain of the final norm is folded in, its denominator is not; logits are those
    before a cap. Over the whole vocabulary the weights of a feature sum to zero.

    Arguments as for `embedding_weights`.
    """
    cfg = on.shape
    feature_N = np.arange(cfg.n_features) if feature_N is None else feature_N
    written_ND = summed_writes(on, layer, cfg.n_layers, np.asarray(feature_N))
    logit_NV = np.asarray(written_logits(on.params, written_ND))
    return logit_NV if token_Y is None else logit_NV[:, token_Y]
