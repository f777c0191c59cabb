"""Checkpoints of related models that are not read, known by what only they have.

Wan 2.1's own checkpoints have the network of SkyReels-V2 and are read. These look alike, partly to
the last tensor, and would give wrong videos in silence: they are refused by their names. Sources:
the configurations that diffusers, Wan 2.1 and 2.2, VideoX-Fun and SkyReels-V3 write.
"""

import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Final

from skyreels_jax.errors import WeightsError

_IMAGE_EMBEDDINGS: Final = (
    *("img_emb.proj.1.weight", "condition_embedder.image_embedder.ff.net.0.proj.weight"),
)
_EXPERTS: Final = ("high_noise_model", "low_noise_model")
_SECOND: Final = "transformer_2"
# What a class of a pipeline or a transformer, or a `model_type`, has in its name.
_CLASSES: Final[Mapping[str, str]] = {
    r"vace": "Wan VACE",
    r"animate": "Wan Animate",
    r"s2v|speech": "Wan S2V",
    r"ti2v": "Wan 2.2 TI2V",
    r"fun|camera": "Wan Fun",
    r"skyreelsa2": "SkyReels-A2 or SkyReels-V3",
}
# Keys of a transformer's configuration.
_KEYS: Final[Mapping[str, str]] = {
    **dict.fromkeys(("vace_layers", "vace_in_channels", "vace_in_dim"), "Wan VACE"),
    **dict.fromkeys(("face_encoder_hidden_dim", "motion_encoder_dim"), "Wan Animate"),
    **dict.fromkeys(("audio_dim", "num_audio_token", "enable_adain"), "Wan S2V"),
    **dict.fromkeys(
        ("add_control_adapter", "in_dim_control_adapter", "add_ref_conv", "in_dim_ref_conv"),
        "Wan Fun",
    ),
    "audio_window": "SkyReels-V3 A2V",
}
# How names of tensors begin.
_TENSORS: Final[Mapping[str, str]] = {
    **dict.fromkeys(("vace_blocks.", "vace_patch_embedding."), "Wan VACE"),
    **dict.fromkeys(("face_adapter.", "face_encoder.", "pose_patch_embedding."), "Wan Animate"),
    **dict.fromkeys(("casual_audio_encoder.", "audio_injector.", "cond_encoder."), "Wan S2V"),
    **dict.fromkeys(("ref_conv.", "control_adapter."), "Wan Fun"),
    "audio_proj.": "an audio-driven model such as SkyReels-V3 A2V",
}
# Files of other models and of other kinds: a name that one of their tensors has in it.
_FOREIGN: Final[Mapping[str, str]] = {
    r"\.(lora_[AB]|lora_(down|up)|hada_w1_[ab]|lokr_w[12](_[ab])?|dora_scale)(\.|$)": "a LoRA, "
    "which is added to a model: give the model's own file, and this one by `lora`",
    r"^latents$": "the latents of a video, which `resume_latents` decodes",
    r"(^|\.)double_blocks\.\d": "FLUX or HunyuanVideo",
    r"(^|\.)joint_blocks\.\d": "Stable Diffusion 3",
    r"(^|\.)(input_blocks|down_blocks\.\d+\.attentions)\.\d": "Stable Diffusion's U-Net",
    r"(^|\.)transformer_blocks\.\d": "another transformer (LTX, CogVideoX, Qwen-Image or the like)",
    r"^(transformer\.)?text_model\.": "CLIP's text encoder, which no Wan model takes",
    r"^(model\.)?(language_model\.)?layers\.\d+\.self_attn": "a language model",
    r"^(vae\.|first_stage_model\.)?(encoder|decoder)\.(down|up)\.\d": "the VAE of images of Stable "
    "Diffusion or FLUX",
    r"^(encoder|decoder)\.conv_in\.conv\.": "the VAE of HunyuanVideo or LTX",
}
# Names of repositories, folders and files.
_NAMES: Final[Mapping[str, str]] = {
    r"wan.*vace": "Wan VACE",
    r"wan.*animate": "Wan Animate",
    r"wan.*[-_.]s2v": "Wan S2V",
    r"wan.*[-_.]fun([-_.]|$)": "Wan Fun",
    r"wan[-_]?2[._]?2": "Wan 2.2",
    r"(high|low)[-_]noise": "one expert of Wan 2.2",
    r"skyreels[-_]?v3": "SkyReels-V3",
    r"skyreels[-_]?v1": "SkyReels-V1",
    r"skyreels[-_]?a[12]": "SkyReels-A1 or -A2",
}


def refuse_relatives(folder: Path, index: Mapping[str, Any]) -> None:
    """Refuse the folder of a model with two transformers, or of another pipeline.

    Args:
        folder: of the checkpoint.
        index: its ``model_index.json``, empty where there is none.

    Raises:
        WeightsError: says what it is and how that is known.
    """
    pipeline = index.get("_class_name")
    named = f"model_index.json names {pipeline} with" if pipeline else "it has"
    entry = index.get(_SECOND)
    if (folder / _SECOND).exists() or (isinstance(entry, list) and any(entry)):
        raise _refusal(folder, f"{named} a second transformer ({_SECOND})", "Wan 2.2")
    if index.get("boundary_ratio") is not None:
        raise _refusal(folder, f"{named} a boundary_ratio between two models", "Wan 2.2")
    if index.get("expand_timesteps") is True:
        raise _refusal(folder, f"{named} expand_timesteps", "Wan 2.2 TI2V")
    if experts := [name for name in _EXPERTS if (folder / name).is_dir()]:
        raise _refusal(folder, f"it has {' and '.join(experts)}", "Wan 2.2")
    if isinstance(pipeline, str) and (other := _first(_CLASSES, pipeline)):
        raise _refusal(folder, f"model_index.json names {pipeline}", other)


def refuse_config(file: Path, config: Mapping[str, Any]) -> None:
    """Refuse a transformer's ``config.json`` of another model; raises a WeightsError."""
    for key in ("_class_name", "model_type"):
        value = config.get(key)
        if isinstance(value, str) and (other := _first(_CLASSES, value)):
            raise _refusal(file, f"{key} is {value!r:.80}", other)
    for key, other in _KEYS.items():
        if config.get(key):
            raise _refusal(file, f"it has {key}", other)
    if config.get("in_channels") == 36 and "image_dim" in config and config["image_dim"] is None:
        raise _refusal(file, "in_channels is 36 without an image_dim", "Wan 2.2 I2V")


def refuse_tensors(place: Path, names: Iterable[str]) -> None:
    """Refuse tensors that only another model has; raises a WeightsError."""
    for name in names:
        for start, other in _TENSORS.items():
            if name.startswith(start):
                raise _refusal(place, f"it holds {name}", other)


def refuse_foreign(file: Path, names: Iterable[str]) -> None:
    """Refuse a file of another model, or of something else, by what is in it.

    Args:
        file: which holds no component that is known.
        names: of its tensors.

    Raises:
        WeightsError: says what it is.
    """
    names = list(names)
    for pattern, what in _FOREIGN.items():
        if any(re.search(pattern, name) for name in names):
            raise WeightsError(f"{file} holds {what}")
    shown = ", ".join(names[:4])
    raise WeightsError(
        f"{file} holds no transformer, VAE or encoder of Wan or SkyReels-V2 that is known by its "
        f"{len(names)} tensors ({shown:.200})"
    )


def refuse_shapes(place: Path, shapes: Mapping[str, Sequence[int]]) -> None:
    """Refuse a transformer whose input tells that it is another model.

    Args:
        place: its file.
        shapes: of its tensors, by the names of either format.

    Raises:
        WeightsError: says which model has such an input.
    """
    patch = shapes.get("patch_embedding.weight", ())
    if len(patch) != 5:
        return
    channels = patch[1]
    has_image = any(name in shapes for name in _IMAGE_EMBEDDINGS)
    if channels == 48 and not has_image:
        raise _refusal(place, "its input has 48 channels", "Wan 2.2 TI2V")
    if channels == 36 and not has_image:
        raise _refusal(place, "its input has 36 channels and no image embedding", "Wan 2.2 I2V")
    if channels not in (16, 36):
        raise _refusal(place, f"its input has {channels} channels", "Wan Fun or another model")


def refuse_vae(place: Path, shapes: Mapping[str, Sequence[int]]) -> None:
    """Refuse the VAE of another model by its shapes or its file's name; raises a WeightsError."""
    nested = ("encoder.downsamples.0.downsamples.0.", "encoder.down_blocks.0.resnets.0.")
    for name, shape in shapes.items():
        if name.startswith(nested) and len(shape) in (1, 4, 5):
            deep = "conv1.weight" in name or "residual.2.weight" in name
            if deep and len(shape) == 5:
                raise _refusal(place, f"it holds {name}", "the VAE of Wan 2.2")
            if deep and len(shape) == 4:
                raise _refusal(place, f"{name} has two dimensions", "a VAE of images")
    if "qwen" in place.name.casefold():
        raise _refusal(place, "its name says so", "the VAE of Qwen-Image")


def refuse_names(place: Path, names: Iterable[tuple[str, str]]) -> None:
    """Refuse a checkpoint that is called as another model is.

    Args:
        place: the checkpoint's folder.
        names: where a name stands, and the name.

    Raises:
        WeightsError: says which name, and how to have it read nevertheless.
    """
    for source, name in names:
        if other := _first(_NAMES, name):
            raise WeightsError(
                f"{place}: {source} is that of {other}, which is not supported; if it is another "
                "model, say which by `preset`"
            )


def _first(table: Mapping[str, str], text: str) -> str | None:
    found = (other for pattern, other in table.items() if re.search(pattern, text.casefold()))
    return next(found, None)


def _refusal(place: Path, why: str, other: str) -> WeightsError:
    return WeightsError(f"{place}: {why}; this is {other}, which is not supported")
