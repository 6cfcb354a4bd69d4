"""A prompt becomes a graph: the top-level shell.

prompt --tokenizer--> tokens --lm.record--> Recording --dictionary.active--> Active
  --graph.attribute_recording--> Graph --files.write_trace--> a directory
"""

from __future__ import annotations

import dataclasses
import hashlib
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from jaxclt.clt.active import Active, active_features
from jaxclt.clt.coder import Dictionary
from jaxclt.errors import InputError, check_at_least
from jaxclt.global_weights.files import SavedGlobals
from jaxclt.global_weights.shortlist import Shortlist
from jaxclt.graph.attribute import (
    AttributeConfig,
    Timing,
    attribute_recording,
)
from jaxclt.graph.compute import memory_budget, plan_attribution
from jaxclt.graph.graph import Graph, GraphMeta
from jaxclt.graph.memory import MemoryPlan, patterns_kept
from jaxclt.graph.prompt import Prompt as RecordedPrompt
from jaxclt.graph.targets import place_targets, salient_targets, token_targets
from jaxclt.io.chat import check_messages, is_chat
from jaxclt.io.model import Model
from jaxclt.io.tokenizer import Bos
from jaxclt.lm.config import LMConfig
from jaxclt.lm.run import record
from jaxclt.shapes import bucket
from jaxclt.text.prompts import Prompt, prompt_ids, prompt_text
from jaxclt.trace.target_text import read_targets
from jaxclt.types import LMParams, Recording, Targets
from jaxclt.version import __version__

__all__ = [
    "TargetChoice",
    "Traced",
    "identity",
    "plan_trace",
    "prompt_tokens",
    "record_prompt",
    "record_text",
    "trace_prompt",
]

_STAGES = ("attribute", "influence", "prune", "provenance")

# Texts (see `target_text`), or targets of `jaxclt.graph.targets`, or a function that
# makes them from the model and its recording of the prompt (not padded).
TargetChoice = str | Sequence[str] | Targets | Callable[[LMParams, Recording], Targets]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Traced:
    """A graph with what was measured on the way."""

    graph: Graph
    timing: dict[str, float]  # seconds
    identity: dict[str, Any]  # what it depends on, see `identity`
    n_active: int  # features active on the prompt, attributed or not
    work: dict[str, Any]  # how the edges were computed, and what that took
    # Next tokens with their probabilities: the targets, or the most probable ones if
    # something else is explained.
    top_tokens: tuple[tuple[str, float], ...]


@partial(jax.jit, static_argnames=("cfg", "keep_patterns"))
def record_prompt(
    params: LMParams, token_T: Array, cfg: LMConfig, *, keep_patterns: bool = True
) -> Recording:
    """`jaxclt.lm.run.record`, jitted once for everybody."""
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


def prompt_tokens(model: Model, prompt: Prompt, bos: Bos = "auto") -> list[int]:
    """Token ids of a prompt; ids that are given stay as they are.

    Raises:
      InputError: if the prompt is empty or longer than the model's context, or an id
        is not the model's.
    """
    blank = isinstance(prompt, str) and not prompt.strip()
    ids = [] if blank else prompt_ids(model.tokenizer, prompt, bos)
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


def identity(
    model: Model,
    dictionary: Dictionary,
    prompt: Prompt,
    config: AttributeConfig,
    bos: Bos,
) -> dict[str, Any]:
    """What a trace depends on, as JSON: equal identities give equal graphs."""
    chosen = {"dictionary_made_of": dict(dictionary.provenance)}
    given: dict[str, Any] = {"prompt": prompt}
    if not isinstance(prompt, str):
        given = {"prompt": prompt_text(model.tokenizer, prompt)}
        if is_chat(prompt):
            given["messages"] = check_messages(prompt)
        else:
            given["token_ids"] = prompt_ids(model.tokenizer, prompt)
    return {
        **given,
        "bos": bos,
        "hashes": {"model": model.hash, "dictionary": dictionary.hash},
        "dictionary": dictionary.name,
        **(chosen if dictionary.provenance else {}),
        "config": dataclasses.asdict(config),
        "version": __version__,
    }


def trace_prompt(
    model: Model,
    dictionary: Dictionary,
    prompt: Prompt,
    *,
    config: AttributeConfig | None = None,
    targets: TargetChoice = (),
    bos: Bos = "auto",
    prefilter: tuple[SavedGlobals, int] | None = None,
    on_rows: Callable[[int, int], None] = lambda done, total: None,
    stop: Callable[[], bool] = lambda: False,
) -> Traced:
    """Trace one prompt.

    Args:
      model: from `jaxclt.load_model`.
      dictionary: from `jaxclt.load_dictionary`.
      prompt: text, token ids, or a chat as messages {"role", "content"}, which the
        model's own template makes a text of.
      config: how much to compute.
      targets: what to explain instead of the top tokens, see `TargetChoice`.
      bos: whether a beginning-of-sequence token is put first.
      prefilter: global weights of the dictionary and how many features they are to
        shortlist; only those may be nodes, see `jaxclt.global_weights.shortlist`.
      on_rows: progress, (rows done, rows planned).
      stop: once true, come to an end, see `jaxclt.graph.attribute_recording`.

    Raises:
      KeyboardInterrupt: if stopped where nothing could be kept.
      InputError: for a prompt, target or dictionary that does not fit the model.
    """
    config = config or AttributeConfig()
    same = identity(model, dictionary, prompt, config, bos)
    shortlist = None
    if prefilter is not None:
        shortlist = _shortlist(dictionary, *prefilter)
        same["prefilter"] = {"links": len(shortlist.links), "size": shortlist.size}
    texts = [targets] if isinstance(targets, str) else targets
    given = not isinstance(texts, Sequence) or len(texts) > 0
    if bos == "auto" and config.convention == "circuit-tracer":
        bos = "always"
    # A template may ask for the time: its text is made once.
    ids = prompt_tokens(model, same["prompt"] if is_chat(prompt) else prompt, bos)
    clock: dict[str, float] = {}
    spent = Timing()
    with _compile_seconds() as compiled, _stage(clock, "total"):
        with _stage(clock, "record"), jax.default_matmul_precision(config.precision):
            pad = not callable(targets)  # a function of the recording sees the prompt
            recording = record_text(model, ids, memory_budget(config), pad=pad)
            chosen = _targets(model, dictionary, recording, len(ids), texts)
            top = chosen
            if given:
                top = _next_tokens(model, recording, len(ids), chosen)
            active = active_features(
                dictionary, model.params, recording, model.cfg, len(ids)
            )
        if given:
            listed = list(texts) if isinstance(texts, Sequence) else _digest(chosen)
            same["targets"] = listed
        meta = GraphMeta(
            model=model.name,
            dictionary=dictionary.name,
            prompt=same["prompt"],
            messages=same.get("messages", []),
            tokens=tuple(model.tokenizer.token_strings(ids)),
            target_tokens=_labels(model, chosen),
            n_layers=model.cfg.n_layers,
            weights=_weights(chosen, top),
            config=same["config"],
            hashes=same["hashes"],
            labels=_feature_labels(dictionary, active),
            version=__version__,
        )
        graph = attribute_recording(
            RecordedPrompt(
                model.params,
                recording,
                active,
                chosen,
                cfg=model.cfg,
                config=config,
                n_tokens=len(ids),
                shortlist=shortlist,
                stop=stop,
            ),
            meta,
            on_rows=on_rows,
            timing=spent,
        )
    if "stopped" in spent.work:
        same["stopped"] = int(graph.attributed_R.sum()) - graph.n_targets
    clock |= {s: getattr(spent, s) for s in _STAGES}
    clock["compile"] = compiled[0]
    return Traced(
        graph=graph,
        timing=clock,
        identity=same,
        n_active=len(active.layer_A),
        work=spent.work,
        top_tokens=tuple(
            (label, round(float(p), 6))
            for label, p in zip(_labels(model, top), top.weight_K, strict=True)
        ),
    )


def _shortlist(dictionary: Dictionary, found: SavedGlobals, size: int) -> Shortlist:
    """The shortlist that global weights make.

    Raises:
      InputError: if they are of another dictionary, or the size is none.
    """
    check_at_least(1, prefilter_size=size)
    if found.meta.get("hashes", {}).get("dictionary") != dictionary.hash:
        raise InputError(
            f"--prefilter: its global weights are of {found.meta.get('dictionary')}, "
            f"not of {dictionary.name}: run `jaxclt globals` on this dictionary"
        )
    return Shortlist(found.links, size)


def plan_trace(
    model: Model,
    dictionary: Dictionary,
    prompt: Prompt,
    *,
    config: AttributeConfig | None = None,
    bos: Bos = "auto",
) -> tuple[MemoryPlan, int, int]:
    """What tracing a prompt will hold in memory; runs the model once, no row.

    Args:
      model: from `jaxclt.load_model`.
      dictionary: from `jaxclt.load_dictionary`.
      prompt: as for `trace_prompt`.
      config: how much to compute, and with how much memory.
      bos: as for `trace_prompt`.

    Returns:
      The plan, the prompt's tokens and its active features.

    Raises:
      InputError: if it does not fit, with the bytes needed and the flag to lower.
    """
    config = config or AttributeConfig()
    ids = prompt_tokens(model, prompt, bos)
    recording = record_text(model, ids, memory_budget(config))
    active = active_features(dictionary, model.params, recording, model.cfg, len(ids))
    plan = plan_attribution(
        active,
        10,
        cfg=model.cfg,
        params=model.params,
        config=config,
        n_tokens=len(recording.token_T),
    )
    return plan, len(ids), len(active.layer_A)


def _targets(
    model: Model,
    dictionary: Dictionary,
    recording: Recording,
    n_tokens: int,
    wanted: TargetChoice,
) -> Targets:
    if callable(wanted):
        found = wanted(model.params, recording)
        if not isinstance(found, Targets):
            raise InputError("the function given as targets did not return Targets")
    elif isinstance(wanted, Targets):
        found = wanted
    elif wanted:
        found = read_targets(wanted, model, dictionary, recording, n_tokens=n_tokens)
    else:
        found = salient_targets(model.params, recording.out_TD[n_tokens - 1])
    return place_targets(found, cfg=model.cfg, n_tokens=n_tokens)


def _labels(model: Model, targets: Targets) -> tuple[str, ...]:
    """Token strings, and what other targets are called."""
    ids = [int(i) for i in targets.token_K]
    return tuple(
        label or (model.tokenizer.token_strings([i])[0] if i >= 0 else "target")
        for label, i in zip(targets.labels, ids, strict=True)
    )


def _feature_labels(dictionary: Dictionary, active: Active) -> dict[str, str]:
    """The dictionary's labels of what is active, by "layer:feature"."""
    known = dictionary.labels
    places = set(zip(active.layer_A.tolist(), active.feature_A.tolist(), strict=True))
    named = sorted(places & known.keys())
    return {f"{layer}:{feature}": known[layer, feature] for layer, feature in named}


def _next_tokens(
    model: Model, recording: Recording, n_tokens: int, chosen: Targets
) -> Targets:
    """The chosen next tokens, or the top ones if anything else was chosen."""
    out_D = recording.out_TD[n_tokens - 1]
    if ((chosen.token_K >= 0) & (chosen.pos_K == n_tokens - 1)).all():
        return token_targets(model.params, out_D, jnp.asarray(chosen.token_K))
    return salient_targets(model.params, out_D)


def _weights(chosen: Targets, next_tokens: Targets) -> str:
    """Whether the chosen targets weigh what they are probable."""
    same = np.array_equal(chosen.token_K, next_tokens.token_K)
    same = same and np.array_equal(chosen.weight_K, next_tokens.weight_K)
    return "probability" if same else "chosen"


def _digest(targets: Targets) -> str:
    """What tells targets apart that were not given as text."""
    total = hashlib.sha256(repr(targets.labels).encode())
    for leaf in jax.tree.leaves(targets):
        total.update(f"{leaf.dtype}{leaf.shape}".encode() + np.asarray(leaf).tobytes())
    return total.hexdigest()


@contextmanager
def _stage(clock: dict[str, float], name: str) -> Iterator[None]:
    start = time.perf_counter()
    yield
    clock[name] = time.perf_counter() - start


@contextmanager
def _compile_seconds() -> Iterator[list[float]]:
    """Seconds XLA spends compiling inside the body, in a one-element list."""
    total = [0.0]

    def listen(event: str, duration_secs: float, **_: Any) -> None:
        if event.endswith("backend_compile_duration"):
            total[0] += duration_secs

    jax.monitoring.register_event_duration_secs_listener(listen)
    try:
        yield total
    finally:
        jax.monitoring.unregister_event_duration_listener(listen)
