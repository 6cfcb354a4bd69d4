"""In the model, patterns live: predictions and measurements (maths 22.71, 22.72)."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cases import case, case_active

import jaxclt
from jaxclt.patching.change import Change, batched
from jaxclt.patching.features import gather_features
from jaxclt.patching.finite import FINITE, finite_effects
from jaxclt.patching.how import How
from jaxclt.patching.local import make_local
from jaxclt.patching.modes import patched
from jaxclt.patching.patch import measure
from jaxclt.patching.patchable import make_patchable
from jaxclt.patching.plan import plan_patch
from jaxclt.patching.subject import Subject
from jaxclt.validation.ablations import Bench, Counter
from jaxclt.validation.choice import ValidateOptions, choose
from jaxclt.validation.live import patterns_live
from jaxclt.validation.patterns import LIVE, moved_patterns

GOLDEN = Path(__file__).parents[1] / "goldens" / "circuit_tracer_clt"
PROMPT = str(np.load(GOLDEN / "graph.npz")["prompt"])


@pytest.fixture(scope="module")
def subject() -> Subject:
    """Neurons, whose derivative in the model is that of their additive patches."""
    model = jaxclt.load_model(GOLDEN / "model")
    neurons = jaxclt.load_dictionary("neurons:6", model)
    return Subject.of(model, neurons, jaxclt.attribute(model, neurons, PROMPT))


def test_small_patches_follow_the_models_derivative(subject: Subject):
    options = ValidateOptions(n_features=20, n_live=20, live_factor=0.98, n_patterns=0)
    key = jax.random.key(0)
    choice = choose(subject.graph, options, None, key)
    counter = Counter(lambda done, planned: None, 120)
    bench = Bench(
        subject=subject, options=options, choice=choice, key=key, counter=counter
    )
    found = patterns_live(bench)
    assert counter.done == 120
    assert found["patterns"] is None
    small, full = found["small"], found["full"]
    assert (small["predicted_by"], full["predicted_by"]) == ("derivative", "finite")
    assert small["n"] == full["n"] == 40
    assert small["spearman"] > 0.99
    assert small["sign"] == 1
    assert small["slope"] == pytest.approx(1, abs=0.02)
    assert full["derivative"]["spearman"] < small["spearman"]
    assert small["value"]["spearman"] < 0.9


def test_finite_effects_are_patches_of_the_live_replacement_model(subject: Subject):
    graph, L = subject.graph, subject.model.cfg.n_layers
    nodes = np.argsort(-graph.influence_N[: graph.n_features])[:3]
    found = finite_effects(subject, nodes)
    for i, n in enumerate(nodes.tolist()):
        place = graph.layer_A[n], graph.pos_A[n], graph.feature_A[n]
        layer, pos, feature = map(int, place)
        edit = jaxclt.Edit(layer=layer, pos=pos, feature=feature, scale=0.0)
        one = measure(plan_patch(subject, [edit], FINITE, layers=(0, L - 1)))
        assert one.logit_difference is not None
        was, now = (one.logit_difference[when] for when in ("before", "after"))
        assert now is not None
        assert found.contrast_B[i] == pytest.approx(now - was, abs=1e-5)  # pyright: ignore
    with pytest.raises(jaxclt.InputError, match="give features of the graph, 0 to"):
        finite_effects(subject, [graph.n_features])


@pytest.mark.usefixtures("x64")
def test_patterns_move_as_finite_differences_say():
    """Of all cells: by the derivative, and by running both models."""
    t, a, factor, h = case("clt"), case_active("clt"), 0.9, 1e-5
    model = make_patchable(t.dictionary, t.params, t.recording, t.cfg)
    n = int(np.flatnonzero((a.layer_A == 0) & (a.pos_A == 1))[0])
    place = [(int(a.layer_A[n]), int(a.pos_A[n]), int(a.feature_A[n]))]
    local = make_local(t.dictionary, model, a)
    features = gather_features(t.dictionary, model, place)
    change = local.placed(Change.of(features, 0.0))
    clean = np.asarray(t.recording.frozen.pattern_LHTS)

    @jax.jit
    def run(factor: float) -> tuple[jax.Array, ...]:
        one = dataclasses.replace(change, factor_E=jnp.full(1, factor))
        range_2 = jnp.asarray([0, t.cfg.n_layers - 1], jnp.int32)

        def pattern(how: How) -> jax.Array:
            tables = local.tables if how.mode == "iterative" else None
            done = patched(
                model, one, range_2, how=how, tables=tables, keep_patterns=True
            )
            return done.taps.pattern_HTS  # pyright: ignore[reportReturnType]

        return pattern(FINITE), pattern(LIVE)

    up, down = (np.asarray(run(1 + d)[0]) for d in (h, -h))
    said = {"small": (factor - 1) * (up - down) / (2 * h)}
    said["full"] = np.asarray(run(0.0)[0]) - clean
    real = {"full": 0.0, "small": factor}
    found = moved_patterns(
        model,
        batched(change, [1]),
        local.tables,
        jnp.asarray(factor),
        n_cells=clean.size,
    )
    for name, moved in zip(("full", "small"), found, strict=True):
        measured = np.asarray(run(real[name])[1]) - clean
        for got, want in zip(moved[:2], (said[name], measured), strict=True):
            np.testing.assert_allclose(
                np.sort(got[0]), np.sort(want.ravel()), atol=1e-9
            )
        both = (np.abs(x[0]) for x in moved[:2])
        assert (np.diff(sum(both)) < 1e-12).all()  # those that move most come first
        inner = (said[name] * measured).sum()
        size = np.linalg.norm(said[name]) * np.linalg.norm(measured)
        assert moved.cosine_B[0] == pytest.approx(inner / size, abs=1e-6)
        assert np.abs(said[name]).max() > 1e-4
