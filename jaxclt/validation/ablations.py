"""Patches of a graph's features in batches, and what all measurements of them share."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Sequence

import jax
import numpy as np

from jaxclt.graph.effects import solve_total_effect
from jaxclt.graph.graph import Graph
from jaxclt.patching.batch import chunk_size
from jaxclt.patching.change import Change, batched
from jaxclt.patching.effects import clean_effect, diverged
from jaxclt.patching.features import Features
from jaxclt.patching.how import How
from jaxclt.patching.subject import Subject
from jaxclt.validation.choice import Choice, ValidateOptions

__all__ = ["Ablated", "Bench", "Counter"]

CHUNK = 32  # patches run together


class Counter:
    """Patches done of patches planned, and how many of them diverged."""

    def __init__(self, on_done: Callable[[int, int], None], planned: int) -> None:
        self.on_done, self.planned, self.done = on_done, planned, 0
        self.diverged = 0
        on_done(0, planned)

    def within(self, done: int, total: int) -> None:
        """Progress of one batch, as `Subject.effects` reports it."""
        self.on_done(min(self.done + done, self.planned), self.planned)
        if done == total:
            self.done += total

    def add(self, n: int, n_diverged: int) -> None:
        """A batch that is done, and how many of it diverged."""
        self.within(n, n)
        self.diverged += n_diverged


@dataclasses.dataclass(frozen=True, kw_only=True)
class Ablated:
    """What B patches did; those that diverged have no answer and are ranked nowhere."""

    fine_B: np.ndarray  # bool: has an answer
    change_BK: np.ndarray  # of the targets' demeaned logits, float64
    kl_B: np.ndarray  # nats, float64
    watch_BW: np.ndarray | None  # activations of the watched features, float64


@dataclasses.dataclass(frozen=True, kw_only=True)
class Bench:
    """A traced prompt under test: what is patched, with its rows, and the clean run."""

    subject: Subject
    options: ValidateOptions
    choice: Choice
    key: jax.Array
    counter: Counter

    @property
    def graph(self) -> Graph:
        """The graph that is tested."""
        return self.subject.graph

    @property
    def span(self) -> int:
        """M, how many layers a feature writes to."""
        return self.subject.patchable.coder.shape.span

    @functools.cached_property
    def effect_KA(self) -> np.ndarray:  # noqa: N802
        """Signed total effects on the targets that are tokens."""
        return solve_total_effect(self.graph)[self.subject.targets]

    @functools.cached_property
    def clean_K(self) -> np.ndarray:  # noqa: N802
        """Demeaned logits of the targets, of the recording that is patched."""
        with jax.default_matmul_precision("highest"):
            clean = clean_effect(self.subject.patchable, self.subject.ask())
        return np.asarray(clean.logit_K, np.float64)

    @functools.cached_property
    def watch(self) -> Features:
        """The watched features."""
        return self.subject.watch(self.choice.watch_W)

    @functools.cached_property
    def single(self) -> Change:
        """The ablation of each chosen feature, [B, 1]."""
        return self.together([[a] for a in self.choice.node_B])

    def together(self, groups: Sequence[Sequence[int] | np.ndarray]) -> Change:
        """The ablation of each group of features, leaves with a leading B."""
        change = Change.of(self.subject.watch(np.concatenate(groups).astype(int)))
        return batched(change, [len(group) for group in groups])

    def patch(
        self,
        change: Change,
        how: How,
        *,
        factor: float = 0.0,
        watch: bool = False,
        everywhere: bool = False,
    ) -> Ablated:
        """Patch features by one factor.

        Args:
          change: of separate patches, leaves with a leading B.
          how: the semantics.
          factor: on all activations.
          watch: also the activations of the watched features.
          everywhere: in all layers, not in the default range.
        """
        subject = self.subject
        given = (0, subject.model.cfg.n_layers - 1) if everywhere else None
        layers = [
            subject.layer_range(given, layer_E[layer_E >= 0], how.mode)
            for layer_E in np.asarray(change.features.layer_E)
        ]
        done = subject.effects(
            Change.of(change.features, factor),
            layers,
            how,
            subject.ask(self.watch if watch else None),
            # One chunk size, so that full and small patches share a program.
            chunk=min(CHUNK, chunk_size(subject.patchable, 1)),
            on_done=self.counter.within,
        )
        lost_B, watch_BW = diverged(done), done.watch_W
        self.counter.diverged += int(lost_B.sum())
        return Ablated(
            fine_B=~lost_B,
            change_BK=np.asarray(done.logit_K, np.float64) - self.clean_K,
            kl_B=np.asarray(done.kl, np.float64),
            watch_BW=None if watch_BW is None else np.asarray(watch_BW, np.float64),
        )
