"""From a resolved request to an MP4 on the command line: a job folder, and going on with it.

Finished windows, one of them for a short video, are on disk before they are decoded, so that
whatever stops the run costs none of them.
"""

import argparse
import logging
import shlex
import sys
from collections.abc import Mapping
from contextlib import nullcontext, suppress
from fractions import Fraction
from pathlib import Path
from typing import Any, Final

import av

from skyreels_jax.checkpoints import OPENING, Checkpoint
from skyreels_jax.cli.products import Products, place_video, with_strips, write_derived
from skyreels_jax.cli.report import console_progress, summarise
from skyreels_jax.components.lazy import Keep
from skyreels_jax.errors import RequestError, SkyReelsError, Stopped
from skyreels_jax.evaluation.drift import DriftMeter
from skyreels_jax.files import LATENTS_SUFFIX, reason_of
from skyreels_jax.generation.job_folder import FolderStore
from skyreels_jax.generation.request.resolved import ResolvedRequest
from skyreels_jax.generation.store import SavedLatents
from skyreels_jax.generation.video import settings_of, write_mp4
from skyreels_jax.hub import enable_compilation_cache, prompt_cache_folder
from skyreels_jax.interrupt import StopRequest, deferred, stop_requested
from skyreels_jax.media import write_settings
from skyreels_jax.outputs import fallback_folders, free_name, path_of, state_of
from skyreels_jax.pipeline import Pipeline
from skyreels_jax.sampling.progress import Clock, Timings
from skyreels_jax.weights.lora.stack import as_loras

# Flags that decide the pipeline, which a job remembers, and the types of their values.
_OPTIONS: Final[Mapping[str, tuple[type, ...]]] = {
    **dict.fromkeys(("model", "backend", "dtype", "vae_tiling", "vae_dtype"), (str,)),
    **dict.fromkeys(OPENING, (str, type(None))),
    "no_prompt_cache": (bool,),
    "lora": (list,),
    "mesh": (str, type(None)),
}
# Those of them that may be paths.
_PATHS: Final = ("model", "components", "vae", "text_encoder", "image_encoder")
# What else a job remembers.
_HOW: Final[Mapping[str, tuple[type, ...]]] = {
    **_OPTIONS,
    **dict.fromkeys(("weights", "output"), (str,)),
    **dict.fromkeys(("metadata", "sidecar", "preview", "keep_job", "keep_latents"), (bool,)),
    "made_from": (dict, type(None)),
}
# What is turned into one line that says how to go on.
_FAILURES: Final = (SkyReelsError, OSError, MemoryError, RuntimeError, av.FFmpegError)

logger = logging.getLogger(__name__)


def open_pipeline(options: Mapping[str, Any], *, keep: Keep = False) -> Pipeline:
    """A pipeline with the caches of the command line; nothing of its weights is read.

    Args:
        options: flags, or what a job remembers of them.
        keep: whether its components stay in memory for the next video.
    """
    enable_compilation_cache()
    opening: Mapping[str, Any] = {name: options[name] for name in OPENING}
    checkpoint = Checkpoint.open(options["model"], **opening)
    return Pipeline(
        checkpoint,
        backend=options["backend"],
        dtype=options["dtype"],
        keep=keep,
        prompt_cache=None if options["no_prompt_cache"] else prompt_cache_folder(),
        vae_tiling=options["vae_tiling"],
        vae_dtype=options["vae_dtype"],
        weights=options["weights"],
        offload=bool(options["offload"]),
        loras=as_loras(options["lora"]),
        mesh=options["mesh"],
    )


def begin(
    args: argparse.Namespace,
    pipeline: Pipeline,
    request: ResolvedRequest,
    products: Products,
    made_from: Mapping[str, str] | None = None,
) -> FolderStore:
    """The job of a video that is made from the start.

    ``made_from`` says in the file of settings what beside them decides the video.
    """
    products.check_request(request, overwrite=args.overwrite)
    pipeline.verify()
    assert products.job is not None
    output = args.output.parent.resolve() / args.output.name
    how = {name: getattr(args, name) for name in _OPTIONS} | {
        # Resuming may happen elsewhere.
        **absolute_paths(args),
        # Not `auto`: the video goes on by the plan that it was begun by.
        "mesh": None if args.mesh is None else pipeline.parallelism.name,
        "weights": pipeline.fingerprint(),
        "output": str(output),
        # Where the job is, if it is not beside the video: nowhere else does it write the video.
        "elsewhere": str(products.job.resolve()) if args.job is not None else None,
        "metadata": not args.no_metadata,
        "sidecar": args.sidecar,
        "preview": args.preview,
        "keep_job": args.keep_job,
        "keep_latents": args.keep_latents,
        "made_from": None if made_from is None else dict(made_from),
    }
    there = state_of(args.output)
    confirmed = [there] if there is not None and args.overwrite else []
    return FolderStore.create(products.job, request, how, confirmed)


def absolute_paths(args: argparse.Namespace) -> dict[str, str | None]:
    """Flags that may name files or folders: those that do as absolute paths, others as given."""
    given: dict[str, str | None] = {name: getattr(args, name) for name in _PATHS}
    for name, value in given.items():
        if value is not None and (path := path_of(value, name)).exists():
            given[name] = str(path.resolve())
    return given


def check_how(job: FolderStore) -> None:
    """Refuse a job whose record says how to go on in another way than :func:`begin` writes it.

    Raises:
        RequestError: a value is missing or of another type, or names a file elsewhere.
    """
    usual = {"keep_latents": False, "keep_job": False, "elsewhere": None, "made_from": None}
    how = {**usual, "lora": [], "mesh": None, **dict.fromkeys(OPENING), **job.how}
    for name, kinds in _HOW.items():
        if type(how.get(name, ...)) not in kinds:
            raise RequestError(
                f"{job.folder / 'job.json'}: {name} is {how.get(name)!r:.80}; start anew"
            )
    job.how.update(how)


def output_of(job: FolderStore) -> Path:
    """Where the video of a job goes: beside its folder, or where the job was begun for it.

    Raises:
        RequestError: somewhere else.
    """
    output = Path(job.how["output"])
    folder = job.folder.resolve()
    beside = output.parent.resolve() == folder.parent
    if not (output.is_absolute() and (beside or job.how["elsewhere"] == str(folder))):
        raise RequestError(
            f"{job.folder / 'job.json'} names {output}, which is not beside the job: if it is "
            "meant, say --output"
        )
    return output


def go_on(pipeline: Pipeline, job: FolderStore, finished: int = 0) -> int:
    """Finish a job, of which so many windows are ``finished``, and say so; 0."""
    output, timings = finish(pipeline, job, finished)
    _say_written(output, job.request.output_frames, job.request.fps, timings)
    return 0


def finish(pipeline: Pipeline, job: FolderStore, finished: int = 0) -> tuple[Path, Timings]:
    """Make what is missing of a job, of which so many windows are ``finished``, and its video.

    What stops it says how to go on.

    Returns:
        Where the video is, and what took how long.
    """
    request = job.request
    # A window that is not finished is lost in any case: alone, it is given up at once.
    alone = len(request.windows) == 1
    stopping = nullcontext(StopRequest()) if alone else stop_requested(_say_stopping)
    meter = None
    if job.how["sidecar"] and not alone:
        meter = DriftMeter(request.fps)
    try:
        shown = console_progress(len(request.windows), finished)
        with shown as progress, stopping as stop:
            clock = Clock(progress, stop=stop)
            _write(pipeline, job, clock, meter)
        output = _place(job, meter)
    except KeyboardInterrupt:
        if _worth_keeping(job):
            with suppress(OSError):
                print(_how_to_go_on(job), file=sys.stderr)
        raise
    except Stopped as error:
        if not _worth_keeping(job):
            raise
        kept = f"{job.partial} has what is finished; " if job.partial.is_file() else ""
        raise Stopped(f"{error}; {kept}{_how_to_go_on(job)}", error.exit_code) from error
    except _FAILURES as error:
        if not _worth_keeping(job):
            raise SkyReelsError(_in_words(error)) from error
        raise SkyReelsError(f"{_in_words(error)}; {_how_to_go_on(job)}") from error
    if not job.how["keep_job"]:
        job.remove()
    return output, clock.timings


def _how_to_go_on(job: FolderStore) -> str:
    words = ["skyreels-jax", "resume", str(job.folder)]
    try:
        output_of(job)
    except RequestError:  # The job is where there was room, and not beside its video.
        words += ["--output", job.how["output"]]
    return f"finished windows are kept; go on with: {shlex.join(words)}"


def _in_words(error: BaseException) -> str:
    return str(error) or type(error).__name__


def _place(job: FolderStore, meter: DriftMeter | None) -> Path:
    """Give the finished video its name, and write what belongs beside it."""
    request, wanted = job.request, Path(job.how["output"])
    with deferred():
        output = place_video(job, job.partial, wanted)
    if job.how["keep_latents"] and len(request.windows) == 1:
        latents = job.load(request.windows[0])
        assert latents is not None
        keep_latents(SavedLatents(latents, settings_of(request)), output)
    if job.how["sidecar"]:
        made_from = {} if job.how["made_from"] is None else {"made_from": job.how["made_from"]}
        drift = {} if meter is None else {"drift": meter.report().as_json()}
        settings = settings_of(request) | made_from | drift
        write_derived(output.with_suffix(".json"), lambda path: write_settings(path, settings))
    return output


def keep_latents(latents: SavedLatents, output: Path) -> Path:
    """Keep latents beside a video; where that is refused, in a folder for what is temporary.

    Returns:
        Where they are.

    Raises:
        OSError: they can be kept nowhere.
    """
    wanted = output.with_suffix(LATENTS_SUFFIX)
    try:
        return write_derived(wanted, latents.save)
    except OSError as error:
        for folder in fallback_folders():
            with suppress(OSError):
                path = free_name(folder / wanted.name)
                latents.save(path, replace=False)
                logger.warning(
                    "latents cannot be written to %s (%s): they are in %s",
                    *(wanted, reason_of(error), path),
                )
                return path
        raise


def decode_file(args: argparse.Namespace, pipeline: Pipeline, saved: SavedLatents) -> int:
    """Write the video of latents that an earlier run left; 0 when it is written."""
    settings = dict(saved.settings)
    with console_progress() as progress:
        clock = Clock(progress)
        try:
            count = write_mp4(
                pipeline.decode(saved.latents, clock),
                args.output,
                fps=saved.fps,
                size=saved.size,
                settings=None if args.no_metadata else settings,
                replace=args.overwrite,
            )
            if args.sidecar:
                write_derived(
                    args.output.with_suffix(".json"), lambda path: write_settings(path, settings)
                )
        except _FAILURES as error:
            words = _in_words(error)
            raise SkyReelsError(f"decoding failed: {words}; the latents are kept") from error
    _say_written(args.output, count, saved.fps, clock.timings)
    return 0


def _worth_keeping(job: FolderStore) -> bool:
    """Whether a job that was stopped has a finished window; one that has none is removed."""
    if job.has_windows or job.partial.is_file():
        return True
    job.remove()
    return False


def _write(pipeline: Pipeline, job: FolderStore, clock: Clock, meter: DriftMeter | None) -> None:
    """Write the frames as they come; asked to stop, close the file with those that there are.

    Raises:
        Stopped: somebody asked to; the file is whole, and there unless it has no frame.
    """
    request = job.request
    job.partial.unlink(missing_ok=True)
    frames = pipeline.frames(request, store=job, clock=clock)
    if meter is not None:
        frames = meter.passing(frames)
    if job.how["preview"]:
        frames = with_strips(frames, request, Products(Path(job.how["output"]), None).preview)
    written = write_mp4(
        frames,
        job.partial,
        fps=request.fps,
        size=(request.height, request.width),
        settings=settings_of(request) if job.how["metadata"] else None,
        sound=request.sound,
    )
    if written != request.output_frames:
        raise AssertionError(f"{written} frames written, {request.output_frames} promised")


def _say_stopping() -> None:
    """Tell whoever asked that it was heard."""
    line = "stopping after the step under way; once more to stop at once"
    with suppress(OSError):
        print(line, file=sys.stderr, flush=True)


def _say_written(output: Path, frames: int, fps: int | Fraction, timings: Timings) -> None:
    with suppress(OSError):  # What cannot be said is done all the same.
        for line in summarise(timings):
            print(line)
        print(f"wrote {output} ({frames} frames, {fps} frames a second)")
