"""What is written and shown of the global circuit: files, the page, neighbourhoods."""

from __future__ import annotations

import itertools
import os
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np

from jaxclt.clt.coder import Bound, Dictionary
from jaxclt.clt.subset import Subset
from jaxclt.errors import check_at_least
from jaxclt.files.atomic import write_text
from jaxclt.files.json_text import to_json
from jaxclt.global_weights import ranking
from jaxclt.global_weights.build import bound_of, virtual_blocks
from jaxclt.global_weights.files import SavedGlobals, load_globals, save_globals
from jaxclt.global_weights.ranking import GlobalWeights, Kind, Links
from jaxclt.global_weights.weights import embedding_weights, logit_weights
from jaxclt.io.model import Model
from jaxclt.naming.vocabulary import highest
from jaxclt.precision import jit
from jaxclt.viewer.globals_page import globals_page

__all__ = ["neighbourhood", "page_document", "write_globals"]

TOKENS_LISTED = 10  # of each feature in globals.npz
PAGE_LINKS = 10  # inputs and outputs of each feature on the page, by each kind


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
      meta: more for the report.
      on_layer: progress of the vocabulary weights, layer by layer.

    Raises:
      InputError: if the directory cannot be written, or `top` is below 1.
    """
    check_at_least(1, top=top)
    out, on = Path(out), bound_of(dictionary, model)
    stats = weights.statistics
    scaled: tuple[Kind, ...] = ("era_norm", "twera_norm") if stats.scaled else ()
    links = weights.strongest(top, ("virtual", "era", "twera", *scaled))
    blocks: Iterable[tuple[int, int, np.ndarray]] = (
        virtual_blocks(on, stats)
        if stats.sparse  # which lack the pairs that never fire together
        else zip(stats.subset.starts, itertools.repeat(0), weights.virtual)  # pyright: ignore
    )
    share = ranking.interference(stats, blocks)
    tables = _token_tables(on, stats.subset, on_layer)
    ids = np.unique([tables[f"{name}_token_UK"] for name in _TOKENS])
    about = (meta or {}) | {
        "schema": 1,
        "model": model.name,
        "dictionary": dictionary.name,
        "hashes": {"model": model.hash, "dictionary": dictionary.hash},
        "by": weights.kind,
        "top": top,
        "read": on.coder.site,
        "sparse": stats.sparse,
        "tokens": stats.n_tokens,
        "features": len(stats.subset),
        "links": len(links),
        "interference": share,
    }
    texts = model.tokenizer.token_strings(ids.tolist())
    token_text = {str(i): t for i, t in zip(ids.tolist(), texts, strict=True)}
    found = SavedGlobals(
        meta=about | {"token_text": token_text},
        links=links,
        subset=stats.subset,
        frequency_U=stats.frequency.astype(np.float32),
        mean_U=stats.mean.astype(np.float32),
        **tables,
    )
    save_globals(out / "globals.npz", found)
    write_text(out / "index.html", globals_page(page_document(found)))
    write_text(out / "report.json", to_json(about, indent=1) + "\n")
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
            _rows(token_K.tolist(), short(weight_K))
            for token_K, weight_K in zip(
                getattr(found, f"{name}_token_UK"),
                getattr(found, f"{name}_weight_UK"),
                strict=True,
            )
        ]
        for name in _TOKENS
    ]
    meta = found.meta
    return {
        "about": f"{meta['model']}, {meta['dictionary']}: {U:,} features on "
        f"{meta['tokens']:,} tokens. Links join features at the same position; "
        "attention is not in them.",
        "k": k,
        "texts": meta["token_text"],
        "features": _rows(
            subset.layer_U.tolist(),
            subset.feature_U.tolist(),
            short(found.frequency_U),
            short(found.mean_U),
            *tokens,
        ),
        "links": _rows(source_P[keep_P].tolist(), target_P[keep_P].tolist(), *columns),
    }


def _rows(*columns: list[Any]) -> list[list[Any]]:
    return [list(row) for row in zip(*columns, strict=True)]


_TOKENS = ("input", "output", "lowest")  # read most, raised most, lowered most


_highest = jit(highest, static_argnames="k")


def _token_tables(
    on: Bound,
    subset: Subset,
    on_layer: Callable[[int, int], None],
) -> dict[str, np.ndarray]:
    """The tokens with the largest embedding and logit weights of every feature."""
    k = min(TOKENS_LISTED, on.params.embed_VD.shape[0])
    found: dict[str, list[np.ndarray]] = {}
    L = on.shape.n_layers
    for layer in range(L):
        chosen = subset.features(layer)
        # A few features at a time: each has a weight for every token.
        for start in range(0, len(chosen), 256):
            part = chosen[start : start + 256]
            embed_RV = embedding_weights(on, layer, part)
            logit_RV = logit_weights(on, layer, part)
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
    text: dict[str, str] = {}
    tables: dict[str, np.ndarray] = {}
    if isinstance(weights, SavedGlobals):
        kind, n_tokens = weights.meta["by"], weights.meta["tokens"]
        frequency, mean = weights.frequency_U[slot], weights.mean_U[slot]
        text = weights.meta["token_text"]
        for name in _TOKENS:
            for key in (f"{name}_token_UK", f"{name}_weight_UK"):
                tables[key] = getattr(weights, key)[slot]
    else:
        stats, kind = weights.statistics, weights.kind
        n_tokens = stats.n_tokens
        frequency, mean = stats.frequency[slot], stats.mean[slot]
        if model is not None and dictionary is not None:
            on = bound_of(dictionary, model)
            one = Subset.of(np.asarray([[layer, feature]]), on.shape)
            found = _token_tables(on, one, lambda done, total: None)
            tables = {key: x_1K[0] for key, x_1K in found.items()}
            ids = np.unique([tables[f"{name}_token_UK"] for name in _TOKENS]).tolist()
            strings = model.tokenizer.token_strings(ids)
            text = {str(i): t for i, t in zip(ids, strings, strict=True)}

    def links(found: Links, end: str) -> list[dict[str, Any]]:
        names = ("virtual", "era", "twera", "era_norm", "twera_norm", "coactivation")
        return [
            {"layer": row[f"{end}_layer"], "feature": row[f"{end}_feature"]}
            | {name: row[name] for name in names}
            for row in found.rows()
        ]

    def tokens(name: str) -> list[dict[str, Any]]:
        if not tables:
            return []
        token_K, weight_K = (tables[f"{name}_{x}_UK"][:k] for x in ("token", "weight"))
        return [
            {"token": token, "text": text.get(str(token), ""), "weight": weight}
            for token, weight in zip(token_K.tolist(), weight_K.tolist(), strict=True)
        ]

    by = by or kind
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
