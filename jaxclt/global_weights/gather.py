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
from jaxclt.clt.subset import Subset
from jaxclt.errors import InputError
from jaxclt.global_weights.attention import Head
from jaxclt.global_weights.files import load_statistics, save_statistics
from jaxclt.global_weights.sparse import check_size, sparse_sums
from jaxclt.global_weights.statistics import (
    Coactivation,
    Encoders,
    Plan,
    Sums,
    add_sums,
    encoders,
    sums_of,
)
from jaxclt.io.model import Model
from jaxclt.runs.kept import State, refuse_other
from jaxclt.runs.pace import logged
from jaxclt.text.features import Features, bound_of, choose_features
from jaxclt.text.windows import (
    BATCH_TOKENS,
    Data,
    Mask,
    TokenWindows,
    batches,
    read_windows,
)
from jaxclt.types import LMParams

__all__ = ["coactivation"]

WHOLE, PARTIAL = "statistics.npz", "partial.npz"  # of all windows, of some
FLUSH_TOKENS = 16_384  # positions whose sums are added in the model's dtype
DENSE_FEATURES = 8192  # more are held sparsely unless asked otherwise


def coactivation(
    model: Model,
    dictionary: Dictionary,
    data: Data | TokenWindows,
    *,
    features: Features = "top:4096",
    mask: Mask = None,
    tokens: int = 200_000,
    context: int = 256,
    sparse: bool | None = None,
    heads: Sequence[Head] = (),
    input_tokens: int | Sequence[int] | np.ndarray = 0,
    output_tokens: int | Sequence[int] | np.ndarray = 0,
    shard: tuple[int, int] = (0, 1),
    state: str | os.PathLike[str] | None = None,
    on_stage: Callable[[str, int, int], None] | None = None,
) -> Coactivation:
    """Which features fire together on text: E[a_i 1(a_j)], E[a_i a_j], E[a_j].

    Circuit Tracing (2025), section 4. Sums are over the positions that count, as
    sources and as targets, in float64; `jaxclt.global_weights.statistics.merge` joins
    those of several streams or machines.

    Args:
      model: from `load_model`, in float32.
      dictionary: from `load_dictionary`; not neurons, whose gates depend on the prompt.
      data: a text source or windows, see `read_windows`.
      features: which, see `choose_features`. Dense sums of U features take 12 U^2 bytes
        (20 U^2 where encoders read after the norm).
      mask: which positions count, see `read_windows`.
      tokens: positions that count to take from a text source.
      context: positions of a window cut from a text source.
      sparse: hold only pairs that ever fire together; None: above 8,192 features.
      heads: (layer, head) pairs that get sums of their own.
      input_tokens: token ids whose embeddings count as sources, or how many of the most
        frequent ones.
      output_tokens: likewise tokens whose logits count as targets; costs the
        unembedding.
      shard: (i, n) takes every n-th window from the i-th on, the same features for all
        only if they are given by name or measured on the same windows.
      state: directory to keep sums in; a second call with the same arguments goes on.
      on_stage: progress, (what, positions done, positions in all); to the log if not
        given.

    Raises:
      InputError: for data, features or heads that do not fit, or a `state` of another
        run.
    """
    on_stage = on_stage or logged()
    on = bound_of(dictionary, model)
    for layer, head in heads:
        if not (1 <= layer < model.cfg.n_layers and 0 <= head < model.cfg.n_heads):
            raise InputError(
                f"head {layer}:{head}: layers go from 1 (nothing is written below it "
                f"in 0) to {model.cfg.n_layers - 1}, heads to {model.cfg.n_heads - 1}"
            )
    windows = read_windows(
        model,
        data,
        mask=mask,
        tokens=tokens,
        context=context,
        on_tokens=partial(on_stage, "tokens"),
    )
    # Features and tokens are chosen on all windows, so that shards agree.
    chosen = _Choice(model, windows, features, input_tokens, output_tokens, on_stage)
    windows = windows.take(slice(shard[0], None, shard[1]))
    identity = {
        "model": model.hash,
        "dictionary": dictionary.hash,
        "windows": windows.digest,
        "features": _told(features),
        "heads": [list(head) for head in heads],
        "input_tokens": _told(input_tokens),
        "output_tokens": _told(output_tokens),
        "sparse": sparse,
    }
    folder = None if state is None else Path(state)
    kept, first = _load(folder, identity)
    subset = kept.subset if kept else chosen.subset(dictionary)
    thin = len(subset) > DENSE_FEATURES if sparse is None else sparse
    if thin and (heads or chosen.asks_tokens):
        raise InputError(
            "heads and tokens are only gathered for a dense subset: choose one, for "
            "example --features top:4096"
        )
    found = kept or Coactivation(
        subset=subset,
        scaled=on.coder.site != "resid_mid",
        sums={},
        heads=tuple((int(layer), int(head)) for layer, head in heads),
        input_Y=chosen.tokens(input_tokens),
        output_Y=chosen.tokens(output_tokens),
    )
    plan = Plan(lm=model.cfg, coder=on.coder, starts=subset.starts, heads=found.heads)
    gathering = _Gathering(model.params, encoders(on, subset), plan)
    gathering.total = found.sums
    keep = State(None if folder is None else folder / PARTIAL)
    keep.at = first

    def save(path: Path) -> None:
        save_statistics(path, found, identity=identity, windows=first)

    batch = BATCH_TOKENS // 2 if thin else BATCH_TOKENS
    for token_WS, mask_WS, done in batches(windows, first, batch):
        if thin:
            gathering.add_sparse(token_WS, mask_WS)
        else:
            gathering.add(token_WS, mask_WS, found.input_Y, found.output_Y)
        if not gathering.since:
            # Kept between two flushes, sums would be added up in another order.
            found, first = dataclasses.replace(found, sums=gathering.total), done
        counted = int(windows.mask_WS[:done].sum())
        keep.step(
            first, save, partial(on_stage, "statistics", counted, windows.n_tokens)
        )
    found, first = (
        dataclasses.replace(found, sums=gathering.flush()),
        len(windows.token_WS),
    )
    if folder is not None and not (folder / WHOLE).is_file():
        save(folder / WHOLE)
    keep.remove()
    return found


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


def _told(x: Any) -> Any:
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


class _Choice:
    """Features and tokens that arguments name, chosen when they are needed."""

    def __init__(
        self,
        model: Model,
        windows: TokenWindows,
        features: Features,
        input_tokens: Any,
        output_tokens: Any,
        on_stage: Callable[[str, int, int], None],
    ) -> None:
        self.model, self.windows, self.features = model, windows, features
        self.asks_tokens = any(
            np.size(x) and (np.ndim(x) > 0 or int(x) > 0)
            for x in (input_tokens, output_tokens)
        )
        self.on_stage = on_stage

    def subset(self, dictionary: Dictionary) -> Subset:
        return choose_features(
            self.model,
            dictionary,
            self.features,
            self.windows,
            partial(self.on_stage, "features"),
        )

    def tokens(self, wanted: int | Sequence[int] | np.ndarray) -> np.ndarray:
        """Ids, ascending."""
        V = self.model.cfg.d_vocab
        if isinstance(wanted, int):
            token_N = self.windows.token_WS[self.windows.mask_WS]
            count_V = np.bincount(token_N, minlength=V)
            order = np.argsort(-count_V, kind="stable")[:wanted]
            return np.sort(order[count_V[order] > 0]).astype(np.int32)
        token_Y = np.unique(np.asarray(wanted, np.int64))
        if len(token_Y) and not 0 <= token_Y[0] <= token_Y[-1] < V:
            raise InputError(f"tokens to track must be in 0..{V - 1}")
        return token_Y.astype(np.int32)


class _Gathering:
    """Sums in the model's dtype on the device, flushed to float64 on the host."""

    def __init__(self, params: LMParams, enc: Encoders, plan: Plan) -> None:
        self.params, self.enc, self.plan = params, enc, plan
        self.total: Sums = {}
        self.device: Sums | None = None
        self.since = 0

    def add(
        self,
        token_WS: np.ndarray,
        mask_WS: np.ndarray,
        input_Y: np.ndarray,
        output_Y: np.ndarray,
    ) -> None:
        found = sums_of(
            self.params,
            self.enc,
            token_WS,
            mask_WS,
            jnp.asarray(input_Y) if len(input_Y) else None,
            jnp.asarray(output_Y) if len(output_Y) else None,
            plan=self.plan,
        )
        self.device = found if self.device is None else add_sums(self.device, found)
        jax.block_until_ready(self.device)
        self.since += token_WS.size
        if self.since >= FLUSH_TOKENS:
            self.flush()

    def add_sparse(self, token_WS: np.ndarray, mask_WS: np.ndarray) -> None:
        found = sparse_sums(self.params, self.enc, token_WS, mask_WS, plan=self.plan)
        self._add(found)
        check_size(self.total)

    def flush(self) -> Sums:
        """Everything so far, in float64."""
        if self.device is not None:
            self._add(self.device)
            self.device, self.since = None, 0
        return self.total

    def _add(self, more: Sums) -> None:
        if not self.total:
            self.total = jax.tree.map(
                lambda x: np.array(x, np.float64) if _plain(x) else x, more
            )
            return
        for name, value in more.items():
            if not isinstance(value, tuple):
                self.total[name] = _added(self.total[name], value)
                continue
            # Matrix by matrix: two copies of all sparse ones may not fit.
            tiles = list(self.total.pop(name))
            for i, tile in enumerate(value):
                tiles[i] = _added(tiles[i], tile)
            self.total[name] = tuple(tiles)


def _plain(x: Any) -> bool:
    return isinstance(x, np.ndarray | Array | np.generic | float)


def _added(total: Any, more: Any) -> Any:
    if not _plain(more):
        return total + more
    if isinstance(total, np.ndarray) and total.ndim and total.flags.writeable:
        total += np.asarray(more)  # in place: sums may be most of the memory
        return total
    return np.asarray(total + np.asarray(more, np.float64))
