"""The Wan VAE: its weight table, its configuration in files, and how it is opened.

Names: Wan's ``.pth`` on the left, diffusers' ``AutoencoderKLWan`` on the right. The original counts
the decoder's layers in one flat list; diffusers groups them by resolution.
"""

from collections.abc import Mapping, Sequence
from itertools import count
from typing import Final

from skyreels_jax.errors import UnsupportedError, WeightsError
from skyreels_jax.models.vae import WanVae
from skyreels_jax.models.vae_layers import (
    FRAME_STRIDE,
    LATENTS_MEAN,
    LATENTS_STD,
    PIXEL_STRIDE,
    Residual,
    VaeConfig,
)
from skyreels_jax.weights.components.stored import (
    ComponentSpec,
    JsonFields,
    StoredComponent,
    open_files,
)
from skyreels_jax.weights.layout import Layout
from skyreels_jax.weights.plan import CONV, Format, Rule, Transform, rule, trailing_ones

_GAMMA: Final = trailing_ones(3)
_GAMMA_2D: Final = trailing_ones(2)


def _pointwise(ones: int) -> Transform:
    """A convolution of kernel size 1, ``[out, in, 1, ..., 1]``, to the matrix ``[in, out]``."""
    return Transform(
        f"pointwise_{ones}",
        lambda x: x.reshape(x.shape[:2]).T,
        lambda x: x.T.reshape(x.shape[::-1] + (1,) * ones),
    )


_POINTWISE: Final = _pointwise(3)
_POINTWISE_2D: Final = _pointwise(2)


def _conv(target: str, original: str, diffusers: str, transform: Transform = CONV) -> list[Rule]:
    return [
        rule(f"{target}.kernel", f"{original}.weight", f"{diffusers}.weight", transform),
        rule(f"{target}.bias", f"{original}.bias", f"{diffusers}.bias"),
    ]


def _norm(target: str, original: str, diffusers: str, transform: Transform = _GAMMA) -> Rule:
    return rule(f"{target}.scale", f"{original}.gamma", f"{diffusers}.gamma", transform)


def _residual(target: str, original: str, diffusers: str, *, shortcut: bool) -> list[Rule]:
    rules = [
        _norm(f"{target}.norm1", f"{original}.residual.0", f"{diffusers}.norm1"),
        *_conv(f"{target}.conv1", f"{original}.residual.2", f"{diffusers}.conv1"),
        _norm(f"{target}.norm2", f"{original}.residual.3", f"{diffusers}.norm2"),
        *_conv(f"{target}.conv2", f"{original}.residual.6", f"{diffusers}.conv2"),
    ]
    names = (f"{target}.shortcut", f"{original}.shortcut", f"{diffusers}.conv_shortcut")
    return [*rules, *_conv(*names, _POINTWISE)] if shortcut else rules


def _resample(target: str, original: str, diffusers: str, *, temporal: bool) -> list[Rule]:
    rules = _conv(f"{target}.conv", f"{original}.resample.1", f"{diffusers}.resample.1")
    names = (f"{target}.time_conv", f"{original}.time_conv", f"{diffusers}.time_conv")
    return [*rules, *_conv(*names)] if temporal else rules


def _middle(side: str) -> list[Rule]:
    ours, theirs = f"{side}.middle", f"{side}.mid_block"
    attention = (f"{ours}.1", f"{ours}.1", f"{theirs}.attentions.0")
    norm, qkv, proj = (
        [f"{name}.{layer}" for name in attention] for layer in ("norm", "to_qkv", "proj")
    )
    return [
        *_residual(f"{ours}.0", f"{ours}.0", f"{theirs}.resnets.0", shortcut=False),
        _norm(norm[0], norm[1], norm[2], _GAMMA_2D),
        *_conv(qkv[0], qkv[1], qkv[2], _POINTWISE_2D),
        *_conv(proj[0], proj[1], proj[2], _POINTWISE_2D),
        *_residual(f"{ours}.2", f"{ours}.2", f"{theirs}.resnets.1", shortcut=False),
    ]


def _ends(side: str) -> list[Rule]:
    """The first convolution of the encoder or decoder, and its head."""
    return [
        *_conv(f"{side}.conv_in", f"{side}.conv1", f"{side}.conv_in"),
        _norm(f"{side}.head.norm", f"{side}.head.0", f"{side}.norm_out"),
        *_conv(f"{side}.head.conv", f"{side}.head.2", f"{side}.conv_out"),
    ]


def vae_rules(config: VaeConfig) -> tuple[Rule, ...]:
    """The rules of a VAE; which of its blocks have a shortcut or resample time depends on it."""
    rules = [
        *_conv("quant", "conv1", "quant_conv", _POINTWISE),
        *_conv("post_quant", "conv2", "post_quant_conv", _POINTWISE),
        *_ends("encoder"),
        *_middle("encoder"),
        *_ends("decoder"),
        *_middle("decoder"),
    ]
    # Flat index to diffusers' names: every level of the decoder but the last ends in an upsampler.
    level_length = config.num_res_blocks + 2
    sides = (("encoder.downsamples", config.encoder_layers()),)
    sides += (("decoder.upsamples", config.decoder_layers()),)
    for names, layers in sides:
        for k, layer in enumerate(layers):
            ours = f"{names}.{k}"
            level, j = divmod(k, level_length)
            place = "upsamplers.0" if j == level_length - 1 else f"resnets.{j}"
            encoder = names.startswith("encoder")
            theirs = f"encoder.down_blocks.{k}" if encoder else f"decoder.up_blocks.{level}.{place}"
            if isinstance(layer, Residual):
                shortcut = layer.in_dim != layer.out_dim
                rules += _residual(ours, ours, theirs, shortcut=shortcut)
            else:
                rules += _resample(ours, ours, theirs, temporal=layer.temporal)
    return tuple(rules)


def vae_config_from_tensors(shapes: Mapping[str, Sequence[int]], format: Format) -> VaeConfig:
    """What the shapes in a file say of the VAE; the statistics are those of the released one.

    Raises:
        WeightsError: tensors that the answer depends on are missing or contradict each other.
    """
    if format == "original":
        first, latent = "encoder.conv1.weight", "conv2.weight"
        layer, convolution = "encoder.downsamples.{k}", "residual.6.weight"
    else:
        first, latent = "encoder.conv_in.weight", "post_quant_conv.weight"
        layer, convolution = "encoder.down_blocks.{k}", "conv2.weight"
    for name in (first, latent):
        if len(shapes.get(name, ())) != 5:
            raise WeightsError(f"not a Wan VAE: {name} is missing or not of rank 5")
    base_dim, z_dim = shapes[first][0], shapes[latent][0]
    levels: list[list[int]] = [[]]
    temporal: list[bool] = []
    for k in count():
        prefix = layer.format(k=k)
        if f"{prefix}.{convolution}" in shapes:
            levels[-1].append(shapes[f"{prefix}.{convolution}"][0])
        elif f"{prefix}.resample.1.weight" in shapes:
            temporal.append(f"{prefix}.time_conv.weight" in shapes)
            levels.append([])
        else:
            break
    dims = {dim for level in levels for dim in level}
    if len({len(level) for level in levels}) != 1 or any(dim % base_dim for dim in dims):
        raise WeightsError(f"not a Wan VAE: its encoder has blocks of {levels} channels")
    if z_dim != len(LATENTS_MEAN):
        raise WeightsError(
            f"VAE with latents of {z_dim} channels: their statistics are known for "
            f"{len(LATENTS_MEAN)} only; use a folder with a config.json that has them"
        )
    try:
        return VaeConfig(
            base_dim=base_dim,
            z_dim=z_dim,
            dim_mult=tuple(level[-1] // base_dim for level in levels if level),
            num_res_blocks=len(levels[0]),
            temporal_downsample=tuple(temporal),
        )
    except ValueError as error:
        raise WeightsError(f"not a Wan VAE: {error}") from error


def vae_config_from_json(config: Mapping[str, object]) -> VaeConfig:
    """From diffusers' ``config.json``; keys that it leaves out have diffusers' defaults.

    Raises:
        WeightsError: values that are illegal or contradict each other.
        UnsupportedError: a variant that SkyReels-V2 does not use (Wan 2.2's, for one).
    """
    fields = JsonFields(config, "VAE")
    fields.require(
        {
            "_class_name": "AutoencoderKLWan",
            "attn_scales": [],
            "is_residual": False,
            "in_channels": 3,
            "out_channels": 3,
            "patch_size": None,
            "scale_factor_temporal": FRAME_STRIDE,
            "scale_factor_spatial": PIXEL_STRIDE,
        }
    )
    base_dim = fields.size("base_dim", 96, most=4096)
    if config.get("decoder_base_dim") not in (None, base_dim):
        raise UnsupportedError(
            f"VAE with decoder_base_dim {config['decoder_base_dim']}; only that of the encoder, "
            f"{base_dim}"
        )
    try:
        return VaeConfig(
            base_dim=base_dim,
            z_dim=fields.size("z_dim", 16, most=4096),
            dim_mult=fields.values("dim_mult", (1, 2, 4, 4)),
            num_res_blocks=fields.size("num_res_blocks", 2, most=64),
            # Spelled so in the published file.
            temporal_downsample=tuple(
                map(bool, fields.values("temperal_downsample", (False, True, True)))
            ),
            latents_mean=fields.values("latents_mean", LATENTS_MEAN),
            latents_std=fields.values("latents_std", LATENTS_STD),
        )
    except ValueError as error:
        raise WeightsError(f"the VAE's config.json is unsound: {error}") from error


def vae_json(config: VaeConfig, format: Format = "diffusers") -> dict[str, object]:
    """``config.json`` of ``AutoencoderKLWan``; the original format has none."""
    del format
    return {
        "_class_name": "AutoencoderKLWan",
        "attn_scales": [],
        "base_dim": config.base_dim,
        "dim_mult": list(config.dim_mult),
        "dropout": 0.0,
        "latents_mean": list(config.latents_mean),
        "latents_std": list(config.latents_std),
        "num_res_blocks": config.num_res_blocks,
        "scale_factor_spatial": PIXEL_STRIDE,
        "scale_factor_temporal": FRAME_STRIDE,
        # Spelled so in diffusers.
        "temperal_downsample": list(config.temporal_downsample),
        "z_dim": config.z_dim,
    }


VAE: Final = ComponentSpec(WanVae, vae_rules, vae_json)


def stored_vae(layout: Layout) -> StoredComponent[VaeConfig, WanVae]:
    """The VAE of a folder; only headers are read.

    Raises:
        WeightsError: it is missing or unsound.
        UnsupportedError: it is a variant that SkyReels-V2 does not use.
    """
    readers = vae_config_from_json, vae_config_from_tensors
    source, config, format = open_files(layout, "vae", *readers)
    return StoredComponent(VAE, config, source, format, vae_rules(config))
