"""The shell of patching: a prompt is changed, and the answer measured.

Subject --patch--> PatchResult; --scale_curve, sweep_end--> series;
  --generate_patched--> text
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from jaxclt.clt.coder import Dictionary
from jaxclt.errors import InputError, check_at_least, check_finite
from jaxclt.files.json_text import finite, number
from jaxclt.graph.graph import Graph
from jaxclt.io.model import Model
from jaxclt.lm.run import Run
from jaxclt.patching.batch import How, patch_one
from jaxclt.patching.edits import Change, Edit, batch_edits
from jaxclt.patching.effects import Effect, clean_effect, diverged, nats
from jaxclt.patching.generate import continue_prompt, rivals
from jaxclt.patching.modes import Gates, Mode
from jaxclt.patching.subject import Subject
from jaxclt.text.prompts import Prompt

__all__ = [
    "PatchResult",
    "generate_patched",
    "patch",
    "scale_curve",
    "sweep_end",
]

SCALES = tuple(0.5 * i for i in range(-4, 9))  # -2 ... 4: suppress, ablate, amplify
N_TOP = 5
HUGE = 10  # times what MLPs write at most positions of a layer
DOUBLE = (
    "additive patching of a cross-layer transcoder counts effects twice: later MLPs "
    "respond to the first write and the later writes are added as well; use "
    "constrained or iterative for a causal claim"
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class PatchResult:
    """What a patch did to the prediction; None where it diverged."""

    mode: str
    layers: tuple[int, int]  # both included
    edits: list[dict[str, Any]]  # on the prompt, where they act
    kl: float | None  # nats, KL(clean || patched) at the last position
    targets: list[dict[str, Any]]
    logit_difference: dict[str, float | None] | None  # of the first two targets
    top_before: list[tuple[str, float]]
    top_after: list[tuple[str, float]]
    features: list[dict[str, Any]]  # downstream activations, share of the original
    options: dict[str, Any]
    warning: str | None = None

    def to_json(self) -> dict[str, Any]:
        """As plain JSON."""
        return finite(dataclasses.asdict(self))


def patch(
    model: Model,
    dictionary: Dictionary,
    prompt: Graph | Prompt,
    edits: Sequence[Edit],
    *,
    mode: Mode = "constrained",
    layers: tuple[int, int] | None = None,
    freeze_pattern: bool = True,
    freeze_norm: bool = False,
    gates: Gates | None = None,
    n_features: int = 10,
    n_later: int = 0,
    subject: Subject | None = None,
) -> PatchResult:
    """Change features of a prompt and measure the model's answer.

    Args:
      model: from `load_model`, the one that was traced.
      dictionary: from `load_dictionary`.
      prompt: the graph of one; or text, token ids or a chat, which need no graph.
      edits: made together.
      mode: `constrained`, `iterative` or `additive`, see `jaxclt.patching.modes`.
      layers: first and last layer of the range, included; None: from the first edited
        layer to two behind the last one (constrained: as far as the dictionary writes,
        and the model's last MLP is left to answer; additive: all).
      freeze_pattern: keep the clean attention patterns.
      freeze_norm: keep the clean norm denominators.
      gates: of the local replacement model; None: live, for neurons frozen.
      n_features: how many of the graph's features behind the edits to watch.
      n_later: tokens that are to be generated, which edits may wait for.
      subject: the same prompt, recorded already.

    Raises:
      InputError: for edits or layers that do not fit the prompt or the dictionary.
    """
    check_at_least(0, n_features=n_features)
    subject = subject or Subject.of(model, dictionary, prompt)
    single = subject.single(edits, n_later=n_later)
    layer_E = np.array([change[0] for change in single])
    layers = subject.check_range(layers, layer_E, mode)
    how = subject.how(
        mode, freeze_pattern=freeze_pattern, freeze_norm=freeze_norm, gates=gates
    )
    now = _on_prompt(subject, single)
    watched = _downstream(subject, int(layer_E.min()), now, n_features)
    ask = subject.ask(subject.gather(watched), n_top=N_TOP)
    done = subject.effects([now], [layers], how, ask)
    after = jax.tree.map(lambda x: np.asarray(x)[0], done)
    with jax.default_matmul_precision("highest"):
        before = jax.tree.map(np.asarray, clean_effect(subject.patchable, ask))
    found = _result(subject, now, layers, how, watched, before, after)
    said = _warnings(subject, edits, how)
    if diverged(after):
        said.append(_why_diverged(subject, single, how))
    return dataclasses.replace(found, warning="; ".join(said) or None)


def _on_prompt(subject: Subject, single: Sequence[Change]) -> list[Change]:
    """Without the changes of tokens to come."""
    return [change for change in single if change[1] < subject.n_tokens]


def _downstream(
    subject: Subject, layer: int, single: Sequence[Change], n: int
) -> np.ndarray:
    """The graph's most influential features behind `layer` that are not edited.

    Int (layer, position, feature) rows; none without a graph.
    """
    graph = subject.traced
    if graph is None:
        return np.zeros((0, 3), np.int32)
    edited = {change[:3] for change in single}
    place_A3 = np.stack([graph.layer_A, graph.pos_A, graph.feature_A], 1)
    order = np.argsort(-graph.influence_N[graph.feature_cols], kind="stable")
    free = np.array([tuple(p) not in edited for p in place_A3.tolist()], bool)
    order = order[(graph.layer_A[order] > layer) & free[order]]
    return place_A3[order[:n]]


def _result(
    subject: Subject,
    single: Sequence[Change],
    layers: tuple[int, int],
    how: How,
    watched: np.ndarray,
    before: Effect,
    after: Effect,
) -> PatchResult:
    tokenizer, (_, text) = subject.model.tokenizer, subject.answers
    lost = bool(diverged(after))

    def now(x: Any) -> float | None:
        """What came after, unless it is no answer."""
        return None if lost else float(x)

    def top(effect: Effect) -> list[tuple[str, float]]:
        names = tokenizer.token_strings([int(i) for i in effect.top_token_J])
        return [(n, float(p)) for n, p in zip(names, effect.top_prob_J, strict=True)]

    targets = [
        {
            "token": text[k],
            "p_before": float(before.prob_K[k]),
            "p_after": now(after.prob_K[k]),
            "logit_before": float(before.raw_logit_K[k]),
            "logit_after": now(after.raw_logit_K[k]),
        }
        for k in range(len(text))
    ]
    difference = None
    if len(text) > 1:
        was_K, is_K = before.raw_logit_K, after.raw_logit_K
        difference = {
            "before": float(was_K[0] - was_K[1]),
            "after": now(is_K[0] - is_K[1]),
        }
    assert before.watch_W is not None
    assert after.watch_W is not None
    features = zip(watched.tolist(), before.watch_W, after.watch_W, strict=True)
    value_E = np.asarray(subject.edits(single).features.value_E)
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
                single, value_E, strict=True
            )
        ],
        kl=None if lost else nats(float(after.kl)),
        targets=targets,
        logit_difference=difference,
        top_before=top(before),
        top_after=[] if lost else top(after),
        features=[
            {
                "layer": layer,
                "pos": pos,
                "feature": feature,
                "before": float(was),
                "after": number(new),  # what lies before the divergence is known
                "share": number(new / was) if was else None,
            }
            for (layer, pos, feature), was, new in features
        ],
        options=dataclasses.asdict(how),
    )


def _warnings(subject: Subject, edits: Sequence[Edit], how: How) -> list[str]:
    """What a reader of the result should know."""
    said = []
    for group in (edit.supernode for edit in edits if edit.supernode is not None):
        named = subject.named(group).nodes
        if rest := [node for node in named if isinstance(node, str)]:
            said.append(
                f"supernode {group.name!r}: only features are patched, "
                f"{', '.join(rest)} stay as they are"
            )
    if how.mode == "additive" and subject.patchable.coder.shape.span > 1:
        said.append(DOUBLE)
    return said


def _why_diverged(subject: Subject, single: Sequence[Change], how: How) -> str:
    """One line for a patch whose numbers left the range that can be held."""
    rec = subject.patchable.recording
    why = "the change is too large: choose a smaller one"
    if how.freeze_norm:
        why = "held norms do not damp it: let the norms be live"
        size_LT = np.linalg.norm(np.asarray(rec.write_LTD, np.float64), axis=-1)
        usual_L1 = np.maximum(np.median(size_LT, axis=1, keepdims=True), 1e-30)
        pos = sorted({change[1] for change in _on_prompt(subject, single)})
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


def sweep_end(
    subject: Subject,
    edits: Sequence[Edit],
    *,
    how: How,
    first: int | None = None,
    n_later: int = 0,
) -> dict[str, Any]:
    """The same patch for every end layer of its range, in one batched call.

    Circuit Tracing (2025), section 3.5: the effect should reach a plateau once the
    range holds what the feature writes, then decay as ranges shut out real MLPs.

    Returns:
      {last_layers, kl, probability [per end layer][per target], strongest: the end
      layer with the lowest probability of the first target}; None where it diverged.
    """
    single = subject.single(edits, n_later=n_later)
    layer_E = np.array([change[0] for change in single])
    start = int(layer_E.min()) if first is None else first
    ends = list(range(max(start, int(layer_E.min())), subject.model.cfg.n_layers))
    if not ends:
        raise InputError(f"no layer from {start} on: choose a smaller first layer")
    now = _on_prompt(subject, single)
    done = subject.effects(
        [now] * len(ends), [(start, end) for end in ends], how, subject.ask()
    )
    answers = _answers(done)
    known = [(p[0], end) for p, end in zip(answers["probability"], ends, strict=True)]
    lowest = min((one for one in known if one[0] is not None), default=(None, None))
    return {"first": start, "last_layers": ends, **answers, "strongest": lowest[1]}


def _answers(done: Effect) -> dict[str, Any]:
    """Divergences and probabilities of a batch of patches, as JSON."""
    lost_B = diverged(done)
    kl_B = np.where(lost_B, np.nan, np.asarray(done.kl, np.float64))
    prob_BK = np.where(lost_B[:, None], np.nan, np.asarray(done.prob_K, np.float64))
    return {"kl": [nats(x) for x in kl_B], "probability": finite(prob_BK)}


def scale_curve(
    subject: Subject,
    edits: Sequence[Edit],
    *,
    how: How,
    layers: tuple[int, int] | None = None,
    scales: Sequence[float] = SCALES,
    n_later: int = 0,
) -> dict[str, Any]:
    """Target probabilities for many factors on the edited features, in one call.

    Returns:
      {scale, kl, probability [per scale][per target]}; None where it diverged.

    Raises:
      InputError: for a factor that is not finite.
    """
    for factor in scales:
        check_finite(scale=factor)
    single = subject.single(edits, n_later=n_later)
    layer_E = np.array([change[0] for change in single])
    layers = subject.check_range(layers, layer_E, how.mode)
    now = _on_prompt(subject, single)
    many = [[(*change[:3], float(scale), 0.0) for change in now] for scale in scales]
    done = subject.effects(many, [layers] * len(many), how, subject.ask())
    return {"scale": [float(s) for s in scales], **_answers(done)}


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
      {before, after, tokens_before, tokens_after, warning}; both use the same random
      draws. Text ends where a patch diverges, which the warning says.

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
    check_at_least(0, temperature=temperature)
    check_finite(seed=seed)
    single = subject.single(edits, n_later=n_new)
    now = _on_prompt(subject, single)
    later = [change for change in single if change[1] >= T]
    layer_E = np.array([change[0] for change in single])
    layers = subject.check_range(layers, layer_E, how.mode)
    range_2, key = jnp.asarray(layers, jnp.int32), jax.random.key(seed)
    heat = jnp.asarray(temperature, jnp.float32)
    ahead = (
        (subject.edits(later), rivals(subject.dictionary, subject.patchable, later))
        if later
        else None
    )
    idle = [(*change[:3], 1.0, 0.0) for change in now]
    texts: dict[str, list[int]] = {}
    with jax.default_matmul_precision("highest"):
        for name, changes, held in (("before", idle, None), ("after", now, ahead)):
            new, among = held or (None, None)
            done = _patched(subject, changes, range_2, how)
            token = continue_prompt(
                subject.patchable, done, new, range_2, key, heat, n_new=n_new,
                among=among,
            )  # fmt: skip
            texts[name] = [int(t) for t in np.asarray(token)]
    found = texts["after"]
    lost = found.index(-1) if -1 in found else None
    texts["after"] = found[:lost]
    say = subject.model.tokenizer.token_strings
    return {
        "before": "".join(say(texts["before"])),
        "after": None if lost == 0 else "".join(say(texts["after"])),
        **{f"tokens_{name}": tokens for name, tokens in texts.items()},
        "warning": None if lost is None else _why_diverged(subject, single, how),
    }


def _patched(
    subject: Subject, changes: Sequence[Change], range_2: Array, how: How
) -> Run:
    """The whole pass of one patch."""
    one = jax.tree.map(
        lambda x_B: jnp.asarray(x_B[0]), batch_edits([subject.edits(changes)])
    )
    local = None
    if how.mode == "iterative":
        known, slot_E = subject.local_for(changes)
        slots = np.zeros(len(one.factor_E), np.int32)
        slots[: len(slot_E)] = slot_E
        local = (known.tables, jnp.asarray(slots))
    return _patch_one(subject.patchable, one, range_2, local, how=how)


_patch_one = jax.jit(patch_one, static_argnames="how")
