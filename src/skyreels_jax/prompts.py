"""Prompts to token ids: text repair, UMT5's tokenizer, 512 tokens."""

import html
import json
import logging
import re
import struct
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Final, NamedTuple, TypeVar

import ftfy
import numpy as np
import tokenizers
from jaxtyping import Bool, Int32
from tokenizers import models, normalizers, pre_tokenizers

from skyreels_jax.errors import WeightsError
from skyreels_jax.files import read_bytes, read_json

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
_JSON: Final = "tokenizer.json"
_SENTENCEPIECE: Final = "spiece.model"
# What a folder may have its tokenizer in; the first that is there is read.
TOKENIZER_FILES: Final = (_JSON, _SENTENCEPIECE)
# Sentinels after SentencePiece's own pieces: T5's number, unless the folder tells another.
_T5_SENTINELS: Final = 100
UMT5_SENTINELS: Final = 300
# SentencePiece's numbers for a model of unigrams and for kinds of pieces.
_UNIGRAM: Final = 1
_UNKNOWN, _CONTROL, _USER_DEFINED = 2, 3, 4
_MOST_PIECES: Final = 2_000_000

_T = TypeVar("_T", int, bytes)

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


class Pieces(NamedTuple):
    """What SentencePiece has learned.

    Attributes:
        pieces: each with its score; their places are their ids.
        kinds: of each piece, by SentencePiece's numbers.
        table: how characters are normalised, in SentencePiece's own form; empty if they are not.
    """

    pieces: Sequence[tuple[str, float]]
    kinds: Sequence[int]
    table: bytes


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
        """Read ``tokenizer.json``, or ``spiece.model`` where that is all there is.

        Raises:
            WeightsError: neither is there, it is damaged, or is no T5 tokenizer.
        """
        folder = Path(folder)
        if (path := folder / _JSON).exists():
            return cls._with_ends(_read_json(path), str(path))
        if (path := folder / _SENTENCEPIECE).exists():
            content = read_bytes(path, "tokenizer", limit=_MAX_BYTES, error=WeightsError)
            return cls.from_sentencepiece(content, str(path), sentinels=_sentinels(folder))
        expected = "expected tokenizer.json or spiece.model (the folder is `tokenizer/` or"
        raise WeightsError(
            f"{folder}: no tokenizer here; {expected} `google/umt5-xxl/` of a checkpoint)"
        )

    @classmethod
    def from_sentencepiece(
        cls, content: bytes, where: str, *, sentinels: int = UMT5_SENTINELS
    ) -> "Tokenizer":
        """SentencePiece's own file, split as transformers' T5 tokenizer splits with it.

        Like there, what no piece covers is ``<unk>``, also where a model could fall back on bytes.

        Args:
            content: of ``spiece.model``; ComfyUI keeps it in the text encoder's file.
            where: its name in messages.
            sentinels: how many ``<extra_id_...>`` follow its pieces.

        Raises:
            WeightsError: it is damaged, or is no model of unigrams.
        """
        return cls.from_pieces(_read_sentencepiece(content, where), where, sentinels=sentinels)

    @classmethod
    def from_pieces(
        cls, pieces: "Pieces", where: str, *, sentinels: int = UMT5_SENTINELS
    ) -> "Tokenizer":
        """As :meth:`from_sentencepiece`, of what another file has kept of it.

        Raises:
            WeightsError: they are no model of unigrams.
        """
        return cls._with_ends(_of_pieces(pieces, where, sentinels), where)

    @classmethod
    def _with_ends(cls, backend: tokenizers.Tokenizer, where: str) -> "Tokenizer":
        backend.no_padding()
        backend.no_truncation()
        pad, eos = backend.token_to_id(PAD), backend.token_to_id(EOS)
        if pad is None or eos is None:
            raise WeightsError(f"{where}: not a T5 tokenizer, it has no {PAD} or no {EOS} token")
        return cls(backend, pad=pad, eos=eos)

    def save(self, folder: Path) -> Path:
        """Write ``tokenizer.json`` into a folder, which is made; returns its path."""
        folder.mkdir(parents=True, exist_ok=True)
        self._backend.save(str(folder / _JSON))
        return folder / _JSON

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


def _sentinels(folder: Path) -> int:
    """How many sentinels a folder's settings tell."""
    file = folder / "tokenizer_config.json"
    settings = read_json(file, error=WeightsError) if file.is_file() else {}
    given = settings.get("extra_ids", _T5_SENTINELS) if isinstance(settings, dict) else None
    if not isinstance(given, int) or not 0 <= given <= 10_000:
        raise WeightsError(f"{file}: extra_ids should be a number of 0 to 10000, not {given!r:.40}")
    return given


def _read_sentencepiece(content: bytes, where: str) -> "Pieces":
    """See :meth:`Tokenizer.from_sentencepiece`."""
    pieces: list[tuple[str, float]] = []
    kinds: list[int] = []
    model_type, table = _UNIGRAM, b""
    try:
        for number, value in _fields(content):
            if number == 1 and isinstance(value, bytes):
                parts = dict(_fields(value))
                (score,) = struct.unpack("<f", _typed(parts.get(2, b"\0\0\0\0"), bytes))
                pieces.append((_typed(parts[1], bytes).decode("utf-8"), score))
                kinds.append(_typed(parts.get(3, 1), int))
            elif number == 2 and isinstance(value, bytes):
                model_type = _typed(dict(_fields(value)).get(3, _UNIGRAM), int)
            elif number == 3 and isinstance(value, bytes):
                table = _typed(dict(_fields(value)).get(2, b""), bytes)
    except (KeyError, ValueError, struct.error) as error:
        raise WeightsError(f"{where}: not a SentencePiece model that can be read") from error
    if model_type != _UNIGRAM:
        raise WeightsError(f"{where}: not a T5 tokenizer, which is a SentencePiece of unigrams")
    return Pieces(pieces, kinds, table)


def _of_pieces(content: "Pieces", where: str, sentinels: int) -> tokenizers.Tokenizer:
    """See :meth:`Tokenizer.from_pieces`."""
    pieces, kinds, table = list(content.pieces), content.kinds, content.table
    if _UNKNOWN not in kinds or not len(kinds) == len(pieces) <= _MOST_PIECES:
        raise WeightsError(f"{where}: not a T5 tokenizer, which is a SentencePiece of unigrams")
    pieces += [(f"<extra_id_{i}>", 0.0) for i in reversed(range(sentinels))]
    try:
        tokenizer = tokenizers.Tokenizer(models.Unigram(pieces, kinds.index(_UNKNOWN), False))
        if table:
            tokenizer.normalizer = normalizers.Precompiled(table)
    except BaseException as error:  # a panic of the library's own language is no Exception
        if isinstance(error, KeyboardInterrupt | SystemExit):
            raise
        raise WeightsError(f"{where}: not a tokenizer that can be read ({error})") from error
    special = [pieces[i][0] for i, kind in enumerate(kinds) if kind in (_UNKNOWN, _CONTROL)]
    special += [piece for piece, _ in pieces[len(kinds) :]]
    _by_t5(tokenizer, special, next((i for i, (piece, _) in enumerate(pieces) if piece == EOS), 1))
    own = [pieces[i][0] for i, kind in enumerate(kinds) if kind == _USER_DEFINED]
    tokenizer.add_tokens([tokenizers.AddedToken(piece, normalized=False) for piece in own])
    return tokenizer


def _by_t5(tokenizer: tokenizers.Tokenizer, special: Sequence[str], eos: int) -> None:
    """Split at spaces, which begin words, and end a text with ``</s>``, as T5 does."""
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.WhitespaceSplit(), pre_tokenizers.Metaspace()]
    )
    tokenizer.decoder = tokenizers.decoders.Metaspace()
    tokenizer.add_special_tokens(list(special))
    tokenizer.post_processor = tokenizers.processors.TemplateProcessing(
        single=f"$A {EOS}", pair=f"$A {EOS} $B {EOS}", special_tokens=[(EOS, eos)]
    )


def _fields(content: bytes) -> Iterator[tuple[int, int | bytes]]:
    """The fields of a message of Protocol Buffers: numbers, and everything else as bytes.

    Raises:
        ValueError: it ends too early or holds what the format has not.
    """
    at, end = 0, len(content)

    def varint() -> int:
        nonlocal at
        value = 0
        for shift in range(0, 64, 7):
            if at >= end:
                break
            byte = content[at]
            at += 1
            value |= (byte & 0x7F) << shift
            if byte < 0x80:
                return value
        raise ValueError("a number does not end")

    while at < end:
        number, kind = divmod(varint(), 8)
        if kind == 0:
            yield number, varint()
            continue
        if kind not in (1, 2, 5):
            raise ValueError(f"a field of kind {kind}")
        size = varint() if kind == 2 else {1: 8, 5: 4}[kind]
        if size > end - at:
            raise ValueError("a field goes on after the end")
        yield number, content[at : at + size]
        at += size


def _typed(value: int | bytes, kind: type[_T]) -> _T:
    if not isinstance(value, kind):
        raise ValueError(f"a field holds no {kind.__name__}")
    return value


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
    _by_t5(tokenizer, [*special, *sentinels], special.index(EOS))
    folder.mkdir(parents=True)
    tokenizer.save(str(folder / _JSON))
    settings = {"eos_token": EOS, "extra_ids": len(sentinels), "pad_token": PAD}
    settings |= {"tokenizer_class": "T5Tokenizer", "unk_token": _UNKNOWN_TOKEN}
    text = json.dumps(settings, indent=2) + "\n"
    (folder / "tokenizer_config.json").write_text(text, encoding="utf-8")
    return len(pieces)
