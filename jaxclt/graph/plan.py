"""How much work the edges are, and how it is cut into chunks of equal shape.

The whole edge matrix can be had from either side. Pulled back, a target costs one pass
down through the layers below it and, at each MLP, dot products with all that is
written there. Pushed forward, a source costs one pass up and dot products with what is
read there; a cross-layer source writes many MLPs but each target reads once, so that
pushing does a CLT's dot products once instead of once per written layer. Rows on demand
need pulling. `attribute_recording` takes the cheaper way by these counts.

A pass touches the positions between source and target. Its reach is how many that can
be: p + 1 for a target at p, T - p for a source.
"""

from __future__ import annotations

import dataclasses
from typing import NamedTuple

import numpy as np

from jaxclt.graph.bank import Bank
from jaxclt.graph.stream import causal_share
from jaxclt.lm.config import LMConfig

__all__ = ["Chunk", "Plan", "chunk_flops", "make_plan"]


class Chunk(NamedTuple):
    """Targets or sources that travel together."""

    index_B: np.ndarray
    n_positions: int  # nothing beyond is touched
    capacity: int  # of the program: as many, or a few more


@dataclasses.dataclass(frozen=True, kw_only=True)
class Plan:
    """How travellers are cut into chunks, a compiled program per band and capacity."""

    band_end: tuple[int, ...]  # bands of reach (previous end, end]
    capacities: tuple[int, ...]  # of chunks, descending; what is left over is padded
    tokens: int | None = None  # travellers times positions of a chunk, at most

    @property
    def capacity(self) -> int:
        """Most travellers of a chunk."""
        return self.capacities[0]

    def chunks(self, levels_R: np.ndarray, reach_R: np.ndarray) -> list[Chunk]:
        """Chunks narrow in reach, then in the number of layers they pass.

        Args:
          levels_R: layers each traveller passes.
          reach_R: positions it may touch, 1 or more.
        """
        chunks = []
        for start, end in zip((0, *self.band_end[:-1]), self.band_end, strict=True):
            rows = np.flatnonzero((reach_R > start) & (reach_R <= end))
            rows = rows[np.argsort(-levels_R[rows], kind="stable")]
            while len(rows):
                capacity = self._next(len(rows))
                if self.tokens is not None:
                    capacity = min(capacity, max(1, self.tokens // end))
                chunks.append(Chunk(rows[:capacity], end, capacity))
                rows = rows[capacity:]
        return chunks

    def _next(self, n: int) -> int:
        """Capacity of the next chunk of n: the largest that they nearly fill."""
        nearly = (c for c in self.capacities if n >= _NEARLY * c)
        return next(nearly, self.capacities[-1])


def make_plan(
    n_rows: int,
    *,
    n_positions: int,
    flops_per_position: float,
    n_bands: int | None = None,
    chunk_size: int = 128,
    n_devices: int = 1,
) -> Plan:
    """Choose bands of reach and the capacities of chunks.

    More bands waste less work and compile more programs. The choice depends on sizes
    only, so that prompts of one bucket share their programs.

    Args:
      n_rows: travellers, at most.
      n_positions: the longest reach.
      flops_per_position: cost of one traveller per position it touches.
      n_bands: how many; None for few where the work is little.
      chunk_size: most travellers in a device's share of a chunk.
      n_devices: devices that share each chunk.
    """
    if n_bands is None:
        work = n_rows * flops_per_position * n_positions / 2
        n_bands = 1 if work < _FLOPS_WORTH_BANDS else 6
    n_bands = min(n_bands, n_positions)
    # Equal bands touch the fewest positions when every reach is as frequent.
    ends = np.ceil(np.arange(1, n_bands + 1) * n_positions / n_bands).astype(int)
    share = chunk_size if n_rows > 256 else min(chunk_size, 32)
    shares = [share]
    # Every band ends in a chunk that is padded, on average with half of one.
    while shares[-1] > 8 and (
        shares[-1] / 2 * flops_per_position * n_positions > _FLOPS_WORTH_PROGRAM
    ):
        shares.append(max(shares[-1] // 4, 8))
    return Plan(
        band_end=tuple(ends.tolist()),
        capacities=tuple(share * n_devices for share in shares),
    )


# Below this, compiling more programs takes longer than they save.
_FLOPS_WORTH_BANDS = 2e11
_FLOPS_WORTH_PROGRAM = 5e11
_NEARLY = 0.75  # full: one padded chunk is faster than several small ones


def chunk_flops(
    cfg: LMConfig,
    bank: Bank,
    chunk: Chunk,
    layers: range,
    sites: range,
    *,
    skip: bool,
) -> float:
    """Floating-point operations of one chunk, padding included.

    Args:
      cfg: model shape.
      bank: what it is multiplied with.
      chunk: whose sizes count.
      layers: whose attention it passes.
      sites: where it is multiplied with the bank.
      skip: whether it passes the dictionary's linear path.
    """
    _, n_positions, capacity = chunk
    heads, kv_heads = cfg.n_heads * cfg.d_head, cfg.n_kv_heads * cfg.d_head
    seen = causal_share(n_positions) * n_positions
    layer = cfg.d_model * (heads + kv_heads) + seen * heads
    if skip:
        layer += cfg.d_model**2
    moved = len(layers) * layer * n_positions
    shared, overflow = bank.slots.shared_first_M, bank.slots.overflow_first_M
    if len(sites) == 0:
        tiles = 0.0
    else:
        shared_tiles = float(shared[sites.stop] - shared[sites.start])
        alone = float(overflow[sites.stop] - overflow[sites.start])
        tiles = (shared_tiles * n_positions + alone) * bank.width * cfg.d_model
    return 2.0 * capacity * (moved + tiles)


def mean_flops(cfg: LMConfig, bank: Bank, n_positions: int) -> float:
    """Operations of one traveller per position it touches, on average."""
    M = len(bank.slots.shared_first_M) - 1
    chunk = Chunk(np.zeros(1, int), n_positions, 1)
    one = chunk_flops(cfg, bank, chunk, range(cfg.n_layers), range(M), skip=False)
    return one / 2 / n_positions
