"""How good a dictionary is: its measures, and judges of what its features mean."""
