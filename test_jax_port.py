"""Compare the JAX port with PyTorch: videos, layers, times and memory, with a report.

The flags of the described script; the same as ``skyreels-jax validate``.
"""

import sys

from skyreels_jax.cli.main import program

# A guard: pytest takes this for a file of tests, by its name.
if __name__ == "__main__":
    program(["validate", *sys.argv[1:]])
