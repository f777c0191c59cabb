"""diffusers' SkyReels-V2 transformer with random weights, and ours with the same weights."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

import jax
import jax.numpy as jnp
import numpy as np
import torch
from diffusers.models import SkyReelsV2Transformer3DModel
from flax import nnx

from skyreels_jax.models.transformer import WanModel
from skyreels_jax.models.transformer_config import TransformerConfig
from skyreels_jax.weights.components.transformer import TRANSFORMER, transformer_rules
from skyreels_jax.weights.engine import load_into
from skyreels_jax.weights.safetensors_file import TensorInfo

TEXT_DIM, IMAGE_DIM = 32, 16


@dataclass(frozen=True)
class Shape:
    """One test size; ``text_len`` is 512 for i2v, which diffusers has hard-coded."""

    heads: int = 2
    head_dim: int = 12
    layers: int = 2
    ffn: int = 32
    frames: int = 3
    height: int = 4
    width: int = 6
    batch: int = 1

    def config(self, kind: str, **overrides) -> TransformerConfig:
        image = kind == "i2v"
        config = TransformerConfig(
            model_type="i2v" if image else "t2v",
            dim=self.heads * self.head_dim,
            ffn_dim=self.ffn,
            num_heads=self.heads,
            num_layers=self.layers,
            in_dim=36 if image else 16,
            text_dim=TEXT_DIM,
            text_len=512 if image else 11,
            image_dim=IMAGE_DIM if image else None,
        )
        return replace(config, **overrides)


@dataclass
class MemorySource:
    """Tensors of a PyTorch module as the weight engine reads files."""

    arrays: Mapping[str, np.ndarray]

    def tensors(self) -> Mapping[str, TensorInfo]:
        return {k: TensorInfo(v.shape, v.dtype, "memory") for k, v in self.arrays.items()}

    def read(self, name: str) -> np.ndarray:
        return self.arrays[name]


def random_parameters(module: torch.nn.Module, seed: int) -> None:
    """A non-trivial value for every parameter: also biases, norms, modulation, positions."""
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in module.named_parameters():
        noise = torch.randn(parameter.shape, generator=generator)
        if parameter.ndim == 1 and "norm" in name and name.endswith("weight"):
            value = 1 + 0.3 * noise
        elif parameter.ndim == 1:
            value = 0.3 * noise
        elif "table" in name or "pos_embed" in name or "fps_embedding" in name:
            value = 0.5 * noise
        else:
            value = noise / parameter[0].numel() ** 0.5
        parameter.data.copy_(value)


def diffusers_model(config: TransformerConfig, seed: int, block: int = 1) -> torch.nn.Module:
    model = SkyReelsV2Transformer3DModel(
        num_attention_heads=config.num_heads,
        attention_head_dim=config.head_dim,
        in_channels=config.in_dim,
        out_channels=config.out_dim,
        text_dim=config.text_dim,
        freq_dim=config.freq_dim,
        ffn_dim=config.ffn_dim,
        num_layers=config.num_layers,
        eps=config.eps,
        image_dim=config.image_dim,
        added_kv_proj_dim=config.dim if config.image_dim else None,
        rope_max_seq_len=32,
        pos_embed_seq_len=config.pos_embed_seq_len,
        inject_sample_info=config.inject_sample_info,
        num_frame_per_block=block,
    ).eval()
    random_parameters(model, seed)
    return model


def jax_model(
    config: TransformerConfig, oracle: torch.nn.Module, dtype=jnp.float32, **options
) -> WanModel:
    """Ours with the oracle's weights, through the weight engine and its table."""
    model = nnx.eval_shape(
        lambda: WanModel(config, rngs=nnx.Rngs(0), dtype=dtype, param_dtype=dtype, **options)
    )
    source = MemorySource({k: v.float().numpy() for k, v in oracle.state_dict().items()})
    state = load_into(
        model,
        transformer_rules(config),
        source,
        "diffusers",
        dtype=dtype,
        ignored=TRANSFORMER.ignored,
    )
    nnx.update(model, state)
    return model


def inputs(config: TransformerConfig, shape: Shape, seed: int, *, per_frame: bool) -> dict:
    """Arguments of our model's call, as NumPy arrays."""
    rng = np.random.default_rng(seed)
    batch = shape.batch

    def normal(*size: int) -> np.ndarray:
        return rng.standard_normal(size, dtype=np.float32)

    video = (shape.frames, shape.height, shape.width)
    arguments = {
        "x": normal(batch, config.latent_dim, *video),
        "t": rng.integers(0, 1000, (batch, shape.frames) if per_frame else (batch,)),
        "context": normal(batch, config.text_len, config.text_dim),
    }
    # As after a prompt of 5 tokens: the padding is exactly zero, and attended to.
    arguments["context"][:, 5:] = 0
    if config.model_type == "i2v":
        arguments["clip_fea"] = normal(batch, config.image_tokens, IMAGE_DIM)
        arguments["y"] = normal(batch, config.in_dim - config.latent_dim, *video)
    if config.inject_sample_info:
        arguments["fps"] = np.arange(batch) % 2
    return arguments


def run_diffusers(model: torch.nn.Module, arguments: Mapping[str, np.ndarray]) -> np.ndarray:
    """The oracle's output, one video at a time: it mixes up the frame rates of a batch."""
    dtype = model.patch_embedding.weight.dtype
    outputs = []
    for i in range(len(arguments["x"])):
        one = {k: torch.from_numpy(v[i : i + 1]) for k, v in arguments.items()}
        x = torch.cat([one["x"], one["y"]], 1) if "y" in one else one["x"]
        image = one.get("clip_fea")
        if image is not None:
            # Two images come as a batch of two, which the image embedder joins.
            image = image.reshape(-1, 257, image.shape[-1]).to(dtype)
        with torch.no_grad():
            out = model(
                hidden_states=x.to(dtype),
                timestep=one["t"],
                encoder_hidden_states=one["context"].to(dtype),
                encoder_hidden_states_image=image,
                enable_diffusion_forcing=one["t"].ndim == 2,
                fps=arguments["fps"][i : i + 1] if "fps" in one else None,
                return_dict=False,
            )[0]
        outputs.append(out.float().numpy())
    return np.concatenate(outputs)


def run_jax(model: WanModel, arguments: Mapping[str, np.ndarray], **static) -> np.ndarray:
    """Our output, compiled anew."""
    return compiled(**static)(model, arguments)


def compiled(**static) -> Callable[[WanModel, Mapping[str, np.ndarray]], np.ndarray]:
    """Our call, compiled once for all models and arguments of the same shapes."""
    run = nnx.jit(lambda model, kwargs: model(**kwargs, **static))
    return lambda model, arguments: np.asarray(
        run(model, jax.tree.map(jnp.asarray, dict(arguments)))
    )


def relative(ours: np.ndarray, theirs: np.ndarray) -> float:
    """Maximum absolute difference, as a fraction of the oracle's maximum."""
    assert ours.shape == theirs.shape
    return float(np.abs(ours - theirs).max() / np.abs(theirs).max())


def layer_of(stacked: nnx.Module, index: int) -> nnx.Module:
    """One layer of the stacked blocks (or of a part of them) as a module of its own."""
    graph, state = nnx.split(stacked)
    return nnx.merge(graph, jax.tree.map(lambda leaf: leaf[index], state))


def with_change(model: nnx.Module, path: str, change: Callable[[np.ndarray], np.ndarray]):
    """A copy of ``model`` with one parameter, named by its dotted path, replaced."""
    state = nnx.state(model)
    flat = {".".join(map(str, keys)): (keys, leaf) for keys, leaf in nnx.to_flat_state(state)}
    keys, leaf = flat[path]
    copy = nnx.clone(model)
    value = jnp.asarray(change(np.array(leaf[...])), leaf.dtype)
    nnx.update(copy, nnx.from_flat_state([(keys, leaf.replace(value))]))
    return copy


def paths(model: nnx.Module) -> list[str]:
    """Dotted paths of all parameters."""
    return [".".join(map(str, keys)) for keys, _ in nnx.to_flat_state(nnx.state(model))]


def nudge_one(value: np.ndarray) -> np.ndarray:
    """One element, by 0.1."""
    value.flat[value.size // 3] += 0.1
    return value
