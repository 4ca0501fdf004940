"""How a Fusion-VAE comes about: its data, its two stages of training, adaptation of its latent."""
