"""Tiny random models for tests and examples, and models with a known circuit.

`tiny` makes everything at random. `zoo` has models with circuits put in by hand;
`learn` trains small transcoders of them, `recover` scores how much of the circuit the
graphs of a dictionary say. `experiments/zoo` has the table.
"""

from jaxclt.testing.learned import Learned, learn
from jaxclt.testing.recovery import Recovery, recover
from jaxclt.testing.tiny import Tiny, tiny
from jaxclt.testing.zoo import Planted, true_dictionary

__all__ = [
    "Learned",
    "Planted",
    "Recovery",
    "Tiny",
    "learn",
    "recover",
    "tiny",
    "true_dictionary",
]
