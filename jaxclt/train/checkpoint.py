"""Checkpoints that are whole or ignored.

Orbax writes the arrays; a manifest with the SHA-256 of every file is written last. A
checkpoint without a manifest, or whose files differ from it, is damaged: it is reported
and the one before it is used.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import orbax.checkpoint as ocp

from jaxclt.errors import InputError
from jaxclt.files.atomic import write_text
from jaxclt.files.digest import read_sha256
from jaxclt.files.json_file import (
    COUNT,
    TEXT,
    check_json,
    json_schema,
    named,
    read_json,
    record,
)
from jaxclt.files.json_text import to_json
from jaxclt.train import processes

__all__ = [
    "newest_intact",
    "restore_checkpoint",
    "save_checkpoint",
    "tidy_checkpoints",
]

KEPT = 2

_PLACE = {"type": "integer", "minimum": 0, "maximum": (1 << 31) - 1}
_POSITION = record(dict.fromkeys(("chunk", "turn", "offset"), _PLACE))
_MANIFEST = json_schema(
    record(
        {
            "step": COUNT,
            "position": {**_POSITION, "additionalProperties": False},
            "files": named(TEXT),
        }
    )
)


def save_checkpoint(
    folder: Path,
    step: int,
    state: Any,
    position: dict[str, Any],
    *,
    regular: Callable[[int], bool] = lambda step: True,
) -> Path:
    """Write ``folder/step`` and drop all but the newest ones; return its path.

    Args:
      folder: of all checkpoints of a run.
      step: number of steps done.
      state: any pytree of arrays.
      position: JSON beside it: where the data goes on.
      regular: whether a run that is never stopped has a checkpoint of a step. The
        newest of these are kept beside the newest of all.
    """
    path = (folder / f"{step:08d}").resolve()
    if processes.is_first():
        # A half-written one of the same step may be left from a killed process.
        shutil.rmtree(path, ignore_errors=True)
        path.mkdir(parents=True)
    processes.wait(f"checkpoint {step}")
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(path / "state", state)
        checkpointer.wait_until_finished()
    processes.wait(f"checkpoint {step} written")
    if not processes.is_first():
        return path
    manifest = {"step": step, "position": position, "files": _digests(path)}
    write_text(path / "manifest.json", to_json(manifest))
    # Newer ones can only be damaged: this run went on from before them.
    numbered = [p for p in _numbered(folder) if int(p.name) <= step]
    usual = [p for p in numbered if regular(int(p.name))]
    _keep_only(folder, {*numbered[-KEPT:], *usual[-KEPT:]})
    return path


def tidy_checkpoints(folder: Path, regular: Callable[[int], bool]) -> None:
    """Leave what a run that was never stopped leaves at its end.

    Args:
      folder: of all checkpoints of a run.
      regular: as for `save_checkpoint`.
    """
    usual = [p for p in _numbered(folder) if regular(int(p.name))]
    _keep_only(folder, {*usual[-KEPT:]})


def _keep_only(folder: Path, kept: set[Path]) -> None:
    for old in {*_numbered(folder)} - kept:
        shutil.rmtree(old, ignore_errors=True)


def newest_intact(
    folder: Path, warn: Callable[[str], None] = lambda line: None
) -> Path | None:
    """The newest checkpoint whose files are what its manifest says, or None.

    Args:
      folder: of all checkpoints of a run.
      warn: called with a line for every damaged one that is passed over.
    """
    for path in reversed(_numbered(folder)):
        reason = _damage(path)
        if reason is None:
            return path
        warn(f"checkpoint {path} is damaged ({reason}); trying the one before it")
    return None


def restore_checkpoint(path: Path, like: Any) -> tuple[int, Any, dict[str, Any]]:
    """Step, state and position of an intact checkpoint.

    Args:
      path: from `newest_intact`.
      like: a pytree of the same structure; its shardings are taken.
    """
    manifest = _manifest(path)
    abstract = jax.tree.map(ocp.utils.to_shape_dtype_struct, like)
    with ocp.StandardCheckpointer() as checkpointer:
        state = checkpointer.restore(path / "state", abstract)
    return manifest["step"], state, manifest["position"]


def _manifest(path: Path) -> dict[str, Any]:
    found = read_json(path / "manifest.json")
    check_json(found, _MANIFEST, path / "manifest.json")
    return found


def _numbered(folder: Path) -> list[Path]:
    if not folder.is_dir():
        return []
    return sorted(p.resolve() for p in folder.iterdir() if p.name.isdecimal())


def _digests(path: Path) -> dict[str, str]:
    return {
        file.relative_to(path).as_posix(): read_sha256(file)
        for file in sorted(path.rglob("*"))
        if file.is_file() and file.name != "manifest.json"
    }


def _damage(path: Path) -> str | None:
    file = path / "manifest.json"
    if not file.is_file():
        return "it was not finished"
    try:
        files = _manifest(path)["files"]
    except InputError:
        return "its manifest cannot be read"
    found = _digests(path)
    if not files:
        return "its manifest names no file"
    wrong = [name for name in files if found.get(name) != files[name]]
    return f"{wrong[0]} differs from its checksum" if wrong else None
