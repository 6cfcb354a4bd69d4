"""Interventions on a recorded prompt: what changes when a feature is changed."""
