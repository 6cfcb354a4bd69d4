"""Source vectors packed for matmuls: what every feature writes, by layer and position.

An edge is the dot product of a target's cotangent at an MLP output with what a source
writes there. Packed so that all sources of one position that write one MLP output form
a few tiles of equal shape, the edges are plain matmuls, one compiled program serves all
layers, and no (targets x sources x d_model) temporary ever exists.

A feature owns one slot of its position; slots are cut into blocks of `width`. For a
full CLT everything below layer m writes m, so slots are ordered by layer and the
sources of m are the first blocks. For a narrower span each layer starts a new block.

Positions differ in how many features they have, the first one often by far. Tiles that
all positions share are as deep as most positions need; what sticks out of them goes to
overflow tiles that belong to one position each.
"""

from __future__ import annotations

import dataclasses

import numpy as np

from jaxclt.clt.active import Active
from jaxclt.shapes import bucket, round_up

__all__ = ["SourceBank", "source_bank"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class SourceBank:
    """Sources of one prompt: X shared tiles and Y overflow tiles of width S.

    Tiles hold value x decoder row, zero where a slot is empty, and are ordered by the
    layer they write: layer m owns shared tiles ``shared_L[m]:shared_L[m + 1]``.
    """

    shared_XTSD: np.ndarray
    shared_block_X: np.ndarray  # int32: which block of slots the edges belong to
    shared_L: np.ndarray  # int32 [L + 1]
    overflow_YSD: np.ndarray
    overflow_block_Y: np.ndarray  # int32
    overflow_pos_Y: np.ndarray  # int32
    overflow_L: np.ndarray  # int32 [L + 1]
    error_LTD: np.ndarray
    embed_TD: np.ndarray
    slot_A: np.ndarray  # slot of each feature within its position
    n_blocks: int

    @property
    def width(self) -> int:
        """Slots per block."""
        return self.shared_XTSD.shape[2]


def source_bank(
    active: Active, error_LTD: np.ndarray, embed_TD: np.ndarray
) -> SourceBank:
    """Pack the sources of a prompt.

    Args:
      active: active features with their decoder rows.
      error_LTD: error vectors.
      embed_TD: embedding vectors.
    """
    L, T, D = error_LTD.shape
    count_LT = np.zeros((L, T), np.int64)
    np.add.at(count_LT, (active.layer_A, active.pos_A), 1)
    n_writes = [rows.shape[1] for rows in active.decoder]
    if all(n == L - layer for layer, n in enumerate(n_writes)) and L > 1:
        width, slot_A, first_M, end_MT = _prefix_slots(active, count_LT)
    else:
        width, slot_A, first_M, end_MT = _layer_slots(active, count_LT, max(n_writes))
    depth_M = _shared_depth(end_MT - first_M[:, None])
    shared_L = np.concatenate([[0], np.cumsum(depth_M)])
    over_M, over_T, over_block = _overflow(first_M + depth_M, end_MT)
    overflow_L = np.searchsorted(over_M, np.arange(L + 1))
    # Sizes are bucketed so that prompts share compiled programs; empty tiles cost
    # memory, not time.
    X, Y = bucket(int(shared_L[-1])), bucket(len(over_M))
    shared_XTSD = np.zeros((X, T, width, D), error_LTD.dtype)
    overflow_YSD = np.zeros((Y, width, D), error_LTD.dtype)
    tile_of = {
        key: y for y, key in enumerate(zip(over_M, over_T, over_block, strict=True))
    }
    for layer in range(L):
        slots = active.of_layer(layer)
        rows_AMD = active.decoder_rows(slots, layer)
        pos, value = active.pos_A[slots], active.value_A[slots, None]
        block, place = np.divmod(slot_A[slots], width)
        for offset in range(rows_AMD.shape[1]):
            m = layer + offset
            written_AD = value * rows_AMD[:, offset]
            local = block - first_M[m]
            shared = local < depth_M[m]
            tile = shared_L[m] + local[shared]
            shared_XTSD[tile, pos[shared], place[shared]] = written_AD[shared]
            if not shared.all():
                keys = zip(pos[~shared], block[~shared], strict=True)
                tile = np.array([tile_of[m, p, b] for p, b in keys])
                overflow_YSD[tile, place[~shared]] = written_AD[~shared]
    blocks = [np.arange(a, a + n) for a, n in zip(first_M, depth_M, strict=True)]
    return SourceBank(
        shared_XTSD=shared_XTSD,
        shared_block_X=_padded(np.concatenate(blocks), X),
        shared_L=shared_L.astype(np.int32),
        overflow_YSD=overflow_YSD,
        overflow_block_Y=_padded(over_block, Y),
        overflow_pos_Y=_padded(over_T, Y),
        overflow_L=overflow_L.astype(np.int32),
        error_LTD=error_LTD,
        embed_TD=embed_TD,
        slot_A=slot_A,
        n_blocks=round_up(max(int(end_MT.max(initial=0)), 1), 8),
    )


def _padded(index: np.ndarray, size: int) -> np.ndarray:
    return np.pad(index, (0, size - len(index))).astype(np.int32)


def _overflow(
    shared_end_M: np.ndarray, end_MT: np.ndarray
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(write layer, position, block) of every block beyond the shared ones."""
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
    """Cost [L, depth] of sharing `depth` blocks, in blocks times positions."""
    L = len(need_MT)
    T = int(need_MT.any(0).sum())  # padded positions have no features
    depth = np.arange(need_MT.max(initial=0) + 1)
    beyond = np.maximum(need_MT[:, :, None] - depth, 0).sum(1)
    return T * depth[None, :] + _OVERFLOW_COST * beyond.reshape(L, len(depth))


def _shared_depth(need_MT: np.ndarray) -> np.ndarray:
    """Blocks of each write layer that all positions share, [L]."""
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


def _prefix_slots(
    active: Active, count_LT: np.ndarray
) -> tuple[int, np.ndarray, np.ndarray, np.ndarray]:
    """Slots by layer without gaps; write layer m reads the first blocks."""
    reach_MT = np.cumsum(count_LT, 0)  # slots of everything that writes layer m
    width = _best_width(reach_MT, [32, 64, 128, 256])
    end_MT = -(-reach_MT // width)
    return width, _rank_in_group(active.pos_A), np.zeros(len(end_MT), np.int64), end_MT


def _layer_slots(
    active: Active, count_LT: np.ndarray, span: int
) -> tuple[int, np.ndarray, np.ndarray, np.ndarray]:
    """Each layer starts a new block; write layer m reads the blocks in its span."""
    L, T = count_LT.shape
    width = _best_width(count_LT, [16 * i for i in range(2, 17)])
    need_LT = -(-count_LT // width)
    start = np.concatenate([[0], np.cumsum(need_LT.max(1))])
    rank_A = _rank_in_group(active.layer_A.astype(np.int64) * T + active.pos_A)
    slot_A = start[active.layer_A] * width + rank_A
    first_M = start[np.maximum(np.arange(L) - span + 1, 0)]
    end_MT = np.where(need_LT > 0, start[:L, None] + need_LT, first_M[:, None])
    # An earlier layer in the span may reach further at a position than this one does.
    return width, slot_A, first_M, np.maximum(end_MT, _span_end(start, need_LT, span))


def _span_end(start: np.ndarray, need_LT: np.ndarray, span: int) -> np.ndarray:
    """Last block [L, T] of any layer of the span that has features at a position."""
    L = len(need_LT)
    end_LT = np.where(need_LT > 0, start[:L, None] + need_LT, 0)
    return np.stack([end_LT[max(0, m - span + 1) : m + 1].max(0) for m in range(L)])
