"""Text to token ids and back, through Hugging Face fast tokenizers.

A tokenizer.json is taken as it stands: transformers' own classes rebuild some
tokenizers from their vocabulary instead. A GGUF file's tokenizer is rebuilt from its
vocabulary and merges, since transformers needs torch and many seconds for that.
transformers is imported when a tokenizer is loaded, not with this module.
"""

from __future__ import annotations

import contextlib
import functools
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from jaxclt.errors import InputError, first_line, shown
from jaxclt.files.json_file import parse_object, read_json
from jaxclt.io.chat import Message, find_template, render
from jaxclt.io.gguf_file import GGUFFile, open_gguf
from jaxclt.io.tokenizer_gguf import fast_tokenizer, kept_tokenizer

__all__ = ["Bos", "Tokenizer", "load_tokenizer"]

Bos = Literal["auto", "always", "never"]

_SPECIAL = ("bos_token", "eos_token", "pad_token", "unk_token")
_BARE = {"add_special_tokens": False}


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
    n_rows: int | None = None  # of the model's embedding; None: not known

    def encode(self, text: str, bos: Bos = "auto") -> list[int]:
        """Token ids of `text`; special tokens written out in it are recognised.

        Args:
          text: the prompt.
          bos: "auto" puts the bos token first if the model's own tokenizer does, and
            not before a text that begins with it. "never" adds nothing. "always" sees
            besides that a special token stands first: bos, or where a tokenizer has
            none its pad, eos or another one, in this order: circuit-tracer's rule.

        Raises:
          InputError: for an unknown `bos`, "always" without any special token, or a
            text with a token that the model has no embedding of.
        """
        if bos not in ("auto", "always", "never"):
            raise InputError(f"bos must be auto, always or never, not {bos!r}")
        ids = self._known(list(self.backend.encode(_whole(text), **_BARE)), text)
        if bos == "never":
            return ids
        ids = self.opened(ids)
        if bos == "auto" or (ids and ids[0] in self.special_ids):
            return ids
        known = (self.bos_id, self.pad_id, self.eos_id, *sorted(self.special_ids))
        first = [i for i in known if i is not None and self.has_row(i)][:1]
        if not first:
            raise InputError("this tokenizer has no special token: use --bos auto")
        return first + ids

    def encode_many(self, texts: Sequence[str]) -> list[list[int]]:
        """Token ids of texts, nothing put in front of them.

        Raises:
          InputError: for a text with a token that the model has no embedding of.
        """
        found = self.backend([_whole(text) for text in texts], **_BARE)["input_ids"]
        return [self._known(ids, text) for ids, text in zip(found, texts, strict=True)]

    def opened(self, ids: list[int]) -> list[int]:
        """Ids with what "auto" puts before them."""
        return ids if ids[:1] == self.opening else self.opening + ids

    @property
    def opening(self) -> list[int]:
        """What "auto" puts before a text."""
        return [self.bos_id] if self.adds_bos and self.bos_id is not None else []

    def chat(self, messages: Sequence[Message]) -> str:
        """The text of a chat by the model's template, the assistant's turn begun.

        Raises:
          InputError: for messages that are none, or that the template refuses.
        """
        return render(self.backend, messages)

    def find(self, text: str) -> int | None:
        """The token that a text is, None if it is not exactly one.

        That whose string it is; without one, what the tokenizer makes of the text,
        which may set a space before it or bring it to another form.

        Raises:
          InputError: if it is several tokens' string, or the model has no embedding of
            the one that it is.
        """
        ids = self.backend.encode(_whole(text), **_BARE)
        own = ids[0] if len(ids) == 1 else None
        if own is None or self._string(own) != text:
            same = self._by_string.get(text, [])
            if len(same) > 1:  # a letter rather than its byte, which reads the same
                piece = self.backend.convert_ids_to_tokens
                same = [i for i in same if piece(i).replace("▁", " ") == text] or same
            if len(same) > 1:
                listed = ", ".join(f"id:{i}" for i in same[:5])
                raise InputError(f"{text!r} is the string of several tokens: {listed}")
            unknown = own == getattr(self.backend, "unk_token_id", None)
            own = same[0] if same else None if unknown else own
        return None if own is None else self._known([own], text)[0]

    @functools.cached_property
    def _by_string(self) -> dict[str, list[int]]:
        found: dict[str, list[int]] = {}
        ids = range(max(self.vocab_size, self.n_rows or 0))
        for i, text in zip(ids, self.token_strings(ids), strict=True):
            found.setdefault(text, []).append(i)
        return found

    def has_row(self, i: int) -> bool:
        """Whether the model has an embedding of a token."""
        return self.n_rows is None or i < self.n_rows

    def _known(self, ids: list[int], text: str) -> list[int]:
        """The ids, if the model has an embedding of each."""
        if self.has_row(max(ids, default=0)):
            return ids
        i = next(i for i in ids if not self.has_row(i))
        where = text if len(text) <= 60 else text[:59] + "…"
        raise InputError(
            f"{self._string(i)!r} in {where!r} is token {i}, but the model has "
            f"embeddings of tokens below {self.n_rows} only: leave it out"
        )

    def token_strings(self, ids: Sequence[int]) -> list[str]:
        """Each token as text of its own, with the space that it begins with.

        A token that holds part of a character only reads as U+FFFD, and a row of the
        embedding that the tokenizer has no token for as id:N.
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
        piece = self.backend.convert_ids_to_tokens(i)
        if piece is None:
            return f"id:{i}"
        text = self.decode([i])
        # SentencePiece decoders strip the space of what they take for the first word.
        return f" {text}" if piece.startswith("▁") and text[:1] != " " else text


def load_tokenizer(source: str | os.PathLike[str] | GGUFFile) -> Tokenizer:
    """Load the tokenizer of a local directory or GGUF file; never uses the network.

    A tokenizer.json beside a GGUF file is preferred to what the file itself says.

    Raises:
      InputError: if there is no tokenizer, it is damaged, or a GGUF file's kind of
        tokenizer is not supported.
    """
    if isinstance(source, GGUFFile):
        file, folder = source, source.path.parent
    elif Path(source).is_dir():
        file, folder = None, Path(source)
    else:
        file, folder = open_gguf(source), Path(source).parent
    if (folder / "tokenizer.json").is_file():
        backend, adds_bos = _from_json(folder)
    else:
        backend = _from_directory(folder) if file is None else _from_gguf(file)
        adds_bos = False
    if file is not None and not backend.chat_template:
        template = file.meta.get("tokenizer.chat_template")
        backend.chat_template = template if isinstance(template, str) else None
    try:
        _check_template(backend)
        return _wrap(backend, adds_bos=adds_bos)
    except Exception as error:  # for special tokens that it does not have, anything
        place = folder if file is None else file.path
        raise InputError(
            f"{place}: its tokenizer is damaged ({first_line(error)})"
        ) from error


def _wrap(backend: Any, *, adds_bos: bool) -> Tokenizer:
    """A tokenizer; `adds_bos` says that its configuration asks for bos."""
    # What a tokenizer puts before a text is marked as no part of it.
    tried = backend("a", return_special_tokens_mask=True)
    front = tried["input_ids"][:1] if tried["special_tokens_mask"][:1] == [1] else []
    bos_id = front[0] if front else backend.bos_token_id
    return Tokenizer(
        adds_bos=bos_id is not None and (adds_bos or bool(front)),
        backend=backend,
        bos_id=bos_id,
        eos_id=backend.eos_token_id,
        pad_id=backend.pad_token_id,
        special_ids=frozenset(i for i in backend.all_special_ids if i is not None),
        vocab_size=len(backend),
    )


def _check_template(backend: Any) -> None:
    """ValueError if a tokenizer puts tokens around a text that it does not have.

    Where it is used it would panic, which is not an `Exception`.
    """
    fast = getattr(backend, "backend_tokenizer", None)
    if fast is None or fast.post_processor is None:
        return
    state = parse_object(fast.post_processor.__getstate__(), "its post-processor")
    for step in (state, *state.get("processors", ())):
        for part in step.get("single", ()):
            name = part.get("SpecialToken", {}).get("id")
            if name is not None and name not in step["special_tokens"]:
                raise ValueError(f"its template names {shown(name)}, which it lacks")


def _transformers() -> Any:
    # Without torch, transformers says at import that models are unavailable.
    os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")
    import transformers

    return transformers


def _from_json(folder: Path) -> tuple[Any, bool]:
    """tokenizer.json, and what its neighbours name: special tokens, template, bos."""
    special, config = {}, {}
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
        backend = fast(tokenizer_file=str(file), **special)
    except Exception as error:  # the Rust tokenizer raises a bare Exception
        raise InputError(f"{file} is damaged ({first_line(error)})") from error
    backend.chat_template = find_template(folder, config)
    # Where tokenizer.json does not say it, as in Llama 2's layout, this does.
    return backend, config.get("add_bos_token") is True


def _from_directory(folder: Path) -> Any:
    """Any other tokenizer files that transformers knows (a SentencePiece model)."""
    try:
        auto = _transformers().AutoTokenizer
        return auto.from_pretrained(str(folder), local_files_only=True)
    except Exception as error:
        raise InputError(
            f"{folder} holds no tokenizer that can be loaded (no tokenizer.json; "
            f"{first_line(error)})"
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


def _whole(text: str) -> str:
    """A text without half characters, which no tokenizer takes.

    Raises:
      InputError: if it has one.
    """
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise InputError(
            f"{text[max(0, error.start - 20) : error.end + 20]!a} holds half a "
            "character, no UTF-8 text: leave it out"
        ) from None
    return text


def _text(token: Any) -> str:
    """A token as transformers writes it: a string or an object with `content`."""
    return str(token.get("content", "")) if isinstance(token, dict) else str(token)
