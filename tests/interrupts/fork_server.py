"""Runs `jaxclt` command lines, each in a fork of this process: one start for all.

A line in, ``{"argv": [...], "log": "file"}``; two lines out, the process number at once
and its exit status at its end. Nothing of JAX but its import is done before the fork;
what commands import late is there too.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import traceback

import matplotlib.figure  # noqa: F401
import scipy.stats  # noqa: F401
import transformers  # noqa: F401

import jaxclt
from jaxclt.cli import main as cli
from jaxclt.cli import train as command  # noqa: F401
from jaxclt.global_weights import gather as global_gather
from jaxclt.runs import kept
from jaxclt.train import trainer  # noqa: F401

for name in jaxclt.__all__:  # each imports its room
    getattr(jaxclt, name)
# States are kept after every batch: there are only seconds to be killed in.
kept.SAVE_S = 0.0
global_gather.FLUSH_TOKENS = 1024
global_gather.BATCH_TOKENS = 256


def run(argv: list[str], log: str) -> None:
    """The child: the command line, with a new session's defaults."""
    signal.signal(signal.SIGINT, signal.default_int_handler)
    out = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(out, 1)
    os.dup2(out, 2)
    status = 0
    try:
        cli.main(argv)
    except SystemExit as end:
        status = end.code if isinstance(end.code, int) else 1
    except BaseException:
        traceback.print_exc()
        status = 70
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)


def main() -> None:
    """Until there is no more input."""
    for line in sys.stdin:
        asked = json.loads(line)
        pid = os.fork()
        if not pid:
            run(asked["argv"], asked["log"])
        print(pid, flush=True)  # noqa: T201
        _, status = os.waitpid(pid, 0)
        print(os.waitstatus_to_exitcode(status), flush=True)  # noqa: T201


if __name__ == "__main__":
    main()
