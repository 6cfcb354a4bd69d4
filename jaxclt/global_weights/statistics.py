"""Co-activation sums over tokens: which features fire together, and how strongly.

For targets j and sources i of lower layers, over the tokens n that count,

    ind[j, i] = sum a_i 1(a_j)      act[j, i] = sum a_i a_j      both[j, i] = sum 1 1

with 1(a) for "fires" (a != 0), as Circuit Tracing (2025), section 4, needs for ERA and
TWERA. Encoders that read after the norm also get ``ind_norm`` and ``act_norm``, each
term multiplied by the reciprocal norm denominator at the target (maths 17.8): with
these the sums over graph edges are exact.

Everything is one product per target layer. Sums of a few thousand tokens are made in
the model's dtype on the device, and added up in float64 on the host: rates far below
what half precision can hold survive, and parts can be merged in any order.
"""

from __future__ import annotations

import dataclasses
import operator
from collections.abc import Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from scipy.sparse import csr_array

from jaxclt.clt.coder import Bound, Coder
from jaxclt.clt.sites import read_site, reads_past_norm
from jaxclt.clt.subset import Subset
from jaxclt.errors import InputError
from jaxclt.global_weights.attention import Head, HeadReads, head_sums, rows_by_layer
from jaxclt.lm.config import LMConfig
from jaxclt.lm.layers import mlp_norm
from jaxclt.lm.run import embed, native_mlp, run, unembed
from jaxclt.precision import jit
from jaxclt.types import Held, LMParams

__all__ = [
    "Coactivation",
    "Encoders",
    "Matrix",
    "Plan",
    "Seen",
    "Sums",
    "add_sums",
    "encoders",
    "feature_sums",
    "fires",
    "merge_coactivation",
    "pair_sums",
    "sums_of",
    "token_sums",
    "watch",
]

Matrix = np.ndarray | csr_array
Sums = dict[str, Any]  # arrays, or a tuple of one matrix per target layer (or head)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Coactivation:
    """Sums over the tokens that count; expectations are these over `n_tokens`.

    Attributes:
      subset: the features.
      scaled: whether encoders read after the norm, so that ``*_norm`` sums exist.
      heads: attention heads (layer, head) with sums of their own.
      input_Y: tracked input tokens, int32.
      output_Y: tracked output tokens, int32.
      sums: float64. ``n`` tokens; ``sum_U`` and ``count_U`` of activations;
        ``ind``, ``act``, ``both`` (and ``ind_norm``, ``act_norm``): for every target
        layer a matrix [targets, sources of all layers below], dense or sparse.
        ``head_ind``, ``head_act``: one matrix a head (see `attention`). ``input_*_UY``:
        feature against tracked input tokens; ``output_act_YU``, ``output_sum_Y``:
        activation times probability, and probability, of tracked output tokens.
    """

    subset: Subset
    scaled: bool
    sums: Sums
    heads: tuple[Head, ...] = ()
    input_Y: np.ndarray = dataclasses.field(
        default_factory=lambda: np.zeros(0, np.int32)
    )
    output_Y: np.ndarray = dataclasses.field(
        default_factory=lambda: np.zeros(0, np.int32)
    )

    @property
    def n_tokens(self) -> int:
        """Tokens that were counted."""
        return round(float(self.sums["n"]))

    @property
    def frequency(self) -> np.ndarray:
        """Share of the tokens on which each feature fires, [U]."""
        return self.sums["count_U"] / max(self.n_tokens, 1)

    @property
    def mean(self) -> np.ndarray:
        """E[a] of each feature, [U]."""
        return self.sums["sum_U"] / max(self.n_tokens, 1)

    @property
    def sparse(self) -> bool:
        """Whether only pairs that fire together are held."""
        return isinstance(self.sums["both"][-1], csr_array)


def merge_coactivation(first: Coactivation, *others: Coactivation) -> Coactivation:
    """Statistics of several streams of text as if they were one.

    Raises:
      InputError: if they are of other features, heads or tokens.
    """
    sums = first.sums
    for other in others:
        same = (
            np.array_equal(first.subset.layer_U, other.subset.layer_U)
            and np.array_equal(first.subset.feature_U, other.subset.feature_U)
            and np.array_equal(first.input_Y, other.input_Y)
            and np.array_equal(first.output_Y, other.output_Y)
            and first.heads == other.heads
            and first.sparse == other.sparse
        )
        if not same:
            raise InputError(
                "statistics of different features, heads or tokens cannot be merged: "
                "gather them with the same `features`"
            )
        sums = jax.tree.map(operator.add, sums, other.sums)
    return dataclasses.replace(first, sums=sums)


# -- one pass over windows of tokens ---------------------------------------------------


@dataclasses.dataclass(frozen=True, kw_only=True)
class Plan:
    """What is summed: hashable, a static argument of jit."""

    lm: LMConfig
    coder: Coder
    starts: tuple[int, ...]  # of the layers in the subset, see `Subset.starts`
    heads: tuple[Head, ...] = ()

    @property
    def scaled(self) -> bool:
        """Whether encoders read after the norm."""
        return reads_past_norm(self.coder.site)


class Encoders(NamedTuple):
    """Encoders of a subset on the device, one entry a layer."""

    enc: tuple[Any, ...]  # leaves [U, ..]; of all features where they compete
    pick: tuple[Array, ...] | None  # rows of the subset among all, where they compete


def encoders(on: Bound, subset: Subset) -> Encoders:
    """The encoders that a subset needs, in the model's dtype."""
    competes, every = on.coder.competes, np.arange(on.shape.n_features)
    chosen = [subset.features(layer) for layer in range(on.shape.n_layers)]
    found = [
        on.encoders(layer, every if competes else some)
        for layer, some in enumerate(chosen)
    ]
    return Encoders(
        tuple(jax.tree.map(jnp.asarray, found)),
        tuple(map(jnp.asarray, chosen)) if competes else None,
    )


class Seen(NamedTuple):
    """What a batch of windows showed; T = W S positions, window by window."""

    pre_UT: Array
    a_UT: Array  # zero where a position does not count
    mask_T: Array  # 1 where it counts
    scale_LT: Array  # reciprocal denominators before the MLPs
    held: Held  # the clean streams and scales of attention, leaves [L, W, ..]
    out_WSD: Array
    out_scale_WS: Array


def watch(
    params: LMParams, enc: Encoders, token_WS: Array, mask_WS: Array, *, plan: Plan
) -> Seen:
    """Run the model on windows and encode what the subset reads.

    Args:
      params: the model.
      enc: from `encoders`.
      token_WS: token ids; padding (negative) comes after the text.
      mask_WS: bool, which positions count.
      plan: static sizes.
    """

    def one(token_S: Array):
        done = run(
            params,
            embed(params, token_S),
            native_mlp(plan.lm),
            cfg=plan.lm,
            keep_patterns=False,
        )
        taps = done.taps
        held = Held(
            attn_scale_LT=taps.attn_scale_T,
            clean_LTD=taps.resid_TD,
            post_attn_scale_LT=taps.post_attn_scale_T,
        )
        out = done.out_TD, done.out_scale_T
        return (taps.mid_TD, taps.mlp_scale_T, held), out

    axes: Any = (1, 0)
    taps, (out_WSD, out_scale_WS) = jax.vmap(one, out_axes=axes)(
        jnp.maximum(token_WS, 0)
    )
    mid_LWSD, scale_LWS, held = taps
    L, W, S, D = mid_LWSD.shape
    scale_LT = scale_LWS.reshape(L, W * S)
    mask_T = mask_WS.reshape(-1).astype(scale_LT.dtype)
    coder, pre, a, norms = plan.coder, [], [], mlp_norm(params.blocks)
    for layer in range(L):
        norm, mid_TD = norms.of_layer(layer), mid_LWSD[layer].reshape(W * S, D)
        read_TD = read_site(coder.site, norm, mid_TD, scale_LT[layer])
        p = jax.tree.map(lambda leaf: leaf[layer], params.blocks)  # noqa: B023
        with jax.named_scope("encode"):
            found = coder.encode(p, enc.enc[layer], read_TD)
        pre_UT, a_UT = found.pre_TF.T, found.a_TF.T
        if enc.pick is not None:
            pre_UT, a_UT = pre_UT[enc.pick[layer]], a_UT[enc.pick[layer]]
        pre.append(pre_UT)
        a.append(a_UT * mask_T[None])
    return Seen(
        jnp.concatenate(pre),
        jnp.concatenate(a),
        mask_T,
        scale_LT,
        held,
        out_WSD,
        out_scale_WS,
    )


def fires(a: Array) -> Array:
    """1 where a feature is active, in its dtype."""
    return (a != 0).astype(a.dtype)


def pair_sums(
    a_UT: Array, starts: Sequence[int], scale_LT: Array | None = None
) -> Sums:
    """``ind``, ``act`` and ``both`` of every target layer, targets by sources below.

    Args:
      a_UT: activations, layer-major.
      starts: where layers start, L + 1 numbers.
      scale_LT: reciprocal denominators at the targets, for the ``*_norm`` sums.
    """
    on_UT = fires(a_UT)
    found: Sums = {"ind": [], "act": [], "both": []}
    if scale_LT is not None:
        found |= {"ind_norm": [], "act_norm": []}
    with jax.named_scope("coactivation"):
        for layer in range(len(starts) - 1):
            here, below = slice(*starts[layer : layer + 2]), slice(0, starts[layer])
            n = here.stop - here.start
            left = [on_UT[here], a_UT[here]]
            names = ["ind", "act"]
            if scale_LT is not None:
                left += [x * scale_LT[layer][None] for x in left]
                names += ["ind_norm", "act_norm"]
            product = jnp.concatenate(left) @ a_UT[below].T
            for i, name in enumerate(names):
                found[name].append(product[i * n : (i + 1) * n])
            found["both"].append(on_UT[here] @ on_UT[below].T)
    return {name: tuple(tiles) for name, tiles in found.items()}


def _input_sums(seen: Seen, hot_TY: Array, plan: Plan) -> Sums:
    """Features against tracked input tokens, [U, Y]."""
    on_UT = fires(seen.a_UT)
    found = {"input_ind_UY": on_UT @ hot_TY, "input_act_UY": seen.a_UT @ hot_TY}
    if plan.scaled:
        scale_UT = rows_by_layer(seen.scale_LT, plan.starts)
        found |= {
            "input_ind_norm_UY": (on_UT * scale_UT) @ hot_TY,
            "input_act_norm_UY": (seen.a_UT * scale_UT) @ hot_TY,
        }
    return found


def _output_sums(params: LMParams, seen: Seen, output_Y: Array, mask_WS: Array) -> Sums:
    """Features against the probabilities of tracked output tokens, [Y, U]."""

    def one(out_SD: Array) -> Array:
        return jax.nn.softmax(unembed(params, out_SD), axis=-1)[:, output_Y]

    p_WSY = jax.lax.map(one, seen.out_WSD)  # one window's vocabulary at a time
    p_WSY = p_WSY * mask_WS[..., None].astype(p_WSY.dtype)
    p_TY = p_WSY.reshape(-1, len(output_Y))
    normed_TY = (p_WSY * seen.out_scale_WS[..., None]).reshape(p_TY.shape)
    return {
        "output_sum_Y": p_TY.sum(0),
        "output_act_YU": p_TY.T @ seen.a_UT.T,
        "output_act_norm_YU": normed_TY.T @ seen.a_UT.T,
    }


def feature_sums(seen: Seen) -> Sums:
    """Tokens, and every feature by itself."""
    return {
        "n": seen.mask_T.sum(),
        "sum_U": seen.a_UT.sum(1),
        "count_U": fires(seen.a_UT).sum(1),
    }


def token_sums(
    params: LMParams,
    enc: Encoders,
    token_WS: Array,
    mask_WS: Array,
    input_Y: Array | None,
    output_Y: Array | None,
    *,
    plan: Plan,
) -> Sums:
    """All sums of `Coactivation` over a batch of windows, dense; see `watch`.

    Tracked input and output tokens are given or None; the latter cost the unembedding.
    """
    seen = watch(params, enc, token_WS, mask_WS, plan=plan)
    scale_LT = seen.scale_LT if plan.scaled else None
    found = feature_sums(seen) | pair_sums(seen.a_UT, plan.starts, scale_LT)
    if input_Y is not None:
        hot_TY = token_WS.reshape(-1)[:, None] == input_Y[None]
        hot_TY = hot_TY.astype(seen.a_UT.dtype) * seen.mask_T[:, None]
        found |= _input_sums(seen, hot_TY, plan) | {"input_count_Y": hot_TY.sum(0)}
    if output_Y is not None:
        found |= _output_sums(params, seen, output_Y, mask_WS)
    if plan.heads:
        reads = HeadReads(seen.a_UT, seen.held, scale_LT)
        found |= head_sums(
            params.blocks,
            reads,
            cfg=plan.lm,
            starts=plan.starts,
            heads=plan.heads,
        )
    return found


add_sums = jit(
    lambda sums, more: jax.tree.map(operator.add, sums, more), donate_argnums=0
)
sums_of = partial(jit, static_argnames="plan")(token_sums)
