import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from skyreels_jax.ops.attention import attention
from skyreels_jax.ops.kernels.chunked import ScoreTiling, chunked_attention
from skyreels_jax.ops.kernels.contract import by_query_block
from skyreels_jax.ops.masks import BlockCausal, CleanAndNoisy


def drawn(picture: str) -> np.ndarray:
    """``x`` where a query (row) may see a key (column)."""
    return np.array([[mark == "x" for mark in row] for row in picture.split()])


# Five frames of two tokens in blocks of two frames: the last block is short.
FIVE_FRAMES = drawn("""
    xxxx......
    xxxx......
    xxxx......
    xxxx......
    xxxxxxxx..
    xxxxxxxx..
    xxxxxxxx..
    xxxxxxxx..
    xxxxxxxxxx
    xxxxxxxxxx
""")


def test_a_token_sees_its_own_block_and_all_earlier_ones():
    np.testing.assert_array_equal(BlockCausal(2, 2).as_array(10, 10), FIVE_FRAMES)


def test_blocks_of_one_token_are_causal_attention():
    np.testing.assert_array_equal(BlockCausal(1, 1).as_array(7, 7), np.tri(7, dtype=bool))


def test_a_block_that_holds_all_frames_hides_nothing():
    assert BlockCausal(2, 5).as_array(10, 10).all()


def test_the_rule_is_the_one_over_frames():
    frame = np.arange(30) // 3
    expected = (frame[:, None] // 4) >= (frame[None, :] // 4)
    np.testing.assert_array_equal(BlockCausal(3, 4).as_array(30, 30), expected)
    assert (BlockCausal(4, 3).as_array(30, 30) == expected).all()  # the same block of 12 tokens
    assert (BlockCausal(3, 3).as_array(30, 30) != expected).any()


@pytest.mark.parametrize(("rows", "columns"), [((0, 10), (0, 10)), ((3, 6), (2, 9))])
def test_a_tile_follows_from_its_indices(rows: tuple[int, int], columns: tuple[int, int]):
    tile = jax.jit(BlockCausal(2, 2).allowed)(jnp.arange(*rows), jnp.arange(*columns))
    np.testing.assert_array_equal(tile, FIVE_FRAMES[slice(*rows), slice(*columns)])


def test_what_is_seen_is_a_prefix():
    mask = BlockCausal(2, 2)
    assert [mask.visible_keys(query, 10) for query in range(10)] == FIVE_FRAMES.sum(1).tolist()


@pytest.mark.parametrize("sizes", [(0, 1), (1, 0), (-1, 2)])
def test_a_block_of_nothing_is_refused(sizes: tuple[int, int]):
    with pytest.raises(ValueError, match="at least one"):
        BlockCausal(*sizes)


def test_a_mask_is_a_value():
    assert BlockCausal(2, 3) == BlockCausal(2, 3)
    assert len({BlockCausal(2, 3), BlockCausal(2, 3), BlockCausal(3, 2)}) == 2
    with pytest.raises(dataclasses.FrozenInstanceError):
        BlockCausal(2, 3).frames_per_block = 1  # pyright: ignore[reportAttributeAccessIssue]


# Three frames of one token in blocks of two and one: clean ones, then noisy ones.
FORCED = drawn("""
    xx....
    xx....
    xxx...
    ...xx.
    ...xx.
    xx...x
""")


def test_teacher_forcing_shows_clean_frames_of_earlier_blocks_and_the_noisy_ones_own():
    mask = CleanAndNoisy(1, (2, 1))
    np.testing.assert_array_equal(mask.as_array(6, 6), FORCED)
    assert mask.as_array(6, 6)[5, 2] != mask.as_array(6, 6)[2, 2]  # its own clean frame is hidden
    of_three = np.kron(FORCED, np.ones((3, 3), bool))
    np.testing.assert_array_equal(CleanAndNoisy(3, (2, 1)).as_array(18, 18), of_three)


@pytest.mark.parametrize(("rows", "columns"), [((0, 18), (0, 18)), ((7, 13), (2, 11))])
def test_a_tile_of_teacher_forcing_follows_from_its_indices(rows, columns):
    mask = CleanAndNoisy(3, (2, 1))
    tile = jax.jit(mask.allowed)(jnp.arange(*rows), jnp.arange(*columns))
    whole = mask.as_array(18, 18)
    np.testing.assert_array_equal(tile, whole[slice(*rows), slice(*columns)])
    assert bool(mask.any_allowed(jnp.arange(15, 18), jnp.arange(0, 3)))
    assert not bool(mask.any_allowed(jnp.arange(15, 18), jnp.arange(6, 9)))
    with pytest.raises(ValueError, match="at least one frame"):
        CleanAndNoisy(3, (2, 0))


def test_every_path_on_a_cpu_follows_teacher_forcing():
    mask, rng = CleanAndNoisy(3, (2, 1)), np.random.default_rng(0)
    query, key, value = (
        jnp.asarray(rng.standard_normal((1, 18, 2, 4)), jnp.float32) for _ in range(3)
    )
    right = attention(query, key, value, mask=mask, implementation="xla")
    # Tiles that begin within a block, and one that no query of a tile sees.
    tiles = ScoreTiling(queries=4, keys=5)
    tiled = chunked_attention(query, key, value, mask=mask, scale=0.5, tiling=tiles)

    def unmasked(query, key, value):
        return attention(query, key, value, implementation="xla")

    by_block = by_query_block(unmasked, query, key, value, mask=mask)
    for found in (tiled, by_block):
        assert float(jnp.abs(found - right).max()) < 1e-5  # measured 3e-7
    causal = attention(query, key, value, mask=BlockCausal(3, 2), implementation="xla")
    assert float(jnp.abs(causal - right).max()) > 0.01
