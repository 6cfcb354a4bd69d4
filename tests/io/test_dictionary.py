"""Dictionaries on disk: exact round trips, lazy reads, and every kind of bad input."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import shutil
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from jaxclt.clt.config import CLTConfig
from jaxclt.clt.store import ParamsStore
from jaxclt.errors import InputError
from jaxclt.io import dictionary
from jaxclt.lm.config import LMConfig
from jaxclt.testing.random_clt import random_clt
from jaxclt.types import CLTParams

GOLDENS = Path(__file__).resolve().parents[1] / "goldens"
CIRCUIT_TRACER = [
    GOLDENS / "circuit_tracer_clt/dictionary",
    GOLDENS / "circuit_tracer_plt/dictionary",
    GOLDENS / "circuit_tracer_plt/dictionary_skip",
]
BASE = CLTConfig(n_layers=3, d_model=6, n_features=10, span=3)
CONFIGS = {
    "clt": BASE,
    "clt-relu": dataclasses.replace(BASE, activation="relu", read="normalized"),
    "clt-span2": dataclasses.replace(BASE, span=2),
    "plt": dataclasses.replace(BASE, span=1, read="mlp_in"),
    "plt-topk": dataclasses.replace(BASE, span=1, activation="signed_topk", k=4),
    "one-layer": dataclasses.replace(BASE, n_layers=1, span=1),
}


def arbitrary_params(cfg: CLTConfig, *, skip: bool = False) -> CLTParams:
    """Distinct numbers everywhere; no random bits, which would cost a compilation."""
    key = jax.eval_shape(lambda: jax.random.key(0))
    shapes = jax.eval_shape(lambda k: random_clt(k, cfg, skip=skip), key)
    leaves, tree = jax.tree.flatten(shapes)
    filled = [
        jnp.asarray(np.sin(1 + i + np.arange(x.size, dtype=x.dtype)).reshape(x.shape))
        for i, x in enumerate(leaves)
    ]
    return jax.tree.unflatten(tree, filled)


def to_dtype(params: CLTParams, dtype: str) -> CLTParams:
    return jax.tree.map(lambda x: jnp.asarray(np.asarray(x, jnp.dtype(dtype))), params)


def assert_trees_equal(a: CLTParams, b: CLTParams) -> None:
    assert jax.tree.structure(a) == jax.tree.structure(b)
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        assert x.dtype == y.dtype
        np.testing.assert_array_equal(x, y)


@pytest.fixture
def clt_dir(tmp_path: Path) -> Path:
    path = tmp_path / "clt"
    dictionary.save_dictionary(arbitrary_params(BASE), BASE, path, model_name="tiny")
    return path


@pytest.fixture
def plt_dir(tmp_path: Path) -> Path:
    path, cfg = tmp_path / "plt", CONFIGS["plt"]
    params = arbitrary_params(cfg, skip=True)
    dictionary.save_dictionary(params, cfg, path, model_name="tiny", scan="a/b")
    return path


def edit_config(path: Path, **changes: object) -> None:
    config = yaml.safe_load((path / "config.yaml").read_text()) | changes
    (path / "config.yaml").write_text(yaml.safe_dump(config))


def edit_tensors(file: Path, **changes: np.ndarray | None) -> None:
    """Replace, add or (None) drop tensors of a safetensors file."""
    tensors = safetensors.numpy.load_file(file) | changes
    safetensors.numpy.save_file(
        {k: v for k, v in tensors.items() if v is not None}, file
    )


def assert_refused(path: Path, match: str) -> None:
    """Loading says what is wrong in one line."""
    with pytest.raises(InputError, match=match) as error:
        dictionary.load_params(path)
    assert "\n" not in str(error.value)


# -- round trips ----------------------------------------------------------------------


@pytest.mark.parametrize("name", CONFIGS)
def test_save_then_load_is_the_identity(tmp_path: Path, name: str):
    cfg = CONFIGS[name]
    params = arbitrary_params(cfg, skip=cfg.span == 1)
    dictionary.save_dictionary(params, cfg, tmp_path / "d", model_name="tiny")
    loaded, loaded_cfg = dictionary.load_params(tmp_path / "d")
    assert loaded_cfg == cfg
    assert_trees_equal(loaded, params)


@pytest.mark.parametrize("name", CONFIGS)
def test_the_lazy_store_reads_what_the_one_in_memory_holds(tmp_path: Path, name: str):
    cfg = CONFIGS[name]
    params = arbitrary_params(cfg, skip=cfg.span == 1)
    dictionary.save_dictionary(params, cfg, tmp_path / "d", model_name="tiny")
    lazy = dictionary.open_dictionary(tmp_path / "d")
    memory = ParamsStore(params, cfg)
    assert lazy.cfg == memory.cfg
    assert lazy.model_name == "tiny"
    np.testing.assert_array_equal(lazy.b_dec(), memory.b_dec())
    for layer in range(cfg.n_layers):
        for a, b in zip(lazy.encoder(layer), memory.encoder(layer), strict=True):
            assert (a is None) == (b is None)
            if a is not None:
                np.testing.assert_array_equal(a, b)
        for rows in ([], [0], [9], [2, 3, 4], [7, 1, 1, 0], list(range(10))):
            index = np.array(rows, np.int32)
            got = lazy.decoder(layer, index)
            assert got.shape == (len(rows), cfg.n_writes(layer), cfg.d_model)
            np.testing.assert_array_equal(got, memory.decoder(layer, index))
        a, b = lazy.skip(layer), memory.skip(layer)
        assert (a is None) == (b is None)
        if a is not None:
            np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize("source", CIRCUIT_TRACER, ids=lambda p: p.parent.name + p.name)
def test_files_of_circuit_tracer_are_rewritten_byte_for_byte(
    tmp_path: Path, source: Path
):
    params, cfg = dictionary.load_params(source)
    config = yaml.safe_load((source / "config.yaml").read_text())
    dictionary.save_dictionary(
        params, cfg, tmp_path / "d",
        model_name=config["model_name"], scan=config["scan"],
    )  # fmt: skip
    files = sorted(p.name for p in source.iterdir())
    assert files == sorted(p.name for p in (tmp_path / "d").iterdir())
    for name in files:
        assert (tmp_path / "d" / name).read_bytes() == (source / name).read_bytes()


@pytest.mark.parametrize("source", CIRCUIT_TRACER, ids=lambda p: p.parent.name + p.name)
def test_the_same_features_are_active_as_in_circuit_tracer(source: Path):
    """Conventions, not only bytes: features and values match on its own reads."""
    name = "graph_skip.npz" if source.name.endswith("skip") else "graph.npz"
    golden = np.load(source.parent / name, allow_pickle=False)
    params, cfg = dictionary.load_params(source)
    pre = np.einsum("ltd,lfd->ltf", golden["read_LTD"], params.W_enc_LFD)
    pre = pre + np.asarray(params.b_enc_LF)[:, None]
    theta = 0 if params.theta_LF is None else np.asarray(params.theta_LF)[:, None]
    active = np.argwhere(np.where(pre > theta, pre, 0)[:, 1:])  # position 0 is ignored
    active[:, 1] += 1
    np.testing.assert_array_equal(active, golden["active_A3"])
    np.testing.assert_allclose(pre[tuple(active.T)], golden["value_A"], atol=1e-5)
    assert cfg.read == ("resid_mid" if cfg.span > 1 else "mlp_in")


def test_the_skip_is_transposed_between_the_file_and_memory(plt_dir: Path):
    stored = safetensors.numpy.load_file(plt_dir / "layer_1.safetensors")["W_skip"]
    params, _ = dictionary.load_params(plt_dir)
    assert params.W_skip_LDD is not None
    np.testing.assert_array_equal(params.W_skip_LDD[1], stored.T)


@pytest.mark.parametrize(
    ("read", "write", "hook"),
    [
        ("mlp_in", None, "mlp.hook_out"),
        ("mlp_in", "stream", "hook_mlp_out"),
        ("resid_mid", None, "hook_mlp_out"),
        ("normalized", "mlp", "mlp.hook_out"),
    ],
)
def test_what_is_written_is_said(tmp_path: Path, read, write, hook: str):
    """Behind a norm of the model's, or ahead of it: they are told apart on loading."""
    cfg = dataclasses.replace(CONFIGS["plt"], read=read)
    dictionary.save_dictionary(
        arbitrary_params(cfg), cfg, tmp_path, model_name="tiny", write=write
    )
    config = yaml.safe_load((tmp_path / "config.yaml").read_text())
    assert config["feature_output_hook"] == hook
    store = dictionary.open_dictionary(tmp_path)
    assert store.write == ("stream" if hook == "hook_mlp_out" else "mlp")
    model = LMConfig(
        n_layers=3, d_model=6, n_heads=2, n_kv_heads=1, d_head=4, d_mlp=8, d_vocab=11,
        n_ctx=16,
    )  # fmt: skip
    if store.write == "stream":
        dictionary.check(store, model, post_norm=True)
    else:
        with pytest.raises(InputError, match="ahead of the norm"):
            dictionary.check(store, model, post_norm=True)


def test_the_skip_of_a_clt_is_stored_as_it_is_used(clt_dir: Path):
    """As circuit-tracer's repository writes it since version 0.5.0: read @ W_skip."""
    W = np.sin(np.arange(108, dtype="f")).reshape(3, 6, 6)
    for i in range(3):
        edit_tensors(clt_dir / f"W_enc_{i}.safetensors", **{f"W_skip_{i}": W[i]})
    params, _ = dictionary.load_params(clt_dir)
    np.testing.assert_array_equal(params.W_skip_LDD, W)


def test_half_precision_is_read_in_the_dtype_it_is_stored_in(clt_dir: Path):
    file = clt_dir / "W_dec_0.safetensors"
    W = safetensors.numpy.load_file(file)["W_dec_0"].astype(jnp.dtype("bfloat16"))
    edit_tensors(file, W_dec_0=W)
    got = dictionary.open_dictionary(clt_dir).decoder(0, np.array([3, 1]))
    assert got.dtype == jnp.dtype("bfloat16")
    np.testing.assert_array_equal(got, W[[3, 1]])
    edit_tensors(file, W_dec_0=np.full_like(W, np.nan))
    assert_refused(clt_dir, "NaN")


def test_saving_takes_half_precision_up_to_float32(tmp_path: Path):
    params = to_dtype(arbitrary_params(BASE), "bfloat16")
    dictionary.save_dictionary(params, BASE, tmp_path / "d", model_name="tiny")
    loaded, _ = dictionary.load_params(tmp_path / "d")
    assert_trees_equal(loaded, to_dtype(params, "float32"))


def test_a_plt_may_list_its_files(plt_dir: Path):
    params, cfg = dictionary.load_params(plt_dir)
    (plt_dir / "sub").mkdir()
    names = [f"sub/l{i}.safetensors" for i in range(3)]
    for i, name in enumerate(names):
        (plt_dir / f"layer_{i}.safetensors").rename(plt_dir / name)
    edit_config(plt_dir, transcoders=names)
    listed, listed_cfg = dictionary.load_params(plt_dir)
    assert listed_cfg == cfg
    assert_trees_equal(listed, params)


# -- laziness and identity ------------------------------------------------------------


def test_decoder_rows_do_not_read_the_decoder(tmp_path: Path):
    """Rows are copied through a map; a NaN in a row nobody asked for goes unseen."""
    cfg = dataclasses.replace(BASE, n_features=1000)
    dictionary.save_dictionary(arbitrary_params(cfg), cfg, tmp_path, model_name="tiny")
    file = tmp_path / "W_dec_0.safetensors"
    W = safetensors.numpy.load_file(file)["W_dec_0"]
    W[500] = np.nan
    edit_tensors(file, W_dec_0=W)
    store = dictionary.open_dictionary(tmp_path)
    np.testing.assert_array_equal(store.decoder(0, np.array([499])), W[[499]])
    with pytest.raises(InputError, match="NaN"):
        store.decoder(0, np.array([499, 500]))


def test_the_hash_tells_dictionaries_apart_and_ignores_their_place(
    clt_dir: Path, tmp_path: Path
):
    first = dictionary.open_dictionary(clt_dir).digest()
    copy = Path(shutil.copytree(clt_dir, tmp_path / "copy"))
    assert dictionary.open_dictionary(copy).digest() == first
    b_dec = safetensors.numpy.load_file(copy / "W_enc_2.safetensors")["b_dec_2"]
    edit_tensors(copy / "W_enc_2.safetensors", b_dec_2=b_dec + 1)
    assert dictionary.open_dictionary(copy).digest() != first


@pytest.mark.parametrize(("n_layers", "d_model"), [(4, 6), (3, 8)])
def test_a_dictionary_of_another_model_is_refused(
    clt_dir: Path, n_layers: int, d_model: int
):
    def lm(n_layers: int, d_model: int) -> LMConfig:
        return LMConfig(
            n_layers=n_layers, d_model=d_model, n_heads=2, n_kv_heads=1, d_head=4,
            d_mlp=8, d_vocab=11, n_ctx=16,
        )  # fmt: skip

    store = dictionary.open_dictionary(clt_dir)
    dictionary.check(store, lm(3, 6))
    with pytest.raises(InputError, match=r"has \d \D+, the model \d; .*tiny"):
        dictionary.check(store, lm(n_layers, d_model))


# -- bad input ------------------------------------------------------------------------


@settings(
    max_examples=60,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
@given(data=st.data())
def test_a_truncated_file_is_refused(clt_dir: Path, data: st.DataObject):
    names = sorted(p.name for p in clt_dir.glob("*.safetensors"))
    file = clt_dir / data.draw(st.sampled_from(names))
    content = file.read_bytes()
    keep = data.draw(st.integers(0, len(content) - 1))
    file.write_bytes(content[:keep])
    try:
        assert_refused(clt_dir, "truncated|not a safetensors")
    finally:
        file.write_bytes(content)


@settings(
    max_examples=100,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
@given(data=st.data())
def test_a_damaged_header_never_escapes_as_another_exception(
    clt_dir: Path, data: st.DataObject
):
    file = clt_dir / "W_enc_0.safetensors"
    content = file.read_bytes()
    end = 8 + int.from_bytes(content[:8], "little")
    damaged = bytearray(content)
    for at in data.draw(st.lists(st.integers(0, end - 1), min_size=1, max_size=4)):
        damaged[at] = data.draw(st.integers(0, 255))
    file.write_bytes(damaged)
    try:
        with contextlib.suppress(InputError):  # the damage may be harmless
            dictionary.load_params(clt_dir)
    finally:
        file.write_bytes(content)


@pytest.mark.parametrize(
    "name", ["W_enc_0", "W_enc_1", "W_enc_2", "W_dec_0", "W_dec_2"]
)
def test_a_missing_file_is_named(clt_dir: Path, name: str):
    (clt_dir / f"{name}.safetensors").unlink()
    assert_refused(clt_dir, f"{name}|write 3 layers|W_dec_2")


def test_a_missing_last_layer_is_noticed(clt_dir: Path):
    for name in ("W_enc_2", "W_dec_2"):
        (clt_dir / f"{name}.safetensors").unlink()
    assert_refused(clt_dir, "layer 0 write 3 layers but only 2")


def test_a_missing_layer_of_a_plt_is_named(plt_dir: Path):
    (plt_dir / "layer_1.safetensors").unlink()
    assert_refused(plt_dir, "layer_1")


@pytest.mark.parametrize(
    ("file", "changes", "match"),
    [
        ("W_enc_1", {"W_enc_1": np.zeros((10, 7), "f")}, "shape"),
        ("W_enc_1", {"b_enc_1": np.zeros(11, "f")}, "shape"),
        ("W_enc_1", {"threshold_1": None}, "no tensor threshold_1"),
        ("W_enc_0", {"threshold_0": None}, "threshold_1"),
        ("W_enc_2", {"b_dec_2": None}, "no tensor b_dec_2"),
        ("W_enc_0", {"W_enc_0": np.zeros(60, "f")}, "shape"),
        ("W_enc_0", {"W_enc_0": None}, "no tensor W_enc_0"),
        ("W_enc_1", {"W_skip_1": np.zeros((6, 6), "f")}, "W_skip_1"),
        ("W_dec_1", {"W_dec_1": np.zeros((10, 3, 6), "f")}, "shape"),
        ("W_dec_0", {"W_dec_0": np.zeros((10, 6), "f")}, "shape"),
        ("W_dec_0", {"W_dec_0": np.full((10, 3, 6), np.nan, "f")}, "NaN"),
        ("W_enc_2", {"b_enc_2": np.full(10, -np.inf, "f")}, "NaN or infinity"),
        ("W_enc_2", {"b_dec_2": np.full(6, np.nan, "f")}, "NaN"),
        ("W_enc_1", {"W_enc_1": np.zeros((10, 6), "i")}, "dtype"),
    ],
)  # fmt: skip
def test_wrong_tensors_are_refused(clt_dir: Path, file: str, changes: dict, match: str):
    edit_tensors(clt_dir / f"{file}.safetensors", **changes)
    assert_refused(clt_dir, match)


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({"model_kind": "sae"}, "model_kind"),
        ({"model_kind": None}, "model_kind"),
        ({"model_kind": ["transcoder_set"]}, "model_kind"),
        ({"feature_input_hook": "hook_resid_pre"}, "feature_input_hook"),
        ({"feature_output_hook": "hook_resid_post"}, "feature_output_hook"),
        ({"activation": "gelu"}, "activation"),
        ({"activation": "topk"}, "topk"),
        ({"activation": "topk", "k": "4"}, "k must be a whole number"),
        ({"transcoders": ["layer_0.safetensors"]}, "missing"),
        ({"model_name": ["tiny"]}, "model_name must be a text"),
        ({"model_kind": "transcoder_set"}, "layer_"),
    ],
)
def test_a_wrong_config_is_refused(clt_dir: Path, changes: dict, match: str):
    edit_config(clt_dir, **changes)
    assert_refused(clt_dir, match)


@pytest.mark.parametrize("text", ["", "- a\n- b", "a: [", "\x00"])
def test_a_config_that_is_no_mapping_is_refused(clt_dir: Path, text: str):
    (clt_dir / "config.yaml").write_text(text)
    assert_refused(clt_dir, "config.yaml")


@pytest.mark.parametrize(
    ("entry", "match"),
    [
        ("https://org/repo/layer_0.safetensors", "download it"),
        ("hf://org/layer_0.safetensors", "names no file"),
        ("/etc/passwd", "inside the directory"),
        ("../clt/W_enc_0.safetensors", "inside the directory"),
        ("layer_9.safetensors", "missing"),
        ("layer_0.pt", "pickle"),
    ],
)
def test_a_listed_file_must_be_here(plt_dir: Path, entry: str, match: str):
    edit_config(plt_dir, transcoders=[entry])
    assert_refused(plt_dir, match)


@pytest.mark.parametrize("name", ["clt.pt", "pytorch_model.bin"])
def test_pickles_are_named_and_never_opened(tmp_path: Path, name: str):
    (tmp_path / name).write_bytes(b"\x80\x04.")
    assert_refused(tmp_path / name, "pickle")
    assert_refused(tmp_path, "pickle")
    (tmp_path / "config.yaml").write_text(
        "model_kind: transcoder_set\nfeature_input_hook: mlp.hook_in\n"
        "feature_output_hook: mlp.hook_out\n"
    )
    assert_refused(tmp_path, "pickle")


def test_labels_beside_the_weights_are_read(clt_dir: Path):
    assert dictionary.read_labels(clt_dir) == {}
    (clt_dir / "labels.json").write_text('{"0:3": "ends in 6", "2:0": "<b>x"}')
    found = dictionary.read_labels(clt_dir)
    assert found == {(0, 3): "ends in 6", (2, 0): "<b>x"}


@pytest.mark.parametrize(
    "text", ['{"3": "x"}', '{"0:3": 5}', '{"0:-1": "x"}', '["0:3"]', "{"]
)
def test_other_labels_are_refused(clt_dir: Path, text: str):
    (clt_dir / "labels.json").write_text(text)
    with pytest.raises(InputError, match=r"labels\.json"):
        dictionary.read_labels(clt_dir)


def test_no_directory_and_no_dictionary_are_refused(tmp_path: Path):
    assert_refused(tmp_path / "nowhere", "not a dictionary")
    assert_refused(tmp_path, "not a dictionary")


# -- saving over something ------------------------------------------------------------


def test_saving_replaces_a_dictionary_and_leaves_nothing_else(clt_dir: Path):
    cfg = CONFIGS["plt"]
    params = arbitrary_params(cfg)
    dictionary.save_dictionary(params, cfg, clt_dir, model_name="tiny")
    loaded, loaded_cfg = dictionary.load_params(clt_dir)
    assert loaded_cfg == cfg
    assert_trees_equal(loaded, params)
    assert [p.name for p in clt_dir.parent.iterdir()] == [clt_dir.name]
    assert not list(clt_dir.glob("W_*"))


def test_saving_into_an_empty_or_new_directory_works(tmp_path: Path):
    for path in (tmp_path / "new" / "d", tmp_path / "empty"):
        (tmp_path / "empty").mkdir(exist_ok=True)
        dictionary.save_dictionary(
            arbitrary_params(BASE), BASE, path, model_name="tiny"
        )
        dictionary.load_params(path)


def test_only_a_dictionary_is_overwritten(clt_dir: Path, tmp_path: Path):
    def save(path: Path) -> None:
        dictionary.save_dictionary(
            arbitrary_params(BASE), BASE, path, model_name="tiny"
        )

    (tmp_path / "notes").mkdir()
    (tmp_path / "notes" / "thesis.tex").write_text("years of work")
    (tmp_path / "file").write_text("x")
    (clt_dir / "features").mkdir()
    for path in (tmp_path / "notes", tmp_path / "file", clt_dir):
        with pytest.raises(InputError, match="choose another output"):
            save(path)
    assert (tmp_path / "notes" / "thesis.tex").exists()
    assert (clt_dir / "features").exists()


def snapshot(path: Path) -> dict[str, bytes]:
    return {p.name: p.read_bytes() for p in path.iterdir()}


def test_a_failed_save_leaves_the_old_dictionary(
    clt_dir: Path, monkeypatch: pytest.MonkeyPatch
):
    before = snapshot(clt_dir)
    calls = []

    def fail(tensors: dict[str, np.ndarray], file: Path) -> None:
        calls.append(file)
        if len(calls) == 3:
            raise OSError("disk full")
        real(tensors, file)

    real = safetensors.numpy.save_file
    monkeypatch.setattr(safetensors.numpy, "save_file", fail)
    with pytest.raises(OSError, match="disk full"):
        dictionary.save_dictionary(
            arbitrary_params(BASE), BASE, clt_dir, model_name="t"
        )
    assert snapshot(clt_dir) == before
    assert [p.name for p in clt_dir.parent.iterdir()] == [clt_dir.name]


@pytest.mark.skipif(sys.platform == "win32", reason="POSIX permissions")
def test_weights_are_as_readable_as_the_config(clt_dir: Path):
    modes = {p.stat().st_mode for p in clt_dir.iterdir()}
    assert len(modes) == 1


def test_weights_that_do_not_fit_the_format_are_refused(tmp_path: Path):
    params = arbitrary_params(BASE)
    edit = functools.partial(dataclasses.replace, params)
    cases = [
        (arbitrary_params(BASE, skip=True), BASE, "skip"),
        (edit(b_enc_LF=params.b_enc_LF.at[1, 2].set(jnp.nan)), BASE, "NaN"),
        (edit(b_enc_LF=params.b_enc_LF[:, :4]), BASE, "shape"),
        (edit(theta_LF=None), BASE, "no thresholds"),
        (params, CONFIGS["clt-relu"], "thresholds"),
    ]
    for bad, cfg, match in cases:
        with pytest.raises(InputError, match=match):
            dictionary.save_dictionary(bad, cfg, tmp_path / "d", model_name="tiny")
    assert not list(tmp_path.iterdir())
