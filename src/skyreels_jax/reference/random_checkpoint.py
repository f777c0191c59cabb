"""Small checkpoints with random weights, in both published layouts.

The demo and the tests need complete checkpoint folders, and nobody can download one inside a test.
These have the architecture, the file names, the tensor names and the dtypes of the released ones;
only widths and depths are small. They are built by diffusers and transformers, so that a folder is
what those libraries write, and rewritten into the original layout by the weight tables.

``python -m skyreels_jax.reference.random_checkpoint KIND LAYOUT FOLDER``
"""

import argparse
import math
import tempfile
from collections import OrderedDict
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, Literal, get_args

from skyreels_jax.reference.random_tokenizer import tokenizer
from skyreels_jax.weights.clip_rules import clip_rules
from skyreels_jax.weights.clip_rules import config_from_json as clip_config
from skyreels_jax.weights.convert import rename
from skyreels_jax.weights.layout import PATHS, Layout, Part, read_json, read_layout, safetensors_of
from skyreels_jax.weights.rules import DIALECTS, Dialect, Rule
from skyreels_jax.weights.store import new_folder
from skyreels_jax.weights.transformer_folder import convert_transformer, read_config
from skyreels_jax.weights.umt5_rules import UMT5_RULES
from skyreels_jax.weights.vae_rules import config_from_json as vae_config
from skyreels_jax.weights.vae_rules import vae_rules

if TYPE_CHECKING:
    import torch
    from diffusers import DiffusionPipeline

Kind = Literal["i2v", "t2v", "df"]
KINDS: Final[tuple[Kind, ...]] = get_args(Kind)

TEXT_DIM: Final = 32
# Two heads of 80: the width of a head is what tells the number of heads in the original layout.
IMAGE_DIM: Final = 160
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
            _pipeline(kind, seed).save_pretrained(partial)
        else:
            with tempfile.TemporaryDirectory() as temporary:
                _pipeline(kind, seed).save_pretrained(temporary)
                _write_original(read_layout(Path(temporary)), partial)
    return folder


def _pipeline(kind: Kind, seed: int) -> "DiffusionPipeline":
    """A diffusers pipeline of random parts, every parameter of which matters."""
    import diffusers
    import torch
    from transformers import CLIPImageProcessor

    words = tokenizer()
    parts: dict[str, Any] = {
        "tokenizer": words,
        "text_encoder": _text_encoder(len(words)),
        "transformer": _transformer(kind),
        "vae": diffusers.AutoencoderKLWan(base_dim=4),
        "scheduler": diffusers.UniPCMultistepScheduler(
            prediction_type="flow_prediction", use_flow_sigmas=True, num_train_timesteps=1000
        ),
    }
    if kind == "i2v":
        parts |= {"image_encoder": _image_encoder(), "image_processor": CLIPImageProcessor()}
    for offset, name in enumerate(("text_encoder", "transformer", "vae", "image_encoder")):
        if name in parts:
            randomize(parts[name], seed=10 * seed + offset)
    # The released files keep these parts in half precision; values that both layouts can hold.
    _round(parts["text_encoder"], torch.bfloat16)
    if kind == "i2v":
        _round(parts["image_encoder"], torch.float16)
    classes = {
        "i2v": diffusers.SkyReelsV2ImageToVideoPipeline,
        "t2v": diffusers.SkyReelsV2Pipeline,
        "df": diffusers.SkyReelsV2DiffusionForcingPipeline,
    }
    return classes[kind](**parts)


def _transformer(kind: Kind) -> "torch.nn.Module":
    from diffusers import SkyReelsV2Transformer3DModel

    channels: dict[str, Any] = {"in_channels": 16}
    if kind == "i2v":
        channels = {"in_channels": 36, "image_dim": IMAGE_DIM, "added_kv_proj_dim": 32}
    return SkyReelsV2Transformer3DModel(
        num_attention_heads=2,
        attention_head_dim=16,
        num_layers=2,
        ffn_dim=48,
        text_dim=TEXT_DIM,
        inject_sample_info=kind == "df",
        **channels,
    )


def _text_encoder(tokens: int) -> "torch.nn.Module":
    from transformers import UMT5Config, UMT5EncoderModel

    config = UMT5Config(
        # More rows than tokens, as in the released encoder.
        vocab_size=64 * math.ceil((tokens + 1) / 64),
        d_model=TEXT_DIM,
        d_kv=8,
        num_heads=4,
        d_ff=48,
        num_layers=2,
    )
    return UMT5EncoderModel(config)


def _image_encoder() -> "torch.nn.Module":
    from transformers import CLIPVisionConfig, CLIPVisionModelWithProjection

    config = CLIPVisionConfig(
        hidden_size=IMAGE_DIM,
        intermediate_size=192,
        num_attention_heads=2,
        num_hidden_layers=3,
        image_size=224,
        patch_size=14,
        projection_dim=48,
        hidden_act="gelu",
    )
    return CLIPVisionModelWithProjection(config)


def randomize(module: "torch.nn.Module", *, seed: int) -> None:
    """Give every parameter a random value at which nothing vanishes and nothing explodes.

    Matrices and convolutions keep the variance of their input; scales of norms scatter around 1;
    biases, modulations and other vectors around 0.
    """
    import torch

    generator = torch.Generator().manual_seed(seed)
    for name, parameter in module.named_parameters():
        noise = torch.randn(parameter.shape, generator=generator)
        is_gamma = parameter.shape[0] == parameter.numel() and name.endswith(("weight", "gamma"))
        if is_gamma:
            value = 1 + 0.2 * noise
        elif parameter.shape[0] == parameter.numel() or name.endswith("scale_shift_table"):
            value = 0.2 * noise
        else:
            value = noise / math.sqrt(parameter[0].numel())
        with torch.no_grad():
            parameter.copy_(value)


def _round(module: "torch.nn.Module", dtype: "torch.dtype") -> None:
    import torch

    with torch.no_grad():
        for parameter in module.parameters():
            parameter.copy_(parameter.to(dtype).to(parameter.dtype))


def _write_original(source: Layout, folder: Path) -> None:
    """Rewrite a checkpoint in the diffusers layout into the original one, as Skywork ships it."""
    import torch

    convert_transformer(folder, source, read_config(source), layout="original")
    umt5 = _renamed(source, "text_encoder", UMT5_RULES, torch.bfloat16)
    torch.save(umt5, folder / PATHS["original"]["text_encoder"])
    vae = vae_rules(vae_config(read_json(source.part("vae") / "config.json")))
    torch.save(_renamed(source, "vae", vae, torch.float32), folder / PATHS["original"]["vae"])
    words = folder / PATHS["original"]["tokenizer"]
    words.parent.mkdir()
    source.part("tokenizer").rename(words)
    if "image_encoder" in source.parts:
        config = clip_config(read_json(source.part("image_encoder") / "config.json"))
        clip = _renamed(source, "image_encoder", clip_rules(config), torch.float16)
        clip["log_scale"] = torch.tensor(2.0, dtype=torch.float16)
        clip |= {k: torch.ones(v, dtype=torch.float16) for k, v in TEXT_TOWER.items()}
        torch.save(clip, folder / PATHS["original"]["image_encoder"])


def _renamed(
    source: Layout, part: Part, rules: tuple[Rule, ...], dtype: "torch.dtype"
) -> "OrderedDict[str, torch.Tensor]":
    import torch

    tensors = rename(rules, safetensors_of(source.part(part)), "diffusers", "original")
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
