"""What a circuit is once it is found, as numbers, JSON and a sentence."""

from __future__ import annotations

import dataclasses
from typing import Any

from jaxclt.circuits.ablation import Leads
from jaxclt.circuits.beside import Members
from jaxclt.files.json_text import rounded
from jaxclt.graph.graph import Graph
from jaxclt.graph.nodes import node_id, node_label, quoted
from jaxclt.story.groups import Group
from jaxclt.types import Supernode

__all__ = ["Circuit"]

REFERENCES = {
    "zero": "zero",
    "mean": "their means over a text",
    "counterfactual": "the counterfactual prompt's values",
}
HOW = {
    "additive": "in the model, attention, norms and MLPs live",
    "iterative": "in the local replacement model, attention, norms and gates live",
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Circuit:
    """A set of features, and how far it is enough for an answer and needed.

    Attributes:
      graph: in which it was found.
      answer: text of the token; untrusted.
      foil: likewise.
      ablate: what features outside of it (or, for necessity, in it) are set to.
      leads: m, the answer's logit minus the foil's, of all features and of none.
      nodes: slots of the members in the graph, what adds most first.
      members: what each adds.
      measured: of this set, and of others of its size (`beside`).
      reached: whether necessity and sufficiency are as good as was asked for.
      share: that was asked for; None where a size was.
      candidates: features that were searched.
      groups: of members that rest on the same tokens and do the same.
      how: semantics of the measuring passes, see `jaxclt.patching.how`.
      prompts: the set on paraphrases; None without any.
      passes: of the model that were made.
    """

    graph: Graph
    answer: str
    foil: str
    ablate: str
    leads: Leads
    nodes: tuple[int, ...]
    members: Members
    measured: dict[str, Any]
    reached: bool
    share: float | None
    candidates: int
    groups: tuple[Group, ...]
    how: str
    prompts: dict[str, Any] | None
    passes: int

    def __str__(self) -> str:
        """In a sentence or two."""
        own, m = self.measured["circuit"], self.leads
        n = len(self.nodes)
        lead = f"{quoted(self.answer)} over {quoted(self.foil)}"
        said = (
            f"{n} feature{'s' * (n != 1)} of {self.candidates}, kept alone, make the "
            f"lead of {lead} {own['kept']:.1f} where it is {m['all']:.1f}; dropped "
            f"alone, {own['dropped']:.1f}; without any feature tokens, errors and "
            f"attention make it {m['none']:.1f}"
        )
        if m.astray:
            return (
                f"{said}: features make next to nothing of it or work against it, do "
                "not read shares into it."
            )
        other = self.measured["top by influence"]
        said += (
            f" (sufficiency {own['sufficiency']:.0%}, necessity "
            f"{own['necessity']:.0%}; as many by influence {other['sufficiency']:.0%} "
            f"and {other['necessity']:.0%})."
        )
        if self.share is not None and not self.reached:
            said += f" No set of the graph's features reaches {self.share:.0%} in both."
        return said

    __repr__ = __str__

    @property
    def supernodes(self) -> list[Supernode]:
        """The groups, as `write_trace` and patches take them."""
        return [
            Supernode(group.name, tuple(map(self.graph.feature, group.nodes)))
            for group in self.groups
        ]

    def to_json(self) -> dict[str, Any]:
        """The content of ``circuit.json``; shares are null where they mislead."""
        graph, bad = self.graph, self.leads.astray
        members = []
        for i, node in enumerate(self.nodes):
            layer, pos, feature = graph.feature(node)
            adds = self.members
            members.append(
                {
                    "node_id": node_id(graph, node),
                    "layer": layer,
                    "pos": pos,
                    "feature": feature,
                    "token": graph.meta.tokens[pos],
                    "label": node_label(graph, node),
                    "influence": rounded(float(graph.influence_N[node])),
                    "adds": {
                        "sufficiency": None if bad else rounded(adds.sufficiency[i]),
                        "necessity": None if bad else rounded(adds.necessity[i]),
                        "measured": bool(adds.measured[i]),
                    },
                }
            )
        return {
            "prompt": graph.meta.prompt,
            "dictionary": graph.meta.dictionary,
            "model": graph.meta.model,
            "text": str(self),
            "answer": self.answer,
            "foil": self.foil,
            "ablate": self.ablate,
            "reference": REFERENCES[self.ablate],
            "measured_in": HOW[self.how],
            "leads": {name: rounded(m) for name, m in self.leads.items()},
            "shares_mislead": bad,
            "asked": {"share": self.share, "reached": self.reached},
            "candidates": self.candidates,
            "measured": self.measured,
            "members": members,
            "groups": [
                {"name": group.name, "members": group.ids(graph)}
                for group in self.groups
            ],
            "paraphrases": self.prompts,
            "passes": self.passes,
        }
