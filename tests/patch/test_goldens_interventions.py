"""The same logits as circuit-tracer 0.5.0's feature_intervention, in float32.

Goldens come from its own code, see goldens/make_interventions.py.
"""

from __future__ import annotations

import functools
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxclt.clt.transcoder import StoreDictionary
from jaxclt.io.dictionary import open_dictionary
from jaxclt.io.model import load_model
from jaxclt.lm.run import record, unembed
from jaxclt.patching.change import Change, batched
from jaxclt.patching.features import gather_features
from jaxclt.patching.how import How
from jaxclt.patching.modes import patched
from jaxclt.patching.patchable import Patchable, make_patchable

GOLDENS = Path(__file__).parents[1] / "goldens"
LAST = 3


@functools.cache
def golden(name: str) -> tuple[dict[str, np.ndarray], Patchable, StoreDictionary]:
    kind, _, skip = name.partition("_")
    folder, suffix = GOLDENS / f"circuit_tracer_{kind}", f"_{skip}" if skip else ""
    with np.load(folder / f"interventions{suffix}.npz") as file:
        arrays = dict(file)
    model = load_model(folder / "model")
    token_T = jnp.asarray(np.load(folder / "graph.npz")["token_T"])
    recording = jax.jit(record, static_argnames="cfg")(
        model.params, token_T, cfg=model.cfg
    )
    dictionary = StoreDictionary(open_dictionary(folder / f"dictionary{suffix}"))
    patchable = make_patchable(dictionary, model.params, recording, model.cfg)
    return arrays, patchable, dictionary


@pytest.mark.parametrize("name", ["clt", "plt", "plt_skip"])
@pytest.mark.parametrize(
    ("semantics", "layers", "how"),
    [
        ("constrained", (0, LAST), How(norms="frozen")),
        ("partial", (1, 2), How()),
        ("additive", (0, LAST), How(mode="additive")),
    ],
)
def test_logits_are_circuit_tracers(
    name: str, semantics: str, layers: tuple[int, int], how: How
):
    arrays, model, dictionary = golden(name)
    cases = [case[case[:, 0] >= 0] for case in arrays["change_CE4"]]
    every = np.concatenate(cases)
    features = gather_features(dictionary, model, every[:, :3].astype(int))
    changes = batched(Change.of(features, 0.0, every[:, 3]), [len(c) for c in cases])
    range_2 = jnp.asarray(layers, jnp.int32)

    @jax.jit
    def logits(changes: Change) -> jax.Array:
        return jax.vmap(
            lambda one: unembed(
                model.params, patched(model, one, range_2, how=how).out_TD
            )
        )(changes)

    want = arrays[f"{semantics}_CTV"]
    clean = np.asarray(unembed(model.params, model.recording.out_TD))
    assert np.abs(want - clean[None]).max() > 1
    np.testing.assert_allclose(logits(changes), want, rtol=0, atol=1e-4)
