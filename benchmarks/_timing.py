"""Wall and CPU time, memory, and what the machine could do at best.

Nothing here imports jax before it is needed: the peer's environment has none.
"""

from __future__ import annotations

import dataclasses
import hashlib
import os
import platform
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any


@dataclasses.dataclass(frozen=True)
class Times:
    """Seconds of some runs of one thing."""

    wall_s: list[float]
    cpu_s: list[float]  # of all threads

    def summary(self) -> dict[str, Any]:
        return {
            "wall_median_s": statistics.median(self.wall_s),
            "wall_min_s": min(self.wall_s),
            "cpu_median_s": statistics.median(self.cpu_s),
            "wall_s": self.wall_s,
            "cpu_s": self.cpu_s,
        }


def timed(fn: Callable[[], Any]) -> tuple[Any, float, float]:
    """Result, wall and CPU seconds of one call, finished on every device."""
    wall, cpu = time.perf_counter(), time.process_time()
    result = fn()
    if "jax" in sys.modules:
        sys.modules["jax"].block_until_ready(result)
    return result, time.perf_counter() - wall, time.process_time() - cpu


def repeat(fn: Callable[[], Any], n: int, at_most_s: float = float("inf")) -> Times:
    """Time `n` calls; none is begun after `at_most_s` seconds, the first always is."""
    wall_s, cpu_s = [], []
    while not wall_s or (len(wall_s) < n and sum(wall_s) < at_most_s):
        _, wall, cpu = timed(fn)
        wall_s.append(wall)
        cpu_s.append(cpu)
    return Times(wall_s, cpu_s)


def matmul_peak(dtype: str = "float32", sizes: tuple[int, ...] = (512, 1024, 2048)):
    """The fastest square matmul measured, in GFLOP/s, at the highest precision."""
    import jax
    import jax.numpy as jnp

    @jax.jit
    def product(a: jax.Array, b: jax.Array) -> jax.Array:
        return jnp.matmul(a, b, precision="highest")

    best = 0.0
    for n in sizes:
        a, b = jax.random.normal(jax.random.key(n), (2, n, n), dtype)
        jax.block_until_ready(product(a, b))
        runs = repeat(lambda a=a, b=b: product(a, b), n=8)
        best = max(best, 2 * n**3 / min(runs.wall_s) / 1e9)
    return best


def peak_rss_gib() -> float:
    """Most memory this process ever held.

    VmHWM and not ru_maxrss: the latter is inherited from the process that started us.
    """
    status = Path("/proc/self/status")
    if status.is_file():
        line = next(x for x in status.read_text().splitlines() if "VmHWM" in x)
        return int(line.split()[1]) / 2**20
    unit = 1 if sys.platform == "darwin" else 1024  # macOS counts bytes
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**30


def load_average() -> float:
    return round(os.getloadavg()[0], 2)


def hardware_line() -> str:
    """Processor, cores, device, versions and how busy the machine is."""
    import jax

    device = jax.devices()[0]
    where = "" if device.platform == "cpu" else f", {device.device_kind}"
    return (
        f"{_cpu_model()}, {os.cpu_count()} cores{where}, jax {jax.__version__}, "
        f"Python {platform.python_version()}, load average {load_average()}"
    )


def _cpu_model() -> str:
    info = Path("/proc/cpuinfo")
    if info.is_file():
        for line in info.read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()


def library_root() -> Path:
    """The tree that jaxclt is imported from, which need not be the one of this file."""
    import jaxclt

    return Path(jaxclt.__file__).resolve().parents[1]


def git_sha() -> str:
    """Short commit of the library's tree; `+` and a digest of any changes to it."""
    root = library_root()

    def git(*args: str) -> str:
        command = ["git", "-C", str(root), *args, "--", "jaxclt", "benchmarks/*.py"]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        return done.stdout

    commit = subprocess.run(
        ["git", "-C", str(root), "rev-parse", "--short", "HEAD"],
        capture_output=True,
        text=True,
        check=False,
    ).stdout.strip()
    new = git("ls-files", "--others", "--exclude-standard").split("\n")[:-1]
    texts = [git("diff", "HEAD"), *((root / name).read_text() for name in new)]
    changed = "".join(texts).encode()
    digest = f"+{hashlib.sha256(changed).hexdigest()[:6]}" if changed else ""
    return (commit or "unknown") + digest


def put_on_top(path: Path, text: str) -> None:
    """Put a section of results under the file's header, before older ones."""
    old = path.read_text() if path.is_file() else "# Results\n\nNewest first.\n"
    header, mark, rest = old.partition("\n## ")
    path.write_text(f"{header.rstrip()}\n\n{text}{mark}{rest}")
