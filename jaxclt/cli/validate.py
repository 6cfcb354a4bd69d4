"""`jaxclt validate`: what a graph predicts against what patches do."""

from __future__ import annotations

import dataclasses
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.text import Text

from jaxclt.cli.common import answer
from jaxclt.cli.flags import TracedDirectory
from jaxclt.cli.progress import Run
from jaxclt.cli.reopened import ReopenFlags, check_traced

if TYPE_CHECKING:
    from jaxclt.patching.subject import Reopened
    from jaxclt.text.prompts import Prompt
    from jaxclt.types import Supernode
    from jaxclt.validation.report import ValidateOptions

__all__ = ["ValidateFlags", "run_validate", "validate_opened"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class ValidateFlags(ReopenFlags):
    """Compare what the graph predicts with what patches of the model do."""

    directory: TracedDirectory
    n_features: int = 100
    """Most influential features to patch, and as many random ones."""
    foil: str | None = None
    """Token that the answer is compared with; by default the runner-up."""
    counterfactual: str | None = None
    """Prompt of as many tokens: whether the shown features are enough, and needed, is
    asked with all others at its values instead of zero."""
    seed: int = 0
    """Seed of the random features, perturbations and bootstrap."""


def run_validate(flags: ValidateFlags, run: Run) -> None:
    """Reopen, validate, print."""
    from jaxclt.validation.report import ValidateOptions

    options = ValidateOptions(n_features=flags.n_features, seed=flags.seed)
    check_traced(flags.directory)
    run.own(flags.directory)
    opened = flags.reopen(flags.directory, run)
    reference = None
    if flags.counterfactual is not None:
        from jaxclt.text.prompts import Opened

        bos = opened.report["identity"].get("bos", "auto")  # as the traced prompt
        reference = Opened(prompt=flags.counterfactual, bos=bos)
    report = validate_opened(
        opened,
        flags.directory,
        run,
        options=options,
        foil=flags.foil,
        groups=flags.groups(flags.directory, opened),
        reference=reference,
    )
    where = f"report: {flags.directory / 'validation.md'}"
    answer(flags.json, report, Text(report["verdict"]), where)


def validate_opened(
    opened: Reopened,
    directory: Path,
    run: Run,
    *,
    options: ValidateOptions | None = None,
    foil: str | None = None,
    groups: list[Supernode] | None = None,
    reference: Prompt | None = None,
) -> dict[str, Any]:
    """Validate a graph whose model is loaded; shared with `trace --validate`.

    `reference` is a counterfactual prompt, at whose values what is not shown is held.
    """
    from jaxclt.patching.subject import Subject
    from jaxclt.trace.pages import traced_digest, write_page
    from jaxclt.trace.target_text import read_token
    from jaxclt.validation.report import (
        ValidateOptions,
        validate_graph,
        write_validation,
    )
    from jaxclt.validation.shown import check_reference
    from jaxclt.validation.words import left_out

    started, options = time.perf_counter(), options or ValidateOptions()
    if foil is not None:
        options = dataclasses.replace(options, foil=read_token(opened.model, foil))
    subject, other = Subject.of(opened.model, opened.dictionary, opened.graph), None
    if reference is not None:
        other = Subject.of(opened.model, opened.dictionary, reference)
        check_reference(subject, other)
    with run.progress("validating", "patches/s") as on_done:
        report = validate_graph(
            subject,
            options,
            groups=groups,
            tokens=opened.report.get("tokens") or (),
            reference=other,
            on_done=on_done,
        )
    for said in left_out(report):
        run.warn(said)
    report["traced"] = traced_digest(opened.report)
    report["seconds"] = round(time.perf_counter() - started, 2)
    write_validation(report, directory)
    if (directory / "graph.json").is_file():
        write_page(directory)
    return report
