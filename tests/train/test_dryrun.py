"""What --dry-run predicts, against what XLA plans for the same step."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import pytest

from jaxclt.train import dryrun
from jaxclt.train import step as steps
from jaxclt.train.config import TrainConfig
from jaxclt.train.objectives import Batch, Standard, Terms
from jaxclt.train.params import Spec, init
from jaxclt.train.schedules import Weights

ONE = {"data": 1, "feature": 1}


def planned(compiled: Any) -> int:
    """Bytes at the peak of a program: what it is given, gives and uses on the way."""
    m = compiled.memory_analysis()
    return (
        m.argument_size_in_bytes
        + m.output_size_in_bytes
        - m.alias_size_in_bytes
        + m.temp_size_in_bytes
    )


def bytes_of(tree: Any) -> int:
    return sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(tree))


def xla(spec: Spec, T: int, memory: str, accumulate: int) -> tuple[float, float]:
    """Peak bytes and FLOP of a step, compiled for shapes; nothing is run."""
    tx = steps.optimiser(1e-3)
    recipe = steps.Recipe(
        n_steps=10,
        weights=Weights(sparsity=1e-3),
        memory=memory,
        accumulate=accumulate,
    )
    step: Any = steps.make_step(Standard(Terms()), spec, tx, recipe)
    key = jax.random.key(0)
    state = jax.eval_shape(lambda: steps.init_state(init(key, spec), tx, key))
    L, F, D = spec.n_layers, spec.n_features, spec.d_model
    x_LTD = jax.ShapeDtypeStruct((L, T, D), jnp.float32)
    dead_LF = jax.ShapeDtypeStruct((L, F), bool)
    batch = Batch(read_LTD=x_LTD, write_LTD=x_LTD, dead_LF=dead_LF)  # pyright: ignore
    if memory != "per_source":
        compiled = step.lower(state, batch).compile()
        return planned(compiled), compiled.cost_analysis()["flops"]
    compiled = step.forward.lower(state, batch).compile()
    peak, flop = planned(compiled), compiled.cost_analysis()["flops"]
    now, back, _ = jax.eval_shape(step.forward, state, batch)
    held = bytes_of((state, batch, back))
    norm = jax.ShapeDtypeStruct((), jnp.float32)
    for l in range(L):
        near = steps.near(back, l, spec)
        x = jax.eval_shape(lambda b, l=l: b.layer(l), batch)
        given = (state.params[l], state.opt[l], near, x, now, norm)
        compiled = step.update.lower(*given).compile()
        flop += compiled.cost_analysis()["flops"]
        own = bytes_of(given[:3])  # in `held` already
        peak = max(peak, held - own + planned(compiled))
    return peak, flop


@pytest.mark.parametrize("memory", ["full", "remat", "per_source"])
@pytest.mark.parametrize(
    ("span", "activation", "F", "T"),
    [
        (5, "jumprelu", 256, 128),
        pytest.param(5, "jumprelu", 128, 1024, marks=pytest.mark.slow),
        pytest.param(1, "batch_topk", 256, 256, marks=pytest.mark.slow),
        pytest.param(3, "relu", 512, 64, marks=pytest.mark.slow),
        pytest.param(3, "relu", 256, 512, marks=pytest.mark.slow),
    ],
)
def test_bytes_and_flop_are_those_that_xla_plans(
    memory: str, span: int, activation: str, F: int, T: int
):
    check(memory, span, activation, F, T, accumulate=1)


@pytest.mark.slow
def test_accumulation_takes_a_second_gradient_and_less_for_activations():
    check("full", 5, "jumprelu", 128, 1024, accumulate=4)


def check(memory: str, span: int, activation: Any, F: int, T: int, accumulate: int):
    sparse = activation == "batch_topk"
    spec = Spec(
        n_layers=5,
        d_model=64,
        n_features=F,
        span=span,
        activation=activation,
        k=8 if sparse else None,
    )
    config = TrainConfig(
        features=F,
        span=span,
        activation=activation,
        l0=8.0 if sparse else 0.0,
        batch_tokens=T,
        memory=memory,  # pyright: ignore
        accumulate=accumulate,
        buffer="float32",
    )
    peak, flop = xla(spec, T, memory, accumulate)
    found = sum(dryrun.device_bytes(spec, config, ONE).values())
    assert abs(found / peak - 1) < 0.15
    ours = T * dryrun.flop_per_token(spec, recompute=dryrun.recomputes(memory))
    if accumulate == 1:  # XLA counts the body of a loop once
        assert 0 < flop / ours - 1 < 0.15  # elementwise work is in its count as well
