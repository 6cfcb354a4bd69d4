"""Models and dictionaries by hub id, `organisation/name[@revision]`."""

from __future__ import annotations

import re
from pathlib import Path

from jaxclt.errors import InputError

__all__ = ["download", "parse_hub_id"]

_HUB_ID = re.compile(r"(?P<repo>[\w.-]+/[\w.-]+)(@(?P<rev>[\w./-]+))?")


def parse_hub_id(name: str) -> tuple[str, str | None] | None:
    """(repository, revision) of a hub id, or None if `name` is not one."""
    found = _HUB_ID.fullmatch(name)
    if found is None or name[0] in ".~":
        return None
    return found["repo"], found["rev"]


def download(
    name: str, what: str, *, allow: list[str], ignore: list[str] | None = None
) -> Path:
    """Fetch a hub repository's files into the hub's cache.

    Args:
      name: hub id.
      what: `model` or `dictionary`, for the error.
      allow: patterns of files to take.
      ignore: patterns of files to leave.

    Raises:
      InputError: if there is no such repository or the hub cannot be reached.
    """
    from huggingface_hub import snapshot_download

    parsed = parse_hub_id(name)
    if parsed is None:
        raise InputError(f"{name!r} is no hub id: write organisation/name[@revision]")
    try:
        folder = snapshot_download(
            parsed[0],
            revision=parsed[1],
            allow_patterns=allow,
            ignore_patterns=ignore,
        )
    except Exception as error:  # whatever its HTTP library of the day raises
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise InputError(
            f"no file or directory {name!r}, and the hub has no such {what} or cannot "
            f"be reached ({reason})"
        ) from error
    return Path(folder)
