"""The shell of patching: a traced prompt becomes a model again, and is changed.

directory --reopen--> model, dictionary, graph --Subject--> recording --patch--> result
"""

from __future__ import annotations

import dataclasses
import functools
import json
import math
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxclt.clt.active import Active, Dictionary
from jaxclt.clt.neurons import NeuronDictionary
from jaxclt.errors import InputError
from jaxclt.graph.graph import Graph
from jaxclt.io.dictionary import load_dictionary
from jaxclt.io.graph_file import load_graph
from jaxclt.io.model import Model, load_model
from jaxclt.patching.batch import (
    How,
    Local,
    default_range,
    make_local,
    make_patchable,
    patch_many,
    patch_one,
)
from jaxclt.patching.edits import Edit, Edits, batch_edits, expand_edits, make_edits
from jaxclt.patching.effects import Ask, Effect, clean_effect, measure_effect
from jaxclt.patching.features import Features, gather_features
from jaxclt.patching.generate import continue_prompt
from jaxclt.patching.modes import Gates, Mode, Patchable
from jaxclt.trace import record_prompt

__all__ = [
    "PatchResult",
    "Reopened",
    "Subject",
    "generate_patched",
    "patch",
    "reopen",
    "scale_curve",
    "sweep_end",
]

SCALES = tuple(0.5 * i for i in range(-4, 9))  # -2 ... 4: suppress, ablate, amplify
N_TOP = 5
DOUBLE = (
    "additive patching of a cross-layer transcoder counts effects twice: later MLPs "
    "respond to the first write and the later writes are added as well; use "
    "constrained or iterative for a causal claim"
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Reopened:
    """What `trace` worked with, loaded again."""

    model: Model
    dictionary: Dictionary
    graph: Graph
    report: dict[str, Any]


def reopen(
    directory: str | os.PathLike[str],
    *,
    model: str | None = None,
    dictionary: str | None = None,
    progress: Callable[[str], None] | None = None,
) -> Reopened:
    """Load the model and the dictionary that a directory was traced with.

    Args:
      directory: written by `trace`.
      model: where the model is now, if it has moved.
      dictionary: where the dictionary is now.
      progress: called with one line per stage of a download.

    Raises:
      InputError: if the directory is no trace, or the weights found are others.
    """
    folder = Path(directory)
    graph = load_graph(folder / "graph.npz")
    try:
        report = json.loads((folder / "report.json").read_text(encoding="utf-8"))
        dtype = report["environment"].get("dtype", "float32")
        traced = report["identity"]["hashes"]
        names = (model or report["model"], dictionary or report["dictionary"])
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise InputError(
            f"{folder / 'report.json'} is not a report of trace "
            f"({type(error).__name__}); trace the prompt again"
        ) from error
    loaded = load_model(names[0], dtype=dtype, progress=progress)
    _same("model", names[0], loaded.hash, traced.get("model"))
    opened = load_dictionary(names[1], loaded)
    _same("dictionary", names[1], opened.hash, traced.get("dictionary"))
    return Reopened(model=loaded, dictionary=opened, graph=graph, report=report)


def _same(what: str, name: str, found: str, traced: str | None) -> None:
    if found != traced:
        raise InputError(
            f"the {what} {name!r} is not the one that was traced (hash "
            f"{found[:12]} instead of {str(traced)[:12]}): give the traced one with "
            f"--{what}, or trace again"
        )


@dataclasses.dataclass(frozen=True, kw_only=True)
class Subject:
    """A traced prompt, recorded again and ready to be changed."""

    model: Model
    dictionary: Dictionary
    graph: Graph
    patchable: Patchable

    @classmethod
    def of(cls, model: Model, dictionary: Dictionary, graph: Graph) -> Subject:
        """Record the graph's prompt.

        Raises:
          InputError: if the graph belongs to another model or dictionary.
        """
        hashes = graph.meta.hashes
        if hashes:
            _same("model", model.name, model.hash, hashes.get("model"))
            _same(
                "dictionary", dictionary.name, dictionary.hash, hashes.get("dictionary")
            )
        token_T = jnp.asarray(graph.token_T)
        with jax.default_matmul_precision("highest"):
            recording = record_prompt(model.params, token_T, model.cfg)
        return cls(
            model=model,
            dictionary=dictionary,
            graph=graph,
            patchable=make_patchable(dictionary, model.params, recording, model.cfg),
        )

    @functools.cached_property
    def active(self) -> Active:
        """The active features; for `neurons:k` the kept ones."""
        return self.dictionary.active(
            self.model.params, self.patchable.recording, self.model.cfg
        )

    @functools.cached_property
    def local(self) -> Local:
        """The local replacement model's tables."""
        return self.local_with(None)

    def local_with(self, also: np.ndarray | None) -> Local:
        """Tables that also hold some (layer, feature) rows."""
        return make_local(self.dictionary, self.patchable, self.active, also=also)

    @functools.cached_property
    def targets(self) -> np.ndarray:
        """Indices of the graph's targets that are tokens (custom directions are not).

        Raises:
          InputError: if there is none.
        """
        found = np.flatnonzero(self.graph.target_token_K >= 0)
        if not len(found):
            raise InputError(
                "all targets of the graph are custom directions, but patches are "
                "measured on tokens: trace with token targets"
            )
        return found

    @property
    def n_tokens(self) -> int:
        """T."""
        return self.graph.n_tokens

    def watch(self, nodes: np.ndarray) -> Features:
        """Rows of the graph's features by slot."""
        g = self.graph
        node_W3 = np.stack([g.layer_A, g.pos_A, g.feature_A], 1)[nodes]
        return self.gather(node_W3)

    def gather(self, node_E3: np.ndarray) -> Features:
        """Rows of any features."""
        return gather_features(
            self.dictionary,
            self.model.params,
            self.patchable.recording,
            node_E3,
            cfg=self.model.cfg,
        )

    def ask(self, watch: Features | None = None, *, n_top: int = 0) -> Ask:
        """What to measure: the graph's target tokens at the last position."""
        return Ask(
            token_K=jnp.asarray(self.graph.target_token_K[self.targets]),
            last=jnp.asarray(self.n_tokens - 1, jnp.int32),
            watch=watch,
            n_top=n_top,
        )

    def edits(self, single: Sequence[tuple], *, silent: bool = False) -> Edits:
        """The pytree of single changes (layer, position, feature, factor, offset)."""
        return make_edits(
            single,
            self.dictionary,
            self.model.params,
            self.patchable.recording,
            cfg=self.model.cfg,
            silent=silent,
        )

    def how(
        self,
        mode: Mode = "constrained",
        *,
        freeze_pattern: bool = True,
        freeze_norm: bool = False,
        gates: Gates | None = None,
    ) -> How:
        """Semantics; neurons keep their gates unless asked, as in the graph."""
        neurons = isinstance(self.dictionary, NeuronDictionary)
        return How(
            mode=mode,
            freeze_pattern=freeze_pattern,
            freeze_norm=freeze_norm,
            gates=gates or ("frozen" if neurons else "live"),
        )

    def effects(
        self,
        many: Sequence[Sequence[tuple]],
        layers: Sequence[tuple[int, int]],
        how: How,
        ask: Ask,
        *,
        chunk: int | None = None,
        on_done: Callable[[int, int], None] = lambda done, total: None,
    ) -> Effect:
        """Separate patches (each some single changes), measured; numpy, leading B."""
        flat = [change for one in many for change in one]
        whole = self.edits(flat, silent=True)
        ends = np.cumsum([len(one) for one in many])
        parts = [
            jax.tree.map(lambda x, a=a, b=b: np.asarray(x)[a:b], whole)
            for a, b in zip([0, *ends[:-1]], ends, strict=True)
        ]
        edits = batch_edits(parts)
        local = slot_BE = None
        if how.mode == "iterative":
            local = self.local
            pair_N2 = np.array([(c[0], c[2]) for c in flat])
            if any(f not in local.feature_LU[l] for l, f in pair_N2):
                local = self.local_with(pair_N2)
            slot_BE = np.zeros(edits.factor_E.shape, np.int32)
            sizes = np.diff(ends, prepend=0)[:, None]
            filled = np.arange(slot_BE.shape[1])[None] < sizes
            slot_BE[filled] = local.slots(*pair_N2.T)
        with jax.default_matmul_precision("highest"):
            return patch_many(
                self.patchable,
                edits,
                np.asarray(layers, np.int32).reshape(-1, 2),
                how=how,
                measure=measure_effect,
                ask=ask,
                local=local,
                slot_BE=slot_BE,
                chunk=chunk,
                on_done=on_done,
            )

    def check_range(
        self, layers: tuple[int, int] | None, layer_E: np.ndarray, mode: Mode
    ) -> tuple[int, int]:
        """The layer range of a patch.

        Raises:
          InputError: for an empty range, or one outside the model.
        """
        L = self.model.cfg.n_layers
        if layers is None:
            span = self.patchable.clt_cfg.span
            return default_range(layer_E, span=span, n_layers=L, mode=mode)
        first, last = layers
        if first > last:
            raise InputError(
                f"layers {first}:{last} are an empty range: both ends are included, "
                "give the smaller one first"
            )
        if first < 0 or last >= L:
            raise InputError(
                f"layers {first}:{last} are not in the model: it has layers 0 to "
                f"{L - 1}, both ends are included"
            )
        return first, last


@dataclasses.dataclass(frozen=True, kw_only=True)
class PatchResult:
    """What a patch did to the prediction."""

    mode: str
    layers: tuple[int, int]  # both included
    edits: list[dict[str, Any]]
    kl: float  # nats, KL(clean || patched) at the last position
    targets: list[dict[str, Any]]
    logit_difference: dict[str, float] | None  # of the first two targets
    top_before: list[tuple[str, float]]
    top_after: list[tuple[str, float]]
    features: list[dict[str, Any]]  # downstream activations, share of the original
    options: dict[str, Any]
    warning: str | None = None

    def to_json(self) -> dict[str, Any]:
        """As plain JSON."""
        return json.loads(json.dumps(dataclasses.asdict(self)))


def patch(
    model: Model,
    dictionary: Dictionary,
    graph: Graph,
    edits: Sequence[Edit],
    *,
    mode: Mode = "constrained",
    layers: tuple[int, int] | None = None,
    freeze_pattern: bool = True,
    freeze_norm: bool = False,
    gates: Gates | None = None,
    n_features: int = 10,
    subject: Subject | None = None,
) -> PatchResult:
    """Change features of a traced prompt and measure the model's answer.

    Args:
      model: from `load_model`, the one that was traced.
      dictionary: from `load_dictionary`.
      graph: the traced prompt.
      edits: made together.
      mode: `constrained`, `iterative` or `additive`, see `jaxclt.patching.modes`.
      layers: first and last layer of the range, included; None: from the first edited
        layer to two behind the last one (constrained: as far as the dictionary writes,
        and the model's last MLP is left to answer; additive: all).
      freeze_pattern: keep the clean attention patterns.
      freeze_norm: keep the clean norm denominators.
      gates: of the local replacement model; None: live, for neurons frozen.
      n_features: how many of the graph's features behind the edits to watch.
      subject: the same prompt, recorded already.

    Raises:
      InputError: for edits or layers that do not fit the prompt or the dictionary.
    """
    subject = subject or Subject.of(model, dictionary, graph)
    single = expand_edits(edits, n_tokens=subject.n_tokens)
    made = subject.edits(single)
    layer_E = np.array([change[0] for change in single])
    layers = subject.check_range(layers, layer_E, mode)
    how = subject.how(
        mode, freeze_pattern=freeze_pattern, freeze_norm=freeze_norm, gates=gates
    )
    nodes = _downstream(graph, int(layer_E.min()), single, n_features)
    ask = subject.ask(subject.watch(nodes), n_top=N_TOP)
    done = subject.effects([single], [layers], how, ask)
    after = jax.tree.map(lambda x: np.asarray(x)[0], done)
    with jax.default_matmul_precision("highest"):
        before = jax.tree.map(np.asarray, clean_effect(subject.patchable, ask))
    return _result(subject, single, made, layers, how, nodes, before, after)


def _downstream(
    graph: Graph, layer: int, single: Sequence[tuple], n: int
) -> np.ndarray:
    """The most influential features behind `layer` that are not edited."""
    edited = {change[:3] for change in single}
    order = np.argsort(-graph.influence_N[graph.feature_cols], kind="stable")
    place = zip(graph.layer_A, graph.pos_A, graph.feature_A, strict=True)
    free = np.array([tuple(map(int, p)) not in edited for p in place], bool)
    order = order[(graph.layer_A[order] > layer) & free[order]]
    return order[:n]


def _result(
    subject: Subject,
    single: Sequence[tuple],
    made: Edits,
    layers: tuple[int, int],
    how: How,
    nodes: np.ndarray,
    before: Effect,
    after: Effect,
) -> PatchResult:
    graph, tokenizer = subject.graph, subject.model.tokenizer
    text = [graph.meta.target_tokens[k] for k in subject.targets]

    def top(effect: Effect) -> list[tuple[str, float]]:
        names = tokenizer.token_strings([int(i) for i in effect.top_token_J])
        return [(n, float(p)) for n, p in zip(names, effect.top_prob_J, strict=True)]

    targets = [
        {
            "token": text[k],
            "p_before": float(before.prob_K[k]),
            "p_after": float(after.prob_K[k]),
            "logit_before": float(before.raw_logit_K[k]),
            "logit_after": float(after.raw_logit_K[k]),
        }
        for k in range(len(text))
    ]
    difference = None
    if len(text) > 1:
        was, now = before.raw_logit_K, after.raw_logit_K
        difference = {
            "before": float(was[0] - was[1]),
            "after": float(now[0] - now[1]),
        }
    cross_layer = subject.patchable.clt_cfg.span > 1
    assert before.watch_W is not None
    assert after.watch_W is not None
    watched = zip(nodes, before.watch_W, after.watch_W, strict=True)
    return PatchResult(
        mode=how.mode,
        layers=layers,
        edits=[
            {
                "layer": int(layer),
                "pos": int(pos),
                "feature": int(feature),
                "before": float(value),
                "after": float(factor * value + offset),
            }
            for (layer, pos, feature, factor, offset), value in zip(
                single, np.asarray(made.features.value_E), strict=True
            )
        ],
        kl=max(0.0, float(after.kl)),
        targets=targets,
        logit_difference=difference,
        top_before=top(before),
        top_after=top(after),
        features=[
            {
                "layer": int(graph.layer_A[a]),
                "pos": int(graph.pos_A[a]),
                "feature": int(graph.feature_A[a]),
                "before": float(was),
                "after": float(now),
                "share": float(now / was) if was else None,
            }
            for a, was, now in watched
        ],
        options=dataclasses.asdict(how),
        warning=DOUBLE if how.mode == "additive" and cross_layer else None,
    )


def sweep_end(
    subject: Subject, edits: Sequence[Edit], *, how: How, first: int | None = None
) -> dict[str, Any]:
    """The same patch for every end layer of its range, in one batched call.

    Circuit Tracing (2025), section 3.5: the effect should reach a plateau once the
    range holds what the feature writes, then decay as ranges shut out real MLPs.

    Returns:
      {last_layers, kl, probability [per end layer][per target], strongest: the end
      layer with the lowest probability of the first target}.
    """
    single = expand_edits(edits, n_tokens=subject.n_tokens)
    subject.edits(single)
    layer_E = np.array([change[0] for change in single])
    start = int(layer_E.min()) if first is None else first
    ends = list(range(max(start, int(layer_E.min())), subject.model.cfg.n_layers))
    if not ends:
        raise InputError(f"no layer from {start} on: choose a smaller first layer")
    done = subject.effects(
        [single] * len(ends), [(start, end) for end in ends], how, subject.ask()
    )
    return {
        "first": start,
        "last_layers": ends,
        "kl": [max(0.0, float(x)) for x in done.kl],
        "probability": np.asarray(done.prob_K, np.float64).tolist(),
        "strongest": ends[int(np.argmin(np.asarray(done.prob_K)[:, 0]))],
    }


def scale_curve(
    subject: Subject,
    edits: Sequence[Edit],
    *,
    how: How,
    layers: tuple[int, int] | None = None,
    scales: Sequence[float] = SCALES,
) -> dict[str, Any]:
    """Target probabilities for many factors on the edited features, in one call.

    Returns:
      {scale, kl, probability [per scale][per target]}.
    """
    single = expand_edits(edits, n_tokens=subject.n_tokens)
    subject.edits(single)
    layer_E = np.array([change[0] for change in single])
    layers = subject.check_range(layers, layer_E, how.mode)
    many = [[(*change[:3], float(scale), 0.0) for change in single] for scale in scales]
    done = subject.effects(many, [layers] * len(many), how, subject.ask())
    return {
        "scale": [float(s) for s in scales],
        "kl": [max(0.0, float(x)) for x in done.kl],
        "probability": np.asarray(done.prob_K, np.float64).tolist(),
    }


def generate_patched(
    subject: Subject,
    edits: Sequence[Edit],
    *,
    how: How,
    n_new: int,
    layers: tuple[int, int] | None = None,
    temperature: float = 0.0,
    seed: int = 0,
) -> dict[str, Any]:
    """Text that follows the prompt, with and without the edits held.

    Returns:
      {before, after, tokens_before, tokens_after}; both use the same random draws.

    Raises:
      InputError: for a number of tokens that the context does not hold, or a negative
        or not finite temperature.
    """
    T, cfg = subject.n_tokens, subject.model.cfg
    if n_new < 1 or T + n_new > cfg.n_ctx:
        raise InputError(
            f"cannot generate {n_new} tokens: the prompt has {T} and the model's "
            f"context holds {cfg.n_ctx}"
        )
    if not (math.isfinite(temperature) and temperature >= 0):
        raise InputError(f"temperature {temperature}: give a number of at least 0")
    single = expand_edits(edits, n_tokens=T, n_later=n_new)
    prompt = [change for change in single if change[1] < T]
    edited_now = bool(prompt)
    later = [change for change in single if change[1] >= T]
    layer_E = np.array([change[0] for change in single])
    first, last = subject.check_range(layers, layer_E, how.mode)
    # Something must be there to run; a factor of one changes nothing.
    prompt = prompt or [(later[0][0], 0, later[0][2], 1.0, 0.0)]
    made = subject.edits(prompt, silent=not edited_now)
    local = None
    if how.mode == "iterative":
        pairs = np.array([(c[0], c[2]) for c in prompt])
        known = subject.local_with(pairs)
        local = (known.tables, jnp.asarray(known.slots(*pairs.T)))
    range_2 = jnp.asarray([first, last], jnp.int32)
    model, key = subject.patchable, jax.random.key(seed)
    heat = jnp.asarray(temperature, jnp.float32)
    none = [(*change[:3], 1.0, 0.0) for change in prompt]
    with jax.default_matmul_precision("highest"):
        texts = {}
        for name, edited, ahead in (
            ("before", subject.edits(none), None),
            ("after", made, subject.edits(later) if later else None),
        ):
            done = _patch_one(model, edited, range_2, local, how=how)
            token = continue_prompt(
                model,
                done,
                ahead,
                range_2,
                key,
                heat,
                n_new=n_new,
            )
            texts[name] = [int(t) for t in np.asarray(token)]
    say = subject.model.tokenizer.token_strings
    return {
        "before": "".join(say(texts["before"])),
        "after": "".join(say(texts["after"])),
        "tokens_before": texts["before"],
        "tokens_after": texts["after"],
    }


_patch_one = jax.jit(patch_one, static_argnames="how")
