"""Files of the original names as other tools pack them: with a prefix, a marker, or all in one.

ComfyUI's files have a prefix, those of training with several devices or a compiled model parts of
names, and some a marker tensor that names the checkpoint. None of it is lost or guessed: a prefix
is taken off only where all tensors have it.
"""

import re
from collections.abc import Collection, Iterable, Mapping
from pathlib import Path
from typing import Final, Literal

import numpy as np

from skyreels_jax.errors import WeightsError
from skyreels_jax.weights.plan import Format
from skyreels_jax.weights.safetensors_file import TensorInfo, TensorSource

Held = Literal["vae", "text_encoder", "image_encoder", "transformer"]

_PREFIXES: Final = ("model.diffusion_model.", "diffusion_model.", "model.")
# Parts that training leaves in names, anywhere.
_WRAPPERS: Final = re.compile(
    r"(?:^|(?<=\.))(?:module|_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module)\."
)
_MARKER: Final = "model_type."
# A tensor that tells what a file holds, and whose names it has.
_TELLING: Final[Mapping[str, tuple[Held, Format]]] = {
    "decoder.conv1.weight": ("vae", "original"),
    "decoder.conv_in.weight": ("vae", "diffusers"),
    "token_embedding.weight": ("text_encoder", "original"),
    "encoder.block.0.layer.0.SelfAttention.q.weight": ("text_encoder", "diffusers"),
    "visual.patch_embedding.weight": ("image_encoder", "original"),
    "vision_model.embeddings.patch_embedding.weight": ("image_encoder", "diffusers"),
    "blocks.0.self_attn.q.weight": ("transformer", "original"),
    "blocks.0.attn1.to_q.weight": ("transformer", "diffusers"),
}


class UnpackedSource:
    """Tensors under the names that the model's own files have.

    Attributes:
        marker: the checkpoint that a marker tensor names, if there is one.
    """

    def __init__(self, source: TensorSource):
        """Find out what was added to the names.

        Raises:
            WeightsError: two tensors would have one name.
        """
        names = source.tensors()
        markers = [name for name in names if name.startswith(_MARKER)]
        self.marker = markers[0].removeprefix(_MARKER) if len(markers) == 1 else None
        self._source = source
        self._names = _own_names(names.keys() - markers)

    def tensors(self) -> Mapping[str, TensorInfo]:
        """All tensors by their own names, from the headers alone."""
        found = self._source.tensors()
        return {own: found[name] for own, name in self._names.items()}

    def read(self, name: str) -> np.ndarray:
        """The data of one tensor."""
        return self._source.read(self._names[name])


def _own_names(names: Collection[str]) -> dict[str, str]:
    """The names as the model has them, and as the file does."""
    own = {name: _WRAPPERS.sub("", name) for name in names}
    prefix = next((p for p in _PREFIXES if own and all(n.startswith(p) for n in own.values())), "")
    found: dict[str, str] = {}
    for name, stripped in own.items():
        other = found.setdefault(stripped.removeprefix(prefix), name)
        if other != name:
            raise WeightsError(
                f"{other} and {name} are both {stripped.removeprefix(prefix)}: the file holds two "
                "models; keep one of them"
            )
    return found


def held_by(names: Iterable[str]) -> tuple[Held, Format] | None:
    """What a file of these tensors holds and whose names it has; ``None`` if they tell nothing."""
    own = {_WRAPPERS.sub("", name) for name in names}
    for prefix in ("", *_PREFIXES):
        for telling, held in _TELLING.items():
            if prefix + telling in own:
                return held
    return None


def refuse_gguf(folder: Path) -> None:
    """Refuse a folder of GGUF files, which says nothing of which is meant; raises WeightsError."""
    if found := sorted(folder.glob("[!.]*.gguf")):
        raise WeightsError(
            f"{folder} holds {found[0].name}: GGUF files are opened by themselves, not by their "
            f"folder; give {found[0]}"
        )
