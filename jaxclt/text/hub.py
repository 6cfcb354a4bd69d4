"""Text streamed from the hub, through Hugging Face `datasets` (``jaxclt[hub]``).

``hub:HuggingFaceFW/fineweb@main?config=sample-10BT&split=train&text=text`` names a
dataset, its revision, configuration and split, and the column that holds the text; all
but the name can be left out. A local folder of parquet or jsonl files works as a name
too: ``hub:./folder``.

A stream may be endless: as many documents are taken from its start as the run needs.
Their order is then that of their hashes, as for local files, and the run keeps its
token windows, so that the hub is asked only once.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any
from urllib.parse import parse_qsl

from jaxclt.errors import InputError
from jaxclt.files.lines import text_of

__all__ = ["PREFIX", "HubText", "parse_hub_text", "stream_texts"]

PREFIX = "hub:"


@dataclass(frozen=True, kw_only=True)
class HubText:
    """Which text of which dataset."""

    name: str
    revision: str | None = None
    config: str | None = None
    split: str = "train"
    text: str = "text"  # the column


def parse_hub_text(source: str) -> HubText:
    """The parts of ``hub:NAME[@REVISION][?config=..&split=..&text=..]``.

    Raises:
      InputError: if it is not of that form.
    """
    usage = "write hub:NAME[@REVISION][?config=..&split=..&text=..]"
    place, _, query = source.removeprefix(PREFIX).partition("?")
    name, _, revision = place.partition("@")
    options = dict(parse_qsl(query, keep_blank_values=True))
    unknown = set(options) - {"config", "split", "text"}
    if not name or unknown or not all(options.values()) or (query and not options):
        raise InputError(f"--data {source}: {usage}")
    return HubText(name=name, revision=revision or None, **options)


def stream_texts(source: str, characters: int) -> Iterator[str]:
    """Texts of a dataset from its start, until they have this many characters.

    Args:
      source: see `parse_hub_text`.
      characters: stop after the text that reaches this.

    Raises:
      InputError: if `datasets` is not installed, the dataset cannot be read, or it has
        no such column.
    """
    spec = parse_hub_text(source)
    try:
        import datasets  # pyright: ignore[reportMissingImports]
    except ImportError as error:
        raise InputError(
            f"--data {source} needs the package datasets: pip install 'jaxclt[hub]'"
        ) from error
    taken = 0
    for number, row in enumerate(_rows(source, spec, datasets), 1):
        if spec.text not in row:
            names = ", ".join(sorted(row))
            raise InputError(
                f"--data {source}: there is no column {spec.text!r}; its columns are "
                f"{names}: add ?text=NAME"
            )
        text = text_of(row, spec.text, f"--data {source}, row {number}")
        yield text
        taken += len(text)
        if taken >= characters:
            return


def _rows(source: str, spec: HubText, datasets: Any) -> Iterator[dict[str, Any]]:
    """The rows of a dataset as they come.

    Raises:
      InputError: if it cannot be read, or not further.
    """
    try:
        yield from datasets.load_dataset(
            spec.name,
            spec.config,
            split=spec.split,
            revision=spec.revision,
            streaming=True,
        )
    except Exception as error:  # whatever its HTTP and file libraries raise
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise InputError(f"--data {source} cannot be read ({reason})") from error
