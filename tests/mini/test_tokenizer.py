"""The small model's tokenizer: captions as whole words, anything else as characters."""

import hashlib
import json
from pathlib import Path

import numpy as np
import pytest
import tokenizers
from transformers import AutoTokenizer

from skyreels_jax.mini.tasks import TOKENIZER_CHARACTERS, write_mini_tokenizer
from skyreels_jax.moving_shapes.captions import caption, plain_caption, words
from skyreels_jax.moving_shapes.scene import draw_scene
from skyreels_jax.prompts import Tokenizer
from skyreels_jax.testing.random_checkpoint import write_tokenizer

UNKNOWN = 2
PROMPTS = ("a red hexagon waltzes!", "A RED CIRCLE", "red-green (blue) 3.5 & 'x'", "Moves;up,down.")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("mini") / "tokenizer"
    write_mini_tokenizer(path)
    return path


def pieces(folder: Path, text: str) -> list[str]:
    backend = tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))
    return backend.encode(text).tokens


def ids(folder: Path, text: str) -> list[int]:
    batch = Tokenizer.from_folder(folder).encode([text])
    return batch.ids[0][batch.mask[0]].tolist()


def written(number: int) -> list[str]:
    rng = np.random.default_rng([1, number])
    scene = draw_scene(rng, 1.0)
    return [caption(scene, rng), plain_caption(scene)]


def pieces_of_words(text: str) -> list[str]:
    """Of a text in which every word is known: the words, and each mark by itself."""
    marks = {mark: f" {mark}" for mark in ",;."}
    spaced = "".join(marks.get(c, c) for c in text).split()
    return [word if word in marks else f"▁{word}" for word in spaced] + ["</s>"]


def test_captions_are_words_and_marks(folder: Path):
    for text in (text for number in range(300) for text in written(number)):
        assert pieces(folder, text) == pieces_of_words(text), text
    # The negative twin: a word that no caption has falls apart.
    text = "a red hexagon moves up"
    assert pieces(folder, text) != pieces_of_words(text)


def test_every_word_is_one_token_with_and_without_a_capital(folder: Path):
    seen = set()
    for word in words():
        for text in (word, word.capitalize(), f"a {word}", f"a {word.capitalize()}"):
            found = ids(folder, text)
            assert len(found) == len(text.split()) + 1, text
            seen.add(found[-2])
    assert len(seen) == 2 * len(words())
    assert len(ids(folder, "hexagon")) > 2
    assert len(ids(folder, "MOVES")) > 2


@pytest.mark.parametrize("prompt", PROMPTS)
def test_other_text_is_read_by_characters(folder: Path, prompt: str):
    found = ids(folder, prompt)
    assert UNKNOWN not in found
    joined = "".join(pieces(folder, prompt)[:-1]).replace("▁", " ").strip()
    assert joined == prompt


def test_what_has_no_character_is_unknown(folder: Path):
    assert UNKNOWN in ids(folder, "a red 圆")
    assert ids(folder, "a red 圆")[:2] == ids(folder, "a red")[:2]
    assert len({tuple(ids(folder, c)) for c in TOKENIZER_CHARACTERS}) == len(TOKENIZER_CHARACTERS)


@pytest.mark.parametrize("text", [*PROMPTS, "", "a red 圆", *written(0), *written(1)])
def test_ids_are_those_of_transformers(folder: Path, text: str):
    theirs = AutoTokenizer.from_pretrained(folder)
    assert ids(folder, text) == theirs(text).input_ids
    assert ids(folder, text + " up") != theirs(text).input_ids


def test_the_folder_has_the_form_of_umt5s(folder: Path):
    settings = json.loads((folder / "tokenizer_config.json").read_text())
    assert settings["tokenizer_class"] == "T5Tokenizer"
    tokenizer = Tokenizer.from_folder(folder)
    assert (tokenizer.pad, tokenizer.eos) == (0, 1)
    assert ids(folder, "")[-1] == ids(folder, "a circle")[-1] == tokenizer.eos
    assert tokenizer.vocab_size == len(words()) * 2 + len(TOKENIZER_CHARACTERS) + 6


def test_the_same_files_every_time(folder: Path, tmp_path: Path):
    assert write_mini_tokenizer(tmp_path / "again") == Tokenizer.from_folder(folder).vocab_size
    for file in sorted(folder.iterdir()):
        assert (tmp_path / "again" / file.name).read_bytes() == file.read_bytes()


def test_the_random_checkpoints_tokenizer_is_what_it_was_before_they_shared_a_writer(
    tmp_path: Path, folder: Path
):
    def values(path: Path) -> list[str]:
        model = json.loads((path / "tokenizer.json").read_text())
        parts = [json.dumps(model[k], sort_keys=True) for k in ("model", "post_processor")]
        return [hashlib.sha256(part.encode()).hexdigest()[:16] for part in parts]

    assert write_tokenizer(tmp_path / "tokenizer") == 124
    assert values(tmp_path / "tokenizer") == ["cef56187308b2bb2", "5da9cffa6e37f4a7"]
    assert values(folder) != values(tmp_path / "tokenizer")
