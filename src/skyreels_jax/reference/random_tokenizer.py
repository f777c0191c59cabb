"""A small tokenizer in the form of UMT5's."""

import string
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

# In T5's order; their places are their ids.
SPECIAL: Final = ("<pad>", "</s>", "<unk>")
WORDS: Final = (
    "a",
    "an",
    "the",
    "of",
    "in",
    "on",
    "with",
    "at",
    "sun",
    "sea",
    "sky",
    "lake",
    "cat",
    "dog",
)
CHARACTERS: Final = (
    string.ascii_letters + string.digits + string.punctuation + "你好世界一只猫äéñöü"
)


def tokenizer() -> "PreTrainedTokenizerBase":
    """Splits into known words, else characters, else ``<unk>``; ends every text with ``</s>``."""
    from transformers import T5Tokenizer

    # A unigram model takes the split of the highest sum of scores: whole words must win.
    pieces = [(piece, 0.0) for piece in SPECIAL]
    pieces += [(f"▁{word}", -2.0 - 0.01 * i) for i, word in enumerate(WORDS)]
    pieces += [("▁", -3.0), *((c, -4.0 - 0.01 * i) for i, c in enumerate(CHARACTERS))]
    sentinels = [(f"<extra_id_{i}>", 0.0) for i in (1, 0)]
    return T5Tokenizer(vocab=pieces + sentinels, extra_ids=len(sentinels))
