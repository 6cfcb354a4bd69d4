import gguf
import pytest
from io_models import WORDS, write_word_tokenizer

from jaxclt.errors import InputError
from jaxclt.io.tokenizer import load_tokenizer

# A byte-level vocabulary with a few merges, as GPT-2's alphabet writes bytes.
MERGES = ["t h", "th e", "Ġ the", "Ġ c", "Ġc a", "Ġca t", "1 2", "Ġ Ġ"]
SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]


def byte_alphabet():
    from tokenizers import pre_tokenizers

    return sorted(pre_tokenizers.ByteLevel.alphabet())


def write_gguf_tokenizer(
    path, *, pre="smollm", model="gpt2", bos=1, eos=2, cut=False, adds_bos=False
):
    tokens = SPECIAL + byte_alphabet() + [m.replace(" ", "") for m in MERGES]
    types = [3] * len(SPECIAL) + [1] * (len(tokens) - len(SPECIAL))
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_tokenizer_model(model)
    writer.add_tokenizer_pre(pre)
    writer.add_token_list(tokens[: 5 if cut else None])
    writer.add_token_types(types)
    writer.add_token_merges(MERGES)
    writer.add_bos_token_id(bos)
    writer.add_eos_token_id(eos)
    writer.add_add_bos_token(adds_bos)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()
    return path


def test_word_level_directory(tmp_path):
    write_word_tokenizer(tmp_path)
    # transformers would take its llama class and rebuild another tokenizer
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    tok = load_tokenizer(tmp_path)
    assert (tok.bos_id, tok.eos_id, tok.pad_id) == (1, 2, None)
    assert tok.vocab_size == len(WORDS)
    assert tok.encode("the cat sat") == [1, 4, 5, 6]
    assert tok.encode("the dog", "never") == [4, 3]
    assert tok.token_strings([1, 4, 5]) == ["<bos>", "the", "cat"]


def test_bos_rules(tmp_path):
    write_word_tokenizer(tmp_path)
    tok = load_tokenizer(tmp_path)
    assert tok.encode("the", "auto") == tok.encode("the", "always") == [1, 4]
    assert tok.encode("<bos> the", "auto") == [1, 4]
    assert tok.encode("<bos> the", "always") == [1, 4]
    # only bos itself stands in for bos, as the tokenizer has it
    assert tok.encode("<eos> the", "auto") == tok.backend.encode("<eos> the")
    assert tok.encode("<eos> the", "auto") == [1, 2, 4]
    assert tok.encode("<eos> the", "always") == [1, 2, 4]
    assert tok.encode("", "auto") == [1]
    assert tok.encode("", "never") == []
    with pytest.raises(InputError, match="bos must be auto, always or never"):
        tok.encode("the", "yes")  # pyright: ignore[reportArgumentType]


def test_auto_does_what_the_model_was_trained_with(tmp_path):
    write_word_tokenizer(tmp_path, adds_bos=False)
    tok = load_tokenizer(tmp_path)
    assert tok.encode("the") == [4]
    assert tok.encode("the", "always") == [1, 4]


def test_without_bos_another_special_token_stands_in(tmp_path):
    write_word_tokenizer(tmp_path, bos=None)
    tok = load_tokenizer(tmp_path)
    assert tok.bos_id is None
    assert tok.encode("the") == [4]
    assert tok.encode("the", "always") == [0, 4]  # pad, although its id is zero


def test_byte_level_gguf(tmp_path):
    tok = load_tokenizer(write_gguf_tokenizer(tmp_path / "m.gguf"))
    assert (tok.bos_id, tok.eos_id) == (1, 2)
    text = "the cat, naïve 日本 12\n\tthe"
    ids = tok.encode(text, "always")
    assert ids[0] == 1
    assert tok.decode(ids[1:]) == text
    assert tok.token_strings(tok.encode("the cat", "never")) == ["the", " cat"]
    # digits stand apart with their own rule, although the merge exists
    assert tok.token_strings(tok.encode("12", "never")) == ["1", "2"]
    # and so does the space before one: the pair of spaces stays whole
    assert tok.token_strings(tok.encode("  1", "never")) == ["  ", "1"]
    assert tok.encode("<|im_start|>the") == [1, *tok.encode("the", "never")]


@pytest.mark.parametrize("adds", [True, False])
def test_a_gguf_file_says_whether_bos_is_added(tmp_path, adds):
    tok = load_tokenizer(write_gguf_tokenizer(tmp_path / "m.gguf", adds_bos=adds))
    assert tok.adds_bos == adds
    assert (tok.encode("the")[0] == 1) == adds


def test_gpt2_rule_joins_digits(tmp_path):
    tok = load_tokenizer(write_gguf_tokenizer(tmp_path / "m.gguf", pre="gpt-2"))
    assert tok.token_strings(tok.encode("12", "never")) == ["12"]


def test_eos_that_is_bos_is_mended(tmp_path):
    tok = load_tokenizer(write_gguf_tokenizer(tmp_path / "m.gguf", eos=1))
    assert (tok.bos_id, tok.eos_id, tok.pad_id) == (1, 2, 2)


def test_json_beside_a_gguf_file_is_preferred(tmp_path):
    path = write_gguf_tokenizer(tmp_path / "m.gguf", pre="unheard-of")
    with pytest.raises(InputError, match="pre-tokenizer 'unheard-of' is not supported"):
        load_tokenizer(path)
    write_word_tokenizer(tmp_path)
    assert load_tokenizer(path).encode("the cat") == [1, 4, 5]


def test_damaged(tmp_path):
    with pytest.raises(InputError, match="holds no tokenizer that can be loaded"):
        load_tokenizer(tmp_path)
    path = write_gguf_tokenizer(tmp_path / "m.gguf", cut=True)
    with pytest.raises(InputError, match="its tokenizer is damaged"):
        load_tokenizer(path)
    path = write_gguf_tokenizer(tmp_path / "m.gguf", bos=10_000)
    with pytest.raises(InputError, match="its tokenizer is damaged"):
        load_tokenizer(path)
    (tmp_path / "tokenizer.json").write_text('{"model"')
    with pytest.raises(InputError, match=r"tokenizer.json is damaged") as error:
        load_tokenizer(tmp_path)
    assert "\n" not in str(error.value)
