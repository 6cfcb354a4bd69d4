"""A prompt becomes a graph: the top-level shell.

prompt --trace.record--> Recording, Active --graph.attribute_recording--> Graph
  --trace.files.write_trace--> a directory
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import jax
import numpy as np

from jaxclt.attending.document import make_attention
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
from jaxclt.graph.memory import MemoryPlan
from jaxclt.graph.prompt import Prompt as RecordedPrompt
from jaxclt.graph.prompt import check_exact
from jaxclt.io.chat import check_messages, is_chat
from jaxclt.io.model import Model
from jaxclt.naming.label import with_said
from jaxclt.naming.writes import Spread, features_spread
from jaxclt.precision import at_precision
from jaxclt.text.prompts import Opened, Prompt, prompt_ids, prompt_text
from jaxclt.trace.explained import (
    TargetChoice,
    choose_targets,
    next_tokens,
    target_labels,
    targets_identity,
)
from jaxclt.trace.record import prompt_tokens, record_text
from jaxclt.types import Targets
from jaxclt.version import __version__

__all__ = ["Traced", "identity", "plan_trace", "trace_prompt"]


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
    dtype: str = "float32"  # of the weights
    attention: dict[str, Any] | None = None  # attention.json, if asked for


def identity(
    model: Model, dictionary: Dictionary, prompt: Prompt, config: AttributeConfig
) -> dict[str, Any]:
    """What a trace depends on, as JSON: equal identities give equal graphs."""
    chosen = {"dictionary_made_of": dict(dictionary.provenance)}
    opened = Opened.of(prompt)
    given: dict[str, Any] = {"prompt": opened.prompt}
    if not isinstance(opened.prompt, str):
        given = {"prompt": prompt_text(model.tokenizer, opened)}
        if is_chat(opened.prompt):
            given["messages"] = check_messages(opened.prompt)
        else:
            given["token_ids"] = prompt_ids(model.tokenizer, opened)
    return {
        **given,
        "bos": opened.bos,
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
    prefilter: tuple[SavedGlobals, int] | None = None,
    on_rows: Callable[[int, int], None] = lambda done, total: None,
    stop: Callable[[], bool] = lambda: False,
) -> Traced:
    """Trace one prompt.

    Args:
      model: from `jaxclt.load_model`.
      dictionary: from `jaxclt.load_dictionary`.
      prompt: text, token ids, or a chat as messages {"role", "content"}, which the
        model's own template makes a text of; see `jaxclt.text.prompts.Prompt`.
      config: how much to compute.
      targets: what to explain instead of the top tokens, see `TargetChoice`.
      prefilter: global weights of the dictionary and how many features they are to
        shortlist; only those may be nodes, see `jaxclt.global_weights.shortlist`.
      on_rows: progress, (rows done, rows planned).
      stop: once true, come to an end, see `jaxclt.graph.attribute_recording`.

    Raises:
      KeyboardInterrupt: if stopped where nothing could be kept.
      InputError: for a prompt, target or dictionary that does not fit the model.
    """
    check_exact(model.params.embed_VD.dtype)
    config = config or AttributeConfig()
    depends = identity(model, dictionary, prompt, config)
    shortlist = None
    if prefilter is not None:
        shortlist = _shortlist(dictionary, *prefilter)
        depends["prefilter"] = {"links": len(shortlist.links), "size": shortlist.size}
    opened = Opened.of(prompt)
    if "messages" in depends:  # a template may ask for the time: its text is made once
        opened = dataclasses.replace(opened, prompt=depends["prompt"])
    ids = _tokens(model, opened, config)
    spent = Timing()
    at = at_precision(config.precision)
    with _compile_seconds() as compiled, spent.of("total"), at:
        with spent.of("record"):
            pad = not callable(targets)  # a function of the recording sees the prompt
            recording = record_text(model, ids, memory_budget(config), pad=pad)
            active = active_features(
                dictionary, model.params, recording, model.cfg, len(ids)
            )
            p = RecordedPrompt(
                model.params,
                recording,
                active,
                choose_targets(targets, model, dictionary, recording, len(ids)),
                cfg=model.cfg,
                config=config,
                n_tokens=len(ids),
                dictionary=dictionary,
                shortlist=shortlist,
                stop=stop,
            )
            top = p.targets
            if said := targets_identity(targets, p.targets):
                depends["targets"] = said
                top = next_tokens(model, p)
        meta = GraphMeta(
            model=model.name,
            dictionary=dictionary.name,
            prompt=depends["prompt"],
            messages=depends.get("messages", []),
            tokens=tuple(model.tokenizer.token_strings(ids)),
            target_tokens=target_labels(model, p.targets),
            n_layers=model.cfg.n_layers,
            weights=_weights(p.targets, top),
            config=depends["config"],
            hashes=depends["hashes"],
            labels=_feature_labels(dictionary, active),
            version=__version__,
        )
        graph = attribute_recording(p, meta, on_rows=on_rows, timing=spent)
        with spent.of("names"):
            graph = _named(graph, p, model, dictionary)
        attention = None
        if config.attention and "stopped" not in spent.work:
            with spent.of("attention"):
                attention = _attention(p, graph, spent)
    if "stopped" in spent.work:
        depends["stopped"] = int(graph.attributed_R.sum()) - graph.n_targets
    return Traced(
        graph=graph,
        timing=spent.seconds | {"compile": compiled[0]},
        identity=depends,
        n_active=len(active.layer_A),
        work=spent.work,
        top_tokens=tuple(
            (label, round(float(share), 6))
            for label, share in zip(
                target_labels(model, top), top.weight_K, strict=True
            )
        ),
        dtype=str(model.params.embed_VD.dtype),
        attention=attention,
    )


def _named(
    graph: Graph, p: RecordedPrompt, model: Model, dictionary: Dictionary
) -> Graph:
    """The graph, its shown features saying what they write and read."""
    spread = _spread(model, dictionary)
    said = with_said(
        graph, p.active, model.params, spread, model.tokenizer.token_strings
    )
    return dataclasses.replace(graph, meta=dataclasses.replace(graph.meta, said=said))


_KNOWN: dict[tuple[str, str], Spread] = {}  # of the last dictionary


def _spread(model: Model, dictionary: Dictionary) -> Spread:
    """Of a dictionary's features, kept for its next prompt."""
    key = model.hash, dictionary.hash
    if key not in _KNOWN:
        _KNOWN.clear()
        _KNOWN[key] = features_spread(dictionary, model.params, model.cfg)
    return _KNOWN[key]


def _attention(p: RecordedPrompt, graph: Graph, spent: Timing) -> dict[str, Any]:
    """Heads and cells of the prompt, in the memory that its edges took."""
    return make_attention(
        p,
        graph,
        p.target_rows(),
        n=p.config.attention,
        at_once=spent.work["chunk_size"] // spent.work["devices"],
        packed=spent.packed,
    )


def _shortlist(dictionary: Dictionary, found: SavedGlobals, size: int) -> Shortlist:
    """The shortlist that global weights make.

    Raises:
      InputError: if they are of another dictionary, or the size is below 1.
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
) -> tuple[MemoryPlan, int, int]:
    """What tracing a prompt will hold in memory; runs the model once, no row.

    Args:
      model: from `jaxclt.load_model`.
      dictionary: from `jaxclt.load_dictionary`.
      prompt: as for `trace_prompt`.
      config: how much to compute, and with how much memory.

    Returns:
      The plan, the prompt's tokens and its active features.

    Raises:
      InputError: if it does not fit, with the bytes needed and the flag to lower.
    """
    config = config or AttributeConfig()
    ids = _tokens(model, prompt, config)
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


def _tokens(model: Model, prompt: Prompt, config: AttributeConfig) -> list[int]:
    """Token ids of a prompt.

    circuit-tracer puts a beginning-of-sequence token first unless it is told not to.
    """
    opened = Opened.of(prompt)
    if opened.bos == "auto" and config.convention == "circuit-tracer":
        opened = dataclasses.replace(opened, bos="always")
    return prompt_tokens(model, opened)


def _feature_labels(dictionary: Dictionary, active: Active) -> dict[str, str]:
    """The dictionary's labels of what is active, by "layer:feature"."""
    known = dictionary.labels
    places = set(zip(active.layer_A.tolist(), active.feature_A.tolist(), strict=True))
    named = sorted(places & known.keys())
    return {f"{layer}:{feature}": known[layer, feature] for layer, feature in named}


def _weights(chosen: Targets, next_tokens: Targets) -> str:
    """Whether the chosen targets are weighted by their probabilities."""
    same = np.array_equal(chosen.token_K, next_tokens.token_K)
    same = same and np.array_equal(chosen.weight_K, next_tokens.weight_K)
    return "probability" if same else "chosen"


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
