"""How deep the package is from Python: what docs/adr/0008-the-journey.md says of it stays so."""

import pytest
from benchmarks.journey import DEPTH_TARGET, Journey, measure


def depths(journey: Journey) -> dict[str, int]:
    return {end: len(frames) for end, frames in journey.stacks.items()}


@pytest.mark.slow
def test_from_python_nothing_is_further_away_than_the_aims():
    found = depths(measure("pipe"))
    assert found.keys() == DEPTH_TARGET.keys()
    assert all(found[end] <= most for end, most in DEPTH_TARGET.items()), found


@pytest.mark.slow
def test_from_the_command_line_it_is_further():
    # The other way round: on a longer way the same comparison fails.
    found = depths(measure("generate"))
    assert all(found[end] > most for end, most in DEPTH_TARGET.items()), found
