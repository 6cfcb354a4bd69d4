"""Features at positions of a recording, with all that a patch must know of them.

The same struct serves the features that are edited and those whose activations are
watched, of any kind of dictionary: each brings its own encoder, of one feature.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct
from jax import Array

from jaxclt.clt.active import encode_at
from jaxclt.clt.coder import Coder, Dictionary, in_dtype
from jaxclt.clt.sites import read_site
from jaxclt.lm.config import LMConfig
from jaxclt.lm.layers import mlp_norm
from jaxclt.types import Block, LMParams, Recording

__all__ = ["Features", "activation", "gather_features"]


@struct.dataclass
class Features:
    """E features, each at one position.

    A feature that competes with others keeps the gate it has on the recording, because
    it depends on all of them; the scale of a norm after the MLP is the recorded one.
    """

    layer_E: Array  # int32
    pos_E: Array  # int32
    value_E: Array  # activation on the recording
    enc: Any  # encoders, leaves with a leading E and an axis of 1
    decoder_EMD: Array  # what it writes to its own layer and the following ones
    on_E: Array | None = None  # bool, where features compete; None: as they are found
    post_E: Array | None = None

    @property
    def span(self) -> int:
        """M."""
        return self.decoder_EMD.shape[-2]


def activation(
    features: Features, p: Block, mid_ED: Array, scale_E: Array, *, coder: Coder
) -> Array:
    """Activations [E] of features that see these rows of the stream.

    Args:
      features: which.
      p: the model's blocks of their layer; or, with a leading E, of each one's.
      mid_ED: the residual stream where the MLP reads.
      scale_E: reciprocal denominators of the norm before the MLP.
      coder: of the dictionary.
    """
    norm = mlp_norm(p)
    each = 0 if norm.gain.ndim == 2 else None

    def one(
        p: Block, enc: Any, mid_D: Array, scale: Array, post: Any, on: Any
    ) -> Array:
        read_1D = read_site(coder.site, mlp_norm(p), mid_D[None], scale[None])
        if on is not None:  # held: alone it has nothing to compete with
            row_1D, bias_1 = coder.rows(enc)
            linear_1 = (row_1D * read_1D).sum(1) + bias_1
            return jnp.where(on, linear_1, jnp.zeros_like(linear_1))[0]
        post_1 = None if post is None else post[None]
        return coder.encode(p, enc, read_1D, post_1).a_TF[0, 0]

    held = (features.post_E, features.on_E)
    axes = (each, 0, 0, 0, *(None if x is None else 0 for x in held))
    return jax.vmap(one, in_axes=axes)(p, features.enc, mid_ED, scale_E, *held)


def gather_features(
    dictionary: Dictionary,
    params: LMParams,
    recording: Recording,
    node_E3: np.ndarray,
    *,
    cfg: LMConfig,
) -> Features:
    """Read the rows of some features and their activations on the recording.

    In the recording's dtype. Features need not be active.

    Args:
      dictionary: whose features.
      params: the model.
      recording: the clean pass.
      node_E3: int (layer, position, feature) rows, all within range.
      cfg: model shape.
    """
    coder, dtype = dictionary.coder(cfg), recording.mid_LTD.dtype
    layer_E, pos_E, feature_E = np.asarray(node_E3, np.int32).reshape(-1, 3).T
    E, M, D = len(layer_E), coder.shape.span, cfg.d_model
    decoder_EMD = np.zeros((E, M, D), dtype)
    value_E, on_E = np.zeros(E, dtype), np.zeros(E, bool)
    order, encs = [], []
    for layer in np.unique(layer_E).tolist() or [0]:  # no rows have a shape too
        here = np.flatnonzero(layer_E == layer)
        unique, row = np.unique(feature_E[here], return_inverse=True)
        # Those that compete are only found among all.
        chosen = None if coder.competes else unique
        enc = in_dtype(dictionary.encoders(params, layer, chosen), dtype)
        found = encode_at(params, recording, layer, pos_E[here], enc, coder=coder)
        of = np.arange(len(here)), feature_E[here] if coder.competes else row
        value_E[here], on_E[here] = found.a_TF[of], found.on_TF[of]
        order.append(here)
        encs.append(jax.tree.map(lambda x, of=of: x[of[1]][:, None], enc))
        rows_UMD = dictionary.decoders(params, layer, unique)
        decoder_EMD[here, : rows_UMD.shape[1]] = rows_UMD[row]
    back = np.argsort(np.concatenate(order or [np.zeros(0, int)]))
    made = {
        "layer_E": layer_E,
        "pos_E": pos_E,
        "value_E": value_E,
        "enc": jax.tree.map(lambda *x: np.concatenate(x)[back], *encs),
        "decoder_EMD": decoder_EMD,
    }
    if coder.competes:
        made["on_E"] = on_E
    post_LT = recording.frozen.post_mlp_scale_LT
    if post_LT is not None and coder.gated:
        made["post_E"] = np.asarray(post_LT)[layer_E, pos_E]
    return Features(**jax.tree.map(jnp.asarray, made))
