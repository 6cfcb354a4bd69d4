"""Tiny random models and dictionaries for tests and examples."""

from jaxclt.testing.tiny import Tiny, tiny

__all__ = ["Tiny", "tiny"]
