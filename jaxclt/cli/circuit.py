"""`jaxclt circuit`: the smallest set of features found that is enough, and needed."""

from __future__ import annotations

import dataclasses
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from rich.table import Table
from rich.text import Text

from jaxclt.cli.common import answer, asked
from jaxclt.cli.flags import TextSource, TracedDirectory
from jaxclt.cli.progress import Run
from jaxclt.cli.reopened import OpenFlags, check_traced
from jaxclt.errors import InputError, check_at_least, check_finite, check_share
from jaxclt.io.tokenizer import Bos

if TYPE_CHECKING:
    from jaxclt.circuits.result import Circuit

__all__ = ["CircuitFlags", "run_circuit"]

LISTED = 20  # members in the terminal


@dataclasses.dataclass(frozen=True, kw_only=True)
class CircuitFlags(OpenFlags):
    """Find the smallest set of a graph's features that is enough for the answer, and
    needed for it, measured on the model. The same command resumes an interrupted
    search.

    Writes circuit.json; the page opens with the circuit's groups. Sufficiency: the set
    kept alone, all other active features at a reference; necessity: the set alone put
    there; both as shares of what all features add to the answer's lead over the foil.
    """

    directory: TracedDirectory
    counterfactual: str | None = None
    """Prompt with another answer, of as many tokens or one that begins or ends alike:
    its features' values are the reference, its answer is the foil."""
    bos: Bos = "auto"
    """Of the counterfactual prompt: put a beginning-of-sequence token first."""
    chat: bool = False
    """The counterfactual prompt is what the user says, in the model's own chat
    template."""
    foil: str | None = None
    """Token that the answer is compared with; by default the counterfactual's answer,
    or without one the runner-up."""
    ablate: Literal["zero", "mean", "counterfactual"] | None = None
    """Reference: zero, means over --data, or the counterfactual prompt's values; by
    default the last if there is one, else zero."""
    data: TextSource | None = None
    """Text of the means."""
    tokens: int = 4096
    """Tokens of that text."""
    share: float = 0.8
    """Necessity and sufficiency that the set must reach."""
    size: int | None = None
    """Features of the set instead, as necessary and sufficient as can be found."""
    beam: int = 1
    """Sets that are carried on side by side while the set grows."""
    paraphrases: Path | None = None
    """.jsonl file of prompts of as many tokens, {"prompt", "answer", "foil"} and maybe
    "counterfactual", on which the set is measured too: means with intervals."""
    seed: int = 0
    """Seed of the random sets and of the intervals."""


def run_circuit(flags: CircuitFlags, run: Run) -> None:
    """Reopen, search, write, print."""
    check_share(share=flags.share)
    check_at_least(1, size=flags.size, beam=flags.beam, tokens=flags.tokens)
    check_finite(seed=flags.seed)
    check_traced(flags.directory)
    if flags.counterfactual is not None and not flags.counterfactual.strip():
        raise InputError("--counterfactual is empty: give a prompt")
    if flags.data == "":
        raise InputError("--data is empty: give a text")
    from jaxclt.tasks.files import read_tasks

    examples = read_tasks(flags.paraphrases) if flags.paraphrases else []
    run.own(flags.directory)
    opened = flags.reopen(flags.directory, run)
    run.look()
    from jaxclt.circuits.files import MEASURED, write_circuit
    from jaxclt.circuits.find import circuit
    from jaxclt.text.windows import read_windows

    started, text = time.perf_counter(), None
    if flags.data is not None:
        text = read_windows(opened.model, flags.data, tokens=flags.tokens)
    there = None
    if flags.counterfactual is not None:
        there = asked(flags.counterfactual, chat=flags.chat, bos=flags.bos)
    kept = flags.directory / MEASURED
    with run.progress("measuring", "passes/s") as on_done:
        found = circuit(
            opened.model,
            opened.dictionary,
            opened.graph,
            counterfactual=there,
            text=text,
            paraphrases=examples,
            kept=kept,
            on_done=on_done,
            foil=flags.foil,
            ablate=flags.ablate,
            share=flags.share,
            size=flags.size,
            beam=flags.beam,
            seed=flags.seed,
        )
    said = write_circuit(found, flags.directory, opened.report)
    kept.unlink(missing_ok=True)
    took = f"{found.passes} passes, {time.perf_counter() - started:.1f} s"
    parts = [Text(str(found)), _sets(said), _members(found), *_paraphrases(said)]
    if not said["on_page"] and found.groups:
        parts.append("the page keeps the groups that were saved there")
    answer(flags.json, said, *parts, took, f"circuit: {flags.directory}/circuit.json")


def _sets(said: dict[str, Any]) -> Table:
    """The circuit beside other sets of its size."""
    made = Table("set", "features", "sufficiency", "necessity", "kept", "dropped")
    for name, row in said["measured"].items():
        numbers = (_said(row[x], ".1%") for x in ("sufficiency", "necessity"))
        leads = (_said(row[x], ".2f") for x in ("kept", "dropped"))
        made.add_row(name, str(row["features"]), *numbers, *leads)
    return made


def _members(found: Circuit) -> Table:
    """Members with their labels, what adds most first."""
    from jaxclt.errors import on_one_line
    from jaxclt.graph.nodes import node_label, node_name

    adds = found.members
    made = Table("feature", "label", "adds to sufficiency", "to necessity")
    for i, node in enumerate(found.nodes[:LISTED]):
        place, bad = node_name(found.graph, node), found.leads.astray
        label = on_one_line(node_label(found.graph, node))
        mark = "" if adds.measured[i] else " (predicted)"
        numbers = (adds.sufficiency[i], adds.necessity[i])
        shown = (_said(None if bad else float(x), "+.1%") + mark for x in numbers)
        made.add_row(Text(place), Text(label), *shown)
    rest = len(found.nodes) - LISTED
    if rest > 0:
        made.add_row(f"and {rest} more", "", "", "")
    return made


def _paraphrases(said: dict[str, Any]) -> list[Text]:
    found = said["paraphrases"]
    if found is None:
        return []

    def one(name: str) -> str:
        ends = (_said(x, ".0%") for x in found[f"{name}_interval"])
        return f"{name} {_said(found[name], '.0%')} [{', '.join(ends)}]"

    shares = ", ".join(map(one, ("sufficiency", "necessity")))
    return [Text(f"on {found['n']} of {len(found['prompts'])} paraphrases: {shares}")]


def _said(x: float | None, form: str) -> str:
    """A number, or a dash if there is none."""
    return "-" if x is None else format(x, form)
