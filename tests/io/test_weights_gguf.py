import contextlib

import gguf
import numpy as np
import pytest
from gguf import GGMLQuantizationType as Kind
from hypothesis import given, settings
from hypothesis import strategies as st
from io_models import CFG, assert_same, random_params

from jaxclt.errors import InputError
from jaxclt.io.gguf_file import open_gguf
from jaxclt.io.names import from_leaf, tensor_name
from jaxclt.io.rows import LLAMA
from jaxclt.io.weights_gguf import load_gguf


def permute(w, n_head):
    """llama.cpp's own conversion of query and key rows (convert_hf_to_gguf.py)."""
    return (
        w.reshape(n_head, 2, w.shape[0] // n_head // 2, *w.shape[1:])
        .swapaxes(1, 2)
        .reshape(w.shape)
    )


def write_gguf(path, params, cfg=CFG, *, kind=Kind.F32, meta=(), change=None):
    """A llama GGUF file; matrices are of type `kind`, vectors float32."""
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_block_count(cfg.n_layers)
    writer.add_context_length(cfg.n_ctx)
    writer.add_embedding_length(cfg.d_model)
    writer.add_feed_forward_length(cfg.d_mlp)
    writer.add_head_count(cfg.n_heads)
    writer.add_head_count_kv(cfg.n_kv_heads)
    writer.add_key_length(cfg.d_head)
    writer.add_value_length(cfg.d_head)
    writer.add_rope_dimension_count(cfg.d_head)
    writer.add_rope_freq_base(cfg.rope_theta)
    writer.add_layer_norm_rms_eps(cfg.norm_eps)
    writer.add_token_list(["a", "b"])  # a string array for the header parser
    for add, *arguments in meta:
        getattr(writer, add)(*arguments)
    tensors = {}
    for row in LLAMA:
        leaf = getattr(params.blocks if row.per_layer else params, row.leaf)
        if leaf is None:
            continue
        whole = np.asarray(leaf)
        for i, one in enumerate(whole if row.per_layer else whole[None]):
            w = from_leaf(one, row, cfg)
            if row.rotary:
                w = permute(w, cfg.n_heads if "q_" in row.leaf else cfg.n_kv_heads)
            tensors[tensor_name(row, "gguf", i)] = np.ascontiguousarray(w)
    if change:
        change(tensors)
    for name, w in tensors.items():
        if w.ndim == 1 or kind == Kind.F32:
            writer.add_tensor(name, w)
        else:
            data = gguf.quants.quantize(w, kind)
            writer.add_tensor(name, data, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("bias", [True, False])
def test_round_trip(tmp_path, tied, bias):
    params = random_params(tied=tied, bias=bias)
    loaded, cfg = load_gguf(write_gguf(tmp_path / "m.gguf", params))
    assert cfg == CFG
    assert_same(loaded, params)


@pytest.mark.parametrize(
    ("kind", "atol"),
    [
        (Kind.F16, 3e-3),
        (Kind.BF16, 2e-2),
        (Kind.Q8_0, 3e-2),
        (Kind.Q5_0, 0.3),
        (Kind.Q4_1, 0.3),
    ],
)
def test_quantised_types(tmp_path, kind, atol):
    path = write_gguf(tmp_path / "m.gguf", random_params(), kind=kind)
    assert_same(load_gguf(path)[0], random_params(), atol=atol)


def test_header_and_tensors_agree_with_the_gguf_package(tmp_path):
    meta = [
        ("add_array", "x.ints", [1, -2, 3]),
        ("add_array", "x.floats", [0.5, 1.5]),
        ("add_bool", "x.bool", True),
        ("add_int8", "x.int8", -3),
        ("add_uint64", "x.uint64", 2**63 + 1),
        ("add_float64", "x.float64", 0.1),
        ("add_string", "x.text", "naïve 日本"),
        ("add_custom_alignment", 64),
    ]
    path = write_gguf(tmp_path / "m.gguf", random_params(), kind=Kind.Q8_0, meta=meta)
    ours, reference = open_gguf(path), gguf.GGUFReader(path)
    keys = {key for key in reference.fields if not key.startswith("GGUF.")}
    assert ours.meta.keys() == keys
    for key in keys:
        expected = reference.fields[key].contents()
        if isinstance(expected, float):
            assert ours.meta[key] == pytest.approx(expected, rel=1e-6)
        else:
            assert ours.meta[key] == expected
    assert list(ours.tensors) == [t.name for t in reference.tensors]
    for t in reference.tensors:
        expected = gguf.quants.dequantize(t.data, t.tensor_type)
        np.testing.assert_array_equal(ours.get(t.name), expected)


def test_channel_order_is_halves(tmp_path):
    """Row 2j of a head in the file is channel j, row 2j + 1 is channel j + C/2."""
    path = write_gguf(tmp_path / "m.gguf", random_params())
    stored = open_gguf(path).get("blk.1.attn_k.weight")
    k_DGC = np.asarray(load_gguf(path)[0].blocks.k_LDGC[1])
    g, j, C = 1, 3, CFG.d_head
    np.testing.assert_array_equal(stored[g * C + 2 * j], k_DGC[:, g, j])
    np.testing.assert_array_equal(stored[g * C + 2 * j + 1], k_DGC[:, g, j + C // 2])


@settings(max_examples=40, deadline=None, derandomize=True, database=None)
@given(share=st.floats(0, 1, exclude_max=True), header=st.booleans())
def test_truncated_anywhere(tmp_path_factory, share, header):
    folder = tmp_path_factory.mktemp("cut")
    file = write_gguf(folder / "m.gguf", random_params())
    whole = file.read_bytes()
    # Half of the cuts inside the header, which is a small part of the file.
    end = open_gguf(file).tensors["token_embd.weight"].offset if header else len(whole)
    file.write_bytes(whole[: int(share * end)])
    with pytest.raises(InputError) as error:
        load_gguf(file)
    assert "\n" not in str(error.value)


@settings(max_examples=60, deadline=None, derandomize=True, database=None)
@given(data=st.data())
def test_damaged_header_never_raises_anything_else(tmp_path_factory, data):
    folder = tmp_path_factory.mktemp("bits")
    file = write_gguf(folder / "m.gguf", random_params())
    content = bytearray(file.read_bytes())
    end = open_gguf(file).tensors["token_embd.weight"].offset
    at = data.draw(st.integers(0, end - 1))
    content[at] ^= data.draw(st.integers(1, 255))
    file.write_bytes(content)
    with contextlib.suppress(InputError):
        load_gguf(file)  # some damage is harmless: a letter of an unused text


@pytest.mark.parametrize(
    ("meta", "message"),
    [
        ([("add_rope_scaling_type", gguf.RopeScalingType.LONGROPE)], "scaled rotary"),
        ([("add_expert_count", 4)], "mixtures of experts"),
    ],
)
def test_unsupported_metadata(tmp_path, meta, message):
    path = write_gguf(tmp_path / "m.gguf", random_params(), meta=meta)
    with pytest.raises(InputError, match=message):
        load_gguf(path)


def test_other_architecture(tmp_path):
    writer = gguf.GGUFWriter(tmp_path / "m.gguf", "mamba")
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()
    with pytest.raises(InputError, match="'mamba' is not supported; supported: llama"):
        load_gguf(tmp_path / "m.gguf")


def test_missing_unknown_and_not_finite(tmp_path):
    def spoil(tensors):
        tensors["blk.0.ffn_up.weight"][2, 3] = np.nan

    changes = {
        "blk.1.attn_v.weight is missing": lambda ts: ts.pop("blk.1.attn_v.weight"),
        "token_embd.weight is missing": lambda ts: ts.pop("token_embd.weight"),
        "blk.0.attn_q_norm.weight does not belong": lambda ts: ts.update(
            {"blk.0.attn_q_norm.weight": np.ones(16, np.float32)}
        ),
        "7 rope factors for heads of d_head=16": lambda ts: ts.update(
            {"rope_freqs.weight": np.ones(7, np.float32)}
        ),
        "blk.0.ffn_up.weight contains NaN": spoil,
        r"output_norm.weight has shape \(4,\)": lambda ts: ts.update(
            {"output_norm.weight": np.ones(4, np.float32)}
        ),
    }
    for message, change in changes.items():
        path = write_gguf(tmp_path / "m.gguf", random_params(), change=change)
        with pytest.raises(InputError, match=message):
            load_gguf(path)


def test_no_gguf_file(tmp_path):
    with pytest.raises(InputError, match=r"cannot read .*absent.gguf"):
        open_gguf(tmp_path / "absent.gguf")
    (tmp_path / "text.gguf").write_text("hello, world")
    with pytest.raises(InputError, match="is not a GGUF file"):
        open_gguf(tmp_path / "text.gguf")
    (tmp_path / "old.gguf").write_bytes(b"GGUF" + bytes([1]) + bytes(40))
    with pytest.raises(InputError, match="GGUF version 1 is not supported"):
        open_gguf(tmp_path / "old.gguf")
