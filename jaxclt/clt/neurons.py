"""The model's own MLP neurons as a dictionary that needs no training.

A gated neuron's activation is ``act(gate) * up``: two linear pre-activations. The rule
here (maths 2.7): the gate is frozen like an attention pattern, so a neuron's
pre-activation is ``up`` times its frozen gate, linear in the stream, equal to its
activation, and of either sign. A neuron of an MLP without a gate is its own gate:
``act(u) = (act(u) / u) u``, where the factor (0 or 1 of a ReLU, smooth of a GELU) is
frozen. Its row then sums to its activation too, which is what total effects and paths
count on; row shares are those of ``u``.

With all neurons the dictionary is exact and every error node is zero; `neurons:k`
keeps, per layer and position, the k with the largest written norm ``|a| * ||W_down||``,
`neurons@x` those with at least x, and both leave the rest to the error node.

Where the model normalises what its MLPs write, the frozen scale of that norm (of all
neurons together, kept or not) is part of a neuron's gate and so of its activation, and
the gain of that norm part of its ``W_down``.
"""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Mapping
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from jaxclt.clt.active import Active
from jaxclt.clt.sites import fold_reads
from jaxclt.errors import InputError
from jaxclt.lm import layers
from jaxclt.lm.config import LMConfig
from jaxclt.types import Block, LMParams, Recording

__all__ = [
    "NeuronDictionary",
    "active_neurons",
    "kept_neurons",
    "neuron_values",
    "parse_neurons",
    "read_neurons",
]


@dataclasses.dataclass(frozen=True)
class NeuronDictionary:
    """`neurons:k`, `neurons@threshold`, or all neurons."""

    k: int | None = None
    hash: str = ""
    threshold: float | None = None  # of the written norm

    @property
    def name(self) -> str:
        """As the user gave it."""
        if self.threshold is not None:
            return f"neurons@{self.threshold:g}"
        return "neurons" if self.k is None else f"neurons:{self.k}"

    @property
    def labels(self) -> Mapping[tuple[int, int], str]:
        """Neurons have none."""
        return {}

    @property
    def provenance(self) -> Mapping[str, Any]:
        """The model's, see its hash."""
        return {}

    def active(
        self,
        params: LMParams,
        recording: Recording,
        cfg: LMConfig,
        n_tokens: int | None = None,
    ) -> Active:
        """The strongest neurons of every layer and position below `n_tokens`."""
        return active_neurons(
            params,
            recording,
            cfg=cfg,
            k=self.k,
            threshold=self.threshold,
            n_tokens=n_tokens,
        )


def parse_neurons(name: str) -> NeuronDictionary | None:
    """Read ``neurons``, ``neurons:k`` or ``neurons@threshold``; None if it is neither.

    Raises:
      InputError: for a count or a threshold that is none.
    """
    if name == "neurons":
        return NeuronDictionary()
    found = re.fullmatch(r"neurons([:@])(.*)", name)
    if found is None:
        return None
    kind, text = found.groups()
    if kind == ":":
        if not text.isdecimal() or int(text) < 1:
            raise InputError(
                f"dictionary {name!r}: write neurons:k with k a whole number of at "
                "least 1"
            )
        return NeuronDictionary(int(text))
    try:
        threshold = float(text)
    except ValueError:
        threshold = math.nan
    if not 0 < threshold < math.inf:
        raise InputError(
            f"dictionary {name!r}: write neurons@x with x the least written norm that "
            "counts, above 0"
        )
    return NeuronDictionary(threshold=threshold)


def neuron_values(
    p: Block, mid_TD: Array, scale_T: Array, *, cfg: LMConfig
) -> tuple[Array, Array]:
    """Activations [T, I] of all neurons of one layer, and their gates.

    Args:
      p: one layer of the model's blocks.
      mid_TD: the residual stream where the MLP reads.
      scale_T: reciprocal denominator of the norm before the MLP.
      cfg: model shape.
    """
    normed_TD = layers.normalise(mid_TD, scale_T, layers.mlp_norm(p))
    return read_neurons(p, normed_TD, cfg=cfg)


def read_neurons(p: Block, normed_TD: Array, *, cfg: LMConfig) -> tuple[Array, Array]:
    """`neuron_values` of what the MLP reads."""
    gate_TI, up_TI = layers.gate_and_up(p, normed_TD, cfg=cfg)
    if p.post_mlp_LD is not None:
        _, post_T = layers.mlp_and_scale(p, normed_TD, cfg=cfg)
        assert post_T is not None, "there is a norm"
        gate_TI = gate_TI * post_T[:, None]
    return gate_TI * up_TI, gate_TI


def kept_neurons(
    p: Block, value_TI: Array, *, k: int | None, threshold: Array | float | None = None
) -> Array | None:
    """Which neurons of one layer count [T, I]; None if all do.

    Args:
      p: one layer of the model's blocks.
      value_TI: activations.
      k: so many, of the largest written norm ``|a| * ||W_down||``.
      threshold: those whose written norm is at least so large.
    """
    if threshold is None and (k is None or k >= value_TI.shape[1]):
        return None
    size_TI = jnp.abs(value_TI) * jnp.linalg.norm(layers.neuron_rows(p), axis=-1)[None]
    if threshold is not None:
        return size_TI >= threshold
    assert k is not None
    _, index_TJ = jax.lax.top_k(size_TI, k)
    none_TI = jnp.zeros(size_TI.shape, bool)
    return jnp.put_along_axis(none_TI, index_TJ, True, -1, inplace=False)


@partial(jax.jit, static_argnames=("cfg", "k"))
def _found(
    p: Block,
    mid_TD: Array,
    scale_T: Array,
    threshold: Array | None,
    cfg: LMConfig,
    k: int | None,
) -> tuple[Array, Array, Array]:
    value_TI, gate_TI = neuron_values(p, mid_TD, scale_T, cfg=cfg)
    keep_TI = kept_neurons(p, value_TI, k=k, threshold=threshold)
    return (
        value_TI,
        gate_TI,
        jnp.ones(value_TI.shape, bool) if keep_TI is None else keep_TI,
    )


def active_neurons(
    params: LMParams,
    recording: Recording,
    *,
    cfg: LMConfig,
    k: int | None,
    threshold: float | None = None,
    n_tokens: int | None = None,
) -> Active:
    """The strongest neurons as active features of a span-1 dictionary.

    Args:
      params: the model.
      recording: its clean pass.
      cfg: model shape.
      k: neurons per layer and position; None for no such limit.
      threshold: least written norm of those that count.
      n_tokens: positions from there on have none; None for all.
    """
    least = None if threshold is None else jnp.asarray(threshold, params.embed_VD.dtype)
    parts, encoder, decoder = [], [], []
    for layer in range(cfg.n_layers):
        p = jax.tree.map(lambda leaf: leaf[layer], params.blocks)  # noqa: B023
        scale_T = recording.frozen.mlp_scale_LT[layer]
        found = _found(p, recording.mid_LTD[layer], scale_T, least, cfg, k)
        value_TI, gate_TI, keep_TI = map(np.asarray, found)
        pos, index = np.nonzero(keep_TI[:n_tokens])
        value, gate = value_TI[pos, index], gate_TI[pos, index]
        unique, row = np.unique(index, return_inverse=True)
        rows_UD = np.asarray(p.up_LDI).T[unique]
        rows_UD, bias_U = fold_reads("mlp_in", layers.mlp_norm(p), rows_UD)
        if p.up_bias_LI is not None:
            bias_U = bias_U + np.asarray(p.up_bias_LI)[unique]
        parts.append(
            (
                np.full(len(index), layer, np.int32),
                pos.astype(np.int32),
                index.astype(np.int32),
                value,
                gate,
                (gate * bias_U[row]).astype(value.dtype),
                row.astype(np.int32),
            )
        )
        encoder.append(rows_UD)
        decoder.append(np.asarray(layers.neuron_rows(p))[unique][:, None, :])
    fields = [np.concatenate(column) for column in zip(*parts, strict=True)]
    layer_A, pos_A, feature_A, value_A, gate_A, bias_A, row_A = fields
    down_bias_LD = params.blocks.down_bias_LD
    return Active(
        layer_A=layer_A,
        pos_A=pos_A,
        feature_A=feature_A,
        value_A=value_A,
        preact_A=value_A,
        read_bias_A=bias_A,
        gate_A=gate_A,
        row_A=row_A,
        encoder=tuple(encoder),
        decoder=tuple(decoder),
        scale_LT=np.asarray(recording.frozen.mlp_scale_LT),
        write_bias_LD=(
            np.zeros((cfg.n_layers, cfg.d_model), value_A.dtype)
            if down_bias_LD is None
            else np.asarray(down_bias_LD)
        ),
    )
