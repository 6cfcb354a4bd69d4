"""Circuits: small sets of features that are enough for an answer, and needed for it.

`ablation` holds features at a reference and measures, `rankings` are what the graph
says first, `search` finds a set, pure of any model, `find` puts them together, `files`
writes what was found into a traced directory.
"""
