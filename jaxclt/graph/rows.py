"""Edge rows: pull targets back through the frozen stream, dot them with the sources.

    A[t, s] = sum over layers l  < g_t[l, pos_s], value_s W_dec(s -> l) >

where g_t[l] is the cotangent of target t at MLP output l: the transpose of the frozen
attention maps applied from the target's own layer downwards (spec 3.3). The transpose
is `jax.vjp` of one layer's frozen attention, batched over a chunk of targets.

What is known to be zero is not computed: a chunk holds targets of nearby positions and
layers, starts at the highest of its layers, and never looks past its last position.
Targets are a middle axis (positions first), which is how the contractions run as plain
matmuls.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from jaxclt.graph.bank import SourceBank
from jaxclt.lm.config import LMConfig
from jaxclt.lm.frozen import frozen_attention
from jaxclt.types import Block, LMParams, Recording

__all__ = [
    "Chunk",
    "Plan",
    "RowTargets",
    "Stream",
    "edge_rows",
    "make_plan",
    "make_stream",
    "pull_flops",
]


@dataclasses.dataclass(frozen=True, kw_only=True)
class RowTargets:
    """Directions to explain: where they read, and what.

    ``layer`` < L reads the residual stream after attention of that layer; L reads the
    stream after the last layer.
    """

    layer_R: np.ndarray
    pos_R: np.ndarray
    read_RD: np.ndarray

    def take(self, index: np.ndarray) -> RowTargets:
        """Some of the targets, in the given order."""
        return RowTargets(
            layer_R=self.layer_R[index],
            pos_R=self.pos_R[index],
            read_RD=self.read_RD[index],
        )


class Chunk(NamedTuple):
    """Targets that are pulled back together."""

    row_C: np.ndarray  # indices of targets, highest layer first
    n_positions: int  # nothing beyond is touched


@dataclasses.dataclass(frozen=True, kw_only=True)
class Plan:
    """How targets are cut into chunks; every band is one compiled program."""

    band_end: tuple[int, ...]  # position bands [previous end, end)
    capacity: int  # rows of a chunk, the last of a band padded

    def chunks(self, layer_R: np.ndarray, pos_R: np.ndarray) -> list[Chunk]:
        """Chunks narrow in position, then in layer: a low one starts low."""
        chunks = []
        for start, end in zip((0, *self.band_end[:-1]), self.band_end, strict=True):
            rows = np.flatnonzero((pos_R >= start) & (pos_R < end))
            rows = rows[np.argsort(-layer_R[rows], kind="stable")]
            chunks += [
                Chunk(rows[i : i + self.capacity], end)
                for i in range(0, len(rows), self.capacity)
            ]
        return chunks


def make_plan(
    n_rows: int,
    *,
    n_positions: int,
    flops_per_position: float,
    n_bands: int | None = None,
    chunk_size: int = 128,
) -> Plan:
    """Choose position bands and the chunk capacity.

    A target at position p needs p + 1 positions, its band's end is what it gets: more
    bands waste less work and compile more programs. The choice depends on sizes only,
    so that prompts of one bucket share their programs.

    Args:
      n_rows: targets that may be computed.
      n_positions: length of the recording.
      flops_per_position: cost of one target per position it touches.
      n_bands: how many; None for few where the work is little.
      chunk_size: most rows pulled back together.
    """
    if n_bands is None:
        work = n_rows * flops_per_position * n_positions / 2
        n_bands = 1 if work < _FLOPS_WORTH_BANDS else 6
    ends = _best_bands(np.ones(n_positions, int), min(n_bands, n_positions))[1]
    capacity = min(chunk_size, 128 if n_rows > 256 else 32)
    return Plan(band_end=ends, capacity=capacity)


# Below this, compiling more programs takes longer than they save.
_FLOPS_WORTH_BANDS = 2e11


def _best_bands(count_T: np.ndarray, n_bands: int) -> tuple[float, tuple[int, ...]]:
    """Ends of the bands that touch the fewest positions, and how many they touch.

    Exact by dynamic programming over at most 128 candidate ends.
    """
    T = len(count_T)
    mark = np.unique(np.linspace(0, T, min(T, 128) + 1).round().astype(int))
    rows = np.concatenate([[0], np.cumsum(count_T)])[mark].astype(float)
    # step[i, j]: positions touched by the targets of a band from mark i to mark j.
    touched = (rows[None, :] - rows[:, None]) * mark[None, :]
    step = np.where(mark[:, None] < mark[None, :], touched, np.inf)
    best, previous = step[0], []
    for _ in range(n_bands - 1):
        through = best[:, None] + step
        previous.append(np.argmin(through, axis=0))
        best = through.min(axis=0)
    ends, at = [], len(mark) - 1
    for back in [*reversed(previous), np.zeros(len(mark), int)]:
        ends.append(int(mark[at]))
        at = int(back[at])
    return float(best[-1]), tuple(sorted(set(ends)))


class Stream(NamedTuple):
    """The frozen stream of a prompt and its packed sources, on the device."""

    blocks: Block
    pattern_LHTS: Array
    scale_LT: Array
    skip: tuple[Array, Array] | None
    shared_XTSD: Array
    shared_block_X: Array
    shared_L: Array
    overflow_YSD: Array
    overflow_block_Y: Array
    overflow_pos_Y: Array
    overflow_L: Array
    error_LTD: Array
    embed_TD: Array


@partial(jax.jit, static_argnames=("cfg", "P", "n_blocks"))
def _pull_chunk(
    stream: Stream,
    layer_C: Array,
    pos_C: Array,
    read_CD: Array,
    *,
    cfg: LMConfig,
    P: int,
    n_blocks: int,
) -> tuple[Array, Array, Array]:
    """Edges of one chunk: slots [B, P, C, S], errors [L, P, C], embeddings [P, C]."""
    C, D = read_CD.shape
    L, S = cfg.n_layers, stream.shared_XTSD.shape[2]
    dtype = read_CD.dtype
    row_C = jnp.arange(C)

    def inject(g_PCD: Array, layer: Array | int) -> Array:
        here_C = layer_C == layer
        return g_PCD.at[pos_C, row_C].add(
            jnp.where(here_C[:, None], read_CD, jnp.zeros((), dtype))
        )

    def contract(layer: Array, g_PCD: Array, edge_BPCS: Array, empty: Array) -> Array:
        """Add the edges through what is written at one layer."""

        def shared(i: Array, edge_BPCS: Array) -> Array:
            tile_PSD = stream.shared_XTSD[i, :P]
            with jax.named_scope("edges"):
                edge_PCS = jnp.einsum("PCD,PSD->PCS", g_PCD, tile_PSD)
            return edge_BPCS.at[stream.shared_block_X[i]].add(edge_PCS)

        def overflow(i: Array, edge_BPCS: Array) -> Array:
            pos, block = stream.overflow_pos_Y[i], stream.overflow_block_Y[i]
            # A position beyond the band reads some other one and adds nothing.
            seen = (pos < P).astype(dtype)
            edge_CS = jnp.einsum("CD,SD->CS", g_PCD[pos], stream.overflow_YSD[i])
            return edge_BPCS.at[block, pos].add(edge_CS * seen, mode="drop")

        def bounds(first_L: Array) -> tuple[Array, Array]:
            return jnp.where(empty, first_L[layer + 1], first_L[layer]), first_L[
                layer + 1
            ]

        edge_BPCS = jax.lax.fori_loop(*bounds(stream.shared_L), shared, edge_BPCS)
        return jax.lax.fori_loop(*bounds(stream.overflow_L), overflow, edge_BPCS)

    def level(step: Array, state: tuple[Array, Array, Array]) -> tuple:
        g_PCD, edge_BPCS, error_LPC = state
        layer = top - step
        edge_BPCS = contract(layer, g_PCD, edge_BPCS, empty=(step == 0) & from_mid)
        error_LPC = error_LPC.at[layer].set(
            jnp.einsum("PCD,PD->PC", g_PCD, stream.error_LTD[layer, :P])
        )
        if stream.skip is not None:
            diagonal_LTD, W_skip_LDD = stream.skip
            back_PCD = jnp.einsum("PCE,DE->PCD", g_PCD, W_skip_LDD[layer])
            g_PCD = g_PCD + back_PCD * diagonal_LTD[layer, :P][:, None, :]
        g_PCD = inject(g_PCD, layer)
        p = jax.tree.map(lambda leaf: leaf[layer], stream.blocks)
        attention = partial(
            frozen_attention,
            p,
            stream.pattern_LHTS[layer, :, :P, :P],
            stream.scale_LT[layer, :P],
            cfg=cfg,
        )
        with jax.named_scope("pull_attention"):
            _, pull = jax.vjp(jax.vmap(attention, in_axes=1, out_axes=1), g_PCD)
            g_PCD = g_PCD + pull(g_PCD)[0]
        return g_PCD, edge_BPCS, error_LPC

    top_read = jnp.max(layer_C)
    from_mid = top_read < L  # nothing has been injected above the first contraction
    top = jnp.minimum(top_read, L - 1)
    g_PCD, edge_BPCS, error_LPC = jax.lax.fori_loop(
        0,
        top + 1,
        level,
        (
            inject(jnp.zeros((P, C, D), dtype), L),
            jnp.zeros((n_blocks, P, C, S), dtype),
            jnp.zeros((L, P, C), dtype),
        ),
    )
    embed_PC = jnp.einsum("PCD,PD->PC", g_PCD, stream.embed_TD[:P])
    return edge_BPCS, error_LPC, embed_PC


def make_stream(
    params: LMParams,
    recording: Recording,
    bank: SourceBank,
    *,
    skip: tuple[Array, Array] | None = None,
) -> Stream:
    """Put what all rows of a prompt need on the device, once.

    Args:
      params: model weights (attention values, outputs and norms are used).
      recording: the clean pass.
      bank: packed sources.
      skip: linear path of the dictionary, see `jaxclt.lm.frozen.replay`.
    """
    packed = {
        field.name: jnp.asarray(getattr(bank, field.name))
        for field in dataclasses.fields(bank)
        if field.name in Stream._fields
    }
    return Stream(
        blocks=params.blocks,
        pattern_LHTS=recording.frozen.pattern_LHTS,
        scale_LT=recording.frozen.attn_scale_LT,
        skip=skip,
        **packed,
    )


def edge_rows(
    stream: Stream,
    bank: SourceBank,
    targets: RowTargets,
    out_RN: np.ndarray,
    *,
    cfg: LMConfig,
    plan: Plan,
    source_pos_A: np.ndarray,
    on_rows: Callable[[int], None] = lambda n: None,
) -> None:
    """Write the direct effects of every source on every target into `out_RN`.

    Args:
      stream: from `make_stream`.
      bank: what it was made of.
      targets: R directions.
      out_RN: zeroed host array [R, A + L·T + T], filled in place: features, errors
        layer-major, embeddings.
      cfg: model shape.
      plan: bands and chunk capacity.
      source_pos_A: position of every source feature.
      on_rows: called with the number of rows just finished.
    """
    pending: tuple[Chunk, _Pulled] | None = None
    for chunk in plan.chunks(targets.layer_R, targets.pos_R):
        part = targets.take(chunk.row_C)
        pad = plan.capacity - len(chunk.row_C)
        pulled = _pull_chunk(
            stream,
            jnp.asarray(np.pad(part.layer_R, (0, pad), constant_values=-1)),
            jnp.asarray(np.pad(part.pos_R, (0, pad))),
            jnp.asarray(np.pad(part.read_RD, ((0, pad), (0, 0)))),
            cfg=cfg,
            P=chunk.n_positions,
            n_blocks=bank.n_blocks,
        )
        # The device works on this chunk while the host unpacks the one before.
        if pending is not None:
            _unpack(*pending, bank, source_pos_A, out_RN)
            on_rows(len(pending[0].row_C))
        pending = chunk, pulled
    if pending is not None:
        _unpack(*pending, bank, source_pos_A, out_RN)
        on_rows(len(pending[0].row_C))


_Pulled = tuple[Array, Array, Array]


def _unpack(
    chunk: Chunk,
    pulled: _Pulled,
    bank: SourceBank,
    source_pos_A: np.ndarray,
    out_RN: np.ndarray,
) -> None:
    """Put one chunk's edges where they belong: rows by target, columns by source."""
    edge_BPCS, error_LPC, embed_PC = map(np.asarray, pulled)
    L, A, n = len(error_LPC), len(source_pos_A), len(chunk.row_C)
    T = (out_RN.shape[1] - A) // (L + 1)  # without the padding of the recording
    P = min(chunk.n_positions, T)
    near = np.flatnonzero(source_pos_A < P)
    flat_CX = edge_BPCS[:, :, :n].transpose(2, 1, 0, 3).reshape(n, -1)
    place = source_pos_A[near] * bank.n_blocks * bank.width + bank.slot_A[near]
    row_C1 = chunk.row_C[:, None]
    out_RN[row_C1, near[None, :]] = flat_CX[:, place]
    error = A + (np.arange(L)[:, None] * T + np.arange(P)[None, :]).ravel()
    out_RN[row_C1, error[None, :]] = error_LPC[:, :P, :n].reshape(L * P, n).T
    out_RN[chunk.row_C, A + L * T : A + L * T + P] = embed_PC[:P, :n].T


def pull_flops(cfg: LMConfig, bank: SourceBank) -> float:
    """Floating-point operations per target and position it touches, on average.

    A target goes down half of the layers; in each, the transposes of W_O, the pattern
    and W_V, and the dot products with the tiles of one write layer.
    """
    heads, kv_heads = cfg.n_heads * cfg.d_head, cfg.n_kv_heads * cfg.d_head
    n_tokens = bank.error_LTD.shape[1]
    layer = cfg.d_model * (heads + kv_heads) + n_tokens * heads
    n_tiles = len(bank.shared_XTSD) + len(bank.overflow_YSD) / n_tokens
    tiles = n_tiles * bank.width * cfg.d_model
    return cfg.n_layers * layer + tiles
