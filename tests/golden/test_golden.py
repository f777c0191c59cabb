"""Behaviour stays: the named requests give what the table says.

In the environment in which the table was recorded every bit counts. Elsewhere the projections may
be off by a request's tolerance. ``python -m tests.golden.record`` records anew what is meant to
change.
"""

from typing import Any

import pytest
from tests.golden.named_requests import BY_NAME, REQUESTS, NamedRequest, Studio
from tests.golden.record import differences, environment, made, read_table

pytestmark = pytest.mark.optimized
TABLE = read_table()


# Those that take longest, and whose ways others of the table go too.
_SLOW = {
    *("original-layout-vae-tiling-bfloat16", "t2v", "block-causal", "flf2v", "file-long", "file"),
    *("long-by-pixels", "start-image-noised", "i2v", "i2v-reference-exact", "extended-video"),
    *("hybrid", "reference-exact", "easycache", "end-frame", "start-and-end"),
    *("batched-guidance", "guidance-off", "reference-exact-float32"),
}


def marked(request: NamedRequest) -> Any:
    marks = pytest.mark.slow if request.name in _SLOW else ()
    return pytest.param(request, id=request.name, marks=marks)


@pytest.fixture(scope="module")
def exactly() -> bool:
    """Whether every bit counts; known once `optimized` has taken the tests' own flags away."""
    return TABLE["environment"] == environment()


@pytest.fixture(scope="module")
def studio(tmp_path_factory: pytest.TempPathFactory) -> Studio:
    return Studio(tmp_path_factory.mktemp("golden"))


def test_every_request_is_in_the_table():
    assert list(TABLE["requests"]) == list(BY_NAME)


@pytest.mark.parametrize("request_", [marked(request) for request in REQUESTS])
def test_a_request_gives_what_it_gave(studio: Studio, exactly: bool, request_: NamedRequest):
    if request_.needs is not None:
        pytest.importorskip(request_.needs)
    recorded = TABLE["requests"][request_.name]
    assert differences(request_, made(studio, request_), recorded, exactly=exactly) == []


@pytest.mark.parametrize(
    ("name", "changes"),
    [
        ("synchronous", {"seed": 8}),
        ("synchronous", {"guidance_scale": 4.1}),
        ("long-by-latents", {"continuation": "pixels"}),
        pytest.param("reference-exact", {"seed": 8}, marks=pytest.mark.slow),
        ("bfloat16", {"guidance_scale": 5.0}),
    ],
)
def test_another_video_is_noticed_in_both_ways(studio: Studio, name: str, changes: dict):
    request = BY_NAME[name]
    row = made(studio, request, **changes)
    for exactly in (True, False):
        assert differences(request, row, TABLE["requests"][name], exactly=exactly) != []


def test_a_wrong_number_of_frames_and_a_nan_are_noticed_in_both_ways():
    request = BY_NAME["synchronous"]
    recorded = TABLE["requests"]["synchronous"]
    assert differences(request, recorded, recorded, exactly=True) == []
    assert differences(request, recorded, recorded, exactly=False) == []
    short = {"sha256": "0", "shape": [16, 4, 6, 8]}
    nan = {"sha256": "0", "projections": [float("nan"), *([0.0] * 7)]}
    for change in (short, nan):
        row = {**recorded, "latents": {**recorded["latents"], **change}}
        assert differences(request, row, recorded, exactly=True) != []
        assert differences(request, row, recorded, exactly=False) != []
    assert differences(request, {"frames": recorded["frames"]}, recorded, exactly=True) != []
    assert differences(request, {"frames": recorded["frames"]}, recorded, exactly=False) != []
