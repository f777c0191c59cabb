"""Prompts to token ids: text repair, UMT5's tokenizer, 512 tokens."""

import html
import json
import logging
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Final, NamedTuple

import ftfy
import numpy as np
import tokenizers
from jaxtyping import Bool, Int32
from tokenizers import models, pre_tokenizers

from skyreels_jax.errors import WeightsError
from skyreels_jax.files import read_bytes

TEXT_LEN: Final = 512

# What the two scripts of the original give the unconditional branch: generate_video_df.py has
# Wan 2.1's own list, generate_video.py a translation of it.
NEGATIVE_PROMPT_ZH: Final = (
    "色调艳丽，过曝，静态，细节模糊不清，字幕，风格，作品，画作，画面，静止，整体发灰，最差质量，低质量，"
    "JPEG压缩残留，丑陋的，残缺的，多余的手指，画得不好的手部，画得不好的脸部，畸形的，毁容的，"
    "形态畸形的肢体，手指融合，静止不动的画面，杂乱的背景，三条腿，背景人很多，倒着走"
)
NEGATIVE_PROMPT_EN: Final = (
    "Bright tones, overexposed, static, blurred details, subtitles, style, works, paintings, "
    "images, static, overall gray, worst quality, low quality, JPEG compression residue, ugly, "
    "incomplete, extra fingers, poorly drawn hands, poorly drawn faces, deformed, disfigured, "
    "misshapen limbs, fused fingers, still picture, messy background, three legs, many people in "
    "the background, walking backwards"
)

PAD: Final = "<pad>"
EOS: Final = "</s>"
_BYTE_ORDER_MARK: Final = b"\xef\xbb\xbf"
# UMT5's file has 17 MB.
_MAX_BYTES: Final = 128 * 2**20
_UNKNOWN_TOKEN: Final = "<unk>"

logger = logging.getLogger(__name__)


def clean(text: str) -> str:
    """Repair encoding accidents and HTML entities; one space between words, none at the ends.

    The models were trained on text cleaned in exactly this order (Wan 2.1's ``whitespace`` mode).
    """
    text = html.unescape(html.unescape(ftfy.fix_text(text))).strip()
    return re.sub(r"\s+", " ", text).strip()


class TokenBatch(NamedTuple):
    """Prompts as the text encoder takes them.

    Attributes:
        ids: token ids, padded at the end.
        mask: True for tokens, the end token included; False for padding.
        lengths: tokens that each prompt has in full, the end token included; more than ``S`` where
            it was cut.
    """

    ids: Int32[np.ndarray, "B S"]
    mask: Bool[np.ndarray, "B S"]
    lengths: tuple[int, ...]

    @property
    def truncated(self) -> tuple[int, ...]:
        """Which prompts did not fit and lost their end."""
        return tuple(i for i, length in enumerate(self.lengths) if length > self.ids.shape[1])


class Tokenizer:
    """UMT5's tokenizer by T5's conventions: cleaned text, no start token, one end token.

    Ids equal those that transformers' tokenizer gives for the same folder.
    """

    def __init__(self, backend: tokenizers.Tokenizer, *, pad: int, eos: int):
        """``backend`` splits text; ``pad`` and ``eos`` are the ids of the two special tokens."""
        self._backend = backend
        self.pad = pad
        self.eos = eos

    @classmethod
    def from_folder(cls, folder: str | Path) -> "Tokenizer":
        """Read ``tokenizer.json``.

        Raises:
            WeightsError: it is not there, is damaged, or is no T5 tokenizer.
        """
        path = Path(folder) / "tokenizer.json"
        if not path.exists():
            raise WeightsError(_missing(Path(folder)))
        backend = _read_json(path)
        backend.no_padding()
        backend.no_truncation()
        pad, eos = backend.token_to_id(PAD), backend.token_to_id(EOS)
        if pad is None or eos is None:
            raise WeightsError(f"{path}: not a T5 tokenizer, it has no {PAD} or no {EOS} token")
        return cls(backend, pad=pad, eos=eos)

    @property
    def vocab_size(self) -> int:
        """One past the largest id: what the encoder's embedding must at least have rows for."""
        return max(self._backend.get_vocab(with_added_tokens=True).values()) + 1

    def encode(self, prompts: Sequence[str]) -> TokenBatch:
        """Clean, split and pad to 512 tokens; a longer prompt is cut there, with a warning.

        The last token of every prompt is the end token, also of one that was cut.
        """
        # The end token is added here because not every published file adds it by itself.
        texts = [clean(prompt) for prompt in prompts]
        encodings = self._backend.encode_batch(texts, add_special_tokens=False)
        ids = np.full((len(prompts), TEXT_LEN), self.pad, np.int32)
        mask = np.zeros((len(prompts), TEXT_LEN), np.bool_)
        lengths = []
        for row, (text, encoding) in enumerate(zip(texts, encodings, strict=True)):
            tokens = [*encoding.ids[: TEXT_LEN - 1], self.eos]
            ids[row, : len(tokens)] = tokens
            mask[row, : len(tokens)] = True
            lengths.append(len(encoding.ids) + 1)
            if lengths[-1] > TEXT_LEN:
                first_lost = encoding.offsets[TEXT_LEN - 1][0]
                logger.warning(
                    "the prompt has %d tokens and only the first %d are used; lost from: %r",
                    *(lengths[-1], TEXT_LEN, text[first_lost : first_lost + 60]),
                )
        return TokenBatch(ids, mask, tuple(lengths))


def _missing(folder: Path) -> str:
    if (folder / "spiece.model").exists():
        return (
            f"{folder} has spiece.model and no tokenizer.json, which is what is read: fetch it "
            "from the folder google/umt5-xxl of the original checkpoint, or make it with "
            "transformers.T5TokenizerFast.from_pretrained(folder).save_pretrained(folder)"
        )
    return (
        f"{folder}: no tokenizer here; expected tokenizer.json (the folder is `tokenizer/` or "
        "`google/umt5-xxl/` of a checkpoint)"
    )


def _read_json(path: Path) -> tokenizers.Tokenizer:
    content = read_bytes(path, "tokenizer", limit=_MAX_BYTES, error=WeightsError)
    try:
        return tokenizers.Tokenizer.from_buffer(content.removeprefix(_BYTE_ORDER_MARK))
    except Exception as error:  # the library raises bare Exception
        raise WeightsError(f"{path}: not a readable tokenizer file ({error})") from error


def write_unigram(folder: Path, words: Sequence[str], characters: str) -> int:
    """Write ``tokenizer.json`` and its settings; returns how many ids it has.

    It splits into known words, else characters, else ``<unk>``, and ends a text with ``</s>``.

    Args:
        folder: to make.
        words: to know as wholes, where they follow a space or begin a text.
        characters: to fall back on.
    """
    # A unigram model takes the split of the highest sum of scores: whole words must win.
    # In T5's order; their places are their ids.
    special, sentinels = (PAD, EOS, _UNKNOWN_TOKEN), ("<extra_id_1>", "<extra_id_0>")
    pieces = [(piece, 0.0) for piece in special]
    pieces += [(f"▁{word}", -2.0 - 0.01 * i) for i, word in enumerate(words)]
    pieces += [("▁", -3.0), *((c, -4.0 - 0.01 * i) for i, c in enumerate(characters))]
    pieces += [(sentinel, 0.0) for sentinel in sentinels]
    tokenizer = tokenizers.Tokenizer(models.Unigram(pieces, special.index(_UNKNOWN_TOKEN), False))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.WhitespaceSplit(), pre_tokenizers.Metaspace()]
    )
    tokenizer.decoder = tokenizers.decoders.Metaspace()
    tokenizer.add_special_tokens([*special, *sentinels])
    tokenizer.post_processor = tokenizers.processors.TemplateProcessing(
        single=f"$A {EOS}", pair=f"$A {EOS} $B {EOS}", special_tokens=[(EOS, special.index(EOS))]
    )
    folder.mkdir(parents=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    settings = {"eos_token": EOS, "extra_ids": len(sentinels), "pad_token": PAD}
    settings |= {"tokenizer_class": "T5Tokenizer", "unk_token": _UNKNOWN_TOKEN}
    text = json.dumps(settings, indent=2) + "\n"
    (folder / "tokenizer_config.json").write_text(text, encoding="utf-8")
    return len(pieces)
