"""``skyreels-jax generate``: a prompt, perhaps an image, and an MP4.

Flags of the original's scripts are accepted as they are, beside ours.
"""

import argparse
import math
import statistics
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Final

from skyreels_jax.caches import enable_compilation_cache, prompt_cache_folder
from skyreels_jax.checkpoints import Checkpoint
from skyreels_jax.cli import dry_run
from skyreels_jax.cli.progress import console_progress
from skyreels_jax.errors import RequestError, SkyReelsError, UnsupportedError
from skyreels_jax.generation.api import Sample
from skyreels_jax.generation.codec import VAE_TILINGS
from skyreels_jax.generation.latents_file import load_latents, save_latents
from skyreels_jax.generation.progress import Timings
from skyreels_jax.generation.request import Request, ResolvedRequest
from skyreels_jax.generation.resolve import DTYPES, resolve
from skyreels_jax.generation.sizes import RESOLUTIONS
from skyreels_jax.media import check_output, write_settings
from skyreels_jax.ops.attention import PATHS
from skyreels_jax.ops.kernels.contract import Call, this_device
from skyreels_jax.pipeline import BACKENDS, Pipeline
from skyreels_jax.weights.parts import stored_vae

DEFAULT_OUTPUT: Final = Path("out.mp4")
LATENTS_SUFFIX: Final = ".latents.safetensors"
# A dry run tells what does not fit by itself, stage by stage.
UNLIMITED: Final = sys.maxsize
# In the order they are printed; the rest of a request has no default worth telling.
REPORTED: Final = (
    *("height", "width", "num_frames", "fps", "steps", "guidance_scale", "shift", "seed"),
    "negative_prompt",
)


def add_parser(subparsers: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Add the ``generate`` verb."""
    parser = subparsers.add_parser(
        "generate",
        help="make a video from a prompt, and an image where the checkpoint takes one",
        description="Make a video. Settings that are not given come from the checkpoint's preset "
        "and are printed with their source.",
    )
    _add_checkpoint(parser.add_argument_group("checkpoint"))
    _add_content(parser.add_argument_group("what to show"))
    _add_size(parser.add_argument_group("size and length"))
    _add_sampling(parser.add_argument_group("sampling"))
    _add_running(parser.add_argument_group("running"))
    _add_output(parser.add_argument_group("output"))
    parser.set_defaults(run=run)


def _add_checkpoint(group: Any) -> None:
    group.add_argument(
        "--model",
        "--model_id",
        required=True,
        metavar="DIR_OR_ID",
        help="checkpoint folder (original or diffusers layout) or Hugging Face id",
    )
    group.add_argument("--revision", help="branch, tag or commit of a Hugging Face id")
    group.add_argument("--preset", help="which released checkpoint it is, if that is not plain")


def _add_content(group: Any) -> None:
    group.add_argument("--prompt", required=True, help="what the video shows")
    group.add_argument("--negative-prompt", "--negative_prompt", metavar="TEXT")
    group.add_argument("--image", metavar="FILE", help="the first frame")
    group.add_argument(
        "--last-image", "--end_image", metavar="FILE", help="the last frame (FLF2V checkpoints)"
    )


def _add_size(group: Any) -> None:
    group.add_argument("--resolution", metavar="|".join(RESOLUTIONS))
    group.add_argument("--aspect", metavar="W:H", help="for example 9:16; keeps the area")
    group.add_argument("--height", type=int, metavar="PIXELS", help="a multiple of 16")
    group.add_argument("--width", type=int, metavar="PIXELS", help="a multiple of 16")
    group.add_argument("--num-frames", "--num_frames", type=int, metavar="N", help="4 k + 1")
    group.add_argument("--seconds", type=float, help="in place of --num-frames")
    group.add_argument("--fps", type=int)


def _add_sampling(group: Any) -> None:
    group.add_argument("--steps", "--inference_steps", "--num_inference_steps", type=int)
    group.add_argument("--guidance-scale", "--guidance_scale", type=float, metavar="X")
    group.add_argument("--shift", type=float, help="of the noise levels")
    group.add_argument("--seed", type=int)


def _add_running(group: Any) -> None:
    group.add_argument("--dtype", default="bfloat16", metavar="|".join(DTYPES))
    group.add_argument(
        "--attention",
        metavar="PATH",
        help=f"{', '.join(PATHS)}; chosen by device and shape if not given",
    )
    group.add_argument(
        "--batched-guidance",
        action="store_true",
        help="both prompts in one call of the transformer, for twice the memory",
    )
    group.add_argument(
        "--backend",
        default="jax",
        choices=BACKENDS,
        help="who runs the encoders and the VAE: JAX, or PyTorch (hybrid; default: jax)",
    )
    group.add_argument(
        "--vae-tiling",
        default="auto",
        choices=VAE_TILINGS,
        help="let the VAE cut frames into tiles, for less memory and faint seams (default: auto, "
        "where a whole frame would not fit)",
    )
    group.add_argument(
        "--vae-dtype",
        default="float32",
        metavar="|".join(DTYPES),
        help="of the VAE; bfloat16 saves memory and costs quality (default: float32)",
    )
    group.add_argument(
        "--dry-run",
        action="store_true",
        help="say what each stage will take, and whether that is there; read no weight",
    )
    group.add_argument(
        "--no-prompt-cache",
        action="store_true",
        help="neither look up nor keep encoded prompts on disk",
    )


def _add_output(group: Any) -> None:
    group.add_argument("--output", type=Path, default=DEFAULT_OUTPUT, metavar="FILE.mp4")
    group.add_argument(
        "--overwrite", action="store_true", help="replace the output file if there is one"
    )
    group.add_argument(
        "--keep-latents",
        action="store_true",
        help=f"keep the denoised latents beside the video ({LATENTS_SUFFIX})",
    )
    group.add_argument(
        "--resume-latents",
        type=Path,
        metavar="FILE",
        help="decode latents that an earlier run left, instead of denoising",
    )
    group.add_argument("--sidecar", action="store_true", help="write the settings as .json too")
    group.add_argument(
        "--no-metadata", action="store_true", help="leave the settings out of the video file"
    )


def run(args: argparse.Namespace) -> int:
    """Generate; 0, or a SkyReelsError before anything expensive has started."""
    if args.dry_run and args.resume_latents:
        raise RequestError("--dry-run plans a whole generation: leave --resume-latents out")
    check_output(args.output)
    sidecar = args.output.with_suffix(".json")
    latents = args.resume_latents or args.output.with_suffix(LATENTS_SUFFIX)
    made = [args.output, *([sidecar] if args.sidecar else [])]
    for path in made if args.resume_latents else [*made, latents]:
        check_not_there(path, args.overwrite)
    enable_compilation_cache()
    checkpoint = Checkpoint.open(args.model, revision=args.revision, preset=args.preset)
    pipeline = Pipeline(
        checkpoint,
        backend=args.backend,
        dtype=args.dtype,
        prompt_cache=None if args.no_prompt_cache else prompt_cache_folder(),
        vae_tiling=args.vae_tiling,
        vae_dtype=args.vae_dtype,
    )
    if args.dry_run:
        request = settle(args, checkpoint, memory=UNLIMITED)
        pipeline.verify()
        vae = (args.vae_tiling, args.vae_dtype)
        return dry_run.report(checkpoint, request, args.backend, *vae)
    with console_progress() as progress:
        if args.resume_latents:
            stored_vae(checkpoint.layout).verify()
            sampled = load_latents(latents)
            sampled.clock.progress = progress
        else:
            sampled = pipeline.sample(settle(args, checkpoint), progress)
            save_latents(latents, sampled)
        decode(pipeline, sampled, args.output, latents, metadata=not args.no_metadata)
    if args.sidecar:
        write_settings(sidecar, sampled.settings)
    if not (args.keep_latents or args.resume_latents):
        latents.unlink(missing_ok=True)
    for line in summarise(sampled.timings):
        print(line)
    print(f"wrote {args.output} ({sampled.num_frames} frames, {sampled.fps} frames a second)")
    return 0


def check_not_there(path: Path, overwrite: bool) -> None:
    """Refuse to replace a file that nobody said may go."""
    if path.is_file() and not overwrite:
        raise RequestError(f"{path} exists: give another --output, or --overwrite to replace it")


def settle(
    args: argparse.Namespace, checkpoint: Checkpoint, *, memory: int | None = None
) -> ResolvedRequest:
    """Decide every setting and say what it is.

    ``memory`` is what the transformer may take, in bytes; ``None`` for what is free.
    """
    request = resolve(request_of(args), checkpoint, memory=memory)
    for line in describe(checkpoint, request):
        print(line, flush=True)
    check_attention(checkpoint, request)
    return request


def check_attention(checkpoint: Checkpoint, request: ResolvedRequest) -> None:
    """Refuse an attention path that cannot run here, before anything is loaded for it."""
    if request.attention is None:
        return
    config = checkpoint.config
    tokens = math.prod(request.latent_shape) // math.prod(config.patch_size)
    query = (1, tokens, config.num_heads, config.head_dim)
    if reason := PATHS[request.attention].refusal(
        Call(this_device(), request.dtype, query, tokens)
    ):
        raise UnsupportedError(f"--attention {request.attention} cannot be used: {reason}")


def decode(
    pipeline: Pipeline, sampled: Sample, output: Path, latents: Path, *, metadata: bool
) -> None:
    """Decode into ``output``; what stops it leaves ``latents`` and says how to go on from there."""
    again = f"the denoised latents are kept; decode them again with --resume-latents {latents}"
    try:
        pipeline.write(sampled, output, metadata=metadata)
    except (SkyReelsError, OSError, MemoryError, RuntimeError) as error:
        raise SkyReelsError(f"decoding failed: {error}; {again}") from error
    except KeyboardInterrupt:
        print(again, file=sys.stderr)
        raise


def request_of(args: argparse.Namespace) -> Request:
    """The request that the flags spell."""
    return Request(
        prompt=args.prompt,
        negative_prompt=args.negative_prompt,
        image=args.image,
        last_image=args.last_image,
        resolution=args.resolution,
        aspect=args.aspect,
        height=args.height,
        width=args.width,
        num_frames=args.num_frames,
        seconds=args.seconds,
        steps=args.steps,
        guidance_scale=args.guidance_scale,
        shift=args.shift,
        fps=args.fps,
        seed=args.seed,
        dtype=args.dtype,
        attention=args.attention,
        batched_guidance=args.batched_guidance,
        output=args.output,
    )


def describe(checkpoint: Checkpoint, request: ResolvedRequest) -> Iterator[str]:
    """What will be done, each setting with where it came from."""
    name = checkpoint.guess.preset.name if checkpoint.guess.preset else "no released checkpoint"
    yield f"checkpoint: {request.model} ({name}: {checkpoint.guess.reason})"
    for setting in REPORTED:
        value = getattr(request, setting)
        shown = shortened(value) if isinstance(value, str) else value
        yield f"  {setting.replace('_', '-'):<16} {shown}  [{request.sources[setting]}]"
    for notice in request.notices:
        yield f"note: {notice}"


def shortened(text: str, limit: int = 60) -> str:
    """``text`` in quotes, cut with its length named."""
    return repr(text) if len(text) <= limit else f"{text[:limit]!r}... ({len(text)} characters)"


def summarise(timings: Timings) -> Iterator[str]:
    """Seconds by stage, compilation apart from running."""
    for stage, seconds in timings.stages.items():
        detail = ""
        if stage == "denoise" and timings.steps:
            detail = f" ({statistics.median(timings.steps):.2f} s a step)"
        yield f"  {stage:<10} {seconds:8.2f} s{detail}"
