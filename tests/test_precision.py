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
    # Without places in the source, which would end every line.
    jax.config.update("jax_include_debug_info_in_dumps", False)
    jax.config.update("jax_dump_ir_to", str(folder))
    try:
        yield folder
    finally:
        jax.config.update("jax_dump_ir_to", "")
        jax.config.update("jax_include_debug_info_in_dumps", True)


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
    jax.clear_caches()  # a program that is known already would not be made
    folder = tmp_path_factory.mktemp("precision")
    write_text(folder / "text")
    return folder


def tracing(place: Path) -> None:
    run("trace", PROMPT, *BOTH, "--out", place / "traced", "--attention", 1)
    report = json.loads((place / "traced" / "report.json").read_text())
    assert report["environment"]["precision"] == "highest"
    feature = ("--feature", a_feature(place / "traced"), "--scale", 0)
    for mode in ("constrained", "iterative"):
        run("patch", place / "traced", *feature, "--mode", mode)


def gathering(place: Path) -> None:
    text = ("--data", place / "text", "--context", 32)
    run("features", *BOTH, *text, "--tokens", 200, "--out", place / "features")
    more = ("--tokens", 200, "--features", "top:32", "--heads", "1:0")
    run("globals", *BOTH, *text, *more, "--out", place / "globals")


def training(place: Path) -> None:
    config = tiny_config(
        compute="float32", tokens=64, heldout_tokens=64, graph_features=0
    )
    flags = as_flags(config, out=place / "trained")
    run("train", "--model", MODEL, "--data", place / "text", *flags)


def validating(place: Path) -> None:
    run("validate", place / "traced", "--n-features", 3)


def evaluating(place: Path) -> None:
    text = ("--data", place / "text", "--context", 32, "--tokens", 400)
    small = ("--agreement-tokens", 64, "--layer-tokens", 32, "--graphs", 2)
    small += ("--perturbed", 0, "--sort", 0, "--contrastive", 0, "--baselines", 1.0)
    more = ("--filter", "none", "--max-features", 16)
    run("eval", *BOTH, *text, *small, *more, "--out", place / "eval")


def rarer(place: Path) -> None:
    traced = place / "response"
    more = ("--response", "--heads", 3, "--attention", 1, "--foil", "id:5")
    more += ("--counterfactual", " ".join([*PROMPT.split()[:-1], "w5"]))
    run("trace", PROMPT, *BOTH, "--out", traced, *more)
    feature = ("--feature", a_feature(traced), "--scale", 0)
    run("patch", traced, *feature, "--mode", "additive", "--sweep-end")
    run("patch", traced, *feature, "--patterns", "live", "--generate", 1)
    run("patch", traced, *feature, "--qk", "L2H0:query")
    nodes = json.loads((traced / "graph.json").read_text())["links"][0]
    run("explain", traced, nodes["source"], nodes["target"], "--hops")
    run("explain", traced, 0, 1, "--head", "1:0")


slow = pytest.param(rarer, marks=pytest.mark.slow)


@pytest.mark.parametrize(
    "commands", [tracing, gathering, training, validating, evaluating, slow]
)
def test_every_command_asks_for_exact_products(
    commands: Callable[[Path], None], place: Path, tmp_path: Path
):
    with dumped(tmp_path):
        commands(place)
    assert not inexact(tmp_path)
    assert sum("HIGHEST" in dot.asked for dot in dots(tmp_path)) > 10


@pytest.fixture
def accelerator(monkeypatch: pytest.MonkeyPatch) -> None:
    """Presets are asked for as if there were one."""
    monkeypatch.setattr("jaxclt.precision._PRESETS", ())


@pytest.mark.slow
@pytest.mark.usefixtures("accelerator")
def test_a_preset_is_what_every_product_of_a_trace_is_computed_by(
    place: Path, monkeypatch: pytest.MonkeyPatch
):
    """A CPU has none for batches of products: it computes in full what asks for it."""
    bind, seen, preset = dot_general_p.bind, [], "BF16_BF16_F32_X6"
    full = (jax.lax.Precision.HIGHEST,) * 2

    def exact(a: jax.Array, b: jax.Array, **how: object) -> object:
        seen.append(how["precision"])
        return bind(a, b, **how | {"precision": full})

    jax.clear_caches()
    with monkeypatch.context() as now:
        now.setattr(dot_general_p, "bind", exact)
        run("trace", PROMPT, *BOTH, "--out", place / "six", "--precision", preset)
    jax.clear_caches()
    # Derivatives ask for what their products were given.
    assert set(seen) == {jax.lax.DotAlgorithmPreset[preset], full}
    report = json.loads((place / "six" / "report.json").read_text())
    assert report["environment"]["precision"] == preset
    assert report["certificate"]["max_relative_row_error"] < 1e-5


# -- what an accelerator would make of it ----------------------------------------------


@contextmanager
def coarse(patch: pytest.MonkeyPatch) -> Iterator[None]:
    """Operands of float32 products below HIGHEST are rounded to bfloat16."""
    bind = dot_general_p.bind

    def rounding(a: jax.Array, b: jax.Array, **how: object) -> object:
        exact = how["precision"] == (jax.lax.Precision.HIGHEST,) * 2
        if not exact and a.dtype == b.dtype == jnp.float32:
            a, b = (jax.lax.reduce_precision(x, 8, 7) for x in (a, b))
        return bind(a, b, **how)

    with patch.context() as now:
        now.setattr(dot_general_p, "bind", rounding)
        jax.clear_caches()
        yield
    jax.clear_caches()


def test_graphs_and_patches_are_exact_on_devices_that_round(
    monkeypatch: pytest.MonkeyPatch,
):
    model = jaxclt.load_model(MODEL)
    dictionary = jaxclt.load_dictionary(str(DICTIONARY), model)

    def traced(**config: object) -> tuple[jaxclt.Graph, float]:
        graph = jaxclt.attribute(model, dictionary, PROMPT, **config)
        return graph, jaxclt.certificate(graph).max_relative_row_error

    here, _ = traced()
    with coarse(monkeypatch):
        graph, error = traced()
        assert error < 1e-5
        assert np.array_equal(graph.feature_A, here.feature_A)
        np.testing.assert_allclose(graph.edge_RN, here.edge_RN, atol=1e-5)
        layer, pos, feature = (int(x) for x in graph.feature(0))
        edit = jaxclt.Edit(layer=layer, pos=pos, feature=feature, scale=1.0)
        for mode in ("constrained", "iterative"):
            done = jaxclt.patch(model, dictionary, graph, [edit], mode=mode)
            for row in done.targets:
                assert row["logit_after"] == row["logit_before"]
        # The emulation tells: so much is lost if no more is asked for.
        assert traced(precision="default")[1] > 1e-4


# -- how it is asked for ---------------------------------------------------------------


def asked_by(program: Callable[..., object]) -> str:
    """How the one dot of a program is to be computed."""
    text = program.lower(jnp.ones((2, 2))).as_text()  # pyright: ignore
    (line,) = (x for x in text.splitlines() if "dot_general" in x)
    return line.partition("precision = ")[2]


@pytest.mark.usefixtures("accelerator")
def test_programs_follow_what_is_asked_and_nothing_else():
    square = jit(lambda x: x @ x)
    theirs = jax.jit(lambda x: x @ x)
    assert asked_by(square).startswith("[HIGHEST, HIGHEST]")
    # Neither the setting of the process counts nor is it changed.
    with jax.default_matmul_precision("tensorfloat32"):
        assert asked_by(square).startswith("[HIGHEST, HIGHEST]")
        assert asked_by(theirs).startswith("[HIGH, HIGH]")
    with at_precision("default"):
        assert "HIGH" not in asked_by(square)
        assert asked_by(jit(lambda x: precise(jnp.dot)(x, x))) == asked_by(square)
        with at_precision("BF16_BF16_F32_X6"):
            assert "num_primitive_operations = 6" in asked_by(square)
        assert "HIGH" not in asked_by(square)
    assert asked_by(theirs) == asked_by(jax.jit(lambda x: x @ x))
    # Each has a program of its own, kept.
    x = jnp.ones((2, 2))
    for precision in ("highest", "default", "highest"):
        with at_precision(precision):
            square(x)
    assert square._cache_size() == 2


@pytest.mark.usefixtures("accelerator")
def test_halves_are_multiplied_as_halves():
    """Training in bfloat16 is what was asked for, whatever float32 products are."""
    for precision in ("highest", "BF16_BF16_F32_X6"):
        with at_precision(precision):
            half = asked_by(jit(lambda x: matmul(x, x, "bfloat16")))
            full = asked_by(jit(lambda x: matmul(x, x, "float32")))
        assert "tensor<2x2xbf16>, tensor<2x2xbf16>" in half
        assert "algorithm" not in half
        assert "HIGHEST" in full or "num_primitive_operations = 6" in full


def test_what_cannot_be_had_is_refused_before_anything_is_loaded(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    def refused(*flags: object) -> str:
        with pytest.raises(SystemExit) as stop:
            run("trace", "any", "--model", "nowhere", "--dictionary", "x", *flags)
        assert stop.value.code == 2
        return capsys.readouterr().err

    out = ("--out", tmp_path / "out")
    assert "is for accelerators" in refused(*out, "--precision", "TF32_TF32_F32_X3")
    assert "attribution needs float32" in refused(*out, "--dtype", "bfloat16")
    with pytest.raises(InputError, match="choose one of highest, high, default"):
        jaxclt.AttributeConfig(precision="half")
    with at_precision("high"):
        assert jaxclt.AttributeConfig().precision == "high"


def test_nothing_goes_past_the_one_place():
    """No program is made, and no precision set, but in jaxclt/precision.py."""
    root = Path(jaxclt.__file__).parent
    for path in sorted(root.rglob("*.py")):
        if path.name == "precision.py":
            continue
        for node in ast.walk(ast.parse(path.read_text("utf-8"))):
            if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
                said = f"{node.value.id}.{node.attr}"
                assert said not in ("jax.jit", "jax.pmap"), path
                assert node.attr != "default_matmul_precision", path
