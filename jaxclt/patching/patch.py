"""The shell of patching: a prompt is changed, and the answer measured.

Subject, edits --plan_patch--> Patch --measure--> PatchResult
  --scale_curve, sweep_end--> series; --generate--> text
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxclt.clt.coder import Dictionary
from jaxclt.errors import InputError, check_at_least, check_finite
from jaxclt.files.json_text import finite, number
from jaxclt.graph.graph import Graph
from jaxclt.io.model import Model
from jaxclt.patching.change import Change, batched
from jaxclt.patching.edits import Edit
from jaxclt.patching.effects import Effect, clean_effect, diverged, nats
from jaxclt.patching.generate import continue_prompt, rivals
from jaxclt.patching.heads import Head, Side, choose_heads
from jaxclt.patching.how import How
from jaxclt.patching.plan import Patch, plan_patch
from jaxclt.patching.predicted import predictions
from jaxclt.patching.subject import Subject
from jaxclt.text.prompts import Prompt

__all__ = [
    "PatchResult",
    "generate",
    "measure",
    "patch",
    "patch_qk",
    "scale_curve",
    "sweep_end",
]

SCALES = tuple(0.5 * i for i in range(-4, 9))  # -2 ... 4: suppress, ablate, amplify
N_TOP = 5
HUGE = 10  # times what MLPs write at most positions of a layer


@dataclasses.dataclass(frozen=True, kw_only=True)
class PatchResult:
    """What a patch did to the prediction; None where it diverged."""

    mode: str  # "qk" where only heads see the change
    layers: tuple[int, int]  # both included
    edits: list[dict[str, Any]]  # on the prompt, where they act
    kl: float | None  # nats, KL(clean || patched) at the last position
    targets: list[dict[str, Any]]
    logit_difference: dict[str, float | None] | None  # of the first two targets
    top_before: list[tuple[str, float]]
    top_after: list[tuple[str, float]]
    features: list[dict[str, Any]]  # downstream activations, share of the original
    options: dict[str, Any]
    heads: tuple[str, ...] = ()  # whose queries or keys see the change, L9H3:key
    warning: str | None = None
    # Of each target, see `jaxclt.patching.predicted`; None where it was not asked for.
    predicted: list[dict[str, Any]] | None = None

    def to_json(self) -> dict[str, Any]:
        """As plain JSON."""
        return finite(dataclasses.asdict(self))


def patch(
    model: Model,
    dictionary: Dictionary,
    prompt: Graph | Prompt,
    edits: Sequence[Edit],
    *,
    layers: tuple[int, int] | None = None,
    n_features: int = 10,
    predict: bool = False,
    **how: Any,
) -> PatchResult:
    """Change features of a prompt and measure the model's answer.

    Args:
      model: from `load_model`, the one that was traced.
      dictionary: from `load_dictionary`.
      prompt: the graph of one; or text, token ids or a chat, which need no graph.
      edits: made together.
      layers: first and last layer of the range, included; None: from the first edited
        layer to two after the last one (constrained: as far as the dictionary writes,
        and the model's last MLP is left to answer; additive: all).
      n_features: how many of the graph's features after the edits to watch.
      predict: also say what was to be expected (`PatchResult.predicted`).
      **how: fields of `jaxclt.patching.patchable.How`, for example
        ``mode="iterative"`` (or constrained, the default, or additive) and
        ``patterns="live"``.

    Raises:
      InputError: for edits or layers that do not fit the prompt or the dictionary.
    """
    semantics = How(**how)
    subject = Subject.of(model, dictionary, prompt)
    planned = plan_patch(subject, edits, semantics, layers=layers)
    return measure(planned, n_features=n_features, predict=predict)


def patch_qk(
    model: Model,
    dictionary: Dictionary,
    prompt: Graph | Prompt,
    edits: Sequence[Edit],
    heads: Sequence[tuple[int, int]],
    *,
    side: Side = "both",
    **how: Any,
) -> PatchResult:
    """Change features only where some heads' queries or keys see them.

    A feature's part of a head's queries (keys), through the frozen stream and with norm
    denominators held, becomes the factor times itself, so that its scores change by
    (factor - 1) times the feature's part of them (maths 15.19). From the softmax on the
    real model answers.

    Args:
      model: as `patch`.
      dictionary: as `patch`.
      prompt: as `patch`.
      edits: made together.
      heads: (layer, head), of layers after the features'.
      side: query, key or both.
      **how: ``patterns="live"`` lets all other patterns respond too, ``norms="frozen"``
        holds the norms; see `jaxclt.patching.patchable.How`.

    Raises:
      InputError: for edits or heads that do not fit the prompt, the dictionary or the
        model.
    """
    chosen = [Head(layer, head, side) for layer, head in heads]
    choose_heads(chosen, model.cfg)
    semantics = How(**how)
    subject = Subject.of(model, dictionary, prompt)
    return measure(plan_patch(subject, edits, semantics, heads=chosen))


def measure(
    patch: Patch, *, n_features: int = 10, predict: bool = False
) -> PatchResult:
    """What a patch does to the prediction, and to the graph's features after it.

    Args:
      patch: from `plan_patch`.
      n_features: how many of these to watch, the most influential ones.
      predict: also say what was to be expected; not of what only heads see, or of
        what changes tokens to come alone.
    """
    check_at_least(0, n_features=n_features)
    subject, now = patch.subject, patch.now
    watched = _downstream(patch, n_features)
    ask = subject.ask(subject.gather(watched), n_top=N_TOP)
    done = patch.effects(batched(now, [len(now.factor_E)]), [patch.layers], ask)
    after = jax.tree.map(lambda x: np.asarray(x)[0], done)
    before = jax.tree.map(np.asarray, clean_effect(subject.patchable, ask))
    result = _result(patch, watched, before, after)
    if not predict or patch.heads or not len(now.factor_E):
        return result
    change_K = np.asarray(after.logit_K, float) - np.asarray(before.logit_K, float)
    if diverged(after):
        change_K = np.full_like(change_K, np.nan)
    return dataclasses.replace(result, predicted=predictions(patch, change_K))


def _downstream(patch: Patch, n: int) -> np.ndarray:
    """The graph's most influential features after the first edit that are not edited.

    Int (layer, position, feature) rows; none without a graph.
    """
    graph = patch.subject.traced
    if graph is None:
        return np.zeros((0, 3), np.int32)
    edited = set(map(tuple, patch.now.node_E3.tolist()))
    place_A3 = np.stack([graph.layer_A, graph.pos_A, graph.feature_A], 1)
    order = np.argsort(-graph.influence_N[graph.feature_cols], kind="stable")
    free = np.array([tuple(p) not in edited for p in place_A3.tolist()], bool)
    first = patch.change.features.layer_E.min()
    if patch.heads:  # nothing changes before the first of them
        first = patch.layers[0] - 1
    order = order[(graph.layer_A[order] > first) & free[order]]
    return place_A3[order[:n]]


def _result(
    patch: Patch, watched: np.ndarray, before: Effect, after: Effect
) -> PatchResult:
    tokenizer, (_, text) = patch.subject.model.tokenizer, patch.subject.answers
    now, lost = patch.now, bool(diverged(after))
    mode = "qk" if patch.heads else patch.how.mode
    said = [*patch.warnings, *([_why_diverged(patch)] if lost else [])]

    def known(x: Any) -> float | None:
        """What came after, unless it is no answer."""
        return None if lost else float(x)

    def top(effect: Effect) -> list[tuple[str, float]]:
        names = tokenizer.token_strings([int(i) for i in effect.top_token_J])
        return [(n, float(p)) for n, p in zip(names, effect.top_prob_J, strict=True)]

    was_K, is_K = before.raw_logit_K, after.raw_logit_K
    targets = [
        {
            "token": token,
            "p_before": float(before.prob_K[k]),
            "p_after": known(after.prob_K[k]),
            "logit_before": float(was_K[k]),
            "logit_after": known(is_K[k]),
        }
        for k, token in enumerate(text)
    ]
    difference = None
    if len(text) > 1:
        was, new = was_K[0] - was_K[1], is_K[0] - is_K[1]
        difference = {"before": float(was), "after": known(new)}
    assert before.watch_W is not None
    assert after.watch_W is not None
    features = zip(watched.tolist(), before.watch_W, after.watch_W, strict=True)
    value_E, after_E = now.features.value_E, now.factor_E * now.features.value_E
    edited = zip(now.node_E3.tolist(), value_E, after_E + now.offset_E, strict=True)
    return PatchResult(
        mode=mode,
        layers=patch.layers,
        edits=[
            {**_named(place), "before": float(was), "after": float(new)}
            for place, was, new in edited
        ],
        kl=None if lost else nats(float(after.kl)),
        targets=targets,
        logit_difference=difference,
        top_before=top(before),
        top_after=[] if lost else top(after),
        features=[
            {
                **_named(place),
                "before": float(was),
                "after": number(new),  # what lies before the divergence is known
                "share": number(new / was) if was else None,
            }
            for place, was, new in features
        ],
        options=dataclasses.asdict(patch.how) | {"mode": mode},
        heads=tuple(map(str, patch.heads)),
        warning="; ".join(said) or None,
    )


def _named(place: Sequence[int]) -> dict[str, int]:
    return dict(zip(("layer", "pos", "feature"), place, strict=True))


def _why_diverged(patch: Patch) -> str:
    """One line for a patch whose numbers left the range that can be held."""
    rec = patch.subject.patchable.recording
    why = "the change is too large: choose a smaller one"
    if patch.how.norms == "frozen":
        why = "held norms do not damp it: let the norms be live"
        size_LT = np.linalg.norm(np.asarray(rec.write_LTD, np.float64), axis=-1)
        usual_L1 = np.maximum(np.median(size_LT, axis=1, keepdims=True), 1e-30)
        pos = np.unique(patch.now.features.pos_E)
        times = (size_LT / usual_L1)[:, pos]
        if times.max(initial=0) > HUGE:
            layer, at = np.unravel_index(times.argmax(), times.shape)
            why = (
                f"position {pos[at]}'s writes are huge ({times.max():,.0f} times the "
                f"usual at layer {layer}) and held norms do not damp them: let the "
                "norms be live"
            )
    return (
        f"the patch diverged, its numbers left the range of {rec.out_TD.dtype} and "
        f"there is no answer to measure; {why}"
    )


def sweep_end(patch: Patch, *, first: int | None = None) -> dict[str, Any]:
    """The same patch for every end layer of its range, in one batched call.

    Circuit Tracing (2025), section 3.5: the effect should reach a plateau once the
    range holds what the feature writes, then decay as ranges shut out real MLPs.

    Args:
      patch: from `plan_patch`.
      first: layer of the ranges; None: the first edited one.

    Returns:
      {last_layers, kl, probability [per end layer][per target], strongest: the end
      layer with the lowest probability of the first target}; None where it diverged.

    Raises:
      InputError: if no layer is left, or of a patch that has no range.
    """
    if patch.heads:
        raise InputError("what only heads see has no layer range that could end")
    edited = int(patch.change.features.layer_E.min())
    start = edited if first is None else first
    ends = list(range(max(start, edited), patch.subject.model.cfg.n_layers))
    if not ends:
        raise InputError(f"no layer from {start} on: choose a smaller first layer")
    answers = _answers(patch, _copies(patch, len(ends)), [(start, end) for end in ends])
    known = [(p[0], end) for p, end in zip(answers["probability"], ends, strict=True)]
    lowest = min((one for one in known if one[0] is not None), default=(None, None))
    return {"first": start, "last_layers": ends, **answers, "strongest": lowest[1]}


def scale_curve(patch: Patch, scales: Sequence[float] = SCALES) -> dict[str, Any]:
    """Target probabilities for many factors on the edited features, in one call.

    Returns:
      {scale, kl, probability [per scale][per target]}; None where it diverged.

    Raises:
      InputError: for a factor that is not finite.
    """
    for factor in scales:
        check_finite(scale=factor)
    copies = _copies(patch, len(scales))
    many = Change.of(copies.features, np.array(scales)[:, None])
    answers = _answers(patch, many, [patch.layers] * len(scales))
    return {"scale": [float(s) for s in scales], **answers}


def _copies(patch: Patch, n: int) -> Change:
    """What changes on the prompt, in n patches."""
    return batched(patch.now, [len(patch.now.factor_E)]).where(np.zeros(n, int))


def _answers(
    patch: Patch, many: Change, layers: Sequence[tuple[int, int]]
) -> dict[str, Any]:
    """Divergences and probabilities of a batch of patches, as JSON."""
    done = patch.effects(many, layers, patch.subject.ask())
    lost_B = diverged(done)
    kl_B = np.where(lost_B, np.nan, np.asarray(done.kl, np.float64))
    prob_BK = np.where(lost_B[:, None], np.nan, np.asarray(done.prob_K, np.float64))
    return {"kl": [nats(x) for x in kl_B], "probability": finite(prob_BK)}


def generate(
    patch: Patch, *, temperature: float = 0.0, seed: int = 0
) -> dict[str, Any]:
    """Text that follows the prompt, with and without the edits held.

    Args:
      patch: of at least one token to come, from `plan_patch`.
      temperature: of the softmax that is sampled; 0 takes the most probable token.
      seed: of the draws.

    Returns:
      {before, after, tokens_before, tokens_after, warning}; both use the same random
      draws. Text ends where a patch diverges, which the warning says.

    Raises:
      InputError: for a temperature that is negative or not finite.
    """
    check_at_least(0, temperature=temperature)
    check_finite(seed=seed)
    subject, now = patch.subject, patch.now
    later = patch.change.where(patch.change.features.pos_E >= subject.n_tokens)
    held = (None, None)
    if len(later.factor_E):
        held = later, rivals(subject.dictionary, subject.patchable, later)
    clean = Change.of(now.features, 1.0)
    texts: dict[str, list[int]] = {}
    for name, change, (new, among) in (
        ("before", clean, (None, None)),
        ("after", now, held),
    ):
        token = continue_prompt(
            subject.patchable,
            subject.run(change, patch.layers, patch.how),
            new,
            jnp.asarray(patch.layers, jnp.int32),
            jax.random.key(seed),
            jnp.asarray(temperature, jnp.float32),
            n_new=patch.n_later,
            among=among,
        )
        texts[name] = [int(t) for t in np.asarray(token)]
    found = texts["after"]
    lost = found.index(-1) if -1 in found else None
    texts["after"] = found[:lost]
    say = subject.model.tokenizer.token_strings
    return {
        "before": "".join(say(texts["before"])),
        "after": None if lost == 0 else "".join(say(texts["after"])),
        **{f"tokens_{name}": tokens for name, tokens in texts.items()},
        "warning": None if lost is None else _why_diverged(patch),
    }
