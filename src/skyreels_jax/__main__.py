"""``python -m skyreels_jax``: the command line, where its program is not on the path."""

from skyreels_jax.cli.main import program

program()
