"""What commands share: a model with its dictionary, and how the answer is printed."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from rich.console import Console, RenderableType
from rich.table import Table
from rich.text import Text

from jaxclt.files.json_text import to_json

if TYPE_CHECKING:
    from jaxclt.cli.progress import Run
    from jaxclt.clt.coder import Dictionary
    from jaxclt.io.model import Model
    from jaxclt.io.tokenizer import Bos
    from jaxclt.text.prompts import Prompt

__all__ = ["answer", "asked", "load", "options", "page_line", "table"]
__all__ += ["use_compilation_cache"]

_Options = TypeVar("_Options")


def use_compilation_cache() -> None:
    """Keep compiled programs between runs: a second run of a shape starts at once.

    They lie in the user cache; JAX's own environment variables say otherwise.
    """
    import jax

    from jaxclt.files.digest import cache_root

    ours = {
        "jax_compilation_cache_dir": str(cache_root() / "xla"),
        "jax_persistent_cache_min_compile_time_secs": 0.1,
    }
    for name, value in ours.items():
        if name.upper() not in os.environ:
            jax.config.update(name, value)


def load(
    model: str, dictionary: str, run: Run, **options: Any
) -> tuple[Model, Dictionary]:
    """A model and its dictionary, on compiled programs that are kept.

    Args:
      model: name or path.
      dictionary: name or path.
      run: where downloads are reported.
      **options: of `jaxclt.load_model`.
    """
    from jaxclt.io.dictionary import load_dictionary
    from jaxclt.io.model import load_model

    use_compilation_cache()
    loaded = load_model(model, progress=run.line, **options)
    return loaded, load_dictionary(dictionary, loaded, progress=run.line)


def options(kind: type[_Options], flags: Any, **others: Any) -> _Options:
    """The options of a call.

    Args:
      kind: their dataclass.
      flags: of a command; those of the same names are taken.
      **others: fields whose flags have other names, or none.
    """
    fields: Any = kind
    names = {field.name for field in dataclasses.fields(fields)} & vars(flags).keys()
    return kind(**{name: getattr(flags, name) for name in names}, **others)


def asked(prompt: Prompt, *, chat: bool, bos: Bos) -> Prompt:
    """A prompt that begins as ``--bos`` says; with ``--chat``, what a user says."""
    from jaxclt.io.chat import user_says
    from jaxclt.text.prompts import Opened

    if chat and isinstance(prompt, str):
        prompt = user_says(prompt)
    return dataclasses.replace(Opened.of(prompt), bos=bos)


def table(title: str | Text | None, rows: Mapping[str, str]) -> Table:
    """Names and values side by side; nothing in them is markup."""
    made = Table(title=title, show_header=False)
    for name, value in rows.items():
        made.add_row(Text(name), Text(value))
    return made


def page_line(page: Path) -> str:
    """Where a browser opens a page."""
    return f"page: {page.resolve().as_uri()}"


def answer(as_json: bool, value: Any, *shown: RenderableType) -> None:
    """Print a result on stdout.

    Args:
      as_json: whether as JSON.
      value: it.
      *shown: it as people read it: tables, and lines that are printed as they are.
    """
    if as_json:
        print(to_json(value), flush=True)  # noqa: T201
        return
    console = Console()
    for part in shown:
        plain = isinstance(part, str)
        console.print(part, markup=False, highlight=False, soft_wrap=plain)
