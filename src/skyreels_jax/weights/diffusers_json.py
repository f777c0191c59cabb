"""The JSON files of a pipeline folder in diffusers' layout, with the keys of their own writers.

The transformer's is in :mod:`skyreels_jax.weights.transformer_json`.
"""

from collections.abc import Collection, Mapping
from typing import Any, Final

from skyreels_jax.models.clip_vision import ClipVisionConfig
from skyreels_jax.models.umt5 import BUCKETS, MAX_DISTANCE, Umt5Config
from skyreels_jax.models.vae_config import FRAME_STRIDE, PIXEL_STRIDE, VaeConfig
from skyreels_jax.weights.layout import Part

# The library and class of each part; an image encoder without projection has a class of its own.
CLASSES: Final[Mapping[str, tuple[str, str]]] = {
    "transformer": ("diffusers", "SkyReelsV2Transformer3DModel"),
    "vae": ("diffusers", "AutoencoderKLWan"),
    "scheduler": ("diffusers", "UniPCMultistepScheduler"),
    "text_encoder": ("transformers", "UMT5EncoderModel"),
    "tokenizer": ("transformers", "T5TokenizerFast"),
    "image_encoder": ("transformers", "CLIPVisionModelWithProjection"),
    "image_processor": ("transformers", "CLIPImageProcessor"),
}


def model_index(
    pipeline: str, parts: Collection[Part], image_encoder: ClipVisionConfig | None
) -> dict[str, Any]:
    """``model_index.json`` of a ``pipeline`` class with a transformer and these parts."""
    classes = {part: list(CLASSES[part]) for part in ("transformer", *parts)}
    if image_encoder is not None:
        classes["image_encoder"][1] = image_encoder_json(image_encoder)["architectures"][0]
    return {"_class_name": pipeline} | classes


def vae_json(config: VaeConfig) -> dict[str, Any]:
    """Of ``AutoencoderKLWan``."""
    return {
        "_class_name": CLASSES["vae"][1],
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


def text_encoder_json(config: Umt5Config) -> dict[str, Any]:
    """Of ``UMT5EncoderModel``."""
    return {
        "architectures": [CLASSES["text_encoder"][1]],
        "d_ff": config.ffn_dim,
        "d_kv": config.head_dim,
        "d_model": config.dim,
        "decoder_start_token_id": 0,
        "dense_act_fn": "gelu_new",
        "dropout_rate": 0.1,
        "eos_token_id": 1,
        "feed_forward_proj": "gated-gelu",
        "is_encoder_decoder": True,
        "is_gated_act": True,
        "layer_norm_epsilon": config.eps,
        "model_type": "umt5",
        "num_decoder_layers": config.num_layers,
        "num_heads": config.num_heads,
        "num_layers": config.num_layers,
        "pad_token_id": 0,
        "relative_attention_max_distance": MAX_DISTANCE,
        "relative_attention_num_buckets": BUCKETS,
        "vocab_size": config.vocab_size,
    }


def image_encoder_json(config: ClipVisionConfig) -> dict[str, Any]:
    """Of ``CLIPVisionModelWithProjection``, or of ``CLIPVisionModel`` without a projection."""
    projects = config.projection_dim is not None
    return {
        "architectures": [CLASSES["image_encoder"][1] if projects else "CLIPVisionModel"],
        "hidden_act": "gelu",
        "hidden_size": config.dim,
        "image_size": config.image_size,
        "intermediate_size": config.ffn_dim,
        "layer_norm_eps": config.eps,
        "model_type": "clip_vision_model",
        "num_attention_heads": config.num_heads,
        "num_channels": 3,
        "num_hidden_layers": config.num_layers,
        "patch_size": config.patch_size,
    } | ({"projection_dim": config.projection_dim} if projects else {})


def image_processor_json(config: ClipVisionConfig) -> dict[str, Any]:
    """``preprocessor_config.json``: short edge to the tower's size, centre cut out, normalised."""
    side = config.image_size
    return {
        "crop_size": {"height": side, "width": side},
        "do_center_crop": True,
        "do_convert_rgb": True,
        "do_normalize": True,
        "do_rescale": True,
        "do_resize": True,
        "image_mean": [0.48145466, 0.4578275, 0.40821073],
        "image_processor_type": "CLIPImageProcessor",
        "image_std": [0.26862954, 0.26130258, 0.27577711],
        "resample": 3,
        "rescale_factor": 1 / 255,
        "size": {"shortest_edge": side},
    }


def scheduler_json(flow_shift: float) -> dict[str, Any]:
    """``scheduler_config.json``: UniPC of order 2 on flow sigmas, shifted."""
    return {
        "_class_name": CLASSES["scheduler"][1],
        "flow_shift": flow_shift,
        "num_train_timesteps": 1000,
        "prediction_type": "flow_prediction",
        "solver_order": 2,
        "solver_type": "bh2",
        "use_flow_sigmas": True,
    }
