"""Shuffled chunks of activations: a pure function of (seed, position).

A chunk is what the model does on some hundred random windows, its tokens shuffled by
one permutation, layers together. Which windows, and the order of tokens, follow from
the seed and the chunk's number, so the exact place in the data is three integers, and a
resumed run rebuilds its chunk instead of storing gigabytes. A chunk may be used more
than once (`reuse`), each time in another order: on a CPU harvesting costs as much as
training.

A `store` keeps harvested chunks on disk, one file each, with a manifest that lists
their checksums; runs on the same data share it. The normalisation is measured on the
first chunks while they are harvested; without a store a `spool` keeps them until they
are trained on, so that no text is run through the model twice.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from jaxclt.clt.config import ReadSite
from jaxclt.errors import InputError
from jaxclt.io.model import Model
from jaxclt.precision import jit
from jaxclt.text.corpus import PAD, Windows
from jaxclt.train.harvest import harvest
from jaxclt.train.normalise import (
    Moments,
    Scales,
    between,
    merge_moments,
    normalise,
    scales_of,
)
from jaxclt.train.store import DTYPES, ChunkStore

__all__ = ["ChunkConfig", "Chunks", "Position", "window_order"]

MOMENT_ROWS = 2048  # of a chunk, converted to float32 together


@dataclasses.dataclass(frozen=True, kw_only=True)
class ChunkConfig:
    """How activations are gathered."""

    site: ReadSite = "resid_mid"
    chunk_tokens: int = 32_768  # about: whole windows are taken
    reuse: int = 1  # passes over a chunk before the next one
    windows_per_call: int = 8  # of the model's forward pass
    dtype: str = "bfloat16"  # activations are held in
    outlier: float = (
        10.0  # times a layer's median write norm; tokens above are left out
    )
    seed: int = 0


@dataclasses.dataclass(frozen=True)
class Position:
    """The next batch: rows `offset` onward of pass `turn` over chunk `chunk`."""

    chunk: int = 0
    turn: int = 0
    offset: int = 0


def window_order(seed: int, n_windows: int, start: int, count: int) -> np.ndarray:
    """Numbers of windows `start`..`start + count` of an endless shuffled stream.

    Each epoch is one permutation of all windows.
    """
    wanted = np.arange(start, start + count)
    found = np.empty(count, np.int64)
    for epoch in np.unique(wanted // n_windows):
        key = jax.random.fold_in(jax.random.key(seed), int(epoch))
        order = np.asarray(jax.random.permutation(key, n_windows))
        here = wanted // n_windows == epoch
        found[here] = order[wanted[here] % n_windows]
    return found


def bound(norm_LT: np.ndarray, outlier: float) -> np.ndarray:
    """Largest write norm [L] that counts: `outlier` medians, or all if 0."""
    if outlier <= 0:
        return np.full(len(norm_LT), np.inf, np.float32)
    return (outlier * np.median(norm_LT, axis=1)).astype(np.float32)


@jit
def _renormalise(change: Scales, read: Array, write: Array) -> tuple[Array, Array]:
    return normalise(change, read.astype(jnp.float32), write.astype(jnp.float32))


class Chunks:
    """Chunks of one run: harvested when asked for, or read from a store.

    Attributes:
      units: what chunks are held in; from the first windows.
      scales: the normalisation that batches are in; set by `normalisation`.
    """

    def __init__(
        self,
        model: Model,
        windows: Windows,
        config: ChunkConfig,
        *,
        store: Path | None = None,
        spool: Path | None = None,
        read_only: bool = False,
    ) -> None:
        self.params, self.cfg = model.params, model.cfg
        self.windows, self.config = windows, config
        self.units: Scales | None = None
        self.scales: Scales | None = None
        self.read_only = read_only  # of the store: another process writes
        identity = {
            "model": model.hash,
            "windows": windows.digest,
            "config": {
                k: v for k, v in dataclasses.asdict(config).items() if k != "reuse"
            },
        }
        self._order: tuple[tuple[int, int], np.ndarray] | None = None
        self._chunk: tuple[int, np.ndarray, np.ndarray] | None = None
        self._change: Scales | None = None
        sizes = model.cfg.n_layers, model.cfg.d_model
        self.store = self.spool = None
        if store is not None:
            self.store = ChunkStore(store, identity, sizes)
            self.store.check()
        elif spool is not None:
            self.spool = ChunkStore(spool, identity, sizes, passing=True)

    @property
    def windows_per_chunk(self) -> int:
        """Windows of a chunk."""
        size = self.windows.train_WS.shape[1]
        return max(1, self.config.chunk_tokens // size)

    def harvested(
        self, token_WS: np.ndarray, scales: Scales | None, dtype: str
    ) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """Valid reads and writes [L, T, D] of windows, a few at a time.

        Some models make further attention sinks in the middle of a text (a newline, a
        bracket), whose MLP outputs are tens of times larger than any other: a handful
        of tokens then is most of a layer's variance, its scale and its loss. Such
        tokens are left out like the first position: those above ``scales.bound_L``
        anywhere.

        Args:
          token_WS: the windows.
          scales: normalise by these; None leaves raw units, outliers and all.
          dtype: of the result.
        """
        W, site = self.config.windows_per_call, self.config.site
        for start in range(0, len(token_WS), W):
            part_WS = token_WS[start : start + W]
            full_WS = np.full((W, part_WS.shape[1]), PAD, np.int32)
            full_WS[: len(part_WS)] = part_WS
            read_LTD, write_LTD, norm_LT = harvest(
                self.params,
                jnp.asarray(full_WS),
                scales,
                cfg=self.cfg,
                site=site,
                dtype=dtype,
            )
            keep_T = np.flatnonzero(self.windows.valid(full_WS))
            if scales is not None:
                bound_L = np.asarray(scales.bound_L)
                fits_LT = np.asarray(norm_LT)[:, keep_T] <= bound_L[:, None]
                keep_T = keep_T[fits_LT.all(0)]
            yield np.asarray(read_LTD)[:, keep_T], np.asarray(write_LTD)[:, keep_T]

    def first_units(self) -> Scales:
        """Normalisation from the first windows: near enough to hold activations in.

        Raises:
          InputError: if no token of them is trained on.
        """
        n = len(self.windows.train_WS)
        count = min(n, self.config.windows_per_call)
        first = window_order(self.config.seed, n, 0, count)
        rows = list(self.harvested(self.windows.train_WS[first], None, "float32"))
        read_LTD, write_LTD = (np.concatenate(x, 1) for x in zip(*rows, strict=True))
        if not read_LTD.shape[1]:
            raise InputError("the data has no token to train on: all are special")
        norm_LT = np.linalg.norm(write_LTD, axis=-1)
        bound_L = bound(norm_LT, self.config.outlier)
        keep_T = (norm_LT <= bound_L[:, None]).all(0)
        if not keep_T.any():
            raise InputError(
                f"--outlier {self.config.outlier:g} leaves out every token: raise it"
            )
        return scales_of(
            Moments.of(read_LTD[:, keep_T]), Moments.of(write_LTD[:, keep_T]), bound_L
        )

    def normalisation(
        self,
        n_tokens: int,
        on_tokens: Callable[[int, int], None] = lambda done, total: None,
    ) -> Scales:
        """Normalisation from the first chunks of at least `n_tokens`, if there are.

        Tokens that are left out as outliers do not count. From then on batches are
        normalised by it.

        Args:
          n_tokens: how many to look at.
          on_tokens: progress.
        """
        units = self._ready()
        read: Moments | None = None
        write: Moments | None = None
        n = chunk = 0
        while n < n_tokens and chunk * self.windows_per_chunk < len(
            self.windows.train_WS
        ):

            def report(done: int, n: int = n) -> None:
                on_tokens(min(n + done, n_tokens), n_tokens)

            self._chunk = None  # two need not fit into memory
            read_LND, write_LND = self._load(chunk, report)
            for start in range(0, read_LND.shape[1], MOMENT_ROWS):
                here = slice(start, start + MOMENT_ROWS)
                read = merge_moments(read, Moments.of(read_LND[:, here]))
                write = merge_moments(write, Moments.of(write_LND[:, here]))
            n += read_LND.shape[1]
            self._chunk = (chunk, read_LND, write_LND)
            on_tokens(min(n, n_tokens), n_tokens)
            more = chunk > 0 or n < n_tokens
            if self.spool is not None and more and not self.spool.holds(chunk):
                self.spool.write(*self._chunk)  # until it is trained on
            chunk += 1
        if read is None or write is None:
            raise InputError("the data has no token to train on: all are special")
        scales = scales_of(read, write, np.asarray(units.bound_L), units)
        self.use(units, scales)
        return scales

    def use(self, units: Scales, scales: Scales) -> None:
        """Normalise by what an earlier process measured."""
        if self.store is not None:
            units = self.store.read_units() or units
        self.units, self.scales = units, scales
        self._change = between(units, scales)

    def rows(
        self, chunk: int, turn: int, stop: int | None = None
    ) -> tuple[Array, Array]:
        """Shuffled reads and writes [L, N, D] of a chunk, normalised, float32.

        Args:
          chunk: number of the chunk.
          turn: pass over it.
          stop: only so many of them.
        """
        return self._take(chunk, self._shuffled(chunk, turn)[:stop])

    def batch(self, at: Position, n_tokens: int) -> tuple[Array, Array, Position]:
        """The next reads and writes [L, n_tokens, D], and where the one after starts.

        Rows that do not fill a batch at the end of a pass are left out of it.

        Raises:
          InputError: if a chunk is smaller than a batch.
        """
        while True:
            order_N = self._shuffled(at.chunk, at.turn)
            end = at.offset + n_tokens
            if end <= len(order_N):
                after = Position(at.chunk, at.turn, end)
                return *self._take(at.chunk, order_N[at.offset : end]), after
            if at.offset == 0:
                raise InputError(
                    f"--batch-tokens {n_tokens} is more than the "
                    f"{len(order_N)} tokens of a chunk: raise --chunk-tokens or "
                    "give more text"
                )
            last = at.turn + 1 == self.config.reuse
            at = Position(at.chunk + 1) if last else Position(at.chunk, at.turn + 1)

    def _shuffled(self, chunk: int, turn: int) -> np.ndarray:
        """Order [N] of a pass over a chunk."""
        if self._order is None or self._order[0] != (chunk, turn):
            read_LND, _ = self._held(chunk)
            key = jax.random.fold_in(jax.random.key(self.config.seed + 1), chunk)
            key = jax.random.fold_in(key, turn)
            order_N = np.asarray(jax.random.permutation(key, read_LND.shape[1]))
            self._order = ((chunk, turn), order_N)
        return self._order[1]

    def _take(self, chunk: int, row_N: np.ndarray) -> tuple[Array, Array]:
        assert self._change is not None, "call `normalisation` or `use` first"
        read_LND, write_LND = self._held(chunk)

        def pick(x_LND: np.ndarray) -> Array:
            return jnp.asarray(np.stack([np.take(x_ND, row_N, 0) for x_ND in x_LND]))

        return _renormalise(self._change, pick(read_LND), pick(write_LND))

    def _held(self, chunk: int) -> tuple[np.ndarray, np.ndarray]:
        """A chunk in its own units; one at a time is in memory."""
        if self._chunk is None or self._chunk[0] != chunk:
            self._chunk = None
            self._chunk = (chunk, *self._load(chunk))
            if self.spool is not None:
                self.spool.forget(chunk)
        return self._chunk[1], self._chunk[2]

    def _ready(self) -> Scales:
        """The units, from the store, or measured."""
        if self.units is None and self.store is not None:
            self.units = self.store.read_units()
        if self.units is None:
            self.units = self.first_units()
            if self.store is not None and not self.read_only:
                self.store.write_units(self.units)
        return self.units

    def _load(
        self, chunk: int, report: Callable[[int], None] = lambda done: None
    ) -> tuple[np.ndarray, np.ndarray]:
        """A chunk from the disk, or harvested (and stored)."""
        for store in (self.store, self.spool):
            if store is not None and (found := store.read(chunk)) is not None:
                return found
        W = self.windows_per_chunk
        order = window_order(self.config.seed, len(self.windows.train_WS), chunk * W, W)
        token_WS = self.windows.train_WS[order]
        n = int(self.windows.valid(token_WS).sum())
        shape = (self.cfg.n_layers, n, self.cfg.d_model)
        dtype = DTYPES[self.config.dtype]
        read_LND, write_LND = np.empty(shape, dtype), np.empty(shape, dtype)
        at = 0
        rows = self.harvested(token_WS, self._ready(), self.config.dtype)
        for read_LTD, write_LTD in rows:
            end = at + read_LTD.shape[1]
            read_LND[:, at:end], write_LND[:, at:end] = read_LTD, write_LTD
            at = end
            report(at)
        read_LND, write_LND = read_LND[:, :at], write_LND[:, :at]  # no outliers
        if self.store is not None and not self.read_only:
            self.store.write(chunk, read_LND, write_LND)
        return read_LND, write_LND

    def close(self) -> None:
        """Delete the spool: the run is over."""
        if self.spool is not None:
            self.spool.remove()
