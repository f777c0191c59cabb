"""Writes a small tokenizer in the form of UMT5's."""

from collections.abc import Sequence
from pathlib import Path
from typing import Final

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors

from skyreels_jax.weights.writer import write_json

PAD: Final = "<pad>"
EOS: Final = "</s>"
UNKNOWN: Final = "<unk>"
# In T5's order; their places are their ids.
SPECIAL: Final = (PAD, EOS, UNKNOWN)
SENTINELS: Final = ("<extra_id_1>", "<extra_id_0>")


def write_unigram(folder: Path, words: Sequence[str], characters: str) -> int:
    """Write ``tokenizer.json`` and its settings; returns how many ids it has.

    It splits into known words, else characters, else ``<unk>``, and ends a text with ``</s>``.

    Args:
        folder: to make.
        words: to know as wholes, where they follow a space or begin a text.
        characters: to fall back on.
    """
    # A unigram model takes the split of the highest sum of scores: whole words must win.
    pieces = [(piece, 0.0) for piece in SPECIAL]
    pieces += [(f"▁{word}", -2.0 - 0.01 * i) for i, word in enumerate(words)]
    pieces += [("▁", -3.0), *((c, -4.0 - 0.01 * i) for i, c in enumerate(characters))]
    pieces += [(sentinel, 0.0) for sentinel in SENTINELS]
    tokenizer = Tokenizer(models.Unigram(pieces, SPECIAL.index(UNKNOWN), False))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.WhitespaceSplit(), pre_tokenizers.Metaspace()]
    )
    tokenizer.decoder = decoders.Metaspace()
    tokenizer.add_special_tokens([*SPECIAL, *SENTINELS])
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"$A {EOS}", pair=f"$A {EOS} $B {EOS}", special_tokens=[(EOS, SPECIAL.index(EOS))]
    )
    folder.mkdir(parents=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    settings = {"eos_token": EOS, "extra_ids": len(SENTINELS), "pad_token": PAD}
    write_json(
        folder / "tokenizer_config.json",
        {**settings, "tokenizer_class": "T5Tokenizer", "unk_token": UNKNOWN},
    )
    return len(pieces)
