"""Where a tokenizer lies: in its folder, in a file of its own, or in the text encoder's file."""

from collections.abc import Iterable
from pathlib import Path
from typing import Final

import numpy as np

from skyreels_jax.errors import WeightsError
from skyreels_jax.files import read_bytes
from skyreels_jax.prompts import TOKENIZER_FILES, UMT5_SENTINELS, Tokenizer
from skyreels_jax.weights.open_file import open_tensors

# The tensor of bytes in which ComfyUI keeps SentencePiece's file.
_EMBEDDED: Final = "spiece_model"
_EMBEDDINGS: Final = ("shared.weight", "token_embedding.weight", "token_embd.weight")
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
    if name is None:
        raise WeightsError(f"{path} holds no tokenizer: there is no tensor {_EMBEDDED}")
    content = np.ascontiguousarray(source.read(name)).tobytes()
    # The sentinels of an encoder of another size are unknown: it has no more than it has rows for.
    rows = [i.shape[0] for n, i in source.tensors().items() if n.endswith(_EMBEDDINGS) and i.shape]
    tokenizer = Tokenizer.from_sentencepiece(content, f"{path}: {name}")
    more = tokenizer.vocab_size - min(rows, default=tokenizer.vocab_size)
    if more <= 0:
        return tokenizer
    fewer = max(0, UMT5_SENTINELS - more)
    return Tokenizer.from_sentencepiece(content, f"{path}: {name}", sentinels=fewer)


def holds_tokenizer(file: Path) -> bool:
    """Whether a text encoder's file, as ComfyUI makes them, has its tokenizer in it."""
    if file.suffix != ".safetensors" or not file.is_file():
        return False
    return _embedded_in(open_tensors(file).tensors()) is not None


def _embedded_in(names: Iterable[str]) -> str | None:
    return next((name for name in names if name.split(".")[-1] == _EMBEDDED), None)
