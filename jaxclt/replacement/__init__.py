"""Replacement models: the MLPs swapped for a dictionary, with and without errors."""
