"""Scores: predictions of a model with an adapter and a frozen task head, and what they are worth."""
