"""A traced prompt told: what each token and each group of features does, and trust."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import numpy as np

from jaxclt.clt.coder import Dictionary
from jaxclt.files.json_text import rounded
from jaxclt.graph.graph import Graph
from jaxclt.graph.scores import scores
from jaxclt.io.model import Model
from jaxclt.lm.massive import MASSIVE, massive_positions
from jaxclt.patching.subject import Subject
from jaxclt.story.groups import Group, choose_groups, measured_groups
from jaxclt.story.sentences import sentences, trust
from jaxclt.story.tokens import TokenEffect, token_shares, without_tokens
from jaxclt.text.prompts import Prompt
from jaxclt.types import Supernode
from jaxclt.validation.ablations import Bench, Counter
from jaxclt.validation.choice import Choice, ValidateOptions

__all__ = ["MOST_TOKENS", "Story", "story", "token_effects"]

MOST_TOKENS = 256  # of a prompt whose tokens are taken out one by one


@dataclasses.dataclass(frozen=True, kw_only=True)
class Story:
    """What a graph says, in words and numbers.

    Attributes:
      text: sentences, each with its number; token text in them is untrusted.
      trust: how far to believe them.
      contrast: what effects are of.
      lead: of the answer over the foil on the prompt, logits.
      tokens: what each token contributes; none of a long prompt.
      groups: of features.
      sink: ``positions``, the ``rule`` they are found by, their ``share`` of the
        influence that the graph traces to tokens.
      graph: that is told.
    """

    text: tuple[str, ...]
    trust: str
    contrast: str
    lead: float
    tokens: tuple[TokenEffect, ...]
    groups: tuple[Group, ...]
    sink: dict[str, Any]
    graph: Graph

    def __str__(self) -> str:
        """The paragraph."""
        return " ".join([*self.text, self.trust])

    __repr__ = __str__

    @property
    def supernodes(self) -> list[Supernode]:
        """The groups, as `write_trace` and patches take them."""
        return [
            Supernode(group.name, tuple(map(self.graph.feature, group.nodes)))
            for group in self.groups
        ]

    def to_json(self) -> dict[str, Any]:
        """``story``, ``tokens`` and ``sink`` of report.json and graph.json."""
        groups = [
            {
                "name": group.name,
                "members": group.ids(self.graph),
                "share": rounded(group.share),
                "predicted": rounded(group.predicted),
                "measured": rounded(group.measured),
            }
            for group in self.groups
        ]
        told = {"text": list(self.text), "trust": self.trust, "groups": groups}
        tokens = [
            dataclasses.asdict(token)
            | {name: rounded(getattr(token, name)) for name in _NUMBERS}
            for token in self.tokens
        ]
        about = {"contrast": self.contrast, "lead": rounded(self.lead)}
        return {"story": told | about, "tokens": tokens, "sink": self.sink}


_NUMBERS = ("effect", "probability", "share")


def story(
    model: Model,
    dictionary: Dictionary,
    graph: Graph,
    *,
    foil: int | None = None,
    change_A: np.ndarray | None = None,
) -> Story:
    """Tell a graph: tokens without which the model runs, groups that are ablated.

    Args:
      model: it was traced with.
      dictionary: it was traced with.
      graph: of a prompt.
      foil: token that the answer is compared with; None: the runner-up.
      change_A: what features are grouped by instead of influence (`change_from`).

    Raises:
      InputError: if the graph is not of this model and dictionary, or the foil is the
        answer.
    """
    bench = _bench(model, dictionary, graph, foil)
    recording = bench.subject.patchable.recording
    tokens, lead, probability = _tokens(bench, graph)
    massive = massive_positions(recording, graph.n_tokens)
    share_T = token_shares(graph)
    sink = {
        "positions": massive.tolist(),
        "rule": f"stream over {MASSIVE:g} times as long as at the median position",
        "share": rounded(float(share_T[massive].sum())),
    }
    groups = measured_groups(bench, choose_groups(graph, massive.tolist(), change_A))
    told = Story(
        text=(),
        trust="",
        contrast=bench.contrast,
        lead=lead,
        tokens=tuple(tokens),
        groups=tuple(groups),
        sink=sink,
        graph=graph,
    )
    names = model.tokenizer.token_strings(list(bench.answer_and_foil))
    found = scores(graph)
    facts = {"probability": probability, "names": names, "scores": found}
    return dataclasses.replace(
        told, text=sentences(told, facts), trust=trust(told, facts)
    )


def token_effects(
    model: Model,
    dictionary: Dictionary,
    prompt: Graph | Prompt,
    *,
    foil: int | None = None,
) -> list[TokenEffect]:
    """What each token of a prompt contributes to the answer's lead, measured.

    Args:
      model: from `load_model`.
      dictionary: from `load_dictionary`.
      prompt: text, token ids or a chat; or the graph of one, whose shares of influence
        stand beside the effects.
      foil: token that the answer is compared with; None: the runner-up.
    """
    if isinstance(prompt, Graph):
        return _tokens(_bench(model, dictionary, prompt, foil), prompt)[0]
    subject = Subject.of(model, dictionary, prompt)
    logit_V = subject.next_logits()
    answer, second = np.argsort(-logit_V)[:2].tolist()
    return _without(subject, (answer, second if foil is None else foil), None)[0]


def _bench(
    model: Model, dictionary: Dictionary, graph: Graph, foil: int | None
) -> Bench:
    none = np.zeros(0, int)
    return Bench(
        subject=Subject.of(model, dictionary, graph),
        options=ValidateOptions(foil=foil),
        choice=Choice(
            node_B=none, control_B=none, watch_W=none, groups=[], left_out={}
        ),
        key=jax.random.key(0),
        counter=Counter(lambda done, planned: None, 0),
    )


def _tokens(bench: Bench, graph: Graph) -> tuple[list[TokenEffect], float, float]:
    return _without(bench.subject, bench.answer_and_foil, graph)


def _without(
    subject: Subject, pair: tuple[int, int], graph: Graph | None
) -> tuple[list[TokenEffect], float, float]:
    """Effects of tokens, the lead, and the answer's probability."""
    recording, model = subject.patchable.recording, subject.model
    T = len(recording.token_T)
    if T > MOST_TOKENS:
        logit_V = subject.next_logits()
        return [], float(logit_V[pair[0]] - logit_V[pair[1]]), float("nan")
    lead_T, prob_T = without_tokens(
        model.params, recording.embed_TD, recording.token_T, pair, cfg=model.cfg
    )
    texts = model.tokenizer.token_strings(np.asarray(recording.token_T).tolist())
    share_T = [None] * T if graph is None else token_shares(graph).tolist()
    found = [
        TokenEffect(
            position=t,
            token=texts[t],
            effect=float(lead_T[t] - lead_T[T]),
            probability=float(prob_T[t]),
            share=share_T[t],
        )
        for t in range(T)
    ]
    return found, float(lead_T[T]), float(prob_T[T])
