"""A prompt is recorded, for the first time or again: the one way to do it.

prompt --tokenizer--> tokens --lm.record--> Recording --dictionary.active--> Active
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import jax.numpy as jnp
import numpy as np
from jax import Array

from jaxclt.clt.active import active_features
from jaxclt.clt.coder import Dictionary
from jaxclt.errors import InputError
from jaxclt.graph.graph import Graph
from jaxclt.graph.memory import available_bytes, patterns_kept
from jaxclt.graph.prompt import Recorded
from jaxclt.graph.provenance import crop
from jaxclt.io.model import Model
from jaxclt.lm.config import LMConfig
from jaxclt.lm.run import record
from jaxclt.precision import jit
from jaxclt.shapes import bucket
from jaxclt.text.prompts import Opened, Prompt, prompt_ids
from jaxclt.types import LMParams, Recording

__all__ = ["prompt_tokens", "record_again", "record_prompt", "record_text", "recorded"]
__all__ += ["same_hash"]


@partial(jit, static_argnames=("cfg", "keep_patterns"))
def record_prompt(
    params: LMParams, token_T: Array, cfg: LMConfig, *, keep_patterns: bool = True
) -> Recording:
    """`jaxclt.lm.run.record`, jitted once for all callers."""
    return record(params, token_T, cfg=cfg, keep_patterns=keep_patterns)


def record_text(
    model: Model, ids: Sequence[int] | np.ndarray, budget: int, *, pad: bool = True
) -> Recording:
    """The clean pass on a prompt: the one way to record it, under the memory plan.

    Args:
      model: from `jaxclt.load_model`.
      ids: from `prompt_tokens` or a graph.
      budget: bytes that may be used; where patterns take too much of them they are
        computed again as they are used.
      pad: to a bucket of lengths, which share a program. Padding comes after the
        prompt, so a causal model does not see it.
    """
    token_T = np.zeros(bucket(len(ids)) if pad else len(ids), np.int32)
    token_T[: len(ids)] = ids
    keep = patterns_kept(model.cfg, len(token_T), budget)
    return record_prompt(
        model.params, jnp.asarray(token_T), model.cfg, keep_patterns=keep
    )


def prompt_tokens(model: Model, prompt: Prompt) -> list[int]:
    """Token ids of a prompt; ids that are given stay as they are.

    Raises:
      InputError: if the prompt is empty or longer than the model's context, or an id
        is not the model's.
    """
    given = Opened.of(prompt).prompt
    blank = isinstance(given, str) and not given.strip()
    ids = [] if blank else prompt_ids(model.tokenizer, prompt)
    if not ids:
        raise InputError("the prompt is empty: give some text to trace")
    if min(ids) < 0 or max(ids) >= model.cfg.d_vocab:
        raise InputError(
            f"the prompt holds a token that is not in 0..{model.cfg.d_vocab - 1}"
        )
    if len(ids) > model.cfg.n_ctx:
        raise InputError(
            f"the prompt has {len(ids)} tokens, the model's context holds "
            f"{model.cfg.n_ctx}: shorten the prompt"
        )
    return ids


def same_hash(what: str, name: str, found: str, traced: str | None) -> None:
    """Raise InputError if a model or dictionary is not the one that was traced."""
    if found != traced:
        raise InputError(
            f"the {what} {name!r} is not the one that was traced but another {what} "
            f"(hash {found[:12]} instead of {str(traced)[:12]}): give the traced one "
            f"with --{what}, or trace again"
        )


def record_again(
    graph: Graph, model: Model, dictionary: Dictionary, *, pad: bool = True
) -> Recording:
    """The clean pass of a graph's prompt, in the memory that its trace was given.

    Less if less is free.

    Raises:
      InputError: if the graph comes from another model or dictionary.
    """
    for what, ours in (("model", model), ("dictionary", dictionary)):
        theirs = graph.meta.hashes.get(what, ours.hash)
        same_hash(what, ours.name, ours.hash, theirs)
    given, budget = graph.meta.config.get("memory_gb"), available_bytes()
    if isinstance(given, int | float):
        budget = min(budget, int(given * 1e9))
    return record_text(model, graph.token_T, budget, pad=pad)


def recorded(graph: Graph, model: Model, dictionary: Dictionary) -> Recorded:
    """A graph's prompt, recorded again, with all features active on it.

    Raises:
      InputError: if the graph comes from another model or dictionary.
    """
    recording = record_again(graph, model, dictionary)
    active = active_features(dictionary, model.params, recording, model.cfg)
    if graph.meta.convention == "circuit-tracer":
        active = active.where(active.pos_A > 0)
    recording, active = crop(recording, active, graph.n_tokens)
    return Recorded(model.params, recording, active, cfg=model.cfg)
