"""Features at positions of a recording, with all that a patch must know of them.

The same struct serves the features that are edited and those whose activations are
watched, of any kind of dictionary: each brings its own encoder, of one feature.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct
from jax import Array

from jaxclt.clt.active import encode_at
from jaxclt.clt.coder import Coder, Dictionary, in_dtype
from jaxclt.clt.config import Shape
from jaxclt.clt.sites import read_site
from jaxclt.errors import InputError
from jaxclt.lm.layers import mlp_norm
from jaxclt.patching.patchable import Patchable
from jaxclt.types import Block

__all__ = ["Features", "activation", "gather_features"]


@struct.dataclass
class Features:
    """E features, each at one position; host arrays until a program takes them.

    A feature that competes with others keeps the gate it has on the recording, because
    it depends on all of them; the scale of a norm after the MLP is the recorded one.
    """

    layer_E: Array  # int32; -1 stands for no feature
    pos_E: Array  # int32
    feature_E: Array  # int32
    value_E: Array  # activation on the recording, 0 after its end
    enc: Any  # encoders, leaves with a leading E and an axis of 1
    decoder_EMD: Array  # what it writes to its own layer and the following ones
    on_E: Array | None = None  # bool, where features compete; None: as they are found
    post_E: Array | None = None
    slot_E: Array | None = None  # int32, places in the local replacement model's tables

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
    each = 0 if p.up_LDI.ndim == 3 else None

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
    model: Patchable,
    node_E3: np.ndarray | Sequence[tuple[int, int, int]],
) -> Features:
    """Read the rows of some features and their activations on the recording.

    In the recording's dtype. Features need not be active, and may wait for tokens that
    come after the recording.

    Args:
      dictionary: whose features.
      model: the recording.
      node_E3: int (layer, position, feature) rows.

    Raises:
      InputError: for a layer or feature that the dictionary does not have.
    """
    params, recording, coder = model.params, model.recording, model.coder
    node_E3 = np.asarray(node_E3).reshape(-1, 3)
    _check_known(node_E3, coder.shape)
    dtype, T = recording.mid_LTD.dtype, len(recording.token_T)
    layer_E, pos_E, feature_E = node_E3.astype(np.int32).T
    at_E = np.minimum(pos_E, T - 1)
    E, M, D = len(layer_E), coder.shape.span, model.cfg.d_model
    decoder_EMD = np.zeros((E, M, D), dtype)
    value_E, on_E = np.zeros(E, dtype), np.zeros(E, bool)
    order, encs = [], []
    for layer in np.unique(layer_E).tolist() or [0]:  # no rows have a shape too
        here = np.flatnonzero(layer_E == layer)
        unique, row = np.unique(feature_E[here], return_inverse=True)
        # Those that compete are only found among all.
        chosen = None if coder.competes else unique
        enc = in_dtype(dictionary.encoders(params, layer, chosen), dtype)
        found = encode_at(params, recording, layer, at_E[here], enc, coder=coder)
        of = np.arange(len(here)), feature_E[here] if coder.competes else row
        value_E[here], on_E[here] = found.a_TF[of], found.on_TF[of]
        order.append(here)
        encs.append(jax.tree.map(lambda x, of=of: x[of[1]][:, None], enc))
        rows_UMD = dictionary.decoders(params, layer, unique)
        decoder_EMD[here, : rows_UMD.shape[1]] = rows_UMD[row]
    value_E[pos_E >= T] = 0
    back = np.argsort(np.concatenate(order))
    post_LT = recording.frozen.post_mlp_scale_LT
    held: dict[str, Any] = {}
    if coder.competes:
        held["on_E"] = on_E
    if post_LT is not None and coder.gated:
        held["post_E"] = np.asarray(post_LT)[layer_E, at_E]
    rows: dict[str, Any] = {
        "layer_E": layer_E,
        "pos_E": pos_E,
        "feature_E": feature_E,
        "value_E": value_E,
        "enc": jax.tree.map(lambda *x: np.concatenate(x)[back], *encs),
        "decoder_EMD": decoder_EMD,
    }
    return Features(**rows, **held)


def _check_known(node_E3: np.ndarray, shape: Shape) -> None:
    for layer, _, feature in node_E3.tolist():
        if not 0 <= layer < shape.n_layers:
            raise InputError(
                f"layer {layer} is unknown: the dictionary has layers 0 to "
                f"{shape.n_layers - 1}"
            )
        if not 0 <= feature < shape.n_features:
            raise InputError(
                f"feature {feature} is unknown: layer {layer} of the dictionary has "
                f"features 0 to {shape.n_features - 1}"
            )
