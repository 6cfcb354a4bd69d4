"""jaxclt: circuit tracing in JAX.

Explains one prediction of a language model as a graph of interpretable features
(Ameisen et al. 2025, *Circuit Tracing*), exactly, and checks it against the model.

The names here are what a notebook needs. The rooms below are mapped in README.md; each
says in its module docstrings what it computes and for which part of the paper.

Each is imported when it is first used, from where ``__init__.pyi`` says: importing this
package imports neither jax nor transformers.
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
