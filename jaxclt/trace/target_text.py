"""Targets written as text, as `--targets` and `jaxclt.attribute` take them.

| text | what is explained |
|---|---|
| `" Paris"` | the logit of a token (minus the mean logit) |
| `"id:1234"` | the same by the token's number |
| `" Paris@5"` | the same after position 5; -1 is the last one |
| `"top:5"` | the most probable tokens after position 5 |
| `"diff: Paris\\| London"` | the logit of the first minus that of the second |
| `"diff:"` | the answer, the first token given or the most probable, minus its foil |
| `"foil: London"` | the answer's foil; without it, the most probable other token |
| `"prob: Paris"`, `"logp: Paris"` | the token's (log-)probability, to first order |
| `"feature:12:5:345"` | a feature's pre-activation: layer, position, index |
| `"vector:resid_post:12@5:probe.npz"` | a direction at a site and position |

Differences and probabilities take ``@position`` too. Every text can begin with a
weight, as in ``"0.5*top:5"``; a negative weight reverses the target's sign.

A text that is one token of the model always means that token, whatever it looks like:
the one with this string, even if the tokenizer would split the text; else the one that
the tokenizer makes of it; else, if it begins with a space that no such token has
(``"diff: 95|94"``), the one of the text without the space.

If all texts are plain tokens, they are weighted by their probabilities; otherwise every
text counts the same, or by its weight. Vectors come from an npz file: `vec` [D] or
[K, D] and, if there is a constant, `const`. Sites are those of `jaxclt.graph.targets`.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np

from jaxclt.clt.coder import Dictionary
from jaxclt.errors import InputError, did_you_mean, shown
from jaxclt.files.npz import Must, open_npz
from jaxclt.graph.targets import (
    combine_targets,
    difference_targets,
    feature_targets,
    functional_targets,
    probability_targets,
    salient_targets,
    token_targets,
)
from jaxclt.io.model import Model
from jaxclt.lm.run import unembed
from jaxclt.types import Recording, Targets

__all__ = ["read_targets", "read_token"]

_KINDS = ("diff", "prob", "logp", "feature", "top", "vector")


class _Prompt(NamedTuple):
    """What texts refer to."""

    model: Model
    dictionary: Dictionary
    recording: Recording  # maybe padded beyond n_tokens
    n_tokens: int


def read_targets(
    texts: Sequence[str],
    model: Model,
    dictionary: Dictionary,
    recording: Recording,
    *,
    n_tokens: int,
) -> Targets:
    """Make targets from texts; see this module for how to write them.

    Args:
      texts: at least one.
      model: tokenizer and weights.
      dictionary: where features are looked up.
      recording: the clean pass, maybe padded.
      n_tokens: length of the prompt.

    Raises:
      InputError: if a text cannot be read, does not fit the model or the prompt, or is
        given twice.
    """
    prompt = _Prompt(model, dictionary, recording, n_tokens)
    if len(set(texts)) < len(texts):
        raise InputError("a target is given twice: name each once")
    plain = [_token(model, text) for text in texts]
    if any(_asks_contrast(*pair) for pair in zip(texts, plain, strict=True)):
        return _contrasted(prompt, texts, plain)
    ids = [token for token in plain if token is not None]
    if len(ids) == len(texts):
        found = _tokens(prompt, ids, n_tokens - 1)
        # A probability that underflows leaves no weight: then all count the same.
        return found if found.weight_K.any() else combine_targets([found])
    parts, weights = [], []
    for text, token in zip(texts, plain, strict=True):
        weight, body = (1.0, text) if token is not None else _weight(text)
        weights.append(weight)
        try:
            parts.append(_one(prompt, body))
        except InputError as error:
            raise InputError(f"target {shown(text)}: {error}") from error
    found = combine_targets(parts, weights)
    _refuse_twice(found)
    return found


def _asks_contrast(text: str, token: int | None) -> bool:
    return token is None and (text == "diff:" or text.startswith("foil:"))


def _contrasted(
    prompt: _Prompt, texts: Sequence[str], plain: Sequence[int | None]
) -> Targets:
    """Tokens, the answer first and its foil second; with ``diff:`` their difference."""
    model, last, foil = prompt.model, prompt.n_tokens - 1, None
    out_D, ids = prompt.recording.out_TD[last], [x for x in plain if x is not None]
    others = [text for text, x in zip(texts, plain, strict=True) if x is None]
    foils = [text[len("foil:") :] for text in others if text != "diff:"]
    if not all(map(_asks_contrast, others, [None] * len(others))) or len(foils) > 1:
        raise InputError("a contrast is of tokens: give them, one foil:, and no others")
    if foils:
        foil = read_token(model, foils[0])
    top = np.argsort(-np.asarray(unembed(model.params, out_D)), kind="stable")
    if not ids and "diff:" not in others:
        ids = np.asarray(salient_targets(model.params, out_D).token_K).tolist()
    answer = ids[0] if ids else int(top[0])
    if foil is None:
        foil = int(top[top != answer][0])
    if "diff:" in others:
        return _difference(model, answer, foil, last)
    if foil == answer:
        raise InputError(f"foil {foils[0]!r} is the answer itself: choose another")
    more = [token for token in ids[1:] if token != foil]
    return _tokens(prompt, [answer, foil, *more], last)


def read_token(model: Model, text: str) -> int:
    """The token that a text is.

    Raises:
      InputError: if it is not one token of the model.
    """
    token = _token(model, text)
    if token is None:
        raise InputError(
            f"{shown(text)} is not one token of this model: mind the leading space, or "
            "give id:N for token N"
        )
    return token


def _refuse_twice(targets: Targets) -> None:
    columns = targets.token_K, targets.pos_K, targets.layer_K
    seen = list(zip(*(np.asarray(x).tolist() for x in columns), strict=True))
    tokens = [place for place in seen if place[0] >= 0]
    if len(set(tokens)) < len(tokens):
        raise InputError("a target is given twice: name each once")


def _weight(text: str) -> tuple[float, str]:
    found = re.fullmatch(r"([+-]?(?:\d+\.?\d*|\.\d+))\*(.*)", text, re.DOTALL)
    return (float(found[1]), found[2]) if found else (1.0, text)


def _one(prompt: _Prompt, body: str) -> Targets:
    """The targets of one text without its weight.

    Raises:
      InputError: without the text in front, which the caller adds.
    """
    if body.startswith("feature:"):
        return _feature(prompt, body)
    if body.startswith("vector:"):
        return _vector(prompt, body)
    if body.startswith("top:"):
        return _top(prompt, body)
    last = prompt.n_tokens - 1
    # The text itself first: a token may hold an @.
    made = _logits(prompt, body, last)
    at = re.fullmatch(r"(.*)@(-?\d{1,9})", body, re.DOTALL)
    if made is None and at is not None:
        made = _logits(prompt, at[1], _position(prompt, int(at[2])))
    if made is not None:
        return made
    text = at[1] if at is not None else body
    kind = re.match(r"(diff|prob|logp):", text)
    if kind and kind[1] == "diff":
        raise InputError("write diff:A|B with A and B one token each")
    text = text[kind.end() :] if kind else text
    n = len(prompt.model.tokenizer.encode(text, "never"))
    what = "it" if text == body else repr(text)
    hint = did_you_mean(body.partition(":")[0], _KINDS) if ":" in body else ""
    if n == 1:
        raise InputError(f"{what} is not a token of this model{hint}")
    raise InputError(
        f"{what} is {n} tokens, not one: mind the leading space, or give a shorter "
        f"text, or id:N for token N{hint}"
    )


def _logits(prompt: _Prompt, body: str, pos: int) -> Targets | None:
    """Targets that read the output at `pos`, or None if the text names none."""
    model, out_D = prompt.model, prompt.recording.out_TD[pos]
    token = _token(model, body)
    if token is not None:
        return _tokens(prompt, [token], pos)
    kind, _, text = body.partition(":")
    if kind in ("prob", "logp") and (token := _token(model, text)) is not None:
        return probability_targets(
            model.params,
            out_D,
            jnp.asarray([token], jnp.int32),
            log=kind == "logp",
            pos=pos,
            labels=[f"{'log p' if kind == 'logp' else 'p'}({_string(model, token)})"],
        )
    if kind == "diff":
        # Either token may hold a bar: take the one cut that leaves two tokens.
        cuts = [i for i, c in enumerate(text) if c == "|"]
        pairs = [(_token(model, text[:i]), _token(model, text[i + 1 :])) for i in cuts]
        for a, b in pairs:
            if a is not None and b is not None:
                return _difference(model, a, b, pos)
    return None


def _difference(model: Model, a: int, b: int, pos: int) -> Targets:
    if a == b:
        raise InputError("both tokens are the same, so their difference is zero")
    return difference_targets(
        model.params,
        jnp.asarray([a], jnp.int32),
        jnp.asarray([b], jnp.int32),
        pos=pos,
        labels=[f"{_string(model, a)} − {_string(model, b)}"],
    )


def _tokens(prompt: _Prompt, ids: list[int], pos: int) -> Targets:
    if len(set(ids)) < len(ids):
        raise InputError("a target is given twice: name each token once")
    model, out_D = prompt.model, prompt.recording.out_TD[pos]
    return token_targets(model.params, out_D, jnp.asarray(ids, jnp.int32), pos=pos)


def _top(prompt: _Prompt, body: str) -> Targets:
    # A negative number would be taken for how many tokens are wanted.
    found = re.fullmatch(r"top:(\d{1,9})", body)
    if found is None:
        last = prompt.n_tokens - 1
        raise InputError(f"write top:position, a whole number from 0 to {last}")
    pos = _position(prompt, int(found[1]))
    return salient_targets(prompt.model.params, prompt.recording.out_TD[pos], pos=pos)


def _feature(prompt: _Prompt, body: str) -> Targets:
    found = re.fullmatch(r"feature:(\d{1,9}):(-?\d{1,9}):(\d{1,9})", body)
    if found is None:
        raise InputError("write feature:layer:position:index, three whole numbers")
    layer, pos, feature = map(int, found.groups())
    return feature_targets(
        prompt.dictionary,
        prompt.model.params,
        prompt.recording,
        [layer, _position(prompt, pos), feature],
        cfg=prompt.model.cfg,
    )


def _vector(prompt: _Prompt, body: str) -> Targets:
    found = re.fullmatch(
        r"vector:(out|\w+:\d{1,9})(?:@(-?\d{1,9}))?:(.+)", body, re.DOTALL
    )
    if found is None:
        raise InputError("write vector:site@position:file.npz, see --help")
    site, pos, path = found.groups()
    vec_KD, const_K = _read_vectors(path)
    return functional_targets(
        prompt.model.params,
        prompt.recording,
        site,
        _position(prompt, -1 if pos is None else int(pos)),
        vec_KD,
        cfg=prompt.model.cfg,
        const_K=const_K,
    )


def _read_vectors(path: str) -> tuple[np.ndarray, np.ndarray | None]:
    wrong = "is not an npz file with an array `vec` (and maybe `const`)"
    with open_npz(Path(path), wrong, "write one with numpy.savez") as file:
        one, sizes = len(file.header("vec").shape) == 1, {}
        vec_KD = file.array("vec", Must("half", "D" if one else "KD"), sizes)
        if "const" not in file:
            return vec_KD, None
        sizes.setdefault("K", 1)
        axes = "K" * len(file.header("const").shape)
        return vec_KD, file.array("const", Must("half", axes), sizes)


def _position(prompt: _Prompt, pos: int) -> int:
    n = prompt.n_tokens
    if not -n <= pos < n:
        raise InputError(
            f"the prompt has {n} tokens: give a position from 0 to {n - 1}, or -1 for "
            "the last"
        )
    return pos % n


def _token(model: Model, text: str) -> int | None:
    """The id of a text that is one token, see this module; None of any other."""
    tokenizer = model.tokenizer
    found = tokenizer.find(text)
    if found is not None:
        return found
    if number := re.fullmatch(r" ?id:(\d{1,9})", text):
        if int(number[1]) >= model.cfg.d_vocab:
            last = model.cfg.d_vocab - 1
            raise InputError(f"{text!r}: the model's tokens are id:0 to id:{last}")
        return int(number[1])
    return tokenizer.find(text[1:]) if text[:1] == " " and text[1:] else None


def _string(model: Model, token: int) -> str:
    return model.tokenizer.token_strings([token])[0]
