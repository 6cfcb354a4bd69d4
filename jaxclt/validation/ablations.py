"""Patches of a graph's features in batches, and what all measurements of them share."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import numpy as np

from jaxclt.graph.effects import solve_total_effect
from jaxclt.graph.graph import Graph
from jaxclt.patching.batch import chunk_size
from jaxclt.patching.change import Change, batched
from jaxclt.patching.effects import Ask, Effect, clean_effect, diverged
from jaxclt.patching.features import Features
from jaxclt.patching.how import How
from jaxclt.patching.subject import Subject
from jaxclt.trace.again import token_edges
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
    def token_K(self) -> np.ndarray:  # noqa: N802
        """Tokens that are measured: the graph's targets, then the foil, if it is none.

        The foil is the one that was asked for; else the graph's runner-up, or where it
        has one target only, the model's.
        """
        token_K, weight_K = self.subject.answers[0], self.subject.contrast_K
        foil = self.options.foil
        if foil is None and (weight_K < 0).any():
            return token_K
        if foil is None:
            logit_V = self.subject.next_logits()
            logit_V[token_K[0]] = -np.inf
            foil = int(logit_V.argmax())
        return token_K if foil in token_K else np.append(token_K, np.int32(foil))

    @functools.cached_property
    def weight_K(self) -> np.ndarray:  # noqa: N802
        """Weights of the measured tokens in the contrast, answer minus foil."""
        weight_K = np.eye(len(self.token_K))[0]
        foil = self.options.foil
        at = len(weight_K) - 1 if foil is None else list(self.token_K).index(foil)
        if foil is None and len(self.token_K) == len(self.subject.contrast_K):
            return self.subject.contrast_K
        weight_K[at] -= 1
        return weight_K

    @functools.cached_property
    def contrast(self) -> str:
        """What effects are of where they are of one number; token text, untrusted."""
        names = self.subject.model.tokenizer.token_strings(self.token_K.tolist())
        signs = {1: names[int(self.weight_K.argmax())]}
        if self.weight_K.min() < 0:
            signs[-1] = names[int(self.weight_K.argmin())]
        return " - ".join(f"logit({name})" for name in signs.values())

    @functools.cached_property
    def on(self) -> str:
        """What effects are of: ``contrast`` where the answer is sure or there is a
        foil, else ``targets``."""
        prob_K = self._clean.prob_K
        sure = self.options.foil is not None or float(prob_K[0]) > SURE
        return "contrast" if sure else "targets"

    def measure(self, x_BK: np.ndarray, on: str) -> np.ndarray:
        """Effects on tokens as those on the graph's targets, or on the contrast."""
        if on == "contrast":
            return x_BK @ self.weight_K[:, None]
        return x_BK[:, : len(self.subject.targets)]

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
        """Signed total effects on the measured tokens."""
        subject, graph = self.subject, self.graph
        effect_KA = solve_total_effect(graph)[subject.targets]
        if more_X := self.token_K[len(effect_KA) :].tolist():
            edge_XN = token_edges(
                graph,
                np.array(more_X),
                model=subject.model,
                dictionary=subject.dictionary,
            )
            more_XA = solve_total_effect(
                graph, direct_XA=edge_XN[:, graph.feature_cols]
            )
            effect_KA = np.concatenate([effect_KA, more_XA])
        return effect_KA

    @functools.cached_property
    def derivative_KA(self) -> np.ndarray | None:  # noqa: N802
        """The model's derivatives of the measured tokens, if the graph has them all."""
        graph, subject = self.graph, self.subject
        if graph.derivative_KN is None or len(self.token_K) > len(subject.targets):
            return None
        return graph.derivative_KN[subject.targets, graph.feature_cols].astype(float)

    @functools.cached_property
    def _clean(self) -> Effect:
        with jax.default_matmul_precision("highest"):
            return clean_effect(self.subject.patchable, self.ask())

    @functools.cached_property
    def clean_K(self) -> np.ndarray:  # noqa: N802
        """Demeaned logits of the measured tokens, of the recording that is patched."""
        return np.asarray(self._clean.logit_K, np.float64)

    def ask(self, watch: Features | None = None) -> Ask:
        """What to measure: `token_K` at the last position."""
        asked = self.subject.ask(watch)
        return dataclasses.replace(asked, token_K=jnp.asarray(self.token_K))

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
