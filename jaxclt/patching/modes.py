"""The three ways to patch, as pure functions of a recording (maths 15.2 to 15.5).

All run the one model of `jaxclt.lm.run`. Before a range of layers stands what was
recorded, after it the real MLPs run; inside it, MLP outputs are:

- `constrained`: ``recorded + sum of amount * decoder``, with amounts of the recording.
  What the edits would write after the range is dropped.
- `iterative`: ``recorded + sum of (a' - a) * decoder``, where features are encoded
  again, layer by layer, and the edited ones held at their edited values: the local
  replacement model.
- `additive`: what the real MLPs write, ``+ sum of amount * decoder``, with amounts of
  the current activations. circuit-tracer calls this iterative. It counts the effects of
  a cross-layer transcoder twice, as later MLPs respond to the first write already; for
  a per-layer transcoder it is plain steering.

Features with a gate of their own (neurons: ``act(gate) * up``) are patched as a whole:
``activation * W_down`` is changed, which in an additive ablation removes a neuron from
the running model. In the local replacement model a feature keeps its recorded gate with
`gates="frozen"`, which is what graphs say of it, and computes it anew with "live".
Which neurons count is a choice that stays as it was: the others are part of the
constant errors. Where the model normalises what its MLPs write, a neuron's activation
is times the recorded scale of that norm, and its row has that norm's gain.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import struct
from jax import Array

from jaxclt.lm import layers
from jaxclt.lm.run import Policy, Run, run
from jaxclt.patching.change import Change
from jaxclt.patching.features import activation
from jaxclt.patching.how import How
from jaxclt.patching.local import Tables, encode
from jaxclt.patching.patchable import Patchable, hold_of, read
from jaxclt.precision import precise
from jaxclt.types import Block, Held

__all__ = [
    "Here",
    "Needed",
    "Nudge",
    "Writing",
    "additive",
    "clamped",
    "constrained",
    "iterative",
    "needed",
    "patched",
    "pending",
    "run_writing",
    "underlying",
]


@struct.dataclass
class Nudge:
    """A vector added to the stream where the MLP of one layer reads.

    That is after its attention, or, where both stand side by side, before the layer.
    """

    layer: Array  # int32 scalar
    delta_TD: Array


class Needed(NamedTuple):
    """Layers at which some patch of a batch needs more than the recording, bool [L].

    Given from outside, because a `vmap` over patches computes both sides of whatever
    differs between them: every MLP and every feature.
    """

    real_L: Array  # the model's own MLP
    local_L: Array  # features encoded again


def needed(change: Change, layers_2: Array, *, how: How, n_layers: int) -> Needed:
    """What one patch needs, or all of a batch (leaves with a leading B)."""
    index_L = jnp.arange(n_layers, dtype=jnp.int32)
    layer_E = change.features.layer_E.reshape(-1)
    index_1L, layers_B2 = index_L[None], layers_2.reshape(-1, 2)
    first_B1, last_B1 = layers_B2[:, :1], layers_B2[:, 1:]
    inside_L = ((index_1L >= first_B1) & (index_1L <= last_B1)).any(0)
    edited_L = (layer_E[:, None] == index_1L).any(0)
    if how.mode == "additive":  # the stream changes from the first edited layer on
        none = jnp.asarray(n_layers, layer_E.dtype)
        real_L = index_L > jnp.where(layer_E < 0, none, layer_E).min()
    else:
        real_L = (index_1L > last_B1).any(0)
    return Needed(real_L, inside_L | edited_L)


@struct.dataclass
class CleanLayer:
    """One layer of the recording as the scan hands it on; stacked, a leading L."""

    index: Array
    real: Array  # see `Needed`
    local: Array
    write_TD: Array
    mid_TD: Array
    scale_T: Array
    post_T: Array | None  # scale of a norm after the MLP
    held_post_T: Array | None  # the same, None if it is live
    skip_DD: Array | None
    table: Tables | None


class Here(NamedTuple):
    """One layer of a patched pass: what was recorded, and how it is now."""

    was: CleanLayer
    p: Block
    mid_TD: Array
    scale_T: Array
    read_TD: Array  # what the dictionary reads
    real_TD: Array  # what the model's own MLP writes
    inside: Array  # bool: in the range of the patch


class Writing(NamedTuple):
    """What a mode writes inside the range, and what it hands from layer to layer."""

    carry: Any
    write: Callable[[Any, Here], tuple[Any, Array]]


def constrained(model: Patchable, change: Change, how: How) -> Writing:
    """Clamped to the recording and what the recorded amounts write."""
    del how
    amount_E = change.amounts(change.features.value_E)

    def write(carry: None, here: Here) -> tuple[None, Array]:
        added_TD = pending(change, amount_E, here.was.index, here.mid_TD)
        return carry, clamped(model, here, added_TD)

    return Writing(None, write)


def additive(model: Patchable, change: Change, how: How) -> Writing:
    """The real MLP's output, and what the amounts of this pass write on top."""
    del how
    f = change.features

    def write(carry: Array, here: Here) -> tuple[Array, Array]:
        at = f.pos_E
        now_E = activation(
            f, here.p, here.mid_TD[at], here.scale_T[at], coder=model.coder
        )
        is_here_E = f.layer_E == here.was.index
        amount_E = jnp.where(is_here_E, change.amounts(now_E), carry)
        added_TD = pending(change, amount_E, here.was.index, here.mid_TD)
        return amount_E, here.real_TD + added_TD

    return Writing(jnp.zeros_like(f.value_E), write)


def iterative(model: Patchable, change: Change, how: How) -> Writing:
    """The local replacement model: features respond, edited ones are held.

    Features of layers before the range keep their clean values, edited ones have their
    edited values wherever they live.
    """
    f, (T, D) = change.features, model.recording.embed_TD.shape
    amount_E, gates = change.amounts(f.value_E), how.of(model.coder).gates
    at_E = f.pos_E, f.slot_E

    def write(ahead_MTD: Array, here: Here) -> tuple[Array, Array]:
        was, table = here.was, here.was.table
        assert table is not None
        clean_TU = table.clean_LTU
        assert clean_TU is not None

        def responded() -> Array:
            a_TU = encode(model, table, here.read_TD, here.p, was.post_T, gates=gates)
            change_TU = a_TU - clean_TU
            change_TU = jnp.where(here.inside, change_TU, jnp.zeros_like(change_TU))
            # Edited features are held: what they would do by themselves is replaced.
            off_E = amount_E - change_TU[at_E]
            is_here_E = f.layer_E == was.index
            change_TU = change_TU.at[at_E].add(
                jnp.where(is_here_E, off_E, jnp.zeros_like(off_E))
            )
            return ahead_MTD + model.coder.write(here.p, table.dec, change_TU)

        now_MTD = jax.lax.cond(was.local, responded, lambda: ahead_MTD)
        # The next layer's MLP output is the first of what is still ahead.
        return jnp.roll(now_MTD, -1, 0).at[-1].set(0), clamped(model, here, now_MTD[0])

    return Writing(jnp.zeros((f.span, T, D), model.recording.embed_TD.dtype), write)


MODES = {"constrained": constrained, "iterative": iterative, "additive": additive}


@precise
def patched(
    model: Patchable,
    change: Change,
    layers_2: Array,
    *,
    how: How,
    tables: Tables | None = None,
    need: Needed | None = None,
    nudge: Nudge | None = None,
    keep_patterns: bool = False,
) -> Run:
    """One patch in any mode; a pure function to jit, vmap or differentiate.

    Args:
      model: the recording.
      change: what to change, [E].
      layers_2: first and last layer of the range, included.
      how: the semantics.
      tables: for the iterative mode, whose changes know their slots in them.
      need: of the batch that this patch is part of; None: of this patch alone.
      nudge: a perturbation of the stream inside the range.
      keep_patterns: the run then has them.
    """
    if need is None:
        need = needed(change, layers_2, how=how, n_layers=model.cfg.n_layers)
    return run_writing(
        model,
        MODES[how.mode](model, change, how),
        layers_2,
        need,
        hold=hold_of(model.recording, how),
        tables=tables,
        nudge=nudge,
        keep_patterns=keep_patterns,
    )


def underlying(
    model: Patchable,
    first: Array,
    hold: Held,
    *,
    nudge: Nudge | None = None,
    keep_patterns: bool = False,
) -> Run:
    """The real model, recorded up to a layer, with its stream nudged at one layer.

    Args:
      model: the recording.
      first: the first layer whose MLP may see something new.
      hold: what is held, and added to queries and keys.
      nudge: a perturbation of the stream.
      keep_patterns: the run then has them.
    """
    L = model.cfg.n_layers
    live_L = jnp.arange(L, dtype=jnp.int32) >= first
    return run_writing(
        model,
        Writing(None, lambda carry, here: (carry, here.real_TD)),
        jnp.asarray([0, L - 1], jnp.int32),
        Needed(live_L, live_L),
        hold=hold,
        nudge=nudge,
        keep_patterns=keep_patterns,
    )


def run_writing(
    model: Patchable,
    writing: Writing,
    layers_2: Array,
    need: Needed,
    *,
    hold: Held,
    tables: Tables | None = None,
    nudge: Nudge | None = None,
    keep_patterns: bool,
) -> Run:
    """The recording up to the range, `writing` inside it, the real model after it."""
    rec, first, last = model.recording, layers_2[0], layers_2[1]
    clean_L = CleanLayer(
        index=jnp.arange(model.cfg.n_layers, dtype=jnp.int32),
        real=need.real_L,
        local=need.local_L,
        write_TD=rec.write_LTD,
        mid_TD=rec.mid_LTD,
        scale_T=rec.frozen.mlp_scale_LT,
        post_T=rec.frozen.post_mlp_scale_LT,
        held_post_T=hold.post_mlp_scale_LT,
        skip_DD=model.skip_LDD,
        table=tables,
    )

    def write(
        carry: Any, mid_TD: Array, scale_T: Array, p: Block, x: CleanLayer
    ) -> tuple[Any, Array]:
        push_TD = None if nudge is None else _push(model, nudge, x.index)
        if push_TD is not None and not model.cfg.parallel:
            mid_TD = mid_TD + push_TD
            if hold.mlp_scale_LT is None:
                norm = layers.mlp_norm(p)
                scale_T = layers.norm_scale(mid_TD, norm, eps=model.cfg.norm_eps)

        def mlp() -> Array:
            post_T = x.held_post_T
            return layers.mlp_at(
                p, mid_TD, scale_T, cfg=model.cfg, post_scale_T=post_T
            )[0]

        real_TD = jax.lax.cond(x.real, mlp, lambda: x.write_TD)
        inside = (first <= x.index) & (x.index <= last)
        read_TD = read(model, mid_TD, scale_T, p)
        here = Here(x, p, mid_TD, scale_T, read_TD, real_TD, inside)
        carry, inside_TD = writing.write(carry, here)
        write_TD = jnp.where(x.index > last, real_TD, inside_TD)
        write_TD = jnp.where(x.index < first, x.write_TD, write_TD)
        return carry, write_TD if push_TD is None else write_TD + push_TD

    embed_TD = rec.embed_TD
    if nudge is not None and model.cfg.parallel:
        embed_TD = embed_TD + _push(model, nudge, jnp.asarray(-1, jnp.int32))
    return run(
        model.params,
        embed_TD,
        Policy(write, writing.carry, clean_L),
        cfg=model.cfg,
        frozen=hold,
        keep_patterns=keep_patterns,
    )


def pending(change: Change, amount_E: Array, index: Array, like_TD: Array) -> Array:
    """What changes of such amounts write to layer `index`, [T, D]."""
    f = change.features
    offset_E = index - f.layer_E
    there_E = (offset_E >= 0) & (offset_E < f.span)
    place_E = jnp.clip(offset_E, 0, f.span - 1)
    row_ED = jnp.take_along_axis(f.decoder_EMD, place_E[:, None, None], axis=1)[:, 0]
    size_E = jnp.where(there_E, amount_E, jnp.zeros_like(amount_E))
    at_ET = f.pos_E[:, None] == jnp.arange(len(like_TD), dtype=jnp.int32)[None, :]
    return at_ET.astype(like_TD.dtype).T @ (size_E[:, None] * row_ED)


def clamped(model: Patchable, here: Here, added_TD: Array) -> Array:
    """The recorded output, what is added to it, and what a linear path responds."""
    was, write_TD = here.was, here.was.write_TD + added_TD
    if was.skip_DD is None:
        return write_TD
    clean_TD = read(model, was.mid_TD, was.scale_T, here.p)
    return write_TD + (here.read_TD - clean_TD) @ was.skip_DD


def _push(model: Patchable, nudge: Nudge, index: Array) -> Array:
    """The nudge, where it enters with what layer `index` writes (-1: the embeddings).

    Before a layer is after the one before.
    """
    layer = nudge.layer - 1 if model.cfg.parallel else nudge.layer
    return jnp.where(
        index == layer, nudge.delta_TD, jnp.zeros((), nudge.delta_TD.dtype)
    )
