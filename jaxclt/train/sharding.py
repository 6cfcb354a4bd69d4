"""The mesh ('data', 'feature'): features split over devices, tokens likewise.

Encoder columns, thresholds and decoder rows of a feature live on one device, so its
decoder norm is local; reconstructions are summed over 'feature', gradients over 'data'.
The only module that names mesh axes.
"""

from __future__ import annotations

import re
from typing import Any

import jax
import numpy as np
from jax import Array
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from jaxclt.errors import InputError, did_you_mean

__all__ = [
    "batch_sharding",
    "make_mesh",
    "parse_mesh",
    "place",
    "shard_state",
    "state_sharding",
]

# By the suffix of a leaf's name; everything else is on every device.
_BY_NAME = {
    "W_enc_FD": P("feature", None),
    "b_enc_F": P("feature"),
    "theta_F": P("feature"),
    "W_dec_FMD": P("feature", None, None),
    "silent_LF": P(None, "feature"),
    "density_LF": P(None, "feature"),
}


def parse_mesh(text: str) -> dict[str, int]:
    """``data=1,feature=8`` as sizes; both axes default to 1.

    Raises:
      InputError: for anything else.
    """
    sizes = {"data": 1, "feature": 1}
    for part in filter(None, text.split(",")):
        name, _, size = part.partition("=")
        if name not in sizes or not re.fullmatch(r"0*[1-9]\d{0,8}", size):
            hint = "" if name in sizes else did_you_mean(name, sizes)
            raise InputError(f"--mesh {text!r}: write it like data=1,feature=8{hint}")
        sizes[name] = int(size)
    return sizes


def make_mesh(sizes: dict[str, int], n_features: int, batch_tokens: int) -> Mesh:
    """The mesh on the devices of all processes.

    Raises:
      InputError: if there are too few devices, or a size does not divide.
    """
    n = sizes["data"] * sizes["feature"]
    if n > jax.device_count():
        raise InputError(
            f"--mesh needs {n} devices and there are {jax.device_count()}: make it "
            "smaller, or use --dry-run"
        )
    if jax.process_count() > 1 and n != jax.device_count():
        raise InputError(
            f"--mesh has {n} devices and the processes {jax.device_count()}: use all"
        )
    for flag, count, axis in (
        ("--features", n_features, "feature"),
        ("--batch-tokens", batch_tokens, "data"),
    ):
        if count % sizes[axis]:
            raise InputError(
                f"{flag} {count} must be a multiple of the {sizes[axis]} devices that "
                "share them"
            )
    return jax.make_mesh(
        (sizes["data"], sizes["feature"]),
        ("data", "feature"),
        devices=jax.devices()[:n],
        axis_types=(jax.sharding.AxisType.Auto,) * 2,
    )


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """Of reads and writes [L, T, D]: tokens over 'data'."""
    return NamedSharding(mesh, P(None, "data", None))


def state_sharding(state: Any, mesh: Mesh) -> Any:
    """Sharding of every leaf of a training state, optimiser moments included."""

    def of(path: tuple, leaf: Any) -> NamedSharding:
        del leaf
        attribute = jax.tree_util.GetAttrKey
        names = (key.name for key in reversed(path) if isinstance(key, attribute))
        return NamedSharding(mesh, _BY_NAME.get(next(names, ""), P()))

    return jax.tree_util.tree_map_with_path(of, state)


def shard_state(state: Any, mesh: Mesh) -> Any:
    """The state laid out on the mesh."""
    return jax.tree.map(place, state, state_sharding(state, mesh))


def place(x: Array, where: NamedSharding) -> Array:
    """An array that every process holds whole, on a mesh that may span them."""
    if jax.process_count() == 1:
        return jax.device_put(x, where)
    whole = np.asarray(x)
    return jax.make_array_from_callback(whole.shape, where, lambda i: whole[i])
