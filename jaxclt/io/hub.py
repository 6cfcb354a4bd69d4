"""Files of the model hub: by repository, folder and revision, and no more than needed.

A name is ``organisation/name``, with ``//folder`` (or ``/folder``) inside it and
``@revision`` after it where there is one.
"""

from __future__ import annotations

import fnmatch
import re
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import parse_qs, urlsplit

from jaxclt.errors import InputError, first_line

__all__ = ["MODEL_FILES", "HubRef", "download_dictionary", "download_model"]
__all__ += ["fetch_listed", "parse_hub_id", "parse_hub_ref"]

# What is taken of a model: never pickled weights, nothing in subfolders.
MODEL_FILES = (
    *("*.json", "*.safetensors", "tokenizer.model", "merges.txt"),
    "chat_template.jinja",
)
_PART = r"[\w.-]+"
_HUB_REF = re.compile(
    rf"(?P<repo>{_PART}/{_PART})(?P<folder>(//?{_PART})*)/?(@(?P<rev>[\w./-]+))?"
)
_TIMEOUT_S = 10


class HubRef(NamedTuple):
    """A place on the hub."""

    repo: str
    folder: str  # "" for the whole repository
    revision: str | None

    def inside(self, name: str) -> str:
        """Name in the repository of a file of the folder."""
        return f"{self.folder}/{name}" if self.folder else name


def parse_hub_ref(name: str) -> HubRef | None:
    """The place that a name stands for, or None if it names none."""
    found = _HUB_REF.fullmatch(name)
    if found is None or name[0] in ".~":
        return None
    parts = [part for part in found["folder"].split("/") if part]
    if any(not part.strip(".") for part in (*parts, *found["repo"].split("/"))):
        return None  # a dot or two is a path
    return HubRef(found["repo"], "/".join(parts), found["rev"])


def parse_hub_id(name: str) -> tuple[str, str | None] | None:
    """(repository, revision) of a hub id without a folder, or None."""
    found = parse_hub_ref(name)
    return None if found is None or found.folder else (found.repo, found.revision)


def download_model(name: str) -> Path:
    """Fetch a model's files into the hub's cache; their folder.

    Args:
      name: hub id.

    Raises:
      InputError: if there is no such repository or revision, if it may not be read, if
        the hub cannot be reached, or if the files do not fit on the disk.
    """

    def wanted(names: Sequence[str]) -> list[str]:
        top = [x for x in names if "/" not in x]
        return [x for x in top if any(fnmatch.fnmatch(x, y) for y in MODEL_FILES)]

    ref = parse_hub_ref(name)
    if ref is None or ref.folder:
        raise InputError(
            f"{name!r} is not a hub id: write organisation/name[@revision]"
        )
    return _fetch(ref, "model", wanted)


def download_dictionary(
    name: str,
    configs: Callable[[Sequence[str]], list[str]],
    weights: Callable[[Path, Sequence[str]], list[str]],
    chosen: Callable[[Sequence[str], str, str], list[str] | None],
) -> Path:
    """Fetch a dictionary: the files that describe it first, then what they ask for.

    Args:
      name: hub id, may name a folder.
      configs: from the names of all files in that folder to those that describe it.
      weights: from the local folder, which has these, and all names, to the others.
      chosen: from the names of all files of the repository, the folder's name and the
        repository's, to the files of a dictionary that is spread over folders; None if
        it is in one.

    Returns:
      The local folder, or what its path would be if there is none of that name.

    Raises:
      InputError: as `download_model`.
    """
    ref = parse_hub_ref(name)
    if ref is None:
        raise InputError(
            f"{name!r} is not a hub id: write organisation/name[//folder][@revision]"
        )
    listed = _list(ref, "dictionary")
    files = chosen(list(listed.sizes), ref.folder, ref.repo)
    if files is not None:
        everything = listed._replace(ref=ref._replace(folder=""))
        return _take(everything, "dictionary", lambda _: files) / ref.folder
    folder = _take(listed, "dictionary", configs)
    names = list(listed.inside())
    return _take(listed, "dictionary", lambda _: weights(folder, names))


def fetch_listed(uri: str) -> Path:
    """The file of a ``hf://organisation/name/file[?revision=..]``, fetched if absent.

    Raises:
      InputError: if it is not of that form, and as `download_model`.
    """
    at = urlsplit(uri)
    revision = parse_qs(at.query).get("revision", [None])[0]
    ref = parse_hub_ref(f"{at.netloc}{at.path}" + (f"@{revision}" if revision else ""))
    if at.scheme != "hf" or ref is None or not ref.folder:
        raise InputError(
            f"{uri!r} names no file: write hf://organisation/name/file[?revision=..]"
        )
    folder, _, file = ref.folder.rpartition("/")
    return _fetch(ref._replace(folder=folder), "dictionary", lambda _: [file]) / file


def _local_names(folder: Path) -> list[str]:
    files = [x for x in folder.rglob("*") if x.is_file()]
    return [x.relative_to(folder).as_posix() for x in files]


class _Listed(NamedTuple):
    """What a repository has, and what of it is asked for."""

    ref: HubRef
    sizes: Mapping[str, int]  # of all files
    cached: Path | None = None  # the hub is out of reach: only these files can be had
    unreachable: str = ""

    def inside(self) -> dict[str, int]:
        """Files of the folder by their names in it."""
        start = f"{self.ref.folder}/" if self.ref.folder else ""
        return {
            name.removeprefix(start): size
            for name, size in self.sizes.items()
            if name.startswith(start)
        }


def _fetch(
    ref: HubRef, what: str, wanted: Callable[[Sequence[str]], list[str]]
) -> Path:
    """Files of a folder of a repository, by a choice among its names; local folder."""
    return _take(_list(ref, what), what, wanted)


def _list(ref: HubRef, what: str) -> _Listed:
    """Ask what there is; what an earlier download left if the hub does not answer."""
    from huggingface_hub import HfApi

    try:
        with _explained(ref, what):
            # The short question first: a download would retry for minutes without
            # network, and it knows neither names nor sizes.
            info = HfApi().model_info(
                ref.repo,
                revision=ref.revision,
                timeout=_TIMEOUT_S,
                files_metadata=True,
            )
    except _UnreachableError as error:
        root = _cached(ref)
        if root is None:
            raise
        return _Listed(ref, dict.fromkeys(_local_names(root), 0), root, str(error))
    return _Listed(ref, {x.rfilename: x.size or 0 for x in info.siblings or ()})


def _take(
    listed: _Listed, what: str, wanted: Callable[[Sequence[str]], list[str]]
) -> Path:
    """Files of the folder, by a choice among its names; local folder."""
    from huggingface_hub import snapshot_download

    ref, sizes = listed.ref, listed.inside()
    if listed.cached is not None:
        if not sizes or not set(wanted(list(sizes))) <= set(sizes):
            raise InputError(listed.unreachable)
        return listed.cached / ref.folder
    if not sizes:
        raise InputError(
            f"{ref.repo} has no folder {ref.folder!r}; look at "
            f"https://huggingface.co/{ref.repo}/tree/{ref.revision or 'main'}"
        )
    chosen = wanted(list(sizes))
    if not chosen:
        raise InputError(
            f"{_name(ref)} holds no {what} in a known format; give another repository, "
            "or a folder of it as organisation/name//folder"
        )
    _check_space(ref, {ref.inside(x): sizes.get(x, 0) for x in chosen})
    with _explained(ref, what):
        root = snapshot_download(
            ref.repo,
            # not the commit found above: its name would not be in the cache, and the
            # files could not be found there without a network
            revision=ref.revision,
            allow_patterns=[_literal(ref.inside(x)) for x in chosen],
        )
    return Path(root) / ref.folder


def _literal(name: str) -> str:
    """A pattern that matches one name."""
    return re.sub(r"([\[*?])", r"[\1]", name)


def _cached(ref: HubRef) -> Path | None:
    """Where an earlier download lies."""
    from huggingface_hub import snapshot_download

    try:
        return Path(
            snapshot_download(ref.repo, revision=ref.revision, local_files_only=True)
        )
    except Exception:  # whatever it says, there is nothing
        return None


def _check_space(ref: HubRef, sizes: Mapping[str, int]) -> None:
    """Raise InputError unless what is still to be fetched fits on the cache's disk."""
    from huggingface_hub import try_to_load_from_cache
    from huggingface_hub.constants import HF_HUB_CACHE

    needed = sum(
        size
        for name, size in sizes.items()
        if not isinstance(
            try_to_load_from_cache(ref.repo, name, revision=ref.revision), str
        )
    )
    place = Path(HF_HUB_CACHE)
    while not place.exists():
        place = place.parent
    free = shutil.disk_usage(place).free
    if needed > free:
        raise InputError(
            f"{_name(ref)} needs {needed / 1e9:.1f} GB more, {free / 1e9:.1f} GB are "
            f"free at {place}; make room, or set HF_HOME to a larger disk"
        )


def _name(ref: HubRef) -> str:
    folder = f"//{ref.folder}" if ref.folder else ""
    return f"{ref.repo}{folder}" + (f"@{ref.revision}" if ref.revision else "")


class _UnreachableError(InputError):
    """The hub did not answer; an earlier download may do."""


@contextmanager
def _explained(ref: HubRef, what: str) -> Iterator[None]:
    """Turn what the hub's library raises into one line that says what to do."""
    from huggingface_hub import get_token
    from huggingface_hub.errors import (
        GatedRepoError,
        HfHubHTTPError,
        HFValidationError,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    page = f"https://huggingface.co/{ref.repo}"
    try:
        yield
    except InputError:
        raise
    except GatedRepoError as error:
        how = "the account of your token has not accepted its terms"
        if not get_token():
            how = "no token is set: log in with `hf auth login` or set HF_TOKEN"
        raise InputError(
            f"{ref.repo} is gated: accept its terms at {page} first ({how})"
        ) from error
    except RevisionNotFoundError as error:
        raise InputError(
            f"{ref.repo} has no revision {ref.revision!r}; see {page}/commits/main"
        ) from error
    except RepositoryNotFoundError as error:
        hint = "" if get_token() else " or, if it is private, set HF_TOKEN"
        raise InputError(
            f"the hub has no {what} {ref.repo!r} (and there is no such file or "
            f"directory): check the name{hint}"
        ) from error
    except HFValidationError as error:
        raise InputError(
            f"{_name(ref)} is not a hub id ({first_line(error)})"
        ) from error
    except HfHubHTTPError as error:
        status: Any = getattr(error.response, "status_code", None)
        if status in (401, 403):
            raise InputError(
                f"{ref.repo} may not be read: give a token that may, with "
                "`hf auth login` or HF_TOKEN"
            ) from error
        raise _unreachable(ref, what, error) from error
    except Exception as error:  # whatever its HTTP library of the day raises
        raise _unreachable(ref, what, error) from error


def _unreachable(ref: HubRef, what: str, error: Exception) -> _UnreachableError:
    return _UnreachableError(
        f"no file or directory {_name(ref)!r}, and the hub cannot be reached for a "
        f"{what} of that name ({first_line(error)}): connect to it, or give a local "
        "path"
    )
