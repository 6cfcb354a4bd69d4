"""Chats as prompts: messages with roles, through the model's own template.

A template is code of the model's authors. transformers runs it in a sandbox of Jinja,
where it can say what the text is and nothing else.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeGuard

from jaxclt.errors import InputError, first_line
from jaxclt.files.json_file import read_json

__all__ = [
    "Message",
    "check_messages",
    "find_template",
    "is_chat",
    "render",
    "user_says",
]

Message = Mapping[str, str]  # role and content


def user_says(text: str) -> list[Message]:
    """The chat that a text begins as the user's message.

    Raises:
      InputError: if there is no text.
    """
    if not text.strip():
        raise InputError("the prompt is empty: give some text to trace")
    return [{"role": "user", "content": text}]


def is_chat(prompt: Any) -> TypeGuard[list[Message]]:
    """Whether a prompt is one of messages, right or wrong, not text or token ids."""
    return isinstance(prompt, list | tuple) and any(
        isinstance(part, Mapping) for part in prompt
    )


def check_messages(messages: Any) -> list[dict[str, str]]:
    """Messages as plain data.

    Raises:
      InputError: if they are not a list of objects with a role and a content.
    """
    form = 'write a list of {"role": "user", "content": "text"}'
    if not isinstance(messages, list | tuple) or not messages:
        raise InputError(f"there are no messages: {form}")
    found = []
    for i, message in enumerate(messages):
        if not isinstance(message, Mapping) or set(message) != {"role", "content"}:
            raise InputError(f"message {i} is not a role and a content: {form}")
        for name in ("role", "content"):
            if not isinstance(message[name], str):
                kind = type(message[name]).__name__
                raise InputError(f"message {i}: its {name} is {kind}, not text")
        found.append({"role": message["role"], "content": message["content"]})
    return found


def find_template(folder: Path, config: dict[str, Any]) -> str | dict[str, str] | None:
    """The chat template of a directory, or several by name; None if it has none.

    Args:
      folder: where ``chat_template.jinja`` or ``chat_template.json`` may lie.
      config: content of its ``tokenizer_config.json``.
    """
    file, old = folder / "chat_template.jinja", folder / "chat_template.json"
    if file.is_file():
        try:
            return file.read_text("utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise InputError(f"cannot read {file}: {error}") from error
    found = config.get("chat_template")
    if found is None and old.is_file():
        found = read_json(old).get("chat_template")
    if isinstance(found, list):
        named = [one for one in found if isinstance(one, dict)]
        return {str(one.get("name")): str(one.get("template")) for one in named}
    return found if isinstance(found, str) else None


def render(backend: Any, messages: Any) -> str:
    """The text of a chat, up to where the assistant is to speak.

    Args:
      backend: a transformers tokenizer.
      messages: see `check_messages`.

    Raises:
      InputError: for messages that are none, or that the template refuses or leaves
        out, and if there is no template.
    """
    said = check_messages(messages)
    if not backend.chat_template:
        raise InputError(
            "the model has no chat template: give the prompt as text, or put its "
            "chat_template.jinja beside its tokenizer"
        )
    text = _rendered(backend, said)
    for i, message in enumerate(said):
        other = {**message, "content": f"{message['content']} ."}
        if _rendered(backend, [*said[:i], other, *said[i + 1 :]]) == text:
            raise InputError(
                f"the model's chat template leaves out message {i}, of the role "
                f"{message['role'][:40]!r}"
            )
    return text


def _rendered(backend: Any, messages: list[dict[str, str]]) -> str:
    try:
        return backend.apply_chat_template(
            messages, add_generation_prompt=True, tokenize=False
        )
    except Exception as error:  # whatever the template, foreign code, raises
        raise InputError(
            "the model's chat template refuses these messages "
            f"({first_line(error)[:160]})"
        ) from error
