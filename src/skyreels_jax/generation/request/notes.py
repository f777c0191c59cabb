"""What a user should know of a request that is legal: what does nothing in it, what is unusual.

Each note is one line, with settings by their keyword in backticks. Nothing is noted of what nobody
asked for: defaults are the checkpoint's business.
"""

from collections.abc import Iterator
from typing import Final

from skyreels_jax.checkpoints import Checkpoint
from skyreels_jax.diffusion.step_cache import step_cache
from skyreels_jax.generation.request.declaration import described
from skyreels_jax.generation.request.resolved import Forcing, ResolvedRequest
from skyreels_jax.generation.request.settings import Request, declared
from skyreels_jax.geometry import pixel_frames

# Frame rates that a model with an embedding for them has learned.
_LEARNED_RATES: Final = (16, 24)
# Frame rates this near are one: 23.976 is 24.
_SAME_RATE: Final = 0.01
# Parts of the checkpoint's area and times its frames that give no warning.
_AREA: Final = (0.4, 2.1)
FRAMES_LEARNED: Final = 1.5
# Longer to shorter side.
_SLENDER: Final = 2.4


def notes(request: Request, resolved: ResolvedRequest, checkpoint: Checkpoint) -> Iterator[str]:
    """A line for each setting that does nothing in this video, or is far from what is usual.

    Args:
        request: as asked for.
        resolved: with everything decided.
        checkpoint: what it is asked of.
    """
    for name, setting in declared().items():
        value = getattr(request, name)
        if value is not None and (odd := setting.kind.unusual(value)):
            yield f"`{name}` {described(value)} {odd}"
    yield from _of_prompts(request, resolved)
    yield from _of_guidance(request, resolved)
    yield from _of_size(request, resolved, checkpoint)
    yield from _of_rate(request, resolved, checkpoint)
    yield from _of_last_image(request, checkpoint)
    yield from _of_cache(resolved)
    if resolved.forcing is not None:
        if request.addnoise_condition and not any(window.prefix for window in resolved.windows):
            yield (
                "`addnoise_condition` does nothing: no frames are given, by `image`, `video` or an "
                "earlier window"
            )
        yield from _of_blocks(request, resolved, resolved.forcing)
        yield from _of_attention(request, resolved, checkpoint)


def _of_prompts(request: Request, resolved: ResolvedRequest) -> Iterator[str]:
    if isinstance(request.prompt, tuple) and len(request.prompt) > 1:
        yield (
            f"{len(request.prompt)} prompts are for the {len(resolved.windows)} windows of one "
            "video, in turn; for a video of each, call once for each"
        )


def _of_guidance(request: Request, resolved: ResolvedRequest) -> Iterator[str]:
    scale = resolved.guidance_scale
    if not resolved.is_guided:
        for name in ("negative_prompt", "batched_guidance"):
            if getattr(request, name):
                yield f"`{name}` does nothing: guidance is off at `guidance_scale` {scale:g}"
    elif scale == 0:
        yield "`guidance_scale` 0: `prompt` does nothing, only `negative_prompt` is followed"
    elif scale < 1:
        yield f"`guidance_scale` {scale:g}: below 1, `prompt` is followed less than without it"
    elif set(resolved.prompts) == {resolved.negative_prompt}:
        yield "`prompt` and `negative_prompt` are the same: guidance does nothing"


def _of_size(request: Request, resolved: ResolvedRequest, checkpoint: Checkpoint) -> Iterator[str]:
    """Far from the size and the length that the checkpoint was made for."""
    height, width = checkpoint.defaults.resolution.value
    area = resolved.height * resolved.width / (height * width)
    sides = sorted((resolved.height, resolved.width))
    if resolved.sources.get("height") == "given" or request.aspect is not None:
        made_for = f"the checkpoint was made for {height} x {width} (`height` x `width`)"
        size = f"{resolved.height} x {resolved.width}"
        if not _AREA[0] <= area <= _AREA[1]:
            yield f"{made_for}; {size} has {area:.1%} of its area: expect blur or repetitions"
        elif sides[1] / sides[0] > _SLENDER:
            yield f"{made_for}; {size} is far from its shape: expect repetitions"


def _of_rate(request: Request, resolved: ResolvedRequest, checkpoint: Checkpoint) -> Iterator[str]:
    """A rate that the model does not know is that of the file alone."""
    if request.fps is None:
        return
    rate, made_for = float(resolved.fps), float(checkpoint.defaults.fps.value)
    known = f"the checkpoint was made for {made_for:g} frames a second"
    if checkpoint.config.inject_sample_info:
        if any(abs(rate / learned - 1) < _SAME_RATE for learned in _LEARNED_RATES):
            return
        made_for, known = 24.0, "the checkpoint knows 16 and 24 frames a second, and moves as at 24"
    if abs(rate / made_for - 1) >= _SAME_RATE:
        yield f"`fps` {rate:.5g}: {known}; this video plays {rate / made_for:.2g} times as fast"


def _of_last_image(request: Request, checkpoint: Checkpoint) -> Iterator[str]:
    """A model takes it for what its training showed it."""
    preset = checkpoint.guess.preset
    if request.last_image is None or preset is None or preset.learned_last_image:
        return
    if request.image is None:
        yield (
            f"`last_image` without `image`: {preset.name} has learned to go on from a first frame "
            "only, and may begin with this one instead of ending with it; give `image` too"
        )


def _of_cache(resolved: ResolvedRequest) -> Iterator[str]:
    cache = resolved.cache
    if cache.name == "none" or cache.original_counter:
        return
    behind = resolved.forcing is not None and resolved.forcing.ar_step > 0
    if cache.threshold == 0:
        yield f"`cache` {cache.name} does nothing: `cache_threshold` 0 leaves nothing out"
        return
    made = step_cache(cache, resolved.steps)
    kept = int(getattr(made, "first", 0)) + int(getattr(made, "last", 0))
    if not behind and kept >= resolved.steps:
        yield (
            f"`cache` {cache.name} does nothing in {resolved.steps} `steps`: it computes {kept} in "
            "full at the start and the end"
        )


def length_notes(
    request: Request, resolved: ResolvedRequest, checkpoint: Checkpoint
) -> Iterator[str]:
    """As :func:`notes`, of how many frames there are, and in how many windows."""
    usual, at_once = checkpoint.defaults.num_frames.value, pixel_frames(resolved.window_shape[0])
    if at_once > FRAMES_LEARNED * usual:
        yield (
            f"{at_once} frames are made at once; the checkpoint was made for {usual}: expect "
            "motion that repeats or stops"
        )
    frames = resolved.num_frames
    if resolved.forcing is not None and not resolved.is_long:
        alone = f"the {frames} frames are made at once (`base_num_frames` makes windows)"
        for name in ("overlap_history", "continuation"):
            if getattr(request, name) is not None:
                yield f"`{name}` does nothing: {alone}"
        if request.base_num_frames is not None and request.base_num_frames > frames:
            yield f"`base_num_frames` {request.base_num_frames} does nothing: there are {frames}"


def _of_blocks(request: Request, resolved: ResolvedRequest, forcing: Forcing) -> Iterator[str]:
    """Blocks and how far they run behind each other."""
    window = max(resolved.windows, key=lambda window: window.frames - window.prefix)
    made, block = window.frames - window.prefix, forcing.causal_block_size
    asked = request.causal_block_size is not None
    if asked and block > made:
        yield (
            f"`causal_block_size` {block} is longer than the {made} latent frames that a window "
            "makes: they are one block"
        )
    elif asked and block > 1 and forcing.ar_step == 0:
        yield f"`causal_block_size` {block} does nothing with `ar_step` 0: all blocks move together"
    if not request.ar_step:
        return
    if made <= block:
        yield f"`ar_step` {forcing.ar_step} does nothing: a window makes one block of frames"
    elif forcing.ar_step > resolved.steps:
        yield (
            f"`ar_step` {forcing.ar_step} is more than the {resolved.steps} steps: it does the "
            f"same as {resolved.steps}, one block after the other"
        )


def _of_attention(
    request: Request, resolved: ResolvedRequest, checkpoint: Checkpoint
) -> Iterator[str]:
    """Block-causal attention is learned."""
    asked, learned = request.causal_attention, checkpoint.block_length
    if asked is None:
        return
    if asked >= resolved.window_shape[0]:
        yield f"`causal_attention` {asked} does nothing: a window has {resolved.window_shape[0]}"
    elif learned is None:
        yield (
            f"`causal_attention` {asked}: the checkpoint has not learned it, and makes worse "
            "videos with it; leave it out"
        )
    elif asked != learned:
        yield f"`causal_attention` {asked}: the checkpoint has learned it with blocks of {learned}"
