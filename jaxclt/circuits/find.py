"""A circuit of a traced prompt: found in its graph, proven on the model (maths 24)."""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any, get_args

import jax
import numpy as np

from jaxclt.circuits.ablation import MEASURED, Stage, places_of
from jaxclt.circuits.beside import beside, members_of, on_prompts
from jaxclt.circuits.rankings import rankings
from jaxclt.circuits.references import Ablate, references
from jaxclt.circuits.result import Circuit
from jaxclt.circuits.search import Goal, search
from jaxclt.clt.coder import Dictionary
from jaxclt.errors import (
    InputError,
    check_at_least,
    check_choice,
    check_finite,
    check_share,
    options_of,
)
from jaxclt.graph.graph import Graph
from jaxclt.io.model import Model
from jaxclt.patching.subject import Subject
from jaxclt.runs.kept import Answers, digest
from jaxclt.runs.pace import logged
from jaxclt.story.groups import grouped
from jaxclt.tasks.form import Example
from jaxclt.text.prompts import Prompt
from jaxclt.text.windows import TokenWindows
from jaxclt.trace.target_text import read_token
from jaxclt.validation.ablations import Bench, Counter
from jaxclt.validation.choice import Choice, ValidateOptions
from jaxclt.validation.shown import Measure

__all__ = ["CircuitOptions", "circuit"]

PLANNED = 600  # passes, about; what is planned of an open end


@dataclasses.dataclass(frozen=True, kw_only=True)
class CircuitOptions:
    """What is looked for.

    Raises:
      InputError: for a value out of its range.
    """

    foil: int | str | None = None  # token the answer is compared with
    ablate: Ablate | None = None  # None: counterfactual if there is one, else zero
    share: float = 0.8  # that necessity and sufficiency must reach
    size: int | None = None  # features, instead
    beam: int = 1  # sets carried on side by side
    seed: int = 0  # of random sets and intervals

    def __post_init__(self) -> None:
        if self.ablate is not None:
            check_choice("ablate", self.ablate, get_args(Ablate))
        check_share(share=self.share)
        check_at_least(1, size=self.size, beam=self.beam)
        check_finite(seed=self.seed)


def circuit(
    model: Model,
    dictionary: Dictionary,
    graph: Graph,
    *,
    counterfactual: Prompt | None = None,
    text: TokenWindows | None = None,
    paraphrases: Sequence[Example] = (),
    kept: Path | None = None,
    on_done: Callable[[int, int], None] | None = None,
    **options: Any,
) -> Circuit:
    """The smallest set of features found that is enough for the answer, and needed.

    Args:
      model: the graph was traced with.
      dictionary: the graph was traced with.
      graph: of a prompt.
      counterfactual: a prompt of as many tokens, or one that begins or ends alike, with
        another answer, which is the foil unless one is given.
      text: whose means features are set to, for ``ablate="mean"``.
      paraphrases: prompts on which the set is measured too; of as many tokens.
      kept: a .jsonl file in which measured sets are kept: the same call goes on.
      on_done: progress, (passes made, passes expected); to the log if not given.
      **options: fields of `CircuitOptions`.

    Raises:
      InputError: for prompts that do not align, a foil that is the answer, an ablation
        without its reference, or a graph of another model or without features.
    """
    asked = options_of(CircuitOptions, "circuit", options)
    ablate = asked.ablate or ("zero" if counterfactual is None else "counterfactual")
    subject = Subject.of(model, dictionary, graph)
    there = None
    if counterfactual is not None:
        there = Subject.of(model, dictionary, counterfactual)
    bench = _bench(subject, _foil(subject, there, asked.foil))
    measure = Measure(bench.ask(), bench.weight_K)
    what = references(subject, there, text, ablate)
    node_A = np.flatnonzero(graph.value_A != 0)
    feature_A3 = np.stack([graph.layer_A, graph.pos_A, graph.feature_A], 1)[node_A]
    place_A3, there_A = places_of(subject, feature_A3)
    node_A, place_A3 = node_A[there_A], place_A3[there_A]
    if not len(node_A):
        raise InputError("the graph has no active feature: trace with more features")
    answer, foil = bench.answer_and_foil
    about = {
        "prompt": np.asarray(graph.token_T).tolist(),
        "answer": answer,
        "foil": foil,
        "hashes": dict(graph.meta.hashes),
        "values": hashlib.sha256(what.value_LTU.tobytes()).hexdigest(),
        "features": digest(place_A3.tolist()),
        "ablate": ablate,
    }
    count = _Count(on_done or partial(logged(), "measuring"))
    stage = Stage(
        subject=subject,
        measure_of=measure,
        value_LTU=what.value_LTU,
        held_LTU=what.held_LTU,
        place_A3=place_A3,
        kept=Answers(kept, MEASURED),
        salt=digest(about)[:16],
        on_pass=count,
    )
    at = tuple(place_A3.T)
    other_A = None if what.then_LTU is None else what.then_LTU[at].astype(float)
    ranks = rankings(bench, stage, node_A, other_A)
    goal = Goal(share=asked.share, size=asked.size, beam=asked.beam)
    found = search(stage, ranks, goal)
    own = members_of(stage, found.set_A)
    key = jax.random.key(asked.seed)
    side = beside(stage, ranks, found.set_A, key)
    names = model.tokenizer.token_strings([answer, foil])
    rest = on_prompts(stage, found.set_A, paraphrases, ablate, text, key)
    count.end()
    nodes = node_A[found.set_A]
    return Circuit(
        graph=graph,
        answer=names[0],
        foil=names[1],
        ablate=ablate,
        leads=stage.leads,
        nodes=tuple(map(int, nodes[own.order])),
        members=own,
        measured=side,
        reached=found.reached,
        share=None if asked.size is not None else asked.share,
        candidates=len(node_A),
        groups=tuple(grouped(graph, nodes, len(nodes))),
        how=stage.how.mode,
        prompts=rest,
        passes=count.n,
    )


class _Count:
    """Passes made, reported of as many as there may be."""

    def __init__(self, on_done: Callable[[int, int], None]) -> None:
        self.on_done, self.n, self.planned = on_done, 0, PLANNED

    def __call__(self, n: int) -> None:
        self.n += n
        if self.n >= self.planned:
            self.planned = 2 * self.n
        self.on_done(self.n, self.planned)

    def end(self) -> None:
        """All are made."""
        self.on_done(self.n, self.n)


def _bench(subject: Subject, foil: int | None) -> Bench:
    none = np.zeros(0, int)
    return Bench(
        subject=subject,
        options=ValidateOptions(foil=foil),
        choice=Choice(
            node_B=none, control_B=none, watch_W=none, groups=[], left_out={}
        ),
        key=jax.random.key(0),
        counter=Counter(lambda done, planned: None, 0),
    )


def _foil(
    subject: Subject, there: Subject | None, foil: int | str | None
) -> int | None:
    """The foil that is asked for, else the counterfactual prompt's answer."""
    if isinstance(foil, str):
        return read_token(subject.model, foil)
    if foil is not None or there is None:
        return foil
    says = int(there.next_logits().argmax())
    answer = _bench(subject, None).answer_and_foil[0]
    return None if says == answer else says
