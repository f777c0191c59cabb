"""Prompts to ids, against transformers' tokenizers and diffusers' cleaning."""

import bisect
import json
import logging
import random
import unicodedata
from pathlib import Path

import numpy as np
import pytest
import sentencepiece
import tokenizers
from tokenizers import models, normalizers, pre_tokenizers, processors, trainers

from skyreels_jax import prompts
from skyreels_jax.errors import WeightsError
from skyreels_jax.prompts import Tokenizer, clean

SENTENCES = """
a the red panda drinks tea slowly under wide cherry trees while rain falls on stone lanterns
cinematic close-up shot, 35mm film; golden hour! The camera pans left… naïve café façade Ünïté
一只 白色的 猫 坐在 窗台上， 看着 雨 落下。 夕阳 海滩 慢动作 镜头 推进 日本の 風景 カメラ がゆっくり
한국어 문장 привет мир здравствуйте مرحبا שלום สวัสดี नमस्ते 1920x1080 24fps 3.14 100% #1 @home
"""
WORDS = SENTENCES.split()
ODD = (
    *("\u00a0", "\u3000", "\u2003", "\u200b", "\u200d", "\ufeff", "\t", "\n", "\r\n", "\v", "\f"),
    *("\x00", "\x07", "\x1b[31m", "\x7f", "\x85", "\u2028", "\u00ad", "\u202e", "\u2066"),
    *("&amp;", "&amp;amp;", "&lt;b&gt;", "&#39;", "&#x4e2d;", "&nbsp;", "&quot;", "&notanentity;"),
    *("😀", "👩‍👩‍👧‍👦", "🏳️‍🌈", "🇨🇳", "👍🏽", "☃︎", "✈️", "𝔘𝔫𝔦", "𠜎", "ﬁ", "①", "㈱", "Ａｂｃ", "½"),
    *("e\u0301", "a\u0308\u0304", "n\u0303", "\u0301", "क्षि", "가", "Z̷̧̤a̴l̶g̸o̵", "ё", "Å", "ﷺ"),
    *("â€œquotedâ€\x9d", "schÃ¶n", "æ–‡å—", "L&AMP;R", "‘smart’ “quotes”", "—", "…", "`", "''"),
    *(
        "<extra_id_0>",
        "<extra_id_99>",
        "</s>",
        "<pad>",
        "<unk>",
        "<s>",
        "▁",
        "▁▁a",
        "\\n",
        "%s",
        "{}",
    ),
    *(
        "http://example.org/?a=1&b=2",
        "a/b\\c",
        "x" * 70,
        "啊" * 40,
        "!?" * 9,
        "0" * 33,
        "\ud83d",
        "ｱｲｳ",
    ),
)


def awkward_prompts() -> list[str]:
    """Single oddities, and sentences with oddities between, at the ends and inside words."""
    rng = random.Random(7)
    texts = ["", " ", "\n", *WORDS, *ODD]
    while len(texts) < 700:
        words = rng.choices(WORDS, k=rng.randint(1, 25)) + rng.choices(ODD, k=rng.randint(1, 6))
        rng.shuffle(words)
        text = rng.choice(("", " ", "  ", "\u3000", ", ")).join(words)
        form = rng.choice(("NFC", "NFD", "NFKC", None))
        texts.append(unicodedata.normalize(form, text) if form else text)
    texts.append(" ".join(rng.choices(WORDS, k=2000)))
    texts.append("".join(rng.choices(ODD, k=2000)))
    return texts


PROMPTS = awkward_prompts()


def write_settings(folder: Path) -> None:
    settings = {"tokenizer_class": "T5Tokenizer", "extra_ids": 100, "eos_token": "</s>"}
    settings |= {"pad_token": "<pad>", "unk_token": "<unk>"}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))


@pytest.fixture(scope="module")
def sentencepiece_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with only ``spiece.model``, trained with T5's settings."""
    folder = tmp_path_factory.mktemp("spiece")
    rng = random.Random(1)
    text = folder / "text.txt"
    text.write_text("\n".join(" ".join(rng.choices(WORDS, k=12)) for _ in range(400)))
    sentencepiece.SentencePieceTrainer.train(
        input=str(text),
        model_prefix=str(folder / "spiece"),
        model_type="unigram",
        vocab_size=420,
        hard_vocab_limit=False,
        pad_id=0,
        eos_id=1,
        unk_id=2,
        bos_id=-1,
        minloglevel=2,
    )
    (folder / "spiece.vocab").unlink()
    text.unlink()
    write_settings(folder)
    return folder


@pytest.fixture(scope="module")
def json_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with only ``tokenizer.json``: NFKC, metaspace, unigram, the end token appended."""
    folder = tmp_path_factory.mktemp("json")
    tokenizer = tokenizers.Tokenizer(models.Unigram())
    tokenizer.normalizer = normalizers.NFKC()
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.WhitespaceSplit(), pre_tokenizers.Metaspace()]
    )
    sentinels = [f"<extra_id_{i}>" for i in reversed(range(100))]
    trainer = trainers.UnigramTrainer(
        vocab_size=500, special_tokens=["<pad>", "</s>", "<unk>"], unk_token="<unk>"
    )
    rng = random.Random(2)
    tokenizer.train_from_iterator(
        [" ".join(rng.choices(WORDS, k=12)) for _ in range(400)], trainer=trainer
    )
    tokenizer.add_special_tokens(sentinels)
    tokenizer.post_processor = processors.TemplateProcessing(
        single="$A </s>", special_tokens=[("</s>", 1)]
    )
    # What a training run left behind must not leak into ours.
    tokenizer.enable_truncation(16)
    tokenizer.enable_padding(length=16)
    tokenizer.save(str(folder / "tokenizer.json"))
    return folder


@pytest.fixture(params=["converted_folder", "json_folder", "sentencepiece_folder"])
def folder(request: pytest.FixtureRequest) -> Path:
    return request.getfixturevalue(request.param)


@pytest.fixture(scope="module")
def converted_folder(sentencepiece_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """``tokenizer.json`` made of ``spiece.model`` by transformers."""
    from transformers import T5TokenizerFast

    folder = tmp_path_factory.mktemp("converted")
    T5TokenizerFast.from_pretrained(sentencepiece_folder).save_pretrained(folder)
    return folder


def transformers_ids(folder: Path, texts: list[str]) -> tuple[np.ndarray, np.ndarray]:
    """Ids and mask by the library that the original and diffusers use."""
    from transformers import PreTrainedTokenizerFast, T5TokenizerFast

    if (folder / "tokenizer_config.json").exists():
        reference = T5TokenizerFast.from_pretrained(folder)
    else:
        reference = PreTrainedTokenizerFast.from_pretrained(
            folder, pad_token="<pad>", eos_token="</s>", unk_token="<unk>"
        )
    batch = reference(
        texts, padding="max_length", max_length=512, truncation=True, return_tensors="np"
    )
    return batch.input_ids, batch.attention_mask


def theirs(text: str) -> str:
    from diffusers.pipelines.skyreels_v2.pipeline_skyreels_v2 import prompt_clean

    return prompt_clean(text)


def test_cleaning_is_that_of_diffusers():
    assert [clean(text) for text in PROMPTS] == [theirs(text) for text in PROMPTS]


def test_the_corpus_needs_every_step_of_the_cleaning(monkeypatch: pytest.MonkeyPatch):
    expected = [theirs(text) for text in PROMPTS]
    for module, name, replacement in (
        (prompts.ftfy, "fix_text", lambda text: text),
        (prompts.html, "unescape", lambda text: text),
        (prompts.re, "sub", lambda pattern, by, text: text),
    ):
        with monkeypatch.context() as patch:
            patch.setattr(module, name, replacement)
            assert [clean(text) for text in PROMPTS] != expected, name


def test_cleaning_by_hand():
    assert clean("  &amp;amp;lt; hÃ©llo\u3000 wörld \n") == "< héllo wörld"
    assert clean("a&amp;nbsp;&amp;nbsp;b") == "a b"


def test_ids_are_those_of_transformers(folder: Path):
    assert len(PROMPTS) >= 500
    batch = Tokenizer.from_folder(folder).encode(PROMPTS)
    ids, mask = transformers_ids(folder, [theirs(text) for text in PROMPTS])
    wrong = np.flatnonzero((batch.ids != ids).any(axis=1) | (batch.mask != mask).any(axis=1))
    assert [PROMPTS[i] for i in wrong] == []
    assert len(batch.truncated) >= 2


def test_a_tokenizer_without_normaliser_would_be_caught(folder: Path):
    tokenizer = Tokenizer.from_folder(folder)
    tokenizer._backend.normalizer = None
    ids, _ = transformers_ids(folder, [theirs(text) for text in PROMPTS])
    assert (tokenizer.encode(PROMPTS).ids != ids).any()


def test_padding_and_end(folder: Path):
    batch = Tokenizer.from_folder(folder).encode(["", "a red panda"])
    assert batch.ids.shape == batch.mask.shape == (2, 512)
    assert batch.ids.dtype == np.int32
    assert batch.ids[0].tolist() == [1] + 511 * [0]
    assert batch.mask.sum(axis=1).tolist() == list(batch.lengths)
    assert batch.ids[1, batch.lengths[1] - 1] == 1
    assert batch.truncated == ()


def test_a_cut_keeps_the_end_token_and_is_reported(folder: Path, caplog: pytest.LogCaptureFixture):
    long = " ".join(WORDS * 30)
    with caplog.at_level(logging.WARNING):
        batch = Tokenizer.from_folder(folder).encode(["a cat", long])
    assert batch.truncated == (1,)
    assert batch.ids[1, -1] == 1 and batch.mask[1].all()
    (record,) = caplog.records
    assert f"has {batch.lengths[1]} tokens" in record.getMessage()
    lost = record.args[2]
    assert lost and lost in clean(long)


def test_a_prompt_of_exactly_512_tokens_is_whole(folder: Path, caplog: pytest.LogCaptureFixture):
    tokenizer = Tokenizer.from_folder(folder)
    words = (WORDS * 30)[:600]

    def length(count: int) -> int:
        return tokenizer.encode([" ".join(words[:count])]).lengths[0]

    fits = bisect.bisect_right(range(600), 512, key=length) - 1
    assert length(fits) <= 512 < length(fits + 1)
    caplog.clear()
    assert tokenizer.encode([" ".join(words[:fits])]).truncated == ()
    assert caplog.records == []


def test_json_wins_over_sentencepiece(tmp_path: Path, json_folder: Path):
    (tmp_path / "tokenizer.json").write_bytes((json_folder / "tokenizer.json").read_bytes())
    (tmp_path / "spiece.model").write_bytes(b"never read")
    Tokenizer.from_folder(tmp_path)


def test_vocab_size_counts_the_sentinels(sentencepiece_folder: Path, converted_folder: Path):
    pieces = sentencepiece.SentencePieceProcessor(str(sentencepiece_folder / "spiece.model"))
    assert Tokenizer.from_folder(converted_folder).vocab_size == pieces.vocab_size() + 100


def test_a_folder_without_tokenizer_is_named(tmp_path: Path):
    with pytest.raises(WeightsError, match=r"expected tokenizer\.json") as error:
        Tokenizer.from_folder(tmp_path / "nowhere")
    assert str(tmp_path) in str(error.value)


def test_what_is_saved_of_a_sentencepiece_model_is_what_transformers_saves(
    sentencepiece_folder: Path, converted_folder: Path, tmp_path: Path
):
    file = Tokenizer.from_folder(sentencepiece_folder).save(tmp_path / "new")
    ours, theirs = (json.loads(f.read_text()) for f in (file, converted_folder / "tokenizer.json"))
    assert ours == theirs


def test_pieces_of_a_user_are_kept_whole(tmp_path: Path):
    """As in transformers, and pieces for single bytes are pieces like others."""
    from transformers import T5TokenizerFast

    text = tmp_path / "text.txt"
    text.write_text("\n".join(" ".join(WORDS) for _ in range(20)))
    sentencepiece.SentencePieceTrainer.train(
        input=str(text),
        model_prefix=str(tmp_path / "spiece"),
        vocab_size=500,
        hard_vocab_limit=False,
        byte_fallback=True,
        user_defined_symbols=["[shot]", "red<"],
        pad_id=0,
        eos_id=1,
        unk_id=2,
        bos_id=-1,
        minloglevel=2,
    )
    write_settings(tmp_path)
    prompts = ["a [shot]cat", "red<0x41> 猫 red< </s> x<extra_id_3>y", *PROMPTS[:100]]
    expected = T5TokenizerFast.from_pretrained(tmp_path)(
        [clean(p) for p in prompts], padding="max_length", max_length=512, return_tensors="np"
    )
    np.testing.assert_array_equal(
        Tokenizer.from_folder(tmp_path).encode(prompts).ids, expected.input_ids
    )


def test_a_mutated_sentencepiece_model_gives_a_tokenizer_or_our_error(sentencepiece_folder: Path):
    whole = (sentencepiece_folder / "spiece.model").read_bytes()
    rng = random.Random(11)
    refused = 0
    for _ in range(300):
        content = bytearray(whole)
        for _ in range(rng.choice((1, 3, 30))):
            content[rng.randrange(len(content))] = rng.randrange(256)
        if rng.random() < 0.3:
            del content[rng.randrange(len(content)) :]
        try:
            Tokenizer.from_sentencepiece(bytes(content), "it").encode(["a red cat"])
        except WeightsError as error:
            assert str(error).startswith("it: ")
            refused += 1
    assert 30 < refused < 300


@pytest.mark.parametrize(
    "content", [b"", b"{", b"\x0a", b"\x0a\xff\xff\xff\xff\xff\x7f", b"\xff" * 40]
)
def test_what_is_no_sentencepiece_model_is_named(tmp_path: Path, content: bytes):
    (tmp_path / "spiece.model").write_bytes(content)
    with pytest.raises(WeightsError, match=r"spiece\.model: not a (SentencePiece|T5)"):
        Tokenizer.from_folder(tmp_path)


@pytest.mark.parametrize("told", [-1, "many", 10**9])
def test_a_wrong_number_of_sentinels_is_named(
    tmp_path: Path, sentencepiece_folder: Path, told: object
):
    (tmp_path / "spiece.model").write_bytes((sentencepiece_folder / "spiece.model").read_bytes())
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"extra_ids": told}))
    with pytest.raises(WeightsError, match="extra_ids should be a number of 0 to 10000"):
        Tokenizer.from_folder(tmp_path)


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b"{}", b"\xff\xfe", b'{"model": {}}'])
def test_a_damaged_json_is_named(tmp_path: Path, content: bytes):
    (tmp_path / "tokenizer.json").write_bytes(content)
    with pytest.raises(WeightsError, match=r"tokenizer\.json"):
        Tokenizer.from_folder(tmp_path)


def test_a_tokenizer_of_another_model_is_named(tmp_path: Path):
    other = tokenizers.Tokenizer(models.WordLevel({"[UNK]": 0}, unk_token="[UNK]"))
    other.save(str(tmp_path / "tokenizer.json"))
    with pytest.raises(WeightsError, match="not a T5 tokenizer"):
        Tokenizer.from_folder(tmp_path)
