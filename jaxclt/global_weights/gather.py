"""Co-activation over text: windows in, sums out, with a state on disk.

text --windows--> TokenWindows --statistics--> Coactivation

Statistics are gathered in batches of windows, added up on the host, and, with a `state`
directory, kept there now and then: an interrupted run goes on where it was.
"""

from __future__ import annotations

import dataclasses
import hashlib
import os
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from jaxclt.clt.coder import Dictionary
from jaxclt.clt.sites import reads_past_norm
from jaxclt.clt.subset import Subset
from jaxclt.errors import InputError, options_of
from jaxclt.global_weights.attention import Head
from jaxclt.global_weights.build import bound_of
from jaxclt.global_weights.files import load_statistics, save_statistics
from jaxclt.global_weights.sparse import check_size, sparse_sums
from jaxclt.global_weights.statistics import (
    Coactivation,
    Plan,
    Sums,
    add_sums,
    encoders,
    sums_of,
)
from jaxclt.io.model import Model
from jaxclt.lm.config import LMConfig
from jaxclt.runs.kept import State, refuse_other
from jaxclt.runs.pace import logged
from jaxclt.text.features import Features, choose_features
from jaxclt.text.windows import (
    BATCH_TOKENS,
    Data,
    Mask,
    TokenWindows,
    batches,
    read_windows,
)

__all__ = ["CoactivationOptions", "PassOptions", "coactivation", "joined"]

WHOLE, PARTIAL = "statistics.npz", "partial.npz"  # of all windows, of some
FLUSH_TOKENS = 16_384  # positions whose sums are added in the model's dtype
DENSE_FEATURES = 8192  # more are held sparsely unless asked otherwise


@dataclasses.dataclass(frozen=True, kw_only=True)
class PassOptions:
    """Which features a pass over text is about, and which text.

    Attributes:
      features: which, see `choose_features`.
      mask: which positions count, see `read_windows`.
      tokens: positions that count to take from a text source.
      context: positions of a window cut from a text source.
    """

    features: Features = "top:4096"
    mask: Mask = None
    tokens: int = 200_000
    context: int = 256


@dataclasses.dataclass(frozen=True, kw_only=True)
class CoactivationOptions(PassOptions):
    """What to sum up, see `PassOptions` too.

    Dense sums of U features take 12 U^2 bytes (20 U^2 where encoders read after the
    norm).

    Attributes:
      sparse: hold only pairs that ever fire together; None: above 8,192 features.
      heads: (layer, head) pairs that get sums of their own.
      input_tokens: token ids whose embeddings count as sources, or a number of the
        most frequent ones.
      output_tokens: likewise tokens whose logits count as targets; costs the
        unembedding.
      shard: (i, n) takes every n-th window from the i-th on, the same features for all
        only if they are given by name or measured on the same windows.
    """

    sparse: bool | None = None
    heads: Sequence[Head] = ()
    input_tokens: int | Sequence[int] | np.ndarray = 0
    output_tokens: int | Sequence[int] | np.ndarray = 0
    shard: tuple[int, int] = (0, 1)


def coactivation(
    model: Model,
    dictionary: Dictionary,
    data: Data | TokenWindows,
    *,
    state: str | os.PathLike[str] | None = None,
    on_stage: Callable[[str, int, int], None] | None = None,
    **options: Any,
) -> Coactivation:
    """Which features fire together on text: E[a_i 1(a_j)], E[a_i a_j], E[a_j].

    Circuit Tracing (2025), section 4. Sums are over the positions that count, as
    sources and as targets, in float64; `jaxclt.global_weights.statistics.merge` joins
    those of several streams or machines.

    Args:
      model: from `load_model`, in float32.
      dictionary: from `load_dictionary`; not neurons, whose gates depend on the prompt.
      data: a text source or windows, see `read_windows`.
      state: directory to keep sums in; a second call with the same arguments goes on.
      on_stage: progress, (what, positions done, positions in all); to the log if not
        given.
      **options: fields of `CoactivationOptions`, for example ``features="top:4096"``.

    Raises:
      InputError: for data, features or heads that do not fit, or a `state` of another
        run.
    """
    asked = options_of(CoactivationOptions, "coactivation", options)
    on_stage, on, cfg = on_stage or logged(), bound_of(dictionary, model), model.cfg
    _check_heads(asked.heads, cfg)
    every = read_windows(
        model,
        data,
        mask=asked.mask,
        tokens=asked.tokens,
        context=asked.context,
        on_tokens=partial(on_stage, "tokens"),
    )
    windows = every.take(slice(asked.shard[0], None, asked.shard[1]))
    identity = {
        "model": model.hash,
        "dictionary": dictionary.hash,
        "windows": windows.digest,
        "features": _named(asked.features),
        "heads": [list(head) for head in asked.heads],
        "input_tokens": _named(asked.input_tokens),
        "output_tokens": _named(asked.output_tokens),
        "sparse": asked.sparse,
    }
    folder = None if state is None else Path(state)
    kept, first = _load(folder, identity)
    if kept is not None:
        found = kept
    else:
        # Features and tokens are chosen on all windows, so that shards agree.
        on_tokens = partial(on_stage, "features")
        found = Coactivation(
            subset=choose_features(model, dictionary, asked.features, every, on_tokens),
            scaled=reads_past_norm(on.coder.site),
            sums={},
            heads=tuple((int(layer), int(head)) for layer, head in asked.heads),
            input_Y=_tracked(every, asked.input_tokens, cfg.d_vocab),
            output_Y=_tracked(every, asked.output_tokens, cfg.d_vocab),
        )
    subset, n = found.subset, len(windows.token_WS)
    thin = asked.sparse
    if thin is None:
        thin = len(subset) > DENSE_FEATURES
    token_Ys = [
        jnp.asarray(x) if len(x) else None for x in (found.input_Y, found.output_Y)
    ]
    if thin and (found.heads or any(x is not None for x in token_Ys)):
        raise InputError(
            "heads and tokens are only gathered for a dense subset: choose one, for "
            "example --features top:4096"
        )
    plan = Plan(lm=cfg, coder=on.coder, starts=subset.starts, heads=found.heads)
    enc, sums = encoders(on, subset), _Flushed(found.sums)
    keep = State(None if folder is None else folder / PARTIAL)
    keep.at = first

    def save(path: Path) -> None:
        save_statistics(path, found, identity=identity, windows=first)

    batch = BATCH_TOKENS // 2 if thin else BATCH_TOKENS
    for token_WS, mask_WS, done in batches(windows, first, batch):
        args = model.params, enc, token_WS, mask_WS
        if thin:
            sums.total = joined(sums.total, sparse_sums(*args, plan=plan))
            check_size(sums.total)
        else:
            sums.add(sums_of(*args, *token_Ys, plan=plan), token_WS.size)
        if not sums.since:
            # Kept between two flushes, sums would be added up in another order.
            found, first = dataclasses.replace(found, sums=sums.total), done
        counted = int(windows.mask_WS[:done].sum())
        report = partial(on_stage, "statistics", counted, windows.n_tokens)
        keep.step(first, save, report)
    found, first = dataclasses.replace(found, sums=sums.flush()), n
    if folder is not None and not (folder / WHOLE).is_file():
        save(folder / WHOLE)
    keep.remove()
    return found


def _check_heads(heads: Sequence[Head], cfg: LMConfig) -> None:
    for layer, head in heads:
        if not (1 <= layer < cfg.n_layers and 0 <= head < cfg.n_heads):
            raise InputError(
                f"head {layer}:{head}: layers go from 1 (nothing is written below it "
                f"in 0) to {cfg.n_layers - 1}, heads to {cfg.n_heads - 1}"
            )


def _load(
    folder: Path | None, identity: dict[str, Any]
) -> tuple[Coactivation | None, int]:
    """What an earlier call left, and how many windows that was.

    Raises:
      InputError: if it is of other arguments.
    """
    for name in (WHOLE, PARTIAL):
        if folder is not None and (folder / name).is_file():
            found, more = load_statistics(folder / name)
            refuse_other(folder, more.get("identity", {}), identity)
            return found, more.get("windows", 0)
    return None, 0


def _named(x: Any) -> Any:
    """An argument as JSON, long ones by their digest."""
    if isinstance(x, Subset):
        x = np.stack([x.layer_U, x.feature_U], 1)
    if isinstance(x, str | os.PathLike):
        file = Path(x)
        known = str(x) == "all" or str(x).startswith("top:")
        if not known and file.is_file():
            return hashlib.sha256(file.read_bytes()).hexdigest()
        return os.fspath(x)
    if isinstance(x, int):
        return x
    array = np.asarray(x, np.int64)
    return hashlib.sha256(array.tobytes()).hexdigest()


def _tracked(
    windows: TokenWindows, wanted: int | Sequence[int] | np.ndarray, V: int
) -> np.ndarray:
    """Ids of the tokens that are asked for, ascending."""
    if isinstance(wanted, int):
        count_V = np.bincount(windows.token_WS[windows.mask_WS], minlength=V)
        order = np.argsort(-count_V, kind="stable")[:wanted]
        return np.sort(order[count_V[order] > 0]).astype(np.int32)
    token_Y = np.unique(np.asarray(wanted, np.int64))
    if len(token_Y) and not 0 <= token_Y[0] <= token_Y[-1] < V:
        raise InputError(f"tokens to track must be in 0..{V - 1}")
    return token_Y.astype(np.int32)


class _Flushed:
    """Sums in the model's dtype on the device, flushed to float64 on the host."""

    def __init__(self, total: Sums) -> None:
        self.total, self.since = total, 0
        self._device: Sums | None = None

    def add(self, more: Sums, n_tokens: int) -> None:
        """Add the sums over `n_tokens` positions."""
        self._device = more if self._device is None else add_sums(self._device, more)
        jax.block_until_ready(self._device)
        self.since += n_tokens
        if self.since >= FLUSH_TOKENS:
            self.flush()

    def flush(self) -> Sums:
        """Everything so far, in float64."""
        if self._device is not None:
            self.total = joined(self.total, self._device)
            self._device, self.since = None, 0
        return self.total


def joined(total: Sums, more: Sums) -> Sums:
    """Two sums as one in float64, in place where the first one can be."""
    if not total:
        return jax.tree.map(lambda x: np.array(x, np.float64) if _plain(x) else x, more)
    for name, value in more.items():
        if not isinstance(value, tuple):
            total[name] = _added(total[name], value)
            continue
        # Matrix by matrix: two copies of all sparse ones may not fit.
        tiles = list(total.pop(name))
        for i, tile in enumerate(value):
            tiles[i] = _added(tiles[i], tile)
        total[name] = tuple(tiles)
    return total


def _plain(x: Any) -> bool:
    return isinstance(x, np.ndarray | Array | np.generic | float)


def _added(total: Any, more: Any) -> Any:
    if not _plain(more):
        return total + more
    if isinstance(total, np.ndarray) and total.ndim and total.flags.writeable:
        total += np.asarray(more)  # in place: sums may be most of the memory
        return total
    return np.asarray(total + np.asarray(more, np.float64))
