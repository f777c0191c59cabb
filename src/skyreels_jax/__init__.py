"""SkyReels-V2 video diffusion in JAX / Flax NNX."""
