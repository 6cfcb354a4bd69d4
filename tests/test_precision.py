"""Every float32 product is as exact as was asked, in every command and call.

A CPU computes float32 in full whatever it is told, so that results here cannot tell.
What can: the programs as they are given to the compiler, and an emulation of devices
that round the operands of what is not asked to be exact.
"""

from __future__ import annotations

import ast
import json
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.extend.core.primitives import dot_general_p
from tiny_run import GOLDEN, MODEL, as_flags, tiny_config, write_text

import jaxclt
from jaxclt.cli import main as cli
from jaxclt.errors import InputError
from jaxclt.precision import at_precision, jit, precise
from jaxclt.train.matmul import matmul

DICTIONARY = GOLDEN / "dictionary"
PROMPT = str(np.load(GOLDEN / "graph.npz")["prompt"])
BOTH = ("--model", MODEL, "--dictionary", DICTIONARY)


def run(*args: object) -> None:
    cli.main([str(arg) for arg in args])


class Dot(NamedTuple):
    program: str
    types: str  # of operands and result
    asked: str  # precision and algorithm


def dots(folder: Path) -> Iterator[Dot]:
    """All dots and convolutions of dumped programs."""
    for path in sorted(folder.glob("*.mlir")):
        for line in path.read_text().splitlines():
            if "stablehlo.dot_general" in line or "stablehlo.convolution" in line:
                said, _, types = line.rpartition(" : ")
                yield Dot(path.name, types, said.partition("precision")[2])


@contextmanager
def dumped(folder: Path) -> Iterator[Path]:
    """Every program that is made meanwhile is written to a folder."""
    jax.clear_caches()  # one that is known already would not be made
    names = {"jax_dump_ir_to": str(folder), "jax_dump_ir_modes": "stablehlo"}
    before = {name: getattr(jax.config, name) for name in names}
    try:
        for name, value in names.items():
            jax.config.update(name, value)
        yield folder
    finally:
        for name, value in before.items():
            jax.config.update(name, value)


def inexact(folder: Path) -> list[Dot]:
    """Dots of float32 that are not asked to be exact."""
    return [
        dot
        for dot in dots(folder)
        if re.search(r"\bf32|xf32", dot.types) and "[HIGHEST, HIGHEST]" not in dot.asked
    ]


def a_feature(traced: Path) -> str:
    nodes = json.loads((traced / "graph.json").read_text())["nodes"]
    found = (n["node_id"] for n in nodes if n["feature_type"].startswith("cross"))
    layer, feature, pos = next(found).split("_")
    return f"{layer}:{pos}:{feature}"


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("precision")
    write_text(folder / "text", 20)
    return folder


def tracing(place: Path) -> None:
    more = ("--response", "--heads", 3, "--attention", 1, "--foil", "id:5")
    run("trace", PROMPT, *BOTH, "--out", place / "traced", *more)
    traced = place / "traced"
    feature = ("--feature", a_feature(traced), "--scale", 0)
    for mode in ("constrained", "iterative", "additive"):
        run("patch", traced, *feature, "--mode", mode)
    run("patch", traced, *feature, "--patterns", "live", "--generate", 1)
    run("patch", traced, *feature, "--qk", "L2H0:query")
    nodes = json.loads((traced / "graph.json").read_text())["links"][0]
    run("explain", traced, nodes["source"], nodes["target"], "--hops")
    run("explain", traced, 0, 1, "--head", "1:0")


def others(place: Path) -> None:
    text = ("--data", place / "text", "--context", 32)
    run("features", *BOTH, *text, "--tokens", 200, "--out", place / "features")
    more = ("--tokens", 200, "--features", "top:32", "--heads", "1:0")
    run("globals", *BOTH, *text, *more, "--out", place / "globals")
    config = tiny_config(
        compute="float32", tokens=64, heldout_tokens=64, graph_features=8
    )
    flags = as_flags(config, out=place / "trained")
    run("train", "--model", MODEL, "--data", place / "text", *flags)


def measuring(place: Path) -> None:
    run("validate", place / "traced", "--n-features", 2)
    text = ("--data", place / "text", "--context", 32, "--tokens", 96)
    small = ("--agreement-tokens", 64, "--layer-tokens", 32, "--graphs", 1)
    small += ("--perturbed", 0, "--sort", 2, "--contrastive", 2, "--baselines", 1.0)
    more = ("--filter", "none", "--max-features", 16)
    run("eval", *BOTH, *text, *small, *more, "--out", place / "eval")


@pytest.mark.parametrize("commands", [tracing, others, measuring])
def test_every_command_asks_for_exact_products(
    commands: Callable[[Path], None], place: Path, tmp_path: Path
):
    with dumped(tmp_path):
        commands(place)
    assert not inexact(tmp_path)
    assert sum("HIGHEST" in dot.asked for dot in dots(tmp_path)) > 50
