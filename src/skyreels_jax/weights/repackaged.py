"""Files of other tools: with a prefix before all names, a marker, or several models in one file.

ComfyUI's files have a prefix, those of training with several devices or a compiled model parts of
names, and some a marker tensor that names the checkpoint. None of it is lost or guessed: what is
taken off, and what is left, is said (:attr:`UnpackedSource.notes`), and tensors that belong to no
model stay, for the model's table to refuse.
"""

import re
from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Final, Literal

import numpy as np

from skyreels_jax.errors import WeightsError
from skyreels_jax.weights.plan import Format
from skyreels_jax.weights.safetensors_file import TensorInfo, TensorSource

Held = Literal["vae", "text_encoder", "image_encoder", "transformer"]

# What stands before all names of a model in files of other tools: ComfyUI's single files and full
# checkpoints, wrappers in training, DiffSynth.
_PREFIXES: Final = (
    *("model.diffusion_model.", "diffusion_model.", "model.", "transformer.", "pipe.dit.", "dit."),
    *("first_stage_model.", "vae.", "text_encoders.umt5xxl.transformer.", "umt5xxl.transformer."),
    *("text_encoder.", "clip_vision.", "image_encoder."),
)
_TEXT_ENCODERS: Final = "text_encoders."
# Parts that training leaves in names, anywhere.
_WRAPPERS: Final = re.compile(
    r"(?:^|(?<=\.))(?:module|_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module)\."
)
_MARKER: Final = "model_type."
# Texts of a safetensors header that name the model (the first is of the standard ModelSpec).
_TITLES: Final = ("modelspec.title", "title", "name")
# A tensor that tells what a file holds, and whose names it has.
_TELLING: Final[Mapping[str, tuple[Held, Format]]] = {
    "decoder.conv1.weight": ("vae", "original"),
    "decoder.conv_in.weight": ("vae", "diffusers"),
    # CLIP's own text encoder has all other names of Wan's UMT5.
    "blocks.0.pos_embedding.embedding.weight": ("text_encoder", "original"),
    "encoder.block.0.layer.0.SelfAttention.q.weight": ("text_encoder", "diffusers"),
    "visual.patch_embedding.weight": ("image_encoder", "original"),
    "vision_model.embeddings.patch_embedding.weight": ("image_encoder", "diffusers"),
    "blocks.0.self_attn.q.weight": ("transformer", "original"),
    "blocks.0.attn1.to_q.weight": ("transformer", "diffusers"),
}
# Names of T5 in GGUF files (llama.cpp's), as transformers has them.
_LLAMA_CPP: Final[Mapping[str, str]] = {
    "attn_q": "0.SelfAttention.q",
    "attn_k": "0.SelfAttention.k",
    "attn_v": "0.SelfAttention.v",
    "attn_o": "0.SelfAttention.o",
    "attn_rel_b": "0.SelfAttention.relative_attention_bias",
    "attn_norm": "0.layer_norm",
    "ffn_gate": "1.DenseReluDense.wi_0",
    "ffn_up": "1.DenseReluDense.wi_1",
    "ffn_down": "1.DenseReluDense.wo",
    "ffn_norm": "1.layer_norm",
}
_LLAMA_CPP_BLOCK: Final = re.compile(r"enc\.blk\.(\d+)\.(\w+)\.weight")
_LLAMA_CPP_OTHERS: Final = {
    "token_embd.weight": "shared.weight",
    "enc.output_norm.weight": "encoder.final_layer_norm.weight",
}


@dataclass(frozen=True)
class Packed:
    """A model within a file: what it is, whose names it has, and what stands before them."""

    component: Held
    format: Format
    prefix: str


def packed_in(names: Iterable[str]) -> list[Packed]:
    """All models that tensors of these names make up, each with its prefix."""
    found: dict[Packed, None] = {}
    for name in map(_unwrapped, names):
        for telling, (component, format) in _TELLING.items():
            prefix = name.removesuffix(telling)
            if name.endswith(telling) and (not prefix or prefix.endswith(".")):
                found[Packed(component, format, prefix)] = None
                break
    return list(found)


def transformers_name(name: str) -> str:
    """What transformers calls a tensor of T5 that has llama.cpp's name; any other name as it is."""
    if (block := _LLAMA_CPP_BLOCK.fullmatch(name)) and block[2] in _LLAMA_CPP:
        return f"encoder.block.{block[1]}.layer.{_LLAMA_CPP[block[2]]}.weight"
    return _LLAMA_CPP_OTHERS.get(name, name)


def _unwrapped(name: str) -> str:
    """A name without what training and llama.cpp did to it."""
    return without_wrappers(transformers_name(name))


def without_wrappers(name: str) -> str:
    """A name without the parts that DDP, FSDP, checkpointing and compilation put into it."""
    return _WRAPPERS.sub("", name)


class UnpackedSource:
    """The tensors of one model of a file, under the names that the model's own files have.

    Attributes:
        marker: the checkpoint that a marker tensor names, if there is one.
        format: whose names these are; the original's, where they do not tell.
        prefix: what stood before all names.
        notes: what was taken off and what was left, a line each.
        mapping: of a file with several, the one that the tensors are in.
        titles: what a header's texts call the model.
    """

    def __init__(self, source: TensorSource, component: Held = "transformer"):
        """Find the model and what was added to its names.

        Raises:
            WeightsError: two tensors would have one name, there are several such models, or the
                prefix is no known one.
        """
        names = source.tensors()
        where = next((info.file for info in names.values()), "the file")
        markers = [name for name in names if _marked(name) is not None]
        self.marker = _marked(markers[0]) if len(markers) == 1 else None
        self._source = source
        self.mapping: str | None = getattr(source, "mapping", None)
        texts: Mapping[str, tuple[str, ...]] = getattr(source, "metadata", {})
        self.titles = tuple(text for key in _TITLES for text in texts.get(key, ()))
        packed = packed_in(names)
        own = [one for one in packed if one.component == component]
        if len(own) > 1:
            listed = " and ".join(one.prefix.rstrip(".") or "no prefix" for one in own)
            raise WeightsError(
                f"{where} holds {len(own)} models of one kind ({_words(component)}), under "
                f"{listed}: say which by `weights_key`"
            )
        self.format: Format = own[0].format if own else "original"
        others = [one.prefix for one in packed if one.component != component]
        # What ComfyUI keeps beside the text encoder (its tokenizer, a temperature) is its.
        roots = {_TEXT_ENCODERS if p.startswith(_TEXT_ENCODERS) else p for p in others if p}
        kept = [
            name for name in names.keys() - markers if not _unwrapped(name).startswith(tuple(roots))
        ]
        self.prefix = _prefix(where, kept, own)
        if self.prefix and "" in others:
            kept = [name for name in kept if _unwrapped(name).startswith(self.prefix)]
        self._names = _own_names(kept, self.prefix)
        self.notes = (*getattr(source, "notes", ()), *self._said(packed, component))

    def _said(self, packed: Collection[Packed], component: Held) -> Iterator[str]:
        if self.prefix:
            yield f"names without the prefix {self.prefix}"
        if any(_WRAPPERS.search(name) for name in self._names.values()):
            yield "names without what training added (module., _orig_mod. or the like)"
        if self.marker is not None:
            yield f"a marker tensor says {self.marker}"
        for one in packed:
            if one.component != component:
                yield f"holds the {_words(one.component)} too, under {one.prefix or 'no prefix'}"

    def tensors(self) -> Mapping[str, TensorInfo]:
        """All tensors by their own names, from the headers alone."""
        found = self._source.tensors()
        return {own: found[name] for own, name in self._names.items()}

    def read(self, name: str) -> np.ndarray:
        """The data of one tensor."""
        return self._source.read(self._names[name])


def _marked(name: str) -> str | None:
    """The checkpoint that a marker tensor names; None for any other tensor."""
    start, marker, rest = name.partition(_MARKER)
    return rest if marker and (start == "" or start in _PREFIXES) else None


def _prefix(where: str, names: Collection[str], own: Collection[Packed]) -> str:
    """What stands before the names of a model."""
    if not own:
        plain = [_unwrapped(name) for name in names]
        known = (p for p in _PREFIXES if plain and all(name.startswith(p) for name in plain))
        return next(known, "")
    (one,) = own
    if one.prefix and one.prefix not in _PREFIXES:
        key = one.prefix.rstrip(".")
        raise WeightsError(
            f"{where} holds its {_words(one.component)} under {key}, which no known tool writes: "
            f"the model has no place for such names; if it is meant, give `weights_key` {key}"
        )
    return one.prefix


def _own_names(names: Collection[str], prefix: str) -> dict[str, str]:
    """The names as the model has them, and as the file does."""
    found: dict[str, str] = {}
    for name in names:
        own = _unwrapped(name).removeprefix(prefix)
        other = found.setdefault(own, name)
        if other != name:
            raise WeightsError(
                f"{other} and {name} are both {own}: the file holds two models; keep one of them"
            )
    return found


def _words(component: Held) -> str:
    return component.replace("_", " ")


def refuse_gguf(folder: Path) -> None:
    """Refuse a folder of GGUF files, which says nothing of which is meant; raises WeightsError."""
    if found := sorted(folder.glob("[!.]*.gguf")):
        raise WeightsError(
            f"{folder} holds {found[0].name}: GGUF files are opened by themselves, not by their "
            f"folder; give {found[0]}"
        )
