"""Fill LMParams from named tensors of a file, on one device or split over a mesh.

A leaf is made part by part: what one device holds of it is read, by slices of the
stored tensors, put on the device, and forgotten. No host ever holds more of the model
than one such part, and no device more than its share.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Collection, Mapping
from concurrent.futures import ThreadPoolExecutor
from fnmatch import fnmatchcase
from itertools import pairwise
from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.sharding import Mesh

from jaxclt.errors import InputError
from jaxclt.io.names import (
    Layout,
    Row,
    Source,
    find_part,
    leaf_sizes,
    stored_shape,
    tensor_name,
    to_leaf,
)
from jaxclt.lm.config import LMConfig
from jaxclt.lm.layers import Norm, norm_scale
from jaxclt.lm.sharding import leaf_sharding
from jaxclt.types import Block, LMParams

__all__ = ["Stored", "read_params"]


class GetPart(Protocol):
    """A file's tensors by name."""

    def __call__(self, name: str, part: tuple[slice, ...], /) -> np.ndarray:
        """A slice of each axis of a tensor, float32; called from several threads."""
        ...


class Stored(NamedTuple):
    """Named tensors of a model's files."""

    where: str  # the file or directory, for messages
    source: Source  # whose names and channel order it uses
    shapes: Mapping[str, tuple[int, ...]]  # of every tensor there
    get: GetPart


def read_params(
    stored: Stored,
    cfg: LMConfig,
    layout: Layout,
    *,
    dtype: str = "float32",
    mesh: Mesh | None = None,
) -> LMParams:
    """Fill LMParams from named tensors.

    Args:
      stored: the tensors.
      cfg: sizes of the model.
      layout: which leaves there are, and where.
      dtype: of the leaves.
      mesh: devices to split them over, see `jaxclt.lm.sharding`; None for one device.

    Raises:
      InputError: for a missing, unknown, wrongly shaped or not finite tensor.
    """
    where, source = stored.where, stored.source
    if cfg.n_layers > len(stored.shapes):
        raise InputError(
            f"{where}: the config has {cfg.n_layers} layers but the weights only "
            f"{len(stored.shapes)} tensors"
        )
    rows = [row for row in layout.rows if row.exists(layout.options)]
    # Before anything is allocated: a damaged config may ask for any amount.
    _check(stored, rows, cfg, layout)
    offset, size = np.float32(layout.gain_offset), leaf_sizes(cfg)
    # Most of the time is numpy on large arrays, which releases the interpreter lock.
    pool = ThreadPoolExecutor(4)

    def read(row: Row, layer: int, index: tuple[slice, ...], out: np.ndarray) -> None:
        inside = dict(zip(row.axes, index, strict=True))
        part = find_part(row, cfg, source, inside)
        name = tensor_name(row, source, layer)
        w = stored.get(name, part.stored)
        if not np.isfinite(w).all():
            raise InputError(f"{where}: tensor {name} contains NaN or infinity")
        leaf = to_leaf(w, row, source, part)
        leaf = leaf + offset if offset and row.is_gain else leaf
        times = layout.scales.get(row.leaf, 1.0)
        times = times[layer] if isinstance(times, tuple) else times
        out[...] = leaf if times == 1 else leaf * np.float32(times)

    def part_of(row: Row, index: tuple[slice, ...]) -> np.ndarray:
        """A part of a leaf, read by several threads."""
        out = np.empty([x.stop - x.start for x in index], jnp.dtype(dtype))
        if row.fill is not None:
            out[...] = row.fill
            return out
        jobs = [(0, *piece) for piece in _pieces(index, out)]
        if row.per_layer:
            jobs = [(layer, index[1:], out[layer]) for layer in range(cfg.n_layers)]
        for _ in pool.map(lambda job: read(row, *job), jobs):
            pass
        return out

    def leaf(row: Row) -> Array:
        shape = (cfg.n_layers,) * row.per_layer + tuple(size[x] for x in row.axes)
        return _placed(row.leaf, shape, mesh, lambda index: part_of(row, index))

    with pool:
        arrays = {row.leaf: leaf(row) for row in rows}
    return _assembled(arrays, layout, dtype, mesh)


def _assembled(
    arrays: dict[str, Array], layout: Layout, dtype: str, mesh: Mesh | None
) -> LMParams:
    """The leaves that were read, and what no file holds."""
    if layout.embed_eps is not None:  # it has no gain, so that it is the tokens' own
        embed_VD = arrays["embed_VD"].astype(jnp.float32)
        unit = Norm(jnp.ones(embed_VD.shape[1:], jnp.float32))
        scale_V = norm_scale(embed_VD, unit, eps=layout.embed_eps)
        arrays["embed_VD"] = (embed_VD * scale_V[:, None]).astype(jnp.dtype(dtype))
    for name, said, kind in (
        ("local_L", layout.local, "bool"),
        ("turning_L", layout.turning, "bool"),
        ("embed_scale", layout.embed_scale, dtype),
        ("logit_cap", layout.logit_cap, dtype),
    ):
        if said is not None:
            value = np.asarray(said, jnp.dtype(kind))
            arrays[name] = _placed(name, value.shape, mesh, value.__getitem__)
    of_blocks = {field.name for field in dataclasses.fields(Block)} & {*arrays}
    blocks = Block(**{name: arrays.pop(name) for name in of_blocks})
    return LMParams(blocks=blocks, **arrays)


_PIECE = 1 << 20  # numbers; the allocator keeps larger ones


def _pieces(
    index: tuple[slice, ...], out: np.ndarray
) -> list[tuple[tuple[slice, ...], np.ndarray]]:
    """A large part cut along its longest axis: work for threads, small temporaries."""
    axis = int(np.argmax(out.shape))
    n = min(-(-out.size // _PIECE), out.shape[axis])
    ends = [out.shape[axis] * i // n for i in range(n + 1)]
    cut = []
    for a, b in pairwise(ends):
        inside = [slice(None)] * out.ndim
        inside[axis] = slice(a, b)
        first = index[axis].start
        at = (*index[:axis], slice(first + a, first + b), *index[axis + 1 :])
        cut.append((at, out[tuple(inside)]))
    return cut


def _placed(
    name: str,
    shape: tuple[int, ...],
    mesh: Mesh | None,
    part_of: Callable[[tuple[slice, ...]], np.ndarray],
) -> Array:
    """A leaf where it belongs; its parts are made one after the other.

    Not `jax.make_array_from_callback`, which asks for the parts of all devices before
    it puts the first one on its device: the host would hold the leaf of all layers.
    """
    everything = tuple(slice(0, n) for n in shape)
    if mesh is None:
        return jnp.asarray(part_of(everything))
    sharding = leaf_sharding(name, shape, mesh)
    indices = sharding.addressable_devices_indices_map(shape)
    places: dict[
        tuple[tuple[int, int], ...], list[Any]
    ] = {}  # devices by what is there
    for device, index in indices.items():
        bounds = [x.indices(n)[:2] for x, n in zip(index or (), shape, strict=True)]
        places.setdefault(tuple(bounds), []).append(device)
    there: dict[Any, Array] = {}
    for bounds, devices in places.items():
        part = part_of(tuple(slice(*bound) for bound in bounds))
        there |= {device: jax.device_put(part, device) for device in devices}
        jax.block_until_ready(list(there.values()))  # before the next part is read
    return jax.make_array_from_single_device_arrays(
        shape, sharding, [there[device] for device in indices]
    )


def _check(
    stored: Stored, rows: Collection[Row], cfg: LMConfig, layout: Layout
) -> None:
    """All tensors that are wanted are there, in their shapes, and no others."""
    where, present = stored.where, set(stored.shapes)
    wanted = {
        tensor_name(row, stored.source, i): stored_shape(row, cfg, stored.source)
        for row in rows
        if row.fill is None
        for i in range(cfg.n_layers if row.per_layer else 1)
    }
    for name in sorted(wanted.keys() - present):
        raise InputError(f"{where}: tensor {name} is missing from the weights")
    # An unread tensor means the model computes something that this library does not.
    for name in sorted(present - wanted.keys()):
        if not any(fnmatchcase(name, x) for x in layout.unread):
            raise InputError(
                f"{where}: tensor {name} does not belong to a model of this "
                "config; its weights and its config disagree"
            )
    for name, shape in wanted.items():
        if stored.shapes[name] != shape:
            raise InputError(
                f"{where}: tensor {name} has shape {stored.shapes[name]} instead of "
                f"{shape}, which the config asks for"
            )
