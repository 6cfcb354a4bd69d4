"""Prompts and text: what they may be, where they come from, windows of tokens."""
