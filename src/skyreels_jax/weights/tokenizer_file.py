"""Where a tokenizer lies: in its folder, in a file of its own, or in the text encoder's file."""

from collections.abc import Iterable
from functools import partial
from pathlib import Path
from typing import Final

import numpy as np

from skyreels_jax.errors import WeightsError
from skyreels_jax.files import read_bytes
from skyreels_jax.prompts import TOKENIZER_FILES, UMT5_SENTINELS, Pieces, Tokenizer
from skyreels_jax.weights.gguf_file import read_header
from skyreels_jax.weights.open_file import open_tensors

# The tensor of bytes in which ComfyUI keeps SentencePiece's file.
_EMBEDDED: Final = "spiece_model"
_EMBEDDINGS: Final = ("shared.weight", "token_embedding.weight", "token_embd.weight")
# Where llama.cpp keeps pieces, their scores and kinds, and the table of characters.
_GGUF_KEYS: Final = tuple(
    f"tokenizer.ggml.{name}" for name in ("tokens", "scores", "token_type", "precompiled_charsmap")
)
_MAX_BYTES: Final = 128 * 2**20


def open_tokenizer(path: Path) -> Tokenizer:
    """The tokenizer of a folder, or of a file that holds one.

    Args:
        path: a folder with ``tokenizer.json`` or ``spiece.model``, one of these files, or a text
            encoder's file of ComfyUI.

    Raises:
        WeightsError: there is none, or it is damaged.
    """
    if path.is_dir() or not path.exists():
        return Tokenizer.from_folder(path)
    if path.name in TOKENIZER_FILES:
        return Tokenizer.from_folder(path.parent)
    if path.suffix == ".model":
        content = read_bytes(path, "tokenizer", limit=_MAX_BYTES, error=WeightsError)
        return Tokenizer.from_sentencepiece(content, str(path))
    source = open_tensors(path)
    name = _embedded_in(source.tensors())
    if path.suffix == ".gguf":
        pieces, where = _llama_cpps_pieces(path), str(path)
        make = partial(Tokenizer.from_pieces, pieces, where)
    elif name is not None:
        content = np.ascontiguousarray(source.read(name)).tobytes()
        make = partial(Tokenizer.from_sentencepiece, content, f"{path}: {name}")
    else:
        raise WeightsError(f"{path} holds no tokenizer: there is no tensor {_EMBEDDED}")
    # The sentinels of an encoder of another size are unknown: it has no more than it has rows for.
    rows = [i.shape[0] for n, i in source.tensors().items() if n.endswith(_EMBEDDINGS) and i.shape]
    tokenizer = make()
    more = tokenizer.vocab_size - min(rows, default=tokenizer.vocab_size)
    return make(sentinels=max(0, UMT5_SENTINELS - more)) if more > 0 else tokenizer


def _llama_cpps_pieces(path: Path) -> Pieces:
    """The tokenizer that a GGUF file has among its keys, without what fills up its list.

    Names: llama.cpp, docs/gguf.md, "tokenizer.ggml"; its kinds of pieces are SentencePiece's.
    """
    lists = read_header(path, wanted=_GGUF_KEYS).lists
    words, scores, kinds, table = (lists.get(key) for key in _GGUF_KEYS)
    if (
        isinstance(words, np.ndarray)
        or words is None
        or not all(
            isinstance(one, np.ndarray) and len(one) == len(words) for one in (scores, kinds)
        )
    ):
        raise WeightsError(f"{path} holds no tokenizer: {', '.join(_GGUF_KEYS[:3])} do not go well")
    count = len(words)
    while count and words[count - 1].startswith(("[PAD", "<extra_id_")):
        count -= 1
    numbers = np.asarray(scores, np.float64).tolist(), np.asarray(kinds).tolist()
    made = np.zeros(0, np.uint8) if table is None else np.asarray(table)
    return Pieces(
        list(zip(words[:count], numbers[0][:count], strict=True)),
        numbers[1][:count],
        made.astype(np.uint8).tobytes(),
    )


def holds_tokenizer(file: Path) -> bool:
    """Whether a text encoder's file of ComfyUI or llama.cpp has its tokenizer in it."""
    if file.suffix == ".gguf" and file.is_file():
        return _GGUF_KEYS[0] in read_header(file, wanted=_GGUF_KEYS[:1]).lists
    if file.suffix != ".safetensors" or not file.is_file():
        return False
    return _embedded_in(open_tensors(file).tensors()) is not None


def _embedded_in(names: Iterable[str]) -> str | None:
    return next((name for name in names if name.split(".")[-1] == _EMBEDDED), None)
