"""Which features of a dictionary a pass over text is about."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Sequence
from pathlib import Path

import jax.numpy as jnp
import numpy as np

from jaxclt.clt.coder import Dictionary, Loaded, load
from jaxclt.clt.subset import FeatureSizes, Subset
from jaxclt.errors import InputError, did_you_mean
from jaxclt.files.json_file import MOST, parse_json, read_bounded
from jaxclt.files.npz import Must, open_npz
from jaxclt.io.model import Model
from jaxclt.precision import jit
from jaxclt.text.peaks import Batch, firing_counts
from jaxclt.text.windows import BATCH_TOKENS, TokenWindows, batches

__all__ = ["Features", "choose_features"]

Features = str | os.PathLike[str] | Subset | np.ndarray | Sequence[Sequence[int]]

SELECT_TOKENS = 16_384  # positions that features are chosen on


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
    if isinstance(features, Subset):
        return features
    coder = dictionary.coder(model.cfg)
    sizes = coder.shape
    if not isinstance(features, str | os.PathLike):
        return Subset.of(np.asarray(features, np.int64), sizes)
    name = os.fspath(features)
    if name == "all":
        return Subset.everything(sizes)
    head, _, count = name.partition(":")
    if head == "top":
        if not re.fullmatch(r"0*[1-9]\d{0,8}", count):
            raise InputError(f"--features {name}: write top:K with K at least 1")
        if coder.gated and not coder.chooses:
            raise InputError(
                f"--features {name}: every neuron is active on every token; name some, "
                "or take neurons:k as the dictionary"
            )
        sample = windows.first(SELECT_TOKENS)
        encoder = load(dictionary, model.params, model.cfg, decoders=False)
        count_U = _firing(model, encoder, sample, on_tokens)
        return _most_frequent(count_U, int(count), sizes)
    return Subset.of(_read_features(Path(name)), sizes)


def _most_frequent(count_U: np.ndarray, k: int, cfg: FeatureSizes) -> Subset:
    order = np.argsort(-count_U, kind="stable")[:k]
    order = order[count_U[order] > 0]
    if not len(order):
        raise InputError("no feature fires on the text: is the dictionary the model's?")
    place = np.stack([order // cfg.n_features, order % cfg.n_features], 1)
    return Subset.of(place, cfg)


def _read_features(path: Path) -> np.ndarray:
    usage = "write lines LAYER:FEATURE, a .json list of pairs, all, or top:K"
    if not os.path.isfile(path):
        hint = did_you_mean(str(path).partition(":")[0], ("all", "top"))
        raise InputError(f"--features {path}: there is no such file; {usage}{hint}")
    try:
        if path.suffix == ".npz":
            with open_npz(path, "holds no features", usage) as file:
                sizes: dict[str, int] = {}
                must = Must("int", "U", 0)
                names = ("layer_U", "feature_U")
                return np.stack([file.array(x, must, sizes) for x in names], 1)
        text = read_bounded(path, MOST)
        if path.suffix == ".json":
            rows = parse_json(text, path)
        else:
            lines = text.decode("utf-8").splitlines()
            rows = [line.split(":") for line in lines if line.strip()]
        return np.asarray(rows, np.int64).reshape(len(rows), 2)
    except (ValueError, KeyError, TypeError, OverflowError) as error:
        raise InputError(f"--features {path} cannot be read: {usage}") from error


_counts = jit(firing_counts)


def _firing(
    model: Model,
    encoder: Loaded,
    windows: TokenWindows,
    on_tokens: Callable[[int, int], None],
) -> np.ndarray:
    """On how many of the positions each feature of the dictionary is active."""
    count_U = np.zeros(encoder.n_layers * encoder.n_features, np.int64)
    for token_WS, mask_WS, done in batches(windows, 0, BATCH_TOKENS // 2):
        nothing = jnp.zeros(0, jnp.int32)
        batch = Batch(jnp.asarray(token_WS), jnp.asarray(mask_WS), nothing, nothing)
        count_U += np.asarray(_counts(model.params, encoder, batch)).ravel()
        on_tokens(int(windows.mask_WS[:done].sum()), windows.n_tokens)
    return count_U
