"""A patch made ready: what edits change, where, and who sees it."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Sequence

from jaxclt.errors import InputError
from jaxclt.patching.change import Change
from jaxclt.patching.edits import Edit
from jaxclt.patching.effects import Ask, Effect
from jaxclt.patching.heads import Head, choose_heads
from jaxclt.patching.how import How
from jaxclt.patching.subject import Subject

__all__ = ["DOUBLE", "Patch", "plan_patch"]

DOUBLE = (
    "additive patching of a cross-layer transcoder counts effects twice: later MLPs "
    "respond to the first write and the later writes are added as well; use "
    "constrained or iterative for a causal claim"
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Patch:
    """A patch that is ready to be made, with the rows of what it changes."""

    subject: Subject
    change: Change  # also of tokens that are still to come
    layers: tuple[int, int]  # both included
    how: How
    n_later: int  # tokens to generate
    warnings: tuple[str, ...]  # what a reader of its result should know
    heads: tuple[Head, ...] = ()  # the only ones that see it, if there are any

    @functools.cached_property
    def now(self) -> Change:
        """What changes on the prompt."""
        return self.change.where(self.change.features.pos_E < self.subject.n_tokens)

    def effects(
        self, change: Change, layers: Sequence[tuple[int, int]], ask: Ask
    ) -> Effect:
        """Of a batch of changes, made as this one is; see `Subject.effects`."""
        subject = self.subject
        heads = choose_heads(self.heads, subject.model.cfg) if self.heads else None
        return subject.effects(change, layers, self.how, ask, heads=heads)


def plan_patch(
    subject: Subject,
    edits: Sequence[Edit],
    how: How | None = None,
    *,
    layers: tuple[int, int] | None = None,
    n_later: int = 0,
    heads: Sequence[Head] = (),
) -> Patch:
    """Find and gather what some edits change.

    Args:
      subject: the recorded prompt.
      edits: made together.
      how: the semantics.
      layers: first and last layer of the range, see `patch`.
      n_later: tokens that are to be generated, which edits may wait for.
      heads: the only ones whose queries or keys see the edits, see `patch_qk`.

    Raises:
      InputError: for edits, layers, heads or a number of tokens that do not fit the
        prompt, the model or the dictionary.
    """
    how, T, n_ctx = how or How(), subject.n_tokens, subject.model.cfg.n_ctx
    if T + n_later > n_ctx:
        raise InputError(
            f"cannot generate {n_later} tokens: the prompt has {T} and the model's "
            f"context holds {n_ctx}"
        )
    change = subject.change(edits, n_later=n_later)
    if heads:
        _check_heads(subject, change, heads)
        if how.mode != How.mode or layers is not None or n_later:
            raise InputError(
                "what only heads see is answered by the real model: it has no mode, no "
                "layer range, and no text is generated of it"
            )
        layers = min(head.layer for head in heads), subject.model.cfg.n_layers - 1
    return Patch(
        subject=subject,
        change=change,
        layers=subject.layer_range(layers, change.node_E3[:, 0], how.mode),
        how=how.of(subject.patchable.coder),
        n_later=n_later,
        warnings=tuple(_warnings(subject, edits, how)),
        heads=tuple(heads),
    )


def _check_heads(subject: Subject, change: Change, heads: Sequence[Head]) -> None:
    """Raise InputError unless some head can see a change."""
    choose_heads(heads, subject.model.cfg)
    last, first = max(h.layer for h in heads), int(change.node_E3[:, 0].min())
    if last <= first:
        raise InputError(
            f"no head sees the change: it is made in layer {first}, choose heads of "
            "later layers"
        )


def _warnings(subject: Subject, edits: Sequence[Edit], how: How) -> list[str]:
    said = []
    for group in (edit.supernode for edit in edits if edit.supernode is not None):
        named = subject.named(group).nodes
        if rest := [node for node in named if isinstance(node, str)]:
            said.append(
                f"supernode {group.name!r}: only features are patched, "
                f"{', '.join(rest)} stay as they are"
            )
    if how.mode == "additive" and subject.patchable.coder.shape.span > 1:
        said.append(DOUBLE)
    return said
