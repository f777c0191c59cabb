"""The activations of the JAX transformer, which is called one block after the other.

The modules are those of the model itself, recorded from outside. What differs from a real run is
the order of work alone: there the blocks are a scan over stacked parameters.
"""

from collections.abc import Callable, Sequence
from functools import cache
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from skyreels_jax.models.transformer import WanModel, unpatchify
from skyreels_jax.models.transformer_attention import CrossContext
from skyreels_jax.models.transformer_layers import FrameTokens
from skyreels_jax.ops.masks import BlockCausal
from skyreels_jax.ops.positions import RopeTable
from skyreels_jax.parity.activation_sites import (
    ENTRY_SITES,
    HEAD_SITES,
    ActivationSite,
    Layers,
    block_sites,
    recorded_names,
)
from skyreels_jax.parity.recording import Record
from skyreels_jax.torch_side.hooks import TransformerCall

_Activations = dict[str, jax.Array]


class ModelInputs(NamedTuple):
    """Arguments of a call of the transformer, under the names that it has for them."""

    x: jax.Array
    t: jax.Array
    context: jax.Array
    clip_fea: jax.Array | None
    y: jax.Array | None
    fps: jax.Array | None


class _RecordingModule:
    """Stands in for a module of a model: calls it, and keeps its input and output."""

    def __init__(
        self,
        module: Callable[[jax.Array], jax.Array],
        site: ActivationSite,
        activations: _Activations,
    ):
        self._module, self._site, self._activations = module, site, activations

    def __call__(self, x: jax.Array) -> jax.Array:
        out = self._module(x)
        for name, value in ((self._site.input_name, x), (self._site.output_name, out)):
            if name is not None:
                self._activations[name] = value
        return out

    def __getattr__(self, name: str) -> Any:
        return getattr(self._module, name)


def _attach(model: nnx.Module, sites: Sequence[ActivationSite]) -> _Activations:
    """Replace the modules of ``model`` at ``sites``; the result fills as the model is called."""
    activations: _Activations = {}
    for site in sites:
        *path, last = site.module.split(".")
        owner = model
        for name in path:
            owner = getattr(owner, name)
        module = _RecordingModule(getattr(owner, last), site, activations)
        object.__setattr__(owner, last, module)
    return activations


def capture_activations(
    model: WanModel,
    inputs: ModelInputs,
    record: Record,
    *,
    block_length: int | None = None,
    attention: str | None = None,
    layers: Layers = "all",
) -> None:
    """Call the model and record every activation, in order; one block is in memory at a time.

    Args:
        model: the transformer.
        inputs: of its call.
        record: takes float32 values; tokens are ``[B, L, D]``.
        block_length: frames of a block of a block-causal mask; None is no mask.
        attention: which attention runs, as of :func:`~skyreels_jax.ops.attention.attention`.
        layers: what is recorded.
    """
    config = model.config
    graph, parameters = nnx.split(model)
    states, seen = _entry(graph)(parameters, inputs)
    e, e0, text, pictured, tokens, rope = states
    for name in recorded_names(ENTRY_SITES):
        if name in seen:
            record(name, _as_tokens(seen[name]))
    record("modulation", np.asarray(seen["modulation"], np.float32))
    _, _, _, height, width = inputs.x.shape
    grid = (height // config.patch_size[1], width // config.patch_size[2])
    mask = None if block_length is None else BlockCausal(grid[0] * grid[1], block_length)
    block_graph, stacked = nnx.split(model.blocks)
    sites = block_sites(image=config.model_type == "i2v") if layers == "all" else ()
    block = _block(block_graph, sites, mask, attention)
    for number in range(config.num_layers):
        block_state = jax.tree.map(lambda leaf, at=number: leaf[at], stacked)
        tokens, seen = block(block_state, tokens, e0, text, pictured, rope)
        for name in recorded_names(sites):
            if name in seen:
                record(f"blocks.{number}.{name}", _as_tokens(seen[name]))
        record(f"blocks.{number}", _as_tokens(tokens))
    velocity, seen = _head(graph, grid)(parameters, tokens, e)
    for name in recorded_names(HEAD_SITES):
        record(name, _as_tokens(seen[name]))
    record("velocity", np.asarray(velocity, np.float32))


@cache
def _entry(graph: nnx.GraphDef[WanModel]) -> Callable[..., tuple[Any, _Activations]]:
    """Compile all that comes before the blocks, once for a model."""

    def entry(parameters: nnx.State, inputs: ModelInputs) -> tuple[Any, _Activations]:
        model = nnx.merge(graph, parameters)
        present = [site for site in ENTRY_SITES if hasattr(model, site.module.split(".")[0])]
        activations = _attach(model, present)
        e, e0 = model.embed_time(inputs.t, inputs.fps)
        text = model.text_embedding(inputs.context)
        pictured = None if inputs.clip_fea is None else model.img_emb(inputs.clip_fea)
        tokens, grid = model.embed_patches(inputs.x, inputs.y)
        activations["modulation"] = e0
        return (e, e0, text, pictured, tokens, model.positions(grid)), activations

    return jax.jit(entry)


@cache
def _block(
    graph: nnx.GraphDef[Any],
    sites: tuple[ActivationSite, ...],
    mask: BlockCausal | None,
    attention: str | None,
) -> Callable[..., tuple[FrameTokens, _Activations]]:
    """Compile one block, once for all of them."""

    def block(state: nnx.State, tokens: FrameTokens, *shared: Any) -> tuple[Any, _Activations]:
        e0, text, pictured, rope = shared
        one = nnx.merge(graph, state)
        activations = _attach(one, sites)
        prepared: CrossContext = one.cross_attn.prepare(text, pictured)
        out = one(tokens, e0, prepared, RopeTable(*rope), mask=mask, implementation=attention)
        return out.tokens, activations

    return jax.jit(block)


@cache
def _head(
    graph: nnx.GraphDef[WanModel], grid: tuple[int, int]
) -> Callable[..., tuple[jax.Array, _Activations]]:
    """Compile all that comes after the blocks."""

    def head(
        parameters: nnx.State, tokens: FrameTokens, e: jax.Array
    ) -> tuple[jax.Array, _Activations]:
        model = nnx.merge(graph, parameters)
        activations = _attach(model, HEAD_SITES)
        return unpatchify(model.head(tokens, e), grid, model.config.patch_size), activations

    return jax.jit(head)


def _as_tokens(x: jax.Array) -> np.ndarray:
    """Return float32 tokens ``[B, L, D]`` of ``[B, F, P, D]`` or ``[B, F, rows, columns, D]``."""
    array = np.asarray(x.astype(jnp.float32))
    return array.reshape(array.shape[0], -1, array.shape[-1]) if array.ndim in (4, 5) else array


def model_inputs(call: TransformerCall, latent_channels: int) -> ModelInputs:
    """Return the inputs of our transformer for what diffusers' transformer was given.

    Args:
        call: arguments of diffusers' transformer, as of
            :func:`~skyreels_jax.parity.recording.load_call`.
        latent_channels: channels of ``hidden_states`` that are latents; the rest is the condition.
    """
    hidden = np.asarray(call["hidden_states"], np.float32)
    image, fps = call.get("encoder_hidden_states_image"), call.get("fps")
    return ModelInputs(
        x=jnp.asarray(hidden[:, :latent_channels]),
        t=jnp.asarray(np.asarray(call["timestep"]).astype(np.int32)),
        context=jnp.asarray(call["encoder_hidden_states"]),
        clip_fea=None if image is None else jnp.asarray(image),
        y=None if image is None else jnp.asarray(hidden[:, latent_channels:]),
        fps=None if fps is None else jnp.asarray(np.asarray(fps).reshape(-1), jnp.int32),
    )
