"""Gemma Scope's own repositories: one dictionary is taken out of many."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from fake_hub import FakeHub

from jaxclt.errors import InputError
from jaxclt.graph.config import AttributeConfig
from jaxclt.io import dictionary
from jaxclt.io.convert import convert_dictionary
from jaxclt.trace.prompt import identity

FORMATS = Path(__file__).resolve().parents[1] / "goldens" / "formats"
REPO = "google/gemma-scope-2b-pt-transcoders"
# what there is of each layer, by width
L0S = {
    "width_16k": {0: (12, 76), 1: (30, 95), 2: (54,)},
    "width_4k": {0: (40,), 1: (41,), 2: (42,)},
    "width_8k": {0: (40,), 2: (42,)},
}
EVERY = "layer 0: 12, 76; layer 1: 30, 95; layer 2: 54"


def shelve(root: Path, widths: tuple[str, ...] = tuple(L0S)) -> Path:
    for width in widths:
        for layer, l0s in L0S[width].items():
            for l0 in l0s:
                place = root / f"layer_{layer}/{width}/average_l0_{l0}"
                shutil.copytree(FORMATS / f"gemma_scope/layer_{layer}", place)
    return root


def shelve_2(root: Path, choice: str, **said: Any) -> Path:
    for layer in range(3):
        at = f"model.layers.{layer}"
        place = root / f"transcoder_all/layer_{layer}_{choice}"
        shutil.copytree(FORMATS / f"gemma_scope_2/layer_{layer}", place)
        config = {
            "architecture": "jump_relu",
            "model_name": "google/gemma-3-1b-pt",
            "hf_hook_point_in": f"{at}.pre_feedforward_layernorm.output",
            "hf_hook_point_out": f"{at}.post_feedforward_layernorm.output",
            "width": 10,
            "l0": 20 + layer,
            "affine_connection": True,
            "type": "transcoder",
        }
        (place / "config.json").write_text(json.dumps(config | said))
    return root


@pytest.fixture
def fake(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> FakeHub:
    return FakeHub.instead_of_the_real_one(tmp_path, monkeypatch)


@pytest.mark.parametrize(
    ("target", "taken"),
    [(70, [76, 95, 54]), (0, [12, 30, 54]), (44, [12, 30, 54]), (95, [76, 95, 54])],
)
def test_the_nearest_l0_of_each_layer_is_taken_and_told(
    fake: FakeHub, target: int, taken: list[int]
):
    shelve(fake.root / REPO)
    name = f"{REPO}//width_16k/average_l0_{target}"
    store = dictionary.open_dictionary(f"{name}@v1")
    files = [
        f"layer_{i}/width_16k/average_l0_{l0}/params.npz" for i, l0 in enumerate(taken)
    ]
    assert sorted(fake.fetched) == files
    assert store.provenance == {"average_l0": taken, "files": files}
    assert set(store.files) == set(files)
    # the table says what is nowhere in the repository
    assert (store.format, store.cfg.read, store.write) == (
        "gemma-scope",
        "normalized",
        "stream",
    )
    assert store.model_name == "google/gemma-2-2b"
    want = dictionary.open_dictionary(FORMATS / "gemma_scope")
    assert store.cfg == want.cfg
    for layer in range(3):
        np.testing.assert_array_equal(store.decoder(layer), want.decoder(layer))


def test_a_reader_is_told_and_the_graph_remembers(fake: FakeHub):
    shelve(fake.root / REPO)
    model: Any = SimpleNamespace(
        cfg=SimpleNamespace(n_layers=3, d_model=6),
        params=SimpleNamespace(blocks=SimpleNamespace(post_mlp_LD=None)),
        hash="m",
    )
    told: list[str] = []
    name = f"{REPO}//width_16k/average_l0_70"
    found = dictionary.load_dictionary(name, model, progress=told.append)
    assert told == [f"{name}: average_l0 of layers 0 to 2: 76, 95, 54"]
    same = identity(model, found, "x", AttributeConfig())
    assert same["dictionary_made_of"]["average_l0"] == [76, 95, 54]
    other = dictionary.load_dictionary(f"{REPO}//width_16k/average_l0_20", model)
    assert other.hash != found.hash
    neurons = dictionary.load_dictionary("neurons", model)
    other = identity(model, neurons, "x", AttributeConfig())
    assert "dictionary_made_of" not in other


def test_without_an_l0_there_must_be_one_of_each_layer(fake: FakeHub):
    shelve(fake.root / REPO)
    store = dictionary.open_dictionary(f"{REPO}//width_4k")
    assert store.provenance["average_l0"] == [40, 41, 42]


@pytest.mark.parametrize(
    ("folder", "match"),
    [
        ("//width_16k", rf"{REPO}//width_16k leaves a choice: name one of .*{EVERY}"),
        ("", rf"leaves a choice: .*width_16k/average_l0_N.*{EVERY}.*width_4k/average"),
        ("//width_32k", "has no width_32k; it has .*width_16k/average_l0_N"),
        ("//width_32k/average_l0_9", "has no width_32k/average_l0_9; it has"),
        ("//width_8k", "has no layer 1, but a dictionary covers all"),
        ("//width_8k/average_l0_40", "has no layer 1"),
        ("//layer_0/width_16k", "no dictionary in a known format"),
    ],
)
def test_what_leaves_a_choice_is_refused_with_what_there_is(
    fake: FakeHub, folder: str, match: str
):
    shelve(fake.root / REPO)
    with pytest.raises(InputError, match=match) as found:
        dictionary.open_dictionary(f"{REPO}{folder}")
    assert "\n" not in str(found.value)
    assert fake.fetched == []


def test_files_that_may_be_residual_saes_are_refused(fake: FakeHub):
    """Their layout is the same; a config.yaml beside them says what they are."""
    name = "google/gemma-scope-2b-pt-res"
    root = shelve(fake.root / name, ("width_4k",))
    with pytest.raises(InputError, match="does not say what its features read and"):
        dictionary.open_dictionary(f"{name}//width_4k")
    hooks = "feature_input_hook: mlp.hook_in\nfeature_output_hook: mlp.hook_out\n"
    (root / "config.yaml").write_text(hooks)
    store = dictionary.open_dictionary(f"{name}//width_4k")
    assert (store.cfg.read, store.write) == ("mlp_in", "mlp")
    assert "config.yaml" in store.files


def test_what_was_taken_is_in_the_report_of_a_conversion(tmp_path: Path, fake: FakeHub):
    shelve(fake.root / REPO)
    source = f"{REPO}//width_16k/average_l0_70"
    report = convert_dictionary(source, tmp_path / "out", "circuit-tracer")
    assert report["made_of"]["average_l0"] == [76, 95, 54]


def test_it_opens_without_a_network_and_from_a_folder(fake: FakeHub, tmp_path: Path):
    shelve(fake.root / REPO)
    name = f"{REPO}//width_16k/average_l0_70"
    first = dictionary.open_dictionary(name)
    fake.error = ConnectionError("no route")
    assert dictionary.open_dictionary(name).digest() == first.digest()
    root = shelve(tmp_path / "mine")
    hooks = "feature_input_hook: ln2.hook_normalized\nfeature_output_hook: hook_mlp_out"
    (root / "config.yaml").write_text(hooks)
    for local in (f"{root}//width_16k/average_l0_70", root / "width_16k/average_l0_70"):
        store = dictionary.open_dictionary(local)
        assert store.provenance == first.provenance
    with pytest.raises(InputError, match=f"leaves a choice.*{EVERY}"):
        dictionary.open_dictionary(root)


@pytest.mark.parametrize("choice", ["width_16k_l0_small_affine", "width_16k_l0_big"])
def test_gemma_scope_2_says_itself_what_it_reads(fake: FakeHub, choice: str):
    name = "google/gemma-scope-2-1b-pt"
    for each in ("width_16k_l0_small_affine", "width_16k_l0_big"):
        shelve_2(fake.root / name, each)
    store = dictionary.open_dictionary(f"{name}//transcoder_all/{choice}")
    want = dictionary.open_dictionary(FORMATS / "gemma_scope_2")
    assert (store.format, store.cfg, store.write) == (
        "gemma-scope-2",
        want.cfg,
        want.write,
    )
    assert store.model_name == "google/gemma-3-1b-pt"
    assert store.provenance["l0"] == [20, 21, 22]
    assert len(fake.fetched) == 6
    for layer in range(3):
        np.testing.assert_array_equal(store.skip(layer), want.skip(layer))
    with pytest.raises(InputError, match=r"a choice: .*_l0_big, .*_l0_small_affine$"):
        dictionary.open_dictionary(f"{name}//transcoder_all")


@pytest.mark.parametrize(
    ("said", "match"),
    [
        (
            {"hf_hook_point_in": "model.layers.1.pre_feedforward_layernorm.output"},
            "is of layers 1 and 0, not of layer 0",
        ),
        ({"hf_hook_point_in": "model.layers.0.output"}, "hf_hook_point_in is"),
        ({"hf_hook_point_out": None}, "hf_hook_point_out is None"),
        ({"architecture": "topk"}, "architecture is 'topk'"),
        ({"normalize": "yes"}, "normalize is 'yes', a field"),
    ],
)
def test_what_gemma_scope_2_cannot_mean_is_refused(tmp_path: Path, said, match: str):
    root = shelve_2(tmp_path, "width_16k_l0_small", **said)
    with pytest.raises(InputError, match=match):
        dictionary.open_dictionary(f"{root}//transcoder_all/width_16k_l0_small")


def test_a_clt_of_gemma_scope_2(fake: FakeHub):
    name, choice = "google/gemma-scope-2-270m-pt", "clt/width_262k_l0_medium_affine"
    place = fake.add(name, FORMATS / "gemma_scope_2_clt", choice)
    (place / "config.yaml").unlink()
    store = dictionary.open_dictionary(f"{name}//{choice}")
    want = dictionary.open_dictionary(FORMATS / "gemma_scope_2_clt")
    assert (store.format, store.cfg, store.write) == (
        want.format,
        want.cfg,
        want.write,
    )
    assert set(fake.fetched) == set(store.files)
    np.testing.assert_array_equal(store.decoder(1), want.decoder(1))
    (place / "params_layer_1.safetensors").unlink()
    shutil.rmtree(fake.cache)
    with pytest.raises(InputError, match="has no layer 1"):
        dictionary.open_dictionary(f"{name}//{choice}")
