"""Tiny random models and dictionaries for tests and examples."""

from jaxclt.testing.tiny import Tiny, TinyOptions, tiny

__all__ = ["Tiny", "TinyOptions", "tiny"]
