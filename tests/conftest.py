"""Set-up of the whole suite: jax made strict, eight CPU devices, a cache of its own."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import jax
import pytest

CACHE = str(Path(__file__).parents[1] / ".jax_cache" / "tests")

jax.config.update("jax_numpy_rank_promotion", "raise")
jax.config.update("jax_numpy_dtype_promotion", "strict")
jax.config.update("jax_num_cpu_devices", 8)
# Tiny arrays: nearly all time is compilation. A third of that is optimisation, and half
# of the rest goes through MLIR for each fused kernel, which LLVM alone does as well.
# A fifth of what is left is splitting programs for threads, which these do not fill.
# (Backend options are not checked: a jaxlib that has no such option ignores it.)
_PLAIN = "--xla_backend_extra_options=xla_cpu_disable_new_fusion_emitters"
_PLAIN += " --xla_cpu_parallel_codegen_split_count=1"
os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {_PLAIN}".strip()
# A second run, and the second worker of a first one, finds most of it done.
_COMPILING = {
    "jax_compilation_cache_dir": CACHE,
    "jax_persistent_cache_min_compile_time_secs": 0.1,
    "jax_disable_most_optimizations": True,
}
for name, setting in _COMPILING.items():
    jax.config.update(name, setting)
    os.environ[name.upper()] = str(setting)  # of processes that tests start


MAPS = Path("/proc/self/maps")  # Linux


@pytest.fixture(scope="module", autouse=True)
def _few_programs() -> Iterator[None]:
    """Forget compiled programs before the process runs out of places to map them.

    Each takes several, of the 65,530 that Linux grants; the next compilation after the
    last of them dies of a segmentation fault.
    """
    yield
    if MAPS.exists() and MAPS.read_bytes().count(b"\n") > 40_000:
        jax.clear_caches()


@pytest.fixture(scope="module")
def x64() -> Iterator[None]:
    """Float64 for all tests of a module, where identities hold to rounding.

    Use it by ``pytestmark = pytest.mark.usefixtures("x64")``.
    """
    with jax.enable_x64(True):
        yield
