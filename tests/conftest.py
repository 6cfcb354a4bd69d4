"""Set-up of the whole suite: jax made strict, eight CPU devices, no disk cache."""

from __future__ import annotations

from collections.abc import Iterator

import jax
import pytest

jax.config.update("jax_numpy_rank_promotion", "raise")
jax.config.update("jax_numpy_dtype_promotion", "strict")
jax.config.update("jax_num_cpu_devices", 8)
jax.config.update("jax_enable_compilation_cache", False)
# Tiny arrays: nearly all time is compilation, and a third of that is optimisation.
jax.config.update("jax_disable_most_optimizations", True)


@pytest.fixture(scope="module")
def x64() -> Iterator[None]:
    """Float64 for all tests of a module, where identities hold to rounding.

    Use it by ``pytestmark = pytest.mark.usefixtures("x64")``.
    """
    with jax.enable_x64(True):
        yield
