"""Graphs for people: the JSON other viewers read, and a self-contained page."""
