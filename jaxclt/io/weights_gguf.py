"""Models in a GGUF file, the format of llama.cpp.

The header is parsed here in one pass over the bytes: `gguf.GGUFReader` makes several
numpy objects per vocabulary entry, 5 s for 49 152 tokens where this takes 0.1 s, and
it maps truncated files without complaint. Tensors are dequantised by `gguf`.
"""

from __future__ import annotations

import math
import os
import struct
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
from gguf import GGML_QUANT_SIZES, GGMLQuantizationType, GGUFValueType
from gguf.quants import dequantize

from jaxclt.errors import InputError
from jaxclt.io.names import (
    GEMMA,
    GPT2,
    GPT_NEOX,
    LLAMA,
    QWEN,
    Layout,
    Row,
    read_params,
    tensor_name,
)
from jaxclt.lm.config import LMConfig, RopeScaling
from jaxclt.types import LMParams

__all__ = ["GGUFFile", "GGUFTensor", "config_from_gguf", "load_gguf", "open_gguf"]
__all__ += ["params_from_gguf"]


@dataclass(frozen=True, kw_only=True)
class Architecture:
    """What llama.cpp knows of an architecture and does not write into its files."""

    rows: tuple[Row, ...] = LLAMA
    options: frozenset[str] = frozenset()  # leaves that all its models have
    act: Literal["silu", "gelu_tanh", "gelu"] = "silu"
    layer_norm: bool = False
    positions: bool = False  # learned ones, nothing turns
    partial: bool = False  # a part of the channels may turn
    parallel: bool = False  # unless the file says
    scales_embedding: bool = False  # by the root of the width
    capped: bool = False  # attention scores and logits
    period: int = 0  # all but every so manieth layer are local; 0: all alike
    rope_local_theta: float | None = None
    # Its largest model, told by its layers, scales queries by the width per head.
    wide_queries: int = 0


ARCHITECTURES = {
    "llama": Architecture(),
    "qwen2": Architecture(rows=QWEN, options=frozenset({"qkv_bias"})),
    "qwen3": Architecture(rows=QWEN, options=frozenset({"qk_norm"})),
    "gemma2": Architecture(
        rows=GEMMA,
        act="gelu_tanh",
        scales_embedding=True,
        capped=True,
        period=2,
        wide_queries=46,
    ),
    "gemma3": Architecture(
        rows=GEMMA,
        options=frozenset({"qk_norm"}),
        act="gelu_tanh",
        scales_embedding=True,
        period=6,
        rope_local_theta=10_000.0,
        wide_queries=62,
    ),
    "gpt2": Architecture(rows=GPT2, act="gelu_tanh", layer_norm=True, positions=True),
    # llama.cpp runs the tanh form; the models were trained with this one.
    "gptneox": Architecture(
        rows=GPT_NEOX, act="gelu", layer_norm=True, partial=True, parallel=True
    ),
}
_VERSIONS = (2, 3)
_ROPE_FACTORS = "rope_freqs.weight"
_SCALARS = {
    GGUFValueType.UINT8: "<u1",
    GGUFValueType.INT8: "<i1",
    GGUFValueType.UINT16: "<u2",
    GGUFValueType.INT16: "<i2",
    GGUFValueType.UINT32: "<u4",
    GGUFValueType.INT32: "<i4",
    GGUFValueType.FLOAT32: "<f4",
    GGUFValueType.UINT64: "<u8",
    GGUFValueType.INT64: "<i8",
    GGUFValueType.FLOAT64: "<f8",
    GGUFValueType.BOOL: "?",
}


@dataclass(frozen=True)
class GGUFTensor:
    """Where one tensor lies in the file."""

    kind: GGMLQuantizationType
    shape: tuple[int, ...]  # as numpy counts: the last axis is contiguous
    offset: int
    n_bytes: int


@dataclass(frozen=True)
class GGUFFile:
    """A parsed header and the mapped bytes behind it."""

    path: Path
    meta: dict[str, Any]
    tensors: dict[str, GGUFTensor]
    data: np.ndarray  # uint8, the whole file

    def get(self, name: str) -> np.ndarray:
        """Dequantised tensor, float32.

        Raises:
          InputError: if the tensor is missing or its type cannot be dequantised.
        """
        if name not in self.tensors:
            raise InputError(f"{self.path}: tensor {name} is missing from the weights")
        t = self.tensors[name]
        raw = self.data[t.offset : t.offset + t.n_bytes]
        # gguf works on 16 rows at a time: rows of about 8192 numbers, whatever the
        # tensor's own, keep its temporaries in cache and its Python loop short.
        block, n_bytes = GGML_QUANT_SIZES[t.kind]
        per_row = math.gcd(max(t.n_bytes // n_bytes, 1), max(8192 // block, 1))
        rows = raw.reshape(-1, per_row * n_bytes)
        try:
            # Plain numbers are told by their dtype, blocks by their bytes.
            plain = {"F32": "<f4", "F16": "<f2"}.get(t.kind.name)
            rows = rows if plain is None else rows.view(plain)
            w = dequantize(rows, t.kind).astype(np.float32, copy=False)
            return w.reshape(t.shape)
        except (NotImplementedError, ValueError) as error:
            raise InputError(
                f"{self.path}: tensor {name} of type {t.kind.name} cannot be "
                "dequantised; use a file of another quantisation"
            ) from error


def open_gguf(path: str | os.PathLike[str]) -> GGUFFile:
    """Parse the header of a GGUF file and check that all its tensors lie inside it.

    Raises:
      InputError: if the file is missing, no GGUF file, or truncated.
    """
    path = Path(path)
    try:
        data = np.memmap(path, np.uint8, "r")
    except OSError as error:
        raise InputError(f"cannot read {path}: {error.strerror or error}") from error
    except ValueError as error:
        raise InputError(f"{path} is empty; fetch the model again") from error
    if bytes(data[:4]) != b"GGUF":
        raise InputError(f"{path} is no GGUF file (its first bytes are not 'GGUF')")
    try:
        meta, tensors = _header(data.data)
    except InputError as error:
        raise InputError(f"{path}: {error}") from error
    except (struct.error, ValueError, KeyError, OverflowError) as error:
        raise InputError(
            f"{path} is truncated or damaged (its header ends early or is not GGUF); "
            "fetch the model again"
        ) from error
    for name, t in tensors.items():
        if t.offset + t.n_bytes > data.size:
            raise InputError(
                f"{path} is truncated: tensor {name} ends at byte "
                f"{t.offset + t.n_bytes} of {data.size}; fetch the model again"
            )
    return GGUFFile(path, meta, tensors, data)


def config_from_gguf(file: GGUFFile) -> LMConfig:
    """Config of a model from GGUF metadata.

    Raises:
      InputError: for another architecture, rotary embeddings that are scaled in
        another way than linearly or by factors, experts, or a missing or impossible
        size.
    """
    name, arch = _architecture(file)
    if file.meta.get(f"{name}.expert_count", 0):
        raise InputError(f"{file.path}: mixtures of experts are not supported")
    if "token_embd.weight" not in file.tensors:
        raise InputError(f"{file.path}: tensor token_embd.weight is missing")

    get = _getter(file, name)
    d_model, n_layers = get("embedding_length", int), get("block_count", int)
    n_heads = get("attention.head_count", int)
    d_head = get("attention.key_length", int, d_model // max(n_heads, 1))
    d_rotary = 0 if arch.positions else None
    whole_head = ["attention.value_length"]
    if arch.partial:
        d_rotary = get("rope.dimension_count", int, d_head)
    else:
        whole_head.append("rope.dimension_count")
    for key in whole_head:
        if get(key, int, d_head) != d_head:
            raise InputError(
                f"{file.path}: {name}.{key} differs from the head size {d_head}, "
                "which is not supported"
            )
    window, local_theta = None, arch.rope_local_theta
    if arch.period or f"{name}.attention.sliding_window" in file.meta:
        window = get("attention.sliding_window", int)
    if local_theta is not None:
        local_theta = get("rope.freq_base_swa", float, local_theta)
    wide = n_layers == arch.wide_queries
    norm = "layer_norm" if arch.layer_norm else "layer_norm_rms"
    parallel = file.meta.get(f"{name}.use_parallel_residual", arch.parallel)
    return LMConfig(
        n_layers=n_layers,
        d_model=d_model,
        n_heads=n_heads,
        n_kv_heads=get("attention.head_count_kv", int, n_heads),
        d_head=d_head,
        d_mlp=get("feed_forward_length", int),
        d_vocab=file.tensors["token_embd.weight"].shape[0],
        n_ctx=get("context_length", int),
        norm_eps=get(f"attention.{norm}_epsilon", float, 1e-5),
        parallel=bool(parallel),
        d_rotary=d_rotary,
        rope_theta=get("rope.freq_base", float, 10_000.0),
        rope_local_theta=local_theta,
        rope_scaling=_scaling(file, name),
        act=arch.act,
        window=window,
        query_scale=(d_model / n_heads) ** -0.5 if wide else None,
        attn_cap=get("attn_logit_softcapping", float) if arch.capped else None,
    )


def _architecture(file: GGUFFile) -> tuple[str, Architecture]:
    name = file.meta.get("general.architecture")
    if name not in ARCHITECTURES:
        raise InputError(
            f"{file.path}: architecture {name!r} is not supported; "
            f"supported: {', '.join(ARCHITECTURES)}"
        )
    return name, ARCHITECTURES[name]


def _scaling(file: GGUFFile, name: str) -> RopeScaling | None:
    kind = file.meta.get(f"{name}.rope.scaling.type", "none")
    each = _ROPE_FACTORS in file.tensors  # Llama 3's, written out
    if kind not in ("none", "linear") or (each and kind != "none"):
        raise InputError(
            f"{file.path}: scaled rotary embeddings of type {kind!r} are not "
            "supported; supported: 'linear', and factors of their own"
        )
    if each:
        factors = file.get(_ROPE_FACTORS).ravel().tolist()
        return RopeScaling(kind="factors", factors=tuple(factors))
    if kind == "none":
        return None
    factor = _getter(file, name)("rope.scaling.factor", float)
    return RopeScaling(kind="linear", factor=factor)


def params_from_gguf(file: GGUFFile, cfg: LMConfig) -> LMParams:
    """Dequantise all weights to float32, with query and key rows put back in halves.

    Raises:
      InputError: for a missing, unknown, wrongly shaped or not finite tensor.
    """
    name, arch = _architecture(file)
    # An option is on where the last of its leaves is there: q, k and v may have biases
    # of their own, but o only with them.
    last = {row.option: row for row in arch.rows if row.option}
    options = {
        option
        for option, row in last.items()
        if tensor_name(row, "gguf") in file.tensors
    }
    local = None
    if arch.period:
        local = tuple((i + 1) % arch.period != 0 for i in range(cfg.n_layers))
    cap = None
    if arch.capped:
        cap = _getter(file, name)("final_logit_softcapping", float)
    return read_params(
        file.get,
        {name: tensor.shape for name, tensor in file.tensors.items()},
        cfg,
        layout=Layout(
            rows=arch.rows,
            options=arch.options | options,
            local=local,
            embed_scale=cfg.d_model**0.5 if arch.scales_embedding else None,
            logit_cap=cap,
        ),
        source="gguf",
        where=str(file.path),
        ignore=lambda name: name == _ROPE_FACTORS,  # in the config
    )


def load_gguf(path: str | os.PathLike[str]) -> tuple[LMParams, LMConfig]:
    """Read a GGUF file: `open_gguf`, `config_from_gguf` and `params_from_gguf`."""
    file = open_gguf(path)
    cfg = config_from_gguf(file)
    return params_from_gguf(file, cfg), cfg


def _getter(file: GGUFFile, name: str) -> Callable[..., Any]:
    """Typed access to the keys of the architecture."""

    def get(key: str, kind: type, default: Any = None) -> Any:
        value = file.meta.get(f"{name}.{key}", default)
        if value is None:
            raise InputError(f"{file.path}: metadata {name}.{key} is missing")
        if not isinstance(value, kind) or isinstance(value, bool) or value <= 0:
            raise InputError(
                f"{file.path}: metadata {name}.{key} must be one positive "
                f"{kind.__name__}, not {str(value)[:40]}"
            )
        return value

    return get


def _header(buf: memoryview) -> tuple[dict[str, Any], dict[str, GGUFTensor]]:
    """Metadata and tensor table; every read beyond the end raises."""
    version, n_tensors, n_keys = struct.unpack_from("<IQQ", buf, 4)
    if version not in _VERSIONS:
        raise InputError(
            f"GGUF version {version} is not supported; "
            f"supported: {', '.join(map(str, _VERSIONS))} (little endian)"
        )
    at = 24
    meta: dict[str, Any] = {}
    for _ in range(n_keys):
        key, at = _string(buf, at)
        (kind,) = struct.unpack_from("<I", buf, at)
        meta[key], at = _value(buf, at + 4, GGUFValueType(kind))

    found = []
    for _ in range(n_tensors):
        name, at = _string(buf, at)
        (n_dims,) = struct.unpack_from("<I", buf, at)
        *dims, kind, offset = struct.unpack_from(f"<{n_dims}QIQ", buf, at + 4)
        at += 4 + 8 * n_dims + 12
        found.append((name, tuple(reversed(dims)), kind, offset))

    align = meta.get("general.alignment", 32)
    if not isinstance(align, int) or align < 1:
        raise InputError(f"general.alignment {align!r} is not a positive integer")
    base = -(-at // align) * align
    tensors = {}
    for name, shape, kind, offset in found:
        kind = GGMLQuantizationType(kind)
        block, n_bytes = GGML_QUANT_SIZES[kind]
        if not shape or name in tensors or shape[-1] % block:
            raise InputError(f"tensor {name} is listed twice or has a bad shape")
        size = math.prod(shape) // block * n_bytes
        tensors[name] = GGUFTensor(kind, shape, base + offset, size)
    return meta, tensors


def _string(buf: memoryview, at: int) -> tuple[str, int]:
    (n,) = struct.unpack_from("<Q", buf, at)
    end = at + 8 + n
    if end > len(buf):
        raise ValueError("string beyond the end")
    return str(buf[at + 8 : end], "utf-8"), end


def _value(buf: memoryview, at: int, kind: GGUFValueType) -> tuple[Any, int]:
    if kind == GGUFValueType.STRING:
        return _string(buf, at)
    if kind != GGUFValueType.ARRAY:
        dtype = np.dtype(_SCALARS[kind])
        (value,) = np.frombuffer(buf, dtype, 1, at)
        # The shortest decimal: 1e-5 as the model's author wrote it, not 9.99999975e-6.
        exact = float(str(value)) if dtype == "<f4" else value.item()
        return exact, at + dtype.itemsize
    raw, n = struct.unpack_from("<IQ", buf, at)
    item, at = GGUFValueType(raw), at + 12
    if item in _SCALARS:
        dtype = np.dtype(_SCALARS[item])
        end = at + n * dtype.itemsize
        if end > len(buf):
            raise ValueError("array beyond the end")
        return np.frombuffer(buf, dtype, n, at).tolist(), end
    values = []
    for _ in range(n):
        value, at = _value(buf, at, item)
        values.append(value)
    return values, at
