"""``skyreels-jax resume``: go on with a video that was interrupted."""

import argparse
import os

from skyreels_jax.cli.job import check_how, go_on, open_pipeline, output_of
from skyreels_jax.cli.together import check_together, follow, join, lead
from skyreels_jax.errors import RequestError
from skyreels_jax.generation.job_folder import FolderStore, require_job
from skyreels_jax.media import check_output
from skyreels_jax.outputs import locked, path_of, state_of


def run(args: argparse.Namespace) -> int:
    """Go on with a job where it was interrupted; 0 when the video is written.

    Raises:
        RequestError: it is no job, somebody works on it, its checkpoint is another now, or a file
            that it did not make is where its video belongs.
    """
    processes = join(args)
    if processes is not None and not processes.first:
        return follow(processes)
    folder = path_of(args.job, "job folder")
    require_job(folder)
    with locked(folder, "job"):
        job = FolderStore.open(folder)
        check_how(job)
        check_together(args, job.how)
        output = args.output or output_of(job)
        check_output(output)
        with locked(output, "output"):
            state = state_of(output)
            if args.overwrite:
                job.allow(state)
            elif state is not None and state not in job.replaceable:
                raise RequestError(
                    f"{output} is there and {job.folder} did not make it: move it away, name "
                    "another with --output, or --overwrite to replace it"
                )
            job.how["output"] = os.path.abspath(output)
            lead(job)
            return _go_on(job)


def _go_on(job: FolderStore) -> int:
    chosen = {name: getattr(job.request, name) for name in ("weights", "offload")}
    pipeline = open_pipeline({**job.how, **chosen})
    if pipeline.checkpoint.task != job.request.task:
        raise RequestError(
            f"{job.folder / 'job.json'} is of a {job.request.task.upper()} checkpoint and "
            f"{job.how['model']} is one of {pipeline.checkpoint.task.upper()}; start anew"
        )
    pipeline.verify()
    total, finished = len(job.request.windows), job.finished
    # Decoding starts anew, and may be what a mended VAE is for; windows are never made anew.
    if finished < total and pipeline.fingerprint() != job.how["weights"]:
        raise RequestError(
            f"the checkpoint {job.how['model']} is not what {job.folder} was begun with: the video "
            "would change in the middle; start anew"
        )
    print(f"going on with {job.folder}: {finished} of {total} windows are finished", flush=True)
    return go_on(pipeline, job, finished)
