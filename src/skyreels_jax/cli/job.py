"""From a resolved request to an MP4 on the command line: a job folder, and going on with it.

Finished windows, one of them for a short video, are on disk before they are decoded, so that
whatever stops the run costs none of them.
"""

import argparse
import shutil
import sys
from collections.abc import Iterable, Iterator, Mapping
from contextlib import nullcontext
from fractions import Fraction
from pathlib import Path
from typing import Any, Final

import numpy as np

from skyreels_jax.checkpoints import Checkpoint
from skyreels_jax.cli.flags import LATENTS_SUFFIX
from skyreels_jax.cli.report import console_progress, summarise
from skyreels_jax.errors import SkyReelsError, Stopped
from skyreels_jax.files import whole_file
from skyreels_jax.generation.request.resolved import ResolvedRequest
from skyreels_jax.generation.store import FolderStore, SavedLatents
from skyreels_jax.generation.video import settings_of, write_mp4
from skyreels_jax.geometry import pixel_frames
from skyreels_jax.hub import enable_compilation_cache, prompt_cache_folder
from skyreels_jax.interrupt import StopRequest, stop_requested
from skyreels_jax.media import contact_sheet, write_image, write_settings
from skyreels_jax.pipeline import Pipeline
from skyreels_jax.sampling.progress import Clock, Timings
from skyreels_jax.shapes import Frames

# Pictures in a strip, which are all that a preview keeps of a window.
_STRIP: Final = 8
_SUFFIX: Final = ".job"
# Flags that decide the pipeline, which a job remembers.
_OPTIONS: Final = (
    *("model", "revision", "preset", "backend", "dtype", "no_prompt_cache"),
    *("vae_tiling", "vae_dtype"),
)
# What is turned into one line that says how to go on.
_FAILURES: Final = (SkyReelsError, OSError, MemoryError, RuntimeError)


def open_pipeline(options: Mapping[str, Any]) -> Pipeline:
    """A pipeline with the caches of the command line; nothing of its weights is read."""
    enable_compilation_cache()
    checkpoint = Checkpoint.open(
        options["model"], revision=options["revision"], preset=options["preset"]
    )
    return Pipeline(
        checkpoint,
        backend=options["backend"],
        dtype=options["dtype"],
        keep=False,
        prompt_cache=None if options["no_prompt_cache"] else prompt_cache_folder(),
        vae_tiling=options["vae_tiling"],
        vae_dtype=options["vae_dtype"],
    )


def begin(args: argparse.Namespace, pipeline: Pipeline, request: ResolvedRequest) -> int:
    """Make a video from the start; 0 when it is written."""
    pipeline.verify()
    folder = args.job or args.output.with_suffix(_SUFFIX)
    how = {name: getattr(args, name) for name in _OPTIONS} | {
        # Resuming may happen elsewhere.
        "model": str(Path(args.model).resolve()) if Path(args.model).exists() else args.model,
        "weights": pipeline.fingerprint(),
        "output": str(args.output.resolve()),
        "metadata": not args.no_metadata,
        "sidecar": args.sidecar,
        "preview": args.preview,
        "keep_job": args.keep_job,
        "keep_latents": args.keep_latents,
    }
    return go_on(pipeline, FolderStore.create(folder, request, how))


def go_on(pipeline: Pipeline, job: FolderStore) -> int:
    """Make what is missing of a job, and its video; what stops it says how to go on."""
    request, output = job.request, Path(job.how["output"])
    again = f"finished windows are kept; go on with: skyreels-jax resume {job.folder}"
    # A window that is not finished is lost in any case: alone, it is given up at once.
    alone = len(request.windows) == 1
    stopping = nullcontext(StopRequest()) if alone else stop_requested(_say_stopping)
    try:
        shown = console_progress(len(request.windows), job.finished)
        with shown as progress, stopping as stop:
            clock = Clock(progress, stop=stop)
            _write(pipeline, job, clock)
        _move(job.partial, output)
    except KeyboardInterrupt:
        if _worth_keeping(job):
            print(again, file=sys.stderr)
        raise
    except Stopped as error:
        if not _worth_keeping(job):
            raise
        kept = f"{job.partial} has what is finished; " if job.partial.is_file() else ""
        raise Stopped(f"{error}; {kept}{again}", error.exit_code) from error
    except _FAILURES as error:
        if not _worth_keeping(job):
            raise
        raise SkyReelsError(f"{error}; {again}") from error
    if job.how.get("keep_latents") and alone:
        latents = job.load(request.windows[0])
        assert latents is not None
        SavedLatents(latents, settings_of(request)).save(output.with_suffix(LATENTS_SUFFIX))
    if job.how["sidecar"]:
        write_settings(output.with_suffix(".json"), settings_of(request))
    if not job.how["keep_job"]:
        job.remove()
    _say_written(output, request.output_frames, request.fps, clock.timings)
    return 0


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
            )
        except _FAILURES as error:
            raise SkyReelsError(f"decoding failed: {error}; the latents are kept") from error
    if args.sidecar:
        write_settings(args.output.with_suffix(".json"), settings)
    _say_written(args.output, count, saved.fps, clock.timings)
    return 0


def _worth_keeping(job: FolderStore) -> bool:
    """Whether a job that was stopped has a finished window; one that has none is removed."""
    if job.finished:
        return True
    job.remove()
    return False


def _write(pipeline: Pipeline, job: FolderStore, clock: Clock) -> None:
    """Write the frames as they come; asked to stop, close the file with those that there are.

    Raises:
        Stopped: somebody asked to; the file is whole, and there unless it has no frame.
    """
    request = job.request
    job.partial.unlink(missing_ok=True)
    frames = pipeline.stream(request, store=job, clock=clock)
    if job.how["preview"]:
        frames = _with_strips(frames, request, Path(job.how["output"]))
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


def _with_strips(
    frames: Iterable[Frames], request: ResolvedRequest, output: Path
) -> Iterator[Frames]:
    """The same frames; a strip of pictures of each window is written when its last has come."""
    begin = 0 if request.video is None else request.output_frames - request.num_frames
    ends = [begin + pixel_frames(window.start + window.frames) for window in request.windows]
    spans = list(zip([0, *ends], ends, strict=False))
    number, shown, pictures = 0, 0, list[Frames]()
    for some in frames:
        for frame in some:
            first, end = spans[number]
            chosen = np.linspace(first, end - 1, min(_STRIP, end - first)).round().astype(int)
            if shown in chosen:
                pictures.append(frame[None])
            shown += 1
            if shown == end:
                strip = contact_sheet(np.concatenate(pictures), count=_STRIP, columns=_STRIP)
                write_image(output.with_name(f"{output.stem}.window-{number:03d}.png"), strip)
                pictures, number = [], min(number + 1, len(spans) - 1)
        yield some


def _say_stopping() -> None:
    """Tell whoever asked that it was heard."""
    line = "stopping after the step under way; once more to stop at once"
    print(line, file=sys.stderr, flush=True)


def _say_written(output: Path, frames: int, fps: int | Fraction, timings: Timings) -> None:
    for line in summarise(timings):
        print(line)
    print(f"wrote {output} ({frames} frames, {fps} frames a second)")


def _move(source: Path, target: Path) -> None:
    """Give a whole file its final name; by a copy where the job is on another file system."""
    if source.stat().st_dev == target.parent.stat().st_dev:
        source.replace(target)
        return
    with whole_file(target) as temporary:
        shutil.copyfile(source, temporary)
    source.unlink()
