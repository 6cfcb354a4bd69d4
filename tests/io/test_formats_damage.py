"""Damaged dictionaries of every format: refused in one line, whatever the damage."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import safetensors.numpy
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from jaxclt.errors import InputError
from jaxclt.io import dictionary

FORMATS = Path(__file__).resolve().parents[1] / "goldens" / "formats"
# one of each kind of file
KINDS = [
    *("gemma_scope", "gemma_scope_2", "saelens", "sparsify", "clt_training"),
    *("llamascopium", "crosslayer", "decode_clt"),
]


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
        ("clt_training", {"n_targets": 1 << 39}, "n_targets is 549755813888"),
        ("clt_training", {"n_targets": "3"}, "n_targets is '3'"),
        ("clt_training_per_layer", {"n_sources": 1 << 39}, "W_dec has shape"),
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
