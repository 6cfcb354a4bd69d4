"""Pairs of sentences that differ in one concept, and what features do on them."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from jaxclt.clt.coder import Loaded
from jaxclt.errors import InputError
from jaxclt.files.json_file import MOST, parse_json, read_bounded
from jaxclt.files.lines import json_rows
from jaxclt.io.model import Model
from jaxclt.lm.layers import mlp_at
from jaxclt.lm.run import Policy, embed, run
from jaxclt.precision import jit
from jaxclt.text.windows import BATCH_TOKENS, batches, read_windows
from jaxclt.types import Block, LMParams

__all__ = ["ConceptPair", "load_pairs", "readable", "sentence_peaks"]

_NUMBERS = 1 << 25  # activations of a layer that are held at a time


@dataclasses.dataclass(frozen=True)
class ConceptPair:
    """Two sentences; the first has the concept and the second does not."""

    concept: str
    sentences: tuple[str, str]


def load_pairs(path: str | os.PathLike[str] | None = None) -> tuple[ConceptPair, ...]:
    """Pairs of sentences from a file; None reads the ones that come with the package.

    Args:
      path: a .json file with a list, or a .jsonl file with one on each line, of objects
        ``{"concept": ..., "with": sentence, "without": sentence}``.

    Raises:
      InputError: if the file is not that.
    """
    file = Path(path or Path(__file__).with_name("concepts.json"))
    if file.suffix == ".jsonl":
        entries = [entry for _, entry in json_rows(file)]
    else:
        entries = parse_json(read_bounded(file, MOST), file)
        if not isinstance(entries, list):
            raise InputError(f"{file} must hold a JSON list of pairs")
    if not entries:
        raise InputError(f"{file} holds no pair of sentences")
    return tuple(_pair(file, i, entry) for i, entry in enumerate(entries, 1))


def _pair(file: Path, number: int, entry: Any) -> ConceptPair:
    names = ("concept", "with", "without")
    if not isinstance(entry, dict) or not all(
        isinstance(entry.get(name), str) and entry[name].strip() for name in names
    ):
        raise InputError(
            f"{file}, pair {number}: each must be an object whose `concept`, `with` "
            "and `without` are texts"
        )
    concept, present, absent = (entry[name].strip() for name in names)
    if present == absent:
        raise InputError(f"{file}, pair {number}: both sentences are the same")
    return ConceptPair(concept, (present, absent))


def readable(model: Model, pairs: Sequence[ConceptPair]) -> list[ConceptPair]:
    """The pairs that a model can read: short enough, every word in its vocabulary.

    A model of a small domain, such as sums, reads none of the built-in ones.

    Args:
      model: from `load_model`.
      pairs: from `load_pairs`.
    """
    tokenizer = model.tokenizer

    def reads(text: str) -> bool:
        ids = tokenizer.encode(text, "never")
        return 0 < len(ids) < model.cfg.n_ctx and not tokenizer.special_ids & set(ids)

    return [pair for pair in pairs if all(map(reads, pair.sentences))]


def sentence_peaks(
    encoder: Loaded,
    model: Model,
    pairs: Sequence[ConceptPair],
    layer_U: np.ndarray,
    feature_U: np.ndarray,
) -> np.ndarray:
    """Largest activation of each feature on each sentence, float32 [P, 2, U].

    Of either sign, by size, as in `Examples`; 0 where a feature is active on no token
    of the sentence. The first position and special tokens do not count. Of a
    dictionary's activations only one layer of a batch is held at a time, whatever its
    number of layers.

    Args:
      encoder: of the dictionary.
      model: whose stream it reads.
      pairs: P pairs of sentences.
      layer_U: layers of the features.
      feature_U: their indices.

    Raises:
      InputError: if a sentence is longer than the model takes.
    """
    windows = read_windows(model, [text for pair in pairs for text in pair.sentences])
    S = windows.token_WS.shape[1]
    together = min(BATCH_TOKENS, max(S, _NUMBERS // encoder.n_features))
    at_2U = jnp.asarray(np.stack([layer_U, feature_U]), jnp.int32)
    rows, done = [], 0
    for token_WS, mask_WS, end in batches(windows, 0, together):
        peak_WU = _peaks(
            model.params, encoder, jnp.asarray(token_WS), jnp.asarray(mask_WS), at_2U
        )
        rows.append(np.asarray(peak_WU, np.float32)[: end - done])
        done = end
    return np.concatenate(rows).reshape(len(pairs), 2, len(layer_U))


@jit
def _peaks(
    params: LMParams, encoder: Loaded, token_WS: Array, mask_WS: Array, at_2U: Array
) -> Array:
    cfg = encoder.lm
    assert cfg is not None

    def one(token_S: Array, mask_S: Array) -> Array:
        def write(
            carry: tuple[Array, Array], mid_TD: Array, scale_T: Array, p: Block, x: Any
        ) -> tuple[tuple[Array, Array], Array]:
            layer, peak_LF = carry
            a_TF = encoder.layer(p, x, mid_TD, scale_T)
            peak_F = _largest(a_TF, mask_S)
            peak_LF = jax.lax.dynamic_update_index_in_dim(peak_LF, peak_F, layer, 0)
            write_TD, _ = mlp_at(p, mid_TD, scale_T, cfg=cfg)
            return (layer + 1, peak_LF), write_TD

        resid_TD = embed(params, token_S)
        empty = jnp.zeros((cfg.n_layers, encoder.n_features), resid_TD.dtype)
        start = (jnp.zeros((), jnp.int32), empty)
        policy = Policy(write, start, encoder.weights)
        done = run(params, resid_TD, policy, cfg=cfg, keep_patterns=False)
        return done.carry[1][at_2U[0], at_2U[1]]

    return jax.vmap(one)(jnp.maximum(token_WS, 0), mask_WS)


def _largest(a_TF: Array, mask_T: Array) -> Array:
    """Activation [F] of the largest size at the positions that count; 0 if none."""
    a_TF = jnp.where(mask_T[:, None], a_TF, jnp.zeros((), a_TF.dtype))
    at_1F = jnp.argmax(jnp.abs(a_TF), axis=0, keepdims=True)
    return jnp.take_along_axis(a_TF, at_1F, axis=0)[0]
