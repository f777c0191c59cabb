"""The VAE with rows, and encoders with parameters, cut over virtual devices are those of one."""

import pytest
from tests.parallel.test_devices import differences

TOL = 5e-6  # of the largest value, float32; measured at most 1.4e-7
WRONG = 1e-3  # the least that a mistake changes; measured 0.02 and more


@pytest.mark.slow
@pytest.mark.parametrize("direction", ["decode", "encode"])
def test_the_vae_is_that_of_one_device(direction: str):
    """Even rows, uneven ones, and fewer rows than devices."""
    runs = [(direction, where, "-") for where in ("2,5", "4,4", "4,5", "8,9", "8,5")]
    found = differences(*runs)
    assert len(found) == 5
    assert {run: value for run, value in found.items() if not value <= TOL} == {}


@pytest.mark.slow
def test_encoders_and_downsampling_are_those_of_one_device():
    runs = [(case, f"{n},5", "-") for case in ("text", "image", "down") for n in (2, 4, 8)]
    found = differences(*runs)
    assert {run: value for run, value in found.items() if not value <= TOL} == {}


@pytest.mark.slow
def test_what_should_be_exchanged_is_missed():
    faults = [("text", "4,0", "own parts only"), ("layers", "4,5", "without filling")]
    for fault in faults:
        assert differences(fault)[fault] > WRONG
