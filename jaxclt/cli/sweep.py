"""`jaxclt sweep`: many prompts become graphs."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Annotated, Literal

from tyro.conf import Positional, arg

from jaxclt.cli.attribution import AttributionFlags
from jaxclt.cli.common import answer, asked
from jaxclt.cli.progress import Run

__all__ = ["SweepFlags", "run_sweep"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class SweepFlags(AttributionFlags):
    """Attribution graphs of many prompts: a directory for each, and an index. The same
    command resumes an interrupted sweep."""

    prompts: Annotated[Positional[Path], arg(metavar="PROMPTS")]
    """.txt file with one prompt per line, or .jsonl file of objects with `prompt`, or
    with the `messages` of a chat, [{"role": ..., "content": ...}, ...]."""
    out: Path
    """Directory to write to."""
    save: Literal["auto", "full", "pruned"] = "pruned"
    """What each graph.npz holds."""


def run_sweep(flags: SweepFlags, run: Run) -> None:
    """Trace all prompts, print how many."""
    from jaxclt.trace.sweep import read_prompts, sweep_prompts

    prompts = [
        asked(x, chat=flags.chat, bos=flags.bos) for x in read_prompts(flags.prompts)
    ]
    config = flags.config()
    run.own(flags.out)
    model, dictionary = flags.load(run)
    with run.progress("prompts", "prompts/s") as on_prompt:
        index = sweep_prompts(
            model,
            dictionary,
            prompts,
            flags.out,
            config=config,
            save=flags.save,
            on_prompt=on_prompt,
        )
    for line in index:
        if line["status"] == "failed":
            run.line(f"{line['directory']}: {line['error']}")
    done = sum(line["status"] == "done" for line in index)
    text = f"{done} of {len(index)} prompts traced: {flags.out}/index.jsonl"
    answer(flags.json, index, text)
