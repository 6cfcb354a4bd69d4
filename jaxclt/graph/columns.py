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

from jaxclt.graph.bank import Bank, DeviceBank, RowTargets, add_dots
from jaxclt.graph.layout import Layout
from jaxclt.graph.plan import Chunk, Plan, chunk_flops
from jaxclt.graph.prompt import Recorded
from jaxclt.graph.rows import pipelined
from jaxclt.graph.stream import Stream, make_stream, on_mesh
from jaxclt.graph.travel import Writes, push
from jaxclt.precision import jit

__all__ = ["Columns", "edge_columns", "push_flops"]


@dataclasses.dataclass(frozen=True)
class Columns:
    """All sources of a prompt, in the order of the columns.

    Site 0 is the embedding, site m + 1 the MLP output of layer m.
    """

    p: Recorded

    @cached_property
    def layout(self) -> Layout:
        """Which source is which column."""
        return Layout(
            n_features=len(self.p.active.pos_A),
            n_layers=self.p.cfg.n_layers,
            n_tokens=self.p.n_tokens,
        )

    @cached_property
    def _places(self) -> np.ndarray:
        return self.layout.places(self.p.active.layer_A, self.p.active.pos_A)

    @property
    def sites(self) -> np.ndarray:
        """First site of every source."""
        return self._places[0] + 1

    @property
    def positions(self) -> np.ndarray:
        """Position of every source."""
        return self._places[1]

    def writes(self, index_B: np.ndarray, capacity: int, start: int) -> Writes:
        """What a chunk of sources writes, in a window of positions.

        Args:
          index_B: columns.
          capacity: vectors of the result; those that are over write nothing.
          start: first position of the window.
        """
        a, n_sites = self.p.active, self.p.cfg.n_layers + 1
        layer_B, pos_B = self._places[:, index_B]
        is_feature_B = index_B < self.layout.nodes["feature"].stop
        error_LTD = self.p.error_LTD
        write_MBD = np.zeros((n_sites, capacity, error_LTD.shape[2]), error_LTD.dtype)
        for layer in np.unique(layer_B[is_feature_B]):
            place = np.flatnonzero(is_feature_B & (layer_B == layer))
            slots = index_B[place]
            rows_nMD = a.decoder_rows(slots, layer) * a.value_A[slots, None, None]
            end = layer + 1 + rows_nMD.shape[1]
            write_MBD[layer + 1 : end, place] = rows_nMD.swapaxes(0, 1)
        place = np.flatnonzero(~is_feature_B & (layer_B >= 0))
        layer, pos = layer_B[place], pos_B[place]
        write_MBD[layer + 1, place] = error_LTD[layer, pos]
        place = np.flatnonzero(layer_B < 0)
        write_MBD[0, place] = np.asarray(self.p.recording.embed_TD)[pos_B[place]]
        padded_B = np.full(capacity, start)
        padded_B[: len(pos_B)] = pos_B
        first = layer_B.min(initial=n_sites - 2) + 1
        return Writes(write_MBD, *map(np.int32, (padded_B, first, start)))


class _Held(NamedTuple):
    stream: Stream
    bank: DeviceBank


@partial(jit, static_argnames=("P", "mesh"))
def _push_chunk(held: _Held, writes: Writes, *, P: int, mesh: Mesh) -> Array:
    """Edges of a chunk of sources on the targets in all slots, [Z·P·W, B]."""

    def local(held: _Held, writes: Writes) -> Array:
        (stream, bank), start = held, writes.start
        B = writes.write_MBD.shape[1]
        L = jnp.asarray(stream.cfg.n_layers, jnp.int32)

        def visit(
            layer: Array, _: Array, __: Array, mid_PBD: Array, edge_ZPWB: Array
        ) -> Array:
            return add_dots(bank, layer, mid_PBD, edge_ZPWB, start=start)

        edge_ZPWB = bank.no_edges(P, B, writes.write_MBD.dtype)
        x_PBD, edge_ZPWB = push(stream, writes, visit, edge_ZPWB, n_positions=P, end=L)
        return add_dots(bank, L, x_PBD, edge_ZPWB, start=start).reshape(-1, B)

    one, last = PartitionSpec(), PartitionSpec(None, "rows")
    by_source = Writes(last, PartitionSpec("rows"), one, one)
    specs = {"in_specs": (one, by_source), "out_specs": last}
    return jax.shard_map(local, mesh=mesh, check_vma=False, **specs)(held, writes)


def edge_columns(
    columns: Columns,
    targets: RowTargets,
    bank: Bank,
    out_RN: np.ndarray,
    *,
    plan: Plan,
    mesh: Mesh,
    on_columns: Callable[[int], None] = lambda n: None,
    stop: Callable[[], bool] = lambda: False,
) -> bool:
    """Write the direct effects of all sources on all targets into `out_RN`.

    Args:
      columns: all sources of a prompt.
      targets: R directions.
      bank: packed `readers` of the targets.
      out_RN: zeroed host array [R, N], filled in place.
      plan: bands and chunk capacities, of reach T - position.
      mesh: devices to split chunks over, one axis `rows`.
      on_columns: called with the number of columns just finished.
      stop: asked before each chunk; once true, no other is started.

    Returns:
      Whether all columns were reached.
    """
    # Padding after the prompt's end is not pushed to: no target is there.
    p, T = columns.p, columns.p.n_tokens
    held = _Held(make_stream(p, pull=False), bank.on_device(packed=True))
    held = on_mesh(held, mesh)
    every = np.arange(len(targets.pos_R))
    near = {}
    for P in plan.band_end:
        place = bank.place(every, max(T - P, 0), P)
        near[P] = np.flatnonzero(place >= 0), place[place >= 0]

    def start(chunk: Chunk) -> Array:
        index_B, P, capacity = chunk
        # Nothing flows back in time: a window up to the end holds all that it reaches.
        writes = columns.writes(index_B, capacity, max(T - P, 0))
        return _push_chunk(held, writes, P=P, mesh=mesh)

    left = columns.layout.n_columns
    for chunk, pushed in pipelined(_chunks(columns, plan), start, stop):
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


def _chunks(columns: Columns, plan: Plan) -> list[Chunk]:
    levels = columns.p.cfg.n_layers - columns.sites
    return plan.chunks(levels, columns.p.n_tokens - columns.positions)


def push_flops(columns: Columns, bank: Bank, plan: Plan) -> float:
    """Floating-point operations of all columns, padding included."""
    p, total, L = columns.p, 0.0, columns.p.cfg.n_layers
    for chunk in _chunks(columns, plan):
        first = int(columns.sites[chunk.index_B].min())
        layers, sites = range(first, L), range(first, L + 1)
        total += chunk_flops(
            p.cfg, bank, chunk, layers, sites, skip=p.active.skip is not None
        )
    return total
