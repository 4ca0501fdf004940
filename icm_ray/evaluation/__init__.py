"""Scores: what a model with an adapter and a frozen task head predicts, and what that is worth."""
