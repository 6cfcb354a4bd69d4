"""The shell of the global circuit: statistics of text become global weights.

Coactivation (`jaxclt.global_weights.gather`) --build--> GlobalWeights
  --views--> globals.npz, report.json, index.html
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Callable, Sequence
from typing import Any, Literal

import numpy as np

from jaxclt.clt.coder import Dictionary
from jaxclt.clt.subset import Subset
from jaxclt.errors import InputError, check_choice, options_of
from jaxclt.global_weights import ranking
from jaxclt.global_weights import weights as weights_of
from jaxclt.global_weights.attention import Head, head_block
from jaxclt.global_weights.build import bound_of, build
from jaxclt.global_weights.files import load_statistics
from jaxclt.global_weights.gather import PassOptions, joined
from jaxclt.global_weights.inhibition import (
    inhibition_of,
    rows_of_weights,
    thresholds,
)
from jaxclt.global_weights.ranking import GlobalWeights, Kind, largest
from jaxclt.global_weights.statistics import Coactivation, Plan, Sums, encoders
from jaxclt.global_weights.weights import Strongest, virtual_block
from jaxclt.io.model import Model
from jaxclt.text.features import Features, choose_features
from jaxclt.text.windows import (
    BATCH_TOKENS,
    Data,
    TokenWindows,
    batches,
    read_windows,
)

__all__ = [
    "Inhibitors",
    "global_inhibition",
    "global_weights",
    "head_inputs",
    "strongest_virtual",
    "virtual_weights",
]


def global_weights(
    model: Model,
    dictionary: Dictionary,
    statistics: Coactivation | str | os.PathLike[str],
    *,
    kind: Kind = "twera",
) -> GlobalWeights:
    """Virtual weights of the statistics' features, ranked by how they are used.

    ``.inputs(layer, feature, k)`` and ``.outputs(layer, feature, k)`` give the
    strongest links of a feature. Circuit Tracing (2025), section 4.

    Args:
      model: from `load_model`.
      dictionary: the one that the statistics are of.
      statistics: from `coactivation`, or a statistics.npz.
      kind: what to rank by: virtual, era, twera, era_norm, twera_norm, coactivation.

    Raises:
      InputError: if the dictionary is another, or for an unknown kind.
    """
    on = bound_of(dictionary, model)
    if not isinstance(statistics, Coactivation):
        statistics, _ = load_statistics(statistics)
    check_choice("kind", kind, ranking.KINDS)
    if statistics.subset.n_layers != on.shape.n_layers:
        raise InputError(
            f"the statistics are of {statistics.subset.n_layers} layers, the "
            f"dictionary has {on.shape.n_layers}: they do not belong together"
        )
    return build(on, statistics, kind=kind)


def head_inputs(
    model: Model,
    dictionary: Dictionary,
    statistics: Coactivation,
    head: Head,
    layer: int,
    feature: int,
    *,
    k: int = 10,
    by: Literal["virtual", "era", "twera"] = "twera",
) -> list[dict[str, Any]]:
    """The strongest sources of a feature through one attention head, at any position.

    Norm-aware: n ERA is the sum of the graphs' edges through this head alone.

    Args:
      model: from `load_model`.
      dictionary: the one that the statistics are of.
      statistics: from `coactivation` with ``heads=[head]``.
      head: layer and head.
      layer: of the target, at or above the head's.
      feature: its index.
      k: how many at most; weights of 0 are none.
      by: what to rank by.

    Returns:
      ``layer feature virtual era twera`` of each source, strongest first.

    Raises:
      InputError: if the head was not gathered, or the target lies below it.
    """
    on = bound_of(dictionary, model)
    subset, sums = statistics.subset, statistics.sums
    if head not in statistics.heads:
        raise InputError(
            f"head {head[0]}:{head[1]} was not gathered: name it in `heads`"
        )
    slot, first = subset.slot(layer, feature), subset.starts[head[0]]
    if slot < first:
        raise InputError(
            f"feature {layer}:{feature} lies below head {head[0]}:{head[1]}: choose a "
            "target of the head's layer or above"
        )
    at, target = statistics.heads.index(head), (layer, np.asarray([feature]))
    weight = [
        head_block(on, head, target, (of, subset.features(of)), cfg=on.cfg)[0]
        for of in range(head[0])
        if len(subset.features(of))
    ]
    virtual_N = np.concatenate([np.zeros(0), *weight])
    total = float(sums["sum_U"][slot])
    ind_N, act_N = (sums[name][at][slot - first] for name in ("head_ind", "head_act"))
    value = {
        "virtual": virtual_N,
        "era": ind_N / max(statistics.n_tokens, 1) * virtual_N,
        "twera": act_N * virtual_N / total if total else np.zeros_like(act_N),
    }
    check_choice("kind", by, value)
    return [
        {"layer": int(subset.layer_U[i]), "feature": int(subset.feature_U[i])}
        | {name: float(x_N[i]) for name, x_N in value.items()}
        for i in largest(value[by], k)
    ]


def virtual_weights(
    model: Model,
    dictionary: Dictionary,
    target: tuple[int, Sequence[int] | np.ndarray],
    source: tuple[int, Sequence[int] | np.ndarray],
) -> np.ndarray:
    """Virtual weights [targets, sources] between some features of two layers.

    Circuit Tracing (2025), section 4; norm gains folded in, in the model's dtype.

    Args:
      model: from `load_model`.
      dictionary: from `load_dictionary`; not neurons.
      target: layer and feature indices.
      source: layer and feature indices; zeros unless the layer is lower.

    Raises:
      InputError: if there is no such layer or feature.
    """
    on = bound_of(dictionary, model)
    ends = []
    for layer, chosen in (target, source):
        index = np.asarray(chosen, np.int64).reshape(-1)
        # For its check only: the order that was asked for is kept.
        Subset.of(np.stack([np.full_like(index, layer), index], 1), on.shape)
        ends.append((int(layer), index))
    return virtual_block(on, *ends)


def strongest_virtual(
    model: Model,
    dictionary: Dictionary,
    k: int = 16,
    *,
    features: Features = "all",
    on_block: Callable[[int, int], None] = lambda done, total: None,
) -> tuple[Subset, Strongest]:
    """The k largest virtual weights into and out of every feature, without any text.

    Blocks are streamed: what is held is one of them, a layer's decoders, all encoders
    and the result.

    Args:
      model: from `load_model`.
      dictionary: from `load_dictionary`; not neurons.
      k: how many of each.
      features: which, see `choose_features` (not ``top:K``, which needs text).
      on_block: progress, (pairs of layers done, in all).

    Raises:
      InputError: for features that the dictionary lacks.
    """
    on = bound_of(dictionary, model)
    if isinstance(features, str) and features.startswith("top:"):
        raise InputError(f"features {features}: how often they fire needs text")
    none = TokenWindows(np.zeros((0, 1), np.int32), np.zeros((0, 1), bool))
    subset = choose_features(model, dictionary, features, none)
    found = weights_of.strongest_virtual(on, subset, k, on_block)
    return subset, found


@dataclasses.dataclass(frozen=True, kw_only=True)
class Inhibitors:
    """Sources that keep some targets from firing, over text.

    Attributes:
      subset: the sources.
      slot_R: slots of the targets in the subset.
      n_tokens: positions that counted.
      effect_RU: mean over tokens of the edge of a source that alone keeps the target
        silent (maths 14.2); negative.
      released_RU: share of tokens on which that is so.
      virtual_RU: virtual weights.
    """

    subset: Subset
    slot_R: np.ndarray
    n_tokens: int
    effect_RU: np.ndarray
    released_RU: np.ndarray
    virtual_RU: np.ndarray

    def inputs(self, layer: int, feature: int, k: int = 10) -> list[dict[str, Any]]:
        """The strongest inhibitors of a target.

        Raises:
          InputError: if it is not among the targets.
        """
        slot = self.subset.slot(layer, feature)
        at = np.flatnonzero(self.slot_R == slot)
        if not len(at):
            raise InputError(f"feature {layer}:{feature} is not among the targets")
        effect_U = self.effect_RU[at[0]]
        order = np.argsort(effect_U, kind="stable")[:k]
        return [
            {
                "layer": int(self.subset.layer_U[i]),
                "feature": int(self.subset.feature_U[i]),
                "effect": float(effect_U[i]),
                "released": float(self.released_RU[at[0], i]),
                "virtual": float(self.virtual_RU[at[0], i]),
            }
            for i in order
            if effect_U[i] < 0
        ]


def global_inhibition(
    model: Model,
    dictionary: Dictionary,
    data: Data | TokenWindows,
    targets: Sequence[Sequence[int]] | np.ndarray,
    *,
    on_tokens: Callable[[int, int], None] = lambda done, total: None,
    **options: Any,
) -> Inhibitors:
    """Which sources keep targets from firing on text; TWERA is blind to them.

    Args:
      model: from `load_model`, in float32.
      dictionary: from `load_dictionary`, with ReLU or JumpReLU.
      data: a text source or windows, see `read_windows`.
      targets: (layer, index) rows; each costs a step per source and position. They are
        added to the sources.
      on_tokens: progress.
      **options: fields of `PassOptions`; its features are the sources.

    Raises:
      InputError: for input that does not fit, or a TopK dictionary.
    """
    asked = options_of(PassOptions, "global_inhibition", options)
    on = bound_of(dictionary, model)
    text = {"mask": asked.mask, "tokens": asked.tokens, "context": asked.context}
    windows = read_windows(model, data, **text)
    sources = choose_features(model, dictionary, asked.features, windows)
    wanted = Subset.of(np.asarray(targets, np.int64), on.shape)
    place = [np.stack([x.layer_U, x.feature_U], 1) for x in (sources, wanted)]
    subset = Subset.of(np.concatenate(place), on.shape)
    slot_R = np.asarray([subset.slot(int(a), int(b)) for a, b in place[1]], np.int32)
    theta_R = thresholds(on, subset, slot_R)
    V_RU = rows_of_weights(on, subset, slot_R)
    plan = Plan(lm=model.cfg, coder=on.coder, starts=subset.starts)
    enc = encoders(on, subset)
    total: Sums = {}
    for token_WS, mask_WS, done in batches(windows, 0, BATCH_TOKENS):
        found = inhibition_of(
            model.params, enc, token_WS, mask_WS, slot_R, theta_R, V_RU, plan=plan
        )
        total = joined(total, found)
        on_tokens(int(windows.mask_WS[:done].sum()), windows.n_tokens)
    n = max(float(total["n"]), 1.0)
    return Inhibitors(
        subset=subset,
        slot_R=slot_R,
        n_tokens=round(float(total["n"])),
        effect_RU=total["effect_RU"] / n,
        released_RU=total["released_RU"] / n,
        virtual_RU=V_RU,
    )
