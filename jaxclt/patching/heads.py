"""A change that only queries or keys of chosen heads see (maths 15.19).

What a feature contributes to the stream that enters a head's layer, through frozen
attention and whatever else is linear there, goes through the head's query (or key) map
with every norm denominator held. Times (factor - 1) it is added to the head's queries
(or keys), so that each score changes by (factor - 1) times the feature's part of it.
From the softmax on the real model answers.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any, Literal, NamedTuple, get_args

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct
from jax import Array

from jaxclt.attending.clean import Layer
from jaxclt.errors import InputError, check_choice
from jaxclt.lm.config import LMConfig
from jaxclt.lm.run import Policy, Run, run
from jaxclt.patching.change import Change
from jaxclt.patching.how import How
from jaxclt.patching.modes import pending, underlying
from jaxclt.patching.patchable import Patchable, hold_of, read
from jaxclt.precision import precise
from jaxclt.types import Added, Block

__all__ = ["Head", "Heads", "Side", "choose_heads", "in_heads"]

Side = Literal["query", "key", "both"]


class Head(NamedTuple):
    """A head, and what of it sees a change."""

    layer: int
    head: int
    side: Side = "both"

    def __str__(self) -> str:
        """As it is typed: L9H3:key."""
        return f"L{self.layer}H{self.head}:{self.side}"


@struct.dataclass
class Heads:
    """Which queries and which keys see a change, bool [L, H]."""

    query_LH: Array
    key_LH: Array

    @property
    def first(self) -> Array:
        """The lowest layer with one of them."""
        return jnp.argmax((self.query_LH | self.key_LH).any(1)).astype(jnp.int32)


def choose_heads(chosen: Sequence[Head], cfg: LMConfig) -> Heads:
    """The heads that a user names.

    Raises:
      InputError: for none, or one that the model does not have.
    """
    if not chosen:
        raise InputError("no head: name at least one as (layer, head)")
    query_LH, key_LH = np.zeros((2, cfg.n_layers, cfg.n_heads), bool)
    for head in chosen:
        check_choice("side", head.side, get_args(Side))
        if not (0 <= head.layer < cfg.n_layers and 0 <= head.head < cfg.n_heads):
            raise InputError(
                f"head L{head.layer}H{head.head} is unknown: the model has layers 0 to "
                f"{cfg.n_layers - 1} and heads 0 to {cfg.n_heads - 1}"
            )
        at = head.layer, head.head
        query_LH[at] |= head.side != "key"
        key_LH[at] |= head.side != "query"
    return Heads(jnp.asarray(query_LH), jnp.asarray(key_LH))


@precise
def in_heads(
    model: Patchable,
    change: Change,
    heads: Heads,
    *,
    how: How,
    keep_patterns: bool = False,
) -> Run:
    """The real model, in which only some heads' queries or keys see a change.

    Frozen patterns are those of the clean prompt, but of the chosen heads with their
    scores changed; live ones are the model's, with the same added to queries and keys.

    Args:
      model: the recording.
      change: what to change, [E].
      heads: which see it.
      how: which patterns and norms are held.
      keep_patterns: the run then has them.
    """
    rec, hold = model.recording, hold_of(model.recording, how)
    if how.patterns == "frozen":  # computed again, where something is to be added
        hold = dataclasses.replace(hold, pattern_LHTS=None, clean_LTD=rec.resid_LTD)
    hold = dataclasses.replace(hold, added=_added(model, change, heads))
    return underlying(model, heads.first, hold, keep_patterns=keep_patterns)


def _added(model: Patchable, change: Change, heads: Heads) -> Added:
    """What a change adds to the chosen queries and keys, everything frozen.

    Queries and keys are then affine in what MLPs write, and so is the stream, past
    frozen attention and the dictionary's linear path: the derivative is exact.
    """
    rec, cfg = model.recording, model.cfg
    amount_E = change.amounts(change.features.value_E)
    index_L = jnp.arange(cfg.n_layers, dtype=jnp.int32)
    written_LTD = jax.vmap(
        lambda index: pending(change, amount_E, index, rec.embed_TD)
    )(index_L)

    def given(
        carry: None, mid_TD: Array, scale_T: Array, p: Block, x: Any
    ) -> tuple[None, Array]:
        write_TD, skip_DD = x
        if skip_DD is not None:
            write_TD = write_TD + read(model, mid_TD, scale_T, p) @ skip_DD
        return carry, write_TD

    def one(x: Any) -> tuple[Array, Array]:
        p, resid_TD, clean_TD, scale_T = x
        query_THC, key_TGC = Layer(p, clean_TD, scale_T, None, cfg).heads(resid_TD)
        return query_THC, jnp.repeat(key_TGC, cfg.n_queries_per_kv, axis=1)

    def sides(write_LTD: Array) -> tuple[Array, Array]:
        done = run(
            model.params,
            rec.embed_TD,
            Policy(given, None, (write_LTD, model.skip_LDD)),
            cfg=cfg,
            frozen=rec.frozen,
            keep_patterns=False,
        )
        clean = rec.resid_LTD, rec.frozen.attn_scale_LT
        return jax.lax.map(one, (model.params.blocks, done.taps.resid_TD, *clean))

    _, added = jax.jvp(sides, (rec.write_LTD,), (written_LTD,))
    return Added(
        *(
            jnp.where(on_LH[:, None, :, None], x_LTHC, jnp.zeros_like(x_LTHC))
            for on_LH, x_LTHC in zip((heads.query_LH, heads.key_LH), added, strict=True)
        )
    )
