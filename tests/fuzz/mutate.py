"""Ways of damaging a file, by what kind of file it is, all from a seeded generator."""

from __future__ import annotations

import contextlib
import copy
import gzip
import io
import json
import random
import warnings
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

__all__ = ["mutated"]

DEEP = 100_000


def nested(depth: int) -> Any:
    """A list in a list in a list."""
    value: Any = 0
    for _ in range(depth):
        value = [value]
    return value


STRANGE: tuple[Any, ...] = (
    *(None, True, False, 0, -1, 1, 2, 7, 1 << 31, 1 << 40, -(1 << 63), 10**30, 10**400),
    *(0.5, -0.5, 1e-300, 1e308, float("nan"), float("inf"), float("-inf")),
    *("", "x", "-1", "\0", "../..", "\ud800", "é" * 3, "y" * 100_000, "1e999"),
    *([], {}, [None], [[]], {"a": {}}, [1, "a", None], {"": []}),
    *(nested(70), nested(20)),
)


def bytes_of(rng: random.Random, raw: bytes) -> bytes:
    """Cut short, bits flipped, a part lost, doubled or overwritten."""
    if not raw:
        return b"\0"
    at, n = rng.randrange(len(raw)), rng.choice((1, 2, 8, 64))
    # Headers are small parts of their files, and most of what can be damaged.
    at = min(at, rng.randrange(512)) if rng.random() < 0.5 else at
    match rng.randrange(7):
        case 0:
            return raw[:at]
        case 1:
            damaged = bytearray(raw)
            for _ in range(rng.choice((1, 1, 2, 5))):
                where = min(len(raw) - 1, rng.choice((at, rng.randrange(len(raw)))))
                damaged[where] ^= 1 << rng.randrange(8)
            return bytes(damaged)
        case 2:
            return raw[:at] + raw[at + n :]
        case 3:
            return raw[:at] + raw[at : at + n] * 2 + raw[at + n :]
        case 4:
            return raw[:at] + rng.randbytes(n) + raw[at + n :]
        case 5:
            fill = rng.choice((b"\0", b"\xff", b"\x7f", b"9"))
            return raw[:at] + fill * n + raw[at + n :]
        case _:
            return raw + rng.randbytes(n)


def places(value: Any, most: int = 4000) -> list[tuple[Any, Any]]:
    """(container, key) of all that is inside a JSON value."""
    found, waiting = [], [value]
    while waiting and len(found) < most:
        outer = waiting.pop()
        keys = list(outer) if isinstance(outer, dict) else range(len(outer))
        for key in keys:
            found.append((outer, key))
            if isinstance(outer[key], dict | list):
                waiting.append(outer[key])
    return found


def value_of(rng: random.Random, value: Any) -> Any:
    """A JSON value with another one somewhere in it, or one lost."""
    value = copy.deepcopy(value)
    for _ in range(rng.choice((1, 1, 1, 2, 4))):
        inside = places(value) if isinstance(value, dict | list) else []
        if not inside or rng.random() < 0.03:
            value = copy.deepcopy(rng.choice(STRANGE))
            continue
        # As often near the top, where the meaning is, as anywhere.
        few = inside[: rng.choice((4, 16, len(inside)))]
        outer, key = rng.choice(few)
        old = outer[key]
        match rng.randrange(8):
            case 0:
                del outer[key]
            case 1:
                outer[key] = [old]
            case 2:
                outer[key] = {"x": old}
            case 3 if isinstance(old, int | float):
                outer[key] = rng.choice((str(old), -old, old + 1, old * 1000, [old]))
            case 4 if isinstance(outer, dict):
                outer[f"{key}x"] = outer.pop(key)
            case 5 if isinstance(old, dict | list):
                outer[key] = list(old) * 2 if rng.random() < 0.5 else list(old)[:-1]
            case 6:
                outer[key] = copy.deepcopy(rng.choice(inside)[0])
            case _:
                outer[key] = copy.deepcopy(rng.choice(STRANGE))
    return value


def dumped(rng: random.Random, value: Any) -> bytes:
    text = json.dumps(value, ensure_ascii=rng.random() < 0.9)
    return text.encode("utf-8", "surrogatepass")


def json_of(rng: random.Random, raw: bytes) -> bytes:
    """JSON with other values, or nested beyond measure."""
    if rng.random() < 0.05:
        opening = rng.choice((b"[", b'{"a":', b'{"jaxclt":['))
        return opening * DEEP + rng.choice((b"", b"]" * DEEP))
    return dumped(rng, value_of(rng, json.loads(raw)))


def lines_of(rng: random.Random, raw: bytes) -> bytes:
    """Lines of JSON, one of them damaged."""
    lines = [line for line in raw.split(b"\n") if line]
    i = rng.randrange(len(lines))
    lines[i] = rng.choice((json_of, bytes_of))(rng, lines[i])
    return b"\n".join(lines)


def gzip_of(rng: random.Random, raw: bytes) -> bytes:
    """The same of JSON that is packed."""
    inside = rng.choice((json_of, bytes_of))(rng, gzip.decompress(raw))
    return gzip.compress(inside, 1)


def yaml_of(rng: random.Random, raw: bytes) -> bytes:
    """YAML with other values; JSON is YAML too."""
    import yaml

    odd = (
        *(b"!!int ''", b"!!float x", b"!!timestamp x", b"!!binary x", b"!!set {a, b}"),
        *(b"!!bool x", b"0x" + b"f" * 5000, b".nan", b"1:2:3", b"*x", b"!!python/x y"),
        *(b"&a [*a]", b"? [a]\n  : b", b"<<: 1", b"2001-99-99", b"!!omap [x]"),
    )
    if rng.random() < 0.3:
        lines = raw.split(b"\n")
        i = rng.randrange(len(lines))
        head = lines[i].partition(b":")[0]
        lines[i] = head + b": " + rng.choice(odd)
        return b"\n".join(lines)
    value = value_of(rng, yaml.safe_load(raw))
    with contextlib.suppress(yaml.YAMLError, RecursionError):
        return yaml.safe_dump(value, allow_unicode=True).encode("utf-8", "replace")
    return dumped(rng, value)


TYPES = (
    *("<f8", "<f4", "<f2", ">f4", "<i8", "<i4", "<i2", "|i1", "<u8", "|u1", "|b1"),
    *("<c8", "<U3", "|S4", "<M8[s]"),
)


def array_of(rng: random.Random, x: np.ndarray) -> np.ndarray:
    """An array of another type, shape or with other values."""
    if x.dtype.kind == "U" and rng.random() < 0.8:
        text = str(x)
        with contextlib.suppress(ValueError):
            value = value_of(rng, json.loads(text))
            return np.array(json.dumps(value))
        return np.array(text[: rng.randrange(len(text) + 1)])
    match rng.randrange(3):
        case 0:
            with contextlib.suppress(ValueError, TypeError), warnings.catch_warnings():
                warnings.simplefilter("ignore")
                return x.astype(rng.choice(TYPES))
            return np.zeros(x.shape, "<f4")
        case 1:
            return rng.choice(
                (
                    *(x.ravel(), x[None], x.T, x[..., None], np.zeros(0, x.dtype)),
                    *(x.ravel()[:1].reshape(()) if x.size else x[None], x[:0]),
                    *(x[:-1], x[1:], np.concatenate([x, x]), x[::-1]) * bool(x.ndim),
                )
                if x.ndim
                else (x[None], x[None, None])
            )
        case _:
            out = np.array(x)
            if not out.size or out.dtype.kind not in "fiub":
                return out
            kind = out.dtype.kind
            info = None if kind == "b" else (np.finfo if kind == "f" else np.iinfo)
            odd: tuple[Any, ...] = (0, 1)
            if info is not None:
                most = info(out.dtype)
                odd = (0, 1, 5, most.max, most.min)
            if kind == "f":
                odd += (np.nan, np.inf, -np.inf, -1.0)
            if kind == "i":
                odd += (-1, -2, 1000)
            value = rng.choice(odd)
            if rng.random() < 0.2:
                out[...] = value
            else:
                for _ in range(rng.choice((1, 1, 3))):
                    out.flat[rng.randrange(out.size)] = value
            return out


def saved(arrays: dict[str, np.ndarray], *, packed: bool = False) -> bytes:
    stream = io.BytesIO()
    save = np.savez_compressed if packed else np.savez
    save(stream, allow_pickle=False, **arrays)  # pyright: ignore
    return stream.getvalue()


def npz_of(rng: random.Random, raw: bytes) -> bytes:
    """An npz file with other arrays, or headers that lie about their size."""
    if rng.random() < 0.15:
        return lying(rng, raw)
    with np.load(io.BytesIO(raw), allow_pickle=False) as file:
        arrays = dict(file)
    for _ in range(rng.choice((1, 1, 1, 2, 3))):
        name = rng.choice(sorted(arrays))
        match rng.randrange(8):
            case 0:
                arrays.pop(name)
            case 1:
                arrays[rng.choice(sorted(arrays))] = arrays[name]
            case _:
                arrays[name] = array_of(rng, arrays[name])
        if not arrays:
            break
    return saved(arrays, packed=rng.random() < 0.1)


def lying(rng: random.Random, raw: bytes) -> bytes:
    """An npz file in which one array says that it is larger, or something else."""
    out = io.BytesIO()
    with (
        zipfile.ZipFile(io.BytesIO(raw)) as old,
        zipfile.ZipFile(out, "w", rng.choice((0, 8))) as new,
    ):
        names = old.namelist()
        chosen = rng.choice(names)
        for name in names:
            data = old.read(name)
            if name == chosen:
                end = 10 + int.from_bytes(data[8:10], "little")
                said = rng.choice(
                    (
                        b"{'descr': '<f4', 'fortran_order': False, 'shape': (%d,), }",
                        b"{'descr': '<f8', 'fortran_order': False, 'shape': (%d, 9), }",
                        b"{'descr': '<U%d', 'fortran_order': False, 'shape': (), }",
                        b"{'descr': '|O', 'fortran_order': False, 'shape': (%d,), }",
                        b"{'descr': '\\d', 'fortran_order': True, 'shape': (%d,), }",
                        b"((((((((((%d",
                    )
                ) % rng.choice((10**12, 10**18, 10**30, 3, 0))
                head = said.ljust(max(len(said), end - 11)) + b"\n"
                data = data[:8] + len(head).to_bytes(2, "little") + head + data[end:]
            new.writestr(name, data)
    return out.getvalue()


def safetensors_of(rng: random.Random, raw: bytes) -> bytes:
    """A safetensors file whose header says something else."""
    end = 8 + int.from_bytes(raw[:8], "little")
    header = json_of(rng, raw[8:end]) if rng.random() < 0.8 else raw[8:end] + b" "
    length = len(header)
    if rng.random() < 0.1:
        length = rng.choice((0, 1 << 40, (1 << 64) - 1, len(raw)))
    return length.to_bytes(8, "little") + header + raw[end:]


BY_SUFFIX: dict[str, Callable[[random.Random, bytes], bytes]] = {
    ".json": json_of,
    ".jsonl": lines_of,
    ".yaml": yaml_of,
    ".npz": npz_of,
    ".gz": gzip_of,
    ".safetensors": safetensors_of,
}


def mutated(rng: random.Random, file: Path, raw: bytes) -> bytes:
    """The content of a file, damaged: as its kind of file, or as bytes."""
    own = BY_SUFFIX.get(file.suffix)
    if own is None or rng.random() < 0.25:
        return bytes_of(rng, raw)
    return own(rng, raw)
