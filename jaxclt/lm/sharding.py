"""A model's weights over several devices: which axes are split, as data.

Heads, key/value heads, MLP neurons and the vocabulary are split, the residual stream is
on every device: whatever reads it is then local, and XLA adds up what heads and neurons
of all devices write. The suffix of a leaf's name says its axes (`jaxclt.types`), so
that one table of letters serves all leaves. An axis that the devices do not divide
stays whole on each of them.
"""

from __future__ import annotations

from collections.abc import Mapping

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from jaxclt.errors import InputError
from jaxclt.types import LMParams

__all__ = ["SPLIT", "kept_whole", "leaf_shapes", "leaf_sharding", "model_mesh"]

# Letters of the axes that are split; no leaf has two of them.
SPLIT: Mapping[str, str] = {
    "V": "vocabulary",
    "H": "heads",
    "G": "key/value heads",
    "I": "MLP neurons",
}
AXIS = "model"


def model_mesh(devices: int | Mesh) -> Mesh:
    """The mesh that a model is split over: the machine's first devices, or a given one.

    Its axis `model` splits the weights, or the only axis it has; they are the same
    along all others.

    Raises:
      InputError: if there are fewer devices, or no axis is called so.
    """
    if isinstance(devices, Mesh):
        names = devices.axis_names
        if AXIS not in names and len(names) != 1:
            raise InputError(
                f"the mesh has the axes {', '.join(map(str, names))}: call the one "
                f"that splits the weights {AXIS!r}"
            )
        renamed = tuple(AXIS if len(names) == 1 else name for name in names)
        # XLA finds the shardings of what is computed: the model's code names none.
        return Mesh(devices.devices, renamed)
    there = jax.devices()
    if not 1 <= devices <= len(there):
        raise InputError(
            f"a model cannot be split over {devices} devices: this machine has "
            f"{len(there)}"
        )
    return Mesh(np.array(there[:devices]), (AXIS,))


def _letters(name: str) -> str:
    """Axes of a leaf by its name; none of a scalar or of what is not split."""
    suffix = name.rpartition("_")[2]
    return suffix if suffix.isupper() else ""


def leaf_sharding(name: str, shape: tuple[int, ...], mesh: Mesh) -> NamedSharding:
    """Where a leaf of `LMParams` or `Block` lies on the mesh."""
    n = mesh.shape[AXIS]
    split = [
        AXIS if letter in SPLIT and size % n == 0 else None
        for letter, size in zip(_letters(name), shape, strict=True)
    ]
    return NamedSharding(mesh, PartitionSpec(*split) if any(split) else PartitionSpec())


def leaf_shapes(params: LMParams) -> dict[str, tuple[int, ...]]:
    """Shape of every leaf by its name."""
    parts = {**vars(params.blocks), **vars(params)}
    return {
        name: leaf.shape
        for name, leaf in parts.items()
        if leaf is not None and name != "blocks"
    }


def kept_whole(shapes: Mapping[str, tuple[int, ...]], mesh: Mesh) -> tuple[str, ...]:
    """What every device holds whole although it is in the table, one line an axis."""
    n = mesh.shape[AXIS]
    found: dict[tuple[str, int], list[str]] = {}
    for name, shape in shapes.items():
        for letter, size in zip(_letters(name), shape, strict=True):
            if letter in SPLIT and size % n:
                found.setdefault((letter, size), []).append(name)
    return tuple(
        f"{SPLIT[letter]}: {size:,} over {n} devices leave a rest, so each holds all "
        f"of {', '.join(names)}"
        for (letter, size), names in found.items()
    )
