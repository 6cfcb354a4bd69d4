"""What to change: edits as a user writes them, and as the pytree that a patch takes.

An edit sets the activation of a feature (or of every member of a supernode) at a
position to ``factor * activation + offset``: `scale` M is (M, 0), `set` v is (0, v),
`add` d is (1, d). M multiplies the activation: 1 changes nothing, 0 ablates, -1
inhibits (Circuit Tracing 2025, section 3.5).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct
from jax import Array

from jaxclt.clt.coder import Dictionary
from jaxclt.errors import InputError, check_finite
from jaxclt.lm.config import LMConfig
from jaxclt.patching.features import Features, gather_features
from jaxclt.types import LMParams, Recording, Supernode

__all__ = [
    "Change",
    "Edit",
    "Edits",
    "acting",
    "amounts",
    "batch_edits",
    "changes_of",
    "expand_edits",
    "make_edits",
]


# Of one feature: layer, position, feature, and the factor and offset that it gets.
Change = tuple[int, int, int, float, float]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Edit:
    """One change: a feature at a position or slice, or a supernode; one operation.

    Positions count from 0, negative ones from the end of the prompt. A slice without an
    end also covers tokens that are generated later. Where a feature is silent, `scale`
    and ``set=0`` leave it so: over a slice they act where it is active. Other values
    of `set`, and `add`, act wherever they are said to.

    Raises:
      InputError: unless there is one target and one finite operation.
    """

    layer: int | None = None
    pos: int | slice | None = None
    feature: int | None = None
    supernode: Supernode | None = None
    scale: float | None = None
    set: float | None = None
    add: float | None = None

    def __post_init__(self) -> None:
        single = (self.layer, self.pos, self.feature)
        if (self.supernode is None) == any(x is None for x in single):
            raise InputError(
                "an edit needs layer, pos and feature, or a supernode, and not both"
            )
        given = {
            name: value
            for name in ("scale", "set", "add")
            if (value := getattr(self, name)) is not None
        }
        if len(given) != 1:
            raise InputError("an edit needs exactly one of scale, set and add")
        check_finite(**given)

    @property
    def affine(self) -> tuple[float, float]:
        """(factor, offset)."""
        if self.scale is not None:
            return self.scale, 0.0
        return (0.0, self.set) if self.set is not None else (1.0, self.add or 0.0)


@struct.dataclass
class Edits:
    """E single-feature changes that are made together."""

    features: Features
    factor_E: Array
    offset_E: Array


def amounts(edits: Edits, value_E: Array) -> Array:
    """By how much activations change [E], given what they are."""
    one = jnp.ones((), value_E.dtype)
    return (edits.factor_E - one) * value_E + edits.offset_E


def expand_edits(
    edits: Sequence[Edit], *, n_tokens: int, n_later: int = 0
) -> list[Change]:
    """Single changes (layer, position, feature, factor, offset).

    Args:
      edits: as the user gave them.
      n_tokens: of the prompt.
      n_later: tokens to come, which slices without an end cover too.

    Raises:
      InputError: for a position outside the prompt, an empty slice, nothing to change,
        or a feature that two edits change at one position.
    """
    groups = changes_of(edits, n_tokens=n_tokens, n_later=n_later)
    return [change for group in groups for change in group]


def changes_of(
    edits: Sequence[Edit], *, n_tokens: int, n_later: int = 0
) -> list[list[Change]]:
    """The single changes of each edit; see `expand_edits`."""
    groups = [
        [(*node, *edit.affine) for node in _nodes(edit, n_tokens, n_later)]
        for edit in edits
    ]
    seen: set[tuple[int, int, int]] = set()
    for layer, pos, feature, *_ in (change for group in groups for change in group):
        if (layer, pos, feature) in seen:
            raise InputError(
                f"feature {feature} of layer {layer} at position {pos} is edited "
                "twice: give one edit for it"
            )
        seen.add((layer, pos, feature))
    if not seen:
        raise InputError("no edit: give at least one feature to change")
    return groups


def acting(
    edits: Sequence[Edit],
    groups: Sequence[Sequence[Change]],
    value_E: np.ndarray,
    n_tokens: int,
) -> list[Change]:
    """The single changes, of slices only those that do something.

    Scaling does nothing to a silent feature. Members of a supernode are named one by
    one and stay.

    Args:
      edits: as the user gave them.
      groups: the single changes of each.
      value_E: activations on the prompt, of all of them; any for tokens to come.
      n_tokens: of the prompt.

    Raises:
      InputError: for an edit that does nothing anywhere.
    """
    kept: list[Change] = []
    value = iter(value_E)
    for edit, group in zip(edits, groups, strict=True):
        # What is still to come may fire.
        does = [
            change[1] >= n_tokens or now != 0 or change[4] != 0 or change[3] == 1
            for change, now in zip(group, value, strict=False)
        ]
        if not any(does):
            raise InputError(_silent(edit, group))
        some = isinstance(edit.pos, slice)
        kept += [c for c, acts in zip(group, does, strict=True) if acts or not some]
    return kept


def _silent(edit: Edit, group: Sequence[Change]) -> str:
    layer, pos, feature, factor, _ = group[0]
    at = f"position {pos}" if len(group) == 1 else f"positions {pos} to {group[-1][1]}"
    who = f"feature {feature} of layer {layer} is not active at {at}"
    if edit.supernode is not None:
        who = f"no feature of supernode {edit.supernode.name!r} is active"
    what = "scaling does nothing" if factor else "there is nothing to ablate"
    return f"{who}, so {what}: choose an active one, or set a value"


def _nodes(edit: Edit, n_tokens: int, n_later: int) -> list[tuple[int, int, int]]:
    if edit.supernode is not None:
        group = edit.supernode
        if not group.features:
            raise InputError(
                f"supernode {group.name!r} has no features: there is nothing to patch"
            )
        return [(l, _position(p, n_tokens), f) for l, p, f in group.features]
    assert edit.layer is not None
    assert edit.feature is not None
    if isinstance(edit.pos, slice):
        open_end = edit.pos.stop is None and edit.pos.step is None
        positions = list(range(n_tokens))[edit.pos]
        if open_end:
            positions += range(n_tokens, n_tokens + n_later)
        if not positions:
            raise InputError(
                f"positions {edit.pos.start}..{edit.pos.stop} are empty: the prompt "
                f"has {n_tokens} tokens, 0 to {n_tokens - 1}"
            )
        return [(edit.layer, p, edit.feature) for p in positions]
    assert edit.pos is not None
    return [(edit.layer, _position(edit.pos, n_tokens), edit.feature)]


def _position(pos: int, n_tokens: int) -> int:
    if not -n_tokens <= pos < n_tokens:
        raise InputError(
            f"position {pos} is not in the prompt: it has {n_tokens} tokens, 0 to "
            f"{n_tokens - 1}"
        )
    return pos % n_tokens


def make_edits(
    single: Sequence[Change],
    dictionary: Dictionary,
    params: LMParams,
    recording: Recording,
    *,
    cfg: LMConfig,
) -> Edits:
    """The pytree of some single changes.

    Args:
      single: from `expand_edits`.
      dictionary: whose features.
      params: the model.
      recording: the clean pass.
      cfg: model shape.

    Raises:
      InputError: for a layer or feature that the dictionary does not have.
    """
    shape = dictionary.coder(cfg).shape
    for layer, _, feature, _, _ in single:
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
    node_E3 = np.array([change[:3] for change in single], np.int32).reshape(-1, 3)
    T = len(recording.token_T)
    inside_E3 = node_E3.copy()
    inside_E3[:, 1] = np.minimum(node_E3[:, 1], T - 1)
    features = gather_features(dictionary, params, recording, inside_E3, cfg=cfg)
    later_E = node_E3[:, 1] >= T
    value_E = np.where(later_E, 0, np.asarray(features.value_E))
    dtype = features.value_E.dtype
    features = dataclasses.replace(
        features, pos_E=jnp.asarray(node_E3[:, 1]), value_E=jnp.asarray(value_E)
    )
    change_E2 = np.array([change[3:] for change in single], dtype).reshape(-1, 2)
    return Edits(
        features=features,
        factor_E=jnp.asarray(change_E2[:, 0]),
        offset_E=jnp.asarray(change_E2[:, 1]),
    )


def batch_edits(many: Sequence[Edits]) -> Edits:
    """Stack edits that are made separately, [B, E].

    Short and empty ones are padded with edits of layer -1, which change nothing.
    """
    E = max(1, *(len(edits.factor_E) for edits in many))

    def padded(edits: Edits) -> Edits:
        n = E - len(edits.factor_E)

        def grow(leaf: Array) -> np.ndarray:
            return np.pad(np.asarray(leaf), [(0, n)] + [(0, 0)] * (leaf.ndim - 1))

        grown = jax.tree.map(grow, edits)
        factor_E = np.array(grown.factor_E)
        factor_E[E - n :] = 1
        layer_E = np.array(grown.features.layer_E)
        layer_E[E - n :] = -1
        features = dataclasses.replace(grown.features, layer_E=layer_E)
        return dataclasses.replace(grown, features=features, factor_E=factor_E)

    return jax.tree.map(lambda *leaves: np.stack(leaves), *map(padded, many))
