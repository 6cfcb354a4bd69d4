"""Many prompts in one go: a directory for each, an index, a run that can be resumed.

Prompts of similar length share compiled programs (`jaxclt.shapes.bucket`), so all but
the first few cost their arithmetic only.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from jaxclt.clt.coder import Dictionary
from jaxclt.errors import InputError
from jaxclt.files.atomic import write_text
from jaxclt.files.json_file import TEXT, json_schema, record
from jaxclt.files.json_text import to_json
from jaxclt.files.lines import read_lines
from jaxclt.graph.attribute import AttributeConfig
from jaxclt.io.chat import is_chat
from jaxclt.io.model import Model
from jaxclt.runs.kept import intact_json
from jaxclt.runs.pace import logged
from jaxclt.text.prompts import Given, Opened, Prompt, read_prompts
from jaxclt.trace.files import write_trace
from jaxclt.trace.prompt import identity, trace_prompt

__all__ = ["read_prompts", "sweep_prompts"]

_LINE = json_schema(record({"directory": TEXT}))
_REPORT = json_schema(record({x: {"type": "object"} for x in ("identity", "scores")}))


def sweep_prompts(
    model: Model,
    dictionary: Dictionary,
    prompts: Sequence[Prompt],
    out: str | os.PathLike[str],
    *,
    config: AttributeConfig | None = None,
    save: str = "pruned",
    on_prompt: Callable[[int, int], None] | None = None,
) -> list[dict[str, Any]]:
    """Trace every prompt into its own directory and write `index.jsonl`.

    A prompt that was traced there with the same model, dictionary and settings is not
    traced again; one that fails is reported in the index and skipped.

    Args:
      model: from `load_model`.
      dictionary: from `load_dictionary`.
      prompts: texts, or chats as messages.
      out: directory.
      config: how much to compute.
      save: as for `write_trace`.
      on_prompt: progress, (prompts done, prompts in all), several times a prompt; to
        the log if not given.

    Returns:
      The lines of the index: prompt (or messages), directory, status, and scores or
      error.

    Raises:
      InputError: if the directory cannot be written.
    """
    out, config = Path(out), config or AttributeConfig()
    told = on_prompt or partial(logged(), "prompts")
    given = [Opened.of(prompt).prompt for prompt in prompts]
    folders = [out / f"{i:05d}-{_slug(x)}" for i, x in enumerate(given)]
    before = _index(out)  # of prompts that this run has not come to yet
    index = []
    for i, (prompt, folder) in enumerate(zip(prompts, folders, strict=True)):
        kind = "messages" if is_chat(given[i]) else "prompt"
        line: dict[str, Any] = {kind: given[i], "directory": folder.name}
        try:
            wanted = identity(model, dictionary, prompt, config)
            report = _finished(folder, wanted)
            if report is None:
                traced = trace_prompt(
                    model,
                    dictionary,
                    prompt,
                    config=config,
                    on_rows=lambda *_, i=i: told(i, len(prompts)),
                )
                report = write_trace(traced, folder, save=save)
            line |= {"status": "done", "scores": report["scores"]}
        except InputError as error:
            line |= {"status": "failed", "error": str(error)}
        index.append(line)
        ahead = [before[f.name] for f in folders[i + 1 :] if f.name in before]
        rows = (to_json(x, ensure_ascii=False) + "\n" for x in index + ahead)
        write_text(out / "index.jsonl", "".join(rows))
        told(i + 1, len(prompts))
    return index


def _index(out: Path) -> dict[str, dict[str, Any]]:
    """The lines of an earlier run by directory; damaged ones are skipped."""
    return {row["directory"]: row for row in read_lines(out / "index.jsonl", _LINE)}


def _finished(folder: Path, wanted: dict[str, Any]) -> dict[str, Any] | None:
    """The report of an earlier run of exactly this, if it got to its last file."""
    if not (folder / "index.html").exists():
        return None
    report = intact_json(folder / "report.json", _REPORT)
    return report if report and report["identity"] == wanted else None


def _slug(given: Given) -> str:
    text = given[-1].get("content") if is_chat(given) else given
    words: Iterator[str] = iter(re.findall(r"[a-z0-9]+", str(text).lower()))
    return "-".join(words)[:40].strip("-") or "prompt"
