"""Owners of vectors get their slots: how a bank is cut into tiles, and how large it is.

What tiles a bank has depends on how many owners each site and position has alone
(`bank_sizes`), so that a plan knows a bank's bytes before any vector is read; `pack`
then fills them. Axes as in `jaxclt.graph.bank`.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from jaxclt.graph.bank import Bank, Entries, Items, Slots, joined_rows
from jaxclt.shapes import bucket, round_up

__all__ = ["BankSizes", "bank_sizes", "counts", "pack"]


class BankSizes(NamedTuple):
    """How large a bank is, empty slots included."""

    n_shared: int  # X, tiles of all positions
    n_overflow: int  # Y, tiles of one
    n_positions: int  # T
    width: int  # W
    n_blocks: int  # Z
    n_rows: int  # U of the joined table

    @property
    def n_vectors(self) -> int:
        """Places for a vector in all tiles."""
        return (self.n_shared * self.n_positions + self.n_overflow) * self.width

    @property
    def n_slots(self) -> int:
        """Edges of one traveller, as kernels lay them out."""
        return self.n_blocks * self.n_positions * self.width


class _Cut(NamedTuple):
    """Blocks of every site: those that all positions share, those of one position."""

    width: int
    first_M: np.ndarray
    depth_M: np.ndarray  # shared, from the first on
    end_MT: np.ndarray
    over: tuple[np.ndarray, np.ndarray, np.ndarray]  # site, position and block

    @property
    def n_blocks(self) -> int:
        return round_up(max(int(self.end_MT.max(initial=0)), 1), 8)

    # Bucketed, so that prompts share compiled programs; empty tiles cost memory, not
    # time.
    @property
    def n_shared(self) -> int:
        return bucket(int(self.depth_M.sum()))

    @property
    def n_overflow(self) -> int:
        return bucket(len(self.over[0]))


def counts(
    site_A: np.ndarray, pos_A: np.ndarray, n_sites: int, n_positions: int
) -> np.ndarray:
    """How many owners begin at each site and position, [M, T]."""
    count_MT = np.zeros((n_sites, n_positions), np.int64)
    np.add.at(count_MT, (site_A, pos_A), 1)
    return count_MT


def bank_sizes(
    count_MT: np.ndarray, n_sites: tuple[int, ...], n_rows: int
) -> BankSizes:
    """What `pack` will make.

    Args:
      count_MT: from `counts`.
      n_sites: of an owner, by its first site.
      n_rows: of all tables.
    """
    cut = _cut(count_MT, n_sites)
    return BankSizes(
        n_shared=cut.n_shared,
        n_overflow=cut.n_overflow,
        n_positions=count_MT.shape[1],
        width=cut.width,
        n_blocks=cut.n_blocks,
        n_rows=joined_rows(n_rows),
    )


def pack(items: Items, n_positions: int) -> Bank:
    """Give every owner a slot and every site its tiles.

    Args:
      items: owners, ordered by first site, then position.
      n_positions: T.
    """
    M, T = len(items.n_sites), n_positions
    count_MT = counts(items.site_A, items.pos_A, M, T)
    cut = _cut(count_MT, items.n_sites)
    slot_A = _slots(items, count_MT, cut.width)
    width, first_M, depth_M = cut.width, cut.first_M, cut.depth_M
    over_M, over_T, over_block = cut.over
    shared_first_M = np.concatenate([[0], np.cumsum(depth_M)])
    X, Y = cut.n_shared, cut.n_overflow
    dtype = items.value_A.dtype
    shared = Entries.empty(X, T, width, dtype=dtype)
    overflow = Entries.empty(Y, width, dtype=dtype)
    tile_of = np.full((M, T, int(cut.end_MT.max(initial=0)) + 1), -1, np.int64)
    tile_of[over_M, over_T, over_block] = np.arange(len(over_M))
    for site, n_sites in enumerate(items.n_sites):
        mine = np.flatnonzero(items.site_A == site)
        pos, value = items.pos_A[mine], items.value_A[mine]
        block, place = np.divmod(slot_A[mine], width)
        # The same slot at every site: edges of all sites are then summed in place.
        for offset in range(n_sites):
            m = site + offset
            row = items.row_A[mine] + offset
            # Most slots are in tiles of all positions; the others have their own.
            is_shared = block - first_M[m] < depth_M[m]
            here, over = np.flatnonzero(is_shared), np.flatnonzero(~is_shared)
            tile = shared_first_M[m] + block[here] - first_M[m]
            shared.put((tile, pos[here], place[here]), row[here], value[here])
            at = tile_of[m, pos[over], block[over]], place[over]
            overflow.put(at, row[over], value[over])
    blocks = [np.arange(a, a + n) for a, n in zip(first_M, depth_M, strict=True)]
    return Bank(
        slots=Slots(
            shared_block_X=_padded(np.concatenate(blocks), X),
            shared_first_M=shared_first_M.astype(np.int32),
            overflow_block_Y=_padded(over_block, Y),
            overflow_pos_Y=_padded(over_T, Y),
            overflow_first_M=np.searchsorted(over_M, np.arange(M + 1)).astype(np.int32),
        ),
        tables=items.tables,
        shared=shared,
        overflow=overflow,
        pos_A=items.pos_A,
        slot_A=slot_A,
        n_blocks=cut.n_blocks,
    )


def _padded(index: np.ndarray, size: int) -> np.ndarray:
    return np.pad(index, (0, size - len(index))).astype(np.int32)


def _overflow(
    shared_end_M: np.ndarray, end_MT: np.ndarray
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(site, position, block) of every block beyond the shared ones."""
    found = [
        (m, t, block)
        for m, t in np.argwhere(end_MT > shared_end_M[:, None])
        for block in range(shared_end_M[m], end_MT[m, t])
    ]
    columns = np.array(found, np.int64).reshape(-1, 3)
    return columns[:, 0], columns[:, 1], columns[:, 2]


# A block computed for one position alone costs more than its share of a shared tile.
_OVERFLOW_COST = 1.5


def _depth_cost(need_MT: np.ndarray) -> np.ndarray:
    """Cost [M, depth] of sharing `depth` blocks, in blocks times positions."""
    M = len(need_MT)
    T = int(need_MT.any(0).sum())  # padded positions have no features
    depth = np.arange(need_MT.max(initial=0) + 1)
    beyond = np.maximum(need_MT[:, :, None] - depth, 0).sum(1)
    return T * depth[None, :] + _OVERFLOW_COST * beyond.reshape(M, len(depth))


def _shared_depth(need_MT: np.ndarray) -> np.ndarray:
    """Blocks of each site that all positions share, [M]."""
    return np.argmin(_depth_cost(need_MT), axis=1)


def _best_width(slots_MT: np.ndarray, widths: list[int]) -> int:
    """Width with the least padded work; a tile costs some slots' worth in itself."""
    cost = [_depth_cost(-(-slots_MT // w)).min(axis=1).sum() * (w + 8) for w in widths]
    return widths[int(np.argmin(cost))]


def _rank_in_group(group_A: np.ndarray) -> np.ndarray:
    """Place of each element among the earlier elements of its group."""
    order = np.argsort(group_A, kind="stable")
    grouped = group_A[order]
    start = np.flatnonzero(np.r_[True, grouped[1:] != grouped[:-1]][: len(grouped)])
    length = np.diff(np.r_[start, len(grouped)])
    rank = np.empty(len(group_A), np.int64)
    rank[order] = np.arange(len(grouped)) - np.repeat(start, length)
    return rank


def _nested(n_sites: tuple[int, ...]) -> bool:
    """Whether all that begins below a site is there too."""
    M = len(n_sites)
    return M > 1 and all(n == M - site for site, n in enumerate(n_sites))


def _cut(count_MT: np.ndarray, n_sites: tuple[int, ...]) -> _Cut:
    blocks = _prefix_blocks if _nested(n_sites) else _layer_blocks
    width, first_M, end_MT = blocks(count_MT, max(n_sites))
    # The first position often has far more features than the others: tiles that deep
    # would be mostly empty elsewhere.
    depth_M = _shared_depth(end_MT - first_M[:, None])
    over = _overflow(first_M + depth_M, end_MT)
    return _Cut(width, first_M, depth_M, end_MT, over)


def _prefix_blocks(
    count_MT: np.ndarray, span: int
) -> tuple[int, np.ndarray, np.ndarray]:
    """Slots by layer without gaps; site m holds the first blocks."""
    reach_MT = np.cumsum(count_MT, 0)  # slots of everything present at site m
    width = _best_width(reach_MT, [32, 64, 128, 256])
    return width, np.zeros(len(count_MT), np.int64), -(-reach_MT // width)


def _layer_blocks(
    count_MT: np.ndarray, span: int
) -> tuple[int, np.ndarray, np.ndarray]:
    """Each first site starts a new block; site m holds the blocks in its span."""
    width = _best_width(count_MT, [16 * i for i in range(2, 17)])
    start, need_MT = _starts(count_MT, width)
    M = len(count_MT)
    first_M = start[np.maximum(np.arange(M) - span + 1, 0)]
    end_MT = np.where(need_MT > 0, start[:M, None] + need_MT, first_M[:, None])
    # An earlier layer in the span may reach further at a position than this one does.
    return width, first_M, np.maximum(end_MT, _span_end(start, need_MT, span))


def _starts(count_MT: np.ndarray, width: int) -> tuple[np.ndarray, np.ndarray]:
    """First block of the owners of each first site, [M + 1], and blocks they need."""
    need_MT = -(-count_MT // width)
    return np.concatenate([[0], np.cumsum(need_MT.max(1))]), need_MT


def _slots(items: Items, count_MT: np.ndarray, width: int) -> np.ndarray:
    """Slot of each owner within its position."""
    if _nested(items.n_sites):
        return _rank_in_group(items.pos_A)
    start, _ = _starts(count_MT, width)
    T = count_MT.shape[1]
    rank_A = _rank_in_group(items.site_A.astype(np.int64) * T + items.pos_A)
    return start[items.site_A] * width + rank_A


def _span_end(start: np.ndarray, need_MT: np.ndarray, span: int) -> np.ndarray:
    """Last block [M, T] of any site of the span that has owners at a position."""
    M = len(need_MT)
    end_MT = np.where(need_MT > 0, start[:M, None] + need_MT, 0)
    return np.stack([end_MT[max(0, m - span + 1) : m + 1].max(0) for m in range(M)])
