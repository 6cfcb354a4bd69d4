"""Synthetic examples: features that fire on tokens they were given."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import numpy as np

from jaxclt.dashboards.examples import Examples, Excerpts, Shown
from jaxclt.evaluation.trials import Source, Trial

WORDS = tuple(f" w{i}" for i in range(60))
SHOWN = 3


def make_windows(seed: int = 0, W: int = 200, S: int = 12) -> np.ndarray:
    """Random tokens; the last windows are shorter."""
    token_WS = np.array(jax.random.randint(jax.random.key(seed), (W, S), 0, len(WORDS)))
    token_WS[-5:, S - 3 :] = -1
    return token_WS.astype(np.int32)


def make_examples(
    fires_on: list[set[int]], token_WS: np.ndarray, *, E: int = 6, C: int = 8
) -> Examples:
    """Features active where a token is in their set, by position and token strongly."""
    W, S = token_WS.shape
    U = len(fires_on)
    a_UWS = np.zeros((U, W, S), np.float32)
    for u, tokens in enumerate(fires_on):
        size_WS = 1 + token_WS / 100 + np.arange(W)[:, None] / 1000
        a_UWS[u] = np.where(np.isin(token_WS, sorted(tokens)), size_WS, 0)
    fired_UW = a_UWS.any(2)
    top, drawn = (_excerpts(a_UWS, token_WS, E, C, skip) for skip in (0, 2))
    return Examples(
        layer_U=np.arange(U, dtype=np.int32) // 4,
        feature_U=np.arange(U, dtype=np.int32) * 10,
        token_WS=token_WS,
        n_tokens=int((token_WS >= 0).sum()),
        count_U=(a_UWS > 0).sum((1, 2)),
        min_U=np.where(a_UWS > 0, a_UWS, np.inf).min((1, 2)),
        max_U=a_UWS.max((1, 2)),
        histogram_UB=np.zeros((U, 4), np.int64),
        edge_U2=np.zeros((U, 2), np.float32),
        top=top,
        drawn=drawn,
        fired_UW=np.packbits(fired_UW, axis=1, bitorder="little"),
    )


def _excerpts(
    a_UWS: np.ndarray, token_WS: np.ndarray, E: int, C: int, skip: int
) -> Excerpts:
    """The windows with the largest activations, or every `skip`-th of those behind."""
    U, _, S = a_UWS.shape
    value_UE = np.zeros((U, E), np.float32)
    window_UE = np.full((U, E), -1, np.int32)
    pos_UE, start_UE = np.zeros((2, U, E), np.int32)
    act_UEC = np.zeros((U, E, C), np.float32)
    for u in range(U):
        peak_W = a_UWS[u].max(1)
        order = [w for w in np.argsort(-peak_W, kind="stable") if peak_W[w] > 0]
        order = order[E::skip] if skip else order
        for e, w in enumerate(order[:E]):
            pos = int(a_UWS[u, w].argmax())
            start = max(0, min(pos - C // 2, S - C))
            value_UE[u, e], window_UE[u, e] = peak_W[w], w
            pos_UE[u, e], start_UE[u, e] = pos, start
            act_UEC[u, e] = a_UWS[u, w, start : start + C]
    return Excerpts(value_UE, window_UE, pos_UE, start_UE, act_UEC)


def planted(n: int = 12, seed: int = 0) -> Examples:
    """Feature u fires on the tokens 2u and 2u + 1."""
    return make_examples([{2 * u, 2 * u + 1} for u in range(n)], make_windows(seed))


def source(examples: Examples, n_shown: int = SHOWN, context: int = 32) -> Source:
    return Source(examples, WORDS, n_shown=n_shown, context=context)


def trial_of(data: dict[str, Any]) -> Trial:
    """The trial that `as_json` was called on."""
    shown = tuple(
        tuple(
            Shown(s["window"], tuple(s["tokens"]), tuple(s["acts"]), s["peak"])
            for s in each
        )
        for each in data["shown"]
    )
    fields: dict[str, Any] = data | {
        "features": tuple((f[0], f[1]) for f in data["features"]),
        "shown": shown,
        "query": tuple(map(tuple, data["query"])),
    }
    return Trial(**fields)


def swapped(trial: Trial) -> Trial:
    """The same question with what is called "1" and "2" exchanged."""
    answer = 2 if trial.answer == 1 else 1
    if trial.kind == "contrastive":
        return dataclasses.replace(trial, query=trial.query[::-1], answer=answer)
    return dataclasses.replace(
        trial, features=trial.features[::-1], shown=trial.shown[::-1], answer=answer
    )
