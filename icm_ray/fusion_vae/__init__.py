"""The Fusion-VAE as a thing that exists: layout of adapters as vectors, network, fusion rules."""
