"""Tiny random models for tests and examples, and models with a known circuit.

`tiny` makes everything at random; `zoo` has models with circuits put in by hand. What
needs the trainer or patches is imported by its own name: `jaxclt.testing.learned`
trains small transcoders of planted models, `jaxclt.testing.recovery` scores how much of
the circuit the graphs of a dictionary say. `experiments/zoo` has the table.
"""

from jaxclt.testing.tiny import Tiny, tiny
from jaxclt.testing.zoo import Planted, absolute, induction, true_dictionary, two_hop

__all__ = [
    "Planted",
    "Tiny",
    "absolute",
    "induction",
    "tiny",
    "true_dictionary",
    "two_hop",
]
