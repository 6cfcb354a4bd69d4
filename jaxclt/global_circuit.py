"""The shell of the global circuit: text or token windows become global weights.

text --tokenizer--> windows --statistics--> Coactivation --build--> GlobalWeights
  --write_globals--> globals.npz, statistics.npz, report.json

Statistics are gathered in batches of windows, added up on the host, and, with a `state`
directory, kept there now and then: an interrupted run goes on where it was.
"""

from __future__ import annotations

import dataclasses
import hashlib
import itertools
import json
import os
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from jaxclt.clt.active import Dictionary
from jaxclt.clt.config import CLTConfig
from jaxclt.clt.store import DictionaryStore
from jaxclt.errors import InputError
from jaxclt.global_weights import build as building
from jaxclt.global_weights import ranking
from jaxclt.global_weights import weights as weights_of
from jaxclt.global_weights.attention import Head
from jaxclt.global_weights.build import build, virtual_blocks
from jaxclt.global_weights.inhibition import (
    inhibition_of,
    rows_of_weights,
    thresholds,
)
from jaxclt.global_weights.ranking import GlobalWeights, Kind
from jaxclt.global_weights.sparse import check_size, sparse_sums
from jaxclt.global_weights.statistics import (
    Coactivation,
    Encoders,
    Plan,
    Sums,
    add_sums,
    encoders,
    feature_sums,
    sums_of,
    watch,
)
from jaxclt.global_weights.subset import Subset
from jaxclt.global_weights.weights import (
    Strongest,
    embedding_weights,
    logit_weights,
    virtual_block,
)
from jaxclt.io.atomic import atomic_path
from jaxclt.io.global_file import (
    SavedGlobals,
    load_globals,
    load_statistics,
    save_globals,
    save_statistics,
)
from jaxclt.io.model import Model
from jaxclt.train.text import PAD, pack_windows, read_documents, valid_rows
from jaxclt.types import LMParams
from jaxclt.viewer.globals_page import globals_page

__all__ = [
    "Inhibitors",
    "TokenWindows",
    "choose_features",
    "coactivation",
    "global_inhibition",
    "global_weights",
    "head_inputs",
    "neighbourhood",
    "page_document",
    "read_windows",
    "strongest_virtual",
    "virtual_weights",
    "write_globals",
]

Data = str | os.PathLike[str] | Iterable[str | Sequence[int] | np.ndarray]
Mask = Literal["all"] | np.ndarray | Sequence[Any] | None
Features = str | os.PathLike[str] | Subset | np.ndarray | Sequence[Sequence[int]]

BATCH_TOKENS = 2048  # positions that go through the model together
FLUSH_TOKENS = 16_384  # positions whose sums are added in the model's dtype
DENSE_FEATURES = 8192  # more are held sparsely unless asked otherwise
SELECT_TOKENS = 16_384  # positions that features are chosen on
SAVE_S = 60.0  # between two states on disk
TOKENS_LISTED = 10  # of each feature in globals.npz
PAGE_LINKS = 10  # inputs and outputs of each feature on the page, by each kind


@dataclasses.dataclass(frozen=True)
class TokenWindows:
    """Windows of tokens and which of their positions count.

    Attributes:
      token_WS: int32, -1 behind the text.
      mask_WS: bool.
    """

    token_WS: np.ndarray
    mask_WS: np.ndarray

    @property
    def n_tokens(self) -> int:
        """Positions that count."""
        return int(self.mask_WS.sum())

    @property
    def digest(self) -> str:
        """Tells windows apart."""
        found = hashlib.sha256(repr(self.token_WS.shape).encode())
        found.update(self.token_WS.tobytes() + self.mask_WS.tobytes())
        return found.hexdigest()

    def take(self, rows: slice) -> TokenWindows:
        """Some of the windows."""
        return TokenWindows(self.token_WS[rows], self.mask_WS[rows])

    def first(self, n_tokens: int) -> TokenWindows:
        """The first windows that have so many positions that count."""
        have_W = np.cumsum(self.mask_WS.sum(1))
        return self.take(slice(0, int(np.searchsorted(have_W, n_tokens)) + 1))


def read_windows(
    model: Model,
    data: Data | TokenWindows,
    *,
    mask: Mask = None,
    tokens: int = 200_000,
    context: int = 256,
    shard: tuple[int, int] = (0, 1),
    on_tokens: Callable[[int, int], None] = lambda done, total: None,
) -> TokenWindows:
    """Windows of tokens from a text source, or from texts or token ids given.

    Args:
      model: from `load_model`.
      data: where text is, as for `jaxclt train --data` (a file, a folder, ``hub:...``);
        or an iterable of windows: each a prompt (text) or token ids. All of them are
        taken.
      mask: which positions count. None: no padding, no special token, not the first of
        a window, where many models park attention. ``"all"``: all but padding. Or bool
        [S] for all windows, [W, S], or one row for each window (padding never counts).
      tokens: positions that count to take from a text source.
      context: positions of a window cut from a text source.
      shard: (i, n) takes every n-th window from the i-th on.
      on_tokens: progress of the tokenizer.

    Raises:
      InputError: if there is no text, a token is not the model's, or the mask does not
        fit.
    """
    if isinstance(data, TokenWindows):
        return data.take(slice(shard[0], None, shard[1]))
    if isinstance(data, str | os.PathLike):
        if tokens < 1:
            raise InputError(f"--tokens {tokens}: give at least 1")
        if context > model.cfg.n_ctx:
            raise InputError(
                f"--context {context}: the model takes at most {model.cfg.n_ctx}"
            )
        documents = {
            hashlib.sha256(text.encode()).hexdigest(): text
            for text in read_documents(os.fspath(data), tokens=tokens)
        }
        token_WS = pack_windows(
            [documents[key] for key in sorted(documents)],
            model.tokenizer,
            size=context,
            n_tokens=tokens,
            on_tokens=on_tokens,
        )
        found = TokenWindows(token_WS, _mask(model, token_WS, mask)).first(tokens)
    else:
        token_WS = _padded(model, data)
        found = TokenWindows(token_WS, _mask(model, token_WS, mask))
    found = found.take(slice(shard[0], None, shard[1]))
    if not found.n_tokens:
        raise InputError("no position of the data counts: give more text, or a mask")
    return found


def _padded(
    model: Model, data: Iterable[str | Sequence[int] | np.ndarray]
) -> np.ndarray:
    rows = [
        model.tokenizer.encode(x) if isinstance(x, str) else np.asarray(x, np.int64)
        for x in data
    ]
    if not rows or not max(map(len, rows)):
        raise InputError("the data has no tokens: give at least one window")
    token_WS = np.full((len(rows), max(map(len, rows))), PAD, np.int32)
    for row_S, ids in zip(token_WS, rows, strict=True):
        row_S[: len(ids)] = ids
    if token_WS.max() >= model.cfg.d_vocab or token_WS.min() < PAD:
        raise InputError(
            f"a window holds a token that is not in 0..{model.cfg.d_vocab - 1}"
        )
    if token_WS.shape[1] > model.cfg.n_ctx:
        raise InputError(
            f"a window has {token_WS.shape[1]} tokens, the model takes at most "
            f"{model.cfg.n_ctx}: cut it"
        )
    behind_WS = np.cumsum(token_WS == PAD, axis=1) > 0
    if ((token_WS != PAD) & behind_WS).any():
        raise InputError("padding (-1) stands before a token: put it behind the text")
    return token_WS


def _mask(model: Model, token_WS: np.ndarray, mask: Mask) -> np.ndarray:
    text_WS = token_WS != PAD
    if mask is None:
        return valid_rows(token_WS, model.tokenizer.special_ids)
    if isinstance(mask, str):
        if mask != "all":
            raise InputError(f'mask {mask!r}: give None, "all" or an array of bool')
        return text_WS
    W, S = token_WS.shape
    rows = list(mask)
    if rows and np.ndim(rows[0]) == 1:
        given_WS = np.zeros((W, S), bool)
        if len(rows) != W or max(map(len, rows)) > S:
            raise InputError(
                f"the mask has {len(rows)} rows of up to {max(map(len, rows))}, the "
                f"windows are {W} of {S}"
            )
        for to_S, row in zip(given_WS, rows, strict=True):
            to_S[: len(row)] = np.asarray(row, bool)
        return given_WS & text_WS
    if len(rows) != S:
        raise InputError(
            f"the mask has {len(rows)} positions, the windows {S}: give one for each"
        )
    return np.asarray(rows, bool)[None] & text_WS


# -- which features --------------------------------------------------------------------


def _store(dictionary: Dictionary, params: LMParams) -> DictionaryStore:
    store = getattr(dictionary, "store", None)
    if store is None:
        raise InputError(
            f"dictionary {dictionary.name}: a neuron's gate depends on the prompt, so "
            "neurons have no global weights; give a transcoder"
        )
    if params.embed_VD.dtype.itemsize < 4:
        raise InputError(
            f"statistics need float32, the model is {params.embed_VD.dtype}: load it "
            'with dtype="float32"'
        )
    return store


def choose_features(
    model: Model,
    dictionary: Dictionary,
    features: Features,
    windows: TokenWindows,
    on_tokens: Callable[[int, int], None] = lambda done, total: None,
) -> Subset:
    """The features that are named.

    Args:
      model: from `load_model`.
      dictionary: from `load_dictionary`.
      features: ``all``; ``top:K``, the K that fire most often on the first windows;
        (layer, index) rows; or a file of them: .npz with ``layer_U`` and
        ``feature_U``, .json with a list of pairs, or lines LAYER:FEATURE.
      windows: what ``top:K`` is measured on.
      on_tokens: progress of that.

    Raises:
      InputError: for anything else, or features that the dictionary lacks.
    """
    store = _store(dictionary, model.params)
    if isinstance(features, Subset):
        return features
    if not isinstance(features, str | os.PathLike):
        return Subset.of(np.asarray(features, np.int64), store.cfg)
    name = os.fspath(features)
    if name == "all":
        return Subset.everything(store.cfg)
    head, _, count = name.partition(":")
    if head == "top":
        if not count.isdecimal() or int(count) < 1:
            raise InputError(f"--features {name}: write top:K with K at least 1")
        sample = windows.first(SELECT_TOKENS)
        count_U = _firing(model, store, sample, on_tokens)
        return _most_frequent(count_U, int(count), store.cfg)
    return Subset.of(_read_features(Path(name)), store.cfg)


def _most_frequent(count_U: np.ndarray, k: int, cfg: CLTConfig) -> Subset:
    order = np.argsort(-count_U, kind="stable")[:k]
    order = order[count_U[order] > 0]
    if not len(order):
        raise InputError("no feature fires on the text: is the dictionary the model's?")
    place = np.stack([order // cfg.n_features, order % cfg.n_features], 1)
    return Subset.of(place, cfg)


def _read_features(path: Path) -> np.ndarray:
    usage = "write lines LAYER:FEATURE, a .json list of pairs, all, or top:K"
    if not path.is_file():
        raise InputError(f"--features {path}: there is no such file; {usage}")
    try:
        if path.suffix == ".npz":
            with np.load(path, allow_pickle=False) as file:
                return np.stack([file["layer_U"], file["feature_U"]], 1)
        if path.suffix == ".json":
            rows = json.loads(path.read_text("utf-8"))
        else:
            lines = path.read_text("utf-8").splitlines()
            rows = [line.split(":") for line in lines if line.strip()]
        return np.asarray(rows, np.int64).reshape(len(rows), 2)
    except (ValueError, KeyError, TypeError, UnicodeDecodeError) as error:
        raise InputError(f"--features {path} cannot be read: {usage}") from error


@partial(jax.jit, static_argnames="plan")
def _frequency(
    params: LMParams, enc: Encoders, token_WS: Array, mask_WS: Array, *, plan: Plan
) -> Array:
    return feature_sums(watch(params, enc, token_WS, mask_WS, plan=plan))["count_U"]


def _firing(
    model: Model,
    store: DictionaryStore,
    windows: TokenWindows,
    on_tokens: Callable[[int, int], None],
) -> np.ndarray:
    """On how many of the positions each feature of the dictionary fires."""
    everything = Subset.everything(store.cfg)
    plan = Plan(lm=model.cfg, clt=store.cfg, starts=everything.starts)
    enc = encoders(store, model.params, everything)
    count_U = np.zeros(len(everything))
    for token_WS, mask_WS, done in _batches(windows, 0, BATCH_TOKENS // 2):
        found = _frequency(model.params, enc, token_WS, mask_WS, plan=plan)
        count_U += np.asarray(found, np.float64)
        on_tokens(int(windows.mask_WS[:done].sum()), windows.n_tokens)
    return count_U


def _batches(
    windows: TokenWindows, start: int, n_tokens: int
) -> Iterator[tuple[np.ndarray, np.ndarray, int]]:
    """Batches of one shape from a window on, and how many windows are then done."""
    n, S = windows.token_WS.shape
    W = min(n, max(1, n_tokens // S))
    for i in range(start, n, W):
        part = windows.take(slice(i, i + W))
        pad = ((0, W - len(part.token_WS)), (0, 0))
        yield (
            np.pad(part.token_WS, pad, constant_values=PAD),
            np.pad(part.mask_WS, pad),
            min(i + W, n),
        )


# -- statistics ------------------------------------------------------------------------


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
    on_stage: Callable[[str, int, int], None] = lambda what, done, total: None,
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
      on_stage: progress, (what, positions done, positions in all).

    Raises:
      InputError: for data, features or heads that do not fit, or a `state` of another
        run.
    """
    store = _store(dictionary, model.params)
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
    keep = _State(
        None if state is None else Path(state),
        {
            "model": model.hash,
            "dictionary": dictionary.hash,
            "windows": windows.digest,
            "features": _told(features),
            "heads": [list(head) for head in heads],
            "input_tokens": _told(input_tokens),
            "output_tokens": _told(output_tokens),
            "sparse": sparse,
        },
    )
    kept, first = keep.load()
    subset = kept.subset if kept else chosen.subset(dictionary)
    thin = len(subset) > DENSE_FEATURES if sparse is None else sparse
    if thin and (heads or chosen.asks_tokens):
        raise InputError(
            "heads and tokens are only gathered for a dense subset: choose one, for "
            "example --features top:4096"
        )
    found = kept or Coactivation(
        subset=subset,
        scaled=store.cfg.read != "resid_mid",
        sums={},
        heads=tuple((int(layer), int(head)) for layer, head in heads),
        input_Y=chosen.tokens(input_tokens),
        output_Y=chosen.tokens(output_tokens),
    )
    plan = Plan(lm=model.cfg, clt=store.cfg, starts=subset.starts, heads=found.heads)
    gathering = _Gathering(model.params, encoders(store, model.params, subset), plan)
    gathering.total = found.sums
    batch = BATCH_TOKENS // 2 if thin else BATCH_TOKENS
    for token_WS, mask_WS, done in _batches(windows, first, batch):
        if thin:
            gathering.add_sparse(token_WS, mask_WS)
        else:
            gathering.add(token_WS, mask_WS, found.input_Y, found.output_Y)
        counted = int(windows.mask_WS[:done].sum())
        on_stage("statistics", counted, windows.n_tokens)
        if keep.due():
            sums = gathering.flush()
            keep.save(dataclasses.replace(found, sums=sums), done)
    found = dataclasses.replace(found, sums=gathering.flush())
    keep.finish(found, len(windows.token_WS))
    return found


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
        self.total = jax.tree.map(_added, self.total, more)


def _plain(x: Any) -> bool:
    return isinstance(x, np.ndarray | Array | np.generic | float)


def _added(total: Any, more: Any) -> Any:
    if not _plain(more):
        return total + more
    if isinstance(total, np.ndarray) and total.ndim and total.flags.writeable:
        total += np.asarray(more)  # in place: sums may be most of the memory
        return total
    return np.asarray(total + np.asarray(more, np.float64))


class _State:
    """Sums on disk, with what they are of."""

    def __init__(self, directory: Path | None, identity: dict[str, Any]) -> None:
        self.directory, self.identity = directory, identity
        self.saved = time.monotonic()

    def load(self) -> tuple[Coactivation | None, int]:
        """What an earlier call left, and how many windows that was.

        Raises:
          InputError: if it is of other arguments.
        """
        if self.directory is None:
            return None, 0
        for name in ("statistics.npz", "partial.npz"):
            file = self.directory / name
            if not file.is_file():
                continue
            found, more = load_statistics(file)
            for what, value in self.identity.items():
                if more.get("identity", {}).get(what) != value:
                    raise InputError(
                        f"{self.directory} holds statistics of another run ({what} "
                        "differs): give the same arguments, or another directory"
                    )
            return found, int(more["windows"])
        return None, 0

    def due(self) -> bool:
        """Whether it is time to save."""
        return self.directory is not None and time.monotonic() - self.saved > SAVE_S

    def save(self, found: Coactivation, windows: int) -> None:
        """Keep what there is so far."""
        self._write("partial.npz", found, windows)
        self.saved = time.monotonic()

    def finish(self, found: Coactivation, windows: int) -> None:
        """Keep the whole; what was in between is no longer needed."""
        if self.directory is None:
            return
        if not (self.directory / "statistics.npz").is_file():
            self._write("statistics.npz", found, windows)
        (self.directory / "partial.npz").unlink(missing_ok=True)

    def _write(self, name: str, found: Coactivation, windows: int) -> None:
        assert self.directory is not None
        save_statistics(
            self.directory / name, found, identity=self.identity, windows=windows
        )


# -- weights ---------------------------------------------------------------------------


def global_weights(
    model: Model,
    dictionary: Dictionary,
    statistics: Coactivation | str | os.PathLike[str],
    *,
    kind: Kind = "twera",
) -> GlobalWeights:
    """Virtual weights of the statistics' features, ranked by how they are used.

    ``.inputs(layer, feature, k)`` and ``.outputs(layer, feature, k)`` give the
    strongest links of a feature. Circuit Tracing (2025), section 4.

    Args:
      model: from `load_model`.
      dictionary: the one that the statistics are of.
      statistics: from `coactivation`, or a statistics.npz.
      kind: what to rank by: virtual, era, twera, era_norm, twera_norm, coactivation.

    Raises:
      InputError: if the dictionary is another, or for an unknown kind.
    """
    store = _store(dictionary, model.params)
    if not isinstance(statistics, Coactivation):
        statistics, _ = load_statistics(statistics)
    if kind not in ranking.KINDS:
        raise InputError(f"kind {kind!r}: choose one of {', '.join(ranking.KINDS)}")
    if statistics.subset.n_layers != store.cfg.n_layers:
        raise InputError(
            f"the statistics are of {statistics.subset.n_layers} layers, the "
            f"dictionary has {store.cfg.n_layers}: they do not belong together"
        )
    return build(store, model.params, statistics, kind=kind)


def head_inputs(
    model: Model,
    dictionary: Dictionary,
    statistics: Coactivation,
    head: Head,
    layer: int,
    feature: int,
    *,
    k: int = 10,
    by: Literal["virtual", "era", "twera"] = "twera",
) -> list[dict[str, Any]]:
    """The strongest sources of a feature through one attention head, at any position.

    See `jaxclt.global_weights.build.head_inputs`; `statistics` are of `coactivation`
    with ``heads=[head]``.
    """
    return building.head_inputs(
        _store(dictionary, model.params),
        model.params,
        statistics,
        head,
        layer,
        feature,
        cfg=model.cfg,
        k=k,
        by=by,
    )


def virtual_weights(
    model: Model,
    dictionary: Dictionary,
    target: tuple[int, Sequence[int] | np.ndarray],
    source: tuple[int, Sequence[int] | np.ndarray],
) -> np.ndarray:
    """Virtual weights [targets, sources] between some features of two layers.

    Circuit Tracing (2025), section 4; norm gains folded in, in the model's dtype.

    Args:
      model: from `load_model`.
      dictionary: from `load_dictionary`; not neurons.
      target: layer and feature indices.
      source: layer and feature indices; zeros unless the layer is lower.

    Raises:
      InputError: if there is no such layer or feature.
    """
    store = _store(dictionary, model.params)
    ends = []
    for layer, chosen in (target, source):
        index = np.asarray(chosen, np.int64).reshape(-1)
        # For its check only: the order that was asked for is kept.
        Subset.of(np.stack([np.full_like(index, layer), index], 1), store.cfg)
        ends.append((int(layer), index))
    return virtual_block(store, model.params, *ends)


def strongest_virtual(
    model: Model,
    dictionary: Dictionary,
    k: int = 16,
    *,
    features: Features = "all",
    on_block: Callable[[int, int], None] = lambda done, total: None,
) -> tuple[Subset, Strongest]:
    """The k largest virtual weights into and out of every feature, without any text.

    Blocks are streamed: what is held is one of them, a layer's decoders, all encoders
    and the result.

    Args:
      model: from `load_model`.
      dictionary: from `load_dictionary`; not neurons.
      k: how many of each.
      features: which, see `choose_features` (not ``top:K``, which needs text).
      on_block: progress, (pairs of layers done, in all).

    Raises:
      InputError: for features that the dictionary lacks.
    """
    store = _store(dictionary, model.params)
    if isinstance(features, str) and features.startswith("top:"):
        raise InputError(f"features {features}: how often they fire needs text")
    none = TokenWindows(np.zeros((0, 1), np.int32), np.zeros((0, 1), bool))
    subset = choose_features(model, dictionary, features, none)
    found = weights_of.strongest_virtual(store, model.params, subset, k, on_block)
    return subset, found


@dataclasses.dataclass(frozen=True, kw_only=True)
class Inhibitors:
    """Sources that keep some targets from firing, over text.

    Attributes:
      subset: the sources.
      slot_R: slots of the targets in the subset.
      n_tokens: positions that counted.
      effect_RU: mean over tokens of the edge of a source that alone keeps the target
        silent (spec 11: E[1(h <= theta < h - V a) V a]); negative.
      released_RU: share of tokens on which that is so.
      virtual_RU: virtual weights.
    """

    subset: Subset
    slot_R: np.ndarray
    n_tokens: int
    effect_RU: np.ndarray
    released_RU: np.ndarray
    virtual_RU: np.ndarray

    def inputs(self, layer: int, feature: int, k: int = 10) -> list[dict[str, Any]]:
        """The strongest inhibitors of a target.

        Raises:
          InputError: if it is not among the targets.
        """
        slot = self.subset.slot(layer, feature)
        at = np.flatnonzero(self.slot_R == slot)
        if not len(at):
            raise InputError(f"feature {layer}:{feature} is not among the targets")
        effect_U = self.effect_RU[at[0]]
        order = np.argsort(effect_U, kind="stable")[:k]
        return [
            {
                "layer": int(self.subset.layer_U[i]),
                "feature": int(self.subset.feature_U[i]),
                "effect": float(effect_U[i]),
                "released": float(self.released_RU[at[0], i]),
                "virtual": float(self.virtual_RU[at[0], i]),
            }
            for i in order
            if effect_U[i] < 0
        ]


def global_inhibition(
    model: Model,
    dictionary: Dictionary,
    data: Data | TokenWindows,
    targets: Sequence[Sequence[int]] | np.ndarray,
    *,
    features: Features = "top:4096",
    mask: Mask = None,
    tokens: int = 200_000,
    context: int = 256,
    on_tokens: Callable[[int, int], None] = lambda done, total: None,
) -> Inhibitors:
    """Which sources keep targets from firing on text; TWERA is blind to them.

    Args:
      model: from `load_model`, in float32.
      dictionary: from `load_dictionary`, with ReLU or JumpReLU.
      data: a text source or windows, see `read_windows`.
      targets: (layer, index) rows; each costs a step per source and position.
      features: the sources, see `choose_features`; targets are added to them.
      mask: which positions count.
      tokens: positions that count to take from a text source.
      context: positions of a window cut from a text source.
      on_tokens: progress.

    Raises:
      InputError: for input that does not fit, or a TopK dictionary.
    """
    store = _store(dictionary, model.params)
    windows = read_windows(model, data, mask=mask, tokens=tokens, context=context)
    sources = choose_features(model, dictionary, features, windows)
    asked = Subset.of(np.asarray(targets, np.int64), store.cfg)
    place = [np.stack([x.layer_U, x.feature_U], 1) for x in (sources, asked)]
    subset = Subset.of(np.concatenate(place), store.cfg)
    slot_R = np.asarray([subset.slot(int(a), int(b)) for a, b in place[1]], np.int32)
    theta_R = thresholds(store, model.params, subset, slot_R)
    V_RU = rows_of_weights(store, model.params, subset, slot_R)
    plan = Plan(lm=model.cfg, clt=store.cfg, starts=subset.starts)
    enc = encoders(store, model.params, subset)
    total: Sums = {}
    for token_WS, mask_WS, done in _batches(windows, 0, BATCH_TOKENS):
        found = inhibition_of(
            model.params, enc, token_WS, mask_WS, slot_R, theta_R, V_RU, plan=plan
        )
        more = jax.tree.map(lambda x: np.asarray(x, np.float64), found)
        total = jax.tree.map(np.add, total, more) if total else more
        on_tokens(int(windows.mask_WS[:done].sum()), windows.n_tokens)
    n = max(float(total["n"]), 1.0)
    return Inhibitors(
        subset=subset,
        slot_R=slot_R,
        n_tokens=round(float(total["n"])),
        effect_RU=total["effect_RU"] / n,
        released_RU=total["released_RU"] / n,
        virtual_RU=V_RU,
    )


# -- what is written and shown ---------------------------------------------------------


def write_globals(
    model: Model,
    dictionary: Dictionary,
    weights: GlobalWeights,
    out: str | os.PathLike[str],
    *,
    top: int = 32,
    meta: dict[str, Any] | None = None,
    on_layer: Callable[[int, int], None] = lambda done, total: None,
) -> SavedGlobals:
    """Write globals.npz, report.json and the page index.html into a directory.

    Args:
      model: from `load_model`.
      dictionary: from `load_dictionary`.
      weights: from `global_weights`.
      out: directory.
      top: links kept: the strongest inputs and outputs of every feature by |V|, |ERA|
        and |TWERA| each (sparse statistics: by the last two and |V| among the pairs
        that fire together).
      meta: more to tell.
      on_layer: progress of the vocabulary weights, layer by layer.

    Raises:
      InputError: if the directory cannot be written.
    """
    out, store = Path(out), _store(dictionary, model.params)
    stats = weights.statistics
    scaled: tuple[Kind, ...] = ("era_norm", "twera_norm") if stats.scaled else ()
    links = weights.strongest(top, ("virtual", "era", "twera", *scaled))
    blocks: Iterable[tuple[int, int, np.ndarray]] = (
        virtual_blocks(store, model.params, stats)
        if stats.sparse  # which lack the pairs that never fire together
        else zip(stats.subset.starts, itertools.repeat(0), weights.virtual)  # pyright: ignore
    )
    share = ranking.interference(stats, blocks)
    tables = _token_tables(model.params, store, stats.subset, on_layer)
    ids = np.unique(np.concatenate([tables[name].ravel() for name in _TOKEN_TABLES]))
    told = (meta or {}) | {
        "schema": 1,
        "model": model.name,
        "dictionary": dictionary.name,
        "hashes": {"model": model.hash, "dictionary": dictionary.hash},
        "by": weights.kind,
        "top": top,
        "read": store.cfg.read,
        "sparse": stats.sparse,
        "tokens": stats.n_tokens,
        "features": len(stats.subset),
        "links": len(links),
        "interference": share,
    }
    texts = model.tokenizer.token_strings(ids.tolist())
    found = SavedGlobals(
        meta=told
        | {"token_text": {str(i): t for i, t in zip(ids.tolist(), texts, strict=True)}},
        links=links,
        subset=stats.subset,
        frequency_U=stats.frequency.astype(np.float32),
        mean_U=stats.mean.astype(np.float32),
        **tables,
    )
    save_globals(out / "globals.npz", found)
    with atomic_path(out / "index.html") as temporary:
        temporary.write_text(globals_page(page_document(found)), encoding="utf-8")
    with atomic_path(out / "report.json") as temporary:
        temporary.write_text(json.dumps(told, indent=1) + "\n", encoding="utf-8")
    return found


def page_document(found: SavedGlobals, *, k: int = PAGE_LINKS) -> dict[str, Any]:
    """What the page embeds: features with their tokens, and the strongest links.

    Args:
      found: what `write_globals` returns or `load_globals` reads.
      k: inputs and outputs of every feature, by each of V, ERA and TWERA.
    """
    subset, links = found.subset, found.links
    U, size = len(subset), max(1, int(subset.feature_U.max()) + 1)
    code_U = subset.layer_U.astype(np.int64) * size + subset.feature_U

    def slots(end: str) -> np.ndarray:
        layer_P = getattr(links, f"{end}_layer_P").astype(np.int64)
        code_P = layer_P * size + getattr(links, f"{end}_feature_P")
        return np.searchsorted(code_U, code_P)

    source_P, target_P = slots("source"), slots("target")
    keep_P = np.zeros(len(links), bool)
    for kind in ("virtual", "era", "twera"):
        size_P = np.abs(getattr(links, f"{kind}_P"))
        for end_P in (source_P, target_P):
            order = np.lexsort((-size_P, end_P))
            start = np.searchsorted(end_P[order], end_P[order])
            keep_P[order[np.arange(len(order)) - start < k]] = True

    def short(x: np.ndarray) -> list[float]:
        return [float(f"{value:.4g}") for value in x.tolist()]

    columns = [
        short(getattr(links, f"{name}_P")[keep_P])
        for name in ("virtual", "era", "twera", "coactivation")
    ]
    tokens = [
        [
            [list(pair) for pair in zip(ids, short(weight_K), strict=True)]
            for ids, weight_K in zip(
                getattr(found, f"{name}_token_UK").tolist(),
                getattr(found, f"{name}_weight_UK"),
                strict=True,
            )
        ]
        for name in ("input", "output", "lowest")
    ]
    meta = found.meta
    return {
        "about": f"{meta['model']}, {meta['dictionary']}: {U:,} features on "
        f"{meta['tokens']:,} tokens. Links join features at the same position; "
        "attention is not in them.",
        "k": k,
        "texts": meta["token_text"],
        "features": [
            list(row)
            for row in zip(
                subset.layer_U.tolist(),
                subset.feature_U.tolist(),
                short(found.frequency_U),
                short(found.mean_U),
                *tokens,
                strict=True,
            )
        ],
        "links": [
            list(row)
            for row in zip(
                source_P[keep_P].tolist(),
                target_P[keep_P].tolist(),
                *columns,
                strict=True,
            )
        ],
    }


_TOKEN_TABLES = ("input_token_UK", "output_token_UK", "lowest_token_UK")


@partial(jax.jit, static_argnames="k")
def _highest(x_RV: Array, k: int) -> tuple[Array, Array]:
    return jax.lax.top_k(x_RV, k)


def _token_tables(
    params: LMParams,
    store: DictionaryStore,
    subset: Subset,
    on_layer: Callable[[int, int], None],
) -> dict[str, np.ndarray]:
    """The tokens with the largest embedding and logit weights of every feature."""
    k = min(TOKENS_LISTED, params.embed_VD.shape[0])
    found: dict[str, list[np.ndarray]] = {}
    L = store.cfg.n_layers
    for layer in range(L):
        chosen = subset.features(layer)
        # A few features at a time: each has a weight for every token.
        for start in range(0, len(chosen), 256):
            part = chosen[start : start + 256]
            embed_RV = embedding_weights(store, params, layer, part)
            logit_RV = logit_weights(store, params, layer, part)
            for name, x_RV, sign in (
                ("input", embed_RV, 1),
                ("output", logit_RV, 1),
                ("lowest", logit_RV, -1),
            ):
                weight_RK, token_RK = map(np.asarray, _highest(sign * x_RV, k))
                found.setdefault(f"{name}_token_UK", []).append(token_RK)
                found.setdefault(f"{name}_weight_UK", []).append(sign * weight_RK)
        on_layer(layer + 1, L)
    return {name: np.concatenate(parts) for name, parts in found.items()}


def neighbourhood(
    weights: GlobalWeights | SavedGlobals | str | os.PathLike[str],
    layer: int,
    feature: int,
    *,
    k: int = 10,
    by: Kind | None = None,
    model: Model | None = None,
    dictionary: Dictionary | None = None,
) -> dict[str, Any]:
    """What surrounds a feature in the global circuit, ready for JSON.

    Args:
      weights: from `global_weights`, or a directory that `jaxclt globals` wrote.
      layer: of the feature.
      feature: its index.
      k: how many of everything.
      by: what links are ranked by; None: as the weights say.
      model: needed with `dictionary` for the tokens of `GlobalWeights`; a directory has
        them.
      dictionary: see `model`.

    Returns:
      ``feature`` {layer, feature, frequency, mean}, ``by``, ``tokens`` (counted),
      ``inputs`` and ``outputs`` [{layer, feature, virtual, era, twera, coactivation}],
      ``tokens_in``, ``tokens_out`` and ``tokens_out_lowest`` [{token, text, weight}]:
      the largest embedding and logit weights, and the most negative logit weights.

    Raises:
      InputError: if the feature is not among those of the weights.
    """
    if isinstance(weights, str | os.PathLike):
        weights = load_globals(weights)
    slot = weights.subset.slot(layer, feature)
    if isinstance(weights, SavedGlobals):
        by = by or weights.meta["by"]
        frequency, mean = weights.frequency_U[slot], weights.mean_U[slot]
        tables = {name: getattr(weights, name)[slot] for name in _token_fields()}
        n_tokens, text = weights.meta["tokens"], weights.meta["token_text"]
    else:
        by = by or weights.kind
        stats = weights.statistics
        frequency, mean = stats.frequency[slot], stats.mean[slot]
        n_tokens, text, tables = stats.n_tokens, {}, {}
        if model is not None and dictionary is not None:
            one = Subset(
                weights.subset.layer_U[slot : slot + 1],
                weights.subset.feature_U[slot : slot + 1],
                weights.subset.n_layers,
            )
            store = _store(dictionary, model.params)
            found = _token_tables(model.params, store, one, lambda done, total: None)
            tables = {name: value[0] for name, value in found.items()}
            ids = np.unique(np.concatenate([tables[n] for n in _TOKEN_TABLES])).tolist()
            strings = model.tokenizer.token_strings(ids)
            text = {str(i): t for i, t in zip(ids, strings, strict=True)}

    def links(found: ranking.Links, end: str) -> list[dict[str, Any]]:
        rows = found.rows()
        names = ("virtual", "era", "twera", "era_norm", "twera_norm", "coactivation")
        return [
            {"layer": row[f"{end}_layer"], "feature": row[f"{end}_feature"]}
            | {name: row[name] for name in names}
            for row in rows
        ]

    def tokens(name: str) -> list[dict[str, Any]]:
        if f"{name}_token_UK" not in tables:
            return []
        pairs = zip(
            tables[f"{name}_token_UK"].tolist(),
            tables[f"{name}_weight_UK"].tolist(),
            strict=True,
        )
        return [
            {"token": token, "text": text.get(str(token), ""), "weight": weight}
            for token, weight in list(pairs)[:k]
        ]

    return {
        "feature": {
            "layer": layer,
            "feature": feature,
            "frequency": float(frequency),
            "mean": float(mean),
        },
        "by": by,
        "tokens": int(n_tokens),
        "inputs": links(weights.inputs(layer, feature, k, by=by), "source"),
        "outputs": links(weights.outputs(layer, feature, k, by=by), "target"),
        "tokens_in": tokens("input"),
        "tokens_out": tokens("output"),
        "tokens_out_lowest": tokens("lowest"),
    }


def _token_fields() -> list[str]:
    names = [name.removesuffix("_token_UK") for name in _TOKEN_TABLES]
    return [f"{name}_{what}_UK" for name in names for what in ("token", "weight")]
