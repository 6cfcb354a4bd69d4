"""Every pytree that crosses a door, with one alphabet for all axes.

| letter | axis | letter | axis |
|---|---|---|---|
| T | tokens (positions) | H | query heads |
| S | attended (source) position | G | key/value heads |
| L | layers | C | channels of a head |
| D | residual width | I | MLP neurons |
| V | vocabulary | F | features per layer |
| A | active features that are nodes of a graph | K | attribution targets |
| R | rows of a graph, A + K | N | columns of a graph, A + L·T + T |
| M | MLP outputs a feature writes (its span) | P | positions inside a band |

A suffix names the axes in order: ``edge_RN``, ``pattern_LHTS``. Rows are targets,
columns are sources, everywhere. Docstrings cite docs/maths.md as "maths 6.3".

Structs are frozen; update them with ``dataclasses.replace``.
"""

from __future__ import annotations

import dataclasses

import numpy as np
from flax import struct
from jax import Array

__all__ = ["Added", "Block", "CLTParams", "Frozen", "Held", "LMParams", "Reads"]
__all__ += ["Recording", "Sources", "Supernode", "Targets"]


@struct.dataclass
class Block:
    """Weights of all decoder blocks, stacked on a leading layer axis.

    Norm gains are the effective multipliers. Projections map ``x @ W`` with input axes
    first. Biases, and norms that not every model has, are None where there are none.

    A norm that has a bias is a LayerNorm and takes the mean off first; one without is
    an RMSNorm; one without a gain is none. An MLP without a gate is
    ``act(x W_up) W_down``, one with ``(act(x W_gate) * x W_up) W_down``.
    """

    q_LDHC: Array
    k_LDGC: Array
    v_LDGC: Array
    o_LHCD: Array
    up_LDI: Array
    down_LID: Array
    norm_attn_LD: Array | None = None
    norm_mlp_LD: Array | None = None
    gate_LDI: Array | None = None
    norm_attn_bias_LD: Array | None = None
    norm_mlp_bias_LD: Array | None = None
    q_bias_LHC: Array | None = None
    k_bias_LGC: Array | None = None
    v_bias_LGC: Array | None = None
    o_bias_LD: Array | None = None
    gate_bias_LI: Array | None = None
    up_bias_LI: Array | None = None
    down_bias_LD: Array | None = None
    q_norm_LC: Array | None = None  # gains of norms over a head's channels
    k_norm_LC: Array | None = None
    q_norm_LHC: Array | None = None  # or over the channels of all heads together
    k_norm_LGC: Array | None = None
    post_attn_LD: Array | None = None  # gains of norms before the stream is added to
    post_mlp_LD: Array | None = None
    # xIELU's curvatures above and below zero, before a softplus
    bend_up_L1: Array | None = None
    bend_down_L1: Array | None = None
    # bool: layers with `LMConfig.window` and its local rotary base; None: all alike
    local_L: Array | None = None
    turning_L: Array | None = None  # bool: layers with rotary embeddings; None: all


@struct.dataclass
class LMParams:
    """Weights of a decoder language model."""

    embed_VD: Array
    blocks: Block
    norm_out_D: Array | None
    norm_out_bias_D: Array | None = None
    position_TD: Array | None = None  # learned positions, added to the embeddings
    unembed_DV: Array | None = None  # None: tied to embed_VD
    unembed_bias_V: Array | None = None
    embed_scale: Array | None = None  # scalar: what enters layer 0 is times this
    logit_cap: Array | None = None  # scalar c: logits are c tanh(x / c)


@struct.dataclass
class Frozen:
    """What the local replacement model takes from the clean pass and holds fixed.

    Circuit Tracing (2025), section 2.3: attention patterns and norm denominators.
    Scales are reciprocal denominators, 1 / rms. Patterns of a long prompt are not kept:
    they are computed again from the clean stream that entered the layer.

    Where a model normalises what attention and MLPs write before it is added to the
    stream, those denominators are here as well. Everything that is called a write in
    this library is what the stream gets, after such a norm.
    """

    pattern_LHTS: Array | None
    attn_scale_LT: Array
    mlp_scale_LT: Array
    out_scale_T: Array
    clean_LTD: Array | None = None  # instead of patterns
    post_attn_scale_LT: Array | None = None  # None: the model has no such norm
    post_mlp_scale_LT: Array | None = None


@struct.dataclass
class Added:
    """What heads' queries and keys get on top, where scores are made of them."""

    query_LTHC: Array
    key_LTHC: Array  # of query heads: those that share a key may differ


@struct.dataclass
class Held:
    """Parts of a `Frozen`; None is computed live. What is added goes on top.

    A patch of the underlying model holds the attention patterns but, unless asked, not
    the norms (maths 15.5).
    """

    pattern_LHTS: Array | None = None
    attn_scale_LT: Array | None = None
    mlp_scale_LT: Array | None = None
    out_scale_T: Array | None = None
    clean_LTD: Array | None = None  # instead of patterns, see `Frozen`
    post_attn_scale_LT: Array | None = None
    post_mlp_scale_LT: Array | None = None
    added: Added | None = None  # of patterns that are computed, live or again


@struct.dataclass
class Recording:
    """One clean forward pass of the underlying model on one prompt."""

    token_T: Array  # int32
    embed_TD: Array  # of tokens, and of positions where these are learned
    resid_LTD: Array  # residual stream entering each layer
    # Residual stream where the MLP reads: after attention, or, in a model whose
    # attention and MLP read the same, what enters the layer.
    mid_LTD: Array
    write_LTD: Array  # what the true MLPs add to the stream
    end_TD: Array  # leaving the last layer
    out_TD: Array  # after the final norm; unembed() turns it into logits
    frozen: Frozen


@struct.dataclass
class Sources:
    """What the frozen stream is linear in: embeddings and writes at MLP outputs."""

    embed_TD: Array
    write_LTD: Array


@struct.dataclass
class Reads:
    """What targets read: the residual stream where encoders look, and the output."""

    mid_LTD: Array
    out_TD: Array


@struct.dataclass
class CLTParams:
    """Weights of a cross-layer transcoder, source-major; a PLT is span 1.

    ``W_dec[l][f, j]`` is what feature f of layer l writes to the MLP output of layer
    l + j; its shape is [F, min(span, L - l), D].
    """

    W_enc_LFD: Array
    b_enc_LF: Array
    W_dec: tuple[Array, ...]
    b_dec_LD: Array
    theta_LF: Array | None = None  # JumpReLU thresholds
    W_skip_LDD: Array | None = None  # linear path from read to write: read @ W_skip


@struct.dataclass
class Targets:
    """What a graph explains: K linear functionals of the recorded run, with weights.

    With x and y taken at position ``pos``, target k is ``vec · x + write · y + const``:

    | layer | x | y |
    |---|---|---|
    | L | the output after the final norm, `Recording.out_TD` | nothing |
    | l < L | the stream where the MLP reads, `Recording.mid_LTD` | its output |

    Circuit Tracing (2025), section 3.1 and appendix F, has logits; the rest is in
    `jaxclt.graph.targets`, which makes them.
    """

    token_K: Array | np.ndarray  # int32, -1 for what is not a logit of a token
    weight_K: Array | np.ndarray  # what influence starts with: >= 0
    layer_K: Array | np.ndarray  # int32
    pos_K: Array | np.ndarray  # int32, negative counts from the end of the prompt
    vec_KD: Array | np.ndarray  # a logit's demeaned unembedding column
    write_KD: Array | np.ndarray
    const_K: Array | np.ndarray
    # How they answer to a change (maths 22.2): the norm before what they read, whose
    # denominator is folded in (0 none, or the final one; 1 before the MLP; 2 before
    # the next attention), and what a live gate of a feature adds to `vec`.
    norm_K: Array | np.ndarray  # int32
    gate_KD: Array | np.ndarray
    labels: tuple[str, ...] = struct.field(pytree_node=False)  # "": the token's text


@dataclasses.dataclass(frozen=True)
class Supernode:
    """A named group of nodes: one node of a smaller graph, changed together in a patch.

    Circuit Tracing (2025), sections 3.4 and 3.5. Members are features as (layer,
    position, feature), a negative position counting from the end of the prompt, or any
    nodes by their names (``"error 12:5"``, ``"embed 2"``, ``"target 0"``, see
    `jaxclt.graph.nodes`). A patch changes the former and leaves out what is named.
    """

    name: str
    nodes: tuple[tuple[int, int, int] | str, ...]

    @property
    def features(self) -> tuple[tuple[int, int, int], ...]:
        """The members that have an activation."""
        return tuple(node for node in self.nodes if not isinstance(node, str))
