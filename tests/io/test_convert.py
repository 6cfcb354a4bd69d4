"""From format to format: nothing is lost, or it is refused by name."""

from __future__ import annotations

import json
import typing
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy
import yaml
from cases import run_command as run
from transcoder import decode, encode

import jaxclt
from jaxclt.cli.convert import ConvertFlags
from jaxclt.clt.store import materialise
from jaxclt.errors import InputError
from jaxclt.io import dictionary
from jaxclt.io.convert import convert_dictionary
from jaxclt.io.formats.targets import TARGETS

FORMATS = Path(__file__).resolve().parents[1] / "goldens" / "formats"
# which formats can express each without loss, and then with what loss
WAYS = {
    "gemma_scope": ("circuit-tracer", "gemma-scope", "gemma-scope-2", "saelens"),
    "gemma_scope_2": ("circuit-tracer", "gemma-scope-2", "saelens"),
    "gemma_scope_2_clt": ("gemma-scope-2",),
    "topk": ("circuit-tracer",),
    "saelens": ("circuit-tracer", "gemma-scope-2", "saelens"),
    "saelens_relu": ("circuit-tracer", "gemma-scope", "gemma-scope-2", "saelens"),
    "sparsify": ("sparsify",),
    "sparsify_groupmax": ("sparsify",),
    "clt_training": (),
    "llamascopium": ("circuit-tracer", "gemma-scope-2"),
    "llamascopium_topk": (),
    "decode_clt": ("circuit-tracer", "gemma-scope-2"),
    "crosslayer": ("circuit-tracer", "gemma-scope-2"),
}
LOSSY = {
    ("gemma_scope_2", "gemma-scope"): {"skip"},
    ("gemma_scope_2_clt", "circuit-tracer"): {"skip"},
    ("saelens", "gemma-scope"): {"skip"},
    ("sparsify", "circuit-tracer"): {"relu"},
    ("clt_training", "circuit-tracer"): {"relu", "skip"},
    ("llamascopium_topk", "circuit-tracer"): {"relu"},
}


def answers(folder: Path) -> tuple[np.ndarray, np.ndarray]:
    store = dictionary.open_dictionary(folder)
    params = materialise(store)
    read = jnp.asarray(np.sin(np.arange(90, dtype="f").reshape(3, 5, 6)) * 2)
    a = encode(params, read, cfg=store.cfg)
    return np.asarray(a), np.asarray(decode(params, a, read))


def test_the_front_door_converts_and_reports(tmp_path: Path):
    report = jaxclt.convert_dictionary(
        FORMATS / "gemma_scope", tmp_path / "out", "gemma-scope-2"
    )
    sizes = {"layers": 3, "features": 10, "span": 1, "activation": "jumprelu"}
    assert report | sizes == report
    assert report["bytes"] > 1000
    assert report["lost"] == {}
    after = dictionary.open_dictionary(report["out"])
    assert after.format == report["to"] == "gemma-scope-2"
    with pytest.raises(jaxclt.InputError, match="exists; choose another output"):
        jaxclt.convert_dictionary(FORMATS / "topk", tmp_path / "out", "gemma-scope-2")


@pytest.mark.parametrize("name", WAYS)
def test_every_way_keeps_all_that_a_dictionary_answers(tmp_path: Path, name: str):
    before = dictionary.open_dictionary(FORMATS / name)
    want = answers(FORMATS / name)
    for to in TARGETS:
        out, steps = tmp_path / to, []
        if to not in (*WAYS[name], "jaxclt"):
            with pytest.raises(InputError):
                convert_dictionary(FORMATS / name, out, to)
            assert not out.exists()
            continue
        report = convert_dictionary(
            FORMATS / name, out, to, on_layer=lambda *x, s=steps: s.append(x)
        )
        assert steps == [(1, 3), (2, 3), (3, 3)]
        assert report["lost"] == {}
        assert (report["from"], report["to"]) == (before.format, to)
        after = dictionary.open_dictionary(out)
        assert after.format == to
        same = ("read", "span", "n_layers", "d_model", "n_features")
        assert [getattr(after.cfg, x) for x in same] == [
            getattr(before.cfg, x) for x in same
        ]
        assert after.write == before.write
        if to != "sparsify":
            assert after.model_name == before.model_name
        for x, y in zip(answers(out), want, strict=True):
            np.testing.assert_allclose(x, y, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("case", LOSSY, ids="-".join)
def test_what_is_lost_must_be_named(tmp_path: Path, case: tuple[str, str]):
    name, to = case
    source, lost = FORMATS / name, sorted(LOSSY[case])
    with pytest.raises(InputError, match=f"without loss: ({'|'.join(lost)})"):
        convert_dictionary(source, tmp_path / "out", to, lossy=lost[1:])
    with pytest.raises(InputError, match=r"--lossy colour: .* is lost"):
        convert_dictionary(source, tmp_path / "out", to, lossy=[*lost, "colour"])
    report = convert_dictionary(source, tmp_path / "out", to, lossy=lost)
    assert set(report["lost"]) == set(lost)
    before, after = map(dictionary.open_dictionary, (source, tmp_path / "out"))
    for layer in range(3):
        np.testing.assert_array_equal(before.decoder(layer), after.decoder(layer))
        assert after.skip(layer) is None or "skip" not in lost


def test_a_relu_is_a_topk_of_all_features(tmp_path: Path):
    """Sparsify can say what has no k."""
    source = dictionary.open_dictionary(FORMATS / "topk")
    params = materialise(source)
    cfg = type(source.cfg)(
        n_layers=3, d_model=6, n_features=10, span=1, activation="relu", read="mlp_in"
    )
    dictionary.save_dictionary(params, cfg, tmp_path / "relu", model_name="tiny")
    report = convert_dictionary(
        tmp_path / "relu", tmp_path / "out", "sparsify", lossy=["model_name"]
    )
    assert set(report["lost"]) == {"model_name"}
    for x, y in zip(answers(tmp_path / "out"), answers(tmp_path / "relu"), strict=True):
        np.testing.assert_allclose(x, y, rtol=1e-6, atol=1e-6)


def test_half_precision_stays_unless_the_format_has_none(tmp_path: Path):
    source = tmp_path / "half"
    source.mkdir()
    for i in range(3):
        file = f"layer_{i}.safetensors"
        tensors = safetensors.numpy.load_file(FORMATS / "topk" / file)
        half = {k: x.astype(jnp.dtype("bfloat16")) for k, x in tensors.items()}
        safetensors.numpy.save_file(half, source / file)
    config = yaml.safe_load((FORMATS / "topk/config.yaml").read_text())
    del config["activation"], config["k"]
    (source / "config.yaml").write_text(yaml.safe_dump(config))
    for to, dtype in (("gemma-scope-2", "bfloat16"), ("gemma-scope", "float32")):
        convert_dictionary(source, tmp_path / to, to)
        got = dictionary.open_dictionary(tmp_path / to).decoder(1)
        assert got.dtype == jnp.dtype(dtype)
        want = dictionary.open_dictionary(source).decoder(1)
        np.testing.assert_array_equal(got, want.astype(got.dtype))


def test_labels_go_along_and_outputs_are_not_overwritten(tmp_path: Path):
    convert_dictionary(FORMATS / "topk", tmp_path / "a", "circuit-tracer")
    (tmp_path / "a/labels.json").write_text('{"0:3": "x"}')
    convert_dictionary(tmp_path / "a", tmp_path / "b", "circuit-tracer")
    assert dictionary.read_labels(tmp_path / "b") == {(0, 3): "x"}
    with pytest.raises(InputError, match="exists"):
        convert_dictionary(tmp_path / "a", tmp_path / "b", "circuit-tracer")
    with pytest.raises(InputError, match="formats are"):
        convert_dictionary(tmp_path / "a", tmp_path / "c", "tar")


def test_a_failure_leaves_nothing(tmp_path: Path):
    source = tmp_path / "a"
    convert_dictionary(FORMATS / "topk", source, "circuit-tracer")
    file = source / "layer_2.safetensors"
    tensors = safetensors.numpy.load_file(file)
    tensors["W_dec"][4, 2] = np.nan
    safetensors.numpy.save_file(tensors, file)
    with pytest.raises(InputError, match="NaN"):
        convert_dictionary(source, tmp_path / "b", "circuit-tracer")
    assert [x.name for x in tmp_path.iterdir()] == ["a"]


def test_the_command_offers_every_format():
    hints = typing.get_type_hints(ConvertFlags, include_extras=True)
    (offered, *_) = typing.get_args(hints["to"])
    assert typing.get_args(offered) == tuple(TARGETS)


def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    source = FORMATS / "gemma_scope_2"
    assert run("convert", source, tmp_path / "a", "--to", "saelens", "--json") == 0
    report = json.loads(capsys.readouterr().out)
    assert (report["from"], report["to"]) == ("gemma-scope-2", "saelens")
    assert report["bytes"] == sum(
        x.stat().st_size for x in (tmp_path / "a").rglob("*") if x.is_file()
    )
    assert run("convert", source, tmp_path / "b", "--to", "gemma-scope") == 2
    assert "--lossy skip" in capsys.readouterr().err
    command = ("convert", source, tmp_path / "b", "--to", "gemma-scope")
    assert run(*command, "--lossy", "skip") == 0
    assert "lost: skip" in capsys.readouterr().out
