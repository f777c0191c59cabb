"""The ways to compute attention; :mod:`skyreels_jax.ops.attention` chooses among them."""
