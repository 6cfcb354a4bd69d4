"""Tokenizers rebuilt from GGUF metadata: byte-level BPE, and SentencePiece's BPE.

A file holds vocabulary, merges or scores, and the name of a rule that cuts text before
merging, of which llama.cpp knows what it is. The merges of SentencePiece have to be
found among its pieces, many seconds for Gemma's 262,144, so that what was built is kept
in the user cache, by the hash of all that it was built from.
"""

from __future__ import annotations

import contextlib
import hashlib
from pathlib import Path
from typing import Any

from jaxclt.errors import InputError, first_line, shown
from jaxclt.files.atomic import atomic_path
from jaxclt.files.digest import cache_root
from jaxclt.files.json_text import to_json
from jaxclt.io.gguf_file import GGUFFile

__all__ = ["fast_tokenizer", "kept_tokenizer"]

_BUILD = 1  # raised when what is built from the same metadata changes
_NORMAL, _CONTROL, _USER_DEFINED = 1, 3, 4  # tokenizer.ggml.token_type
_IDS = {
    "bos_token": "tokenizer.ggml.bos_token_id",
    "eos_token": "tokenizer.ggml.eos_token_id",
    "pad_token": "tokenizer.ggml.padding_token_id",
    "unk_token": "tokenizer.ggml.unknown_token_id",
}
# Whether every digit is on its own, ahead of GPT-2's byte-level rule.
_DIGITS_APART = {"gpt-2": False, "gpt2": False, "smollm": True, "olmo": False}
_COMPOSED = {"qwen2", "olmo"}  # text is brought to NFC first
_WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}%s"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_PATTERNS = {"qwen2": _WORDS % "", "llama-bpe": _WORDS % "{1,3}"}  # of their own


def fast_tokenizer(file: GGUFFile) -> tuple[Any, dict[str, str]]:
    """A `tokenizers.Tokenizer`, and the texts of its bos, eos, pad and unknown tokens.

    Raises:
      InputError: if the file's kind of tokenizer is not supported, or damaged.
    """
    meta = file.meta
    kind, rule = meta.get("tokenizer.ggml.model"), meta.get("tokenizer.ggml.pre")
    rules = (*_DIGITS_APART, *_PATTERNS)
    # SentencePiece's other kind, unigram, is called t5.
    if kind != "llama" and not (kind == "gpt2" and rule in rules):
        raise InputError(
            f"{file.path}: tokenizer {shown(kind)} with pre-tokenizer {shown(rule)} is "
            f"not supported (only 'llama', and 'gpt2' with {', '.join(rules)}); put "
            "the model's tokenizer.json beside the file"
        )
    try:
        tokens = list(meta["tokenizer.ggml.tokens"])
        types = list(meta["tokenizer.ggml.token_type"])
        special = _special(meta, tokens)
        make = _sentence_piece if kind == "llama" else _byte_level
        fast = make(meta, tokens, types)
        by_type = list(zip(tokens, types, strict=True))
    except Exception as error:  # the Rust tokenizer raises a bare Exception
        raise InputError(
            f"{file.path}: its tokenizer is damaged ({first_line(error)})"
        ) from error
    _add(fast, by_type)
    _begin(fast, meta, special.get("bos_token"), tokens)
    if kind == "llama":
        _keep(fast, meta)
    return fast, special


def _keep(fast: Any, meta: dict[str, Any]) -> None:
    # A cache that cannot be written costs time, not the tokenizer.
    with contextlib.suppress(InputError), atomic_path(_cache_path(meta)) as path:
        fast.save(str(path), pretty=False)


def kept_tokenizer(file: GGUFFile) -> tuple[Path, dict[str, str]] | None:
    """A tokenizer.json that `fast_tokenizer` built before, and the special tokens.

    It need not be whole: who reads it builds another one where it is not.
    """
    meta = file.meta
    if meta.get("tokenizer.ggml.model") != "llama":
        return None
    try:
        path = _cache_path(meta)
        special = _special(meta, list(meta["tokenizer.ggml.tokens"]))
    except (KeyError, IndexError, TypeError):  # `fast_tokenizer` says what is wrong
        return None
    return (path, special) if path.is_file() else None


def _cache_path(meta: dict[str, Any]) -> Path:
    from tokenizers import __version__

    said = {key: x for key, x in meta.items() if key.startswith("tokenizer.")}
    text = to_json([_BUILD, __version__, sorted(said.items())])
    digest = hashlib.sha256(text.encode()).hexdigest()
    return cache_root() / "tokenizers" / f"{digest}.json"


def _add(fast: Any, by_type: list[tuple[str, int]]) -> None:
    """Tokens that are found in the text before anything is cut."""
    from tokenizers import AddedToken

    for wanted, add in (
        (_CONTROL, fast.add_special_tokens),
        (_USER_DEFINED, fast.add_tokens),
    ):
        add([AddedToken(t, normalized=False) for t, kind in by_type if kind == wanted])


def _begin(fast: Any, meta: dict[str, Any], first: str | None, tokens: list) -> None:
    """Put the first token before a text, if the file says so."""
    from tokenizers import processors

    # llama.cpp's default for SentencePiece.
    adds = meta.get("tokenizer.ggml.model") == "llama"
    if first is not None and meta.get("tokenizer.ggml.add_bos_token", adds):
        fast.post_processor = processors.TemplateProcessing(
            single=[first, "$A"], special_tokens=[(first, tokens.index(first))]
        )


def _byte_level(meta: dict[str, Any], tokens: list[str], types: list[int]) -> Any:
    """GPT-2's: bytes as printable characters, merged by a list."""
    from tokenizers import Regex, Tokenizer, decoders, models, normalizers
    from tokenizers import pre_tokenizers as pre

    del types
    merges = [tuple(m.split(" ")) for m in meta["tokenizer.ggml.merges"]]
    vocab = {token: i for i, token in enumerate(tokens)}
    fast = Tokenizer(models.BPE(vocab=vocab, merges=merges))
    rule = meta["tokenizer.ggml.pre"]
    pattern = _PATTERNS.get(rule)
    steps: list[Any] = [pre.ByteLevel(add_prefix_space=False, use_regex=not pattern)]
    if pattern:
        steps = [pre.Split(Regex(pattern), "isolated"), *steps]
    elif _DIGITS_APART[rule]:
        steps = [pre.Digits(individual_digits=True), *steps]
    if rule in _COMPOSED:
        fast.normalizer = normalizers.NFC()
    fast.pre_tokenizer = pre.Sequence(steps)
    fast.decoder = decoders.ByteLevel()
    return fast


def _sentence_piece(meta: dict[str, Any], tokens: list[str], types: list[int]) -> Any:
    """SentencePiece's BPE: any two neighbours that make a piece, best score first.

    The merges follow from the pieces, since a pair merges exactly if the whole is one.
    """
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    scores = list(meta["tokenizer.ggml.scores"])
    vocab = {token: i for i, token in enumerate(tokens)}
    pieces = {t for t, kind in zip(tokens, types, strict=True) if kind == _NORMAL}
    merges = []
    # Equal scores: in the order of the vocabulary, as the sort is stable.
    for i in sorted(range(len(tokens)), key=lambda i: -scores[i]):
        whole = tokens[i]
        if types[i] != _NORMAL:
            continue
        cuts = ((whole[:n], whole[n:]) for n in range(1, len(whole)))
        merges += [cut for cut in cuts if cut[0] in pieces and cut[1] in pieces]
    unknown = meta.get("tokenizer.ggml.unknown_token_id")
    fast = Tokenizer(
        models.BPE(
            vocab=vocab,
            merges=merges,
            byte_fallback=True,
            fuse_unk=True,
            unk_token=None if unknown is None else tokens[unknown],
        )
    )
    prefix = bool(meta.get("tokenizer.ggml.add_space_prefix", True))
    # A prefix at the start of a text only, not after every token found before.
    fast.pre_tokenizer = pre_tokenizers.Metaspace(
        prepend_scheme="first" if prefix else "never", split=False
    )
    back = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    fast.decoder = decoders.Sequence([*back, *[decoders.Strip(" ", 1, 0)] * prefix])
    return fast


def _special(meta: dict[str, Any], tokens: list[str]) -> dict[str, str]:
    """Names of the bos, eos, pad and unknown tokens."""
    special = {name: tokens[meta[key]] for name, key in _IDS.items() if key in meta}
    # SmolLM2 files exist whose eos is their bos; a tool that pads with eos would then
    # mask the first position.
    end = "<|im_end|>"
    if end in tokens and special.get("eos_token") == special.get("bos_token"):
        special |= {"eos_token": end, "pad_token": end}
    return special
