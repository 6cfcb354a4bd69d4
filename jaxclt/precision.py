"""How exact float32 matrix products are: asked for in one place, given everywhere.

A GPU multiplies float32 in TF32 and a TPU in one bfloat16 pass unless it is told
otherwise: a feature flips, a patch that changes nothing moves logits by 1e-2. Every
program of this package is made by `jit` below, and what multiplies outside of one is
`precise`: both compute as asked (`at_precision`; full float32 unless told otherwise),
whatever JAX is set to around them, and leave that setting as it is.

JAX keeps one compiled program for each precision. The presets are algorithms of several
passes that are nearly float32 and faster: three of TF32 on GPUs, six of bfloat16.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator
from contextvars import ContextVar
from typing import Any, Literal, TypeVar, get_args

from jaxclt.errors import InputError, check_choice

__all__ = ["Precision", "asked_precision", "at_precision", "check_precision"]
__all__ += ["jit", "precise"]

Precision = Literal[
    "highest", "high", "default", "TF32_TF32_F32_X3", "BF16_BF16_F32_X6"
]
"""Of `jax.lax.Precision`, or a preset of `jax.lax.DotAlgorithmPreset`."""

_PRESETS = ("TF32_TF32_F32_X3", "BF16_BF16_F32_X6")
_F = TypeVar("_F", bound=Callable[..., Any])
# Not JAX's own setting: what else a process computes may well be set lower.
_asked: ContextVar[str] = ContextVar("jaxclt_precision", default="highest")


def check_precision(precision: str) -> None:
    """Refuse what is not a precision, or not one of this machine's devices.

    Raises:
      InputError: if so.
    """
    check_choice("precision", precision, get_args(Precision))
    if precision not in _PRESETS:
        return
    import jax

    platform = jax.default_backend()
    if platform == "cpu":
        raise InputError(
            f"precision {precision} is for accelerators, and this machine computes on "
            "its CPU, where float32 is exact as it is: leave it out"
        )
    if platform == "tpu" and "TF32" in precision:
        raise InputError(f"precision {precision} is for GPUs: give BF16_BF16_F32_X6")


def asked_precision() -> str:
    """What is asked for where this is called."""
    return _asked.get()


@contextlib.contextmanager
def at_precision(precision: str) -> Iterator[None]:
    """Ask for a precision of all that this package computes within.

    Args:
      precision: see `Precision`.

    Raises:
      InputError: if it is none, or this machine's devices do not have it.
    """
    check_precision(precision)
    before = _asked.set(precision)
    try:
        yield
    finally:
        _asked.reset(before)


def precise(fun: _F) -> _F:
    """A function whose matrix products outside of programs are as asked."""
    import jax

    @functools.wraps(fun)
    def call(*args: Any, **kwargs: Any) -> Any:
        with jax.default_matmul_precision(_asked.get()):
            return fun(*args, **kwargs)

    return call  # pyright: ignore[reportReturnType]


class _Program:
    """A function compiled by `jax.jit`, called at the precision that is asked for."""

    def __init__(self, fun: Callable[..., Any], **options: Any) -> None:
        import jax

        self._jitted = jax.jit(fun, **options)
        # The context is part of the key that JAX keeps compiled programs by.
        self._call, self.lower = precise(self._jitted), precise(self._jitted.lower)
        functools.update_wrapper(self, fun)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self._call(*args, **kwargs)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.__dict__["_jitted"], name)


def jit(fun: Callable[..., Any], **options: Any) -> _Program:
    """`jax.jit`, whose program multiplies at the precision that is asked for.

    Args:
      fun: see `jax.jit`.
      **options: see `jax.jit`.
    """
    return _Program(fun, **options)
