"""Ours beside peers: time, memory and error in one run; nothing else depends on it."""
