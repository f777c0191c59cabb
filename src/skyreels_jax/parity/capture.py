"""The JAX transformer one block after the other, with what every part of it takes and gives.

The parts are those of the model itself, observed from outside. What differs from a real run is the
order of work alone: there the blocks are a scan over stacked parameters.
"""

from collections.abc import Callable, Mapping, Sequence
from functools import cache
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from skyreels_jax.models.block import FrameTokens
from skyreels_jax.models.layers import CrossContext
from skyreels_jax.models.transformer import WanModel, unpatchify
from skyreels_jax.ops.masks import BlockCausal
from skyreels_jax.ops.positions import RopeTable
from skyreels_jax.parity.diagnosis.places import AROUND, HEAD, Layers, Site, block_sites

# Told the name of a place and its values, in order.
Note = Callable[[str, np.ndarray], None]
Records = dict[str, jax.Array]


class Observed:
    """Stands in for a part of a model: calls it, and keeps what goes in and comes out."""

    def __init__(self, part: Callable[..., Any], site: Site, records: Records):
        self._part, self._site, self._records = part, site, records

    def __call__(self, x: jax.Array) -> jax.Array:
        """The part's own answer."""
        if self._site.before is not None:
            self._records[self._site.before] = x
        out = self._part(x)
        if self._site.after is not None:
            self._records[self._site.after] = out
        return out

    def __getattr__(self, name: str) -> Any:
        return getattr(self._part, name)


def observe(model: Any, sites: Sequence[Site]) -> Records:
    """Replace the parts of ``model`` at ``sites``; the records fill as it is called."""
    records: Records = {}
    for site in sites:
        *path, last = site.ours.split(".")
        owner = model
        for name in path:
            owner = getattr(owner, name)
        object.__setattr__(owner, last, Observed(getattr(owner, last), site, records))
    return records


def walk(
    model: WanModel,
    x: jax.Array,
    t: jax.Array,
    context: jax.Array,
    note: Note,
    *,
    clip_fea: jax.Array | None = None,
    y: jax.Array | None = None,
    fps: jax.Array | None = None,
    block_length: int | None = None,
    attention: str | None = None,
    layers: Layers = "all",
) -> None:
    """Call the model and tell ``note`` every place, in order; one block is in memory at a time.

    Arguments are those of a call of the model; tokens are ``[B, L, D]`` in what is noted.
    """
    config = model.config
    image = config.model_type == "i2v"
    graph, parameters = nnx.split(model)
    states, records = _entry(graph)(parameters, x, t, context, clip_fea, y, fps)
    e, e0, text, pictured, tokens, rope = states
    for name in (name for site in AROUND for name in (site.before, site.after) if name):
        if name in records:
            note(name, flat(records[name]))
    note("modulation", np.asarray(records["modulation"], np.float32))
    grid = (x.shape[3] // config.patch_size[1], x.shape[4] // config.patch_size[2])
    mask = None if block_length is None else BlockCausal(grid[0] * grid[1], block_length)
    block_graph, stacked = nnx.split(model.blocks)
    sites = block_sites(image=image) if layers == "all" else ()
    block = _block(block_graph, sites, mask, attention)
    inside = [name for site in sites for name in (site.before, site.after) if name]
    for number in range(config.num_layers):
        of_layer = jax.tree.map(lambda leaf, at=number: leaf[at], stacked)
        tokens, seen = block(of_layer, tokens, e0, text, pictured, rope)
        for name in inside:
            if name in seen:
                note(f"blocks.{number}.{name}", flat(seen[name]))
        note(f"blocks.{number}", flat(tokens))
    velocity, seen = _head(graph, grid)(parameters, tokens, e)
    for name in ("head.norm", "head"):
        note(name, flat(seen[name]))
    note("velocity", np.asarray(velocity, np.float32))


@cache
def _entry(graph: nnx.GraphDef[Any]) -> Callable[..., tuple[Any, Records]]:
    """All that comes before the blocks, compiled once for a model."""

    def entry(parameters: nnx.State, *given: Any) -> tuple[Any, Records]:
        x, t, context, clip_fea, y, fps = given
        model = nnx.merge(graph, parameters)
        present = [site for site in AROUND if hasattr(model, site.ours.split(".")[0])]
        records = observe(model, present)
        e, e0 = model.embed_time(t, fps)
        text = model.text_embedding(context)
        pictured = None if clip_fea is None else model.img_emb(clip_fea)
        tokens, grid = model.embed_patches(x, y)
        records["modulation"] = e0
        return (e, e0, text, pictured, tokens, model.positions(grid, None)), records

    return jax.jit(entry)


@cache
def _block(
    graph: nnx.GraphDef[Any],
    sites: tuple[Site, ...],
    mask: BlockCausal | None,
    attention: str | None,
) -> Callable[..., tuple[FrameTokens, Records]]:
    """One block, compiled once for all of them."""

    def block(of_layer: nnx.State, tokens: FrameTokens, *shared: Any) -> tuple[Any, Records]:
        e0, text, pictured, rope = shared
        one = nnx.merge(graph, of_layer)
        seen = observe(one, sites)
        prepared: CrossContext = one.cross_attn.prepare(text, pictured)
        out = one(tokens, e0, prepared, RopeTable(*rope), mask=mask, implementation=attention)
        return out, seen

    return jax.jit(block)


@cache
def _head(
    graph: nnx.GraphDef[Any], grid: tuple[int, int]
) -> Callable[..., tuple[jax.Array, Records]]:
    """All that comes after the blocks."""

    def head(parameters: nnx.State, tokens: FrameTokens, e: jax.Array) -> tuple[Any, Records]:
        model = nnx.merge(graph, parameters)
        seen = observe(model, HEAD)
        return unpatchify(model.head(tokens, e), grid, model.config.patch_size), seen

    return jax.jit(head)


def forget_programs() -> None:
    """Compile anew from now on: for those who change the code of a running process."""
    for programs in (_entry, _block, _head):
        programs.cache_clear()


def flat(x: jax.Array) -> np.ndarray:
    """Tokens in one row, ``[B, L, D]``; other arrays as they are. float32."""
    array = np.asarray(x.astype(jnp.float32))
    if array.ndim == 4:
        return array.reshape(array.shape[0], -1, array.shape[-1])
    if array.ndim == 5:  # patch embedding: [B, F, rows, columns, D]
        return array.reshape(array.shape[0], -1, array.shape[-1])
    return array


def call_of(given: Mapping[str, Any], latent_channels: int) -> dict[str, Any]:
    """Arguments of :func:`walk` from what diffusers' transformer was given."""
    hidden = np.asarray(given["hidden_states"], np.float32)
    image = given.get("encoder_hidden_states_image")
    fps = given.get("fps")
    return {
        "x": jnp.asarray(hidden[:, :latent_channels]),
        "y": jnp.asarray(hidden[:, latent_channels:]) if image is not None else None,
        "t": jnp.asarray(np.asarray(given["timestep"]).astype(np.int32)),
        "context": jnp.asarray(given["encoder_hidden_states"]),
        "clip_fea": None if image is None else jnp.asarray(image),
        "fps": None if fps is None else jnp.asarray(np.asarray(fps).reshape(-1), jnp.int32),
    }
