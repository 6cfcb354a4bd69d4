"""The hub, played by a folder: what is fetched, and how it says no."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from types import SimpleNamespace

import huggingface_hub
import numpy as np
import pytest
import yaml
from fake_hub import FakeHub
from huggingface_hub import errors

from jaxclt.cli import main as cli
from jaxclt.errors import InputError
from jaxclt.io import dictionary, hub
from jaxclt.io.model import load_model
from jaxclt.io.published import pairs, supplement

FORMATS = Path(__file__).resolve().parents[1] / "goldens" / "formats"


@pytest.fixture
def fake(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> FakeHub:
    return FakeHub.instead_of_the_real_one(tmp_path, monkeypatch)


def http_error(kind: type, status: int) -> Exception:
    # whatever its HTTP library of the day has: only these are looked at
    response = SimpleNamespace(status_code=status, headers={}, request=None)
    return kind("it said no", response=response)


@pytest.mark.parametrize(
    ("name", "parts"),
    [
        ("a/b", ("a/b", "", None)),
        ("a/b@main", ("a/b", "", "main")),
        ("a/b//c/d@refs/pr/1", ("a/b", "c/d", "refs/pr/1")),
        ("a/b/c/d", ("a/b", "c/d", None)),
        ("a/b-1.5_x//c", ("a/b-1.5_x", "c", None)),
        ("a", None),
        ("./a/b", None),
        ("~/a/b", None),
        ("a/../b", None),
        ("a/b/../../etc", None),
        ("a/b//..", None),
        ("a b/c", None),
        ("hf://a/b", None),
    ],
)
def test_names_of_places(name: str, parts: tuple | None):
    assert hub.parse_hub_ref(name) == parts
    whole = parts is not None and not parts[1]
    assert hub.parse_hub_id(name) == ((parts[0], parts[2]) if whole else None)


@pytest.mark.parametrize(
    "name",
    [
        *("gemma_scope", "saelens", "sparsify", "llamascopium", "crosslayer", "topk"),
        "decode_clt",
    ],
)
@pytest.mark.parametrize("folder", ["", "some/where"])
def test_only_what_a_format_needs_is_fetched(fake: FakeHub, name: str, folder: str):
    place = fake.add("a/b", FORMATS / name, folder)
    for extra in ("features/layer_0.bin", "features/x.safetensors", "README.md"):
        (place / extra).parent.mkdir(exist_ok=True)
        (place / extra).write_bytes(b"x" * 1000)
    (fake.root / "a/b" / "pytorch_model.bin").write_bytes(b"x")
    store = dictionary.open_dictionary(f"a/b//{folder}@v1" if folder else "a/b")
    want = {f"{folder}/{x}".lstrip("/") for x in store.files}
    assert set(fake.fetched) == want
    local = dictionary.open_dictionary(FORMATS / name)
    assert store.cfg == local.cfg
    assert store.digest() == local.digest()
    np.testing.assert_array_equal(store.decoder(1), local.decoder(1))


def test_a_run_of_sparsify_is_fetched_beside_the_config_of_its_trainer(fake: FakeHub):
    place = fake.add("a/b", FORMATS / "sparsify")
    (place / "config.json").write_text('{"batch_size": 32}')
    (place / "optimizer.pt").write_bytes(b"x")
    store = dictionary.open_dictionary("a/b")
    assert set(fake.fetched) == {"config.json", *store.files}


def test_listed_files_of_other_repositories_are_fetched(fake: FakeHub):
    """As in the published sets of GemmaScope: config.yaml here, weights there."""
    fake.add("google/scope", FORMATS / "gemma_scope")
    place = fake.root / "me/set"
    place.mkdir(parents=True)
    config = yaml.safe_load((FORMATS / "gemma_scope/config.yaml").read_text())
    config["transcoders"] = [
        f"hf://google/scope/{x}?revision=main" for x in config["transcoders"]
    ]
    (place / "config.yaml").write_text(yaml.safe_dump(config))
    store = dictionary.open_dictionary("me/set")
    assert store.format == "gemma-scope"
    local = dictionary.open_dictionary(FORMATS / "gemma_scope")
    np.testing.assert_array_equal(store.decoder(2), local.decoder(2))
    assert len(store.files) == 4
    assert "config.yaml" in fake.fetched
    assert set(fake.fetched[1:]) == {
        "config.yaml", *(f"layer_{i}/params.npz" for i in range(3))
    }  # fmt: skip


def test_a_fetched_dictionary_opens_without_a_network(fake: FakeHub):
    fake.add("a/b", FORMATS / "gemma_scope_2")
    first = dictionary.open_dictionary("a/b")
    fake.error = ConnectionError("no route")
    assert dictionary.open_dictionary("a/b").digest() == first.digest()
    (fake.cache / "a/b/layer_1/params.safetensors").unlink()
    with pytest.raises(InputError, match=r"layer_1/params.safetensors is missing"):
        dictionary.open_dictionary("a/b")
    shutil.rmtree(fake.cache)
    with pytest.raises(InputError, match=r"cannot be reached.*no route"):
        dictionary.open_dictionary("a/b")


@pytest.mark.parametrize(
    ("error", "match"),
    [
        (http_error(errors.GatedRepoError, 403), "is gated: .*hf auth login"),
        (http_error(errors.RepositoryNotFoundError, 404), "no .* 'a/b'.*HF_TOKEN"),
        (http_error(errors.RevisionNotFoundError, 404), "has no revision 'v9'"),
        (http_error(errors.HfHubHTTPError, 401), "may not be read"),
        (http_error(errors.HfHubHTTPError, 500), "cannot be reached.*it said no"),
        (errors.OfflineModeIsEnabled("offline mode"), "cannot be reached.*offline"),
        (ConnectionError("[Errno -2]\nmore"), "cannot be reached.*Errno -2"),
        (TimeoutError(), "cannot be reached.*TimeoutError"),
    ],
)
@pytest.mark.parametrize("what", ["dictionary", "model"])
def test_the_hub_says_no_in_one_line(fake: FakeHub, error, match: str, what: str):
    fake.error = error
    ask = {
        "model": lambda: load_model("a/b@v9"),
        "dictionary": lambda: dictionary.open_dictionary("a/b//c@v9"),
    }[what]
    with pytest.raises(InputError, match=match) as found:
        ask()
    assert "\n" not in str(found.value)


def test_a_token_that_was_not_admitted_is_told_so(
    fake: FakeHub, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(huggingface_hub, "get_token", lambda: "hf_x")
    fake.error = http_error(errors.GatedRepoError, 403)
    with pytest.raises(InputError, match="account of your token has not accepted"):
        dictionary.open_dictionary("a/b")


def test_what_does_not_fit_is_not_fetched(
    fake: FakeHub, monkeypatch: pytest.MonkeyPatch
):
    fake.add("a/b", FORMATS / "gemma_scope_2")
    usage = SimpleNamespace(free=1000)  # config.yaml fits
    monkeypatch.setattr(hub.shutil, "disk_usage", lambda _: usage)
    with pytest.raises(
        InputError, match=r"needs 0.0 GB more, 0.0 GB are free .*HF_HOME"
    ):
        dictionary.open_dictionary("a/b")
    assert fake.fetched == ["config.yaml"]


def test_folders_and_repositories_without_a_dictionary(fake: FakeHub):
    fake.add("a/b", FORMATS / "gemma_scope_2", "x")
    with pytest.raises(InputError, match="has no folder 'y'"):
        dictionary.open_dictionary("a/b//y")
    with pytest.raises(InputError, match=r"no dictionary in a known format.*//folder"):
        dictionary.open_dictionary("a/b")
    assert fake.fetched == []
    model = fake.add("a/model", FORMATS / "topk")
    (model / "config.yaml").rename(model / "config.json")
    (model / "config.json").write_text('{"model_type": "llama"}')
    with pytest.raises(InputError, match="no dictionary in a known format"):
        dictionary.open_dictionary("a/model")


@pytest.mark.parametrize("name", ["neuronz", "a/b c", "/nowhere"])
def test_what_is_no_name_is_not_looked_up(fake: FakeHub, name: str):
    fake.error = AssertionError("the hub was asked")
    with pytest.raises(InputError, match="no dictionary"):
        dictionary.open_dictionary(name)


# -- what is published -----------------------------------------------------------------


def test_every_published_pair_can_be_asked_for():
    layouts = {"circuit-tracer", "gemma-scope", "gemma-scope-2"}
    for pair in pairs():
        assert hub.parse_hub_ref(pair.dictionary), pair
        assert hub.parse_hub_id(pair.model), pair
        assert pair.layout in layouts
        assert pair.kind in ("CLT", "PLT")
    names = [pair.dictionary for pair in pairs()]
    assert len(set(names)) == len(names) > 25
    small = "mwhanna/gemma-scope-2-270m-it//transcoder_all/width_16k_l0_small_affine"
    assert ("google/gemma-3-270m-it", small) in {
        (pair.model, pair.dictionary) for pair in pairs()
    }


def test_what_a_published_config_leaves_unsaid_is_filled_in(fake: FakeHub):
    """Data of the table: its k is nowhere in the repository."""
    name = "facebook/crv-8b-instruct-transcoders"
    place = fake.add(name, FORMATS / "topk")
    config = yaml.safe_load((place / "config.yaml").read_text())
    del config["k"]
    (place / "config.yaml").write_text(yaml.safe_dump(config))
    assert supplement(f"{name}@main") == {"activation": "topk", "k": 128}
    with pytest.raises(InputError, match="1 <= k <= 10, not 128"):
        dictionary.open_dictionary(name)  # ours is smaller
    fake.add("a/b", place)
    with pytest.raises(InputError, match="not None"):
        dictionary.open_dictionary("a/b")
    assert supplement("a/b") == {}


def test_the_list_is_printed(capsys: pytest.CaptureFixture[str]):
    cli.main(["fetch", "--list", "--json"])
    found = json.loads(capsys.readouterr().out)
    assert found["models"]["smollm2-135m"] == "Apache-2.0"
    assert {"model", "dictionary", "size_gb", "licence"} <= set(found["pairs"][0])
    cli.main(["fetch", "--list"])
    text = capsys.readouterr().out
    assert "smollm2-135m" in text
    row = next(x for x in text.splitlines() if "clt-gemma-2-2b-2.5M" in x)
    assert "(CLT, circuit-tracer, 98,304 features, 171 GB; licence: " in row
