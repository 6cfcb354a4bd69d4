"""An objective of one's own: the participation ratio as the count of features.

    (Σ_f w_f)² / Σ_f w_f²,   w_f = |W_dec,f| a_f,   averaged over tokens

is the number of features if all write equally, less if a few dominate, and does not
change with the scale of a token's activations. Used by

    jaxclt train --objective experiments/own_objective/participation.py:objective ...
"""

from __future__ import annotations

from jax import Array

from jaxclt.train.objectives import Standard, Terms, Values
from jaxclt.train.params import LayerParams, Spec, decoder_norm


def penalty(
    p: LayerParams, pre_TF: Array, a_TF: Array, values: Values, spec: Spec
) -> Array:
    w_TF = decoder_norm(p)[None] * a_TF
    ratio_T = w_TF.sum(-1) ** 2 / ((w_TF**2).sum(-1) + 1e-6)
    return values["sparsity"] * ratio_T.mean()


objective = Standard(Terms(sparsity="none"), extra=penalty)
