"""A new kind of dictionary is two small classes, and goes wherever the others go.

`Gated` multiplies the features of another dictionary by a gate of their own; `Pair` is
two dictionaries side by side. Nothing in the package knows either.
"""

from __future__ import annotations

import dataclasses
import functools
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny_run import GOLDEN, tiny_model, write_text

import jaxclt
from jaxclt.clt.active import active_features
from jaxclt.clt.coder import Encoded, load
from jaxclt.dashboards.gather import FeatureOptions, feature_dashboards
from jaxclt.errors import InputError
from jaxclt.evaluation.evaluate import EvalOptions, evaluate
from jaxclt.evaluation.prompts import read_eval_text
from jaxclt.lm.run import embed, record, unembed
from jaxclt.patching.change import batched
from jaxclt.patching.how import How
from jaxclt.patching.subject import Subject
from jaxclt.replacement.errors import error_nodes
from jaxclt.replacement.local import local_replacement, run_local
from jaxclt.replacement.model import Sources, replaced
from jaxclt.validation.report import ValidateOptions, validate_graph

PROMPT = "w5 w9 w30 w7 w8"


# -- the new kinds -----------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class GatedCoder:
    inner: Any
    gated = True

    def __getattr__(self, name: str) -> Any:
        return getattr(self.inner, name)

    def encode(self, p, enc, read_TD, post_T=None) -> Encoded:
        own, gate_UD = enc
        gate_TU = jax.nn.sigmoid(jnp.einsum("TD,UD->TU", read_TD, gate_UD))
        return self.inner.encode(p, own, read_TD, post_T)._replace(gate_TF=gate_TU)

    def rows(self, enc):
        return self.inner.rows(enc[0])

    def thresholds(self, enc) -> None:
        del enc


@dataclasses.dataclass(frozen=True)
class Gated:
    inner: Any
    gate_LFD: np.ndarray = dataclasses.field(hash=False)
    name: str = "gated"
    hash: str = "gated"

    def __getattr__(self, name: str) -> Any:
        return getattr(self.inner, name)

    def coder(self, cfg):
        return GatedCoder(self.inner.coder(cfg))

    def encoders(self, params, layer, feature_U=None):
        every = slice(None) if feature_U is None else feature_U
        own = self.inner.encoders(params, layer, feature_U)
        return own, self.gate_LFD[layer][every]


@dataclasses.dataclass(frozen=True)
class Pair:
    """Features of `one`, then those of `one` again with half the decoders each."""

    one: Any
    name: str = "pair"
    hash: str = "pair"

    def __getattr__(self, name: str) -> Any:
        return getattr(self.one, name)

    def coder(self, cfg):
        inner = self.one.coder(cfg)
        F = inner.shape.n_features
        shape = dataclasses.replace(inner.shape, n_features=2 * F)
        return dataclasses.replace(inner, shape=shape)

    def _twice(self, get, feature_U):
        F = self.one.cfg.n_features
        return get(np.arange(2 * F) % F if feature_U is None else feature_U % F)

    def encoders(self, params, layer, feature_U=None):
        get = functools.partial(self.one.encoders, params, layer)
        return self._twice(get, feature_U)

    def decoders(self, params, layer, feature_U=None):
        get = functools.partial(self.one.decoders, params, layer)
        return self._twice(get, feature_U) / 2


@functools.cache
def kind(name: str) -> Any:
    one = jaxclt.load_dictionary(GOLDEN / "dictionary", tiny_model())
    if name == "pair":
        return Pair(one)
    key, cfg = jax.random.key(0), one.cfg
    shape = (cfg.n_layers, cfg.n_features, cfg.d_model)
    return Gated(one, np.asarray(jax.random.normal(key, shape)))


KINDS = ["gated", "pair"]


@functools.cache
def graph(name: str) -> jaxclt.Graph:
    return jaxclt.attribute(
        tiny_model(), kind(name), PROMPT, max_features=None, tolerance=0.0
    )


@functools.cache
def subject(name: str) -> Subject:
    return Subject.of(tiny_model(), kind(name), graph(name))


# -- wherever the others go --------------------------------------------------


@pytest.mark.parametrize("name", KINDS)
def test_its_graph_is_exact(name: str) -> None:
    g = graph(name)
    assert g.n_features > 20
    assert jaxclt.certificate(g).max_relative_row_error < 1e-5
    assert 0 <= jaxclt.scores(g).replacement <= 1


def test_activations_are_what_the_kind_says() -> None:
    model, own = tiny_model(), kind("gated")
    ids = jnp.asarray(graph("gated").token_T)
    rec = record(model.params, ids, cfg=model.cfg)
    plain = active_features(own.inner, model.params, rec, model.cfg)
    gated = active_features(own, model.params, rec, model.cfg)
    np.testing.assert_array_equal(plain.feature_A, gated.feature_A)
    assert own.inner.cfg.read == "resid_mid"
    mid_AD = np.asarray(rec.mid_LTD)[plain.layer_A, plain.pos_A]
    row_AD = own.gate_LFD[plain.layer_A, plain.feature_A]
    gate_A = 1 / (1 + np.exp(-(mid_AD * row_AD).sum(1)))
    np.testing.assert_allclose(gated.value_A, gate_A * plain.value_A, rtol=1e-4)
    np.testing.assert_allclose(gated.gate_A, gate_A, rtol=1e-4)


def test_splitting_features_leaves_the_other_rows_unchanged() -> None:
    """Maths 5: each half of a feature has half of its edges."""
    one = jaxclt.attribute(
        tiny_model(), kind("pair").one, PROMPT, max_features=None, tolerance=0.0
    )
    two, A = graph("pair"), one.n_features
    assert two.n_features == 2 * A
    F = kind("pair").one.cfg.n_features
    first = np.flatnonzero(two.feature_A < F)
    np.testing.assert_array_equal(two.feature_A[first], one.feature_A)
    rows, cols = np.r_[first, 2 * A : 2 * A + one.n_targets], first
    size = np.abs(one.edge_RN).max()
    np.testing.assert_allclose(
        2 * two.edge_RN[np.ix_(rows, cols)], one.edge_RN[:, :A], atol=1e-5 * size
    )


@pytest.mark.parametrize("name", KINDS)
def test_a_feature_of_it_can_be_a_target(name: str) -> None:
    g = graph(name)
    a = int(np.argmax(np.where(g.layer_A > 1, np.abs(g.value_A), 0)))
    place = f"{g.layer_A[a]}:{g.pos_A[a]}:{g.feature_A[a]}"
    found = jaxclt.attribute(
        tiny_model(),
        kind(name),
        PROMPT,
        targets=f"feature:{place}",
        max_features=None,
        tolerance=0.0,
    )
    row = found.edge_RN[found.n_features]
    np.testing.assert_allclose(row, g.edge_RN[a], atol=2e-5 * np.abs(row).max())


@pytest.mark.parametrize("name", KINDS)
def test_with_its_errors_the_replacement_is_the_model(name: str) -> None:
    model = tiny_model()
    ids = jnp.asarray(graph(name).token_T)
    rec = record(model.params, ids, cfg=model.cfg)
    loaded = load(kind(name), model.params, model.cfg)
    active = active_features(kind(name), model.params, rec, model.cfg)
    error_LTD = jnp.asarray(error_nodes(active, rec))
    done = replaced(
        model.params,
        loaded,
        Sources(embed(model.params, ids), error_LTD),
        cfg=model.cfg,
    )
    np.testing.assert_allclose(done.out_TD, rec.out_TD, atol=2e-5)
    local = run_local(local_replacement(model.params, loaded, rec, cfg=model.cfg))
    np.testing.assert_allclose(
        unembed(model.params, local.out_TD),
        unembed(model.params, rec.out_TD),
        atol=5e-5,
    )


@pytest.mark.parametrize("name", KINDS)
@pytest.mark.parametrize("mode", ["constrained", "iterative", "additive"])
def test_it_can_be_patched(name: str, mode: Any) -> None:
    """An ablation with all held is what the graph says; a scale of 1 is nothing."""
    g, s = graph(name), subject(name)
    a = int(
        np.argmax(
            np.where(
                g.layer_A == 1, np.abs(g.edge_RN[g.n_features, : g.n_features]), -1
            )
        )
    )
    edit = {
        "layer": int(g.layer_A[a]),
        "pos": int(g.pos_A[a]),
        "feature": int(g.feature_A[a]),
    }
    same = jaxclt.patch(
        tiny_model(), kind(name), g, [jaxclt.Edit(**edit, scale=1.0)], mode=mode
    )
    assert same.kl < 1e-6
    L = s.model.cfg.n_layers
    change = batched(s.change([jaxclt.Edit(**edit, scale=0.0)]), [1])
    how = How(mode=mode, norms="frozen")
    found = s.effects(change, [(0, L - 1)], how, s.ask())
    moved = float(found.logit_K[0, 0] - g.readout_R[g.n_features])
    if mode == "constrained":
        direct = -float(g.edge_RN[g.n_features, a])
        assert moved == pytest.approx(direct, abs=1e-4 + 1e-3 * abs(direct))


def test_it_can_be_validated() -> None:
    options = ValidateOptions(
        n_features=4, n_small=2, n_live=1, n_patterns=0, n_replacement=2, n_watched=4,
        n_groups=1, n_layers=2, n_perturbed=1,
    )  # fmt: skip
    report = validate_graph(subject("gated"), options)
    assert report["complete_replacement"]
    assert {"constrained", "iterative", "additive"} <= set(report["total_effect"])


def test_inhibition_takes_those_with_thresholds() -> None:
    found = jaxclt.inhibition(graph("pair"), tiny_model(), kind("pair"))
    assert len(found.candidates.layer_U)
    with pytest.raises(InputError, match="gated has no thresholds"):
        jaxclt.inhibition(graph("gated"), tiny_model(), kind("gated"))


@pytest.mark.parametrize("name", KINDS)
def test_dashboards_and_evaluation_take_it(name: str, tmp_path: Path) -> None:
    text = write_text(tmp_path / "text", 6)
    report, examples = feature_dashboards(
        tiny_model(), kind(name), text, tmp_path / "out",
        FeatureOptions(tokens=300, context=20, top=2, drawn=1, excerpt=8),
        features=[(0, 3), (2, 7)],
    )  # fmt: skip
    assert report["features"] == len(examples.layer_U) == 2
    options = EvalOptions(
        tokens=60, agreement_tokens=30, layer_tokens=10, graphs=2, filter="none",
        lengths=(4, 5), max_features=20, perturbed=1, baselines=(),
    )  # fmt: skip
    held = read_eval_text(tiny_model(), text, tokens=60, context=17)
    (row, *_), _ = evaluate(tiny_model(), [kind(name)], held, options=options)
    assert row["dictionary"] == name
    assert np.isfinite([row["fvu"], row["kl"], row["replacement"]]).all()


def test_global_weights_take_those_without_gates() -> None:
    windows = [[0, 5, 9, 30, 7], [0, 8, 11, 3, 60]] * 4
    features = [(layer, i) for layer in range(4) for i in range(0, 80, 5)]
    stats = jaxclt.coactivation(tiny_model(), kind("pair"), windows, features=features)
    weights = jaxclt.global_weights(tiny_model(), kind("pair"), stats)
    rows = weights.inputs(3, 5, k=3).rows()
    assert len(rows) == 3
    assert np.isfinite([row["virtual"] for row in rows]).all()
    with pytest.raises(InputError, match="no global weights"):
        jaxclt.coactivation(tiny_model(), kind("gated"), windows, features=features)
