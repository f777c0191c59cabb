import pytest

from skyreels_jax import geometry
from skyreels_jax.errors import RequestError


@pytest.mark.parametrize(
    ("name", "aspect", "expected"),
    [
        ("540P", None, (544, 960)),
        ("540p", "16:9", (544, 960)),
        ("540P", "9:16", (960, 544)),
        ("540P", "1:1", (720, 720)),
        ("720P", None, (720, 1280)),
        ("720P", "9:16", (1280, 720)),
        ("720P", "1:1", (960, 960)),
        ("720P", "4:3", (832, 1104)),
    ],
)
def test_named_resolutions_keep_their_area_in_every_aspect(name, aspect, expected):
    assert geometry.resolution(name, aspect) == expected


@pytest.mark.parametrize(
    ("name", "aspect", "message"),
    [
        ("480P", None, "540P, 720P"),
        ("540P", "16x9", "width:height"),
        ("540P", "16:0", "width:height"),
        ("540P", "-1:2", "width:height"),
        ("540P", "1:2:3", "width:height"),
        ("540P", "100:1", "between 1:8 and 8:1"),
    ],
)
def test_words_that_are_no_resolution_are_refused(name, aspect, message):
    with pytest.raises(RequestError, match=message):
        geometry.resolution(name, aspect)


@pytest.mark.parametrize(
    ("seconds", "fps", "expected"),
    [(4.04, 24, 97), (5, 24, 121), (5, 16, 81), (0.01, 24, 1), (1, 24, 25), (0.2, 24, 5)],
)
def test_seconds_become_the_nearest_legal_number_of_frames(seconds, fps, expected):
    assert geometry.frames_in(float(seconds), fps) == expected


def test_latents_are_an_eighth_in_space_and_a_quarter_in_time():
    assert geometry.latent_shape(97, 544, 960) == (25, 68, 120)
    assert geometry.latent_shape(1, 16, 16) == (1, 2, 2)


@pytest.mark.parametrize(
    ("value", "arguments", "expected"),
    [
        (541, (), [528, 544]),
        (5, (), [16]),
        (-3, (), [16]),
        (98, (4, 1), [97, 101]),
        (0, (4, 1), [1]),
    ],
)
def test_the_nearest_legal_values_are_positive(value, arguments, expected):
    assert geometry.nearest_multiples(value, *arguments) == expected
