"""The local replacement model's tables: what it encodes again, and what is clean of it.

Small dictionaries are held whole. Of larger ones only features that are active
somewhere on the prompt, and edited ones, are encoded again; others stay silent.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import numpy as np
from flax import struct
from jax import Array

from jaxclt.clt.active import Active
from jaxclt.clt.coder import Dictionary, Encoded, load
from jaxclt.patching.change import Change
from jaxclt.patching.how import Part
from jaxclt.patching.patchable import Patchable, read
from jaxclt.precision import jit
from jaxclt.types import Block

__all__ = ["Local", "Tables", "encode", "every_value", "make_local", "values_on"]

FULL_TABLE_BYTES = 2 << 30  # larger dictionaries encode again what is active somewhere


@struct.dataclass
class Tables:
    """What the local replacement model encodes again; leaves with a leading L.

    All features of each layer, or U of them (those that are on somewhere on the prompt,
    and some more, so that every layer has as many).
    """

    enc: Any  # encoders; None: the model's own
    dec: Any  # decoder rows [U, M, D], padded to one M; None: the model's own
    clean_LTU: Array | None = None  # activations on the recording
    on_LTU: Array | None = None
    gate_LTU: Array | None = None  # of features that have one


@dataclasses.dataclass(frozen=True, kw_only=True)
class Local:
    """The local replacement model's tables, and where a feature is in them."""

    tables: Tables
    feature_LU: tuple[np.ndarray, ...]  # sorted feature indices of each layer
    complete: bool  # False: features that are silent on the whole prompt stay so

    def holds(self, change: Change) -> bool:
        """Whether all changed features are in the tables."""
        return all(f in self.feature_LU[l] for l, f in _pairs(change))

    def placed(self, change: Change) -> Change:
        """A change (of any leading axes) whose features know their slots."""
        layer_E = np.asarray(change.features.layer_E)
        slot_E = np.zeros(layer_E.shape, np.int32)
        slot_E[layer_E >= 0] = [
            np.searchsorted(self.feature_LU[l], f) for l, f in _pairs(change)
        ]
        features = dataclasses.replace(change.features, slot_E=slot_E)
        return dataclasses.replace(change, features=features)


def _pairs(change: Change) -> list[tuple[int, int]]:
    """(layer, feature) of each change, in order."""
    node_X3 = change.node_E3
    return [(l, f) for l, _, f in node_X3[node_X3[..., 0] >= 0].tolist()]


def make_local(
    dictionary: Dictionary,
    model: Patchable,
    active: Active,
    *,
    also: Change | None = None,
    limit: int = FULL_TABLE_BYTES,
) -> Local:
    """Gather what the local replacement model encodes again.

    Args:
      dictionary: whose features.
      model: the recording.
      active: its active features.
      also: features that must be in the tables, silent or not.
      limit: bytes of encoder and decoder rows above which only features that are active
        somewhere on the prompt are held.
    """
    coder, params, L = model.coder, model.params, model.cfg.n_layers
    F, dtype = coder.shape.n_features, model.recording.mid_LTD.dtype
    native = not jax.tree.leaves(dictionary.encoders(params, 0))
    size = L * F * (coder.shape.span + 1) * model.cfg.d_model * dtype.itemsize
    some = None
    if not native and size > limit:
        wanted = [set(active.feature_A[active.of_layer(l)].tolist()) for l in range(L)]
        for layer, feature in [] if also is None else _pairs(also):
            wanted[layer].add(feature)
        some = _level(wanted, F)
    weights = load(dictionary, params, model.cfg, feature_LU=some).weights
    return Local(
        tables=_clean_tables(model, Tables(enc=weights.enc, dec=weights.dec)),
        feature_LU=some or (np.arange(F),) * L,
        # Of neurons only those that counted on the prompt respond.
        complete=some is None and not coder.chooses,
    )


def _level(wanted: list[set[int]], n_features: int) -> tuple[np.ndarray, ...]:
    """As many features of every layer, sorted: the wanted ones and the first others."""
    most = max(1, *map(len, wanted))
    rest = (np.setdiff1d(np.arange(n_features), list(some)) for some in wanted)
    return tuple(
        np.union1d(np.array(list(some), int), others[: most - len(some)])
        for some, others in zip(wanted, rest, strict=True)
    )


@jit
def _clean_tables(model: Patchable, tables: Tables) -> Tables:
    """The tables with the activations of the recording, by the code that patches use.

    The same code, so that encoding an unchanged stream again changes nothing.
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
    gates: Part | None,
) -> Array:
    """Activations [T, U] of one layer of the tables."""
    assert table.on_LTU is not None
    found = model.coder.encode(p, table.enc, read_TD, post_T)
    if gates == "frozen":
        found = Encoded(found.linear_TF, table.on_LTU, table.gate_LTU)
    elif model.coder.chooses:
        found = found._replace(on_TF=table.on_LTU)
    return found.a_TF


def every_value(
    model: Patchable, table: Tables, read_TD: Array, p: Block, post_T: Any = None
) -> Array:
    """Activations [T, U] of one layer of the tables, also of what was not chosen.

    A neuron that `neurons:k` does not keep has a value all the same.
    """
    found = model.coder.encode(p, table.enc, read_TD, post_T)
    return found.pre_TF if model.coder.chooses else found.a_TF


@jit
def values_on(model: Patchable, tables: Tables) -> Array:
    """Activations [L, T, U] of a table's features on another recording (`every_value`).

    Args:
      model: that recording.
      tables: of any prompt.
    """

    def one(x: Any) -> Array:
        p, table, mid_TD, scale_T = x
        return every_value(model, table, read(model, mid_TD, scale_T, p), p)

    rec = model.recording
    bare = Tables(enc=tables.enc, dec=tables.dec)
    layers = model.params.blocks, bare, rec.mid_LTD, rec.frozen.mlp_scale_LT
    return jax.lax.map(one, layers)
