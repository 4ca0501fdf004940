"""Pure torch mathematics on plain tensors; knows nothing of tasks, files or models."""
