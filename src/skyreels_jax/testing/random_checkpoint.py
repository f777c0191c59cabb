"""Small checkpoints with random weights, in both published formats.

The demo and the tests need complete checkpoint folders, and nobody can download one inside a test.
These have the architecture, the file names, the tensor names and the dtypes of the released ones;
only widths and depths are small. diffusers' layout is written by the weight tables; the original
one is translated from it, and needs PyTorch for its ``.pth`` files.

``python -m skyreels_jax.testing.random_checkpoint KIND FORMAT FOLDER``
"""

import argparse
import math
import shutil
import string
import tempfile
import zlib
from collections import OrderedDict
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, Literal, get_args

import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike

from skyreels_jax.models.clip_vision import ClipVisionConfig
from skyreels_jax.models.transformer_config import TransformerConfig
from skyreels_jax.models.umt5 import Umt5Config
from skyreels_jax.models.vae_layers import VaeConfig
from skyreels_jax.presets import PIPELINE_OF_TASK
from skyreels_jax.prompts import write_unigram
from skyreels_jax.weights.components.clip import CLIP, image_processor_json, stored_image_encoder
from skyreels_jax.weights.components.stored import ComponentSpec, StoredComponent
from skyreels_jax.weights.components.transformer import TRANSFORMER, stored_transformer
from skyreels_jax.weights.components.umt5 import UMT5, stored_text_encoder
from skyreels_jax.weights.components.vae import VAE, stored_vae
from skyreels_jax.weights.engine import TensorStream, export
from skyreels_jax.weights.layout import PATHS, ComponentName, Layout, read_layout
from skyreels_jax.weights.pipeline_folder import write_pipeline_files
from skyreels_jax.weights.plan import FORMATS, Format
from skyreels_jax.weights.safetensors_file import TensorSpec
from skyreels_jax.weights.writer import new_folder, write_config

if TYPE_CHECKING:
    import torch

Kind = Literal["i2v", "t2v", "df"]
KINDS: Final[tuple[Kind, ...]] = get_args(Kind)

TEXT_DIM: Final = 32
SMALL_VAE: Final = VaeConfig(base_dim=4, z_dim=16, dim_mult=(1, 2, 4, 4), num_res_blocks=2)
# Two heads of 80: the width of a head is what tells the number of heads in the original format.
SMALL_CLIP: Final = ClipVisionConfig(
    dim=160, ffn_dim=192, num_heads=2, num_layers=3, projection_dim=48
)
# Tensors of the released CLIP file that video generation never reads.
_TEXT_TENSORS: Final = {"textual.token_embedding.weight": (64, 32), "textual.norm.weight": (32,)}


def make_checkpoint(
    folder: Path, kind: Kind = "i2v", format: Format = "diffusers", *, seed: int = 0
) -> Path:
    """Write a small random checkpoint; the same arguments give the same weights in both formats.

    Args:
        folder: to make; it appears complete or not at all.
        kind: image-to-video, text-to-video, or diffusion forcing (with the frame-rate embedding).
        format: ``original`` or ``diffusers``.
        seed: of the weights.

    Returns:
        ``folder``.

    Raises:
        RequestError: if ``folder`` is there already and holds files.
    """
    with new_folder(folder) as partial:
        if format == "diffusers":
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
        image_dim=SMALL_CLIP.dim if kind == "i2v" else None,
        inject_sample_info=kind == "df",
    )


def _write_diffusers(folder: Path, kind: Kind, seed: int) -> None:
    tokens = write_tokenizer(folder / "tokenizer")
    # More rows than tokens, as in the released encoder.
    rows = 64 * math.ceil((tokens + 1) / 64)
    text = Umt5Config(
        vocab_size=rows, dim=TEXT_DIM, head_dim=8, num_heads=4, ffn_dim=48, num_layers=2
    )
    write_random(folder / "transformer", TRANSFORMER, transformer_of(kind), seed)
    write_random(folder / "vae", VAE, SMALL_VAE, seed)
    # The released files have half precision; these hold only such values, so that both formats
    # have the same.
    write_random(folder / "text_encoder", UMT5, text, seed, jnp.bfloat16)
    names: list[ComponentName] = ["tokenizer", "text_encoder", "vae"]
    if kind == "i2v":
        write_random(folder / "image_encoder", CLIP, SMALL_CLIP, seed, np.float16)
        (folder / "image_processor").mkdir()
        processor = folder / "image_processor" / "preprocessor_config.json"
        write_config(processor, image_processor_json(SMALL_CLIP))
        names += ("image_encoder", "image_processor")
    image = SMALL_CLIP if kind == "i2v" else None
    # The shift is what the published converter leaves there.
    write_pipeline_files(folder, PIPELINE_OF_TASK[kind], names, 1.0, image)


def write_tokenizer(folder: Path) -> int:
    """Write the two files of a small tokenizer; returns how many ids it has."""
    words = ("a", "an", "the", "of", "in", "on", "with", "sun", "sea", "sky", "lake", "cat")
    characters = string.ascii_letters + string.digits + string.punctuation
    return write_unigram(folder, words, characters + "你好世界一只猫äéñöü")


def write_random(
    folder: Path,
    spec: ComponentSpec[Any, Any],
    config: Any,
    seed: int = 0,
    dtype: DTypeLike = np.float32,
) -> None:
    """Write a component in diffusers' format, filled by :func:`random_tensors`.

    Args:
        folder: of the component.
        spec: what kind of component it is.
        config: of its model.
        seed: of the values.
        dtype: whose values to round to; they are stored in float32.
    """
    specs = export(spec.abstract(config), spec.rules(config), "diffusers").specs
    spec.write(folder, config, TensorStream(specs, random_tensors(specs, seed, dtype)))


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
    """Rewrite a checkpoint in diffusers' format into the original one, as Skywork ships it."""
    import torch

    paths = {name: folder / path for name, path in PATHS["original"].items()}
    stored_transformer(source).write(folder, "original")
    torch.save(_original_named(stored_text_encoder(source), torch.bfloat16), paths["text_encoder"])
    torch.save(_original_named(stored_vae(source), torch.float32), paths["vae"])
    shutil.copytree(source.component("tokenizer"), paths["tokenizer"])
    if "image_encoder" in source.components:
        clip = _original_named(stored_image_encoder(source), torch.float16)
        clip["log_scale"] = torch.tensor(2.0, dtype=torch.float16)
        clip |= {k: torch.ones(v, dtype=torch.float16) for k, v in _TEXT_TENSORS.items()}
        torch.save(clip, paths["image_encoder"])


def _original_named(
    stored: StoredComponent[Any, Any], dtype: "torch.dtype"
) -> "OrderedDict[str, torch.Tensor]":
    import torch

    tensors = stored.tensors("original")
    return OrderedDict((name, torch.tensor(value).to(dtype)) for name, value in tensors)


def main() -> None:
    """Run the command line of this module."""
    parser = argparse.ArgumentParser(description="Write a small checkpoint with random weights.")
    parser.add_argument("kind", choices=KINDS)
    parser.add_argument("format", choices=FORMATS)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    make_checkpoint(arguments.folder, arguments.kind, arguments.format, seed=arguments.seed)


if __name__ == "__main__":
    main()
