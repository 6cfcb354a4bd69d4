"""How far a graph can be trusted: its predictions against patches of the model."""
