"""Compiled programs are kept between runs, for every command that computes."""

from __future__ import annotations

import os

import jax

from jaxclt.files.digest import cache_root

__all__ = ["use_compilation_cache"]


def use_compilation_cache() -> None:
    """A second run of a shape starts without compiling.

    The programs lie in the user cache, or where ``JAX_COMPILATION_CACHE_DIR`` says.
    """
    jax.config.update(
        "jax_compilation_cache_dir",
        os.environ.get("JAX_COMPILATION_CACHE_DIR", str(cache_root() / "xla")),
    )
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.1)
