"""The shell of patching: a traced prompt is changed, and the answer measured.

Subject (`jaxclt.subject`) --patch--> PatchResult; --scale_curve, sweep_end--> series;
  --generate_patched--> text
"""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxclt.clt.coder import Dictionary
from jaxclt.errors import InputError
from jaxclt.graph.graph import Graph
from jaxclt.graph.supernodes import with_features
from jaxclt.io.model import Model
from jaxclt.patching.batch import How, patch_one
from jaxclt.patching.edits import Edit, Edits
from jaxclt.patching.effects import Effect, clean_effect
from jaxclt.patching.generate import continue_prompt
from jaxclt.patching.modes import Gates, Mode
from jaxclt.subject import Subject

__all__ = [
    "PatchResult",
    "generate_patched",
    "patch",
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
    single = subject.single(edits)
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
    found = _result(subject, single, made, layers, how, nodes, before, after)
    return dataclasses.replace(found, warning=_warning(subject, edits, how))


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
    )


def _warning(subject: Subject, edits: Sequence[Edit], how: How) -> str | None:
    """What a reader of the result should know."""
    said = []
    for group in (edit.supernode for edit in edits if edit.supernode is not None):
        named = with_features(subject.graph, group).nodes
        if rest := [node for node in named if isinstance(node, str)]:
            said.append(
                f"supernode {group.name!r}: only features are patched, "
                f"{', '.join(rest)} stay as they are"
            )
    if how.mode == "additive" and subject.patchable.coder.shape.span > 1:
        said.append(DOUBLE)
    return "; ".join(said) or None


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
    single = subject.single(edits)
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
    single = subject.single(edits)
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
    single = subject.single(edits, n_later=n_new)
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
