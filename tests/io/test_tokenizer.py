import dataclasses
import json

import gguf
import pytest
from io_models import CHAT, WORDS, write_word_tokenizer

from jaxclt.errors import InputError
from jaxclt.io.tokenizer import load_tokenizer
from jaxclt.text.corpus import pack_windows

# A byte-level vocabulary with a few merges, as GPT-2's alphabet writes bytes.
MERGES = ["t h", "th e", "Ġ the", "Ġ c", "Ġc a", "Ġca t", "1 2", "Ġ Ġ"]
SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]


def byte_alphabet():
    from tokenizers import pre_tokenizers

    return sorted(pre_tokenizers.ByteLevel.alphabet())


def write_gguf_tokenizer(
    path,
    *,
    pre="smollm",
    model="gpt2",
    bos=1,
    eos=2,
    cut=False,
    adds_bos=False,
    template=None,
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
    if template is not None:
        writer.add_chat_template(template)
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


@pytest.mark.parametrize("said", [True, False, None])
def test_without_a_post_processor_the_configuration_says_it(tmp_path, said):
    """As in Llama 2's layout; a post-processor that adds bos needs no word of it."""
    config = {} if said is None else {"add_bos_token": said}
    write_word_tokenizer(tmp_path / "a", adds_bos=False, config=config)
    assert load_tokenizer(tmp_path / "a").adds_bos == bool(said)
    write_word_tokenizer(tmp_path / "b", config=config)
    assert load_tokenizer(tmp_path / "b").encode("<eos> the") == [1, 2, 4]


def test_bos_is_what_the_tokenizer_puts_first(tmp_path):
    """Also where nothing names it bos."""
    write_word_tokenizer(tmp_path)
    (tmp_path / "tokenizer_config.json").unlink()
    tok = load_tokenizer(tmp_path)
    assert tok.backend.bos_token is None
    assert tok.bos_id == 1
    assert tok.encode("the") == tok.encode("<bos> the") == [1, 4]


def test_no_bos_is_put_before_one_that_is_there(tmp_path):
    write_word_tokenizer(tmp_path)
    tokenizer = load_tokenizer(tmp_path)
    texts = ["<bos> the cat", "<eos> the cat", "the cat sat on a mat"]
    token_WS = pack_windows(texts, tokenizer, size=5, n_tokens=99)
    assert token_WS.tolist() == [
        [1, 4, 5, -1, -1],
        [1, 2, 4, 5, -1],
        [1, 4, 5, 6, 7],
        [1, 8, 9, -1, -1],
    ]


def test_tokens_without_an_embedding_are_refused_by_name(tmp_path):
    write_word_tokenizer(tmp_path, late=("<image>",))
    tok = dataclasses.replace(load_tokenizer(tmp_path), n_rows=len(WORDS))
    assert tok.encode("the cat") == [1, 4, 5]
    assert tok.find("<eos>") == 2
    for ask in (
        lambda: tok.encode("the <image> cat"),
        lambda: tok.encode("<image>", "always"),
        lambda: tok.encode_many(["the cat", "the <image> cat " * 99]),
        lambda: tok.find("<image>"),
    ):
        with pytest.raises(InputError, match=r"'<image>' in .* is token 10,") as error:
            ask()
        assert len(str(error.value)) < 200
    # an embedding may have more rows too, padding to a round number
    wide = dataclasses.replace(tok, n_rows=64)
    assert wide.encode("<image>", "never") == [10]
    assert wide.token_strings([10, 11, 63]) == ["<image>", "id:11", "id:63"]


def test_half_characters_are_refused(tmp_path):
    write_word_tokenizer(tmp_path)
    tok = load_tokenizer(tmp_path)
    for ask in (tok.encode, tok.find, lambda text: tok.encode_many(["a", text])):
        with pytest.raises(InputError, match="holds half a character") as error:
            ask("w5 \udc80")
        str(error.value).encode()


def test_a_text_is_the_token_whose_string_it_is(tmp_path):
    """By a SentencePiece vocabulary, whose spaces, words and bytes have other names."""
    tokens = ["<unk>", "<s>", "</s>", "<0x61>", "▁", "a", "b", "▁ab", "ab", "<0x0A>"]
    types = [2, 3, 3, 6, 1, 1, 1, 1, 1, 6]
    writer = gguf.GGUFWriter(tmp_path / "m.gguf", "llama")
    writer.add_tokenizer_model("llama")
    writer.add_token_list(tokens)
    writer.add_token_types(types)
    writer.add_token_scores([0.0, 0.0, 0.0, 0.0, -9.0, -8.0, -7.0, -1.0, -2.0, 0.0])
    for name, i in (("unk", 0), ("bos", 1), ("eos", 2)):
        getattr(writer, f"add_{name}_token_id")(i)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()
    tok = load_tokenizer(tmp_path / "m.gguf")
    assert tok.encode("ab", "never") == [7]  # the tokenizer sets a space before it
    want = {" ab": 7, "ab": 8, "a": 5, "\n": 9, "</s>": 2, "<0x61>": None, "aa": None}
    assert {text: tok.find(text) for text in want} == want


def test_a_string_of_several_tokens_is_refused(tmp_path):
    tok = load_tokenizer(write_gguf_tokenizer(tmp_path / "m.gguf"))
    assert tok.find(" cat") == tok.encode(" cat", "never")[0]
    assert tok.find("Ġcat") is None
    with pytest.raises(InputError, match=r"string of several tokens: id:\d+, id:"):
        tok.find("\ufffd")


@pytest.mark.parametrize("where", ["config", "jinja", "json", "named", "gguf"])
def test_a_chat_template_is_found_wherever_it_lies(tmp_path, where):
    text = "<bos> <eos> the cat <eos> mat"
    chat = [{"role": "user", "content": " the cat "}]
    if where == "gguf":
        tok = load_tokenizer(write_gguf_tokenizer(tmp_path / "m.gguf", template=CHAT))
        text = text.replace("<bos>", "<|im_start|>")
    else:
        named = [
            {"name": "default", "template": CHAT},
            {"name": "tool", "template": ""},
        ]
        config = {"config": {"chat_template": CHAT}, "named": {"chat_template": named}}
        write_word_tokenizer(tmp_path, config=config.get(where, {}))
        if where == "jinja":
            (tmp_path / "chat_template.jinja").write_text(CHAT)
        if where == "json":
            content = json.dumps({"chat_template": CHAT})
            (tmp_path / "chat_template.json").write_text(content)
        tok = load_tokenizer(tmp_path)
        # the template writes bos, which is not put there twice
        assert tok.encode(tok.chat(chat)) == [1, 2, 4, 5, 2, 9]
        assert tok.encode(tok.chat(chat), "always") == [1, 2, 4, 5, 2, 9]
    assert tok.chat(chat) == text
    assert tok.chat(chat) == tok.backend.apply_chat_template(
        chat, add_generation_prompt=True, tokenize=False
    )


USER = {"role": "user", "content": "the cat"}


@pytest.mark.parametrize(
    ("template", "messages", "message"),
    [
        (None, [USER], "has no chat template"),
        (CHAT, [], "there are no messages"),
        (CHAT, USER, "there are no messages"),
        (CHAT, [USER, "the"], "message 1 is not a role and a content"),
        (CHAT, [{"role": "user"}], "message 0 is not a role and a content"),
        (CHAT, [USER | {"name": "x"}], "message 0 is not a role and a content"),
        (CHAT, [USER | {"content": ["the"]}], "its content is list, not text"),
        (CHAT, [USER | {"role": None}], "its role is NoneType, not text"),
        (CHAT, [USER | {"role": "system"}], r"refuses .*\(no system role\)"),
        (CHAT, [USER, USER | {"role": "critic"}], "leaves out message 1, .*'critic'"),
        ("{% for %}", [USER], "refuses these messages"),
        ("{{ x.y.z }}", [USER], "'x' is undefined"),
        ("{{ ''.__class__.__mro__ }}", [USER], "is unsafe"),
        ("{% for i in range(10**9) %}a{% endfor %}", [USER], "Range too big"),
        ("{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}", [USER], "recursion"),
        ("{{ raise_exception('a\n' * 999) }}", [USER], r"\(a\)"),
        ("{{ raise_exception('a' * 999) }}", [USER], "aaa"),
    ],
)
def test_what_is_no_chat_is_one_line(tmp_path, template, messages, message):
    config = {} if template is None else {"chat_template": template}
    write_word_tokenizer(tmp_path, config=config)
    with pytest.raises(InputError, match=message) as error:
        load_tokenizer(tmp_path).chat(messages)
    assert "\n" not in str(error.value)
    assert len(str(error.value)) <= 300


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
