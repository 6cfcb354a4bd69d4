"""Tiny random models, dictionaries and recordings for tests and examples."""

from jaxclt.testing.tiny import Tiny, tiny

__all__ = ["Tiny", "tiny"]
