"""The original's ``generate_video.py`` (text or image to video), for its commands as they are."""

import sys

from skyreels_jax.cli.main import program
from skyreels_jax.cli.original import translate

if __name__ == "__main__":
    program(translate("generate_video", sys.argv[1:]))
