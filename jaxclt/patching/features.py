"""Features at positions of a recording, with all that a patch must know of them.

The same struct serves the features that are edited and those whose activations are
watched. Transcoder features and neurons differ in one thing: a neuron's activation is
its gate times what it reads, so it brings a second row. (That of an MLP
without a gate gates itself: the second row is the first.)
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct
from jax import Array

from jaxclt.clt.activations import activate
from jaxclt.clt.active import Dictionary, StoreDictionary
from jaxclt.clt.config import CLTConfig
from jaxclt.clt.neurons import NeuronDictionary
from jaxclt.clt.sites import read_site
from jaxclt.errors import InputError
from jaxclt.lm import layers
from jaxclt.lm.config import LMConfig
from jaxclt.types import Block, LMParams, Recording

__all__ = ["Features", "activation", "dictionary_config", "gather_features"]


@struct.dataclass
class Features:
    """E features, each at one position.

    ``pre = encoder · read + bias`` with `read` what the dictionary reads there; the
    activation is `pre` where ``pre > theta``, or ``act(gate · read + gate_bias) * pre``
    for a neuron (times the recorded scale of a norm behind the MLP). A topk feature
    keeps the gate it has on the recording (its theta is infinite with either sign),
    because the gate depends on all other features.
    """

    layer_E: Array  # int32
    pos_E: Array  # int32
    value_E: Array  # activation on the recording
    encoder_ED: Array
    bias_E: Array
    theta_E: Array
    decoder_EMD: Array  # what it writes to its own layer and the following ones
    gate_ED: Array | None = None
    gate_bias_E: Array | None = None
    post_E: Array | None = None  # recorded scale of a norm behind the MLP
    own_gate: bool = struct.field(pytree_node=False, default=False)

    @property
    def span(self) -> int:
        """M."""
        return self.decoder_EMD.shape[-2]


def activation(features: Features, read_ED: Array, *, cfg: LMConfig) -> Array:
    """Activations [E] of features that read the rows `read_ED`."""
    pre_E = (features.encoder_ED * read_ED).sum(-1) + features.bias_E
    if features.gate_ED is None or features.gate_bias_E is None:
        fires_E = pre_E > features.theta_E
        return jnp.where(fires_E, pre_E, jnp.zeros((), pre_E.dtype))
    gate_E = (features.gate_ED * read_ED).sum(-1) + features.gate_bias_E
    a_E = layers.activate_gate(gate_E, cfg=cfg, own=features.own_gate) * pre_E
    return a_E if features.post_E is None else a_E * features.post_E


def dictionary_config(dictionary: Dictionary, cfg: LMConfig) -> CLTConfig:
    """Shape and conventions of a dictionary; neurons are a PLT that reads MLP inputs.

    Raises:
      InputError: for a kind of dictionary that cannot be patched.
    """
    if isinstance(dictionary, NeuronDictionary):
        return CLTConfig(
            n_layers=cfg.n_layers,
            d_model=cfg.d_model,
            n_features=cfg.d_mlp,
            span=1,
            activation="relu",
            read="mlp_in",
        )
    if isinstance(dictionary, StoreDictionary):
        return dictionary.cfg
    raise InputError(
        f"a {type(dictionary).__name__} cannot be patched: use a transcoder or neurons"
    )


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
    clt_cfg = dictionary_config(dictionary, cfg)
    dtype = recording.mid_LTD.dtype
    E, D, M = len(node_E3), cfg.d_model, clt_cfg.span
    layer_E, pos_E, feature_E = np.asarray(node_E3, np.int32).reshape(E, 3).T
    encoder_ED, decoder_EMD = np.zeros((E, D), dtype), np.zeros((E, M, D), dtype)
    bias_E, theta_E, value_E = (np.zeros(E, dtype) for _ in range(3))
    neurons = isinstance(dictionary, NeuronDictionary)
    own_gate = neurons and params.blocks.gate_LDI is None
    gate_ED, gate_bias_E = np.zeros((E, D), dtype), np.zeros(E, dtype)
    for layer in np.unique(layer_E):
        here = np.flatnonzero(layer_E == layer)
        unique, row = np.unique(feature_E[here], return_inverse=True)
        read_TD = read_site(
            clt_cfg.read,
            layers.mlp_norm(params.blocks).of_layer(layer),
            recording.mid_LTD[layer],
            recording.frozen.mlp_scale_LT[layer],
        )
        read_ED = np.asarray(read_TD)[pos_E[here]]
        if neurons:
            p = jax.tree.map(lambda leaf: leaf[layer], params.blocks)  # noqa: B023
            rows = _neuron_rows(p, unique)
            encoder_ED[here], gate_ED[here], decoder_EMD[here, 0] = (
                rows_UD[row] for rows_UD in rows[:3]
            )
            bias_E[here], gate_bias_E[here] = (bias_U[row] for bias_U in rows[3:])
            gate_E = (gate_ED[here] * read_ED).sum(-1) + gate_bias_E[here]
            pre_E = (encoder_ED[here] * read_ED).sum(-1) + bias_E[here]
            gate_E = layers.activate_gate(jnp.asarray(gate_E), cfg=cfg, own=own_gate)
            value_E[here] = np.asarray(gate_E) * pre_E
            theta_E[here] = -np.inf
            continue
        assert isinstance(dictionary, StoreDictionary)
        enc = dictionary.store.encoder(int(layer))
        encoder_ED[here] = np.asarray(enc.W_enc_FD[unique], dtype)[row]
        bias_E[here] = np.asarray(enc.b_enc_F[unique], dtype)[row]
        n = clt_cfg.n_writes(int(layer))
        rows = np.asarray(dictionary.store.decoder_rows(int(layer), unique), dtype)
        decoder_EMD[here, :n] = rows.reshape(len(unique), n, D)[row]
        if clt_cfg.competes:
            pre_EF = read_ED @ np.asarray(enc.W_enc_FD, dtype).T
            pre_EF = pre_EF + np.asarray(enc.b_enc_F, dtype)[None]
            a_EF = np.asarray(activate(jnp.asarray(pre_EF), None, cfg=clt_cfg))
            value_E[here] = a_EF[np.arange(len(here)), feature_E[here]]
            theta_E[here] = np.where(value_E[here] != 0, -np.inf, np.inf)
            continue
        if enc.theta_F is not None:
            theta_E[here] = np.asarray(enc.theta_F, dtype)[feature_E[here]]
        pre_E = (encoder_ED[here] * read_ED).sum(-1) + bias_E[here]
        value_E[here] = np.where(pre_E > theta_E[here], pre_E, 0)
    made = {
        "layer_E": layer_E,
        "pos_E": pos_E,
        "value_E": value_E,
        "encoder_ED": encoder_ED,
        "bias_E": bias_E,
        "theta_E": theta_E,
        "decoder_EMD": decoder_EMD,
    }
    if neurons:
        made |= {"gate_ED": gate_ED, "gate_bias_E": gate_bias_E}
        post_LT = recording.frozen.post_mlp_scale_LT
        if post_LT is not None:
            made["post_E"] = np.asarray(post_LT)[layer_E, pos_E]
            made["value_E"] = value_E * made["post_E"]
    return Features(**jax.tree.map(jnp.asarray, made), own_gate=own_gate)


def _neuron_rows(p: Block, unit_U: np.ndarray) -> tuple[np.ndarray, ...]:
    """Up, gate and written rows [U, D] of one layer's neurons, and two biases [U]."""
    gate = p.gate_LDI, p.gate_bias_LI
    gate_DI, gate_bias_I = (p.up_LDI, p.up_bias_LI) if gate[0] is None else gate
    assert gate_DI is not None
    zero_I = jnp.zeros(p.down_LID.shape[:1], p.down_LID.dtype)
    biases = (zero_I if x is None else x for x in (p.up_bias_LI, gate_bias_I))
    rows = (p.up_LDI.T, gate_DI.T, layers.neuron_rows(p), *biases)
    return tuple(np.asarray(x)[unit_U] for x in rows)
