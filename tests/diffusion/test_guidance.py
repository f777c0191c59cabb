import jax
import jax.numpy as jnp
import numpy as np
import pytest

from skyreels_jax.diffusion.guidance import (
    BatchedClassifierFree,
    ClassifierFree,
    NoGuidance,
    guidance_of,
)


def rows(value: float, batch: int = 2):
    return jnp.full((batch, 4, 3), value)


def latents(value: float, batch: int = 2):
    return jnp.full((batch, 16, 1, 2, 2), value)


@pytest.mark.parametrize("scale", [0.0, 0.5, 5.0])
def test_both_forms_go_from_negative_towards_positive(scale: float):
    expected = latents(2.0 + scale * (3.0 - 2.0))
    one_by_one = guidance_of(scale)
    np.testing.assert_array_equal(one_by_one.combine((latents(3.0), latents(2.0))), expected)
    at_once = guidance_of(scale, batched=True)
    both = jnp.concatenate([latents(3.0), latents(2.0)])
    np.testing.assert_array_equal(at_once.combine((both,)), expected)


def test_contexts_are_one_call_or_two_with_the_positive_first():
    one_by_one = guidance_of(5.0).contexts(rows(1.0), rows(-1.0))
    assert [float(x.mean()) for x in one_by_one] == [1.0, -1.0]
    (at_once,) = guidance_of(5.0, batched=True).contexts(rows(1.0), rows(-1.0))
    assert at_once[:, 0, 0].tolist() == [1.0, 1.0, -1.0, -1.0]


def test_a_scale_of_exactly_one_asks_for_the_positive_only():
    guidance = guidance_of(1.0)
    assert isinstance(guidance, NoGuidance)
    assert len(guidance.contexts(rows(1.0), rows(-1.0))) == 1
    np.testing.assert_array_equal(guidance.combine((latents(3.0),)), latents(3.0))
    # ... and computing both would have given the same.
    whole = ClassifierFree(jnp.float32(1.0)).combine((latents(3.0), latents(2.0)))
    np.testing.assert_array_equal(whole, latents(3.0))


@pytest.mark.parametrize("scale", [0.0, 0.999, 1.001])
def test_every_other_scale_takes_the_negative_into_account(scale: float):
    assert isinstance(guidance_of(scale), ClassifierFree)
    assert isinstance(guidance_of(scale, batched=True), BatchedClassifierFree)


def test_guidance_without_a_negative_is_refused():
    with pytest.raises(ValueError, match="negative"):
        guidance_of(5.0).contexts(rows(1.0), None)


def test_another_scale_compiles_nothing_anew():
    combine = jax.jit(lambda guidance, predictions: guidance.combine(predictions))
    for scale in (2.0, 3.0, 5.0):
        combine(guidance_of(scale), (latents(3.0), latents(2.0)))
    assert combine._cache_size() == 1
