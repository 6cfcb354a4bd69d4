"""Patches of a graph's features in batches, and what all measurements of them share."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import numpy as np

from jaxclt.errors import InputError
from jaxclt.graph.contrast import contrast as graph_contrast
from jaxclt.graph.effects import solve_total_effect, total_effects
from jaxclt.graph.graph import Graph
from jaxclt.patching.batch import chunk_size
from jaxclt.patching.change import Change, batched
from jaxclt.patching.effects import Ask, Effect, clean_effect, diverged
from jaxclt.patching.features import Features
from jaxclt.patching.how import How
from jaxclt.patching.subject import Subject
from jaxclt.trace.again import TokenRows, token_rows
from jaxclt.validation.choice import Choice, ValidateOptions

__all__ = ["SURE", "Ablated", "Bench", "Counter"]

CHUNK = 32  # patches run together
SURE = 0.95  # probability of the answer above which effects are of the contrast


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
    change_BK: np.ndarray  # of demeaned logits of `Bench.token_K`, float64
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

    @functools.cached_property
    def own(self) -> np.ndarray:
        """The graph's targets that are tokens, by their places; maybe none."""
        return np.flatnonzero(self.graph.target_token_K >= 0)

    @functools.cached_property
    def answer_and_foil(self) -> tuple[int, int]:
        """Tokens whose logits' difference is the contrast.

        The answer is the graph's first target, of a graph of directions the model's
        answer. The foil is the one that was asked for; else what the graph contrasts
        the answer with, or where it has one target only, the model's runner-up.
        """
        own_K, logit_V = self._own_K, self.subject.next_logits().copy()
        answer = int(own_K[0]) if len(own_K) else int(logit_V.argmax())
        logit_V[answer] = -np.inf
        foil = self.options.foil
        against_K = own_K[graph_contrast(self.graph).weight_K[self.own] < 0]
        if foil is None:
            foil = int(against_K[0]) if len(against_K) else int(logit_V.argmax())
        if foil == answer:
            raise InputError("the foil is the answer itself: choose another token")
        return answer, foil

    @property
    def _own_K(self) -> np.ndarray:  # noqa: N802
        return self.graph.target_token_K[self.own]

    @functools.cached_property
    def token_K(self) -> np.ndarray:  # noqa: N802
        """Tokens that are measured: the graph's targets, then answer and foil."""
        more = [x for x in self.answer_and_foil if x not in self._own_K]
        return np.append(self._own_K, more).astype(np.int32)

    @functools.cached_property
    def weight_K(self) -> np.ndarray:  # noqa: N802
        """Weights of the measured tokens in the contrast, answer minus foil."""
        answer, foil = self.answer_and_foil
        return 1.0 * (self.token_K == answer) - (self.token_K == foil)

    @functools.cached_property
    def contrast(self) -> str:
        """What effects are of where they are of one number; token text, untrusted."""
        names = self.subject.model.tokenizer.token_strings(list(self.answer_and_foil))
        return " - ".join(f"logit({name})" for name in names)

    @functools.cached_property
    def on(self) -> str:
        """What effects are of: ``contrast`` where the answer is sure or there is a
        foil, else ``targets``."""
        if self.options.foil is None and self.probability <= SURE:
            return "targets"
        return "contrast"

    @property
    def probability(self) -> float:
        """Of the answer."""
        return float(self._clean.prob_K[self.weight_K.argmax()])

    def measure(self, x_BK: np.ndarray, on: str) -> np.ndarray:
        """Effects on tokens as those on the graph's targets, or on the contrast."""
        if on == "contrast":
            return x_BK @ self.weight_K[:, None]
        return x_BK[:, : self.n_targets]

    @property
    def n_targets(self) -> int:
        """How many of the measured tokens are targets; of a graph of directions all."""
        return len(self.own) or len(self.token_K)

    @property
    def graph(self) -> Graph:
        """The graph that is tested."""
        return self.subject.graph

    @property
    def span(self) -> int:
        """M, how many layers a feature writes to."""
        return self.subject.patchable.coder.shape.span

    @functools.cached_property
    def _rows(self) -> TokenRows:
        return token_rows(self.graph, self.token_K, self.subject.recorded)

    @functools.cached_property
    def effect_KA(self) -> np.ndarray:  # noqa: N802
        """Signed total effects on the measured tokens."""
        graph, n_own = self.graph, len(self.own)
        more_XA = self._rows.edge_XN[n_own:, graph.feature_cols]
        more_XA = solve_total_effect(graph, direct_XA=more_XA)
        return np.concatenate([total_effects(graph)[self.own], more_XA])

    @functools.cached_property
    def last_norm_KA(self) -> np.ndarray:  # noqa: N802
        """The same where the last norm answers too, to first order."""
        last_XA = self._rows.last_norm_XN[:, self.graph.feature_cols]
        return solve_total_effect(self.graph, direct_XA=last_XA)

    @functools.cached_property
    def derivative_KA(self) -> np.ndarray:  # noqa: N802
        """The model's own derivatives of the measured tokens."""
        return self._rows.derivative_XN[:, self.graph.feature_cols].astype(float)

    @functools.cached_property
    def _clean(self) -> Effect:
        return clean_effect(self.subject.patchable, self.ask())

    @functools.cached_property
    def clean_K(self) -> np.ndarray:  # noqa: N802
        """Demeaned logits of the measured tokens, of the recording that is patched."""
        return np.asarray(self._clean.logit_K, np.float64)

    def ask(self, watch: Features | None = None) -> Ask:
        """What to measure: `token_K` at the last position."""
        last = jnp.asarray(self.subject.n_tokens - 1, jnp.int32)
        return Ask(token_K=jnp.asarray(self.token_K), last=last, watch=watch)

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
          everywhere: in all layers from the first that is edited (before it nothing
            changes), not in the default range.
        """
        subject, last = self.subject, self.subject.model.cfg.n_layers - 1
        edited = [
            layer_E[layer_E >= 0] for layer_E in np.asarray(change.features.layer_E)
        ]
        layers = [
            (int(layer_E.min()), last)
            if everywhere
            else subject.layer_range(None, layer_E, how.mode)
            for layer_E in edited
        ]
        done = subject.effects(
            Change.of(change.features, factor),
            layers,
            how,
            self.ask(self.watch if watch else None),
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
