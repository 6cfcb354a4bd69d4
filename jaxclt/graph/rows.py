"""Edge rows: pull targets back through the frozen stream, dot them with the sources.

    A[t, s] = sum over layers l  < g_t[l, pos_s], value_s W_dec(s -> l) >

where g_t[l] is the cotangent of target t at MLP output l: the transpose of the frozen
attention maps applied from the target's own layer downwards (maths 6.2). The transpose
is `jax.vjp` of one layer's frozen attention, batched over a chunk of targets.

What is known to be zero is not computed: a chunk holds targets of nearby positions and
layers, starts at the highest of its layers, and never looks past its last position.
Targets are a middle axis (positions first), which is how the contractions run as plain
matmuls. Chunks are split over the devices of a mesh; no device needs another's.

Not all edges are always wanted: sources outside a `pool` are only summed.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any, NamedTuple, TypeVar, cast

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.sharding import Mesh, PartitionSpec

from jaxclt.clt.active import Active
from jaxclt.graph.bank import Bank, DeviceBank, RowTargets, add_dots, pack, writers
from jaxclt.graph.layout import Layout
from jaxclt.graph.plan import Chunk, Plan, chunk_flops
from jaxclt.graph.stream import Stream, attend, make_stream, on_mesh
from jaxclt.lm.config import LMConfig
from jaxclt.shapes import bucket
from jaxclt.types import LMParams, Recording

__all__ = ["Puller", "RowTargets", "edge_rows", "make_puller", "pull_flops", "visits"]


class _Held(NamedTuple):
    """What all chunks of a prompt share, on every device."""

    stream: Stream
    bank: DeviceBank
    error_LTD: Array
    embed_TD: Array


class _Rows(NamedTuple):
    """A chunk of targets."""

    layer_B: Array
    pos_B: Array
    read_BD: Array


class _Edges(NamedTuple):
    """Edges of a chunk by slot: features [Z, P, W, B], errors and embeddings."""

    edge_ZPWB: Array
    error_LPB: Array
    embed_PB: Array


def _pull(
    held: _Held, rows: _Rows, *, cfg: LMConfig, P: int, n_blocks: int, width: int
) -> _Edges:
    stream, bank, error_LTD, embed_TD = held
    layer_B, pos_B, read_BD = rows
    B, D = read_BD.shape
    L, dtype = cfg.n_layers, read_BD.dtype
    row_B = jnp.arange(B)

    def inject(g_PBD: Array, layer: Array | int) -> Array:
        here_BD = jnp.where((layer_B == layer)[:, None], read_BD, jnp.zeros((), dtype))
        return g_PBD.at[pos_B, row_B].add(here_BD)

    def level(step: Array, state: tuple[Array, Array, Array]) -> tuple:
        g_PBD, edge_ZPWB, error_LPB = state
        layer = top - step
        nothing = (step == 0) & from_mid
        edge_ZPWB = add_dots(bank, layer, g_PBD, edge_ZPWB, start=0, nothing=nothing)
        error_PB = jnp.einsum("PBD,PD->PB", g_PBD, error_LTD[layer, :P])
        error_LPB = error_LPB.at[layer].set(error_PB)
        below_PBD = g_PBD
        if stream.skip is not None:
            scale_LT, W_skip_LDD = stream.skip
            back_PBD = jnp.einsum("PBE,DE->PBD", g_PBD, W_skip_LDD[layer])
            below_PBD = g_PBD + back_PBD * scale_LT[layer, :P][:, None, None]
        below_PBD = inject(below_PBD, layer)
        attention = partial(attend, stream, layer, cfg=cfg, start=0, pull=True)
        with jax.named_scope("pull_attention"):
            _, pull = jax.vjp(attention, g_PBD)
            # Side by side with attention, an MLP does not read what that writes.
            pulled = pull(g_PBD if cfg.parallel else below_PBD)[0]
        return below_PBD + pulled, edge_ZPWB, error_LPB

    top_read = jnp.max(layer_B)
    from_mid = top_read < L  # nothing has been injected above the first contraction
    top = jnp.minimum(top_read, L - 1)
    state = (
        inject(jnp.zeros((P, B, D), dtype), L),
        jnp.zeros((n_blocks, P, width, B), dtype),
        jnp.zeros((L, P, B), dtype),
    )
    g_PBD, edge_ZPWB, error_LPB = jax.lax.fori_loop(0, top + 1, level, state)
    embed_PB = jnp.einsum("PBD,PD->PB", g_PBD, embed_TD[:P])
    return _Edges(edge_ZPWB, error_LPB, embed_PB)


class _Read(NamedTuple):
    """A chunk's edges as they leave the device."""

    edge_EB: Array  # of the pool, or of all slots
    error_LPB: Array
    embed_PB: Array
    rest_B: Array  # features outside the pool, summed
    rest_abs_B: Array


# Every device has its share of the rows; the rest is replicated.
_AXIS = "rows"
_ROW = PartitionSpec(_AXIS)


def _last(ndim: int) -> PartitionSpec:
    return PartitionSpec(*(None,) * (ndim - 1), _AXIS)


_STATIC = ("cfg", "P", "n_blocks", "width", "mesh")


@partial(jax.jit, static_argnames=_STATIC)
def _pull_chunk(
    held: _Held,
    rows: _Rows,
    place_E: Array | None,
    *,
    cfg: LMConfig,
    P: int,
    n_blocks: int,
    width: int,
    mesh: Mesh,
) -> _Read:
    def local(held: _Held, rows: _Rows, place_E: Array | None) -> _Read:
        edges = _pull(held, rows, cfg=cfg, P=P, n_blocks=n_blocks, width=width)
        edge_ZPWB, error_LPB, embed_PB = edges
        flat_XB = edge_ZPWB.reshape(-1, edge_ZPWB.shape[-1])
        rest_B = rest_abs_B = jnp.zeros_like(embed_PB[0])
        if place_E is None:
            return _Read(flat_XB, error_LPB, embed_PB, rest_B, rest_abs_B)
        # Empty places point past the end.
        edge_EB = flat_XB.at[place_E].get(mode="fill", fill_value=0)
        rest_B = flat_XB.sum(0) - edge_EB.sum(0)
        rest_abs_B = jnp.abs(flat_XB).sum(0) - jnp.abs(edge_EB).sum(0)
        return _Read(edge_EB, error_LPB, embed_PB, rest_B, rest_abs_B)

    by_row: Any = _Read(*cast(Any, (_last(2), _last(3), _last(2), _ROW, _ROW)))
    split = jax.shard_map(
        local,
        mesh=mesh,
        in_specs=(PartitionSpec(), _ROW, PartitionSpec()),
        out_specs=by_row,
        check_vma=False,
    )
    return split(held, rows, place_E)


@partial(jax.jit, static_argnames=_STATIC)
def _visit_chunk(
    held: _Held,
    rows: _Rows,
    visit_B: Array,
    is_node_LP: Array,
    *,
    cfg: LMConfig,
    P: int,
    n_blocks: int,
    width: int,
    mesh: Mesh,
) -> Array:
    """Influence [devices, Z, P, W] that a chunk passes on to every slot."""

    def local(held: _Held, rows: _Rows, visit_B: Array, is_node_LP: Array) -> Array:
        edges = _pull(held, rows, cfg=cfg, P=P, n_blocks=n_blocks, width=width)
        edge_ZPWB, error_LPB, embed_PB = map(jnp.abs, edges)
        total_B = edge_ZPWB.sum((0, 1, 2)) + embed_PB.sum(0)
        total_B += jnp.einsum("LPB,LP->B", error_LPB, is_node_LP)
        share_B = visit_B / jnp.where(total_B > 0, total_B, 1)
        return jnp.einsum("ZPWB,B->ZPW", edge_ZPWB, share_B)[None]

    split = jax.shard_map(
        local,
        mesh=mesh,
        in_specs=(PartitionSpec(), _ROW, _ROW, PartitionSpec()),
        out_specs=_ROW,
        check_vma=False,
    )
    return split(held, rows, visit_B, is_node_LP)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Puller:
    """A prompt ready for its rows to be computed."""

    held: _Held
    bank: Bank
    cfg: LMConfig
    plan: Plan
    mesh: Mesh
    n_tokens: int  # of the prompt, without the padding of the recording

    @property
    def n_features(self) -> int:
        """A."""
        return len(self.bank.pos_A)

    def chunks(self, targets: RowTargets) -> list[Chunk]:
        """Targets cut into chunks."""
        return self.plan.chunks(targets.layer_R, targets.pos_R + 1)


def make_puller(
    params: LMParams,
    recording: Recording,
    active: Active,
    error_LTD: np.ndarray,
    *,
    cfg: LMConfig,
    plan: Plan,
    n_tokens: int,
    mesh: Mesh,
    bank: Bank | None = None,
    packed: bool = True,
) -> Puller:
    """Put what all rows of a prompt need on the devices, once.

    Args:
      params: model weights (attention values, outputs and norms are used).
      recording: the clean pass.
      active: source features.
      error_LTD: error vectors.
      cfg: model shape.
      plan: bands and chunk capacities.
      n_tokens: length of the prompt; the recording may be longer.
      mesh: devices to split chunks over, one axis `rows`.
      bank: packed `writers` of `active`, if already at hand.
      packed: hold the source vectors written out; else gather them as they are used.
    """
    T = error_LTD.shape[1]
    bank = bank or pack(writers(active), T)
    held = _Held(
        stream=make_stream(params, recording, cfg=cfg, pull=True, skip=active.skip),
        bank=bank.on_device(packed=packed),
        error_LTD=jnp.asarray(error_LTD),
        embed_TD=recording.embed_TD,
    )
    return Puller(
        held=on_mesh(held, mesh),
        bank=bank,
        cfg=cfg,
        plan=plan,
        mesh=mesh,
        n_tokens=n_tokens,
    )


def _padded_rows(targets: RowTargets, chunk: Chunk) -> _Rows:
    part = targets.take(chunk.index_B)
    pad = chunk.capacity - len(chunk.index_B)
    return _Rows(
        jnp.asarray(np.pad(part.layer_R, (0, pad), constant_values=-1)),
        jnp.asarray(np.pad(part.pos_R, (0, pad))),
        jnp.asarray(np.pad(part.read_RD, ((0, pad), (0, 0)))),
    )


def edge_rows(
    puller: Puller,
    targets: RowTargets,
    out_RN: np.ndarray,
    *,
    pool_A: np.ndarray | None = None,
    rest_R: np.ndarray | None = None,
    rest_abs_R: np.ndarray | None = None,
    on_rows: Callable[[int], None] = lambda n: None,
    stop: Callable[[], bool] = lambda: False,
) -> np.ndarray:
    """Write the direct effects of the sources on every target into `out_RN`.

    Args:
      puller: from `make_puller`.
      targets: R directions.
      out_RN: zeroed host array [R, N], filled in place; its features are the pooled.
      pool_A: features whose edges are kept, ascending; None for all.
      rest_R: filled with the sum of the other features' edges, if given.
      rest_abs_R: the same without sign.
      on_rows: called with the number of rows just finished.
      stop: asked before each chunk; once true, no other is started.

    Returns:
      Which targets were reached, bool [R].
    """
    reached_R = np.zeros(len(targets.pos_R), bool)
    all_kept = pool_A is None
    pool = np.arange(puller.n_features) if pool_A is None else pool_A
    layout = Layout(
        n_features=len(pool), n_layers=puller.cfg.n_layers, n_tokens=puller.n_tokens
    )
    near, device_places = {}, {}
    for P in puller.plan.band_end:
        place = puller.bank.place(pool, 0, P)
        near[P] = np.flatnonzero(place >= 0), place[place >= 0]
        device_places[P] = None
        if not all_kept:
            # One size for all bands and prompts of a bucket.
            end = puller.bank.n_blocks * P * puller.bank.width
            place = np.where(place >= 0, place, end)
            padding = (0, bucket(len(pool)) - len(pool))
            place = np.pad(place, padding, constant_values=end)
            device_places[P] = jnp.asarray(place.astype(np.int32))

    def start(chunk: Chunk) -> _Read:
        return _pull_chunk(
            puller.held,
            _padded_rows(targets, chunk),
            device_places[chunk.n_positions],
            cfg=puller.cfg,
            P=chunk.n_positions,
            n_blocks=puller.bank.n_blocks,
            width=puller.bank.width,
            mesh=puller.mesh,
        )

    for chunk, read in pipelined(puller.chunks(targets), start, stop):
        columns, place = near[chunk.n_positions]
        place = place if all_kept else columns
        _write_rows(chunk, read, columns, place, layout, out_RN)
        n = len(chunk.index_B)
        if rest_R is not None:
            rest_R[chunk.index_B] = np.asarray(read.rest_B)[:n]
        if rest_abs_R is not None:
            rest_abs_R[chunk.index_B] = np.asarray(read.rest_abs_B)[:n]
        reached_R[chunk.index_B] = True
        on_rows(n)
    return reached_R


_Result = TypeVar("_Result")


def pipelined(
    chunks: list[Chunk],
    start: Callable[[Chunk], _Result],
    stop: Callable[[], bool] = lambda: False,
) -> Iterator[tuple[Chunk, _Result]]:
    """Results one chunk late: the device works on while the host unpacks."""
    pending = None
    for chunk in chunks:
        if stop():
            break
        started = chunk, start(chunk)
        if pending is not None:
            yield pending
        pending = started
    if pending is not None:
        yield pending


def _write_rows(
    chunk: Chunk,
    read: _Read,
    columns: np.ndarray,
    place: np.ndarray,
    layout: Layout,
    out_RN: np.ndarray,
) -> None:
    """Put one chunk's edges where they belong: rows by target, columns by source."""
    edge_EB, error_LPB, embed_PB = map(np.asarray, read[:3])
    n, L, P = len(chunk.index_B), len(error_LPB), chunk.n_positions
    P = min(P, layout.n_tokens)
    row_B1 = chunk.index_B[:, None]
    out_RN[row_B1, columns[None, :]] = edge_EB[place, :n].T
    error = layout.at("error", np.arange(L)[:, None], np.arange(P)).ravel()
    out_RN[row_B1, error[None, :]] = error_LPB[:, :P, :n].reshape(L * P, n).T
    out_RN[row_B1, layout.at("embed", np.arange(P))] = embed_PB[:P, :n].T


def visits(
    puller: Puller,
    targets: RowTargets,
    visit_R: np.ndarray,
    is_node_LT: np.ndarray,
    *,
    on_rows: Callable[[int], None] = lambda n: None,
    stop: Callable[[], bool] = lambda: False,
) -> np.ndarray:
    """Influence that targets pass on to every feature, without holding their rows, [A].

    Args:
      puller: from `make_puller`.
      targets: R directions.
      visit_R: influence that has arrived at each.
      is_node_LT: which errors count as inputs.
      on_rows: called with the number of targets just finished.
      stop: asked before each chunk; once true, the others pass nothing on.
    """
    bank, total_A = puller.bank, np.zeros(len(puller.bank.pos_A))
    dtype = targets.read_RD.dtype
    every = np.arange(len(total_A))
    is_node_LT = np.pad(
        is_node_LT.astype(dtype),
        ((0, 0), (0, puller.held.embed_TD.shape[0] - is_node_LT.shape[1])),
    )

    def start(chunk: Chunk) -> Array:
        pad = chunk.capacity - len(chunk.index_B)
        visit_B = np.pad(visit_R[chunk.index_B], (0, pad)).astype(dtype)
        return _visit_chunk(
            puller.held,
            _padded_rows(targets, chunk),
            jnp.asarray(visit_B),
            jnp.asarray(is_node_LT[:, : chunk.n_positions]),
            cfg=puller.cfg,
            P=chunk.n_positions,
            n_blocks=bank.n_blocks,
            width=bank.width,
            mesh=puller.mesh,
        )

    for chunk, passed in pipelined(puller.chunks(targets), start, stop):
        place = bank.place(every, 0, chunk.n_positions)
        flat = np.asarray(passed).sum(0).ravel()
        total_A += np.where(place >= 0, flat[place], 0)
        on_rows(len(chunk.index_B))
    return total_A


def pull_flops(
    cfg: LMConfig, bank: Bank, plan: Plan, targets: RowTargets, *, skip: bool
) -> float:
    """Floating-point operations of all rows, padding included."""
    total = 0.0
    for chunk in plan.chunks(targets.layer_R, targets.pos_R + 1):
        read = int(targets.layer_R[chunk.index_B].max())
        total += chunk_flops(
            cfg,
            bank,
            chunk.n_positions,
            chunk.capacity,
            range(min(read, cfg.n_layers - 1) + 1),
            range(read),  # what is written at the layer it reads comes after it
            skip=skip,
        )
    return total
