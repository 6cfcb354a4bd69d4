"""Other tools' dictionaries: read as their tool reads them, refused when damaged.

The fixtures are made by tests/goldens/make_dictionaries.py, mostly by those tools.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from jaxclt.clt.config import CLTConfig
from jaxclt.clt.model import decode, encode
from jaxclt.errors import InputError
from jaxclt.io import dictionary
from jaxclt.io.formats.pieces import FileStore
from jaxclt.io.tensors import TensorFile, open_tensors
from jaxclt.lm.config import LMConfig

FORMATS = Path(__file__).resolve().parents[1] / "goldens" / "formats"
# name: (format, span, activation, read, write)
CASES = {
    "gemma_scope": ("gemma-scope", 1, "jumprelu", "normalized", "stream"),
    "gemma_scope_2": ("gemma-scope-2", 1, "jumprelu", "mlp_in", "stream"),
    "gemma_scope_2_clt": ("gemma-scope-2", 3, "jumprelu", "mlp_in", "stream"),
    "topk": ("circuit-tracer", 1, "topk", "mlp_in", "mlp"),
    "saelens": ("saelens", 1, "jumprelu", "normalized", "stream"),
    "saelens_relu": ("saelens", 1, "relu", "normalized", "stream"),
    "sparsify": ("sparsify", 1, "relu_topk", "mlp_in", "mlp"),
    "sparsify_groupmax": ("sparsify", 1, "groupmax", "mlp_in", "mlp"),
    "clt_training": ("sparsify", 3, "relu_topk", "mlp_in", "mlp"),
    "clt_training_tied": ("sparsify", 3, "relu_topk", "mlp_in", "mlp"),
    "clt_training_concat": ("sparsify", 3, "relu_topk", "mlp_in", "mlp"),
    "clt_training_per_layer": ("sparsify", 3, "relu_topk", "mlp_in", "mlp"),
    "llamascopium": ("llamascopium", 3, "jumprelu", "resid_mid", "stream"),
    "llamascopium_topk": ("llamascopium", 3, "relu_topk", "resid_mid", "stream"),
    "decode_clt": ("decode-clt", 3, "jumprelu", "normalized", "stream"),
    "decode_clt_source": ("decode-clt", 3, "jumprelu", "normalized", "stream"),
    "decode_clt_target": ("decode-clt", 3, "jumprelu", "normalized", "stream"),
    "crosslayer": ("crosslayer-transcoder", 3, "jumprelu", "resid_mid", "stream"),
}
# one of each kind of file, for what is done to all
KINDS = [
    *("gemma_scope", "gemma_scope_2", "saelens", "sparsify", "clt_training"),
    *("llamascopium", "crosslayer", "decode_clt"),
]


def expected(name: str) -> dict[str, np.ndarray]:
    with np.load(FORMATS / name / "expected.npz", allow_pickle=False) as found:
        return dict(found)


def answers(store: FileStore | Path, read_LTD: np.ndarray) -> tuple:
    """Activations and reconstruction of a dictionary."""
    where = store if isinstance(store, Path) else store.path
    params, cfg = dictionary.load_params(where)
    read = jnp.asarray(read_LTD)
    a = encode(params, read, cfg=cfg)
    return np.asarray(a), np.asarray(decode(params, a, read))


@pytest.mark.parametrize("name", CASES)
def test_it_encodes_and_decodes_as_its_tool(name: str):
    want = expected(name)
    a, y = answers(FORMATS / name, want["read_LTD"])
    if name == "llamascopium_topk":  # in units of the norm of what is written
        W = open_tensors(FORMATS / name / "sae_weights.safetensors")
        norms = [
            np.sqrt(sum(np.square(W.read(f"W_D.{m}")[i]).sum(1) for m in range(i, 3)))
            for i in range(3)
        ]
        a = a / np.stack(norms)[:, None]
    np.testing.assert_array_equal(a != 0, want["a_LTF"] != 0)
    np.testing.assert_allclose(a, want["a_LTF"], atol=1e-5)
    np.testing.assert_allclose(y, want["y_LTD"], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", CASES)
def test_what_a_format_says_of_itself(name: str):
    store = dictionary.open_dictionary(FORMATS / name)
    cfg = store.cfg
    found = (store.format, cfg.span, cfg.activation, cfg.read, store.write)
    assert found == CASES[name]
    assert (cfg.n_layers, cfg.d_model, cfg.n_features) == (3, 6, 10)
    assert set(store.files.values()) == {
        x for x in (FORMATS / name).rglob("*")
        if x.is_file() and x.name != "expected.npz"
    }  # fmt: skip


@pytest.mark.parametrize("name", CASES)
def test_rows_are_those_of_the_whole(name: str):
    store = dictionary.open_dictionary(FORMATS / name)
    for layer in range(3):
        whole = store.decoder(layer)
        for rows in ([], [0], [7, 1, 1, 9]):
            index = np.array(rows, np.int32)
            got = store.decoder_rows(layer, index)
            assert got.shape == (len(rows), store.cfg.n_writes(layer), 6)
            np.testing.assert_array_equal(got, whole[index])


@pytest.mark.parametrize(
    "name", ["gemma_scope", "gemma_scope_2", "saelens", "sparsify"]
)
def test_opening_reads_headers_only(name: str, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(TensorFile, "map", lambda *_: pytest.fail("weights were read"))
    dictionary.open_dictionary(FORMATS / name)


# -- npz files -------------------------------------------------------------------------


@pytest.fixture
def arrays() -> dict[str, np.ndarray]:
    x = np.arange(60, dtype=np.float32).reshape(10, 6)
    return {"rows": x, "columns": np.asfortranarray(x), "half": x[0].astype(np.float16)}


@pytest.mark.parametrize("write", [np.savez, np.savez_compressed])
def test_npz_members_are_read_in_any_order(tmp_path: Path, arrays: dict, write):
    write(tmp_path / "x.npz", **arrays)
    file = open_tensors(tmp_path / "x.npz")
    for name, x in arrays.items():
        got = file.read(name)
        assert got.dtype == x.dtype
        np.testing.assert_array_equal(got, x)
        np.testing.assert_array_equal(file.read(name, np.array([3, 0])), x[[3, 0]])
    mapped = isinstance(file.map("rows"), np.memmap)
    assert mapped == (write is np.savez)


@pytest.mark.parametrize("x", [np.arange(3), np.array(["a"]), np.ones(2, "complex64")])
def test_other_arrays_in_an_npz_are_refused(tmp_path: Path, x: np.ndarray):
    np.savez(tmp_path / "x.npz", x=x)
    with pytest.raises(InputError, match="dtype"):
        open_tensors(tmp_path / "x.npz")


def test_pickled_members_of_an_npz_are_refused(tmp_path: Path):
    np.savez(tmp_path / "x.npz", x=np.array([{}], object), allow_pickle=True)
    with pytest.raises(InputError, match="dtype"):
        open_tensors(tmp_path / "x.npz")


@settings(max_examples=150, deadline=None)
@given(data=st.data())
def test_a_damaged_npz_is_read_right_or_refused(
    tmp_path_factory: pytest.TempPathFactory, data: st.DataObject
):
    whole, names = (FORMATS / "gemma_scope/layer_0/params.npz").read_bytes(), ("W_enc",)
    damaged = bytearray(whole)
    # anywhere: most bytes of so small an archive are headers
    for at in data.draw(st.lists(st.integers(0, len(whole) - 1), max_size=4)):
        damaged[at] ^= data.draw(st.integers(1, 255))
    keep = data.draw(st.integers(0, len(whole)))
    file = tmp_path_factory.getbasetemp() / "damaged.npz"
    file.write_bytes(damaged[:keep] if data.draw(st.booleans()) else damaged)
    try:
        found = open_tensors(file)
        for name in set(names) & set(found.tensors):
            assert found.read(name).nbytes <= len(whole)
    except InputError:
        pass


# -- damage ----------------------------------------------------------------------------


@pytest.fixture
def copy(tmp_path: Path):
    def make(name: str) -> Path:
        folder = Path(shutil.copytree(FORMATS / name, tmp_path / name))
        (folder / "expected.npz").unlink()
        return folder

    return make


def weights(folder: Path) -> list[Path]:
    return sorted((*folder.rglob("*.safetensors"), *folder.rglob("*.npz")))


def load(file: Path) -> dict[str, np.ndarray]:
    if file.suffix == ".npz":
        with np.load(file) as found:
            return dict(found)
    return safetensors.numpy.load_file(file)


def store(file: Path, tensors: dict[str, np.ndarray]) -> None:
    if file.suffix == ".npz":
        np.savez(file, **tensors)
    else:
        safetensors.numpy.save_file(tensors, file)


def refused(folder: Path, match: str) -> None:
    with pytest.raises(InputError, match=match) as error:
        dictionary.load_params(folder)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("name", KINDS)
def test_truncated_files_are_refused(copy, name: str):
    folder = copy(name)
    for file in weights(folder):
        whole = file.read_bytes()
        for keep in (0, 7, 100, len(whole) // 2, len(whole) - 1):
            file.write_bytes(whole[:keep])
            refused(folder, "truncated|not a safetensors|not an npz")
        file.write_bytes(whole)


def damage(tensors: dict[str, np.ndarray], name: str, how: str) -> str:
    """Break one tensor in one way; what the refusal says."""
    x = tensors[name]
    if how == "missing":
        del tensors[name]
        return "no tensor|has no"
    if how == "unknown":
        tensors["extra"] = x
        return "extra"
    if how == "dtype":
        tensors[name] = x.astype(np.int32)
        return "dtype"
    if how == "shape":
        tensors[name] = np.concatenate([x, x], -1) if x.ndim else np.stack([x, x])
        return "shape"
    tensors[name] = np.full_like(x, {"nan": np.nan, "infinite": np.inf}[how])
    return "NaN"


@pytest.mark.parametrize(
    "how", ["missing", "unknown", "dtype", "shape", "nan", "infinite"]
)
@pytest.mark.parametrize("name", KINDS)
def test_damaged_tensors_are_refused(copy, name: str, how: str):
    folder = copy(name)
    file = weights(folder)[-1]
    whole, optional = load(file), ("nonlinearity.bandwidth", "encoder.b")
    if how in ("missing", "nan", "infinite"):
        optional += tuple(x for x in whole if x.startswith("post_encs."))
    for tensor in sorted(set(whole) - set(optional)):
        tensors = dict(whole)
        match = damage(tensors, tensor, how)
        store(file, tensors)
        refused(folder, match)


@pytest.mark.parametrize("name", KINDS)
def test_a_pickle_in_place_of_weights_is_never_opened(copy, name: str):
    folder = copy(name)
    for file in weights(folder):
        file.with_suffix(".pt").write_bytes(b"\x80\x04.")
        file.unlink()
        refused(folder, "pickle|missing")
        file.with_suffix(".bin").write_bytes(b"\x80\x04.")
    refused(folder / weights_name(folder), "pickle")


def weights_name(folder: Path) -> str:
    return next(folder.rglob("*.pt")).relative_to(folder).as_posix()


@pytest.mark.parametrize("name", KINDS)
def test_a_missing_layer_or_file_is_named(copy, name: str):
    folder = copy(name)
    if len(weights(folder)) == 1:
        weights(folder)[0].unlink()
        refused(folder, "missing|holds none")
        return
    shutil.rmtree(weights(folder)[1].parent)
    refused(folder, "layer 1 is missing|missing")


def configs(folder: Path) -> list[Path]:
    names = ("config.yaml", "config.json", "cfg.json")
    return sorted(x for x in folder.rglob("*") if x.name in names)


@pytest.mark.parametrize("name", KINDS)
@settings(
    max_examples=40,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
@given(data=st.data())
def test_damaged_configs_and_headers_never_escape_as_another_exception(
    name: str, data: st.DataObject, tmp_path_factory: pytest.TempPathFactory
):
    """Headers either still say the same of every tensor, or are refused."""
    folder = tmp_path_factory.getbasetemp() / f"fuzz_{name}"
    if not folder.exists():
        shutil.copytree(FORMATS / name, folder)
    files = [*configs(folder), *(x for x in weights(folder) if x.suffix != ".npz")]
    files = [x for x in files if x.name != "expected.npz"]
    file = data.draw(st.sampled_from(files))
    whole = file.read_bytes()
    header = file.suffix == ".safetensors"
    end = 8 + int.from_bytes(whole[:8], "little") if header else len(whole)
    damaged = bytearray(whole)
    for at in data.draw(st.lists(st.integers(0, end - 1), min_size=1, max_size=3)):
        damaged[at] = data.draw(st.integers(0, 255))
    if data.draw(st.booleans()) and not header:
        damaged = damaged[: data.draw(st.integers(0, len(damaged)))]
    file.write_bytes(damaged)
    try:
        params, _ = dictionary.load_params(folder)
        if header:
            before = dictionary.load_params(FORMATS / name)[0]
            np.testing.assert_array_equal(params.W_enc_LFD, before.W_enc_LFD)
            np.testing.assert_array_equal(params.b_dec_LD, before.b_dec_LD)
            for x, y in zip(params.W_dec, before.W_dec, strict=True):
                np.testing.assert_array_equal(x, y)
    except InputError:
        pass
    finally:
        file.write_bytes(whole)


def edit(file: Path, **changes: object) -> None:
    """Change fields of a config; `a__b` is b inside a."""
    text = file.read_text()
    config = json.loads(text) if file.suffix == ".json" else yaml.safe_load(text)
    for key, value in changes.items():
        *path, last = key.split("__")
        place = config
        for part in path:
            place = place[part]
        place[last] = value
    file.write_text(json.dumps(config))  # which is YAML too


@pytest.mark.parametrize(
    ("name", "changes", "match"),
    [
        ("saelens", {"architecture": "standard"}, "architecture"),
        ("saelens", {"architecture": "transcoder"}, "threshold|W_skip|differ"),
        ("saelens", {"normalize_activations": "layer_norm"}, "normalize_activations"),
        (
            "saelens",
            {"normalize_activations": "constant_norm_rescale"},
            "normalize_act",
        ),
        ("saelens", {"apply_b_dec_to_input": True}, "apply_b_dec_to_input"),
        ("saelens", {"reshape_activations": "hook_z"}, "reshape_activations"),
        ("saelens", {"rescale_by_moon": True}, "rescale_by_moon"),
        ("saelens", {"metadata__hook_name": "blocks.0.hook_mlp_in"}, "hook_name"),
        ("saelens", {"metadata__hook_name": "blocks.1.ln2.hook_normalized"}, "writes"),
        ("saelens", {"metadata__hook_name_out": None}, "hook_name_out"),
        ("sparsify", {"transcode": False}, "transcode"),
        ("sparsify", {"activation": "batchtopk"}, "activation"),
        ("sparsify", {"k": 0}, "k must be a whole number"),
        ("sparsify", {"k": True}, "k must be a whole number"),
        ("sparsify", {"k": 11}, "k <= 10"),
        ("sparsify", {"embed_skip": True}, "embed_skip"),
        ("sparsify", {"signed": True}, "signed"),
        ("sparsify_groupmax", {"k": 3}, "k"),
        ("clt_training", {"topk_coalesced": True}, "topk_coalesced"),
        ("clt_training", {"coalesce_topk": "group"}, "coalesce_topk"),
        ("clt_training", {"n_targets": 2}, "n_targets|W_decs"),
        ("clt_training", {"normalize_io": False}, "in_norm|normalize_io"),
        ("llamascopium", {"norm_activation": "token-wise"}, "norm_activation"),
        ("llamascopium", {"norm_activation": "batch-wise"}, "norm_activation"),
        ("llamascopium", {"act_fn": "batchtopk"}, "act_fn"),
        ("llamascopium", {"act_fn": "topk"}, "log_jumprelu_threshold"),
        ("llamascopium", {"sae_type": "sae"}, "sae_type"),
        ("llamascopium", {"use_decoder_bias": False}, "use_decoder_bias"),
        (
            "llamascopium",
            {"hook_points_in": ["blocks.0.hook_resid_mid"]},
            "must list 3",
        ),
        ("crosslayer", {"feature_input_hook": "hook_resid_pre"}, "feature_input_hook"),
        (
            "crosslayer",
            {"model__init_args__input_standardizer__class_path": "m.Samplewise"},
            "Samplewise",
        ),
        ("crosslayer", {"model__init_args": None}, "init_args"),
        ("decode_clt", {"normalization_method": "mean_std"}, "normalization_method"),
        ("decode_clt", {"activation_fn": "batchtopk"}, "activation_fn"),
        ("decode_clt", {"skip_connection": True}, "skip_connection"),
        ("decode_clt", {"decoder_tying": "per_source"}, "no tensor"),
        ("decode_clt", {"num_layers": 1 << 39}, "holds fewer"),
        ("decode_clt", {"tl_input_template": "blocks.{}.hook_resid_pre"}, "tl_input"),
        ("gemma_scope_2", {"model_kind": "cross_layer_transcoder"}, "axes"),
        ("gemma_scope_2", {"transcoders": "layer_0"}, "list of files"),
        ("topk", {"k": None}, "k"),
        ("topk", {"k": 2.5}, "k must be a whole number"),
    ],
)
def test_what_cannot_be_represented_is_named(copy, name, changes, match):
    folder = copy(name)
    everywhere = name.startswith(("sparsify", "clt_training"))  # layers must agree
    for file in configs(folder)[: None if everywhere else 1]:
        edit(file, **changes)
    refused(folder, match)


@pytest.mark.parametrize(
    ("tensor", "match"), [("post_encs.0", "post_encs.0"), ("W_skips.1", "W_skips.1")]
)
def test_what_no_linear_decoder_does_is_refused(copy, tensor: str, match: str):
    folder = copy("clt_training")
    file = weights(folder)[0]
    tensors = load(file)
    tensors[tensor] = np.ones_like(tensors[tensor])
    store(file, tensors)
    refused(folder, f"{match} is not zero")


def test_a_write_ahead_of_a_norm_is_refused_where_there_is_one():
    model = LMConfig(
        n_layers=3, d_model=6, n_heads=2, n_kv_heads=1, d_head=4, d_mlp=8, d_vocab=11,
        n_ctx=16,
    )  # fmt: skip
    for name, (*_, write) in CASES.items():
        opened = dictionary.open_dictionary(FORMATS / name)
        dictionary.check(opened, model)
        if write == "stream":
            dictionary.check(opened, model, post_norm=True)
        else:
            with pytest.raises(InputError, match="ahead of the norm"):
                dictionary.check(opened, model, post_norm=True)


def test_competing_features_and_their_config():
    assert CLTConfig(n_layers=1, d_model=2, n_features=4, span=1, k=2,
                     activation="groupmax").competes  # fmt: skip
    with pytest.raises(InputError, match="equal groups"):
        CLTConfig(n_layers=1, d_model=2, n_features=4, span=1, k=3,
                  activation="groupmax")  # fmt: skip
