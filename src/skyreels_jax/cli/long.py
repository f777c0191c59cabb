"""Long videos on the command line: a job folder, frames written as they are finished, resuming."""

import argparse
import shutil
import sys
from pathlib import Path
from typing import Final

import numpy as np

from skyreels_jax.cli.opening import OPTIONS, open_pipeline
from skyreels_jax.cli.progress import console_progress
from skyreels_jax.cli.report import summarise
from skyreels_jax.errors import RequestError, SkyReelsError, Stopped
from skyreels_jax.files import whole_file
from skyreels_jax.generation.api import settings_of
from skyreels_jax.generation.job import Job
from skyreels_jax.generation.request import ResolvedRequest
from skyreels_jax.generation.windows import pixel_frames
from skyreels_jax.interrupt import stop_requested
from skyreels_jax.media import VideoWriter, contact_sheet, write_image, write_settings
from skyreels_jax.pipeline import Pipeline
from skyreels_jax.sampling.progress import Clock
from skyreels_jax.shapes import Frames

# Pictures in a strip, which are all that a preview keeps of a window.
STRIP: Final = 8
SUFFIX: Final = ".job"


def begin(args: argparse.Namespace, pipeline: Pipeline, request: ResolvedRequest) -> int:
    """Make a long video from the start."""
    pipeline.verify()
    folder = args.job or args.output.with_suffix(SUFFIX)
    how = {name: getattr(args, name) for name in OPTIONS} | {
        # Resuming may happen elsewhere.
        "model": str(Path(args.model).resolve()) if Path(args.model).exists() else args.model,
        "weights": pipeline.fingerprint(),
        "output": str(args.output.resolve()),
        "metadata": not args.no_metadata,
        "sidecar": args.sidecar,
        "preview": args.preview,
        "keep_job": args.keep_job,
    }
    return go_on(pipeline, Job.create(folder, request, how))


def resume(folder: Path) -> int:
    """Go on with a job where it was interrupted.

    Raises:
        RequestError: it is no job, or its checkpoint is another now.
    """
    job = Job.open(folder)
    pipeline = open_pipeline(job.how)
    pipeline.verify()
    if pipeline.fingerprint() != job.how["weights"]:
        raise RequestError(
            f"the checkpoint {job.how['model']} is not what {folder} was begun with: the video "
            "would change in the middle; start anew"
        )
    total = len(job.request.windows)
    print(f"going on with {folder}: {job.finished} of {total} windows are finished", flush=True)
    return go_on(pipeline, job)


def go_on(pipeline: Pipeline, job: Job) -> int:
    """Make what is missing of a job, and its video; what stops it says how to go on."""
    request, output = job.request, Path(job.how["output"])
    again = f"finished windows are kept; go on with: skyreels-jax resume {job.folder}"
    try:
        with console_progress() as progress, stop_requested(say_stopping) as stop:
            clock = Clock(progress, stop=stop)
            write(pipeline, job, clock)
        move(job.partial, output)
    except Stopped as error:
        kept = f"{job.partial} has what is finished; " if job.partial.is_file() else ""
        raise Stopped(f"{error}; {kept}{again}", error.exit_code) from error
    except (SkyReelsError, OSError, MemoryError, RuntimeError) as error:
        raise SkyReelsError(f"{error}; {again}") from error
    if job.how["sidecar"]:
        write_settings(output.with_suffix(".json"), settings_of(request))
    if not job.how["keep_job"]:
        job.remove()
    for line in summarise(clock.timings):
        print(line)
    print(f"wrote {output} ({request.output_frames} frames, {request.fps} frames a second)")
    return 0


def write(pipeline: Pipeline, job: Job, clock: Clock) -> None:
    """Write the frames as they come; asked to stop, close the file with those that there are.

    Raises:
        Stopped: somebody asked to; the file is whole, and there unless it has no frame.
    """
    request = job.request
    job.partial.unlink(missing_ok=True)
    stopped = None
    with VideoWriter(
        job.partial,
        fps=request.fps,
        sound=request.sound,
        size=(request.height, request.width),
        settings=settings_of(request) if job.how["metadata"] else None,
    ) as writer:
        strips = Strips(request, Path(job.how["output"])) if job.how["preview"] else None
        try:
            for frames in pipeline.frames(request, kept=job, clock=clock):
                writer.append(frames)
                if strips is not None:
                    strips.show(frames)
        except Stopped as error:
            if not writer.written:
                raise
            stopped = error
    if stopped is not None:
        raise stopped
    if writer.written != request.output_frames:
        raise AssertionError(f"{writer.written} frames written, {request.output_frames} promised")


class Strips:
    """A strip of pictures for each window, written when its last frame has come."""

    def __init__(self, request: ResolvedRequest, output: Path):
        begin = 0 if request.video is None else request.output_frames - request.num_frames
        ends = [begin + pixel_frames(w.start + w.frames) for w in request.windows]
        self.spans = list(zip([0, *ends], ends, strict=False))
        self.output = output
        self.seen = 0
        self.number = 0
        self.kept: list[Frames] = []

    def show(self, frames: Frames) -> None:
        """The next frames of the video."""
        for frame in frames:
            first, end = self.spans[self.number]
            chosen = np.linspace(first, end - 1, min(STRIP, end - first)).round().astype(int)
            if self.seen in chosen:
                self.kept.append(frame[None])
            self.seen += 1
            if self.seen == end:
                strip = contact_sheet(np.concatenate(self.kept), count=STRIP, columns=STRIP)
                name = f"{self.output.stem}.window-{self.number:03d}.png"
                write_image(self.output.with_name(name), strip)
                self.kept, self.number = [], min(self.number + 1, len(self.spans) - 1)


def say_stopping() -> None:
    """Tell whoever asked that it was heard."""
    line = "stopping after the step under way; once more to stop at once"
    print(line, file=sys.stderr, flush=True)


def move(source: Path, target: Path) -> None:
    """Give a whole file its final name; by a copy where the job is on another file system."""
    if source.stat().st_dev == target.parent.stat().st_dev:
        source.replace(target)
        return
    with whole_file(target) as temporary:
        shutil.copyfile(source, temporary)
    source.unlink()
