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
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from jaxclt.clt.coder import Encoded
from jaxclt.clt.config import ReadSite, Shape
from jaxclt.errors import InputError
from jaxclt.lm import layers
from jaxclt.lm.activations import activate_gate, gate_factor
from jaxclt.lm.config import LMConfig
from jaxclt.precision import precise
from jaxclt.types import Block, LMParams

__all__ = ["NeuronCoder", "NeuronDictionary", "NeuronRows", "parse_neurons"]


class NeuronRows(NamedTuple):
    """What some neurons of a layer read, rows [U, D] and biases [U]."""

    up_UD: Any
    up_bias_U: Any
    gate_UD: Any | None  # None: the neuron is its own gate
    gate_bias_U: Any | None


@dataclasses.dataclass(frozen=True)
class NeuronCoder:
    """How the model's neurons compute, see `jaxclt.clt.coder.Coder`."""

    lm: LMConfig
    k: int | None = None
    threshold: float | None = None

    gated = True
    competes = False
    signed = True

    @property
    def shape(self) -> Shape:
        """A per-layer transcoder's."""
        return Shape(
            n_layers=self.lm.n_layers,
            d_model=self.lm.d_model,
            n_features=self.lm.d_mlp,
            span=1,
        )

    @property
    def site(self) -> ReadSite:
        """What the MLP sees."""
        return "mlp_in"

    @property
    def chooses(self) -> bool:
        """Whether the weak ones are left out."""
        return self.k is not None or self.threshold is not None

    @precise
    def encode(
        self,
        p: Block,
        enc: NeuronRows | None,
        read_TD: Array,
        post_T: Array | None = None,
    ) -> Encoded:
        """``up`` and its gate; of some neurons all are on, of all the strong ones."""
        if enc is not None:
            return self._some(p, enc, read_TD, post_T)
        gate_TI, up_TI = layers.gate_and_up(p, read_TD, cfg=self.lm)
        if p.post_mlp_LD is not None:
            if post_T is None:
                _, post_T = layers.mlp_and_scale(p, read_TD, cfg=self.lm)
            assert post_T is not None, "there is a norm"
            gate_TI = gate_TI * post_T[:, None]
        return Encoded(up_TI, self._kept(p, gate_TI * up_TI), gate_TI)

    def _some(
        self, p: Block, enc: NeuronRows, read_TD: Array, post_T: Array | None
    ) -> Encoded:
        up_TU = jnp.einsum("TD,UD->TU", read_TD, enc.up_UD) + enc.up_bias_U[None]
        if enc.gate_UD is None:
            gate_TU = gate_factor(up_TU, p, cfg=self.lm)
        else:
            gate_TU = jnp.einsum("TD,UD->TU", read_TD, enc.gate_UD)
            gate_TU = activate_gate(
                gate_TU + enc.gate_bias_U[None],  # pyright: ignore
                p,
                cfg=self.lm,
            )
        if post_T is not None:
            gate_TU = gate_TU * post_T[:, None]
        return Encoded(up_TU, jnp.ones(up_TU.shape, bool), gate_TU)

    def _kept(self, p: Block, value_TI: Array) -> Array:
        """Those of the largest written norm ``|a| * ||W_down||``, bool [T, I]."""
        k, threshold = self.k, self.threshold
        if threshold is None and (k is None or k >= value_TI.shape[1]):
            return jnp.ones(value_TI.shape, bool)
        norm_I = jnp.linalg.norm(layers.neuron_rows(p), axis=-1)
        size_TI = jnp.abs(value_TI) * norm_I[None]
        if threshold is not None:
            return size_TI >= jnp.asarray(threshold, size_TI.dtype)
        assert k is not None
        _, index_TJ = jax.lax.top_k(size_TI, k)
        none_TI = jnp.zeros(size_TI.shape, bool)
        return jnp.put_along_axis(none_TI, index_TJ, True, -1, inplace=False)

    def rows(self, enc: NeuronRows) -> tuple[Any, Any]:
        """What ``up`` reads."""
        return enc.up_UD, enc.up_bias_U

    def thresholds(self, enc: NeuronRows | None) -> None:
        """A neuron is never off."""
        del enc

    @precise
    def write(self, p: Block, dec: Array | None, a_TF: Array) -> Array:
        """Activations times rows of ``W_down``."""
        rows_FD = layers.neuron_rows(p) if dec is None else dec[:, 0]
        return (a_TF @ rows_FD)[None]

    def bias(self, p: Block, fixed: None) -> Array:
        """The MLP's own bias, which no norm after the MLP comes with."""
        del fixed
        if p.down_bias_LD is None:
            return jnp.zeros(p.down_LID.shape[-1:], p.down_LID.dtype)
        return p.down_bias_LD

    def skip(self, fixed: None) -> None:
        """There is none."""
        del fixed


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

    def coder(self, cfg: LMConfig) -> NeuronCoder:
        """How they compute."""
        return NeuronCoder(cfg, self.k, self.threshold)

    def encoders(
        self, params: LMParams, layer: int, feature_U: np.ndarray | None = None
    ) -> NeuronRows | None:
        """Rows of some neurons; of all they are the model's own."""
        if feature_U is None:
            return None
        b = params.blocks

        def rows(W_LDI: Array | None) -> np.ndarray | None:
            return None if W_LDI is None else np.asarray(W_LDI[layer]).T[feature_U]

        def bias(b_LI: Array | None) -> np.ndarray:
            if b_LI is None:
                return np.zeros(len(feature_U), b.up_LDI.dtype)
            return np.asarray(b_LI[layer])[feature_U]

        gate_bias = None if b.gate_LDI is None else bias(b.gate_bias_LI)
        return NeuronRows(
            rows(b.up_LDI), bias(b.up_bias_LI), rows(b.gate_LDI), gate_bias
        )

    def decoders(
        self, params: LMParams, layer: int, feature_U: np.ndarray | None = None
    ) -> np.ndarray | None:
        """Rows [U, 1, D] of ``W_down`` of some neurons; of all, the model's own."""
        if feature_U is None:
            return None
        b = params.blocks
        rows_UD = np.asarray(b.down_LID[layer])[feature_U]
        if b.post_mlp_LD is not None:
            rows_UD = rows_UD * np.asarray(b.post_mlp_LD[layer])[None]
        return rows_UD[:, None]

    def fixed(self, params: LMParams, layer: int) -> None:
        """The model's own."""
        del params, layer


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
        if not re.fullmatch(r"\d{1,9}", text) or int(text) < 1:
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
