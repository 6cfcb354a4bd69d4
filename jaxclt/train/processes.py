"""One run on several machines: a process each, through `jax.distributed`.

Start the same command with the same --out (a folder that all of them see) on every
machine: with ``--processes auto`` where JAX knows the cluster (Cloud TPU, Slurm, Open
MPI, Kubernetes), else with ``--processes HOST:PORT,N,I``: the first machine's address,
how many there are, and which one this is, from 0. ``--mesh`` then spans the devices of
all. Every process harvests the same activations, so only the step is divided; process
0 writes the files, and all take part in checkpoints. A store is read by all and
written by process 0.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils

from jaxclt.errors import InputError

__all__ = ["agree", "is_first", "parse_processes", "same", "start", "to_host", "wait"]

_WHERE = re.compile(r"(?P<address>[^,\s]+:\d{1,5}),(?P<n>\d{1,9}),(?P<i>\d{1,9})")


def parse_processes(text: str) -> dict[str, Any]:
    """Arguments of `jax.distributed.initialize`.

    Raises:
      InputError: if it is neither ``auto`` nor ``HOST:PORT,N,I``.
    """
    if text == "auto":
        return {}
    found = _WHERE.fullmatch(text)
    if found is None or not 0 <= int(found["i"]) < int(found["n"]):
        raise InputError(
            f"--processes {text!r}: write auto, or HOST:PORT,N,I with I in 0..N-1"
        )
    return {
        "coordinator_address": found["address"],
        "num_processes": int(found["n"]),
        "process_id": int(found["i"]),
    }


def start(text: str) -> None:
    """Join the other processes; before anything else uses JAX. Nothing if empty.

    Raises:
      InputError: for what `parse_processes` refuses, or if the others cannot be joined.
    """
    if not text:
        return
    arguments = parse_processes(text)
    # It would take SIGTERM for itself, on which this process writes a checkpoint.
    jax.config.update("jax_enable_preemption_service", False)
    try:
        jax.distributed.initialize(**arguments)
    except (RuntimeError, ValueError) as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise InputError(f"--processes {text}: {reason}") from error


def is_first() -> bool:
    """Whether this process writes the files."""
    return jax.process_index() == 0


def wait(name: str) -> None:
    """Until all processes are here."""
    if jax.process_count() > 1:
        multihost_utils.sync_global_devices(name)


def same(tree: Any) -> Any:
    """What process 0 has, in all of them."""
    if jax.process_count() == 1:
        return tree
    return multihost_utils.broadcast_one_to_all(tree)


def agree(ask: Callable[[], bool], met: bool) -> bool:
    """Whether all processes are to stop here, as process 0 finds where they meet."""
    if jax.process_count() == 1:
        return ask()
    return met and bool(same(np.asarray(ask())))


def to_host(tree: Any) -> Any:
    """Whole arrays in numpy, wherever their parts are."""
    if jax.process_count() == 1:
        return jax.device_get(tree)

    def whole(x: Any) -> np.ndarray:
        if not isinstance(x, jax.Array) or x.is_fully_addressable:
            return np.asarray(x)
        if x.is_fully_replicated:
            return np.asarray(x.addressable_data(0))
        return np.asarray(multihost_utils.process_allgather(x, tiled=True))

    return jax.tree.map(whole, tree)
