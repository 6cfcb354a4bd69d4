"""A command line becomes flags, or one line that says what is wrong with it."""

from __future__ import annotations

import contextlib
import dataclasses
import os
import re
from collections.abc import Sequence
from contextlib import AbstractContextManager
from functools import partial
from pathlib import Path
from typing import Any, TypeVar, get_type_hints

import tyro
from tyro.constructors import ConstructorRegistry, PrimitiveConstructorSpec

from jaxclt.errors import InputError, did_you_mean

__all__ = ["parse"]

with contextlib.suppress(ImportError):
    # Not part of tyro's public interface; its own keeps the line breaks of docstrings.
    from tyro import _strings

    _strings.__dict__["remove_single_line_breaks"] = lambda helptext: "\n\n".join(
        " ".join(paragraph.split()) for paragraph in helptext.split("\n\n")
    )

_Config = TypeVar("_Config")
_OURS = "path: "  # what a message of ours begins with
_LONGEST_NAME = 255  # bytes that file systems allow
_WANTED = {"INT": "a whole number", "FLOAT": "a number", "PATH": "a path"}


def parse(kind: type[_Config], command: str, args: Sequence[str]) -> _Config:
    """The flags of a command.

    Args:
      kind: its dataclass; one that has `defaults` makes its defaults from `args`.
      command: its name.
      args: what follows the name.

    Raises:
      InputError: for flags or values that it does not take.
    """
    for text in args:
        _refuse_bytes(text)
    make = getattr(kind, "defaults", None)
    with _lines(partial(_refuse, kind, command)):
        return tyro.cli(
            kind,
            args=args,
            prog=f"jaxclt {command}",
            registry=_paths(),
            **({} if make is None else {"default": make(args)}),
        )


def _refuse_bytes(text: str) -> None:
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise InputError(
            f"{text!r} is not UTF-8 text: no prompt, name or path can hold such bytes"
        ) from error


def _paths() -> ConstructorRegistry:
    """Paths are made by `_path`."""
    registry = ConstructorRegistry()

    @registry.primitive_rule
    def rule(info: Any) -> PrimitiveConstructorSpec[Path] | None:
        if info.type is not Path:
            return None
        return PrimitiveConstructorSpec(
            nargs=1,
            metavar="PATH",
            instance_from_str=lambda words: _path(words[0]),
            is_instance=lambda value: isinstance(value, Path),
            str_from_instance=lambda value: [str(value)],
        )

    return registry


def _path(text: str) -> Path:
    """A path; an empty text would be the folder that one is in."""
    longest = max(len(os.fsencode(part)) for part in text.split(os.sep))
    if longest > _LONGEST_NAME:
        raise ValueError(f"{_OURS}a name of {longest} bytes, too long for a file")
    if not text:
        raise ValueError(f"{_OURS}the path is empty")
    return Path(text)


def _lines(refuse: Any) -> AbstractContextManager[None]:
    """Call `refuse` with what tyro finds wrong.

    The hook is not part of tyro's public interface: without it tyro's own text is
    shown, which is longer.
    """
    try:
        from tyro._errors import on_parse_error
    except ImportError:
        return contextlib.nullcontext()
    return on_parse_error(refuse)


def _refuse(kind: type[Any], command: str, event: Any) -> None:
    """Raise InputError for an event of `tyro._errors`; return if it is unknown."""
    if unknown := getattr(event, "tokens", getattr(event, "unrecognized_tokens", [])):
        raise InputError(_unknown(kind, command, unknown))
    if missing := getattr(event, "missing_arguments", []):
        *names, last = [_usage(found.arg) for found in missing]
        names = f"{', '.join(names)} and {last}" if names else last
        raise InputError(f"{command} needs {names}: see `jaxclt {command} --help`")
    argument = getattr(event, "argument", None)
    if argument is None:
        return
    name, metavar = _name(argument), argument.lowered.metavar
    if choices := getattr(event, "choices", ()):
        value, known = event.value, ", ".join(choices)
        hint = did_you_mean(value, choices)
        raise InputError(f"{name} {value}: choose one of {known}{hint}")
    wanted = next((w for word, w in _WANTED.items() if word in metavar), "a value")
    message = getattr(event, "message", "")
    if not message:
        raise InputError(f"{name}: give {wanted}")
    # A line for each type that the value could have had, and the type before it.
    last = message.splitlines()[-1].rpartition(">: ")[2]
    if last.startswith(_OURS):
        raise InputError(f"{name}: {last.removeprefix(_OURS)}")
    value = " ".join(re.findall(r"'([^']*)'", last)) or last
    raise InputError(f"{name} {value}: give {wanted}")


def _unknown(kind: type[Any], command: str, words: Sequence[str]) -> str:
    flag = next((word for word in words if word.startswith("-")), None)
    if flag is None:
        return (
            f"{command} has no place for {words[0]!r}: put text with spaces in quotes, "
            f"and see `jaxclt {command} --help`"
        )
    hints = get_type_hints(kind, include_extras=True)
    fields = [f.name for f in dataclasses.fields(kind)]
    flags = [name for name in fields if "Positional" not in str(hints[name])]
    names = ["--" + name.replace("_", "-") for name in flags]
    hint = did_you_mean(flag.partition("=")[0], names)
    return f"{command} has no flag {flag}: see `jaxclt {command} --help`{hint}"


def _name(argument: Any) -> str:
    lowered = argument.lowered
    return lowered.metavar if argument.is_positional() else lowered.name_or_flags[-1]


def _usage(argument: Any) -> str:
    name = _name(argument)
    return name if argument.is_positional() else f"{name} {argument.lowered.metavar}"
