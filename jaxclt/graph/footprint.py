"""Bytes of what a graph is made of, from shapes alone.

`jaxclt.graph.memory` makes a plan of them. All counts are of arrays held at once.
"""

from __future__ import annotations

import dataclasses

from jaxclt.graph.layout import Layout
from jaxclt.graph.packing import BankSizes
from jaxclt.lm.config import LMConfig

__all__ = [
    "FLOAT32",
    "MATRIX",
    "Sizes",
    "answering_bytes",
    "attending_bytes",
    "entry_bytes",
    "matrix_bytes",
    "n_columns",
    "on_device",
    "on_host",
    "packing",
    "pattern_bytes",
    "score_bytes",
    "table_bytes",
    "tile_bytes",
]


FLOAT32 = 4  # bytes of a number: attribution takes no halves, whatever files hold


@dataclasses.dataclass(frozen=True, kw_only=True)
class Sizes:
    """What memory depends on."""

    cfg: LMConfig
    n_tokens: int  # of the recording, padding included
    n_active: int
    n_rows: int  # features that get a row, at most
    n_targets: int
    bank: BankSizes  # of what features write
    readers: BankSizes | None = None  # of what targets read, where all may be pushed
    row_bytes: int = 0  # encoder and decoder rows of the active features, as read
    params_bytes: int = 0
    response: bool = False  # edges by response, too
    attention: int = 0  # cells of patterns that are taken apart
    itemsize: int = FLOAT32

    @property
    def banks(self) -> tuple[BankSizes, ...]:
        """Those of which one is on the device at a time."""
        return (self.bank, *(() if self.readers is None else (self.readers,)))

    @property
    def n_slots(self) -> int:
        """Edges of one row, as kernels lay them out."""
        return max(bank.n_slots for bank in self.banks)


def pattern_bytes(cfg: LMConfig, n_tokens: int, itemsize: int) -> int:
    """Of all attention patterns."""
    return cfg.n_layers * cfg.n_heads * n_tokens**2 * itemsize


MATRIX = 2.0  # the matrix, its selection, and the masks and blocks of pruning


def matrix_bytes(sizes: Sizes, n_rows: int, pool: int) -> int:
    """Of the edges of some rows to a pool of features, with what works on them."""
    rows = n_rows + sizes.n_targets
    return int(rows * n_columns(sizes, pool) * sizes.itemsize * MATRIX)


def n_columns(sizes: Sizes, n_features: int) -> int:
    """How many columns a graph of so many features has."""
    return Layout(
        n_features=n_features, n_layers=sizes.cfg.n_layers, n_tokens=sizes.n_tokens
    ).n_columns


def entry_bytes(bank: BankSizes, itemsize: int) -> int:
    """Of a bank's tiles as rows and values."""
    return bank.n_vectors * (4 + itemsize)


def table_bytes(bank: BankSizes, d_model: int, itemsize: int) -> int:
    """Of the one table that a bank's rows are joined to."""
    return bank.n_rows * d_model * itemsize


def tile_bytes(bank: BankSizes, d_model: int, itemsize: int) -> int:
    """Of a bank's tiles, vectors written out."""
    return bank.n_vectors * d_model * itemsize


def on_host(sizes: Sizes) -> dict[str, int]:
    """Bytes on the host but the edge matrix."""
    return {
        "dictionary rows as read": sizes.row_bytes,
        "active features": sizes.n_active * 64 + entries_of(sizes),
    }


def on_device(sizes: Sizes, keep: bool, packed: bool, chunk: int) -> dict[str, int]:
    """Bytes of what the kernels work on."""
    cfg, T, item = sizes.cfg, sizes.n_tokens, sizes.itemsize
    L, D = cfg.n_layers, cfg.d_model
    heads, kv_heads = cfg.n_heads * cfg.d_head, cfg.n_kv_heads * cfg.d_head
    patterns = pattern_bytes(cfg, T, item)
    one_layer = patterns // L
    tables = max(table_bytes(x, D, item) for x in sizes.banks)
    tiles = max(tile_bytes(x, D, item) for x in sizes.banks)
    # One tile of every position at a time.
    gathered = 2 * T * sizes.bank.width * D * item
    stream = T * chunk * (4 * D + 3 * heads) * item
    # Of one chunk they are made while the last one's are read.
    work = stream + 2 * (sizes.n_slots + (L + 1) * T) * chunk * item
    return {
        "parameters": sizes.params_bytes,
        "recording": 8 * L * T * D * item,  # the stream, writes, errors, diagonals
        "attention maps": L * D * (heads + kv_heads) * item,
        "patterns": 2 * patterns if keep else 3 * one_layer,
        "dictionary rows": 0 if packed else tables,  # see `packing`
        "sources": tiles if packed else entries_of(sizes) + gathered,
        "chunk": work,
    }


def entries_of(sizes: Sizes) -> int:
    """Bytes of the larger bank's tiles as rows and values."""
    return max(entry_bytes(x, sizes.itemsize) for x in sizes.banks)


def packing(sizes: Sizes, packed: bool) -> tuple[int, int]:
    """Bytes of dictionary rows on their way, before any chunk or edge is made.

    Returns:
      On the host, of the table that all rows are joined to; and on the device, of its
      copy beside the tiles that are written out from it.
    """
    cfg, item = sizes.cfg, sizes.itemsize
    joined = max(table_bytes(x, cfg.d_model, item) for x in sizes.banks)
    return joined, joined + entries_of(sizes) if packed else 0


def answering_bytes(sizes: Sizes, chunk: int) -> int:
    """Bytes of a chunk of rows by response, and of what attention is laid out in.

    Its cotangents of scores are those of the heads of one group, three times: as made,
    less their mean, and with another axis first.
    """
    cfg, T, item = sizes.cfg, sizes.n_tokens, sizes.itemsize
    width = (cfg.n_heads + 2 * cfg.n_kv_heads) * cfg.d_head
    maps = cfg.n_layers * cfg.d_model * (width + cfg.n_heads * cfg.d_head)
    vectors = T * chunk * (4 * cfg.d_model + 3 * width)
    scores = T**2 * (3 * cfg.n_queries_per_kv * chunk + 4 * cfg.n_heads)
    return (maps + vectors + scores + 2 * sizes.n_slots * chunk) * item


_VECTORS = 12  # pulled for every cell, see `jaxclt.attending.apart`


def attending_bytes(sizes: Sizes, chunk: int) -> int:
    """Bytes of what takes scores apart, on the device: the stream laid out both ways.

    A chunk is of vectors that are pulled, and then of columns that are pushed; queries
    and keys are made of these, plain and turned. Each cell has three sides.
    """
    cfg, T, item = sizes.cfg, sizes.n_tokens, sizes.itemsize
    L, D = cfg.n_layers, cfg.d_model
    width = (cfg.n_heads + cfg.n_kv_heads) * cfg.d_head
    constant = 3 * L * T * D  # what biases, the rest and positions write
    pulled = T * chunk * (5 * D + 2 * width) + 2 * sizes.n_slots * chunk
    found = 4 * 3 * sizes.attention * chunk * cfg.d_head  # sizes are bucketed
    pushed = T * chunk * (3 * D + 4 * width) + 2 * (L + 1) * chunk * D + found
    cells = 10 * T**2  # of one head
    laid_out = 2 * L * D * width
    return (laid_out + constant + max(pulled, pushed, cells)) * item


def score_bytes(sizes: Sizes) -> int:
    """Bytes of what all columns bring to cells, on the host; doubles, too."""
    n = n_columns(sizes, sizes.n_rows)
    return sizes.attention * _VECTORS * n * (sizes.itemsize + 2 * 8)
