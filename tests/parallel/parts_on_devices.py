"""VAE and encoders on virtual devices, each against one; run by :mod:`tests.parallel.on_devices`.

Of its command line, ``MESH`` is here ``DEVICES,ROWS``: rows of latents.
"""

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh

from skyreels_jax.components.encoders import encode_here
from skyreels_jax.models.clip_vision import ClipVision, ClipVisionConfig
from skyreels_jax.models.transformer_config import Numerics
from skyreels_jax.models.umt5 import Umt5Config, Umt5Encoder
from skyreels_jax.models.vae import WanVae, decode_pieces, encode_pixels
from skyreels_jax.models.vae_layers import (
    AttentionBlock,
    Downsample,
    Resample,
    Residual,
    ResidualBlock,
    Upsample,
    VaeConfig,
)
from skyreels_jax.models.vae_runs import ON_ONE_DEVICE, run_layers
from skyreels_jax.parallel import vae as mesh_vae
from skyreels_jax.parallel.encoders import LINE, MeshEncoder
from skyreels_jax.parallel.vae import MeshFrames

TINY = VaeConfig(base_dim=4, z_dim=16, dim_mult=(1, 2, 2, 2), num_res_blocks=1)
UMT5 = Umt5Config(vocab_size=64, dim=16, head_dim=4, num_heads=6, ffn_dim=32, num_layers=2)
CLIP = ClipVisionConfig(dim=16, ffn_dim=32, num_heads=2, num_layers=3, image_size=28)
COLUMNS = 3
PARTS = ("layers", "down", "decode", "encode", "text", "image")


def filled(model: nnx.Module) -> nnx.Module:
    """With random numbers in norms and biases too, so that nothing passes by being zero."""
    rng = np.random.default_rng(0)
    leaves = jax.tree.leaves(nnx.state(model), is_leaf=lambda leaf: isinstance(leaf, nnx.Variable))
    for leaf in leaves:
        leaf.set_value(leaf[...] + jnp.asarray(0.1 * rng.standard_normal(leaf.shape), leaf.dtype))
    return model


def furthest(found: np.ndarray, expected: np.ndarray) -> float:
    """The largest difference, of the largest value."""
    return float(np.abs(found - expected).max() / np.abs(expected).max())


def of_vae(case: str, rows: int, devices) -> np.ndarray:
    """What a direction makes of a frame and what follows it."""
    rng, vae = np.random.default_rng(1), filled(WanVae(TINY, rngs=nnx.Rngs(0)))
    if case == "decode":
        latents = rng.standard_normal((1, 16, 2, rows, COLUMNS)).astype(np.float32)
        return np.concatenate(list(decode_pieces(vae, [latents], devices=devices)), axis=2)
    pixels = rng.uniform(-1, 1, (1, 3, 5, 8 * rows, 8 * COLUMNS)).astype(np.float32)
    return encode_pixels(vae, pixels, devices=devices)


def layers_step(graph, parameters, chunk, cache):
    """A few layers as a step of the VAE."""
    layers = nnx.merge(graph, parameters)
    out, cache = run_layers(layers, jnp.moveaxis(chunk, 1, -1), cache)
    return jnp.moveaxis(out, -1, 1), cache


def of_layers(case: str, rows: int, devices) -> np.ndarray:
    """One layer of each kind, on two chunks."""
    kinds = {"numerics": Numerics(np.float32, np.float32), "rngs": nnx.Rngs(0)}
    up = [
        ResidualBlock(Residual(4, 6), **kinds),
        AttentionBlock(6, **kinds),
        Upsample(Resample(6, 4, temporal=True), **kinds),
    ]
    layers, unit = (up, 8) if case == "layers" else ([Downsample(Resample(4, 4, True), **kinds)], 4)
    graph, parameters = nnx.split(filled(nnx.List(layers)))
    rng, cache, results = np.random.default_rng(1), None, []
    for frames in (1, 2):
        chunk = rng.standard_normal((1, 4, frames, rows * 8 // unit, COLUMNS + 1))
        out, cache = devices.run(
            layers_step, graph, parameters, chunk.astype(np.float32), cache, unit
        )
        results.append(np.asarray(out))
    return np.concatenate(results, axis=2)


def of_encoder(case: str, mesh: Mesh) -> tuple[np.ndarray, np.ndarray, float]:
    """What the mesh and one device make, and the largest share of a matrix that a device has."""
    rng = np.random.default_rng(1)
    kinds = {"dtype": jnp.float32, "param_dtype": jnp.float32}
    if case == "text":
        model = filled(Umt5Encoder(UMT5, rngs=nnx.Rngs(0), **kinds))
        mask = np.arange(9)[None] < 7
        inputs = (jnp.asarray(rng.integers(0, 64, (1, 9)), jnp.int32), jnp.asarray(mask))
    else:
        model = filled(ClipVision(CLIP, rngs=nnx.Rngs(0), **kinds))
        inputs = (jnp.asarray(rng.standard_normal((1, 3, 28, 28)), jnp.float32),)
    graph, state = nnx.split(model)
    expected = np.asarray(encode_here(graph, state, *inputs))
    encoder, shares = MeshEncoder(mesh), []

    def placed(path, variable):
        name, value = ".".join(map(str, path)), np.asarray(variable.get_value())
        leaf = encoder.placement(name, value)
        if name.startswith(("blocks.", "token_")) and (value.ndim == 3 or "token" in name):
            shares.append(leaf.addressable_shards[0].data.nbytes / leaf.nbytes)
        return path, variable.replace(leaf)

    state = nnx.from_flat_state([placed(*item) for item in nnx.to_flat_state(state)])
    return np.asarray(encoder.apply(graph, state, *inputs)), expected, max(shares)


def fault(name: str, devices: int) -> None:
    """Break something that the result should depend on."""
    jax.clear_caches()  # The same may have been traced without the fault.
    mesh_vae._program.cache_clear()
    if name == "without neighbours":
        mesh_vae._Slabs.with_neighbours = mesh_vae._Alone.with_neighbours
    if name == "without filling":
        mesh_vae._Slabs._without_filling = lambda self, x: x
    if name == "own parts only":
        jax.lax.all_gather = lambda x, *_, axis, **__: jnp.concatenate([x] * devices, axis)


def answer(case: str, where: str, broken: str) -> list[str | float | None]:
    """What is printed of a case: how far it is from one device, and the share of a matrix."""
    devices, rows = map(int, where.split(","))
    mesh, share = Mesh(np.array(jax.devices()[:devices]), (LINE,)), None
    if broken != "-":
        fault(broken, devices)
    if case in ("text", "image"):
        found, expected, share = of_encoder(case, mesh)
    else:
        run = of_vae if case in ("decode", "encode") else of_layers
        found, expected = (run(case, rows, on) for on in (MeshFrames(mesh), ON_ONE_DEVICE))
    return [case, where, broken, furthest(found, expected), share]
