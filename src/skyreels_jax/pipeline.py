"""The public way to make videos: a checkpoint in, videos out.

Parts are loaded when a stage needs them and let go of after it, in the order text encoder, image
encoder, transformer, VAE: memory holds one large model at a time.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import fields, replace
from functools import cache, partial
from pathlib import Path
from typing import Any, Final

import jax.numpy as jnp
from jax.typing import DTypeLike

from skyreels_jax.backends import BACKENDS, PARTS, Backend
from skyreels_jax.checkpoints import Checkpoint, load_transformer
from skyreels_jax.components.autoencoder import VAE_TILINGS, VaeTiling
from skyreels_jax.components.lazy import (
    CodecOnDemand,
    ImageOnDemand,
    TextOnDemand,
    making_room,
)
from skyreels_jax.components.prompt_cache import CachedTextEncoder, fingerprint
from skyreels_jax.components.protocols import (
    Components,
    TextEncoder,
)
from skyreels_jax.errors import RequestError
from skyreels_jax.generation import api
from skyreels_jax.generation.long_video import frames_in_turn
from skyreels_jax.generation.request import Request, ResolvedRequest
from skyreels_jax.generation.resolve import DTYPES, resolve
from skyreels_jax.generation.rollout import Kept, roll_out
from skyreels_jax.generation.video import Video
from skyreels_jax.media import ImageInput
from skyreels_jax.memory import refused_in_words
from skyreels_jax.prompts import Tokenizer
from skyreels_jax.sampling.denoiser import Denoiser
from skyreels_jax.sampling.progress import Clock, Progress
from skyreels_jax.shapes import Frames
from skyreels_jax.weights.complete import verify_checkpoint
from skyreels_jax.weights.convert_folder import convert_folder
from skyreels_jax.weights.diffusers_folder import require_parts

# Whose change changes a video.
MODEL_FILES: Final = frozenset({".safetensors", ".pth", ".bin", ".json", ".model"})
SMALLER_WINDOWS: Final = "use shorter windows (--base-num-frames), a smaller size or dtype"
SMALLER_DECODE: Final = "decode with vae_tiling (--vae-tiling on), or make a smaller size"


class Pipeline:
    """Makes videos from one checkpoint.

    ::

        pipe = Pipeline.from_pretrained("Skywork/SkyReels-V2-T2V-14B-540P")
        video = pipe("a cat walks through wet grass", num_frames=97, seed=1)
        video.save("cat.mp4")

    What a checkpoint can do is a property of the checkpoint and of the request, not of a class: an
    image makes it image-to-video where the checkpoint takes one.

    Attributes:
        checkpoint: the folder, understood.
        dtype: of the transformer and the encoders.
        components: encoders and VAE, each loaded when it is first used.
        verify: proves by headers that the checkpoint is complete, once; raises a WeightsError.
    """

    def __init__(
        self,
        checkpoint: Checkpoint,
        *,
        dtype: str = "bfloat16",
        backend: Backend = "jax",
        device: str = "auto",
        keep: bool = False,
        prompt_cache: Path | None = None,
        vae_tiling: VaeTiling = "auto",
        vae_dtype: str = "float32",
    ):
        """Nothing is loaded yet.

        Args:
            checkpoint: from :meth:`Checkpoint.open`.
            dtype: ``bfloat16`` or ``float32``, of the transformer and the encoders.
            backend: who runs encoders and VAE.
            device: of PyTorch's parts (backend ``hybrid``): ``cpu``, ``cuda`` or ``auto``.
            keep: keep every part in memory for the next call, instead of loading it again.
            prompt_cache: folder to keep encoded prompts in, for this and later processes; a prompt
                found there does not load the text encoder. ``None`` keeps none.
            vae_tiling: whether the VAE in JAX cuts frames into overlapping tiles, for less memory
                and faint seams: ``auto`` where it would not hold a whole frame, ``on`` or ``off``.
            vae_dtype: ``float32``, or ``bfloat16`` for a VAE in JAX that takes less memory at the
                cost in quality that ``docs/performance.md`` states.

        Raises:
            RequestError: ``dtype``, ``backend``, ``vae_tiling`` or ``vae_dtype`` is unknown or
                does not go with the others.
            UnsupportedError: the hybrid backend's PyTorch is not installed.
        """
        for name, value, known in (
            ("dtype", dtype, DTYPES),
            ("backend", backend, BACKENDS),
            ("vae_tiling", vae_tiling, VAE_TILINGS),
            ("vae_dtype", vae_dtype, DTYPES),
        ):
            if value not in known:
                raise RequestError(f"{name} {value!r} is unknown; there are {', '.join(known)}")
        if (backend, vae_tiling) == ("hybrid", "on"):
            raise RequestError("the hybrid backend's VAE has no tiles: leave vae_tiling out")
        if (backend, vae_dtype) == ("hybrid", "bfloat16"):
            raise RequestError("the hybrid backend's VAE runs in float32: leave vae_dtype out")
        self.checkpoint = checkpoint
        self.dtype = dtype
        kinds = jnp.dtype(dtype), jnp.dtype(vae_dtype)
        parts = PARTS[backend](checkpoint, *kinds, device, vae_tiling)
        # What has been proved need not be proved for every video; a refusal is not remembered.
        self.verify = cache(partial(verify_parts, checkpoint))
        kept = (lambda load: cache(making_room(load))) if keep else making_room
        self._denoiser = kept(self.load_denoiser)
        load_text = kept(parts.text_encoder)
        if prompt_cache is not None:
            made_by = (backend, dtype)
            load_text = partial(cached_text, load_text, checkpoint, prompt_cache, made_by)
        self._codec = kept(parts.codec)
        self.components = Components(
            TextOnDemand(load_text),
            CodecOnDemand(self._codec),
            ImageOnDemand(kept(parts.image_encoder)),
        )

    @classmethod
    def from_pretrained(
        cls,
        path_or_id: str | Path,
        *,
        revision: str | None = None,
        preset: str | None = None,
        **options: Any,
    ) -> "Pipeline":
        """Open a folder in either layout, or a Hugging Face id.

        Args:
            path_or_id: folder or id.
            revision: branch, tag or commit of an id.
            preset: name of the released checkpoint it is, where that is not plain.
            **options: of the constructor.
        """
        checkpoint = Checkpoint.open(path_or_id, revision=revision, preset=preset)
        return cls(checkpoint, **options)

    def __call__(
        self,
        prompt: str,
        *,
        image: ImageInput | None = None,
        progress: Progress | None = None,
        **settings: Any,
    ) -> Video:
        """Make a video that is held in memory.

        Args:
            prompt: what to show.
            image: the first frame: a PIL image, an array ``[height, width, 3]`` or a path.
            progress: told of every stage.
            **settings: as in :class:`~skyreels_jax.generation.request.Request`: ``num_frames``,
                ``height``, ``width``, ``steps``, ``guidance_scale``, ``seed`` and so on.

        Raises:
            RequestError: with everything about the request that is wrong.
            WeightsError: a part is missing, unsound or incomplete.
            NumericsError: something was not finite; says what and where.
        """
        known = {entry.name for entry in fields(Request)} - {"dtype", "output"}
        if unknown := settings.keys() - known:
            raise RequestError(
                f"no such settings: {', '.join(sorted(unknown))}; there are "
                f"{', '.join(sorted(known))}"
            )
        request = Request(prompt=prompt, image=image, dtype=self.dtype, **settings)
        resolved = resolve(request, self.checkpoint)
        if resolved.is_long:
            self.verify()
            with refused_in_words(SMALLER_WINDOWS):
                components = self._with_codec()
                return api.generate_long(components, self._denoiser, resolved, progress=progress)
        sampled = self.sample(resolved, progress)
        with refused_in_words(SMALLER_DECODE):
            return api.finish(self.components.codec, sampled)

    def sample(self, request: ResolvedRequest, progress: Progress | None = None) -> api.Sample:
        """Everything but decoding; the transformer is out of memory again afterwards.

        Raises:
            WeightsError: a part is missing, unsound or incomplete; before anything is encoded.
            UnsupportedError: the memory is not enough.
            NumericsError: something was not finite; says what and where.
        """
        self.verify()
        with refused_in_words("use fewer frames, a smaller size or a smaller dtype"):
            return api.sample(self.components, self._denoiser, request, progress=progress)

    def frames(
        self, request: ResolvedRequest, *, kept: Kept | None = None, clock: Clock | None = None
    ) -> Iterator[Frames]:
        """The frames of a video of any length, as they are finished.

        Memory does not grow with the length. The transformer stays in memory until the last
        window is made, and the VAE beside it.

        Args:
            request: settled.
            kept: where finished windows are kept and taken from.
            clock: times, reports, and may be asked to stop.

        Raises:
            WeightsError: a part is missing, unsound or incomplete; before anything is encoded.
            UnsupportedError: the memory is not enough.
            NumericsError: something was not finite; says what and where.
            Stopped: the clock was asked to.
        """
        self.verify()
        components = self._with_codec()
        rollout = roll_out(components, self._denoiser, request, clock or Clock(), kept=kept)
        with refused_in_words(SMALLER_WINDOWS):
            yield from frames_in_turn(rollout)

    def fingerprint(self) -> str:
        """A hash of all weights and settings that decide a video."""
        files = self.checkpoint.folder.rglob("*")
        return fingerprint((file for file in files if file.suffix in MODEL_FILES), self.dtype)

    def _with_codec(self) -> Components:
        """The VAE loaded: once for all windows, which need it in turn."""
        return replace(self.components, codec=self._codec())

    def write(self, sampled: api.Sample, path: Path, *, metadata: bool = True) -> None:
        """Decode into an MP4 piece by piece; see :func:`skyreels_jax.generation.api.write`."""
        with refused_in_words(SMALLER_DECODE):
            api.write(self.components.codec, sampled, path, metadata=metadata)

    def save_pretrained(
        self, folder: str | Path, *, dtype: DTypeLike | None = None, overwrite: bool = False
    ) -> None:
        """Write all parts in diffusers' layout, for diffusers and transformers to load.

        One tensor at a time, from the checkpoint's files to the new ones; nothing is kept loaded.

        Args:
            folder: to make; it appears complete or not at all.
            dtype: of the transformer; ``None`` keeps each tensor's, as the other parts do.
            overwrite: replace a folder that is there.

        Raises:
            RequestError: ``folder`` is there, or lies in the checkpoint or around it.
            WeightsError: a part is missing, unsound or incomplete, or the disk refuses.
        """
        require_parts(self.checkpoint.layout, self.checkpoint.config)
        convert_folder(
            self.checkpoint.layout,
            self.checkpoint.config,
            Path(folder),
            layout="diffusers",
            about=self.checkpoint.about,
            dtype=dtype,
            overwrite=overwrite,
        )

    def load_denoiser(self) -> Denoiser:
        """The transformer, read from the checkpoint anew.

        Raises:
            WeightsError: it is missing, unsound or incomplete.
        """
        model = load_transformer(self.checkpoint, dtype=jnp.dtype(self.dtype))
        return Denoiser(model, block_length=self.checkpoint.block_length)


def cached_text(
    load: Callable[[], TextEncoder], checkpoint: Checkpoint, folder: Path, made_by: Sequence[str]
) -> CachedTextEncoder:
    """What ``load`` gives, asked only for prompts that ``folder`` does not hold.

    Args:
        load: makes the text encoder.
        checkpoint: that it belongs to.
        folder: of the cache.
        made_by: what else, besides the checkpoint's files, decides an encoding.
    """
    paths = (checkpoint.text_encoder, checkpoint.tokenizer)
    files = [file for path in paths for file in (path, *path.rglob("*")) if file.is_file()]
    return CachedTextEncoder(load, folder, fingerprint(files, *made_by))


def verify_parts(checkpoint: Checkpoint) -> None:
    """Prove by headers that a checkpoint holds all that a generation takes; reads its tokenizer.

    Raises:
        WeightsError: a part is missing, unsound or incomplete.
    """
    Tokenizer.from_folder(checkpoint.tokenizer)
    verify_checkpoint(checkpoint.layout, checkpoint.config)
