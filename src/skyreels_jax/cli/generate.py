"""``skyreels-jax generate``: a prompt, perhaps an image, and an MP4.

Flags of the original's scripts are accepted as they are, beside ours.
"""

import argparse
import math
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from typing import Final

from skyreels_jax.checkpoints import Checkpoint
from skyreels_jax.cli import dry_run
from skyreels_jax.cli.job import begin, decode_file, go_on, open_pipeline
from skyreels_jax.cli.products import JOB_SUFFIX, Products
from skyreels_jax.cli.report import describe
from skyreels_jax.cli.together import check_together, follow, join, lead
from skyreels_jax.errors import RequestError, UnsupportedError
from skyreels_jax.files import read_text
from skyreels_jax.generation.request.declaration import in_flags
from skyreels_jax.generation.request.resolved import ResolvedRequest
from skyreels_jax.generation.request.settings import Request, declared, keywords
from skyreels_jax.generation.store import SavedLatents
from skyreels_jax.ops.attention import ATTENTION_PATHS
from skyreels_jax.ops.kernels.contract import AttentionCall
from skyreels_jax.ops.target import target_device
from skyreels_jax.outputs import locked
from skyreels_jax.pipeline import Pipeline
from skyreels_jax.weights.components.transformer import stored_transformer
from skyreels_jax.weights.components.vae import stored_vae
from skyreels_jax.weights.lora.source import bound_to

# A dry run tells what does not fit by itself, stage by stage.
UNLIMITED: Final = sys.maxsize
# What decides how a video is made; with finished latents nothing is.
_MAKING: Final = (
    "prompt_file",
    "job",
    "keep_job",
    "keep_latents",
    "preview",
    "no_prompt_cache",
    "lora",
    "mesh",
)


def run(args: argparse.Namespace) -> int:
    """Generate; 0, or a SkyReelsError before anything expensive has started."""
    check_prompt(args)
    if args.dry_run and args.resume_latents:
        raise RequestError("--dry-run plans a whole generation: leave --resume-latents out")
    if args.dry_run and args.mesh:
        raise RequestError("--dry-run counts the memory of one device: leave --mesh out")
    check_together(args, vars(args))
    processes = join(args)
    if processes is not None and not processes.first:
        return follow(processes)
    products = _products(args)
    products.check(overwrite=args.overwrite)
    if args.dry_run:
        pipeline = open_pipeline(vars(args))
        request = resolve_and_print(args, pipeline, memory=UNLIMITED)
        pipeline.verify()
        vae = (args.vae_tiling, args.vae_dtype)
        return dry_run.report(pipeline.checkpoint, request, args.backend, *vae)
    with ExitStack() as held:
        held.enter_context(locked(args.output, "output"))
        if products.job is not None:
            held.enter_context(locked(products.job, "job"))
        # Again: who held the lock may have written since.
        products.check(overwrite=args.overwrite)
        pipeline = open_pipeline(vars(args))
        if args.resume_latents:
            _say(unused_flags(args))
            saved = SavedLatents.open(args.resume_latents)
            stored_vae(pipeline.checkpoint.layout).verify()
            return decode_file(args, pipeline, saved)
        if args.mesh:
            print(f"mesh: {pipeline.parallelism}", flush=True)
        request = resolve_and_print(args, pipeline)
        job = begin(args, pipeline, request, products)
        lead(job)
        return go_on(pipeline, job)


def check_prompt(args: argparse.Namespace) -> None:
    """Refuse a run without a prompt, unless finished latents are decoded.

    Raises:
        RequestError: there is none.
    """
    if not (args.prompt or args.prompt_file or args.resume_latents):
        raise RequestError(
            "`prompt` is missing: say what the video should show, or give `prompt_file`"
        )


def _products(args: argparse.Namespace) -> Products:
    decoding = args.resume_latents is not None
    return Products(
        args.output,
        None if decoding else args.job or args.output.with_suffix(JOB_SUFFIX),
        has_settings=args.sidecar,
        has_latents=args.keep_latents and not decoding,
        has_previews=args.preview and not decoding,
    )


def resolve_and_print(
    args: argparse.Namespace, pipeline: Pipeline, *, memory: int | None = None
) -> ResolvedRequest:
    """Decide every setting and say what it is.

    ``memory`` is what the transformer may take, in bytes; ``None`` for what is free.
    """
    checkpoint = pipeline.checkpoint
    request = pipeline.resolve_request(request_of(args), memory)
    for line in describe(checkpoint, request):
        print(line, flush=True)
    if pipeline.loras:
        transformer = stored_transformer(checkpoint.layout)
        for lora in pipeline.loras:
            summary = bound_to(transformer, lora.path).summary()
            print(f"LoRA {lora.path}, scale {lora.scale:g}: {summary}", flush=True)
    _say(unused_flags(args, len(request.windows)))
    check_attention(checkpoint, request)
    return request


def unused_flags(args: argparse.Namespace, windows: int = 1) -> Iterator[str]:
    """A note for the flags that do nothing; ``windows`` is the number of the video's windows."""
    if args.resume_latents:
        names = [*(name for name in declared() if name not in ("dtype", "output")), *_MAKING]
        given = [f"`{name}`" for name in names if getattr(args, name) not in (None, False, [])]
        if given:
            verb = "does" if len(given) == 1 else "do"
            yield f"`resume_latents` decodes what is finished: {', '.join(given)} {verb} nothing"
    elif windows == 1 and args.preview:
        yield "`preview`: the video has one window, whose strip is written at the end"
    elif windows > 1 and args.keep_latents:
        yield (
            f"`keep_latents` does nothing: the video has {windows} windows; `keep_job` keeps their "
            "latents"
        )


def _say(notes: Iterable[str]) -> None:
    for note in notes:
        print(in_flags(f"note: {note}"), flush=True)


def check_attention(checkpoint: Checkpoint, request: ResolvedRequest) -> None:
    """Refuse an attention path that cannot run here, before anything is loaded for it."""
    if request.attention is None:
        return
    config = checkpoint.config
    tokens = math.prod(request.latent_shape) // math.prod(config.patch_size)
    query = (1, tokens, config.num_heads, config.head_dim)
    if reason := ATTENTION_PATHS[request.attention].refusal(
        AttentionCall(target_device(), request.dtype, query, tokens)
    ):
        raise UnsupportedError(f"--attention {request.attention} cannot be used: {reason}")


def request_of(args: argparse.Namespace) -> Request:
    """The request that the flags spell.

    Raises:
        RequestError: a value is of the wrong kind.
    """
    given = {name: getattr(args, name) for name in keywords() if name != "prompt"}
    given = {name: value for name, value in given.items() if value is not None}
    others = {"dtype": args.dtype, "weights": args.weights, "output": args.output}
    others["offload"] = bool(args.offload)
    return Request.of({"prompt": prompts_of(args), **given}, **others)


def prompts_of(args: argparse.Namespace) -> Sequence[str] | Mapping[int, str]:
    """The prompts in order, or by frame from a file."""
    if args.prompt_file is None:
        return args.prompt
    lines = read_text(args.prompt_file, "--prompt-file").splitlines()
    prompts: dict[int, str] = {}
    for number, line in enumerate(lines, 1):
        frame, colon, prompt = line.partition(":")
        if not line.strip():
            continue
        if not (colon and frame.strip().isdecimal() and prompt.strip()):
            raise RequestError(
                f"--prompt-file {args.prompt_file}, line {number}: {line!r}; expected `frame: "
                "prompt`, for example `0: a cat sleeps`"
            )
        if int(frame) in prompts:
            raise RequestError(
                f"--prompt-file {args.prompt_file}, line {number}: frame {int(frame)} has a prompt "
                "already"
            )
        prompts[int(frame)] = prompt.strip()
    return prompts
