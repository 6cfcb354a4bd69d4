"""Flags that several commands take: types, documented once."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

from tyro.conf import Positional, arg

__all__ = ["AsJson", "Context", "Debug", "ModelName", "TextSource"]
__all__ += ["TracedDirectory"]

ModelName = Annotated[
    str,
    arg(
        metavar="M",
        help="Known name (see `jaxclt fetch --list`), local directory, GGUF file or "
        "hub id.",
    ),
]
TracedDirectory = Annotated[
    Positional[Path], arg(metavar="DIR", help="Directory that trace wrote.")
]
TextSource = Annotated[
    str,
    arg(
        help="Text file, or folder of .txt, .md, .rst, .utf8 and .jsonl files; a "
        '.jsonl file of prompts, lines {"prompt": ...}; or a dataset on the hub, '
        "hub:NAME[@REVISION][?config=..&split=..&text=..]."
    ),
]
Context = Annotated[int, arg(help="Tokens of a window of text.")]
AsJson = Annotated[bool, arg(help="Print the result as JSON on stdout.")]
Debug = Annotated[bool, arg(help="Show tracebacks.")]
