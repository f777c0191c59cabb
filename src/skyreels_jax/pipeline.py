"""The public way to make videos: a checkpoint in, videos out.

Components are loaded when a stage needs them, in the order text encoder, image encoder,
transformer, VAE. Where memory does not hold all of them for the next video, each is let go of after
its stage: memory then holds one large model at a time.
"""

import logging
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from functools import cache, partial
from pathlib import Path
from typing import Any, Unpack

import jax
import numpy as np
from jax.typing import DTypeLike

from skyreels_jax.backends import OPTIONS, PipelineOptions, check_options, verify_checkpoint
from skyreels_jax.checkpoints import OPENING, Checkpoint, Opening, load_transformer
from skyreels_jax.components.lazy import (
    Lazy,
    LazyAutoencoder,
    LazyImageEncoder,
    LazyTextEncoder,
    PromptCache,
    Residency,
    fingerprint,
)
from skyreels_jax.components.protocols import Components
from skyreels_jax.generation.request.declaration import refuse_unknown
from skyreels_jax.generation.request.keywords import VideoSettings
from skyreels_jax.generation.request.resolve import needed_memory, resolve
from skyreels_jax.generation.request.resolved import ResolvedRequest
from skyreels_jax.generation.request.settings import Request
from skyreels_jax.generation.store import MemoryStore, WindowStore
from skyreels_jax.generation.streaming import WithStreams
from skyreels_jax.generation.together import share_request, shared_by_processes
from skyreels_jax.generation.video import (
    Video,
    decode_latents,
    settings_of,
    stream_frames,
    write_mp4,
)
from skyreels_jax.generation.window_generator import WindowGenerator
from skyreels_jax.parallel.processes import current_processes
from skyreels_jax.sampling.denoiser import Denoiser
from skyreels_jax.sampling.progress import Clock, NoProgress, Progress
from skyreels_jax.shapes import Frames, HostLatents
from skyreels_jax.weights.components.transformer import stored_transformer
from skyreels_jax.weights.convert_folder import convert_folder
from skyreels_jax.weights.lora.beside import exchange
from skyreels_jax.weights.lora.binding import Lora
from skyreels_jax.weights.lora.source import with_loras
from skyreels_jax.weights.lora.stack import as_loras, identities, named, plan_exchange
from skyreels_jax.weights.pipeline_folder import require_components

logger = logging.getLogger(__name__)


class _OpeningAndOptions(Opening, PipelineOptions, total=False):
    """What :meth:`Pipeline.from_pretrained` takes by name."""


class Pipeline(WithStreams):
    """Makes videos from one checkpoint.

    ::

        pipe = Pipeline.from_pretrained("Skywork/SkyReels-V2-T2V-14B-540P")
        video = pipe("a cat walks through wet grass", num_frames=97, seed=1)
        video.save("cat.mp4")

    What a checkpoint can do is a property of the checkpoint and of the request, not of a class: an
    image makes it image-to-video where the checkpoint takes one. Compiled programs are kept between
    calls: a second video of the same size compiles nothing.

    Attributes:
        checkpoint: the folder, understood.
        dtype: of the transformer and the encoders.
        weights: what their blocks' kernels are kept in; ``None`` is ``dtype``.
        offload: whether the transformer's stay in the host's memory.
        components: encoders and VAE, each loaded when it is first used.
        loras: what is added to the transformer; change it by :meth:`load_lora` and its opposite.
        parallelism: on what devices the transformer runs.
    """

    def __init__(self, checkpoint: Checkpoint, **options: Unpack[PipelineOptions]):
        """Nothing is loaded yet.

        Args:
            checkpoint: from :meth:`Checkpoint.open`.
            **options: how to compute; :class:`~skyreels_jax.backends.ChosenOptions` has them all
                with their defaults.

        Raises:
            RequestError: an option is unknown or does not go with the others.
            UnsupportedError: the hybrid backend's PyTorch is not installed.
        """
        chosen = self._chosen = check_options(**options)
        self.checkpoint, self.dtype = checkpoint, (dtype := chosen.dtype)
        self.weights, self.offload = chosen.weights, chosen.offload
        self.parallelism = chosen.parallelism(checkpoint.config)
        loaders = chosen.loaders(checkpoint, self.parallelism)
        self.loras = as_loras(chosen.loras)
        # What has been proved need not be proved for every video; a refusal is not remembered.
        self._verify = cache(partial(verify_checkpoint, checkpoint))
        stored = None
        if (prompt_cache := chosen.prompt_cache) is not None:
            made_by = (checkpoint.text_encoder, checkpoint.tokenizer)
            how = (chosen.backend, dtype, *chosen.quantized)
            stored = partial(PromptCache.open, prompt_cache, made_by, how)
        text_encoder = LazyTextEncoder(loaders.text_encoder, cache=stored)
        vae, image_encoder = LazyAutoencoder(loaders.vae), LazyImageEncoder(loaders.image_encoder)
        self.components = Components(text_encoder, vae, image_encoder)
        # Compiled programs outlive the transformer: its parameters are arguments of theirs.
        self._programs: dict[Any, jax.stages.Compiled] = {}
        self._denoiser = Lazy(self.load_denoiser)
        self._residency = Residency(
            {
                "text_encoder": text_encoder,
                "image_encoder": image_encoder,
                "transformer": self._denoiser,
                "vae": vae,
            },
            partial(chosen.sizes, checkpoint, self.parallelism.devices),
            chosen.keep,
            self.parallelism.free,
        )

    @classmethod
    def from_pretrained(
        cls,
        path_or_id: str | Path,
        **options: Unpack[_OpeningAndOptions],
    ) -> "Pipeline":
        """Open a folder in either layout, a file, or a Hugging Face id.

        Args:
            path_or_id: folder, file or id.
            **options: of :meth:`.Checkpoint.open` (``revision``, ``preset``, ``components``,
                ``vae``, ...) and of the constructor.
        """
        refuse_unknown(options, (*OPENING, *OPTIONS))
        given: Mapping[str, Any] = options
        opening: dict[str, Any] = {name: given[name] for name in given if name in OPENING}
        others: dict[str, Any] = {name: given[name] for name in given if name not in OPENING}
        return cls(Checkpoint.open(path_or_id, **opening), **others)

    def __call__(
        self,
        prompt: str | Sequence[str] | Mapping[int, str],
        *,
        progress: Progress | None = None,
        **settings: Unpack[VideoSettings],
    ) -> Video:
        """Make a video that is held in memory.

        Args:
            prompt: what to show; several for the windows of a long video.
            progress: told of every stage.
            **settings: of the video, such as ``image``, ``num_frames``, ``steps`` and ``seed``; all
                are in ``docs/settings.md``.

        Raises:
            RequestError: with everything about the request that is wrong.
            WeightsError: a part is missing, unsound or incomplete.
            NumericsError: something was not finite; says what and where.
        """
        if (processes := current_processes()) is None:
            resolved = self.resolve(prompt, **settings)
        else:  # What the first resolves, a drawn seed among it, is for all.
            resolved, _ = share_request(processes, lambda: (self.resolve(prompt, **settings), {}))
        store, clock = MemoryStore(), Clock(progress or NoProgress())
        generator = self._generator(resolved, store, clock)
        frames = list(stream_frames(generator, generator.make(resolved.windows[0])))
        about = settings_of(resolved)
        made = (np.concatenate(frames), resolved.fps, about, store.latents, clock.timings)
        return Video(*made, resolved.sound)

    def resolve(
        self,
        prompt: str | Sequence[str] | Mapping[int, str],
        **settings: Unpack[VideoSettings],
    ) -> ResolvedRequest:
        """Decide every setting of a video, as :meth:`__call__` does, without making it.

        Warnings are logged, and are in the result.

        Raises:
            RequestError: with everything about the request that is wrong.
        """
        chosen = {"dtype": self.dtype, "weights": self.weights, "offload": self.offload}
        resolved = self.resolve_request(Request.of({"prompt": prompt, **settings}, **chosen))
        for warning in resolved.warnings:
            logger.warning("%s", warning)
        return resolved

    def resolve_request(self, request: Request, memory: int | None = None) -> ResolvedRequest:
        """Decide every setting of a request, as :meth:`resolve`, logging nothing."""
        if memory is None:
            memory = self._residency.free_memory()
        resolved = resolve(request, self.checkpoint, memory=memory, loras=self.loras)
        return replace(resolved, loras=named(self.loras))

    def frames(
        self,
        request: ResolvedRequest,
        *,
        store: WindowStore | None = None,
        clock: Clock | None = None,
    ) -> Iterator[Frames]:
        """The frames of a video as they are finished, in memory that does not grow with its length.

        Args:
            request: from :meth:`resolve`.
            store: where finished windows are kept and taken from; ``None`` for nowhere.
            clock: times, reports, and may be asked to stop.

        Raises:
            WeightsError: a component is missing, unsound or incomplete; before anything is encoded.
            UnsupportedError: the memory is not enough.
            NumericsError: something was not finite; says what and where.
            Stopped: the clock was asked to.
        """
        return stream_frames(self._generator(request, store, clock))

    def write(
        self,
        request: ResolvedRequest,
        path: str | Path,
        *,
        progress: Progress | None = None,
        metadata: bool = True,
    ) -> Path:
        """Make a video straight into an MP4, in memory that does not grow with its length.

        Args:
            request: from :meth:`resolve`.
            path: ends in ``.mp4``; the file appears when all of it is written.
            progress: told of every stage.
            metadata: whether the MP4 carries the settings in its ``comment`` tag.

        Raises:
            RequestError: the path cannot be written to.
            SkyReelsError: as :meth:`frames`.
        """
        write_mp4(
            self.frames(request, clock=Clock(progress or NoProgress())),
            Path(path),
            fps=request.fps,
            size=(request.height, request.width),
            settings=settings_of(request) if metadata else None,
            sound=request.sound,
        )
        return Path(path)

    def decode(self, latents: HostLatents, clock: Clock | None = None) -> Iterator[Frames]:
        """The frames of finished latents of a video of one window, ``[16, F, H, W]``.

        Raises:
            WeightsError: the VAE is missing, unsound or incomplete.
            UnsupportedError: the memory is not enough.
            NumericsError: the VAE's output is not finite.
        """
        return decode_latents(self.components.vae, latents, clock or Clock())

    def __repr__(self) -> str:
        checkpoint = self.checkpoint
        kept = "".join(f", {name}" for name in self._chosen.quantized)
        made = f"{checkpoint.task}, {self.dtype}{kept}, backend {self._chosen.backend}"
        return f"<Pipeline {checkpoint.folder}: {made}>"

    def _generator(
        self, request: ResolvedRequest, store: WindowStore | None, clock: Clock | None
    ) -> WindowGenerator:
        self.verify()
        self.parallelism.check_rows(request.rows)
        if (processes := current_processes()) is not None:
            store, clock = shared_by_processes(processes, store, clock)
        work = needed_memory(request, self.checkpoint)
        self._residency.decide(work.total - work.weights)
        return WindowGenerator(
            self.components, self._denoiser.get, request, clock=clock, store=store
        )

    def fingerprint(self, *, times: bool = True) -> str:
        """A hash of all that decides a video; without ``times``, the same on every machine."""
        layout = self.checkpoint.layout
        key = [] if layout.weights_key is None else [f"weights_key {layout.weights_key}"]
        decided = self.dtype, *key, *self._chosen.quantized, *identities(self.loras)
        return fingerprint(layout.deciding_files, *decided, times=times)

    def verify(self) -> None:
        """Prove by headers that the checkpoint is complete and that LoRAs fit it, once.

        Raises:
            WeightsError: a component is missing, unsound or incomplete, or a LoRA does not fit.
        """
        self._verify(self.loras)

    def _exchange_loras(self, loras: tuple[Lora, ...]) -> None:
        stored, denoiser = stored_transformer(self.checkpoint.layout), self._denoiser
        merged, tensors = plan_exchange(stored, self.loras, loras, self._chosen.kernels)
        # If it fails half-way, the transformer is read anew when it is needed.
        loaded, denoiser.loaded = denoiser.loaded, None
        if loaded is not None:
            exchange(loaded.model, merged, tensors, **self._chosen.loading(self.parallelism))
        self.loras, denoiser.loaded = loras, loaded

    def save_pretrained(
        self, folder: str | Path, *, dtype: DTypeLike | None = None, overwrite: bool = False
    ) -> None:
        """Write all parts in diffusers' layout, for diffusers and transformers to load.

        One tensor at a time, from the checkpoint's files to the new ones; nothing is kept loaded.
        LoRAs are added to the transformer that is written.

        Args:
            folder: to make; it appears complete or not at all.
            dtype: of the transformer; ``None`` keeps each tensor's, as the other parts do.
            overwrite: replace a folder that is there and holds only what an earlier call wrote.

        Raises:
            RequestError: ``folder`` is there, or lies in the checkpoint or around it.
            WeightsError: a part is missing, unsound or incomplete, or the disk refuses.
        """
        require_components(self.checkpoint.layout, self.checkpoint.config)
        convert_folder(
            self.checkpoint.layout,
            with_loras(stored_transformer(self.checkpoint.layout), self.loras),
            Path(folder),
            format="diffusers",
            about=self.checkpoint.about,
            dtype=dtype,
            overwrite=overwrite,
        )

    def load_denoiser(self) -> Denoiser:
        """The transformer, read from the checkpoint anew.

        Raises:
            WeightsError: it is missing, unsound or incomplete.
        """
        how = self._chosen.loading(self.parallelism)
        model = load_transformer(self.checkpoint, loras=self.loras, **how)
        kept = self.checkpoint.block_length, self._programs
        return Denoiser(model, *kept, self.parallelism)
