"""``skyreels-jax resume``: go on with a video that was interrupted."""

import argparse

from skyreels_jax.cli.job import go_on, open_pipeline
from skyreels_jax.errors import RequestError
from skyreels_jax.generation.store import FolderStore


def run(args: argparse.Namespace) -> int:
    """Go on with a job where it was interrupted; 0 when the video is written.

    Raises:
        RequestError: it is no job, or its checkpoint is another now.
    """
    job = FolderStore.open(args.job)
    pipeline = open_pipeline(job.how)
    pipeline.verify()
    total = len(job.request.windows)
    # Decoding starts anew, and may be what a mended VAE is for; windows are never made anew.
    if job.finished < total and pipeline.fingerprint() != job.how["weights"]:
        raise RequestError(
            f"the checkpoint {job.how['model']} is not what {job.folder} was begun with: the video "
            "would change in the middle; start anew"
        )
    print(f"going on with {job.folder}: {job.finished} of {total} windows are finished", flush=True)
    return go_on(pipeline, job)
