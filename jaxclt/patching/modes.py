"""The three ways to patch, as pure functions of a recording (Circuit Tracing 2025).

All three run the one model of `jaxclt.lm.run` with other writes at the MLPs' places:

- `constrained` (sections 3.5 and H): inside a layer range MLP outputs are clamped to
  ``recorded + sum of amount * decoder``, computed once at the outset; attention
  responds; behind the range the real MLPs run. What the edits would write behind the
  range is dropped.
- `iterative` (section K): inside the range features are encoded again, layer by layer,
  the edited ones held at their edited values; ``recorded + sum of (a' - a) * decoder``
  is written. With errors constant this is the local replacement model.
- `additive`: the real MLPs run everywhere and ``amount * decoder`` is added to what
  they write, with the amount taken from the current activation. This is what
  circuit-tracer calls iterative. For a cross-layer transcoder it counts effects twice:
  the real MLPs of later layers respond to the first write and already produce part of
  what the later writes add (section H). For a per-layer transcoder it is plain
  steering.

Features with a gate of their own (neurons: ``act(gate) * up``) are patched as a whole:
``activation * W_down`` is changed. Constrained and additive patches need no more, and
an additive ablation removes a neuron from the running model. In the local replacement
model (`iterative`) a feature keeps its recorded gate with `gates="frozen"`, which is
what graphs say of it, and computes it anew with "live". Which neurons count is a choice
that stays as it was: the others are part of the constant errors. Where the model
normalises what its MLPs write, a neuron's activation is times the recorded scale of
that norm, and its row has that norm's gain.

Attention patterns are those of the clean pass unless asked otherwise, norm denominators
are live unless asked otherwise (`hold_of`).
"""

from __future__ import annotations

import dataclasses
from typing import Any, Literal

import jax
import jax.numpy as jnp
from flax import struct
from jax import Array

from jaxclt.clt.coder import Coder, Encoded
from jaxclt.clt.sites import read_site
from jaxclt.lm import layers
from jaxclt.lm.config import LMConfig
from jaxclt.lm.run import Policy, Run, run
from jaxclt.patching.edits import Edits, amounts
from jaxclt.patching.features import activation
from jaxclt.types import Block, Held, LMParams, Recording

__all__ = [
    "Gates",
    "Mode",
    "Nudge",
    "Patchable",
    "Tables",
    "additive",
    "clean_tables",
    "constrained",
    "encode",
    "first_edited",
    "hold_of",
    "iterative",
    "pending",
    "read",
    "underlying",
]

Mode = Literal["constrained", "iterative", "additive"]
Gates = Literal["live", "frozen"]


@struct.dataclass
class Tables:
    """What the local replacement model re-encodes, and what is clean of it; leading L.

    All features of each layer, or U of them (those that are on somewhere on the prompt,
    and some more, so that every layer has as many).
    """

    enc: Any  # encoders; None: the model's own
    dec: Any  # decoder rows [U, M, D], padded to one M; None: the model's own
    clean_LTU: Array | None = None  # activations on the recording
    on_LTU: Array | None = None
    gate_LTU: Array | None = None  # of features that have one


@struct.dataclass
class Patchable:
    """A recording with what patches of it need."""

    params: LMParams
    recording: Recording
    skip_LDD: Array | None  # linear path of the dictionary
    cfg: LMConfig = struct.field(pytree_node=False)
    coder: Coder = struct.field(pytree_node=False)


@struct.dataclass
class Nudge:
    """A vector added to the stream where the MLP of one layer reads.

    That is after its attention, or, where both stand side by side, ahead of the layer.
    """

    layer: Array  # int32 scalar
    delta_TD: Array


def hold_of(recording: Recording, *, pattern: bool = True, norm: bool = False) -> Held:
    """What a patch holds at its clean values."""
    f = recording.frozen
    return Held(
        pattern_LHTS=f.pattern_LHTS if pattern else None,
        clean_LTD=f.clean_LTD if pattern else None,
        attn_scale_LT=f.attn_scale_LT if norm else None,
        mlp_scale_LT=f.mlp_scale_LT if norm else None,
        out_scale_T=f.out_scale_T if norm else None,
        post_attn_scale_LT=f.post_attn_scale_LT if norm else None,
        post_mlp_scale_LT=f.post_mlp_scale_LT if norm else None,
    )


def constrained(
    model: Patchable,
    edits: Edits,
    first: Array,
    last: Array,
    *,
    hold: Held,
    live_L: Array | None = None,
) -> Run:
    """MLP outputs of layers first..last clamped, real MLPs behind them.

    Args:
      model: the recording.
      edits: what to change, against the recorded activations.
      first: first layer of the range.
      last: last layer of the range, included.
      hold: patterns and norms that stay clean.
      live_L: bool, layers at which some patch of a batch needs the real MLP; None finds
        out (which a `vmap` over `last` turns into computing every MLP).
    """
    rec = model.recording
    amount_E = amounts(edits, edits.features.value_E)
    index_L = jnp.arange(model.cfg.n_layers, dtype=jnp.int32)
    live_L = index_L > last if live_L is None else live_L

    def write(
        carry: None, mid_TD: Array, scale_T: Array, p: Block, x: Any
    ) -> tuple[None, Array]:
        index, live, write_TD, clean_mid_TD, clean_scale_T, skip_DD, post_T = x
        pending_TD = pending(edits, amount_E, index, mid_TD)
        clamped_TD = write_TD + pending_TD
        if skip_DD is not None:
            now = read(model, mid_TD, scale_T, p)
            was = read(model, clean_mid_TD, clean_scale_T, p)
            clamped_TD = clamped_TD + (now - was) @ skip_DD
        real_TD = _real(model, live, write_TD, mid_TD, scale_T, p, post_T)
        return carry, _by_place(index, first, last, write_TD, clamped_TD, real_TD)

    frozen = rec.frozen
    per_layer = (
        index_L, live_L, rec.write_LTD, rec.mid_LTD, frozen.mlp_scale_LT,
        model.skip_LDD, hold.post_mlp_scale_LT,
    )  # fmt: skip
    return run(
        model.params,
        rec.embed_TD,
        Policy(write, per_layer=per_layer),
        cfg=model.cfg,
        frozen=hold,
        keep_patterns=False,
    )


def additive(
    model: Patchable,
    edits: Edits,
    first: Array,
    last: Array,
    *,
    hold: Held,
    live_L: Array | None = None,
) -> Run:
    """Decoder writes added to the real MLPs' outputs in layers first..last.

    Args:
      model: the recording.
      edits: what to change, against the activations of this pass.
      first: first layer that is written to.
      last: last layer that is written to, included.
      hold: patterns and norms that stay clean.
      live_L: bool, layers whose MLP may differ from the recording for some patch of a
        batch; None: all from the first edited layer on.
    """
    rec, features = model.recording, edits.features
    index_L = jnp.arange(model.cfg.n_layers, dtype=jnp.int32)
    live_L = index_L > first_edited(features.layer_E) if live_L is None else live_L

    def write(
        carry: Array, mid_TD: Array, scale_T: Array, p: Block, x: Any
    ) -> tuple[Array, Array]:
        index, live, write_TD, post_T = x
        at_E = features.pos_E
        now_E = activation(features, p, mid_TD[at_E], scale_T[at_E], coder=model.coder)
        here_E = features.layer_E == index
        amount_E = jnp.where(here_E, amounts(edits, now_E), carry)
        inside = (first <= index) & (index <= last)
        real_TD = _real(model, live, write_TD, mid_TD, scale_T, p, post_T)
        pending_TD = pending(edits, amount_E, index, mid_TD)
        return amount_E, jnp.where(inside, real_TD + pending_TD, real_TD)

    per_layer = (index_L, live_L, rec.write_LTD, hold.post_mlp_scale_LT)
    return run(
        model.params,
        rec.embed_TD,
        Policy(write, jnp.zeros_like(features.value_E), per_layer),
        cfg=model.cfg,
        frozen=hold,
        keep_patterns=False,
    )


def iterative(
    model: Patchable,
    edits: Edits,
    slot_E: Array,
    tables: Tables,
    first: Array,
    last: Array,
    *,
    hold: Held,
    gates: Gates = "live",
    live_L: Array | None = None,
    local_L: Array | None = None,
    nudge: Nudge | None = None,
) -> Run:
    """The local replacement model in layers first..last, the real model behind them.

    Features of layers before the range keep their clean values, edited ones have their
    edited values wherever they live.

    Args:
      model: the recording.
      edits: what to change, against the recorded activations.
      slot_E: the edited features' places in `tables`.
      tables: what is re-encoded.
      first: first layer of the range.
      last: last layer of the range, included.
      hold: patterns and norms that stay clean.
      gates: "frozen" keeps on exactly what is on in the recording.
      live_L: as in `constrained`.
      local_L: bool, layers inside the range of some patch of a batch, or edited by one;
        None finds out.
      nudge: a perturbation of the stream inside the range.
    """
    rec, features = model.recording, edits.features
    L, (T, D), M = model.cfg.n_layers, rec.embed_TD.shape, features.span
    index_L = jnp.arange(L, dtype=jnp.int32)
    live_L = index_L > last if live_L is None else live_L
    if local_L is None:
        edited_L = (features.layer_E[:, None] == index_L[None, :]).any(0)
        local_L = ((index_L >= first) & (index_L <= last)) | edited_L
    amount_E = amounts(edits, features.value_E)

    def write(
        carry: Array, mid_TD: Array, scale_T: Array, p: Block, x: Any
    ) -> tuple[Array, Array]:
        index, live, local, write_TD, clean_mid_TD, clean_scale_T, *more = x
        skip_DD, table, post_T, local_T = more
        mid_TD, scale_T, push_TD = _nudged(
            model, nudge, index, mid_TD, scale_T, p, hold
        )
        inside = (first <= index) & (index <= last)
        read_TD = read(model, mid_TD, scale_T, p)

        def responded() -> Array:
            a_TU = encode(model, table, read_TD, p, local_T, gates=gates)
            change_TU = a_TU - table.clean_LTU
            change_TU = jnp.where(inside, change_TU, jnp.zeros_like(change_TU))
            # Edited features are held: what they would do by themselves is replaced.
            off_E = amount_E - change_TU[features.pos_E, slot_E]
            here_E = features.layer_E == index
            change_TU = change_TU.at[features.pos_E, slot_E].add(
                jnp.where(here_E, off_E, jnp.zeros_like(off_E))
            )
            return carry + model.coder.write(p, table.dec, change_TU)

        ahead_MTD = jax.lax.cond(local, responded, lambda: carry)
        clamped_TD = write_TD + ahead_MTD[0]
        if skip_DD is not None:
            was = read(model, clean_mid_TD, clean_scale_T, p)
            clamped_TD = clamped_TD + (read_TD - was) @ skip_DD
        real_TD = _real(model, live, write_TD, mid_TD, scale_T, p, post_T)
        out_TD = _by_place(index, first, last, write_TD, clamped_TD, real_TD)
        ahead_MTD = jnp.roll(ahead_MTD, -1, 0).at[-1].set(0)
        return ahead_MTD, out_TD + push_TD

    per_layer = (
        index_L, live_L, local_L, rec.write_LTD, rec.mid_LTD, rec.frozen.mlp_scale_LT,
        model.skip_LDD, tables, hold.post_mlp_scale_LT, rec.frozen.post_mlp_scale_LT,
    )  # fmt: skip
    return run(
        model.params,
        _entering(model, nudge),
        Policy(write, jnp.zeros((M, T, D), rec.embed_TD.dtype), per_layer),
        cfg=model.cfg,
        frozen=hold,
        keep_patterns=False,
    )


def first_edited(layer_E: Array) -> Array:
    """The lowest edited layer; padding (layer -1) does not count."""
    largest = jnp.asarray(jnp.iinfo(layer_E.dtype).max, layer_E.dtype)
    return jnp.where(layer_E < 0, largest, layer_E).min()


def underlying(model: Patchable, nudge: Nudge, *, hold: Held) -> Run:
    """The real model with its stream nudged at one layer."""
    rec = model.recording

    def write(
        carry: None, mid_TD: Array, scale_T: Array, p: Block, x: Any
    ) -> tuple[None, Array]:
        index, write_TD, post_T = x
        mid_TD, scale_T, push_TD = _nudged(
            model, nudge, index, mid_TD, scale_T, p, hold
        )
        live = index >= nudge.layer
        real_TD = _real(model, live, write_TD, mid_TD, scale_T, p, post_T)
        return carry, real_TD + push_TD

    index_L = jnp.arange(model.cfg.n_layers, dtype=jnp.int32)
    per_layer = (index_L, rec.write_LTD, hold.post_mlp_scale_LT)
    return run(
        model.params,
        _entering(model, nudge),
        Policy(write, per_layer=per_layer),
        cfg=model.cfg,
        frozen=hold,
        keep_patterns=False,
    )


def clean_tables(model: Patchable, tables: Tables) -> Tables:
    """The tables with the activations of the recording, by the code that patches use.

    The same code, so that re-encoding an unchanged stream changes nothing.
    """

    def one(x: Any) -> Encoded:
        p, table, mid_TD, scale_T, post_T = x
        read_TD = read(model, mid_TD, scale_T, p)
        return model.coder.encode(p, table.enc, read_TD, post_T)

    rec = model.recording
    scales = rec.frozen.mlp_scale_LT, rec.frozen.post_mlp_scale_LT
    found = jax.lax.map(one, (model.params.blocks, tables, rec.mid_LTD, *scales))
    return dataclasses.replace(
        tables, clean_LTU=found.a_TF, on_LTU=found.on_TF, gate_LTU=found.gate_TF
    )


def encode(
    model: Patchable,
    table: Tables,
    read_TD: Array,
    p: Block,
    post_T: Array | None,
    *,
    gates: Gates,
) -> Array:
    """Activations [T, U] of one layer of the tables."""
    assert table.on_LTU is not None
    found = model.coder.encode(p, table.enc, read_TD, post_T)
    if gates == "frozen":
        found = Encoded(found.linear_TF, table.on_LTU, table.gate_LTU)
    elif model.coder.chooses:
        found = found._replace(on_TF=table.on_LTU)
    return found.a_TF


def read(model: Patchable, mid_TD: Array, scale_T: Array, p: Block) -> Array:
    """What the dictionary reads of the stream."""
    return read_site(model.coder.site, layers.mlp_norm(p), mid_TD, scale_T)


def _real(
    model: Patchable,
    live: Array,
    write_TD: Array,
    mid_TD: Array,
    scale_T: Array,
    p: Block,
    post_T: Array | None,
) -> Array:
    """The model's own MLP, or the recorded output where the stream is clean."""

    def mlp() -> Array:
        found = layers.mlp_at(p, mid_TD, scale_T, cfg=model.cfg, post_scale_T=post_T)
        return found[0]

    return jax.lax.cond(live, mlp, lambda: write_TD)


def pending(edits: Edits, amount_E: Array, index: Array, like_TD: Array) -> Array:
    """What the edits write to layer `index`, [T, D]."""
    f = edits.features
    offset_E = index - f.layer_E
    there_E = (offset_E >= 0) & (offset_E < f.span)
    place_E = jnp.clip(offset_E, 0, f.span - 1)
    row_ED = jnp.take_along_axis(f.decoder_EMD, place_E[:, None, None], axis=1)[:, 0]
    size_E = jnp.where(there_E, amount_E, jnp.zeros_like(amount_E))
    at_ET = f.pos_E[:, None] == jnp.arange(len(like_TD), dtype=jnp.int32)[None, :]
    return at_ET.astype(like_TD.dtype).T @ (size_E[:, None] * row_ED)


def _by_place(
    index: Array,
    first: Array,
    last: Array,
    before_TD: Array,
    inside_TD: Array,
    behind_TD: Array,
) -> Array:
    """What is written before, inside and behind the range."""
    out_TD = jnp.where(index > last, behind_TD, inside_TD)
    return jnp.where(index < first, before_TD, out_TD)


def _entering(model: Patchable, nudge: Nudge | None) -> Array:
    """The embeddings, nudged if that is where the nudge goes."""
    embed_TD = model.recording.embed_TD
    if nudge is None or not model.cfg.parallel:
        return embed_TD
    return embed_TD + jnp.where(nudge.layer == 0, nudge.delta_TD, 0)


def _nudged(
    model: Patchable,
    nudge: Nudge | None,
    index: Array,
    mid_TD: Array,
    scale_T: Array,
    p: Block,
    hold: Held,
) -> tuple[Array, Array, Array]:
    """The stream after the nudge, its norm, and what the nudge adds to the output."""
    if nudge is None:
        return mid_TD, scale_T, jnp.zeros((), mid_TD.dtype)
    # Ahead of a layer is behind the one before.
    layer = nudge.layer - 1 if model.cfg.parallel else nudge.layer
    push_TD = jnp.where(index == layer, nudge.delta_TD, jnp.zeros((), mid_TD.dtype))
    if model.cfg.parallel:
        return mid_TD, scale_T, push_TD
    mid_TD = mid_TD + push_TD
    if hold.mlp_scale_LT is None:
        norm = layers.mlp_norm(p)
        scale_T = layers.norm_scale(mid_TD, norm, eps=model.cfg.norm_eps)
    return mid_TD, scale_T, push_TD
