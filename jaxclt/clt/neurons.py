"""The model's own MLP neurons as a dictionary that needs no training.

A gated neuron's activation is ``act(gate) * up``: two linear pre-activations. The rule
here (spec 6.6): the gate is frozen like an attention pattern, so a neuron's
pre-activation is ``up`` times its frozen gate, linear in the stream, equal to its
activation, and of either sign. With all neurons the dictionary is exact and every error
node is zero; `neurons:k` keeps, per layer and position, the k with the largest written
norm ``|a| * ||W_down||`` and leaves the rest to the error node.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from jaxclt.clt.active import Active
from jaxclt.errors import InputError
from jaxclt.lm import layers
from jaxclt.lm.config import LMConfig
from jaxclt.types import Block, LMParams, Recording

__all__ = ["NeuronDictionary", "active_neurons", "parse_neurons"]


@dataclasses.dataclass(frozen=True)
class NeuronDictionary:
    """`neurons:k`, or all neurons when k is None."""

    k: int | None = None
    hash: str = ""

    @property
    def name(self) -> str:
        """As the user gave it."""
        return "neurons" if self.k is None else f"neurons:{self.k}"

    @property
    def labels(self) -> Mapping[tuple[int, int], str]:
        """Neurons have none."""
        return {}

    def active(self, params: LMParams, recording: Recording, cfg: LMConfig) -> Active:
        """The k strongest neurons of every layer and position."""
        return active_neurons(params, recording, cfg=cfg, k=self.k)


def parse_neurons(name: str) -> NeuronDictionary | None:
    """Read ``neurons`` or ``neurons:k``; None if `name` is something else."""
    head, _, count = name.partition(":")
    if head != "neurons":
        return None
    if not count:
        return NeuronDictionary()
    if not count.isdecimal() or int(count) < 1:
        raise InputError(
            f"dictionary {name!r}: write neurons:k with k a whole number of at least 1"
        )
    return NeuronDictionary(int(count))


@partial(jax.jit, static_argnames=("cfg", "k"))
def _strongest(
    p: Block, mid_TD: Array, scale_T: Array, cfg: LMConfig, k: int
) -> tuple[Array, Array, Array]:
    """Indices [T, k], activations [T, k] and gates [T, k] of the strongest neurons."""
    normed_TD = layers.normalise(mid_TD, scale_T, p.norm_mlp_LD)
    gate_TI, up_TI = layers.gate_and_up(p, normed_TD, cfg=cfg)
    value_TI = gate_TI * up_TI
    norm_I = jnp.linalg.norm(p.down_LID, axis=-1)
    _, index_TJ = jax.lax.top_k(jnp.abs(value_TI) * norm_I[None], k)
    take = partial(jnp.take_along_axis, indices=index_TJ, axis=1)
    return index_TJ, take(value_TI), take(gate_TI)


def active_neurons(
    params: LMParams, recording: Recording, *, cfg: LMConfig, k: int | None
) -> Active:
    """The strongest neurons as active features of a span-1 dictionary.

    Args:
      params: the model.
      recording: its clean pass.
      cfg: model shape.
      k: neurons per layer and position; None for all.
    """
    k = cfg.d_mlp if k is None else min(k, cfg.d_mlp)
    T = recording.token_T.shape[0]
    parts, encoder, decoder, diagonals = [], [], [], []
    for layer in range(cfg.n_layers):
        p = jax.tree.map(lambda leaf: leaf[layer], params.blocks)  # noqa: B023
        scale_T = recording.frozen.mlp_scale_LT[layer]
        found = _strongest(p, recording.mid_LTD[layer], scale_T, cfg, k)
        index_TJ, value_TJ, gate_TJ = map(np.asarray, found)
        order_TJ = np.argsort(index_TJ, axis=1)
        index, value, gate = (
            np.take_along_axis(x, order_TJ, 1).ravel()
            for x in (index_TJ, value_TJ, gate_TJ)
        )
        unique, row = np.unique(index, return_inverse=True)
        bias = 0 if p.up_bias_LI is None else np.asarray(p.up_bias_LI)[index]
        parts.append(
            (
                np.full(len(index), layer, np.int32),
                np.repeat(np.arange(T, dtype=np.int32), k),
                index.astype(np.int32),
                value,
                gate,
                (gate * bias).astype(value.dtype),
                row.astype(np.int32),
            )
        )
        encoder.append(np.asarray(p.up_LDI).T[unique])
        decoder.append(np.asarray(p.down_LID)[unique][:, None, :])
        diagonals.append(np.asarray(scale_T)[:, None] * np.asarray(p.norm_mlp_LD)[None])
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
        diagonal_LTD=np.stack(diagonals),
        write_bias_LD=(
            np.zeros((cfg.n_layers, cfg.d_model), value_A.dtype)
            if down_bias_LD is None
            else np.asarray(down_bias_LD)
        ),
    )
