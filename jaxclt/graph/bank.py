"""Vectors packed for matmuls: what many features write or read, by site and position.

An edge is a dot product of something that lives on one prompt position, summed over
sites: of a target's cotangent with what a source writes at each MLP, or of a pushed
source with what a target reads. Packed so that the vectors of one position and site
form a few tiles of equal shape, the edges are plain matmuls, one compiled program
serves all layers, and no (targets x sources x d_model) temporary ever exists.

A vector's owner has one slot of its position; slots are cut into blocks of equal width.
For a full CLT everything below layer m writes m, so slots are ordered by layer and the
owners present at m are the first blocks. Otherwise each layer starts a new block.

Positions differ in how many features they have, the first one often by far. Tiles that
all positions share are as deep as most positions need; what sticks out of them goes to
overflow tiles that belong to one position each.

Axes besides the usual: X shared tiles, Y overflow tiles, W slots of a block, Z blocks,
U rows of the table, B targets or sources treated together, E slots read out.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct
from jax import Array

from jaxclt.clt.active import Active
from jaxclt.precision import jit
from jaxclt.shapes import bucket

__all__ = [
    "Bank",
    "DeviceBank",
    "Items",
    "RowTargets",
    "add_dots",
    "joined_rows",
    "readers",
    "writers",
    "written_at",
]


class Items(NamedTuple):
    """Owners of vectors: each has one position and one or more consecutive sites.

    At its j-th site an owner has the vector ``value * table[row + j]``, the tables
    [U, D] counted through. They are joined where kernels need them and not before.
    """

    site_A: np.ndarray  # the first
    pos_A: np.ndarray
    value_A: np.ndarray
    row_A: np.ndarray
    n_sites: tuple[int, ...]  # of an owner, by its first site
    tables: tuple[np.ndarray, ...]


@dataclasses.dataclass(frozen=True, kw_only=True)
class RowTargets:
    """Directions to explain: where they read, and what.

    ``layer`` < L reads the residual stream where the MLP of that layer reads; L reads
    the stream after the last layer.
    """

    layer_R: np.ndarray
    pos_R: np.ndarray
    read_RD: np.ndarray
    # [R, S - 1, D]: what further states of a way down read, see `travel.Way`.
    more_RSD: np.ndarray = dataclasses.field(default_factory=lambda: np.zeros(0))

    def __post_init__(self) -> None:
        """Nothing, where further reads are left out."""
        if self.more_RSD.ndim != 3:
            object.__setattr__(self, "more_RSD", self.read_RD[:, None][:, :0])

    def take(self, index: np.ndarray) -> RowTargets:
        """Some of the targets, in the given order."""
        return RowTargets(**{name: x[index] for name, x in vars(self).items()})

    def followed_by(self, more: RowTargets) -> RowTargets:
        """These targets, then others."""
        theirs = vars(more)
        joined = {k: np.concatenate([x, theirs[k]]) for k, x in vars(self).items()}
        return RowTargets(**joined)

    @property
    def read_SRD(self) -> np.ndarray:  # noqa: N802  an axis, as in the fields
        """What the first S states read."""
        return np.concatenate([self.read_RD[None], self.more_RSD.swapaxes(0, 1)])


def writers(active: Active) -> Items:
    """What active features write at the MLP outputs; site m is the output of layer m.

    The tables hold every decoder row once, however often its feature fires.
    """
    D = active.write_bias_LD.shape[1]
    n_sites = tuple(rows.shape[1] for rows in active.decoder)
    size = [rows.shape[0] * rows.shape[1] for rows in active.decoder]
    base = np.concatenate([[0], np.cumsum(size)])
    span_A = np.array(n_sites)[active.layer_A]
    return Items(
        site_A=active.layer_A,
        pos_A=active.pos_A,
        value_A=active.value_A,
        row_A=base[active.layer_A] + active.row_A * span_A,
        n_sites=n_sites,
        tables=tuple(rows.reshape(-1, D) for rows in active.decoder),
    )


def readers(rows: RowTargets, n_layers: int) -> Items:
    """What targets read; site l < L is the stream where MLP l reads."""
    return Items(
        site_A=rows.layer_R,
        pos_A=rows.pos_R,
        value_A=np.ones(len(rows.layer_R), rows.read_RD.dtype),
        row_A=np.arange(len(rows.layer_R)),
        n_sites=(1,) * (n_layers + 1),
        tables=(rows.read_RD,),
    )


def written_at(
    active: Active, layer: int, pos: int
) -> Iterator[tuple[slice, np.ndarray]]:
    """Features that write the MLP output of a layer at a position, by their own layer.

    Slots, and what each writes: value x decoder row, [n, D].
    """
    for source in range(layer + 1):
        if layer - source >= active.decoder[source].shape[1]:
            continue
        of = active.of_layer(source)
        lo, hi = of.start + np.searchsorted(active.pos_A[of], [pos, pos + 1])
        row_AD = active.decoder[source][active.row_A[lo:hi], layer - source]
        yield slice(lo, hi), active.value_A[lo:hi, None] * row_AD


class Slots(NamedTuple):
    """Which slots the tiles of every site belong to.

    Site m owns shared tiles ``shared_first_M[m]:shared_first_M[m + 1]``.
    """

    shared_block_X: np.ndarray | Array  # int32
    shared_first_M: np.ndarray | Array  # int32
    overflow_block_Y: np.ndarray | Array  # int32
    overflow_pos_Y: np.ndarray | Array  # int32
    overflow_first_M: np.ndarray | Array  # int32


class Entries(NamedTuple):
    """Tiles as rows of a table times values, both [.., W]; zero in empty slots."""

    row: Any  # int32
    value: Any

    @classmethod
    def empty(cls, *shape: int, dtype: np.dtype) -> Entries:
        """Tiles of empty slots."""
        return cls(np.zeros(shape, np.int32), np.zeros(shape, dtype))

    def put(self, at: tuple, row: np.ndarray, value: np.ndarray) -> None:
        """Fill slots."""
        self.row[at], self.value[at] = row, value


class Tiles(NamedTuple):
    """Vectors [.., W, D] on the device: written out, or gathered when multiplied."""

    entries: Entries | None
    table_UD: Array | None
    written: Array | None

    def cut(self, cut: Callable[[Array], Array]) -> Array:
        """Some of the tiles, by what cuts them out of all."""
        if self.written is not None:
            return cut(self.written)
        assert self.entries is not None
        assert self.table_UD is not None
        row, value = map(cut, self.entries)
        return self.table_UD[row] * value[..., None]


@struct.dataclass
class DeviceBank:
    """A bank as the kernels take it."""

    slots: Slots
    shared: Tiles  # [X, T]
    overflow: Tiles  # [Y]
    n_blocks: int = struct.field(pytree_node=False)
    width: int = struct.field(pytree_node=False)

    def no_edges(self, P: int, n_vectors: int, dtype: jnp.dtype) -> Array:
        """Zeros [Z, P, W, B] to add dot products to."""
        return jnp.zeros((self.n_blocks, P, self.width, n_vectors), dtype)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Bank:
    """Packed owners on the host: X shared and Y overflow tiles of width W."""

    slots: Slots
    tables: tuple[np.ndarray, ...]
    shared: Entries  # [X, T, W]
    overflow: Entries  # [Y, W]
    pos_A: np.ndarray
    slot_A: np.ndarray  # slot of each owner within its position
    n_blocks: int

    @property
    def width(self) -> int:
        """W."""
        return self.shared.row.shape[2]

    def place(self, index: np.ndarray, start: int, P: int) -> np.ndarray:
        """Where owners are in edges [Z, P, W] of positions from `start` on; -1: not."""
        pos = self.pos_A[index] - start
        block, slot = np.divmod(self.slot_A[index], self.width)
        place = (block * P + pos) * self.width + slot
        return np.where((pos >= 0) & (pos < P), place, -1)

    def on_device(self, *, packed: bool) -> DeviceBank:
        """The bank for the kernels: written out (faster), or as indices (smaller)."""
        table_UD = jnp.asarray(_joined(self.tables))

        def tiles(entries: Entries) -> Tiles:
            entries = jax.tree.map(jnp.asarray, entries)
            if packed:
                return Tiles(None, None, _write_out(table_UD, entries))
            return Tiles(entries, table_UD, None)

        slots = jax.tree.map(jnp.asarray, self.slots)
        shared, overflow = tiles(self.shared), tiles(self.overflow)
        return DeviceBank(slots, shared, overflow, self.n_blocks, self.width)


@jit
def _write_out(table_UD: Array, entries: Entries) -> Array:
    return table_UD[entries.row] * entries.value[..., None]


def add_dots(
    bank: DeviceBank,
    site: Array,
    x_PBD: Array,
    edge_ZPWB: Array,
    *,
    start: Array | int,
    nothing: Array | bool = False,
) -> Array:
    """Add the dot products with all vectors of one site.

    Args:
      bank: the vectors.
      site: which site.
      x_PBD: cotangents or streams, positions from `start` on.
      edge_ZPWB: slots, added to.
      start: first position.
      nothing: if true, x is known to be zero.
    """
    slots, P = bank.slots, x_PBD.shape[0]

    def shared(i: Array, edge_ZPWB: Array) -> Array:
        def cut(tiles: Array) -> Array:  # one tile [P, W, ..] from `start` on
            zeros = (jnp.zeros((), i.dtype),) * (tiles.ndim - 2)
            at = (i, jnp.asarray(start, i.dtype), *zeros)
            return jax.lax.dynamic_slice(tiles, at, (1, P, *tiles.shape[2:]))[0]

        tile_PWD = bank.shared.cut(cut)
        with jax.named_scope("edges"):
            edge_PWB = jnp.einsum("PWD,PBD->PWB", tile_PWD, x_PBD)
        return edge_ZPWB.at[slots.shared_block_X[i]].add(edge_PWB)

    def overflow(i: Array, edge_ZPWB: Array) -> Array:
        pos = slots.overflow_pos_Y[i] - start
        inside = (pos >= 0) & (pos < P)
        # A position outside the band reads some other one and adds nothing.
        pos = jnp.clip(pos, 0, P - 1)
        tile_WD = bank.overflow.cut(lambda tiles: tiles[i])
        edge_WB = jnp.einsum("WD,BD->WB", tile_WD, x_PBD[pos])
        return edge_ZPWB.at[slots.overflow_block_Y[i], pos].add(
            edge_WB * inside.astype(edge_WB.dtype)
        )

    def bounds(first_M: Array | np.ndarray) -> tuple[Array, Array]:
        first_M = jnp.asarray(first_M)
        end = first_M[site + 1]
        return jnp.where(nothing, end, first_M[site]), end

    edge_ZPWB = jax.lax.fori_loop(*bounds(slots.shared_first_M), shared, edge_ZPWB)
    return jax.lax.fori_loop(*bounds(slots.overflow_first_M), overflow, edge_ZPWB)


def joined_rows(n_rows: int) -> int:
    """Rows of the table that all tables are joined to, bucketed."""
    return bucket(n_rows, smallest=1024)


def _joined(tables: tuple[np.ndarray, ...]) -> np.ndarray:
    """One table with rows to spare: prompts share programs, and none is empty."""
    size, D = joined_rows(sum(map(len, tables))), tables[0].shape[1]
    table_UD = np.zeros((size, D), tables[0].dtype)
    np.concatenate(tables, out=table_UD[: sum(map(len, tables))])
    return table_UD
