"""Where a leaf of LMParams lies in files, as a row of a table.

A file stores a matrix as [out, in] and keeps heads and their channels in one axis; ours
are input-first with separate axes. A row says both: `stored` lists the axes in the
file, one word each, where "HC" is one axis of length H * C; the suffix of the leaf says
the order that is wanted. Queries, keys and values may lie in one tensor: the axis "3"
is then theirs, wherever it stands, and each takes its `part`. Tensors of several sizes
that lie one after the other along an axis are "HC+GC+GC", and a `part` is one of them.

This library rotates the halves of a head's channels (j, j + C/2). llama.cpp and some
families of Hugging Face rotate neighbours (2j, 2j + 1), and files hold the rows of
query and key heads so; rows that name such a file as `rotary` are put in the order of
halves. Scores are sums over channels and do not notice.

The tables are in `jaxclt.io.rows`.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from typing import Literal, NamedTuple

import numpy as np

from jaxclt.lm.config import LMConfig

__all__ = ["Layout", "Part", "Row", "Source", "find_part", "from_leaf", "leaf_sizes"]
__all__ += ["stored_shape", "tensor_name", "to_leaf"]

Source = Literal["hf", "gguf"]


@dataclass(frozen=True)
class Row:
    """One leaf: its name here and in files, and the axes of the stored tensor."""

    leaf: str
    hf: str
    gguf: str
    stored: str
    stored_gguf: str | None = None  # None: as elsewhere
    part: int | None = None  # of the axis "3", or of an axis with "+"
    option: str | None = None  # the leaf exists only where this option is on
    or_option: str | None = None  # or this
    rotary: tuple[Source, ...] = ()  # files that interleave the channels that turn
    flipped: bool = False  # heads turn the other way: the halves change places
    first: int = 0  # of the first axis in files, what lies before is not read
    fill: float | None = None  # no file has it, all its entries are this

    @property
    def axes(self) -> str:
        """Axes of one layer of the leaf, in order."""
        return self.leaf.rpartition("_")[2].removeprefix("L")

    def axes_in(self, source: Source) -> str:
        """Axes of the stored tensor of one layer; of its own part where that is one."""
        return " ".join(self.segments(word)[0] for word in self.words(source))

    def words(self, source: Source) -> list[str]:
        """The axes of the whole tensor, one word each."""
        return ((source == "gguf" and self.stored_gguf) or self.stored).split()

    def segments(self, word: str) -> tuple[str, list[str]]:
        """Of an axis: the row's own part of it, and the parts before that."""
        parts = word.split("+")
        at = 0 if len(parts) == 1 else self.part or 0
        return parts[at], parts[:at]

    def exists(self, options: Collection[str]) -> bool:
        """Whether a model with these options has the leaf."""
        return self.option is None or bool({self.option, self.or_option} & {*options})

    @property
    def is_gain(self) -> bool:
        """Whether it is the gain of a norm."""
        is_norm = "norm" in self.leaf and "bias" not in self.leaf
        return is_norm or self.leaf.startswith("post_")

    @property
    def per_layer(self) -> bool:
        """Whether the leaf is stacked over layers (a field of Block)."""
        return self.leaf.rpartition("_")[2].startswith("L")


@dataclass(frozen=True, kw_only=True)
class Layout:
    """What the files of a model hold, and what they do not say of its weights."""

    rows: tuple[Row, ...]
    options: frozenset[str] = frozenset()  # which optional leaves exist
    tied: bool | None = False  # None: if the files have no unembedding
    gain_offset: float = 0.0  # files hold gains minus this
    prefixes: tuple[tuple[str, str], ...] = ()  # of names in files, and in our table
    unread: tuple[str, ...] = ()  # patterns of names that hold nothing for us
    local: tuple[bool, ...] | None = None  # `Block.local_L`
    turning: tuple[bool, ...] | None = None  # `Block.turning_L`
    # What leaves are times, all layers or each.
    scales: Mapping[str, float | tuple[float, ...]] = field(default_factory=dict)
    embed_eps: float | None = None  # embeddings go through an RMSNorm without gains
    embed_scale: float | None = None
    logit_cap: float | None = None


def tensor_name(row: Row, source: Source, layer: int = 0) -> str:
    """Name of the stored tensor of one layer."""
    return getattr(row, source).format(i=layer)


def stored_shape(row: Row, cfg: LMConfig, source: Source = "hf") -> tuple[int, ...]:
    """Shape that the tensor of one layer has in files."""
    size = leaf_sizes(cfg)
    shape = [
        sum(_length(part, size) for part in word.split("+"))
        for word in row.words(source)
    ]
    shape[0] += row.first
    return tuple(shape)


def _length(word: str, size: Mapping[str, int]) -> int:
    return math.prod(size[x] for x in word)


class Part(NamedTuple):
    """Where a part of a leaf lies in its stored tensor."""

    stored: tuple[slice, ...]  # what to read of the tensor
    shape: tuple[int, ...]  # that, one axis for each letter
    inside: tuple[slice, ...]  # and what of it is wanted
    turning: int  # channels of a head that turn


def find_part(
    row: Row, cfg: LMConfig, source: Source, wanted: Mapping[str, slice]
) -> Part:
    """Where a part of one layer's leaf lies, the least that one slice an axis can read.

    Args:
      row: the leaf.
      cfg: sizes of the model.
      source: which layout.
      wanted: what of an axis is wanted, by its letter; the others are whole.
    """
    size = leaf_sizes(cfg)
    one_of_three = {} if row.part is None else {"3": slice(row.part, row.part + 1)}
    wanted = {**wanted, **one_of_three}
    stored: list[slice] = []
    shape: list[int] = []
    inside: list[slice] = []
    for axis, whole in enumerate(row.words(source)):
        word, before = row.segments(whole)
        start = sum(_length(x, size) for x in before) + (0 if axis else row.first)
        step = _length(word, size)
        stop, single = start + step, True
        for x in word:
            step //= size[x]
            here = wanted.get(x, slice(0, size[x]))
            if single:  # so far one index of each letter: what follows is in one piece
                start += here.start * step
                stop = start + (here.stop - here.start) * step
                shape.append(here.stop - here.start)
                inside.append(slice(None))
                single = shape[-1] == 1
            else:
                shape.append(size[x])
                inside.append(here)
        stored.append(slice(start, stop))
    return Part(tuple(stored), tuple(shape), tuple(inside), cfg.n_turning)


def to_leaf(w: np.ndarray, row: Row, source: Source, part: Part) -> np.ndarray:
    """What was read of a stored tensor -> that part of one layer's leaf.

    Axes as `row.axes`; a view if it can. `w` is the tensor at `part.stored`.
    """
    letters = row.axes_in(source).replace(" ", "")
    w = w.reshape(part.shape)[part.inside]
    if "3" in letters:
        w = w.squeeze(letters.index("3"))
        letters = letters.replace("3", "")
    if source in row.rotary or row.flipped:
        swap = _swapped if row.flipped else _halves
        w = swap(w, letters.index("C"), part.turning)
    return w.transpose([letters.index(x) for x in row.axes])


def from_leaf(leaf: np.ndarray, row: Row, cfg: LMConfig) -> np.ndarray:
    """Inverse of `to_leaf` for Hugging Face files."""
    order = [row.axes.index(x) for x in row.stored.replace(" ", "")]
    return leaf.transpose(order).reshape(stored_shape(row, cfg))


def leaf_sizes(cfg: LMConfig) -> dict[str, int]:
    """Sizes of the axes by their letters."""
    return {
        "D": cfg.d_model,
        "H": cfg.n_heads,
        "G": cfg.n_kv_heads,
        "C": cfg.d_head,
        "I": cfg.d_mlp,
        "V": cfg.d_vocab,
        "T": cfg.n_ctx,
        "3": 3,
        "1": 1,
    }


def _halves(w: np.ndarray, axis: int, turning: int) -> np.ndarray:
    """Reorder channels x0 y0 x1 y1 ... -> x0 x1 ... y0 y1 ... along `axis`.

    The first ones, that turn; others stay.
    """
    order = np.arange(w.shape[axis])
    order[:turning] = order[:turning].reshape(-1, 2).T.ravel()
    return w.take(order, axis)


def _swapped(w: np.ndarray, axis: int, turning: int) -> np.ndarray:
    """x0 x1 ... y0 y1 ... -> y0 y1 ... x0 x1 ... of the channels that turn."""
    order = np.arange(w.shape[axis])
    order[:turning] = np.roll(order[:turning], turning // 2)
    return w.take(order, axis)
