import dataclasses
import hashlib
import os
from types import SimpleNamespace

import jax.numpy as jnp
import pytest
from io_models import CFG, assert_same, random_params, write_word_tokenizer
from test_weights_gguf import write_gguf

import jaxclt.io.model as room
from jaxclt.errors import InputError
from jaxclt.files import digest
from jaxclt.files.digest import fingerprint, sha256
from jaxclt.io.model import load_model, save_hf
from jaxclt.text.corpus import pack_windows
from jaxclt.text.windows import read_windows
from jaxclt.trace.record import prompt_tokens


@pytest.fixture
def saved(tmp_path):
    save_hf(random_params(), CFG, tmp_path / "m")
    write_word_tokenizer(tmp_path / "m")
    return tmp_path / "m"


def test_directory(saved):
    model = load_model(saved)
    assert_same(model.params, random_params())
    assert model.cfg == CFG
    assert model.name == str(saved)
    assert model.tokenizer.encode("the cat") == [1, 4, 5]


def test_gguf_file_and_its_directory(tmp_path):
    write_word_tokenizer(tmp_path)
    path = write_gguf(tmp_path / "m.gguf", random_params())
    model = load_model(path)
    assert_same(model.params, random_params())
    assert model.hash == load_model(tmp_path).hash
    (tmp_path / "n.gguf").write_bytes(b"")
    with pytest.raises(InputError, match=r"no config.json and 2 .gguf files"):
        load_model(tmp_path)


def test_known_name_is_fetched(saved, monkeypatch):
    monkeypatch.setattr(room, "fetch", lambda name, progress: saved)
    model = load_model("smollm2-135m")
    assert model.name == "smollm2-135m"


def test_hub_id(saved, monkeypatch):
    import huggingface_hub

    asked, taken = [], set()
    names = [x.name for x in saved.iterdir()]

    class Hub:
        def model_info(self, repo, **how):
            if repo == "a/absent":
                raise OSError("Name or service not known")
            found = (*names, "pytorch_model.bin", "original/consolidated.safetensors")
            siblings = [SimpleNamespace(rfilename=x, size=1) for x in found]
            return SimpleNamespace(siblings=siblings, sha="0" * 40)

    def download(repo, *, revision, allow_patterns=(), local_files_only=False):
        if local_files_only:
            raise OSError("nothing cached")
        asked.append((repo, revision))
        taken.update(allow_patterns)
        return str(saved)

    monkeypatch.setattr(huggingface_hub, "HfApi", Hub)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    load_model("org/tiny")
    load_model("org/tiny@v1.0")
    assert asked == [("org/tiny", None), ("org/tiny", "v1.0")]
    assert taken == set(names)
    with pytest.raises(InputError, match="no file or directory 'a/absent', and the hu"):
        load_model("a/absent")


@pytest.mark.parametrize("name", ["gpt5", "./no/such", "/no/such", "no/such.gguf", ""])
def test_unknown_name_lists_the_known(name):
    with pytest.raises(InputError, match="the known names are addition, smollm2-135m"):
        load_model(name)


def test_dtype(saved):
    model = load_model(saved, dtype="bfloat16")
    assert model.params.embed_VD.dtype == jnp.bfloat16
    with pytest.raises(InputError, match="dtype 'int8' is unknown; use one of float32"):
        load_model(saved, dtype="int8")
    save_hf(model.params, model.cfg, saved)  # stays bfloat16 on disk
    assert (saved / "model.safetensors").stat().st_size < 100_000
    assert_same(load_model(saved).params, random_params(), atol=2e-2)


def test_hash_tells_weights_apart(saved):
    before = load_model(saved).hash
    assert before == load_model(saved).hash
    save_hf(random_params(seed=1), CFG, saved)
    assert load_model(saved).hash != before


def test_fingerprint_of_several_files(tmp_path):
    a, b = tmp_path / "a", tmp_path / "b"
    a.write_bytes(b"1" * 3_000_000)
    b.write_bytes(b"2")
    both = fingerprint({"a": a, "b": b})
    assert both == fingerprint({"b": b, "a": a})
    assert both != fingerprint({"a": b, "b": a})
    b.write_bytes(b"3")
    assert fingerprint({"a": a, "b": b}) != both


def test_weights_changed_in_the_middle_are_other_weights(saved):
    """Same names, size, first and last bytes, and the time put back."""
    before, file = load_model(saved).hash, saved / "model.safetensors"
    stat, data = file.stat(), bytearray(file.read_bytes())
    data[len(data) // 2] ^= 0x80
    with file.open("r+b") as stream:
        stream.write(data)
    os.utime(file, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    assert load_model(saved).hash != before


@pytest.mark.parametrize("name", ["tokenizer.json", "tokenizer_config.json"])
def test_another_tokenizer_is_another_model(saved, name):
    before, file = load_model(saved).hash, saved / name
    text = file.read_text() if file.is_file() else "{}"
    file.write_text(text + "\n")
    assert load_model(saved).hash != before


def test_a_tokenizer_beside_a_gguf_file_is_part_of_the_model(tmp_path):
    path = write_gguf(tmp_path / "m.gguf", random_params())
    write_word_tokenizer(tmp_path)
    before = load_model(path).hash
    write_word_tokenizer(tmp_path, adds_bos=False)
    assert load_model(path).hash != before != sha256(path)


def test_large_files_are_hashed_once_for_all_processes(tmp_path, monkeypatch):
    monkeypatch.setenv("JAXCLT_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(digest, "_LARGE", 10)
    monkeypatch.setattr(digest, "_SETTLED_S", -1e9)
    read = []
    whole = hashlib.file_digest
    monkeypatch.setattr(hashlib, "file_digest", lambda *a: read.append(1) or whole(*a))
    file = tmp_path / "weights"
    file.write_bytes(b"x" * 100)
    first = sha256(file)
    assert first == hashlib.sha256(b"x" * 100).hexdigest()
    monkeypatch.setattr(digest, "_known", {})  # as a new process
    assert sha256(file) == first
    assert len(read) == 1
    (note,) = (tmp_path / "cache" / "hashes").iterdir()
    note.write_text("damaged")
    monkeypatch.setattr(digest, "_known", {})
    assert sha256(file) == first
    file.write_bytes(b"y" * 100)
    assert sha256(file) == hashlib.sha256(b"y" * 100).hexdigest()


def test_a_file_that_was_just_written_is_not_remembered(tmp_path, monkeypatch):
    """The clock of the file system may not tell the next change from this one."""
    monkeypatch.setattr(digest, "_known", {})
    file = tmp_path / "weights"
    file.write_bytes(b"x")
    sha256(file)
    assert not digest._known


def test_foreign_tokenizer_is_refused(tmp_path):
    cfg = dataclasses.replace(CFG, d_vocab=7)
    save_hf(random_params(cfg), cfg, tmp_path)
    write_word_tokenizer(tmp_path)
    with pytest.raises(InputError, match="has 10 tokens but the model only 7"):
        load_model(tmp_path)


def test_tokens_added_later_need_no_embedding(tmp_path):
    """As Gemma 3's mark of an image, which its text models have no row for."""
    save_hf(random_params(), CFG, tmp_path / "m")
    write_word_tokenizer(tmp_path / "m", late=("<image>", "<more>"))
    model = load_model(tmp_path / "m")
    assert prompt_tokens(model, "the cat") == [1, 4, 5]
    for ask in (
        lambda: prompt_tokens(model, "the <more> cat"),
        lambda: read_windows(model, ["the cat", "the <more> cat"]),
        lambda: pack_windows(["the <more>"], model.tokenizer, size=8, n_tokens=9),
    ):
        with pytest.raises(InputError, match=r"'<more>' in .* is token 11"):
            ask()
    with pytest.raises(InputError, match=r"not in 0\.\.9"):
        prompt_tokens(model, [4, 10])
    file = tmp_path / "prompts.jsonl"
    file.write_text('{"prompt": "the cat"}\n\n{"prompt": "a <image>"}\n')
    with pytest.raises(InputError, match=r"prompts.jsonl line 3: '<image>' in"):
        read_windows(model, file)


def test_a_gguf_file_may_have_such_tokens_too(tmp_path):
    """Or fewer than rows: what has no token reads by its number."""
    meta = [
        ("add_tokenizer_model", "llama"),
        ("add_token_types", [1, 3]),
        ("add_token_scores", [0.0, 0.0]),
        ("add_add_bos_token", False),
    ]

    def tokenizer(n_rows):
        cfg = dataclasses.replace(CFG, d_vocab=n_rows)
        path = tmp_path / f"{n_rows}.gguf"
        return load_model(
            write_gguf(path, random_params(cfg), cfg, meta=meta)
        ).tokenizer

    with pytest.raises(InputError, match="'b' in 'b' is token 1"):
        tokenizer(1).find("b")
    assert tokenizer(3).token_strings([0, 1, 2]) == ["a", "b", "id:2"]
