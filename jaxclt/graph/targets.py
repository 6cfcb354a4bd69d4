"""What a graph explains: next tokens, or any linear functional of the recorded run.

Builders make `Targets`: logits (`salient_targets`, `token_targets`), logit differences,
a token's probability to first order, features, any direction at a site and position,
and several of these with weights (`combine_targets`). What the rows of targets need is
in `jaxclt.graph.target_reads`.

Builders of logits take the model, the normed output ``out_D`` of the position that is
read (where probabilities matter) and token ids, int32. That position is ``pos``, by
default the last of the prompt; ``labels`` are names instead of the builder's own.

The sites of `functional_targets`, each linear once patterns and norms are frozen:

| site | what is read |
|---|---|
| out | the output after the final norm, which unembeds to logits |
| resid_mid:l | the residual stream where the MLP of layer l reads: after attention |
| normalized:l, mlp_in:l | the same after the MLP's norm, without and with its weights |
| mlp_out:l | what the MLP of layer l adds |
| resid_post:l | the stream after layer l: resid_mid:l + mlp_out:l |
| resid_pre:l | the stream entering layer l > 0: resid_post:l-1 |
| attn_in:l | the same after the attention's norm |

Where attention and MLP stand side by side, resid_mid:l is resid_pre:l, and resid_post:l
what the next layer reads; after the last layer there is only `out`.

Weights are what influence starts with: a token's probability; for all else 1 / K each,
which `combine_targets` changes. They are never negative: what is given a negative
weight is negated instead (``-v`` with weight ``|w|``), so that rows, paths and total
effects have the sign that was asked for while influence counts sizes.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from numpy.typing import ArrayLike

from jaxclt.clt.active import feature_reads
from jaxclt.clt.coder import Dictionary
from jaxclt.clt.live import live_feature_reads
from jaxclt.clt.sites import fold_reads, reads_past_norm
from jaxclt.errors import InputError, did_you_mean
from jaxclt.lm.config import LMConfig
from jaxclt.lm.layers import attn_norm, mlp_norm
from jaxclt.lm.run import unembed
from jaxclt.precision import precise
from jaxclt.types import LMParams, Recording, Targets

__all__ = [
    "SITES",
    "combine_targets",
    "demeaned_unembedding",
    "difference_targets",
    "feature_targets",
    "functional_targets",
    "place_targets",
    "probability_targets",
    "salient_targets",
    "token_targets",
]

_STREAM = ("resid_mid", "normalized", "mlp_in", "mlp_out", "resid_post", "resid_pre")
_LAYERED = (*_STREAM, "attn_in")
SITES = ("out", *_LAYERED)


def _unembedding(params: LMParams, token_K: Array) -> Array:
    if params.unembed_DV is None:
        return params.embed_VD[token_K]
    return params.unembed_DV[:, token_K].T


def _logit_bias(
    params: LMParams, token_K: Array, share_V: Array | None
) -> Array | None:
    """What logits are given anyway, less their mean by some shares; None: nothing."""
    bias_V = params.unembed_bias_V
    if bias_V is None:
        return None
    return bias_V[token_K] - (bias_V.mean() if share_V is None else bias_V @ share_V)


def demeaned_unembedding(params: LMParams, token_K: Array) -> Array:
    """Unembedding columns minus their mean over the vocabulary, [K, D].

    A softmax ignores what all logits share, so a target is the logit minus the mean
    logit (Circuit Tracing 2025, appendix E); its edges sum to zero over the vocabulary.
    """
    if params.unembed_DV is None:
        mean_D = params.embed_VD.mean(0)
    else:
        mean_D = params.unembed_DV.mean(1)
    return _unembedding(params, token_K) - mean_D[None]


# -- making targets --------------------------------------------------------------------


def _targets(
    vec_KD: Array | np.ndarray,
    *,
    layer: ArrayLike,
    pos: ArrayLike,
    token_K: Array | None = None,
    weight_K: Array | None = None,
    write_KD: np.ndarray | None = None,
    const_K: ArrayLike | None = None,
    norm: int = 0,
    gate_KD: np.ndarray | None = None,
    labels: Sequence[str] | None = None,
) -> Targets:
    """Targets with everything not given at its default.

    Raises:
      InputError: if the number of labels or constants is not that of the directions.
    """
    K, dtype = len(vec_KD), vec_KD.dtype
    const_K = np.zeros(K) if const_K is None else np.atleast_1d(const_K)
    labels = ("",) * K if labels is None else tuple(labels)
    none_KD = np.zeros(vec_KD.shape, dtype)
    if len(labels) != K or const_K.shape != (K,):
        raise InputError(f"{K} targets need {K} labels and {K} constants")
    return Targets(
        token_K=np.full(K, -1, np.int32) if token_K is None else token_K,
        weight_K=np.full(K, 1 / max(K, 1), dtype) if weight_K is None else weight_K,
        layer_K=np.broadcast_to(np.asarray(layer, np.int32), (K,)),
        pos_K=np.broadcast_to(np.asarray(pos, np.int32), (K,)),
        vec_KD=vec_KD,
        write_KD=none_KD if write_KD is None else write_KD,
        const_K=const_K.astype(dtype),
        norm_K=np.full(K, norm, np.int32),
        gate_KD=none_KD if gate_KD is None else gate_KD,
        labels=labels,
    )


def _n_layers(params: LMParams) -> int:
    return len(params.blocks.q_LDHC)


def token_targets(
    params: LMParams, out_D: Array, token_K: Array, *, pos: int = -1
) -> Targets:
    """Logits of given tokens minus the mean logit; weights are their probabilities."""
    prob_V = jax.nn.softmax(unembed(params, out_D))
    return _targets(
        demeaned_unembedding(params, token_K),
        layer=_n_layers(params),
        pos=pos,
        token_K=token_K,
        weight_K=prob_V[token_K],
        const_K=_logit_bias(params, token_K, None),
    )


def salient_targets(
    params: LMParams,
    out_D: Array,
    *,
    mass: float = 0.95,
    most: int = 10,
    pos: int = -1,
) -> Targets:
    """The top tokens up to `mass` of the probability, at most `most` of them.

    Circuit Tracing (2025), section 3.1: K = min(10, fewest tokens that hold 95%).

    Raises:
      InputError: if the model's output is not finite.
    """
    prob_V = np.asarray(jax.nn.softmax(unembed(params, out_D)))
    if not np.isfinite(prob_V).all():
        raise InputError(
            "the model's output is not finite on this prompt: check its weights, or "
            "run it with --dtype float32"
        )
    order = np.argsort(-prob_V, kind="stable")[: min(most, len(prob_V))]
    reached = np.searchsorted(np.cumsum(prob_V[order]), mass) + 1
    token_K = jnp.asarray(order[:reached].astype(np.int32))
    return token_targets(params, out_D, token_K, pos=pos)


def difference_targets(
    params: LMParams,
    token_K: Array,
    other_K: Array,
    *,
    pos: int = -1,
    labels: Sequence[str] | None = None,
) -> Targets:
    """Logits of some tokens minus those of others, pair by pair."""
    pairs = zip(np.asarray(token_K).tolist(), np.asarray(other_K).tolist(), strict=True)
    bias_K = None
    if params.unembed_bias_V is not None:
        bias_K = params.unembed_bias_V[token_K] - params.unembed_bias_V[other_K]
    return _targets(
        _unembedding(params, token_K) - _unembedding(params, other_K),
        layer=_n_layers(params),
        pos=pos,
        const_K=bias_K,
        labels=labels or [f"token {a} − token {b}" for a, b in pairs],
    )


@precise
def probability_targets(
    params: LMParams,
    out_D: Array,
    token_K: Array,
    *,
    log: bool = False,
    pos: int = -1,
    labels: Sequence[str] | None = None,
) -> Targets:
    """Gradients of probabilities (or of their logarithms) with respect to the logits.

    ``p_a (e_a - p)`` of logits z, and ``e_a - p`` with `log`. That is the first order:
    what a row sums to is ``p_a (z_a - Σ_v p_v z_v)``, not the probability. The negative
    of a log-probability is the loss.
    """
    prob_V = jax.nn.softmax(unembed(params, out_D))
    if params.unembed_DV is None:
        mean_D = prob_V @ params.embed_VD
    else:
        mean_D = params.unembed_DV @ prob_V
    vec_KD = _unembedding(params, token_K) - mean_D[None]
    bias_K = _logit_bias(params, token_K, prob_V)
    if not log:
        vec_KD = vec_KD * prob_V[token_K][:, None]
        bias_K = None if bias_K is None else bias_K * prob_V[token_K]
    name = "log p" if log else "p"
    return _targets(
        vec_KD,
        layer=_n_layers(params),
        pos=pos,
        const_K=bias_K,
        labels=labels or [f"{name}(token {i})" for i in np.asarray(token_K).tolist()],
    )


def feature_targets(
    dictionary: Dictionary,
    params: LMParams,
    recording: Recording,
    place_K3: ArrayLike,
    *,
    cfg: LMConfig,
) -> Targets:
    """Pre-activations of features, active or not; they need not be nodes of the graph.

    Args:
      dictionary: a transcoder, or the model's neurons (their gates are frozen).
      params: the model.
      recording: its clean pass.
      place_K3: layer, position and feature index of each.
      cfg: model shape.

    Raises:
      InputError: if there is no such layer, position or feature.
    """
    place_K3 = np.asarray(place_K3, np.int32).reshape(-1, 3)
    T = len(recording.token_T)
    place_K3[:, 1] = [_position(int(pos), T) for pos in place_K3[:, 1]]
    read = feature_reads(dictionary, params, recording, place_K3, cfg=cfg)
    live = live_feature_reads(
        dictionary, params, recording, place_K3, read.read_KD, cfg=cfg
    )
    return _targets(
        read.read_KD,
        layer=place_K3[:, 0],
        pos=place_K3[:, 1],
        const_K=read.bias_K,
        norm=int(reads_past_norm(dictionary.coder(cfg).site)),
        gate_KD=live.gate_KD,
        labels=[f"L{layer} feature {feature}" for layer, _, feature in place_K3],
    )


def functional_targets(
    params: LMParams,
    recording: Recording,
    site: str,
    pos: int,
    vec_KD: ArrayLike,
    *,
    cfg: LMConfig,
    const_K: ArrayLike | None = None,
    labels: Sequence[str] | None = None,
) -> Targets:
    """Any linear functional: ``vec · x + const`` at a site and position.

    Args:
      params: the model.
      recording: its clean pass (norm denominators are taken from it).
      site: ``out`` or ``name:layer``, see the table of this module.
      pos: position in the recording; negative counts from its end.
      vec_KD: directions, [K, D] or [D].
      cfg: model shape.
      const_K: added constants, for example a probe's bias.
      labels: names; the site by default.

    Raises:
      InputError: if the site, the position or a shape does not fit the model.
    """
    T, D = recording.embed_TD.shape
    L, dtype = cfg.n_layers, recording.out_TD.dtype
    p = _position(pos, T)
    name, layer = _site(site, L)
    read_KD = np.atleast_2d(np.asarray(vec_KD, dtype))
    if read_KD.ndim != 2 or read_KD.shape[1] != D:
        raise InputError(
            f"a target direction has shape {read_KD.shape[1:]}; this model needs ({D},)"
        )
    if name in ("resid_pre", "attn_in") and layer == 0:
        raise InputError(
            f"target site {site}: what enters layer 0 is one embedding and has "
            "no other inputs, name a later layer"
        )
    write_KD = np.zeros_like(read_KD)
    const_K = np.zeros(len(read_KD)) if const_K is None else np.atleast_1d(const_K)
    past = 0
    if name in ("normalized", "mlp_in", "attn_in"):
        past, norm, scale_LT = 1, mlp_norm, recording.frozen.mlp_scale_LT
        if name == "attn_in":
            past, norm, scale_LT = 2, attn_norm, recording.frozen.attn_scale_LT
        form = "normalized" if name == "normalized" else "mlp_in"
        read_KD, bias_K = fold_reads(form, norm(params.blocks).of_layer(layer), read_KD)
        read_KD = read_KD * np.asarray(scale_LT)[layer, p]
        const_K = const_K + bias_K
    match name:
        case "mlp_out":
            read_KD, write_KD = write_KD, read_KD
        case "resid_post" if cfg.parallel:
            layer += 1
            if layer == L:
                raise InputError(
                    f"target site {site}: attention and MLP of the last layer stand "
                    "side by side and nothing but the output reads both, use out"
                )
        case "resid_post":
            write_KD = read_KD
        case "resid_pre" | "attn_in" if not cfg.parallel:
            write_KD, layer = read_KD, layer - 1
    return _targets(
        read_KD,
        layer=layer,
        pos=p,
        write_KD=write_KD,
        const_K=const_K,
        norm=past,
        labels=labels or [site] * len(read_KD),
    )


def _site(site: str, n_layers: int) -> tuple[str, int]:
    """Name and layer of a site."""
    found = re.fullmatch(r"(\w+):(\d{1,9})", site)
    if site == "out":
        return "out", n_layers
    if found is None or found[1] not in _LAYERED:
        raise InputError(
            f"target site {site!r} is unknown: write out, or one of "
            f"{', '.join(_LAYERED)} with a layer, for example resid_mid:3"
            f"{did_you_mean(site.partition(':')[0], SITES)}"
        )
    if int(found[2]) >= n_layers:
        raise InputError(
            f"target site {site}: the model has layers 0 to {n_layers - 1}"
        )
    return found[1], int(found[2])


def _position(pos: int, n_tokens: int) -> int:
    if not -n_tokens <= pos < n_tokens:
        raise InputError(
            f"target position {pos}: the prompt has {n_tokens} tokens, give 0 to "
            f"{n_tokens - 1}, or -1 for the last"
        )
    return pos % n_tokens


def combine_targets(
    parts: Sequence[Targets], weights: Sequence[float] | None = None
) -> Targets:
    """Several targets in one graph, for example those of all positions of an answer.

    Part i gets ``|weights[i]|`` of the influence, shared among its targets by their own
    weights (equally if these are all zero); everything is scaled to sum to 1. A part
    with a negative weight is negated.

    Args:
      parts: targets; a negative position still counts from the end of the prompt.
      weights: one per part; equal by default.

    Raises:
      InputError: if there is no part, or a weight is zero or not finite.
    """
    weights = [1.0] * len(parts) if weights is None else list(weights)
    if not parts or len(weights) != len(parts):
        raise InputError(
            f"{len(parts)} targets with {len(weights)} weights: give one each"
        )
    if not all(np.isfinite(w) and w != 0 for w in weights):
        raise InputError(f"target weights {weights}: give finite numbers other than 0")
    total = sum(abs(w) for w in weights)
    scaled = [_scaled(part, w / total) for part, w in zip(parts, weights, strict=True)]
    columns = zip(*(jax.tree.leaves(part) for part in scaled), strict=True)
    labels = tuple(label for part in scaled for label in part.labels)
    form = jax.tree.structure(dataclasses.replace(scaled[0], labels=labels))
    return jax.tree.unflatten(form, [np.concatenate(column) for column in columns])


def _scaled(part: Targets, weight: float) -> Targets:
    """A part whose weights sum to the size of `weight`, negated if that is negative."""
    part = jax.tree.map(np.asarray, part)
    share_K = part.weight_K if part.weight_K.any() else np.ones_like(part.weight_K)
    share_K = (share_K * (abs(weight) / share_K.sum())).astype(share_K.dtype)
    if weight > 0:
        return dataclasses.replace(part, weight_K=share_K)
    names = zip(part.labels, part.token_K.tolist(), strict=True)
    return dataclasses.replace(
        part,
        token_K=np.full_like(part.token_K, -1),
        weight_K=share_K,
        vec_KD=-part.vec_KD,
        write_KD=-part.write_KD,
        const_K=-part.const_K,
        gate_KD=-part.gate_KD,
        labels=tuple(f"−({label or f'token {i}'})" for label, i in names),
    )


# -- placing them ----------------------------------------------------------------------


def place_targets(targets: Targets, *, cfg: LMConfig, n_tokens: int) -> Targets:
    """The same on the host, checked, all positions counted from the front.

    Raises:
      InputError: if there is none, a layer, a position or a width is not the model's or
        the prompt's, a direction is not finite, weights are negative or all zero, or
        the final output is given a direction to read of an MLP.
    """
    host = jax.tree.map(np.asarray, targets)
    n_layers = cfg.n_layers
    if len(host.token_K) == 0:
        raise InputError("there is nothing to explain: give at least one target")
    if host.vec_KD.shape[1] != cfg.d_model:
        raise InputError(
            f"a target direction has shape {host.vec_KD.shape[1:]}; this model needs "
            f"({cfg.d_model},)"
        )
    if not ((host.layer_K >= 0) & (host.layer_K <= n_layers)).all():
        raise InputError(f"a target's layer is not among 0 to {n_layers}")
    if host.write_KD[host.layer_K == n_layers].any():
        raise InputError("no MLP writes after the final norm: use site resid_post")
    for name in ("vec_KD", "write_KD", "const_K", "gate_KD", "weight_K"):
        if not np.isfinite(getattr(host, name)).all():
            raise InputError(f"a target's {name} is not finite")
    if (host.weight_K < 0).any() or not host.weight_K.any():
        raise InputError(
            "target weights must not be negative and not all be zero: use "
            "combine_targets, which negates targets and scales weights"
        )
    pos_K = [_position(int(pos), n_tokens) for pos in host.pos_K]
    return dataclasses.replace(host, pos_K=np.asarray(pos_K, np.int32))
