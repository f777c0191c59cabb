"""Streams of a pipeline: from keywords to one that is ready to run."""

import logging
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from typing import Unpack

from skyreels_jax.checkpoints import Checkpoint
from skyreels_jax.components.lazy import Lazy, Residency
from skyreels_jax.components.protocols import Components
from skyreels_jax.errors import RequestError
from skyreels_jax.generation.live import LiveStream
from skyreels_jax.generation.request.builder import warning_of_words
from skyreels_jax.generation.request.keywords import StreamSettings
from skyreels_jax.generation.request.kinds import Prompts
from skyreels_jax.generation.request.live import LiveRequest
from skyreels_jax.generation.request.resolve_live import resolve_live
from skyreels_jax.parallel.processes import current_processes
from skyreels_jax.sampling.denoiser import Denoiser
from skyreels_jax.sampling.progress import Clock, NoProgress, Progress
from skyreels_jax.weights.lora.binding import Lora
from skyreels_jax.weights.lora.stack import WithLoras, named

logger = logging.getLogger(__name__)


class WithStreams(WithLoras, ABC):
    """A pipeline that makes streams."""

    checkpoint: Checkpoint
    dtype: str
    weights: str | None
    offload: bool
    components: Components
    _denoiser: Lazy[Denoiser]
    _residency: Residency

    @abstractmethod
    def verify(self) -> None:
        """Prove that the checkpoint is complete."""

    def stream(
        self, prompt: str, *, progress: Progress | None = None, **settings: Unpack[StreamSettings]
    ) -> LiveStream:
        """A video that is made while it plays, block by block (``docs/live.md``).

        Args:
            prompt: what to show first; the stream takes another at any time.
            progress: told of loading and compiling.
            **settings: such as ``image``, ``seconds``, ``steps`` and ``window``; all are in
                ``docs/settings.md``.

        Raises:
            RequestError: with everything about the request that is wrong.
            WeightsError: a part is missing, unsound or incomplete.
        """
        chosen = {"dtype": self.dtype, "weights": self.weights, "offload": self.offload}
        stream = self.stream_request(
            LiveRequest.of({"prompt": prompt, **settings}, **chosen),
            Clock(progress or NoProgress()),
        )
        for warning in stream.request.warnings:
            logger.warning("%s", warning)
        return stream

    def stream_request(self, request: LiveRequest, clock: Clock | None = None) -> LiveStream:
        """The stream of a request, as :meth:`stream`, logging nothing."""
        if current_processes() is not None:
            raise RequestError("a stream is made by one process: start it without the others")
        memory = self._residency.free_memory()
        resolved = resolve_live(request, self.checkpoint, memory=memory, loras=self.loras)
        resolved = replace(resolved, video=replace(resolved.video, loras=named(self.loras)))
        self.verify()
        self._residency.decide(resolved.work)
        known = partial(in_known_words, self.checkpoint, loras=self.loras)
        return LiveStream(self.components, self._denoiser.get, resolved, known=known, clock=clock)


def in_known_words(checkpoint: Checkpoint, prompt: str, loras: Sequence[Lora] = ()) -> str:
    """A prompt that is given while a stream runs, as the model knows it; logs unknown words.

    Words that the transformer's ``loras`` were trained on are known.

    Raises:
        RequestError: it is empty.
    """
    if wrong := Prompts().violation(prompt):
        raise RequestError(f"`prompt` {wrong}")
    preset = checkpoint.guess.preset
    if preset is None or not preset.only_moving_shapes:
        return prompt
    if warning := warning_of_words(preset, [prompt], loras):
        logger.warning("%s", warning)
    return prompt.lower()
