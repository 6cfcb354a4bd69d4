"""The `jaxclt` command: a table of its commands, one file each, and no logic.

Results go to stdout, progress and logs to stderr. Exit status:

| status | meaning |
|---|---|
| 0 | done |
| 2 | bad input, or no room for the work or its results: one line says what to change |
| 70 | a fault of jaxclt's own: one line names it; `--debug` shows where |
| 130, 143 | interrupted by Ctrl-C, by SIGTERM |
| 141 | whoever read the output closed it, as in ``jaxclt --help | head -1`` |
"""

from __future__ import annotations

import ast
import functools
import importlib
import sys
from collections.abc import Sequence
from importlib import resources
from typing import Any, NamedTuple

from rich.console import Console
from rich.text import Text

from jaxclt.cli.door import guarded
from jaxclt.errors import InputError, did_you_mean
from jaxclt.version import __version__

__all__ = ["main"]

START = """jaxclt explains a prediction of a language model as a graph of features.

begin with
  jaxclt demo              the whole method on a bundled model, in a minute
  jaxclt trace "The Eiffel Tower is in the city of" \\
      --model smollm2-135m --dictionary neurons:32 --out out/eiffel
                           a graph of a prompt of yours (98 MB, fetched once)
  jaxclt serve out         look at all your graphs in the browser

all commands: jaxclt --help; the flags of one: jaxclt trace --help"""

_HELP = """Circuit tracing in JAX: explain a prediction as a graph of features.

jaxclt COMMAND ...; the flags of one: jaxclt COMMAND --help
"""


class _Command(NamedTuple):
    """What is particular to a command.

    Its module jaxclt/cli/NAME.py has the dataclass ``NameFlags`` and the function
    ``run_name``, and is imported when the command is asked for.
    """

    lower: str = "a smaller model or dictionary"  # what helps if memory runs out
    long: bool = True  # looks by itself whether it is to stop
    resumes: bool = False


_GRAPH = "a smaller --max-features, or a shorter prompt"
_COMMANDS = {
    "demo": _Command(),
    "trace": _Command(_GRAPH),
    "sweep": _Command(_GRAPH, resumes=True),
    "fetch": _Command(long=False),
    "convert": _Command(),
    "view": _Command(long=False),
    "serve": _Command(long=False),
    "explain": _Command(long=False),
    "patch": _Command(long=False),
    "validate": _Command("fewer --n-features"),
    "circuit": _Command("a smaller --max-features when tracing", resumes=True),
    "eval": _Command("a smaller --max-features, --tokens or --context", resumes=True),
    "globals": _Command(
        "fewer features (--features top:K) or a smaller --context",
        resumes=True,
    ),
    "features": _Command(
        "fewer features (--features top:K), or smaller --top, --drawn, --context",
        resumes=True,
    ),
    "train": _Command(
        "smaller --features, --batch-tokens or --chunk-tokens, or --memory per_source",
        resumes=True,
    ),
}


def main(argv: Sequence[str] | None = None) -> None:
    """Run a command line; exits with a status unless it is 0."""
    args = list(sys.argv[1:] if argv is None else argv)
    debug = "--debug" in args
    while args[:1] == ["--debug"]:
        del args[0]
    command = _COMMANDS.get(args[0]) if args else None
    status = guarded(
        functools.partial(_run, args),
        debug=debug,
        lower=command.lower if command else "",
        kept="the same command goes on from what is kept"
        if command and command.resumes
        else "every file is whole",
    )
    if status:
        sys.exit(status)


def _run(args: list[str], say: Console) -> None:
    first = args[0] if args else ""
    if not args:
        print(START)  # noqa: T201
    elif first == "--version":
        print(f"jaxclt {__version__}")  # noqa: T201
    elif first in ("-h", "--help", "help"):
        _show_help()
    elif first not in _COMMANDS:
        hint = did_you_mean(first, _COMMANDS)
        raise InputError(
            f"there is no command {first!r}: `jaxclt --help` lists them{hint}"
        )
    else:
        from jaxclt.cli.parse import parse

        _start(first, parse(_parts(first)[0], first, args[1:]), say)


def _start(name: str, flags: Any, say: Console) -> None:
    from jaxclt.cli.progress import running
    from jaxclt.precision import asked_precision, at_precision

    precise = at_precision(getattr(flags, "precision", asked_precision()))
    with precise, running(say, long=_COMMANDS[name].long) as run:
        _parts(name)[1](flags, run)


def _parts(name: str) -> tuple[type[Any], Any]:
    """The flags of a command, and what runs it."""
    module = importlib.import_module(f"jaxclt.cli.{name}")
    return getattr(module, _flags(name)), getattr(module, f"run_{name}")


def _flags(name: str) -> str:
    return f"{name.title()}Flags"


def _show_help() -> None:
    """What each command does, in the words of its flags; no command is imported."""
    from rich.table import Table

    rows = Table(box=None, show_header=False, padding=(0, 2, 0, 2))
    for name in _COMMANDS:
        rows.add_row(Text(name, style="bold"), Text(_does(name)))
    console = Console(highlight=False)
    console.print(_HELP, markup=False)
    console.print(rows)


def _does(name: str) -> str:
    """The first paragraph of what a command says of itself."""
    source = resources.files("jaxclt.cli").joinpath(f"{name}.py").read_text("utf-8")
    kinds = (x for x in ast.parse(source).body if isinstance(x, ast.ClassDef))
    said = next(ast.get_docstring(x) for x in kinds if x.name == _flags(name))
    assert said is not None
    return " ".join(said.partition("\n\n")[0].split())
