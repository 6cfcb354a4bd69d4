"""What to change, as a user writes it, and the single places that this names.

An edit sets the activation of a feature (or of every member of a supernode) at a
position to ``factor * activation + offset``: `scale` M is (M, 0), `set` v is (0, v),
`add` d is (1, d). M multiplies the activation: 1 changes nothing, 0 ablates, -1
inhibits (Circuit Tracing 2025, section 3.5).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import numpy as np

from jaxclt.errors import InputError, check_finite
from jaxclt.patching.change import Change
from jaxclt.types import Supernode

__all__ = ["Edit", "acting", "expand_edits"]

Place = tuple[int, int, int]  # layer, position, feature


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


def expand_edits(
    edits: Sequence[Edit], *, n_tokens: int, n_later: int = 0
) -> list[list[Place]]:
    """The places (layer, position, feature) that each edit names.

    Args:
      edits: as the user gave them.
      n_tokens: of the prompt.
      n_later: tokens to come, which slices without an end cover too.

    Raises:
      InputError: for a position outside the prompt, an empty slice, nothing to change,
        or a feature that two edits change at one position.
    """
    groups = [_places(edit, n_tokens, n_later) for edit in edits]
    seen: set[Place] = set()
    for place in (place for group in groups for place in group):
        if place in seen:
            layer, pos, feature = place
            raise InputError(
                f"feature {feature} of layer {layer} at position {pos} is edited "
                "twice: give one edit for it"
            )
        seen.add(place)
    if not seen:
        raise InputError("no edit: give at least one feature to change")
    return groups


def acting(
    edits: Sequence[Edit], edit_E: np.ndarray, change: Change, n_tokens: int
) -> Change:
    """The changes that edits make, of slices only those that do something.

    Scaling does nothing to a silent feature. Members of a supernode are named one by
    one and stay.

    Args:
      edits: as the user gave them.
      edit_E: which edit makes each change.
      change: all of them.
      n_tokens: of the prompt; what is still to come may fire.

    Raises:
      InputError: for an edit that does nothing anywhere.
    """
    f = change.features
    does_E = (f.pos_E >= n_tokens) | (f.value_E != 0)
    does_E |= (change.offset_E != 0) | (change.factor_E == 1)
    for i, edit in enumerate(edits):
        if not does_E[edit_E == i].any():
            raise InputError(_silent(edit, change.where(edit_E == i)))
    sliced_E = np.array([isinstance(edit.pos, slice) for edit in edits])[edit_E]
    return change.where(does_E | ~sliced_E)


def _silent(edit: Edit, change: Change) -> str:
    (layer, pos, feature), last = change.node_E3[0], change.node_E3[-1, 1]
    at = f"position {pos}" if pos == last else f"positions {pos} to {last}"
    who = f"feature {feature} of layer {layer} is not active at {at}"
    if edit.supernode is not None:
        who = f"no feature of supernode {edit.supernode.name!r} is active"
    what = "scaling does nothing" if edit.affine[0] else "there is nothing to ablate"
    return f"{who}, so {what}: choose an active one, or set a value"


def _places(edit: Edit, n_tokens: int, n_later: int) -> list[Place]:
    if edit.supernode is not None:
        group = edit.supernode
        if not group.features:
            raise InputError(
                f"supernode {group.name!r} has no features: there is nothing to patch"
            )
        return [(l, _position(p, n_tokens), f) for l, p, f in group.features]
    assert edit.layer is not None
    assert edit.feature is not None
    assert edit.pos is not None
    if not isinstance(edit.pos, slice):
        return [(edit.layer, _position(edit.pos, n_tokens), edit.feature)]
    positions = list(range(n_tokens))[edit.pos]
    if edit.pos.stop is None and edit.pos.step is None:
        positions += range(n_tokens, n_tokens + n_later)
    if not positions:
        raise InputError(
            f"positions {edit.pos.start}..{edit.pos.stop} are empty: the prompt "
            f"has {n_tokens} tokens, 0 to {n_tokens - 1}"
        )
    return [(edit.layer, p, edit.feature) for p in positions]


def _position(pos: int, n_tokens: int) -> int:
    if not -n_tokens <= pos < n_tokens:
        raise InputError(
            f"position {pos} is not in the prompt: it has {n_tokens} tokens, 0 to "
            f"{n_tokens - 1}"
        )
    return pos % n_tokens
