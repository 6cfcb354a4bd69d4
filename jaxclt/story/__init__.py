"""A graph told in words, each with its number: tokens, groups of features, trust."""
