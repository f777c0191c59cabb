"""The VAE against diffusers', and what it promises about chunks, length, compilation and memory."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from encoder_oracles import relative, tensors_of
from flax import nnx
from vae_oracle import TINY, decoded, encoded, latents, oracle, ours, pair, pixels, psnr

from skyreels_jax.errors import RequestError
from skyreels_jax.models import vae as module
from skyreels_jax.models.vae import WanVae, decode_chunks, decode_to_pixels, encode_pixels
from skyreels_jax.models.vae_layers import WAN_VAE, VaeConfig
from skyreels_jax.weights.components.vae import vae_rules
from skyreels_jax.weights.engine import export
from skyreels_jax.weights.plan import FORMATS, Format

# Measured 8e-8 to 4e-6, most of it where few channels make a norm ill-conditioned: there PyTorch is
# as far from float64 as we are.
TOL = 1e-5
WRONG = 1e-2  # the least that a mistake changes; measured 0.1 and more

CONFIGS = {
    "tiny": TINY,
    "released multipliers": VaeConfig(
        base_dim=3, z_dim=16, dim_mult=(1, 2, 4, 4), num_res_blocks=2
    ),
    "one width": VaeConfig(base_dim=12, z_dim=16, dim_mult=(1, 1, 1, 1), num_res_blocks=1),
    "time first": dataclasses.replace(TINY, temporal_downsample=(True, True, False)),
    "other latents": VaeConfig(
        base_dim=8,
        z_dim=3,
        dim_mult=(1, 1, 2, 3),
        num_res_blocks=1,
        temporal_downsample=(True, False, True),
        latents_mean=(0.5, -1.0, 0.25),
        latents_std=(2.0, 0.5, 3.0),
    ),
}


def some_latents(config: VaeConfig, frames: int) -> np.ndarray:
    return latents(frames)[:, : config.z_dim]


# The smallest, whose programs other tests here run too; the others in `make test-all`. Videos of
# whole pipelines compare another shape with diffusers in every run.
IN_EVERY_RUN = ("tiny",)


@pytest.mark.parametrize(
    "case",
    [
        pytest.param(name, marks=[] if name in IN_EVERY_RUN else [pytest.mark.slow])
        for name in CONFIGS
    ],
)
def test_equals_diffusers_at_every_length(case: str):
    """3 x 5 latents: neither side even."""
    config = CONFIGS[case]
    theirs, vae = pair(config)
    for frames in (1, 5, 9, 17, 33):
        video = pixels(frames)
        assert relative(encode_pixels(vae, video), encoded(theirs, config, video)) <= TOL
        z = some_latents(config, (frames + 3) // 4)
        result, expected = decode_to_pixels(vae, z), decoded(theirs, config, z)
        assert result.shape == (1, 3, frames, 24, 40)
        assert relative(result, expected) <= TOL
        assert np.mean(np.abs(expected) < 1) > 0.5  # or the clamp would hide mistakes


@pytest.fixture(scope="module")
def both():
    return pair(TINY)


@pytest.fixture(scope="module")
def vae(both) -> WanVae:
    return both[1]


def test_statistics_used_the_other_way_round_are_caught(both):
    theirs, vae = both
    mean, std = TINY.latents_mean, TINY.latents_std
    right = encode_pixels(vae, pixels(1))
    swapped = right * np.reshape(std, (1, 16, 1, 1, 1)) + np.reshape(mean, (1, 16, 1, 1, 1))
    assert relative(swapped, encoded(theirs, TINY, pixels(1))) > WRONG
    raw = theirs.encode(torch.from_numpy(pixels(1))).latent_dist
    assert relative(right, raw.mode().numpy()) > WRONG
    assert relative(right, raw.logvar.numpy()) > WRONG


def test_chunks_that_forget_the_past_are_caught(both):
    theirs, vae = both
    z = latents(3)
    one_by_one = np.concatenate(
        [decode_to_pixels(vae, z[:, :, i : i + 1]) for i in range(3)], axis=2
    )
    expected = decoded(theirs, TINY, z)
    assert relative(one_by_one[:, :, 1:], expected[:, :, 4::4]) > WRONG
    np.testing.assert_array_equal(one_by_one[:, :, :1], decode_to_pixels(vae, z)[:, :, :1])


def test_streaming_is_bit_equal_to_one_shot_and_comes_in_order(vae: WanVae):
    chunks = list(decode_chunks(vae, latents(4)))
    assert [chunk.shape[2] for chunk in chunks] == [1, 4, 4, 4]
    np.testing.assert_array_equal(np.concatenate(chunks, axis=2), decode_to_pixels(vae, latents(4)))


def test_streaming_computes_no_further_than_asked(vae: WanVae):
    class Counted:
        """Latents that know which frames were taken."""

        shape = latents(4).shape

        def __init__(self):
            self.taken = []

        def __getitem__(self, key):
            self.taken.append(key[2].start)
            return latents(4)[key]

    counted = Counted()
    stream = module._stream(
        module._decode_step,
        vae,
        (counted[:, :, i : i + 1] for i in range(4)),
        module.WHOLE,
        units=(8, 1),
    )
    next(stream)
    next(stream)
    assert counted.taken == [0, 1]


def test_a_prefix_is_bit_equal_to_the_prefix_of_the_whole(vae: WanVae):
    z, video = latents(4), pixels(13)
    whole, other = decode_to_pixels(vae, z), z.copy()
    np.testing.assert_array_equal(decode_to_pixels(vae, z[:, :, :2]), whole[:, :, :5])
    np.testing.assert_array_equal(
        encode_pixels(vae, video[:, :, :5]), encode_pixels(vae, video)[:, :, :2]
    )
    other[:, :, 1] += 1
    assert (
        relative(decode_to_pixels(vae, other)[:, :, 9:], whole[:, :, 9:]) > WRONG
    )  # the past is seen


def test_what_is_kept_between_chunks_does_not_grow(vae: WanVae):
    graph, parameters = nnx.split(vae)
    sizes, cache = [], None
    for _ in range(4):
        _, cache = module._decode_step(graph, parameters, latents(1), cache)
        sizes.append(sum(leaf.nbytes for leaf in jax.tree.leaves(cache)))
    assert len(set(sizes)) == 1
    assert sizes[0] > 0


def test_two_traces_serve_videos_of_every_length(vae: WanVae, monkeypatch: pytest.MonkeyPatch):
    """The first chunk and the rest; the second and the steady ones have one trace between them."""
    traces: list[tuple[str, bool]] = []

    def light(side: str, frames):
        def call(self, x, cache):
            traces.append((side, cache is None))
            return frames(x, cache), jnp.zeros(())

        return call

    def enlarged(x, cache):
        return jnp.zeros((1, 1 if cache is None else 4, 8 * x.shape[2], 8 * x.shape[3], 3))

    def reduced(x, cache):
        return jnp.zeros((1, 1, x.shape[2] // 8, x.shape[3] // 8, 32))

    monkeypatch.setattr(module.Decoder, "__call__", light("decode", enlarged))
    monkeypatch.setattr(module.Encoder, "__call__", light("encode", reduced))
    # Another mean makes another graph: what other tests compiled does not serve it.
    fresh = ours(dataclasses.replace(TINY, latents_mean=(0.0,) * 16), tensors_of(oracle(TINY)))
    for frames in (3, 1, 2, 5, 3):
        decode_to_pixels(fresh, latents(frames))
        encode_pixels(fresh, pixels(4 * frames - 3))
    assert sorted(traces) == [(s, first) for s in ("decode", "encode") for first in (False, True)]
    decode_to_pixels(fresh, latents(2, height=4))
    assert len(traces) == 6


# What JAX says of each program that it compiles.
COMPILED = "/jax/core/compile/backend_compile_duration"


def test_two_programs_are_compiled_whatever_the_length():
    """Nothing else is compiled either: between chunks there is no arithmetic on the device."""
    seen: list[str] = []

    def listen(event: str, seconds: float, **details: object) -> None:
        seen.append(event)

    # Another standard deviation makes another graph: what other tests compiled does not serve it.
    config = dataclasses.replace(TINY, latents_std=(1.5,) * 16)
    fresh = ours(config, tensors_of(oracle(TINY)))
    counts = {}
    jax.monitoring.register_event_duration_secs_listener(listen)
    try:
        for case in ((2, 3), (3, 3), (10, 3), (2, 4)):
            seen.clear()
            frames, height = case
            decode_to_pixels(fresh, latents(frames, height=height))
            counts[case] = seen.count(COMPILED)
    finally:
        jax.monitoring.unregister_event_duration_listener(listen)
    assert counts == {(2, 3): 2, (3, 3): 0, (10, 3): 0, (2, 4): 2}


def test_memory_of_the_steady_chunk_does_not_depend_on_the_length(
    vae: WanVae, monkeypatch: pytest.MonkeyPatch
):
    """By the compiler's own count: arguments, results and what it takes between them."""
    step, calls = module._decode_step, []

    def recorded(graph, *arguments):
        calls.append((graph, *jax.eval_shape(lambda *same: same, *arguments)))
        return step(graph, *arguments)

    def taken(program, *arguments) -> int:
        memory = program.lower(*arguments).compile().memory_analysis()
        return (
            memory.argument_size_in_bytes
            + memory.output_size_in_bytes
            - memory.alias_size_in_bytes
            + memory.temp_size_in_bytes
        )

    monkeypatch.setattr(module, "_decode_step", recorded)
    sizes = {}
    for frames in (3, 10):
        decode_to_pixels(vae, latents(frames))
        sizes[frames] = taken(step, *calls[-1])
    assert len(calls) == 13
    assert sizes[10] == sizes[3]

    # A program that holds the frames of two chunks takes those of one more.
    graph, parameters, z, cache = calls[-1]

    def two(parameters, z, cache):
        frames, cache = step(graph, parameters, z, cache)
        return (frames, *step(graph, parameters, z, cache))

    more = taken(jax.jit(two, donate_argnums=2), parameters, z, cache) - sizes[3]
    assert more >= 4 * 3 * 24 * 40 * 4  # measured 1.3 times that


def test_a_batch_is_its_videos(vae: WanVae):
    z = latents(1, batch=2)
    apart = np.concatenate([decode_to_pixels(vae, z[:1]), decode_to_pixels(vae, z[1:])])
    assert relative(decode_to_pixels(vae, z), apart) <= TOL  # measured 0
    assert relative(apart[0], apart[1]) > WRONG


def test_bfloat16_costs_little():
    tensors = tensors_of(oracle(TINY))
    vae, half = ours(TINY, tensors), ours(TINY, tensors, "bfloat16")
    quality = psnr(decode_to_pixels(half, latents(1)), decode_to_pixels(vae, latents(1)))
    assert 30 < quality < 80  # measured 60


@pytest.mark.parametrize("frames", [0, 2, 4, 6])
def test_lengths_that_are_not_4k_plus_1_are_refused(vae: WanVae, frames: int):
    nearest = {0: "1", 2: "1 and 5", 4: "1 and 5", 6: "5 and 9"}[frames]
    with pytest.raises(RequestError, match=f"nearest are {nearest}$"):
        encode_pixels(vae, np.zeros((1, 3, frames, 24, 40), np.float32))


def test_other_shapes_are_refused(vae: WanVae):
    with pytest.raises(RequestError, match="multiples of 8"):
        encode_pixels(vae, np.zeros((1, 3, 1, 24, 44), np.float32))
    with pytest.raises(RequestError, match="4 channels"):
        decode_to_pixels(vae, np.zeros((1, 4, 1, 3, 5), np.float32))


@pytest.mark.parametrize("dialect", FORMATS)
def test_weights_survive_a_round_trip(dialect: Format):
    tensors = tensors_of(oracle(TINY))
    written = dict(export(ours(TINY, tensors), vae_rules(TINY), dialect))
    assert ("decoder.head.2.weight" in written) == (dialect == "original")
    back = dict(export(ours(TINY, written, dialect=dialect), vae_rules(TINY), "diffusers"))
    assert back.keys() == tensors.keys()
    for name, value in tensors.items():
        np.testing.assert_array_equal(back[name], value)


def test_the_released_vae_has_its_published_size_and_shapes():
    graph, parameters = nnx.split(nnx.eval_shape(lambda: WanVae(WAN_VAE, rngs=nnx.Rngs(0))))
    assert sum(leaf.size for leaf in jax.tree.leaves(parameters)) == 126_892_531

    def three_chunks(parameters: nnx.State, z: jax.Array):
        vae, cache, chunks = nnx.merge(graph, parameters), None, []
        for _ in range(3):
            frames, cache = vae.decode_chunk(z, cache)
            chunks.append(frames)
        return chunks

    z = jax.ShapeDtypeStruct((1, 16, 1, 34, 60), jnp.float32)
    shapes = [chunk.shape for chunk in jax.eval_shape(three_chunks, parameters, z)]
    assert shapes == [(1, 3, 1, 272, 480), (1, 3, 4, 272, 480), (1, 3, 4, 272, 480)]
