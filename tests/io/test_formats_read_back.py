"""What `jaxclt convert` writes, read by the tools that it is meant for.

Needs them beside torch: circuit-tracer 0.5.0, sae-lens 6.54.12, eai-sparsify 1.3.3.
"""

from __future__ import annotations

import itertools
from pathlib import Path

import numpy as np
import pytest

from jaxclt.errors import InputError
from jaxclt.io.convert import convert_dictionary

FORMATS = Path(__file__).resolve().parents[1] / "goldens" / "formats"
# the tools warn of each other's parts
pytestmark = [pytest.mark.parity, pytest.mark.filterwarnings("ignore")]
NAMES = sorted(x.name for x in FORMATS.iterdir())
L = 3


def by_circuit_tracer(folder: Path, x, to: str):
    import torch
    import yaml

    plt = pytest.importorskip("circuit_tracer.transcoder.single_layer_transcoder")
    clt = pytest.importorskip("circuit_tracer.transcoder.cross_layer_transcoder")
    config = yaml.safe_load((folder / "config.yaml").read_text())
    files = config.get("transcoders") or [f"layer_{i}.safetensors" for i in range(L)]
    paths, how = [str(folder / x) for x in files], {"device": torch.device("cpu")}
    if config["model_kind"] == "transcoder_set":
        load = {
            "circuit-tracer": lambda path, i: plt.load_relu_transcoder(
                path, i, lazy_encoder=False, lazy_decoder=False, **how
            ),
            "gemma-scope": lambda path, i: plt.load_gemma_scope_transcoder(
                path, i, **how
            ),
            "gemma-scope-2": lambda path, i: plt.load_gemma_scope_2_transcoder(
                path, i, **how
            ),
        }[to]
        coders = [load(path, i) for i, path in enumerate(paths)]
        a = torch.stack([coder.encode(x[i]) for i, coder in enumerate(coders)])
        y = [coder.decode(a[i], x[i]) for i, coder in enumerate(coders)]
        return a, torch.stack(y)
    how["dtype"] = torch.float32
    if to == "gemma-scope-2":  # that version leaves out the last of what it is given
        coder = clt.load_gemma_scope_2_clt(dict(enumerate([*paths, ""])), **how)
    else:
        coder = clt.load_clt(str(folder), lazy_decoder=False, **how)
    a = coder.encode(x)
    return a, coder.decode(a.to_sparse(), x)


def by_saelens(folder: Path, x, to: str):
    import torch

    del to
    lib = pytest.importorskip("sae_lens")
    coders = [lib.SAE.load_from_disk(folder / f"layer_{i}") for i in range(L)]
    a = torch.stack([coder.encode(x[i]) for i, coder in enumerate(coders)])
    return a, torch.stack([coder(x[i]) for i, coder in enumerate(coders)])


def by_sparsify(folder: Path, x, to: str):
    import torch

    del to
    lib = pytest.importorskip("sparsify")
    torch.compiler.set_stance("force_eager")
    a, y = torch.zeros(L, x.shape[1], 10), []
    for i in range(L):
        coder = lib.SparseCoder.load_from_disk(folder / f"layers.{i}.mlp")
        found = coder.encode(x[i])
        a[i].scatter_(1, found.top_indices, found.top_acts)
        y.append(coder(x[i], y=x[i]).sae_out)
    return a, torch.stack(y)


READERS = {
    "circuit-tracer": by_circuit_tracer,
    "gemma-scope": by_circuit_tracer,
    "gemma-scope-2": by_circuit_tracer,
    "saelens": by_saelens,
    "sparsify": by_sparsify,
}


@pytest.mark.parametrize(("name", "to"), [*itertools.product(NAMES, READERS)])
def test_its_tool_answers_as_before(tmp_path: Path, name: str, to: str):
    torch = pytest.importorskip("torch")
    if (name, to) == ("topk", "circuit-tracer"):
        pytest.skip("that version has no TopK")
    try:
        convert_dictionary(FORMATS / name, tmp_path / "out", to)
    except InputError as error:
        pytest.skip(str(error))
    with np.load(FORMATS / name / "expected.npz", allow_pickle=False) as found:
        want = dict(found)
    with torch.no_grad():
        a, y = READERS[to](tmp_path / "out", torch.tensor(want["read_LTD"]), to)
    np.testing.assert_allclose(a, want["a_LTF"], atol=1e-5)
    np.testing.assert_allclose(y, want["y_LTD"], rtol=1e-5, atol=1e-5)
