"""The frozen base: how it is loaded, what it reads, what runs through it."""
