"""Text to token ids and back, through Hugging Face fast tokenizers.

A tokenizer.json is taken as it stands: transformers' own classes rebuild some
tokenizers from their vocabulary instead. A GGUF file's tokenizer is rebuilt from its
vocabulary and merges, since transformers needs torch and many seconds for that.
transformers is imported when a tokenizer is loaded, not with this module.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from jaxclt.errors import InputError
from jaxclt.io.gguf_file import GGUFFile, open_gguf
from jaxclt.io.json_file import read_json
from jaxclt.io.tokenizer_gguf import fast_tokenizer, kept_tokenizer

__all__ = ["Bos", "Tokenizer", "load_tokenizer"]

Bos = Literal["auto", "always", "never"]

_SPECIAL = ("bos_token", "eos_token", "pad_token", "unk_token")


@dataclass(frozen=True)
class Tokenizer:
    """A loaded tokenizer; ids that it does not have are None."""

    backend: Any  # a transformers fast tokenizer
    bos_id: int | None
    eos_id: int | None
    pad_id: int | None
    special_ids: frozenset[int]
    vocab_size: int  # with added tokens
    adds_bos: bool  # whether the model was trained with bos in front

    def encode(self, text: str, bos: Bos = "auto") -> list[int]:
        """Token ids of `text`; special tokens written out in it are recognised.

        Args:
          text: the prompt.
          bos: "auto" puts the bos token first if the model was trained so, which is
            what its tokenizer does by itself. "never" adds nothing. "always" puts bos
            first, or where a tokenizer has none its pad, eos or another special token,
            in this order: circuit-tracer's rule. No second one is put before a text
            that starts with a special token.

        Raises:
          InputError: for an unknown `bos`, or "always" without any special token.
        """
        if bos not in ("auto", "always", "never"):
            raise InputError(f"bos must be auto, always or never, not {bos!r}")
        ids = list(self.backend.encode(text, add_special_tokens=False))
        if bos == "never" or (bos == "auto" and not self.adds_bos):
            return ids
        if ids and ids[0] in self.special_ids:
            return ids
        known = (self.bos_id, self.pad_id, self.eos_id, *sorted(self.special_ids))
        first = [i for i in known if i is not None][:1]
        if not first:
            raise InputError("this tokenizer has no special token: use --bos auto")
        return first + ids

    def token_strings(self, ids: Sequence[int]) -> list[str]:
        """Each token as text of its own, with the space that it begins with.

        A token that holds part of a character only reads as U+FFFD.
        """
        return [self._string(int(i)) for i in ids]

    def decode(self, ids: Sequence[int]) -> str:
        """Text of a whole sequence, special tokens included."""
        return self.backend.decode(
            [int(i) for i in ids],
            skip_special_tokens=False,
            clean_up_tokenization_spaces=False,
        )

    def _string(self, i: int) -> str:
        text = self.decode([i])
        # SentencePiece decoders strip the space of what they take for the first word.
        piece = self.backend.convert_ids_to_tokens(i) or ""
        return f" {text}" if piece.startswith("▁") and text[:1] != " " else text


def load_tokenizer(source: str | os.PathLike[str] | GGUFFile) -> Tokenizer:
    """Load the tokenizer of a local directory or GGUF file; never uses the network.

    A tokenizer.json beside a GGUF file is preferred to what the file itself says.

    Raises:
      InputError: if there is no tokenizer, it is damaged, or a GGUF file's kind of
        tokenizer is not supported.
    """
    path = source.path if isinstance(source, GGUFFile) else Path(source)
    folder = path if path.is_dir() else path.parent
    if (folder / "tokenizer.json").is_file():
        backend = _from_json(folder)
    elif path.is_dir():
        backend = _from_directory(path)
    else:
        backend = _from_gguf(
            source if isinstance(source, GGUFFile) else open_gguf(path)
        )
    try:
        return _wrap(backend)
    except Exception as error:  # for special tokens that it does not have, anything
        raise InputError(
            f"{path}: its tokenizer is damaged ({_line(error)})"
        ) from error


def _wrap(backend: Any) -> Tokenizer:
    bos_id = backend.bos_token_id
    return Tokenizer(
        adds_bos=bos_id is not None and backend.encode("a")[:1] == [bos_id],
        backend=backend,
        bos_id=bos_id,
        eos_id=backend.eos_token_id,
        pad_id=backend.pad_token_id,
        special_ids=frozenset(i for i in backend.all_special_ids if i is not None),
        vocab_size=len(backend),
    )


def _transformers() -> Any:
    # Without torch, transformers says at import that models are unavailable.
    os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")
    import transformers

    return transformers


def _from_json(folder: Path) -> Any:
    """tokenizer.json, with the special tokens that tokenizer_config.json names."""
    special = {}
    for name in ("special_tokens_map.json", "tokenizer_config.json"):
        if (folder / name).is_file():
            config = read_json(folder / name)
            special |= {key: _text(config[key]) for key in _SPECIAL if config.get(key)}
            more = config.get("extra_special_tokens") or config.get(
                "additional_special_tokens"
            )
            if isinstance(more, list):
                special["additional_special_tokens"] = [_text(token) for token in more]
    file = folder / "tokenizer.json"
    fast = _transformers().PreTrainedTokenizerFast
    try:
        return fast(tokenizer_file=str(file), **special)
    except Exception as error:  # the Rust tokenizer raises a bare Exception
        raise InputError(f"{file} is damaged ({_line(error)})") from error


def _from_directory(folder: Path) -> Any:
    """Any other tokenizer files that transformers knows (a SentencePiece model)."""
    try:
        auto = _transformers().AutoTokenizer
        return auto.from_pretrained(str(folder), local_files_only=True)
    except Exception as error:
        raise InputError(
            f"{folder} holds no tokenizer that can be loaded (no tokenizer.json; "
            f"{_line(error)})"
        ) from error


def _from_gguf(file: GGUFFile) -> Any:
    """Rebuilt from a GGUF file's metadata, or read if that was done before."""
    make = _transformers().PreTrainedTokenizerFast
    if (kept := kept_tokenizer(file)) is not None:
        path, special = kept
        # By its file: transformers would copy a large object by way of its JSON.
        with contextlib.suppress(Exception):  # damaged: built and written again
            return make(tokenizer_file=str(path), **special)
    fast, special = fast_tokenizer(file)
    return make(tokenizer_object=fast, **special)


def _text(token: Any) -> str:
    """A token as transformers writes it: a string or an object with `content`."""
    return str(token.get("content", "")) if isinstance(token, dict) else str(token)


def _line(error: BaseException) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]
