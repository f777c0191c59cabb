"""The LoRAs of a pipeline, and how they come to a transformer that is loaded, and leave it."""

from collections.abc import Sequence
from pathlib import Path

from jax.typing import DTypeLike

from skyreels_jax.errors import RequestError
from skyreels_jax.weights.lora.binding import Lora
from skyreels_jax.weights.lora.file import content_hash, open_lora
from skyreels_jax.weights.lora.source import StoredTransformer, proven, touched, with_loras

# What a user may give for one: a file, or a file and its scale.
LoraLike = Lora | str | Path | tuple[str | Path, float]


def as_loras(given: Sequence[object]) -> tuple[Lora, ...]:
    """What a user gave, as LoRAs.

    Raises:
        RequestError: one is no file and no pair of a file and a finite scale.
    """
    return tuple(map(_as_lora, given))


def _as_lora(given: object) -> Lora:
    if isinstance(given, Lora):
        return given
    path, scale = given if isinstance(given, tuple | list) and len(given) == 2 else (given, 1.0)
    if not isinstance(path, str | Path) or type(scale) not in (int, float):
        raise RequestError(f"LoRA {given!r:.200}: expected a file, or a pair of a file and a scale")
    return Lora(Path(path), float(scale))


def identities(loras: Sequence[Lora]) -> tuple[str, ...]:
    """What tells LoRAs and their scales from others: a hash of each file's content, its scale."""
    return tuple(f"lora {content_hash(lora.path)} {lora.scale!r}" for lora in loras)


def named(loras: Sequence[Lora]) -> tuple[tuple[str, float], ...]:
    """The names of the files and their scales, for what is said of a video."""
    return tuple((lora.path.name, lora.scale) for lora in loras)


def trained_on(loras: Sequence[Lora]) -> tuple[str, ...]:
    """Return what the headers of LoRAs say that they were trained on.

    Raises:
        WeightsError: there is no such file, or it is not sound.
    """
    return tuple(text for lora in loras for text in open_lora(lora.path).trained_on())


def _without(loras: Sequence[Lora], path: Path | None) -> tuple[Lora, ...]:
    """The LoRAs but those of a file; of none where ``path`` is ``None``.

    Raises:
        RequestError: there is none to leave out.
    """
    left = tuple(lora for lora in loras if path is not None and lora.path != path)
    if len(left) == len(loras):
        names = ", ".join(str(lora.path) for lora in loras) or "none"
        raise RequestError(f"no LoRA of {path or 'any file'} is loaded; loaded are: {names}")
    return left


class WithLoras:
    """Something whose transformer has LoRAs, which may change while it is loaded.

    Attributes:
        loras: what is added to the transformer.
    """

    loras: tuple[Lora, ...] = ()

    def load_lora(self, file: str | Path, scale: float = 1.0) -> None:
        """Add a LoRA to those that the transformer has; one that is loaded gets it at once.

        Args:
            file: safetensors or a PyTorch archive, of any of the trainers in ``docs/lora.md``.
            scale: how much of it; negative takes away.

        Raises:
            WeightsError: it is unsound, or does not fit; the LoRAs are those that were there.
        """
        self._exchange_loras((*self.loras, *as_loras([(file, scale)])))

    def unload_lora(self, file: str | Path | None = None) -> None:
        """Take a file's LoRA, or all, off the transformer: its weights come from its files again.

        Raises:
            RequestError: there is none to take off.
        """
        self._exchange_loras(_without(self.loras, None if file is None else Path(file)))

    def _exchange_loras(self, loras: tuple[Lora, ...]) -> None:
        """Have these LoRAs and no others."""
        raise NotImplementedError


def plan_exchange(
    stored: StoredTransformer,
    before: Sequence[Lora],
    after: Sequence[Lora],
    kernel_dtype: DTypeLike | None = None,
) -> tuple[StoredTransformer, frozenset[str]]:
    """What a loaded transformer reads anew to have other LoRAs; nothing is changed yet.

    Args:
        stored: the transformer in its files, without LoRAs.
        before: the LoRAs that the model has.
        after: those that it is to have.
        kernel_dtype: what the blocks' kernels are quantised to, if they are.

    Returns:
        The transformer with the new LoRAs, and the names of the tensors that the old or the new
        ones touch. Those of the old ones come from the files again, so that what is left after the
        last LoRA is what the files hold, to the bit.

    Raises:
        WeightsError: a LoRA does not fit, or is unsound.
    """
    merged = proven(stored, after, kernel_dtype)
    old = with_loras(stored, before, kernel_dtype=kernel_dtype)
    return merged, touched(merged) | touched(old)
