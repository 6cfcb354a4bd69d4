"""`jaxclt serve`: the pages of a folder of graphs on 127.0.0.1, and what readers save.

See `jaxclt.serve`, which is imported when the command runs.
"""

from __future__ import annotations

import dataclasses
import logging
import os
from pathlib import Path
from typing import Annotated

from tyro.conf import Positional, UseAppendAction, arg

from jaxclt.cli.common import answer, use_compilation_cache
from jaxclt.cli.flags import AsJson, Debug
from jaxclt.cli.progress import Run
from jaxclt.errors import InputError

__all__ = ["ServeFlags", "run_serve"]

_LOCAL = ("127.0.0.1", "localhost", "::1")


@dataclasses.dataclass(frozen=True, kw_only=True)
class ServeFlags:
    """Show all graphs of a folder in the browser; saves labels and supernodes."""

    directory: Annotated[Positional[Path], arg(metavar="DIR")]
    """Folder of what trace and sweep wrote, at any depth, or of graph files."""
    port: int = 8032
    """Port; 0 takes a free one."""
    host: str = "127.0.0.1"
    """Address to listen on. Whoever can reach it and has the token can read the graphs,
    save labels and run patches."""
    allow_host: Annotated[UseAppendAction[tuple[str, ...]], arg(metavar="NAME")] = ()
    """A name by which others reach this machine, such as gpu.example; may be repeated.
    Requests for other names are refused."""
    token: Annotated[str | None, arg(metavar="TEXT")] = None
    """What a browser must present; it is part of the printed address. By default a
    random one."""
    model: Annotated[str | None, arg(metavar="M")] = None
    """The model for patches; by default that of each graph's report, if it is on this
    machine."""
    dictionary: Annotated[str | None, arg(metavar="D")] = None
    """The dictionary for patches; by default that of each graph's report."""
    patch: bool = True
    """Let pages patch features with the model; --no-patch refuses."""
    json: AsJson = False
    debug: Debug = False


def run_serve(flags: ServeFlags, run: Run) -> None:
    """Serve until interrupted."""
    from jaxclt.serve.listen import make_server
    from jaxclt.serve.patch import Patcher

    if (flags.model is None) != (flags.dictionary is None):
        raise InputError(
            "patches need both --model and --dictionary: give both, or neither"
        )
    if not flags.patch and flags.model is not None:
        raise InputError("--no-patch needs no --model and no --dictionary: leave them")
    patcher = None
    if flags.patch:
        use_compilation_cache()
        patcher = Patcher(flags.model, flags.dictionary)
        if flags.model is None:
            # Names that files of a folder say are looked up here, never fetched.
            os.environ |= {"HF_HUB_OFFLINE": "1", "JAXCLT_FETCH": "hub"}
    server = make_server(
        flags.directory,
        host=flags.host,
        port=flags.port,
        allow_host=flags.allow_host,
        token=flags.token,
        patcher=patcher,
    )
    if flags.debug:
        logging.getLogger("jaxclt.serve").setLevel(logging.DEBUG)
    if flags.host not in _LOCAL:
        run.line(
            f"jaxclt: others can reach {flags.host}; by a name of this machine only "
            "with --allow-host NAME"
        )
    where = f"serving {flags.directory} at {server.url} (Ctrl+C ends)"
    answer(flags.json, {"url": server.url}, where)
    server.run()
