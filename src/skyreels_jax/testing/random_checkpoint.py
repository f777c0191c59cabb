"""Small checkpoints with random weights, in both published layouts.

The demo and the tests need complete checkpoint folders, and nobody can download one inside a test.
These have the architecture, the file names, the tensor names and the dtypes of the released ones;
only widths and depths are small. diffusers' layout is written by the weight tables; the original
one is translated from it, and needs PyTorch for its ``.pth`` files.

``python -m skyreels_jax.testing.random_checkpoint KIND LAYOUT FOLDER``
"""

import argparse
import math
import shutil
import tempfile
import zlib
from collections import OrderedDict
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, Literal, get_args

import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.typing import DTypeLike

from skyreels_jax.models.clip_vision import ClipVision, ClipVisionConfig
from skyreels_jax.models.transformer_config import TransformerConfig
from skyreels_jax.models.umt5 import Umt5Config, Umt5Encoder
from skyreels_jax.models.vae import WanVae
from skyreels_jax.models.vae_config import VaeConfig
from skyreels_jax.testing.random_tokenizer import write_tokenizer
from skyreels_jax.weights import diffusers_json
from skyreels_jax.weights.clip_rules import clip_rules
from skyreels_jax.weights.convert import exported, rename
from skyreels_jax.weights.layout import CONFIG, MODEL_INDEX, PATHS, Layout, Part, read_layout
from skyreels_jax.weights.parts import (
    StoredPart,
    stored_image_encoder,
    stored_text_encoder,
    stored_vae,
)
from skyreels_jax.weights.rules import DIALECTS, Dialect, Rule
from skyreels_jax.weights.source import TensorSpec
from skyreels_jax.weights.transformer_folder import (
    abstract_transformer,
    convert_transformer,
    read_config,
)
from skyreels_jax.weights.transformer_json import config_json
from skyreels_jax.weights.transformer_rules import transformer_rules
from skyreels_jax.weights.umt5_rules import UMT5_RULES
from skyreels_jax.weights.vae_rules import vae_rules
from skyreels_jax.weights.writer import TRANSFORMER_STEM, new_folder, write_json, write_tensors

if TYPE_CHECKING:
    import torch

Kind = Literal["i2v", "t2v", "df"]
KINDS: Final[tuple[Kind, ...]] = get_args(Kind)
PIPELINES: Final[Mapping[Kind, str]] = {
    "i2v": "SkyReelsV2ImageToVideoPipeline",
    "t2v": "SkyReelsV2Pipeline",
    "df": "SkyReelsV2DiffusionForcingPipeline",
}

TEXT_DIM: Final = 32
VAE: Final = VaeConfig(base_dim=4, z_dim=16, dim_mult=(1, 2, 4, 4), num_res_blocks=2)
# Two heads of 80: the width of a head is what tells the number of heads in the original layout.
CLIP: Final = ClipVisionConfig(dim=160, ffn_dim=192, num_heads=2, num_layers=3, projection_dim=48)
# Parts of the released CLIP file that video generation never reads.
TEXT_TOWER: Final = {"textual.token_embedding.weight": (64, 32), "textual.norm.weight": (32,)}


def make_checkpoint(
    folder: Path, kind: Kind = "i2v", layout: Dialect = "diffusers", *, seed: int = 0
) -> Path:
    """Write a small random checkpoint; the same arguments give the same weights in both layouts.

    Args:
        folder: to make; it appears complete or not at all.
        kind: image-to-video, text-to-video, or diffusion forcing (with the frame-rate embedding).
        layout: ``original`` or ``diffusers``.
        seed: of the weights.

    Returns:
        ``folder``.

    Raises:
        RequestError: if ``folder`` is there already and holds files.
    """
    with new_folder(folder) as partial:
        if layout == "diffusers":
            _write_diffusers(partial, kind, seed)
        else:
            with tempfile.TemporaryDirectory() as temporary:
                _write_diffusers(Path(temporary), kind, seed)
                _write_original(read_layout(Path(temporary)), partial)
    return folder


def transformer_of(kind: Kind) -> TransformerConfig:
    """The configuration of the transformer of a small checkpoint."""
    return TransformerConfig(
        model_type="i2v" if kind == "i2v" else "t2v",
        dim=32,
        ffn_dim=48,
        num_heads=2,
        num_layers=2,
        in_dim=36 if kind == "i2v" else 16,
        text_dim=TEXT_DIM,
        image_dim=CLIP.dim if kind == "i2v" else None,
        inject_sample_info=kind == "df",
    )


def _write_diffusers(folder: Path, kind: Kind, seed: int) -> None:
    transformer = transformer_of(kind)
    tokens = write_tokenizer(folder / "tokenizer")
    # More rows than tokens, as in the released encoder.
    rows = 64 * math.ceil((tokens + 1) / 64)
    text = Umt5Config(
        vocab_size=rows, dim=TEXT_DIM, head_dim=8, num_heads=4, ffn_dim=48, num_layers=2
    )

    def put(part: str, json: Mapping[str, Any], model: nnx.Module, rules: Sequence[Rule]) -> None:
        (folder / part).mkdir()
        write_json(folder / part / CONFIG, json)
        specs = exported(model, rules, "diffusers")
        stem = "model" if part.endswith("encoder") else TRANSFORMER_STEM["diffusers"]
        values = random_tensors(specs, seed, HALF_PRECISION.get(part, np.float32))
        write_tensors(folder / part, stem, specs, values)

    rules = transformer_rules(transformer)
    json = config_json(transformer, "diffusers")
    put("transformer", json, abstract_transformer(transformer, jnp.float32), rules)
    put("vae", diffusers_json.vae_json(VAE), _abstract(WanVae, VAE), vae_rules(VAE))
    json = diffusers_json.text_encoder_json(text)
    put("text_encoder", json, _abstract(Umt5Encoder, text), UMT5_RULES)
    parts: list[Part] = ["tokenizer", "text_encoder", "vae", "scheduler"]
    if kind == "i2v":
        json = diffusers_json.image_encoder_json(CLIP)
        put("image_encoder", json, _abstract(ClipVision, CLIP), clip_rules(CLIP))
        (folder / "image_processor").mkdir()
        json = diffusers_json.image_processor_json(CLIP)
        write_json(folder / "image_processor" / "preprocessor_config.json", json)
        parts += ("image_encoder", "image_processor")
    (folder / "scheduler").mkdir()
    # What the published converter leaves there.
    json = diffusers_json.scheduler_json(flow_shift=1.0)
    write_json(folder / "scheduler" / "scheduler_config.json", json)
    tower = CLIP if kind == "i2v" else None
    write_json(folder / MODEL_INDEX, diffusers_json.model_index(PIPELINES[kind], parts, tower))


# Of the released files; the small ones hold only such values, so that both layouts have the same.
HALF_PRECISION: Final[Mapping[str, DTypeLike]] = {
    "text_encoder": jnp.bfloat16,
    "image_encoder": np.float16,
}


def _abstract(model: Any, config: Any) -> nnx.Module:
    return nnx.eval_shape(
        lambda: model(config, rngs=nnx.Rngs(0), dtype=jnp.float32, param_dtype=jnp.float32)
    )


def random_tensors(
    specs: Mapping[str, TensorSpec], seed: int, dtype: DTypeLike = np.float32
) -> Iterator[tuple[str, np.ndarray]]:
    """Random values for tensors of diffusers' names, at which nothing vanishes or explodes.

    Matrices and convolutions keep the variance of their input; scales of norms scatter around 1;
    biases, modulations and other vectors around 0.

    Args:
        specs: what to fill.
        seed: with a tensor's name, decides its values.
        dtype: whose values to round to; they are yielded in the dtype of ``specs``.
    """
    for name, spec in specs.items():
        noise = np.random.default_rng([seed, zlib.crc32(name.encode())]).standard_normal(spec.shape)
        is_vector = spec.shape[0] == spec.size
        if is_vector and name.endswith(("weight", "gamma")):
            value = 1 + 0.2 * noise
        elif is_vector or name.endswith("scale_shift_table"):
            value = 0.2 * noise
        else:
            value = noise / math.sqrt(spec.size / spec.shape[0])
        yield name, value.astype(dtype).astype(spec.dtype)


def _write_original(source: Layout, folder: Path) -> None:
    """Rewrite a checkpoint in the diffusers layout into the original one, as Skywork ships it."""
    import torch

    paths = {part: folder / name for part, name in PATHS["original"].items()}
    convert_transformer(folder, source, read_config(source), layout="original")
    torch.save(_original_named(stored_text_encoder(source), torch.bfloat16), paths["text_encoder"])
    torch.save(_original_named(stored_vae(source), torch.float32), paths["vae"])
    shutil.copytree(source.part("tokenizer"), paths["tokenizer"])
    if "image_encoder" in source.parts:
        clip = _original_named(stored_image_encoder(source), torch.float16)
        clip["log_scale"] = torch.tensor(2.0, dtype=torch.float16)
        clip |= {k: torch.ones(v, dtype=torch.float16) for k, v in TEXT_TOWER.items()}
        torch.save(clip, paths["image_encoder"])


def _original_named(stored: StoredPart, dtype: "torch.dtype") -> "OrderedDict[str, torch.Tensor]":
    import torch

    tensors = rename(stored.rules, stored.source, stored.dialect, "original")
    return OrderedDict((name, torch.tensor(value).to(dtype)) for name, value in tensors)


def main() -> None:
    """Run the command line of this module."""
    parser = argparse.ArgumentParser(description="Write a small checkpoint with random weights.")
    parser.add_argument("kind", choices=KINDS)
    parser.add_argument("layout", choices=DIALECTS)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    make_checkpoint(arguments.folder, arguments.kind, arguments.layout, seed=arguments.seed)


if __name__ == "__main__":
    main()
