"""Dictionaries in other tools' layouts: one table of formats, one lazy store."""
