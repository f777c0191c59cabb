from collections.abc import Sequence
from pathlib import Path
from unittest.mock import Mock

import numpy as np
import pytest

from skyreels_jax.components.lazy import LazyTextEncoder, PromptCache, fingerprint


class Recorder:
    """An encoder that remembers what it was asked, and makes rows that depend on the prompt."""

    def __init__(self):
        self.asked: list[str] = []

    def encode(self, prompts: Sequence[str]) -> np.ndarray:
        self.asked += prompts
        states = np.zeros((len(prompts), 16, 4), np.float32)
        for row, prompt in enumerate(prompts):
            states[row, : len(prompt)] = np.arange(1, len(prompt) + 1)[:, None] + ord(prompt[0])
        return states


@pytest.fixture
def recorder() -> Recorder:
    return Recorder()


def cached(recorder: Recorder, folder: Path, weights: str = "w") -> LazyTextEncoder:
    return LazyTextEncoder(lambda: recorder, cache=lambda: PromptCache(folder, weights))


def test_a_prompt_is_encoded_once_and_then_read(recorder: Recorder, tmp_path: Path):
    first = cached(recorder, tmp_path).encode(["abc", "xy"])
    second = cached(recorder, tmp_path).encode(["xy", "abc"])
    assert recorder.asked == ["abc", "xy"]
    np.testing.assert_array_equal(first, second[::-1])
    np.testing.assert_array_equal(first, Recorder().encode(["abc", "xy"]))


def test_the_same_prompt_twice_in_one_call_is_encoded_once(recorder: Recorder, tmp_path: Path):
    states = cached(recorder, tmp_path).encode(["abc", "abc"])
    assert recorder.asked == ["abc"]
    np.testing.assert_array_equal(states[0], states[1])


def test_prompts_equal_after_cleaning_share_an_entry(recorder: Recorder, tmp_path: Path):
    cached(recorder, tmp_path).encode(["a  cat"])
    cached(recorder, tmp_path).encode([" a cat "])
    assert recorder.asked == ["a  cat"]


def test_other_weights_do_not_share_entries(recorder: Recorder, tmp_path: Path):
    cached(recorder, tmp_path, "one").encode(["abc"])
    cached(recorder, tmp_path, "two").encode(["abc"])
    assert recorder.asked == ["abc", "abc"]


def test_the_encoder_is_not_loaded_when_all_is_found(recorder: Recorder, tmp_path: Path):
    cached(recorder, tmp_path).encode(["abc"])

    def fail():
        raise AssertionError("loaded without need")

    LazyTextEncoder(fail, cache=lambda: PromptCache(tmp_path, "w")).encode(["abc"])


@pytest.mark.parametrize("damage", [b"", b"not a file of tensors", None])
def test_a_damaged_entry_is_made_anew(recorder: Recorder, tmp_path: Path, damage: bytes | None):
    encoder = cached(recorder, tmp_path)
    before = encoder.encode(["abc"])
    path = PromptCache(tmp_path, "w").path_of("abc")
    path.write_bytes(path.read_bytes()[:-5] if damage is None else damage)
    np.testing.assert_array_equal(encoder.encode(["abc"]), before)
    assert recorder.asked == ["abc", "abc"]
    assert [p.name for p in tmp_path.iterdir()] == [path.name]


def test_any_bit_that_changed_is_noticed(recorder: Recorder, tmp_path: Path, caplog):
    encoder = cached(recorder, tmp_path)
    before = encoder.encode(["abc"])
    path = PromptCache(tmp_path, "w").path_of("abc")
    whole = path.read_bytes()
    random = np.random.default_rng(0)
    for number in range(20):
        changed = bytearray(whole)
        changed[random.integers(len(whole))] ^= 1 << int(random.integers(8))
        path.write_bytes(changed)
        np.testing.assert_array_equal(encoder.encode(["abc"]), before)
        assert len(recorder.asked) == number + 2
        assert "encoded anew" in caplog.records[-1].message
        np.testing.assert_array_equal(encoder.encode(["abc"]), before)
        assert len(recorder.asked) == number + 2  # the new entry is whole


def test_another_prompts_entry_is_not_used(recorder: Recorder, tmp_path: Path):
    encoder, cache = cached(recorder, tmp_path), PromptCache(tmp_path, "w")
    encoder.encode(["abc", "xyz"])
    cache.path_of("abc").write_bytes(cache.path_of("xyz").read_bytes())
    np.testing.assert_array_equal(encoder.encode(["abc"]), Recorder().encode(["abc"]))


@pytest.mark.parametrize("place", ["/proc/self/prompts", "file/prompts", "full"])
def test_where_nothing_can_be_kept_prompts_are_encoded(
    recorder: Recorder, tmp_path: Path, monkeypatch, caplog, place: str
):
    (tmp_path / "file").touch()
    folder = tmp_path / place
    if place == "full":
        refusal = OSError(28, "No space left on device")
        monkeypatch.setattr("safetensors.numpy.save_file", Mock(side_effect=refusal))
    encoder = cached(recorder, folder)
    np.testing.assert_array_equal(encoder.encode(["abc"]), Recorder().encode(["abc"]))
    encoder.encode(["abc"])
    assert recorder.asked == ["abc", "abc"]
    (said,) = caplog.records
    assert "going on without" in said.message
    assert not folder.exists() or not list(folder.iterdir())


def test_the_fingerprint_changes_with_contents_name_and_settings(tmp_path: Path):
    file = tmp_path / "a.bin"
    file.write_bytes(bytes(100_000))
    base = fingerprint([file], "bf16")
    assert fingerprint([file], "bf16") == base
    assert fingerprint([file], "f32") != base
    changed = tmp_path / "b.bin"
    changed.write_bytes(bytes(100_000))
    assert fingerprint([changed], "bf16") != base
    file.write_bytes(bytes(50_000) + b"\1" + bytes(49_999))
    assert fingerprint([file], "bf16") != base


def test_a_small_file_read_at_once_has_the_fingerprint_of_its_samples(tmp_path: Path, monkeypatch):
    file = tmp_path / "a.bin"
    content = np.random.default_rng(0).bytes(3 << 20)
    file.write_bytes(content)
    whole = fingerprint([file])
    monkeypatch.setattr("skyreels_jax.hub._READ_WHOLE", 0)
    assert fingerprint([file]) == whole
    file.write_bytes(content[:-100] + bytes(100))
    assert fingerprint([file]) != whole
