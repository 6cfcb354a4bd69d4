"""A new gate is one row of a table, and no format takes it for another one."""

from __future__ import annotations

import typing
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny_run import tiny_model
from transcoder import encode

import jaxclt
from jaxclt.clt.config import CLTConfig
from jaxclt.clt.gates import GATES, Gate, find_gate
from jaxclt.errors import InputError
from jaxclt.io.convert import convert_dictionary
from jaxclt.io.dictionary import load_params, save_dictionary
from jaxclt.io.formats.targets import TARGETS
from jaxclt.testing.random_clt import random_clt
from jaxclt.train.params import GateName

PROMPT = "w5 w9 w30 w7 w8"


def _farthest(pre_TF, theta_F, k):
    """The k farthest from zero, with their sign."""
    del theta_F
    return jnp.abs(pre_TF) >= jnp.sort(jnp.abs(pre_TF), -1)[:, -k, None]


@pytest.fixture(autouse=True)
def one_row(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(GATES, "abs_topk", Gate(None, _farthest, signed=True))


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    lm = tiny_model().cfg
    cfg = CLTConfig(
        n_layers=lm.n_layers, d_model=lm.d_model, n_features=24, span=2,
        activation="abs_topk", k=3,
    )  # fmt: skip
    params = random_clt(jax.random.key(0), cfg)
    path = tmp_path / "own"
    save_dictionary(params, cfg, path, model_name="tiny", to="jaxclt")
    return path


def test_it_encodes_and_comes_back_from_our_own_format(saved: Path) -> None:
    params, cfg = load_params(saved)
    assert (cfg.activation, cfg.k, cfg.span) == ("abs_topk", 3, 2)
    shape = (cfg.n_layers, 5, cfg.d_model)
    read = jax.random.normal(jax.random.key(1), shape)
    a = np.asarray(encode(params, read, cfg=cfg))
    assert ((a != 0).sum(-1) == 3).all()
    assert (a < 0).any()
    pre = np.einsum("ltd,lfd->ltf", read, params.W_enc_LFD)
    pre += np.asarray(params.b_enc_LF)[:, None]
    np.testing.assert_allclose(a[a != 0], pre[a != 0], rtol=1e-5)
    assert (
        np.where(a, np.abs(pre), np.inf).min(-1) >= np.abs(pre * (a == 0)).max(-1)
    ).all()


def test_it_is_traced(saved: Path) -> None:
    model = tiny_model()
    clt = jaxclt.load_dictionary(saved, model)
    graph = jaxclt.attribute(model, clt, PROMPT, max_features=None, tolerance=0.0)
    T = len(graph.meta.tokens)
    assert graph.n_features == 3 * T * model.cfg.n_layers
    assert (graph.value_A < 0).any()
    assert jaxclt.certificate(graph).max_relative_row_error < 1e-4
    with pytest.raises(InputError, match="no thresholds"):
        jaxclt.inhibition(graph, model, clt)


@pytest.mark.parametrize("to", [x for x in TARGETS if x != "jaxclt"])
def test_a_format_that_cannot_say_it_refuses_it_by_name(saved: Path, to: str) -> None:
    params, cfg = load_params(saved)
    out = saved.parent / "out"
    with pytest.raises(InputError, match=f"{to} has no abs_topk") as error:
        save_dictionary(params, cfg, out, model_name="tiny", to=to)
    assert len(str(error.value)) <= 300
    with pytest.raises(InputError, match=f"{to} has no abs_topk"):
        convert_dictionary(saved, out, to)
    assert [x.name for x in saved.parent.iterdir()] == ["own"]


def test_a_name_without_a_row_is_refused(
    saved: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delitem(GATES, "abs_topk")
    with pytest.raises(InputError, match="activation is 'abs_topk'"):
        load_params(saved)
    for name in ("abs_topk", "batch_topk"):  # the last is none of a single token
        with pytest.raises(InputError, match=f"activation '{name}'"):
            find_gate(name)


def test_training_offers_the_gates_that_are_trained() -> None:
    trained = {name for name, gate in GATES.items() if gate.train is not None}
    assert set(typing.get_args(GateName)) == trained
