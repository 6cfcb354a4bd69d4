"""Source vectors packed for matmuls: what every feature writes, by layer and position.

An edge is the dot product of a target's cotangent at an MLP output with what a source
writes there. Packed so that all sources of one position that write one MLP output form
a few tiles of equal shape, the edges are plain matmuls, one compiled program serves all
layers, and no (targets x sources x d_model) temporary ever exists.

A feature owns one slot of its position; slots are cut into blocks of `width`. For a
full CLT everything below layer m writes m, so slots are ordered by layer and the
sources of m are the first blocks. For a narrower span each layer starts a new block.
"""

from __future__ import annotations

import dataclasses

import numpy as np

from jaxclt.clt.active import Active

__all__ = ["SourceBank", "source_bank"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class SourceBank:
    """Sources of one prompt, packed in tiles (X tiles of width S)."""

    tile_XTSD: np.ndarray  # value x decoder row; zero where a slot is empty
    block_X: np.ndarray  # int32: which block of slots a tile's edges belong to
    first_L: np.ndarray  # int32 [L + 1]: tiles of write layer m are first[m]:first[m+1]
    error_LTD: np.ndarray
    embed_TD: np.ndarray
    slot_A: np.ndarray  # slot of each feature within its position
    n_blocks: int

    @property
    def width(self) -> int:
        """Slots per block."""
        return self.tile_XTSD.shape[2]


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
    reaches_end = all(n == L - layer for layer, n in enumerate(n_writes))
    if reaches_end and L > 1:
        slot_A, width, first_block, end_block = _prefix_slots(active, count_LT)
    else:
        slot_A, width, first_block, end_block = _layer_slots(active, count_LT, n_writes)
    first_L = np.concatenate([[0], np.cumsum(end_block - first_block)]).astype(np.int32)
    block_X = np.concatenate(
        [np.arange(a, b) for a, b in zip(first_block, end_block, strict=True)]
    ).astype(np.int32)
    tile_XTSD = np.zeros((max(len(block_X), 1), T, width, D), error_LTD.dtype)
    for layer, rows_AMD in enumerate(active.decoder):
        slots = active.of_layer(layer)
        pos, slot = active.pos_A[slots], slot_A[slots]
        value = active.value_A[slots, None]
        for offset in range(rows_AMD.shape[1]):
            m = layer + offset
            tile = first_L[m] + slot // width - first_block[m]
            tile_XTSD[tile, pos, slot % width] = value * rows_AMD[:, offset]
    return SourceBank(
        tile_XTSD=tile_XTSD,
        block_X=block_X if len(block_X) else np.zeros(1, np.int32),
        first_L=first_L,
        error_LTD=error_LTD,
        embed_TD=embed_TD,
        slot_A=slot_A,
        n_blocks=max(int(end_block.max(initial=0)), 1),
    )


def _rank_in_group(group_A: np.ndarray) -> np.ndarray:
    """Place of each element among the earlier elements of its group."""
    order = np.argsort(group_A, kind="stable")
    grouped = group_A[order]
    start = np.flatnonzero(np.r_[True, grouped[1:] != grouped[:-1]])
    length = np.diff(np.r_[start, len(grouped)])
    rank = np.empty(len(group_A), np.int64)
    rank[order] = np.arange(len(grouped)) - np.repeat(start, length)
    return rank


def _prefix_slots(
    active: Active, count_LT: np.ndarray
) -> tuple[np.ndarray, int, np.ndarray, np.ndarray]:
    """Slots by layer without gaps; write layer m reads the first blocks."""
    slot_A = _rank_in_group(active.pos_A) if len(active.pos_A) else active.pos_A
    reach_M = np.cumsum(count_LT, 0).max(1)  # slots needed up to each layer
    # A wide tile is a better matmul, a narrow one wastes fewer padded slots.
    widths = [8, 16, 32, 64, 128, 256]
    cost = [(-(-reach_M // w) * (w + 16)).sum() for w in widths]
    width = widths[int(np.argmin(cost))]
    end = -(-reach_M // width)
    return slot_A, width, np.zeros_like(end), end


def _layer_slots(
    active: Active, count_LT: np.ndarray, n_writes: list[int]
) -> tuple[np.ndarray, int, np.ndarray, np.ndarray]:
    """Each layer starts a new block; write layer m reads the blocks in its span."""
    L, T = count_LT.shape
    need_L = count_LT.max(1)
    widths = [8 * i for i in range(1, 33)]
    cost = [(-(-need_L // w) * (w + 4)).sum() for w in widths]
    width = widths[int(np.argmin(cost))]
    start = np.concatenate([[0], np.cumsum(-(-need_L // width))])
    slot_A = start[active.layer_A] * width + (
        _rank_in_group(active.layer_A.astype(np.int64) * T + active.pos_A)
        if len(active.pos_A)
        else 0
    )
    span = max(n_writes)
    source_lo = np.maximum(np.arange(L) - span + 1, 0)
    return slot_A, width, start[source_lo], start[1:]
