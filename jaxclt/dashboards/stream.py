"""Examples of what features respond to, from one streaming pass over text.

    windows --model, layer by layer--> Peaks of a batch --> Seen --> Examples

The device reduces every feature and window to its peak and the excerpt around it, and
the host keeps the best of them while the device works on the next batch. Windows are
ranked in two ways: by the largest activation, and by a random number that depends on
layer, feature, window and seed alone, so that the windows drawn are a uniform sample of
those with the feature, whatever the batches and subsets. Where activations have both
signs, the best of both sides of zero are kept, and drawn windows are shown at the
larger of their peaks.

Memory does not grow with the text, but for its tokens and one bit for every feature and
window. A pass with a `state` directory goes on where it was killed, bit for bit.
"""

from __future__ import annotations

import dataclasses
import hashlib
import os
from collections.abc import Callable
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from jaxclt.clt.coder import Loaded
from jaxclt.clt.subset import Subset
from jaxclt.dashboards.examples import Examples, by_size
from jaxclt.dashboards.state import Best, Histogram, Newcomers, Seen
from jaxclt.errors import InputError, check_at_least, check_finite
from jaxclt.files.json_file import COUNT, json_schema, record
from jaxclt.files.json_text import to_json
from jaxclt.files.npz import Must, check_array, open_npz, write_npz
from jaxclt.graph.memory import host_available_bytes
from jaxclt.precision import jit
from jaxclt.runs.kept import State, refuse_other
from jaxclt.text.peaks import Batch, Peaks, batch_peaks
from jaxclt.text.windows import BATCH_TOKENS, TokenWindows, batches
from jaxclt.types import LMParams

__all__ = ["STATE", "ExampleOptions", "Sizes", "digest_of", "gather_examples"]
__all__ += ["is_signed"]

STATE = "seen.npz"  # of a pass that is not over, in its state directory
_META = json_schema(record({"identity": {"type": "object"}, "windows": COUNT}))
_RANGES = {  # of what is looked up by
    "slot_UK": Must("int", "UK", 0, "K"),
    "window_UK": Must("int", "UK", -1, "W"),
    "pos_UK": Must("int", "UK", 0, "S"),
    "start_UK": Must("int", "UK", 0, "S"),
    "power_U": Must("int", "U", -(1 << 20), 1 << 20),
    "value_UK": Must("float", "UK"),
    "act_UKC": Must("float", "UKC"),
}

_peaks_of = jit(batch_peaks, static_argnames=("context", "signed", "narrowed"))


@dataclasses.dataclass(frozen=True, kw_only=True)
class ExampleOptions:
    """Which examples to keep of each feature.

    Raises:
      InputError: for a number out of its range.
    """

    excerpt: int = 32
    """Tokens of an example, three quarters of them before its peak."""
    top: int = 16
    """Examples with the largest activations, of each feature."""
    drawn: int = 24
    """Examples drawn at random among the windows where a feature is active."""
    bins: int = 40
    """Bins of a histogram, an even number; its range is a power of two."""
    histogram_every: int = 8
    """Histograms take one window in this many; counts and extremes take all."""
    seed: int = 0
    """Of the examples drawn."""
    batch_tokens: int = BATCH_TOKENS
    """Tokens that go through the model together."""

    def __post_init__(self) -> None:
        check_at_least(
            1,
            top=self.top,
            excerpt=self.excerpt,
            histogram_every=self.histogram_every,
            batch_tokens=self.batch_tokens,
        )
        check_at_least(0, drawn=self.drawn)
        check_at_least(2, bins=self.bins)
        check_finite(seed=self.seed)
        if self.bins % 2:
            raise InputError(
                f"--bins {self.bins}: give an even number, they merge in pairs"
            )


@dataclasses.dataclass(frozen=True, kw_only=True)
class Sizes:
    """What the memory of a pass depends on.

    Attributes:
      options: what is kept.
      n_features: in all, U.
      width: the most of one layer.
      n_layers: of the model.
      n_windows: of the text.
      size: tokens of a window.
      sides: of zero that activations are on, 1 or 2.
      itemsize: bytes of an activation.
    """

    options: ExampleOptions
    n_features: int
    width: int
    n_layers: int
    n_windows: int
    size: int
    sides: int = 1
    itemsize: int = 4

    @property
    def state_bytes(self) -> int:
        """Bytes of everything that is kept of the windows so far."""
        item, options = self.itemsize, self.options
        # Activations and their peak; key, slot, window, position, start.
        excerpt = (options.excerpt + 1) * item + (4 + 2 + 3 * 4)
        feature = 8 * options.bins + 8 + 4 + 2 * item + -(-self.n_windows // 8)
        n_top = self.sides * options.top
        kept = (n_top + options.drawn) * excerpt + n_top * (item - 4)
        return self.n_features * (kept + feature)

    @property
    def batch_bytes(self) -> int:
        """Bytes of what two batches, one seen and one on its way, add to it."""
        item, options = self.itemsize, self.options
        W = min(self.n_windows, max(1, options.batch_tokens // self.size))
        peaks = W * self.sides * ((options.excerpt + 1) * item + 2 * 4)
        peaks += W * 4 + 4 + 2 * item
        sampled = -(-W // options.histogram_every) * self.size * item
        one_layer = 3 * W * self.size * self.width * item
        return 2 * self.n_layers * self.width * (peaks + sampled) + one_layer

    def check(self, free: int) -> None:
        """Refuse a pass that does not fit.

        Raises:
          InputError: if it takes more than `free` bytes.
        """
        # At the end both sides are ranked together, batches are over by then.
        ranked = self.state_bytes if self.sides > 1 else 0
        need = self.state_bytes + max(self.batch_bytes, ranked)
        if need > free:
            raise InputError(
                f"the examples of {self.n_features:,} features take "
                f"{need / 1e9:.3g} GB, {free / 1e9:.3g} GB are free: lower --drawn, "
                "--top or --excerpt, or name fewer --features"
            )


class _Places(NamedTuple):
    """Where features are among a layer's activations."""

    subset: Subset
    column_U: np.ndarray
    pick_LN: np.ndarray | None  # features of each column; None: all, in order
    width: int

    def of_features(self, x_LN: np.ndarray) -> np.ndarray:
        """What a layer's columns hold, by feature: [U, ..]."""
        return x_LN[self.subset.layer_U, ..., self.column_U]


def gather_examples(
    params: LMParams,
    encoder: Loaded,
    windows: TokenWindows,
    options: ExampleOptions | None = None,
    *,
    subset: Subset | None = None,
    state: str | os.PathLike[str] | None = None,
    identity: dict[str, Any] | None = None,
    on_tokens: Callable[[int, int], None] = lambda done, total: None,
) -> Examples:
    """Where features fire in text, see `Examples`.

    Counts, least and largest activations and `fired_UW` are of all positions that
    count. Positions that do not count have activation 0 in excerpts too. Equal
    activations of a window peak at the first, equal peaks rank by window.

    Args:
      params: the model.
      encoder: from `jaxclt.clt.coder.load`.
      windows: the text.
      options: what to keep.
      subset: the features; None for all.
      state: directory to keep the pass in; another call with the same arguments goes
        on, and at its end returns the same at once.
      identity: more that a `state` must agree on, such as hashes; JSON.
      on_tokens: progress, positions that count done and in all; first what an earlier
        call had done.

    Raises:
      InputError: for more memory than is free, or a `state` of another run.
    """
    options = options or ExampleOptions()
    n, S = windows.token_WS.shape
    signed = is_signed(encoder)
    subset = Subset.everything(encoder) if subset is None else subset
    places = _places(encoder, subset)
    sizes = Sizes(
        options=options,
        n_features=len(subset),
        width=places.width,
        n_layers=encoder.n_layers,
        n_windows=n,
        size=S,
        sides=1 + signed,
        itemsize=max(4, params.embed_VD.dtype.itemsize),
    )
    sizes.check(host_available_bytes())
    seen = _nothing(sizes)
    identity = (identity or {}) | {
        "windows": windows.digest,
        "features": digest_of(subset),
        "n_top": options.top,
        "n_drawn": options.drawn,
        "context": options.excerpt,
        "bins": options.bins,
        "histogram_every": options.histogram_every,
        "seed": options.seed,
    }
    keep = State(None if state is None else Path(state) / STATE)
    first = keep.at = _load(keep.path, seen, windows, identity)
    encoder, narrowed = _narrow(encoder, places.pick_LN)
    pick_LN = None if places.pick_LN is None else jnp.asarray(places.pick_LN)
    key, every = jax.random.key(options.seed), options.histogram_every
    waiting: tuple[Peaks, int, int] | None = None
    on_tokens(int(windows.mask_WS[:first].sum()), windows.n_tokens)

    def absorb(peaks: Peaks, start: int, done: int) -> None:
        _absorb(seen, places, peaks, start, done, every)
        counted = int(windows.mask_WS[:done].sum())
        save = partial(_save, seen=seen, identity=identity, windows=done)
        keep.step(done, save, lambda: on_tokens(counted, windows.n_tokens))
        if done == n:
            keep.save(done, save, now=True)

    for token_WS, mask_WS, done in batches(windows, first, options.batch_tokens):
        W = len(token_WS)
        start = first
        first = done
        sample_H = -start % every + every * np.arange(-(-W // every))
        batch = Batch(
            token_WS=jnp.asarray(token_WS),
            mask_WS=jnp.asarray(mask_WS),
            window_W=jnp.asarray(np.arange(start, start + W, dtype=np.uint32)),
            sample_H=jnp.asarray(np.minimum(sample_H, W - 1).astype(np.int32)),
        )
        peaks = _peaks_of(
            params,
            encoder,
            pick_LN,
            key,
            batch,
            context=options.excerpt,
            signed=signed,
            narrowed=narrowed,
        )
        if waiting is not None:  # while the device works on this batch
            absorb(*waiting)
        waiting = peaks, start, done
    if waiting is not None:
        absorb(*waiting)
    return _examples(seen, subset, windows, every)


def is_signed(encoder: Loaded) -> bool:
    """Whether a dictionary has activations below zero."""
    if encoder.coder.signed:
        return True
    theta_LF = encoder.coder.thresholds(encoder.weights.enc)
    return theta_LF is not None and bool((np.asarray(theta_LF) < 0).any())


def digest_of(subset: Subset) -> str:
    """Tells which features a pass is about."""
    place_U2 = np.stack([subset.layer_U, subset.feature_U], 1).astype(np.int32)
    return hashlib.sha256(place_U2.tobytes()).hexdigest()


def _places(encoder: Loaded, subset: Subset) -> _Places:
    if len(subset) == encoder.n_layers * encoder.n_features:
        return _Places(subset, subset.feature_U, None, encoder.n_features)
    starts = np.asarray(subset.starts, np.int32)
    width = int(np.diff(starts).max())
    column_U = np.arange(len(subset), dtype=np.int32) - starts[subset.layer_U]
    pick_LN = np.zeros((subset.n_layers, width), np.int32)
    pick_LN[subset.layer_U, column_U] = subset.feature_U
    return _Places(subset, column_U, pick_LN, width)


def _narrow(encoder: Loaded, pick_LN: np.ndarray | None) -> tuple[Loaded, bool]:
    """An encoder of some features only, where they do not compete with others."""
    enc = encoder.weights.enc
    if enc is None or encoder.coder.competes or pick_LN is None:
        return encoder, False
    layer_L1 = np.arange(len(pick_LN))[:, None]
    few = jax.tree.map(lambda x: x[layer_L1, pick_LN], enc)
    weights = dataclasses.replace(encoder.weights, enc=few)
    return dataclasses.replace(encoder, weights=weights), True


def _nothing(sizes: Sizes) -> Seen:
    U, options, dtype = sizes.n_features, sizes.options, f"f{sizes.itemsize}"
    top = partial(Best.empty, U, options.top, options.excerpt, dtype, dtype)
    return Seen(
        tops=tuple(top() for _ in range(sizes.sides)),
        drawn=Best.empty(U, options.drawn, options.excerpt, np.int32, dtype),
        histogram=Histogram.empty(U, options.bins, signed=sizes.sides > 1),
        count_U=np.zeros(U, np.int64),
        low_U=np.full(U, np.inf, dtype),
        high_U=np.full(U, -np.inf, dtype),
        fired_UW=np.zeros((U, -(-sizes.n_windows // 8)), np.uint8),
    )


def _absorb(
    seen: Seen, places: _Places, peaks: Peaks, start: int, done: int, every: int
) -> None:
    """Take in a batch: windows `start` to `done`, then the rows that pad it."""
    n, dtype = done - start, seen.low_U.dtype

    def each(x_LN: Array) -> np.ndarray:
        return places.of_features(np.asarray(x_LN))

    def of_sides(x_LZWN: Array) -> np.ndarray:
        return each(x_LZWN)[..., :n].swapaxes(0, 1)

    new = Newcomers(
        value_ZUW=of_sides(peaks.value_ZWN).astype(dtype),
        pos_ZUW=of_sides(peaks.pos_ZWN),
        start_ZUW=of_sides(peaks.start_ZWN),
        window_W=np.arange(start, done, dtype=np.int32),
        act_LZWCN=np.asarray(peaks.act_ZWCN),
        layer_U=places.subset.layer_U,
        column_U=places.column_U,
    )
    seen.add(
        new,
        each(peaks.priority_WN)[:, :n],
        each(peaks.count_N),
        each(peaks.low_N).astype(dtype),
        each(peaks.high_N).astype(dtype),
    )
    n_sampled = len(range(-start % every, n, every))
    sample_LHSN = np.asarray(peaks.sample_HSN)[:, :n_sampled]
    for layer, (a, b) in enumerate(pairwise(places.subset.starts)):
        if a < b and n_sampled:
            a_TN = sample_LHSN[layer].reshape(-1, sample_LHSN.shape[3])[:, : b - a]
            seen.histogram.add(a_TN.astype(dtype, copy=False), slice(a, b))


def _examples(
    seen: Seen, subset: Subset, windows: TokenWindows, every: int
) -> Examples:
    never_U = seen.count_U == 0
    sides = tuple(top.excerpts() for top in seen.tops)
    return Examples(
        layer_U=subset.layer_U,
        feature_U=subset.feature_U,
        token_WS=windows.token_WS,
        n_tokens=windows.n_tokens,
        count_U=seen.count_U,
        min_U=np.where(never_U, 0, seen.low_U).astype(seen.low_U.dtype),
        max_U=np.where(never_U, 0, seen.high_U).astype(seen.high_U.dtype),
        histogram_UB=seen.histogram.count_UB,
        edge_U2=seen.histogram.edges,
        top=by_size(sides),
        sides=sides if len(sides) > 1 else (),
        drawn=seen.drawn.excerpts(),
        fired_UW=seen.fired_UW,
        histogram_every=every,
    )


def _save(path: Path, *, seen: Seen, identity: dict[str, Any], windows: int) -> None:
    meta = to_json({"identity": identity, "windows": windows})
    write_npz(path, meta=np.asarray(meta), **seen.arrays())


def _load(
    path: Path | None, seen: Seen, windows: TokenWindows, identity: dict[str, Any]
) -> int:
    """Fill in what an earlier call left; how many of the windows that was.

    Raises:
      InputError: if it is of another run, or damaged.
    """
    if path is None or not path.is_file():
        return 0
    with open_npz(path, "cannot be read", "remove it to start again") as file:
        meta = file.json("meta", _META)
        refuse_other(path, meta["identity"], identity)
        W, S = windows.token_WS.shape
        for name, array in seen.arrays().items():
            file.fill(name, array)
            must = _RANGES.get(name.rpartition(".")[2])
            if must is not None:
                K = array.shape[-1]
                check_array(name, array, must, {"K": K, "W": W, "S": S})
        if meta["windows"] > W:
            raise ValueError("it has seen more windows than there are")
    return meta["windows"]
