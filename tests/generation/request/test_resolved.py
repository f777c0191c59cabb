"""Windows of a long video: every frame made once, for every legal combination of numbers."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from skyreels_jax.errors import RequestError
from skyreels_jax.generation.request.resolved import plan_windows, prompts_by_window
from skyreels_jax.geometry import latent_frames, pixel_frames


def original_lengths(frames: int, at_once: int, overlap: int) -> list[int]:
    """Latent frames of each run, by the formulas of the original's long-video loop."""
    length = (frames - 1) // 4 + 1
    base, shared = (at_once - 1) // 4 + 1, (overlap - 1) // 4 + 1
    runs = 1 + (length - base - 1) // (base - shared) + 1
    lengths = [base]
    for i in range(1, runs):
        start = i * (base - shared)
        lengths.append(min(length - (start + shared) + shared, base))
    return lengths


# The first five as recorded from a run of the original.
@pytest.mark.parametrize(
    ("frames", "at_once", "lengths"),
    [
        (257, 97, [25, 25, 25]),
        (377, 97, [25, 25, 25, 25, 15]),
        (737, 97, [25] * 9),
        (1457, 97, [25] * 18),
        (237, 97, [25, 25, 20]),
    ],
)
def test_windows_are_the_originals(frames: int, at_once: int, lengths: list[int]):
    windows = plan_windows(latent_frames(frames), latent_frames(at_once), latent_frames(17))
    assert [window.frames for window in windows] == lengths
    assert lengths == original_lengths(frames, at_once, 17)


lengths = st.integers(1, 400)


@settings(max_examples=300, deadline=None)
@given(total=lengths, size=st.integers(1, 60), overlap=st.integers(1, 20), data=st.data())
def test_every_frame_is_made_exactly_once_and_windows_join(total, size, overlap, data):
    overlap = min(overlap, size - 1)
    if total > size and overlap < 1:
        size, overlap = 2, 1
    prefix = data.draw(st.integers(0, min(total, size) - 1))
    windows = plan_windows(total, size, overlap, prefix=prefix, end=data.draw(st.booleans()))
    made = [
        frame
        for window in windows
        for frame in range(window.first_new, window.start + window.frames)
    ]
    assert made == list(range(prefix, total))
    assert [window.number for window in windows] == list(range(len(windows)))
    assert windows[0].prefix == prefix
    for before, window in zip(windows, windows[1:], strict=False):
        assert window.prefix == overlap
        assert window.start + window.prefix == before.start + before.frames
        assert not before.end
    assert all(window.frames == size for window in windows[:-1])
    assert all(window.frames <= size for window in windows)


@pytest.mark.parametrize(
    "numbers",
    [
        {"total": 10, "size": 4, "overlap": 4},
        {"total": 10, "size": 4, "overlap": 0},
        {"total": 3, "size": 5, "overlap": 1, "prefix": 3},
        {"total": 9, "size": 3, "overlap": 1, "prefix": 3},
        {"total": 9, "size": 3, "overlap": 1, "prefix": -1},
    ],
)
def test_windows_without_new_frames_are_refused(numbers: dict):
    with pytest.raises(ValueError, match="no new frames"):
        plan_windows(**numbers)


def test_latent_and_pixel_frames_are_each_others_inverse():
    assert [pixel_frames(n) for n in range(4)] == [0, 1, 5, 9]
    assert all(latent_frames(pixel_frames(n)) == n for n in range(1, 400))


WINDOWS = plan_windows(13, 5, 1)  # new frames begin at 0, 17, 33


def test_prompts_go_to_windows_in_turn_and_the_last_one_stays():
    assert prompts_by_window(["a"], WINDOWS) == ("a", "a", "a")
    assert prompts_by_window(["a", "b"], WINDOWS) == ("a", "b", "b")
    assert prompts_by_window(["a", "b", "c"], WINDOWS) == ("a", "b", "c")


def test_prompts_by_frame_hold_from_the_next_window_on():
    assert prompts_by_window({0: "a", 10: "b"}, WINDOWS) == ("a", "b", "b")
    assert prompts_by_window({0: "a", 17: "b", 33: "c"}, WINDOWS) == ("a", "b", "c")
    assert prompts_by_window({0: "a", 18: "b"}, WINDOWS) == ("a", "a", "b")


@pytest.mark.parametrize(
    ("prompts", "words"),
    [
        (["a"] * 4, "4 prompts for 3 windows"),
        ({5: "a"}, "first must start at frame 0"),
        ({}, "first must start at frame 0"),
        ({0: "a", 40: "b"}, "from frames 40 would never be used.*0, 17, 33"),
        ({0: "a", 3: "b", 4: "c"}, "from frames 3 would never be used"),
    ],
)
def test_a_prompt_that_no_window_would_have_is_refused(prompts, words: str):
    with pytest.raises(RequestError, match=words):
        prompts_by_window(prompts, WINDOWS)
