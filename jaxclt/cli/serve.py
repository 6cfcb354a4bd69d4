"""`jaxclt serve`: the pages of a folder of graphs on 127.0.0.1, and what readers save.

See `jaxclt.serve`, which is imported when the command runs.
"""

from __future__ import annotations

import dataclasses
import logging
from pathlib import Path
from typing import Annotated

import tyro
from rich.console import Console

from jaxclt.cli.compiled import use_compilation_cache
from jaxclt.errors import InputError
from jaxclt.files.json_text import to_json

__all__ = ["ServeConfig", "run_serve"]

_LOCAL = ("127.0.0.1", "localhost", "::1")


@dataclasses.dataclass(frozen=True, kw_only=True)
class ServeConfig:
    """Show all graphs of a folder in the browser; saves labels and supernodes."""

    directory: Annotated[tyro.conf.Positional[Path], tyro.conf.arg(metavar="DIR")]
    """Folder of what trace and sweep wrote, at any depth, or of graph files."""
    port: int = 8032
    """Port; 0 takes a free one."""
    host: str = "127.0.0.1"
    """Address to listen at. Whoever reaches it and has the token can read the graphs,
    save labels and, with --model, run patches."""
    allow_host: Annotated[
        tyro.conf.UseAppendAction[tuple[str, ...]], tyro.conf.arg(metavar="NAME")
    ] = ()
    """A name by which others reach this machine, as gpu.example; may be repeated.
    Requests for other names are refused."""
    token: Annotated[str | None, tyro.conf.arg(metavar="TEXT")] = None
    """What a browser must know; it is part of the printed address. A random one unless
    given."""
    model: Annotated[str | None, tyro.conf.arg(metavar="M")] = None
    """With it, pages can patch graphs of this model; needs --dictionary."""
    dictionary: Annotated[str | None, tyro.conf.arg(metavar="D")] = None
    """The traced dictionary, for patches."""
    json: bool = False
    """Print the address as JSON on stdout."""
    debug: bool = False
    """Show tracebacks."""


def run_serve(config: ServeConfig, say: Console) -> None:
    """Serve until interrupted."""
    from jaxclt.serve.listen import make_server
    from jaxclt.serve.patch import Patcher

    if (config.model is None) != (config.dictionary is None):
        raise InputError("patches need both --model and --dictionary: give both")
    patcher = None
    if config.model is not None and config.dictionary is not None:
        use_compilation_cache()
        patcher = Patcher(config.model, config.dictionary)
    server = make_server(
        config.directory,
        host=config.host,
        port=config.port,
        allow_host=config.allow_host,
        token=config.token,
        patcher=patcher,
    )
    if config.debug:
        logging.getLogger("jaxclt.serve").setLevel(logging.DEBUG)
    if config.host not in _LOCAL:
        say.print(
            f"jaxclt: others can reach {config.host}; by a name of this machine only "
            "with --allow-host NAME",
            markup=False,
        )
    if config.json:
        print(to_json({"url": server.url}), flush=True)  # noqa: T201
    else:
        Console().print(
            f"serving {config.directory} at {server.url} (Ctrl+C ends)",
            markup=False,
            soft_wrap=True,
        )
    server.run()
