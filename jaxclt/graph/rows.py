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
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from typing import Any, NamedTuple, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.sharding import Mesh, PartitionSpec

from jaxclt.graph.bank import Bank, DeviceBank, RowTargets, add_dots, writers
from jaxclt.graph.layout import Layout
from jaxclt.graph.packing import pack
from jaxclt.graph.plan import Chunk, Plan, chunk_flops
from jaxclt.graph.prompt import Recorded
from jaxclt.graph.stream import make_stream, on_mesh
from jaxclt.graph.travel import Frozen, Reads, Way, pull
from jaxclt.precision import jit
from jaxclt.shapes import bucket

__all__ = ["Edges", "Puller", "RowTargets", "Shared", "edge_rows", "make_puller"]
__all__ += ["padded_reads", "pipelined", "pull_flops", "visits", "write_rows"]


_Dots = tuple[Array, Array]  # the first two of `Edges`


class Shared(NamedTuple):
    """What all that is pulled down on a prompt shares, on every device."""

    way: Way
    bank: DeviceBank
    error_LTD: Array
    embed_TD: Array

    def no_dots(self, P: int, X: int) -> _Dots:
        """Of X vectors at P positions, none yet."""
        dtype = self.error_LTD.dtype
        error_LPX = jnp.zeros((self.way.cfg.n_layers, P, X), dtype)
        return self.bank.no_edges(P, X, dtype), error_LPX

    def add_dots(
        self, layer: Array, g_PXD: Array, dots: _Dots, nothing: Array | bool = False
    ) -> _Dots:
        """Add dot products of cotangents of an MLP output with all that writes it."""
        edge_ZPWX, error_LPX = dots
        edge_ZPWX = add_dots(
            self.bank, layer, g_PXD, edge_ZPWX, start=0, nothing=nothing
        )
        error_PD = self.error_LTD[layer, : len(g_PXD)]
        error_PX = jnp.einsum("PXD,PD->PX", g_PXD, error_PD)
        return edge_ZPWX, error_LPX.at[layer].set(error_PX)

    def edges(self, g_PXD: Array, dots: _Dots) -> Edges:
        """All edges, from the cotangents of the embeddings and the dots on the way."""
        embed_PX = jnp.einsum("PXD,PD->PX", g_PXD, self.embed_TD[: len(g_PXD)])
        return Edges(*dots, embed_PX)


class Edges(NamedTuple):
    """Edges of a chunk by slot: features [Z, P, W, X], errors and embeddings.

    X are the rows, or several states of each, see `jaxclt.graph.travel.Way`.
    """

    edge_ZPWX: Array
    error_LPX: Array
    embed_PX: Array


def _pull(held: Shared, reads: Reads, *, P: int) -> Edges:
    none = held.no_dots(P, held.way.n_states * len(reads.pos_B))
    return held.edges(*pull(held.way, reads, held.add_dots, none, n_positions=P))


class _Read(NamedTuple):
    """A chunk's edges as they leave the device."""

    edge_EX: Array  # of the pool, or of all slots
    error_LPX: Array
    embed_PX: Array
    rest_X: Array  # features outside the pool, summed
    rest_abs_X: Array


# Every device has its share of the rows; all else is whole on each, so that none waits
# for another.
_ROW, _WHOLE = PartitionSpec("rows"), PartitionSpec()
_READS = Reads(_ROW, _ROW, PartitionSpec(None, "rows"))


def _split(local: Callable[..., Any], mesh: Mesh | None, **specs: Any) -> Any:
    """What each device of a mesh does with its rows; None: they are not split."""
    if mesh is None:
        return local
    return jax.shard_map(local, mesh=mesh, check_vma=False, **specs)


@partial(jit, static_argnames=("P", "mesh"))
def _pull_chunk(
    held: Shared,
    reads: Reads,
    place_E: Array | None,
    *,
    P: int,
    mesh: Mesh | None,
) -> _Read:
    def local(held: Shared, reads: Reads, place_E: Array | None) -> _Read:
        edges = _pull(held, reads, P=P)
        edge_ZPWX, error_LPX, embed_PX = edges
        flat_YX = edge_ZPWX.reshape(-1, edge_ZPWX.shape[-1])
        rest_X = rest_abs_X = jnp.zeros_like(embed_PX[0])
        if place_E is None:
            return _Read(flat_YX, error_LPX, embed_PX, rest_X, rest_abs_X)
        # Empty places point past the end.
        edge_EX = flat_YX.at[place_E].get(mode="fill", fill_value=0)
        # Only the pool's columns leave the device: of the others, two numbers a row.
        rest_X = flat_YX.sum(0) - edge_EX.sum(0)
        rest_abs_X = jnp.abs(flat_YX).sum(0) - jnp.abs(edge_EX).sum(0)
        return _Read(edge_EX, error_LPX, embed_PX, rest_X, rest_abs_X)

    by_row: Any = [PartitionSpec(*(None,) * n, "rows") for n in (1, 2, 1, 0, 0)]
    specs = {"in_specs": (_WHOLE, _READS, _WHOLE), "out_specs": _Read(*by_row)}
    return _split(local, mesh, **specs)(held, reads, place_E)


@partial(jit, static_argnames=("P", "mesh"))
def _visit_chunk(
    held: Shared,
    reads: Reads,
    visit_B: Array,
    is_node_LP: Array,
    *,
    P: int,
    mesh: Mesh | None,
) -> Array:
    """Influence [devices, Z, P, W] that a chunk passes on to every slot."""

    def local(held: Shared, reads: Reads, visit_B: Array, is_node_LP: Array) -> Array:
        edges = _pull(held, reads, P=P)
        edge_ZPWB, error_LPB, embed_PB = map(jnp.abs, edges)
        total_B = edge_ZPWB.sum((0, 1, 2)) + embed_PB.sum(0)
        total_B += jnp.einsum("LPB,LP->B", error_LPB, is_node_LP)
        share_B = visit_B / jnp.where(total_B > 0, total_B, 1)
        return jnp.einsum("ZPWB,B->ZPW", edge_ZPWB, share_B)[None]

    specs = {"in_specs": (_WHOLE, _READS, _ROW, _WHOLE), "out_specs": _ROW}
    return _split(local, mesh, **specs)(held, reads, visit_B, is_node_LP)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Puller:
    """A prompt ready for its rows to be computed."""

    held: Shared
    bank: Bank
    plan: Plan
    mesh: Mesh | None
    n_tokens: int  # of the prompt, without the padding of the recording

    @property
    def n_devices(self) -> int:
        """How many devices share the rows."""
        return 1 if self.mesh is None else self.mesh.size

    @property
    def n_features(self) -> int:
        """A."""
        return len(self.bank.pos_A)

    def chunks(self, targets: RowTargets) -> list[Chunk]:
        """Targets cut into chunks."""
        return self.plan.chunks(targets.layer_R, targets.pos_R + 1)


def make_puller(
    p: Recorded,
    *,
    plan: Plan,
    mesh: Mesh | None,
    bank: Bank | None = None,
    packed: bool = True,
    way: Way | None = None,
) -> Puller:
    """Put what all rows of a prompt need on the devices, once.

    Args:
      p: the prompt.
      plan: bands and chunk capacities.
      mesh: devices to split chunks over, one axis `rows`; None leaves everything where
        it is, for a way that needs all of a model that may be split over devices.
      bank: packed `writers` of its active features, if already at hand.
      packed: hold the source vectors written out; else gather them as they are used.
      way: down, by default past the frozen stream.
    """
    bank = bank or pack(writers(p.active), p.error_LTD.shape[1])
    held = Shared(
        way=way or Frozen(make_stream(p, pull=True)),
        bank=bank.on_device(packed=packed),
        error_LTD=jnp.asarray(p.error_LTD),
        embed_TD=p.recording.embed_TD,
    )
    return Puller(
        held=held if mesh is None else on_mesh(held, mesh),
        bank=bank,
        plan=plan,
        mesh=mesh,
        n_tokens=p.n_tokens,
    )


def padded_reads(targets: RowTargets, chunk: Chunk) -> Reads:
    """A chunk's targets, and some of layer -1, which read nothing."""
    part = targets.take(chunk.index_B)
    pad = chunk.capacity - len(chunk.index_B)
    return Reads(
        jnp.asarray(np.pad(part.layer_R, (0, pad), constant_values=-1)),
        jnp.asarray(np.pad(part.pos_R, (0, pad))),
        jnp.asarray(np.pad(part.read_SRD, ((0, 0), (0, pad), (0, 0)))),
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
        With several states of the puller, [Q, R, N].
      pool_A: features whose edges are kept, ascending; None for all.
      rest_R: filled with the sum of the other features' edges, if given.
      rest_abs_R: the same without sign.
      on_rows: called with the number of rows just finished.
      stop: asked before each chunk; once true, no other is started.

    Returns:
      Which targets were reached, bool [R].
    """
    reached_R = np.zeros(len(targets.pos_R), bool)
    pool = np.arange(puller.n_features) if pool_A is None else pool_A
    n_layers = puller.held.way.cfg.n_layers
    layout = Layout(n_features=len(pool), n_layers=n_layers, n_tokens=puller.n_tokens)
    near: dict[int, tuple[np.ndarray, np.ndarray]] = {}
    device_places: dict[int, Array | None] = {}
    for P in puller.plan.band_end:
        place = puller.bank.place(pool, 0, P)
        columns = np.flatnonzero(place >= 0)
        near[P] = columns, place[columns] if pool_A is None else columns
        device_places[P] = None
        if pool_A is not None:
            # One size for all bands and prompts of a bucket.
            end = puller.bank.n_blocks * P * puller.bank.width
            places = np.full(bucket(len(pool)), end, np.int32)
            places[columns] = place[columns]
            device_places[P] = jnp.asarray(places)

    def start(chunk: Chunk) -> _Read:
        P = chunk.n_positions
        reads = padded_reads(targets, chunk)
        return _pull_chunk(puller.held, reads, device_places[P], P=P, mesh=puller.mesh)

    for chunk, read in pipelined(puller.chunks(targets), start, stop):
        n = len(chunk.index_B)
        n_states = puller.held.way.n_states
        parts = [_by_state(x, n_states, puller.n_devices)[..., :n] for x in read[:3]]
        for q, out in enumerate(out_RN.reshape(n_states, *out_RN.shape[-2:])):
            part = [x[q] for x in parts]
            write_rows(chunk, part, *near[chunk.n_positions], layout, out)
        if rest_R is not None:
            rest_R[chunk.index_B] = np.asarray(read.rest_X)[:n]
        if rest_abs_R is not None:
            rest_abs_R[chunk.index_B] = np.asarray(read.rest_abs_X)[:n]
        reached_R[chunk.index_B] = True
        on_rows(n)
    return reached_R


_Part = TypeVar("_Part")
_Result = TypeVar("_Result")


def pipelined(
    parts: Iterable[_Part],
    start: Callable[[_Part], _Result],
    stop: Callable[[], bool] = lambda: False,
) -> Iterator[tuple[_Part, _Result]]:
    """Results one part late: the device works on while the host unpacks."""
    pending = None
    for part in parts:
        if stop():
            break
        started = part, start(part)
        if pending is not None:
            yield pending
        pending = started
    if pending is not None:
        yield pending


def _by_state(edge_X: Array, n_states: int, n_devices: int) -> np.ndarray:
    """Edges of a chunk with the states first: every device has all of its own rows."""
    host = np.asarray(edge_X)
    apart = host.reshape(*host.shape[:-1], n_devices, n_states, -1)
    return np.moveaxis(apart, -2, 0).reshape(n_states, *host.shape[:-1], -1)


def write_rows(
    chunk: Chunk,
    edges: list[np.ndarray],
    columns: np.ndarray,
    place: np.ndarray,
    layout: Layout,
    out_RN: np.ndarray,
) -> None:
    """Put one chunk's edges where they belong: rows by target, columns by source.

    Args:
      chunk: of targets.
      edges: [E, B], [L, P, B] and [P, B], of as many as it has.
      columns: of the features that it reaches.
      place: of these among the E slots.
      layout: of all columns.
      out_RN: filled in place.
    """
    edge_EB, error_LPB, embed_PB = edges
    L, P, B = error_LPB.shape
    P = min(P, layout.n_tokens)
    row_B1 = chunk.index_B[:, None]
    out_RN[row_B1, columns[None, :]] = edge_EB[place].T
    error = layout.at("error", np.arange(L)[:, None], np.arange(P)).ravel()
    out_RN[row_B1, error[None, :]] = error_LPB[:, :P].reshape(L * P, B).T
    out_RN[row_B1, layout.at("embed", np.arange(P))] = embed_PB[:P].T


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
            padded_reads(targets, chunk),
            jnp.asarray(visit_B),
            jnp.asarray(is_node_LT[:, : chunk.n_positions]),
            P=chunk.n_positions,
            mesh=puller.mesh,
        )

    for chunk, passed in pipelined(puller.chunks(targets), start, stop):
        place = bank.place(every, 0, chunk.n_positions)
        flat = np.asarray(passed).sum(0).ravel()
        total_A += np.where(place >= 0, flat[place], 0)
        on_rows(len(chunk.index_B))
    return total_A


def pull_flops(p: Recorded, bank: Bank, plan: Plan, targets: RowTargets) -> float:
    """Floating-point operations of all rows, padding included."""
    total = 0.0
    for chunk in plan.chunks(targets.layer_R, targets.pos_R + 1):
        read = int(targets.layer_R[chunk.index_B].max())
        layers = range(min(read, p.cfg.n_layers - 1) + 1)
        # What is written at the layer that a target reads comes after it.
        total += chunk_flops(
            p.cfg, bank, chunk, layers, range(read), skip=p.active.skip is not None
        )
    return total
