"""A prompt becomes a graph, a graph a directory."""
