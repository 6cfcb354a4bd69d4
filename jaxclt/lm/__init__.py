"""The language model: one decoder as pure functions over a params pytree."""
