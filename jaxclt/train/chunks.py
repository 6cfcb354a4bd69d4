"""Shuffled chunks of activations: a pure function of (seed, position).

A chunk is what the model does on some hundred random windows, its tokens shuffled by
one permutation, layers together. Which windows, and the order of tokens, follow from
the seed and the chunk's number, so the exact place in the data is three integers, and a
resumed run rebuilds its chunk instead of storing gigabytes. A chunk may be used more
than once (`reuse`), each time in another order: on a CPU harvesting costs as much as
training.

A `store` keeps harvested chunks on disk, one file each, with a manifest that lists
their checksums; runs on the same data share it.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import safetensors.numpy

from jaxclt.clt.config import ReadSite
from jaxclt.errors import InputError
from jaxclt.io.atomic import atomic_path
from jaxclt.lm.config import LMConfig
from jaxclt.train.harvest import harvest
from jaxclt.train.normalise import Moments, Scales, merge_moments, scales_of
from jaxclt.train.text import PAD, Windows, valid_rows
from jaxclt.types import LMParams

__all__ = ["ChunkConfig", "Chunks", "Position", "rows_of", "window_order"]

_DTYPE = {"float32": np.dtype(np.float32), "bfloat16": np.dtype(ml_dtypes.bfloat16)}


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


def rows_of(
    params: LMParams,
    token_WS: np.ndarray,
    special: frozenset[int],
    scales: Scales | None,
    *,
    cfg: LMConfig,
    config: ChunkConfig,
    dtype: str,
    bound_L: np.ndarray | None = None,
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Valid reads and writes [L, T, D], a few windows at a time.

    Some models make further attention sinks in the middle of a text (a newline, a
    bracket), whose MLP outputs are tens of times larger than any other: a handful of
    tokens then is most of a layer's variance, its scale and its loss. Such tokens are
    left out like the first position: those above `bound_L` anywhere, by default
    ``scales.bound_L``.
    """
    W = config.windows_per_call
    if bound_L is None and scales is not None:
        bound_L = np.asarray(scales.bound_L)
    for start in range(0, len(token_WS), W):
        part_WS = token_WS[start : start + W]
        full_WS = np.full((W, part_WS.shape[1]), PAD, np.int32)
        full_WS[: len(part_WS)] = part_WS
        read_LTD, write_LTD, norm_LT = harvest(
            params, jnp.asarray(full_WS), scales, cfg=cfg, site=config.site, dtype=dtype
        )
        keep_T = np.flatnonzero(valid_rows(full_WS, special))
        if bound_L is not None:
            fits_LT = np.asarray(norm_LT)[:, keep_T] <= bound_L[:, None]
            keep_T = keep_T[fits_LT.all(0)]
        yield np.asarray(read_LTD)[:, keep_T], np.asarray(write_LTD)[:, keep_T]


class Chunks:
    """Chunks of one run: harvested when asked for, or read from a store."""

    def __init__(
        self,
        params: LMParams,
        cfg: LMConfig,
        windows: Windows,
        config: ChunkConfig,
        *,
        model_hash: str = "",
        store: Path | None = None,
    ) -> None:
        self.params, self.cfg, self.windows, self.config = params, cfg, windows, config
        self.scales: Scales | None = None
        self.store = store
        self.identity = {
            "model": model_hash,
            "windows": windows.digest,
            "config": {
                k: v for k, v in dataclasses.asdict(config).items() if k != "reuse"
            },
        }
        self._held: tuple[tuple[int, int], np.ndarray, np.ndarray] | None = None
        self._chunk: tuple[int, np.ndarray, np.ndarray] | None = None
        if store is not None:
            self._check_store(store)

    @property
    def windows_per_chunk(self) -> int:
        """Windows of a chunk; all of them when there are fewer."""
        size = self.windows.train_WS.shape[1]
        return max(1, self.config.chunk_tokens // size)

    def measure(
        self,
        n_tokens: int,
        on_tokens: Callable[[int, int], None] = lambda done, total: None,
    ) -> Scales:
        """Normalisation from at least `n_tokens` training tokens, if there are.

        Args:
          n_tokens: how many to look at.
          on_tokens: progress.
        """
        read: Moments | None = None
        write: Moments | None = None
        order = window_order(self.config.seed, len(self.windows.train_WS), 0,
                             len(self.windows.train_WS))  # fmt: skip
        token_WS = self.windows.train_WS[order]
        every = partial(
            rows_of,
            self.params,
            special=self.windows.special,
            scales=None,
            cfg=self.cfg,
            config=self.config,
            dtype="float32",
        )
        first = token_WS[: self.config.windows_per_call]
        norm_LT = np.concatenate(
            [np.linalg.norm(w, axis=-1) for _, w in every(token_WS=first)], axis=1
        )
        if not norm_LT.shape[1]:
            raise InputError("the data has no token to train on: all are special")
        bound_L = bound(norm_LT, self.config.outlier)
        for read_LTD, write_LTD in every(token_WS=token_WS, bound_L=bound_L):
            if not read_LTD.shape[1]:
                continue
            read = merge_moments(read, Moments.of(read_LTD))
            write = merge_moments(write, Moments.of(write_LTD))
            on_tokens(min(read.n, n_tokens), n_tokens)
            if read.n >= n_tokens:
                break
        if read is None or write is None:
            raise InputError("the data has no token to train on: all are special")
        return scales_of(read, write, bound_L)

    def rows(self, chunk: int, turn: int) -> tuple[np.ndarray, np.ndarray]:
        """Shuffled reads and writes [L, N, D] of a chunk, normalised."""
        if self._held is None or self._held[0] != (chunk, turn):
            self._held = None  # two chunks need not fit into memory
            if self._chunk is None or self._chunk[0] != chunk:
                self._chunk = None
                self._chunk = (chunk, *self._load(chunk))
            _, read_LND, write_LND = self._chunk
            key = jax.random.fold_in(jax.random.key(self.config.seed + 1), chunk)
            key = jax.random.fold_in(key, turn)
            order_N = np.asarray(jax.random.permutation(key, read_LND.shape[1]))
            if self.config.reuse == 1:
                self._chunk = None
            self._held = ((chunk, turn), read_LND[:, order_N], write_LND[:, order_N])
        return self._held[1], self._held[2]

    def batch(
        self, at: Position, n_tokens: int
    ) -> tuple[np.ndarray, np.ndarray, Position]:
        """The next reads and writes [L, n_tokens, D], and where the one after starts.

        Rows that do not fill a batch at the end of a pass are left out of it.

        Raises:
          InputError: if a chunk is smaller than a batch.
        """
        while True:
            read_LND, write_LND = self.rows(at.chunk, at.turn)
            end = at.offset + n_tokens
            if end <= read_LND.shape[1]:
                here = slice(at.offset, end)
                after = Position(at.chunk, at.turn, end)
                return read_LND[:, here], write_LND[:, here], after
            if at.offset == 0:
                raise InputError(
                    f"--batch-tokens {n_tokens} is more than the "
                    f"{read_LND.shape[1]} tokens of a chunk: raise --chunk-tokens or "
                    "give more text"
                )
            last = at.turn + 1 == self.config.reuse
            at = Position(at.chunk + 1) if last else Position(at.chunk, at.turn + 1)

    def _load(self, chunk: int) -> tuple[np.ndarray, np.ndarray]:
        if self.store is not None:
            found = self._read_stored(self.store, chunk)
            if found is not None:
                return found
        W = self.windows_per_chunk
        order = window_order(self.config.seed, len(self.windows.train_WS), chunk * W, W)
        token_WS = self.windows.train_WS[order]
        n = int(valid_rows(token_WS, self.windows.special).sum())
        shape = (self.cfg.n_layers, n, self.cfg.d_model)
        dtype = _DTYPE[self.config.dtype]
        read_LND, write_LND = np.empty(shape, dtype), np.empty(shape, dtype)
        at = 0
        for read_LTD, write_LTD in rows_of(
            self.params,
            token_WS,
            self.windows.special,
            self.scales,
            cfg=self.cfg,
            config=self.config,
            dtype=self.config.dtype,
        ):
            end = at + read_LTD.shape[1]
            read_LND[:, at:end], write_LND[:, at:end] = read_LTD, write_LTD
            at = end
        read_LND, write_LND = read_LND[:, :at], write_LND[:, :at]  # no outliers
        if self.store is not None:
            self._write_stored(self.store, chunk, read_LND, write_LND)
        return read_LND, write_LND

    # -- store -------------------------------------------------------------------------

    def _manifest(self, store: Path) -> dict:
        file = store / "manifest.json"
        if not file.is_file():
            return {"identity": self.identity, "files": {}}
        return json.loads(file.read_text("utf-8"))

    def _check_store(self, store: Path) -> None:
        found = self._manifest(store)["identity"]
        for name, ours in self.identity.items():
            if found[name] != ours:
                raise InputError(
                    f"--store {store} holds activations of another {name}: give "
                    "another folder"
                )

    def _record(self, store: Path, file: Path) -> None:
        manifest = self._manifest(store)
        with file.open("rb") as stream:
            digest = hashlib.file_digest(stream, "sha256").hexdigest()
        manifest["files"][file.name] = {"sha256": digest, "bytes": file.stat().st_size}
        with atomic_path(store / "manifest.json") as temporary:
            temporary.write_text(json.dumps(manifest, indent=1), "utf-8")

    def _checked(self, store: Path, name: str) -> Path | None:
        entry = self._manifest(store)["files"].get(name)
        if entry is None:
            return None
        file = store / name
        if file.is_file() and file.stat().st_size == entry["bytes"]:
            with file.open("rb") as stream:
                digest = hashlib.file_digest(stream, "sha256").hexdigest()
            if digest == entry["sha256"]:
                return file
        raise InputError(
            f"{file} is damaged (its checksum differs from manifest.json): delete the "
            "file and its entry, and it is harvested again"
        )

    def _write_stored(
        self, store: Path, chunk: int, read_LND: np.ndarray, write_LND: np.ndarray
    ) -> None:
        file = store / f"chunk_{chunk:06d}.safetensors"
        with atomic_path(file) as temporary:
            # safetensors writes the memory, whatever the strides say
            tensors = {
                "read_LND": np.ascontiguousarray(read_LND),
                "write_LND": np.ascontiguousarray(write_LND),
            }
            safetensors.numpy.save_file(tensors, temporary)
        self._record(store, file)

    def _read_stored(
        self, store: Path, chunk: int
    ) -> tuple[np.ndarray, np.ndarray] | None:
        file = self._checked(store, f"chunk_{chunk:06d}.safetensors")
        if file is None:
            return None
        found = safetensors.numpy.load_file(file)
        return found["read_LND"], found["write_LND"]

    def normalisation(
        self,
        n_tokens: int,
        on_tokens: Callable[[int, int], None] = lambda done, total: None,
    ) -> Scales:
        """`measure`, or what the store holds; from then on chunks are normalised."""
        names = [f.name for f in dataclasses.fields(Scales)]
        file = None
        if self.store is not None:
            file = self._checked(self.store, "scales.safetensors")
        if file is not None:
            found = safetensors.numpy.load_file(file)
            self.scales = Scales(**{name: jnp.asarray(found[name]) for name in names})
            return self.scales
        self.scales = self.measure(n_tokens, on_tokens)
        if self.store is not None:
            file = self.store / "scales.safetensors"
            with atomic_path(file) as temporary:
                safetensors.numpy.save_file(
                    {name: np.asarray(getattr(self.scales, name)) for name in names},
                    temporary,
                )
            self._record(self.store, file)
        return self.scales
