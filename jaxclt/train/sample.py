"""Windows of tokens that the model wrote itself: `--data model`.

Text without anybody's licence, and as much as wanted; a dictionary trained on it
describes the model on its own samples. Windows start from the model's first special
token and are drawn at temperature 1; where a text ends inside a window, the next one
follows. Held-out windows are other draws of the same kind.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from jaxclt.errors import InputError
from jaxclt.files.npz import Must, open_npz, write_npz
from jaxclt.io.model import Model
from jaxclt.io.tokenizer import Tokenizer
from jaxclt.lm.cache import sample_text
from jaxclt.lm.config import LMConfig
from jaxclt.precision import jit
from jaxclt.runs.kept import State
from jaxclt.text.corpus import Windows
from jaxclt.types import LMParams

__all__ = ["sample", "sample_windows", "start_token"]


def start_token(tokenizer: Tokenizer) -> int:
    """The token that a text begins after.

    Raises:
      InputError: if the tokenizer has no special token.
    """
    known = (tokenizer.bos_id, tokenizer.eos_id, *sorted(tokenizer.special_ids))
    for token in known:
        if token is not None and tokenizer.has_row(token):
            return int(token)
    raise InputError("--data model needs a tokenizer with a special token to start at")


@partial(jit, static_argnames=("cfg", "size"))
def sample(
    params: LMParams, start_W: Array, key: Array, *, cfg: LMConfig, size: int
) -> Array:
    """Token windows [W, S] drawn from the model at temperature 1.

    Args:
      params: the model.
      start_W: first token of each window.
      key: PRNG key.
      cfg: model shape.
      size: positions of a window, the first included.
    """
    keys = jax.random.split(key, len(start_W))
    return jax.vmap(
        lambda start, key: sample_text(params, start, key, cfg=cfg, size=size)
    )(start_W, keys)


def sample_windows(
    model: Model,
    *,
    size: int,
    train_tokens: int,
    held_tokens: int,
    per_call: int,
    seed: int,
    partial_file: Path | None = None,
    on_tokens: Callable[[int, int], None] = lambda done, total: None,
) -> Windows:
    """Windows to train on and to hold out, all different draws.

    Args:
      model: from `load_model`.
      size: positions of a window.
      train_tokens: at least so many, without the first of each window.
      held_tokens: likewise.
      per_call: windows drawn together.
      seed: of the draws.
      partial_file: keeps what is drawn so far, so that an interrupted run goes on; it
        is deleted at the end.
      on_tokens: progress.

    Raises:
      InputError: see `start_token`.
    """
    params, cfg, tokenizer = model.params, model.cfg, model.tokenizer
    start = jnp.full((per_call,), start_token(tokenizer), jnp.int32)
    n_held, n_train = (-(-n // (size - 1)) for n in (held_tokens, train_tokens))
    wanted = n_held + n_train
    rows: list[np.ndarray] = []
    if partial_file is not None and partial_file.is_file():
        do = "remove it to start again"
        with open_npz(partial_file, "cannot be read", do) as found:
            must = Must("int", "WS", 0, cfg.d_vocab)
            token_WS = found.array("token_WS", must, {"S": size})
            if len(token_WS) % per_call:
                raise ValueError("it was drawn in other portions")
        rows = list(token_WS.reshape(-1, per_call, size))
    state = State(partial_file)

    def save(path: Path) -> None:
        write_npz(path, token_WS=np.concatenate(rows))

    def report() -> None:
        n = min(len(rows) * per_call, wanted)
        on_tokens(n * (size - 1), wanted * (size - 1))

    while len(rows) * per_call < wanted:
        key = jax.random.fold_in(jax.random.key(seed), len(rows))
        rows.append(np.asarray(sample(params, start, key, cfg=cfg, size=size)))
        state.step(len(rows), save, report)
    token_WS = np.concatenate(rows)[:wanted]
    held = {row.tobytes() for row in token_WS[:n_held]}
    # A model that is sure of itself draws the same window twice.
    others = [row for row in token_WS[n_held:] if row.tobytes() not in held]
    if not others:
        raise InputError("--data model: the model writes the same text every time")
    train_WS = np.stack(others)
    state.remove()
    return Windows.of(train_WS, token_WS[:n_held], special=tokenizer.special_ids)
