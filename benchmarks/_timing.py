"""Wall and CPU time, memory, and what the machine could do at best.

Nothing here imports jax before it is needed: the peer's environment has none.
"""

from __future__ import annotations

import argparse
import ctypes
import dataclasses
import datetime
import hashlib
import json
import os
import platform
import resource
import statistics
import subprocess
import sys
import threading
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


def reset_peak_rss() -> None:
    """From here on `peak_rss_gib` counts anew (Linux)."""
    Path("/proc/self/clear_refs").write_text("5")


def release_freed() -> None:
    """Give what was freed back to the system; glibc keeps it otherwise (Linux)."""
    ctypes.CDLL("libc.so.6").malloc_trim(0)


def rss_gib() -> float:
    """Memory of this process now (Linux)."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * resource.getpagesize() / 2**30


class Steps:
    """A worker's end of the talk with a driver that lets it make one step at a time.

    Workers of several tools take turns that way, each idle while another works.
    """

    MARK = "@ "  # of our lines on stdout: libraries print there too

    def ready(self) -> None:
        """Say that everything is loaded; peak memory counts from here."""
        reset_peak_rss()
        self._say({"ready": True})

    def wait(self) -> None:
        """Return when a step is to be made.

        Raises:
          SystemExit: when no more are.
        """
        if sys.stdin.readline().strip() != "step":
            raise SystemExit
        self.wall, self.cpu = time.perf_counter(), time.process_time()

    def done(self) -> None:
        """The step that `wait` began is finished."""
        wall, cpu = time.perf_counter(), time.process_time()
        self._say({"wall_s": wall - self.wall, "cpu_s": cpu - self.cpu})

    def report(self, found: dict[str, Any]) -> None:
        """Last words, with the peak memory."""
        self._say({**found, "peak_rss_gib": peak_rss_gib()})

    def _say(self, what: dict[str, Any]) -> None:
        print(self.MARK + json.dumps(what), flush=True)


class StepsOf:
    """The driver's end: a process that makes steps when told to."""

    def __init__(self, command: list[str], environment: dict[str, str]) -> None:
        self.command = command
        self.process = subprocess.Popen(
            command,
            env=environment,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        self._lines: list[str] = []
        threading.Thread(target=self._drain, daemon=True).start()
        self._hear()

    def _drain(self) -> None:
        assert self.process.stderr is not None
        self._lines.extend(self.process.stderr)

    def _hear(self) -> dict[str, Any]:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            if line.startswith(Steps.MARK):
                return json.loads(line.removeprefix(Steps.MARK))
        self.process.wait()
        time.sleep(0.1)  # for the rest of its stderr
        sys.exit(f"{''.join(self._lines)[-3000:]}\nfailed: {self.command}")

    def step(self) -> tuple[float, float]:
        """Wall and CPU seconds of one step."""
        found = self._ask("step")
        return found["wall_s"], found["cpu_s"]

    def end(self) -> dict[str, Any]:
        """Its report; the process is gone afterwards."""
        found = self._ask("end")
        self.process.wait()
        return found

    def _ask(self, what: str) -> dict[str, Any]:
        assert self.process.stdin is not None
        self.process.stdin.write(what + "\n")
        self.process.stdin.flush()
        return self._hear()


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


def command_line(doc: str | None) -> argparse.ArgumentParser:
    """A script's parser, with what all of them take."""
    parser = argparse.ArgumentParser(description=(doc or "").partition("\n")[0])
    parser.add_argument("--append", type=Path, help="a RESULTS.md to put the result in")
    parser.add_argument("--smoke", action="store_true", help="tiny shapes, seconds")
    return parser


def title(name: str) -> str:
    """Heading of a section of results."""
    return f"## {name}, {datetime.datetime.now(tz=datetime.UTC).date()}, {git_sha()}"


def publish(text: str, append: Path | None) -> None:
    """Print a section, and put it on top of the results if there is a file for it."""
    print(f"\n{text}")
    if append:
        put_on_top(append, text)


def put_on_top(path: Path, text: str) -> None:
    """Put a section of results under the file's header, before older ones."""
    old = path.read_text() if path.is_file() else "# Results\n\nNewest first.\n"
    header, mark, rest = old.partition("\n## ")
    path.write_text(f"{header.rstrip()}\n\n{text}{mark}{rest}")
