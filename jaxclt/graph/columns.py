"""Edge columns: push sources forward through the frozen stream, dot them with targets.

The mirror image of `jaxclt.graph.rows`: a source's vectors are added at every MLP
output it writes, the stream moves them up through frozen attention, and each target
reads its layer once. Same numbers, another order of summation. Worth it when all rows
are wanted, see `jaxclt.graph.plan`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from functools import cached_property, partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.sharding import Mesh, PartitionSpec

from jaxclt.clt.active import Active
from jaxclt.graph.bank import Bank, DeviceBank, RowTargets, add_dots
from jaxclt.graph.layout import Layout
from jaxclt.graph.plan import Chunk, Plan, chunk_flops
from jaxclt.graph.rows import pipelined
from jaxclt.graph.stream import Stream, attend, make_stream, on_mesh
from jaxclt.lm.config import LMConfig
from jaxclt.types import LMParams, Recording

__all__ = ["Columns", "edge_columns", "push_flops"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Columns:
    """All sources of a prompt, in the order of the columns.

    Site 0 is the embedding, site m + 1 the MLP output of layer m.
    """

    active: Active
    error_LTD: np.ndarray
    embed_TD: np.ndarray

    @cached_property
    def layout(self) -> Layout:
        """Which source is which column."""
        L, T, _ = self.error_LTD.shape
        return Layout(n_features=len(self.active.pos_A), n_layers=L, n_tokens=T)

    @cached_property
    def _places(self) -> np.ndarray:
        return self.layout.places(self.active.layer_A, self.active.pos_A)

    @property
    def sites(self) -> np.ndarray:
        """First site of every source."""
        return self._places[0] + 1

    @property
    def positions(self) -> np.ndarray:
        """Position of every source."""
        return self._places[1]

    def write(self, index_B: np.ndarray, capacity: int) -> np.ndarray:
        """What a chunk of sources writes at every site, [L + 1, capacity, D]."""
        L, _, D = self.error_LTD.shape
        a, nodes = self.active, self.layout.nodes
        layer_B, pos_B = self._places[:, index_B]
        is_feature_B = index_B < nodes["feature"].stop
        write_MBD = np.zeros((L + 1, capacity, D), self.error_LTD.dtype)
        for layer in range(L):
            place = np.flatnonzero(is_feature_B & (layer_B == layer))
            if len(place) == 0:
                continue
            slots = index_B[place]
            rows_nMD = a.decoder_rows(slots, layer) * a.value_A[slots, None, None]
            end = layer + 1 + rows_nMD.shape[1]
            write_MBD[layer + 1 : end, place] = rows_nMD.swapaxes(0, 1)
        place = np.flatnonzero(~is_feature_B & (layer_B >= 0))
        layer, pos = layer_B[place], pos_B[place]
        write_MBD[layer + 1, place] = self.error_LTD[layer, pos]
        place = np.flatnonzero(layer_B < 0)
        write_MBD[0, place] = self.embed_TD[pos_B[place]]
        return write_MBD


class _Held(NamedTuple):
    stream: Stream
    bank: DeviceBank


_STATIC = ("cfg", "P", "n_blocks", "width", "mesh")


@partial(jax.jit, static_argnames=_STATIC)
def _push_chunk(
    held: _Held,
    first: Array,
    start: Array,
    pos_B: Array,
    write_MBD: Array,
    *,
    cfg: LMConfig,
    P: int,
    n_blocks: int,
    width: int,
    mesh: Mesh,
) -> Array:
    """Edges of a chunk of sources on the targets in all slots, [Z·P·W, B]."""

    def local(
        held: _Held,
        first: Array,
        start: Array,
        pos_B: Array,
        write_MBD: Array,
    ) -> Array:
        stream, bank = held
        L, (_, B, D) = cfg.n_layers, write_MBD.shape
        row_B = jnp.arange(B)
        near_B = pos_B - start

        def level(layer: Array, state: tuple[Array, Array]) -> tuple[Array, Array]:
            x_PBD, edge_ZPWB = state
            with jax.named_scope("push_attention"):
                moved = attend(stream, layer, x_PBD, cfg=cfg, start=start, pull=False)
            behind_PBD = x_PBD + moved
            mid_PBD = x_PBD if cfg.parallel else behind_PBD
            edge_ZPWB = add_dots(bank, layer, mid_PBD, edge_ZPWB, start=start)
            x_PBD = behind_PBD
            if stream.skip is not None:
                scale_LT, W_skip_LDD = stream.skip
                scale_P = jax.lax.dynamic_slice(scale_LT, (layer, start), (1, P))[0]
                read_PBD = mid_PBD * scale_P[:, None, None]
                x_PBD = x_PBD + jnp.einsum("PBD,DE->PBE", read_PBD, W_skip_LDD[layer])
            x_PBD = x_PBD.at[near_B, row_B].add(write_MBD[layer + 1])
            return x_PBD, edge_ZPWB

        x_PBD = jnp.zeros((P, B, D), write_MBD.dtype)
        x_PBD = x_PBD.at[near_B, row_B].add(write_MBD[first])
        edge_ZPWB = jnp.zeros((n_blocks, P, width, B), write_MBD.dtype)
        x_PBD, edge_ZPWB = jax.lax.fori_loop(first, L, level, (x_PBD, edge_ZPWB))
        end = jnp.asarray(L, jnp.int32)
        edge_ZPWB = add_dots(bank, end, x_PBD, edge_ZPWB, start=start)
        return edge_ZPWB.reshape(-1, B)

    one, rows = PartitionSpec(), PartitionSpec("rows")
    split = jax.shard_map(
        local,
        mesh=mesh,
        in_specs=(one, one, one, rows, PartitionSpec(None, "rows")),
        out_specs=PartitionSpec(None, "rows"),
        check_vma=False,
    )
    return split(held, first, start, pos_B, write_MBD)


def edge_columns(
    params: LMParams,
    recording: Recording,
    columns: Columns,
    targets: RowTargets,
    bank: Bank,
    out_RN: np.ndarray,
    *,
    cfg: LMConfig,
    plan: Plan,
    mesh: Mesh,
    skip: tuple[Array, Array] | None = None,
    on_columns: Callable[[int], None] = lambda n: None,
    stop: Callable[[], bool] = lambda: False,
) -> bool:
    """Write the direct effects of all sources on all targets into `out_RN`.

    Args:
      params: model weights.
      recording: the clean pass, with its patterns; may be padded.
      columns: all sources; errors and embeddings of the prompt's T tokens.
      targets: R directions.
      bank: packed `readers` of the targets.
      out_RN: zeroed host array [R, N], filled in place.
      cfg: model shape.
      plan: bands and chunk capacities, of reach T - position.
      mesh: devices to split chunks over, one axis `rows`.
      skip: linear path of the dictionary.
      on_columns: called with the number of columns just finished.
      stop: asked before each chunk; once true, no other is started.

    Returns:
      Whether all columns were reached.
    """
    stream = make_stream(params, recording, cfg=cfg, pull=False, skip=skip)
    held = on_mesh(_Held(stream, bank.on_device(packed=True)), mesh)
    T = len(columns.embed_TD)
    site_N, pos_N = columns.sites, columns.positions
    every = np.arange(len(targets.pos_R))
    near = {}
    for P in plan.band_end:
        place = bank.place(every, max(T - P, 0), P)
        near[P] = np.flatnonzero(place >= 0), place[place >= 0]

    def start(chunk: Chunk) -> Array:
        index_B, P = chunk.index_B, chunk.n_positions
        pad = chunk.capacity - len(index_B)
        return _push_chunk(
            held,
            jnp.asarray(site_N[index_B].min(), jnp.int32),
            jnp.asarray(max(T - P, 0), jnp.int32),
            jnp.asarray(np.pad(pos_N[index_B], (0, pad), mode="edge"), jnp.int32),
            jnp.asarray(columns.write(index_B, chunk.capacity)),
            cfg=cfg,
            P=P,
            n_blocks=bank.n_blocks,
            width=bank.width,
            mesh=mesh,
        )

    chunks = _chunks(columns, cfg, plan)
    left = len(site_N)
    for chunk, pushed in pipelined(chunks, start, stop):
        rows, place = near[chunk.n_positions]
        column_B = chunk.index_B
        edge_EB = np.asarray(pushed)[place, : len(column_B)]
        # Within a layer the columns of a band are neighbours: copied run by run.
        order = np.argsort(column_B)
        sorted_B = column_B[order]
        breaks = np.flatnonzero(np.diff(sorted_B) != 1) + 1
        for run in np.split(order, breaks):
            first = column_B[run[0]]
            block_EB = edge_EB[:, run[0] : run[0] + len(run)]
            if (np.diff(run) != 1).any():
                block_EB = edge_EB[:, run]
            out_RN[rows, first : first + len(run)] = block_EB
        left -= len(column_B)
        on_columns(len(column_B))
    return left == 0


def _chunks(columns: Columns, cfg: LMConfig, plan: Plan) -> list[Chunk]:
    levels = cfg.n_layers - columns.sites
    return plan.chunks(levels, len(columns.embed_TD) - columns.positions)


def push_flops(
    cfg: LMConfig, bank: Bank, plan: Plan, columns: Columns, *, skip: bool
) -> float:
    """Floating-point operations of all columns, padding included."""
    total, L, sites = 0.0, cfg.n_layers, columns.sites
    for chunk in _chunks(columns, cfg, plan):
        first = int(sites[chunk.index_B].min())
        total += chunk_flops(
            cfg,
            bank,
            chunk.n_positions,
            chunk.capacity,
            range(first, L),
            range(first, L + 1),
            skip=skip,
        )
    return total
