"""Encoders and VAE as a generation uses them."""
