"""The tokenizer of small random checkpoints."""

import string
from pathlib import Path
from typing import Final

from skyreels_jax.weights.unigram import write_unigram

WORDS: Final = ("a", "an", "the", "of", "in", "on", "with", "sun", "sea", "sky", "lake", "cat")
CHARACTERS: Final = (
    string.ascii_letters + string.digits + string.punctuation + "你好世界一只猫äéñöü"
)


def write_tokenizer(folder: Path) -> int:
    """Write the two files of a tokenizer; returns how many ids it has."""
    return write_unigram(folder, WORDS, CHARACTERS)
