"""Harvested chunks on disk: a file each, and a manifest that lists their checksums."""

from __future__ import annotations

import dataclasses
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import ml_dtypes
import numpy as np
import safetensors.numpy

from jaxclt.errors import InputError
from jaxclt.files.atomic import atomic_path, write_text
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
from jaxclt.runs.kept import refuse_other
from jaxclt.train.normalise import Scales

__all__ = ["DTYPES", "ChunkStore"]

DTYPES = {"float32": np.dtype(np.float32), "bfloat16": np.dtype(ml_dtypes.bfloat16)}
_UNITS = "units.safetensors"
_MANIFEST = json_schema(
    record(
        {
            "identity": {"type": "object"},
            "files": named(record({"sha256": TEXT, "bytes": COUNT})),
        }
    )
)


@dataclasses.dataclass(frozen=True)
class ChunkStore:
    """A folder of chunks that hold the activations of one model on one text.

    Attributes:
      folder: made when the first file is written.
      identity: whose activations they are.
      sizes: layers and width of the model.
      passing: whether it is a run's own, for as long as that lasts: what is damaged
        there is harvested again.
    """

    folder: Path
    identity: Mapping[str, Any]
    sizes: tuple[int, int]
    passing: bool = False

    def check(self) -> None:
        """Raise InputError if the folder holds other activations."""
        refuse_other(self.folder, self._manifest()["identity"], self.identity)

    def read(self, chunk: int) -> tuple[np.ndarray, np.ndarray] | None:
        """Reads and writes [L, N, D] of a chunk, or None.

        Raises:
          InputError: if the file is damaged.
        """
        file = self._checked(_name(chunk))
        if file is None:
            return None
        L, D = self.sizes
        found = _tensors(file, {"read_LND": (L, None, D), "write_LND": (L, None, D)})
        read_LND, write_LND = found["read_LND"], found["write_LND"]
        if read_LND.shape != write_LND.shape:
            raise InputError(f"{file} is no chunk of this model: delete it")
        return read_LND, write_LND

    def write(self, chunk: int, read_LND: np.ndarray, write_LND: np.ndarray) -> None:
        """Keep a chunk."""
        self._write(_name(chunk), {"read_LND": read_LND, "write_LND": write_LND})

    def holds(self, chunk: int) -> bool:
        """Whether a chunk was written, damaged or not."""
        return _name(chunk) in self._manifest()["files"]

    def read_units(self) -> Scales | None:
        """What the chunks are normalised by, or None.

        Raises:
          InputError: if the file is damaged.
        """
        file = self._checked(_UNITS)
        if file is None:
            return None
        L, D = self.sizes
        names = [field.name for field in dataclasses.fields(Scales)]
        shapes = {x: (L, D) if x.endswith("_LD") else (L,) for x in names}
        found = _tensors(file, shapes)
        return Scales(**{name: jnp.asarray(found[name]) for name in names})

    def write_units(self, units: Scales) -> None:
        """Keep what the chunks are normalised by."""
        names = [field.name for field in dataclasses.fields(units)]
        self._write(_UNITS, {name: np.asarray(getattr(units, name)) for name in names})

    def forget(self, chunk: int) -> None:
        """Delete what lies before a chunk, except the first.

        Evaluations calibrate thresholds on the first chunk.
        """
        for file in self.folder.glob("chunk_*.safetensors"):
            if 0 < int(file.stem.removeprefix("chunk_")) < chunk:
                file.unlink()

    def remove(self) -> None:
        """Delete the folder."""
        shutil.rmtree(self.folder, ignore_errors=True)

    def _manifest(self) -> dict[str, Any]:
        file = self.folder / "manifest.json"
        if not file.is_file():
            return {"identity": self.identity, "files": {}}
        found = read_json(file)
        check_json(found, _MANIFEST, file)
        return found

    def _checked(self, name: str) -> Path | None:
        """A file that is what the manifest says, or None if it names none."""
        entry = self._manifest()["files"].get(name)
        if entry is None:
            return None
        file = self.folder / name
        whole = file.is_file() and file.stat().st_size == entry["bytes"]
        if whole and read_sha256(file) == entry["sha256"]:
            return file
        if self.passing:
            return None
        raise InputError(
            f"{file} is damaged (its checksum differs from manifest.json): delete the "
            "file and its entry, and it is harvested again"
        )

    def _write(self, name: str, tensors: dict[str, np.ndarray]) -> None:
        file = self.folder / name
        # safetensors writes the memory, whatever the strides say
        tensors = {name: np.ascontiguousarray(x) for name, x in tensors.items()}
        with atomic_path(file) as temporary:
            safetensors.numpy.save_file(tensors, temporary)
        manifest = self._manifest()
        entry = {"sha256": read_sha256(file), "bytes": file.stat().st_size}
        manifest["files"][name] = entry
        write_text(self.folder / "manifest.json", to_json(manifest, indent=1))


def _name(chunk: int) -> str:
    return f"chunk_{chunk:06d}.safetensors"


def _tensors(
    file: Path, shapes: Mapping[str, tuple[int | None, ...]]
) -> dict[str, np.ndarray]:
    """Floats of a file, of these shapes; None stands for any length."""
    try:
        found = safetensors.numpy.load_file(file)
    except (safetensors.SafetensorError, OSError, KeyError, ValueError) as error:
        raise InputError(f"{file} is no safetensors file: delete it") from error
    for name, shape in shapes.items():
        x = found.get(name)
        if (
            x is None
            or x.dtype not in DTYPES.values()
            or len(x.shape) != len(shape)
            or any(n not in (None, m) for n, m in zip(shape, x.shape, strict=True))
        ):
            raise InputError(f"{file} holds no {name} of this model: delete it")
    return found
