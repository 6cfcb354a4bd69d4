"""Other tools' dictionaries: read as their tool reads them, refused when damaged.

The fixtures are made by tests/goldens/make_dictionaries.py, mostly by those tools.
"""

from __future__ import annotations

from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from transcoder import decode, encode

from jaxclt.clt.config import CLTConfig
from jaxclt.errors import InputError
from jaxclt.io import dictionary
from jaxclt.io.formats.pieces import FileStore, Piece
from jaxclt.io.tensors import TensorFile, open_tensors
from jaxclt.lm.config import LMConfig

FORMATS = Path(__file__).resolve().parents[1] / "goldens" / "formats"
# name: (format, span, activation, read, write)
CASES = {
    "gemma_scope": ("gemma-scope", 1, "jumprelu", "normalized", "stream"),
    "gemma_scope_2": ("gemma-scope-2", 1, "jumprelu", "mlp_in", "stream"),
    "gemma_scope_2_clt": ("gemma-scope-2", 3, "jumprelu", "mlp_in", "stream"),
    "topk": ("circuit-tracer", 1, "signed_topk", "mlp_in", "mlp"),
    "saelens": ("saelens", 1, "jumprelu", "normalized", "stream"),
    "saelens_relu": ("saelens", 1, "relu", "normalized", "stream"),
    "sparsify": ("sparsify", 1, "topk", "mlp_in", "mlp"),
    "sparsify_groupmax": ("sparsify", 1, "groupmax", "mlp_in", "mlp"),
    "clt_training": ("sparsify", 3, "topk", "mlp_in", "mlp"),
    "clt_training_tied": ("sparsify", 3, "topk", "mlp_in", "mlp"),
    "clt_training_concat": ("sparsify", 3, "topk", "mlp_in", "mlp"),
    "clt_training_per_layer": ("sparsify", 3, "topk", "mlp_in", "mlp"),
    "llamascopium": ("llamascopium", 3, "jumprelu", "resid_mid", "stream"),
    "llamascopium_topk": ("llamascopium", 3, "topk", "resid_mid", "stream"),
    "decode_clt": ("decode-clt", 3, "jumprelu", "normalized", "stream"),
    "decode_clt_source": ("decode-clt", 3, "jumprelu", "normalized", "stream"),
    "decode_clt_target": ("decode-clt", 3, "jumprelu", "normalized", "stream"),
    "crosslayer": ("crosslayer-transcoder", 3, "jumprelu", "resid_mid", "stream"),
}


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
            got = store.decoder(layer, index)
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
        rows = Piece(file, name).read(np.array([3, 0]))
        np.testing.assert_array_equal(rows, x[[3, 0]])
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
                     activation="groupmax").gate.competes  # fmt: skip
    with pytest.raises(InputError, match="equal groups"):
        CLTConfig(n_layers=1, d_model=2, n_features=4, span=1, k=3,
                  activation="groupmax")  # fmt: skip
