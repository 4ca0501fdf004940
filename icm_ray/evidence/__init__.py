"""Everything that runs the base model: hidden states, task vectors, null-space ratios."""
