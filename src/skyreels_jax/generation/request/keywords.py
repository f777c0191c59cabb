"""The settings of a call as typed keywords.

Written by ``python -m skyreels_jax.generation.request.documentation``.
"""

from collections.abc import Sequence
from fractions import Fraction
from pathlib import Path
from typing import TYPE_CHECKING, Literal, TypedDict

if TYPE_CHECKING:
    from skyreels_jax.media import ImageInput


class VideoSettings(TypedDict, total=False):
    """What a call of a pipeline takes beside the prompt; what is left out is chosen."""

    negative_prompt: str | None
    """What to keep away from; empty for nothing in particular."""

    image: "ImageInput | None"
    """The first frame."""

    last_image: "ImageInput | None"
    """The last frame; with DF, what comes right after it."""

    video: str | Path | None
    """A video to continue."""

    resolution: str | None
    """In place of height and width."""

    aspect: str | None
    """Width to height such as 9:16, or `image` for that of the image; keeps the area."""

    height: int | None
    """In pixels, a multiple of 16; together with width."""

    width: int | None
    """In pixels, a multiple of 16; together with height."""

    num_frames: int | None
    """4 k + 1; where a video is continued, with the frames taken over from it."""

    seconds: float | None
    """In place of num_frames; the nearest legal number is taken."""

    fps: int | float | str | Fraction | None
    """Frames a second, such as 24, 29.97 or 30000/1001."""

    reference_exact: bool | None
    """Round and continue windows as the original does, and refuse what it gets wrong."""

    steps: int | None
    """Steps of the solver."""

    guidance_scale: float | None
    """Scale of classifier-free guidance; at exactly 1 it is off."""

    shift: float | None
    """Shift of the sigmas towards noise."""

    seed: int | None
    """Seed of the noise, below 2**32, or below 2**64 with noise torch; -1 draws one."""

    noise: Literal["jax", "torch"] | None
    """Whose numbers a seed means; torch: those of PyTorch's CPU generator."""

    base_num_frames: int | None
    """Most frames that are made at once, 4 k + 1."""

    overlap_history: int | None
    """Frames that a window takes over from the one before, 4 k + 1."""

    ar_step: int | None
    """Steps by which each block of frames runs behind the one before; 0: together."""

    causal_block_size: int | None
    """Latent frames in a block."""

    addnoise_condition: int | None
    """Timestep to which given frames are noised where the model sees them."""

    addnoise_once: bool | None
    """The same such noise in every step: finished blocks are then not computed anew."""

    continuation: Literal["latents", "pixels"] | None
    """What a window is given of the one before: its latents, or its frames encoded anew."""

    causal_attention: int | None
    """Latent frames in a block of block-causal attention, for models that learned with it."""

    attention: Literal["xla", "chunked", "cudnn", "splash", "tokamax"] | None
    """Path that computes attention."""

    batched_guidance: bool | None
    """Both prompts in one call of the transformer, for twice the memory."""

    cache: Literal["none", "teacache", "easycache"] | None
    """Leave calls of the transformer out where little changes."""

    cache_threshold: float | None
    """How much change may go by before the transformer runs again."""

    use_ret_steps: bool | None
    """Teacache looks at the time embedding that the blocks take."""


class StreamSettings(TypedDict, total=False):
    """What a stream of a pipeline takes beside the prompt; what is left out is chosen."""

    negative_prompt: str | None
    """What to keep away from; empty for nothing in particular."""

    resolution: str | None
    """In place of height and width."""

    aspect: str | None
    """Width to height such as 9:16, or `image` for that of the image; keeps the area."""

    height: int | None
    """In pixels, a multiple of 16; together with width."""

    width: int | None
    """In pixels, a multiple of 16; together with height."""

    fps: int | float | str | Fraction | None
    """Frames a second, such as 24, 29.97 or 30000/1001."""

    seed: int | None
    """Seed of the noise, below 2**32, or below 2**64 with noise torch; -1 draws one."""

    attention: Literal["xla", "chunked", "cudnn", "splash", "tokamax"] | None
    """Path that computes attention."""

    image: "ImageInput | None"
    """The first frame."""

    video: str | Path | None
    """A video to continue; its own frames are not shown again."""

    overlap_history: int | None
    """Frames of it that are looked at, 4 k + 1."""

    seconds: float | None
    """How long it is."""

    steps: int | None
    """Steps of a block of frames."""

    causal_block_size: int | None
    """Latent frames that are made at once."""

    guidance_scale: float | None
    """Scale of classifier-free guidance; at exactly 1 it is off."""

    shift: float | None
    """Warps the timesteps towards noise."""

    timesteps: str | Sequence[float] | None
    """Of a block of frames, in place of steps; as they stand, or warped where shift is given."""

    rule: Literal["renoise", "euler"] | None
    """From one timestep to the next: new noise over what is predicted, or a step of Euler's."""

    window: int | None
    """Latent frames that attention sees, the block included."""

    sink: int | None
    """How many of them are the first of the video, which never leave."""

    positions: Literal["absolute", "relative"] | None
    """Of frames: in the video, for at most 1024 latent frames, or relative to the window."""

    recompute: Literal["never", "prompt", "block"] | None
    """For which changes keys and values are computed anew: another prompt, or every block."""

    context_noise: float | None
    """Timestep to which finished frames are noised where later ones see them."""

    change_noise: float | None
    """The same for what is before another prompt, where recompute is prompt: more lets go of it."""

    rolling: bool | None
    """Each block runs a step behind the one before, as many at once as there are steps."""

    first_block: int | None
    """Latent frames in the first block."""

    first_timesteps: str | Sequence[float] | None
    """Of the first block."""
