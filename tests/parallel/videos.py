"""Videos on 8 virtual devices and on one: ``python -m tests.parallel.videos MODEL JSON [MESH]...``.

``JSON`` are settings. Started as :mod:`tests.parallel.on_devices` is; each line of JSON is a mesh
and its video's PSNR.
"""

import json
import sys

import numpy as np

from skyreels_jax.parity.metrics import psnr
from skyreels_jax.pipeline import Pipeline
from skyreels_jax.weights.engine import parameters

SHORT = {"height": 48, "width": 80, "num_frames": 9, "steps": 3, "seed": 3}


def main(model: str, settings: str, meshes: list[str]) -> None:
    given = {**SHORT, **json.loads(settings)}
    expected = Pipeline.from_pretrained(model, dtype="float32")("a red star", **given)
    for mesh in meshes:
        pipeline = Pipeline.from_pretrained(model, dtype="float32", mesh=mesh, keep=True)
        video = pipeline("a red star", **given)
        error = float(np.mean(np.square(video.latents - expected.latents)))
        of_latents = float(10 * np.log10(np.ptp(expected.latents) ** 2 / error))
        kernel = parameters(pipeline.load_denoiser().model)["blocks.ffn.fc1.kernel"].get_value()
        share = kernel.addressable_shards[0].data.nbytes / kernel.nbytes
        of_frames = min(999.0, float(psnr(video.frames, expected.frames)))
        print(
            json.dumps([mesh, str(pipeline.parallelism), of_latents, of_frames, share]), flush=True
        )


if __name__ == "__main__":
    main(*sys.argv[1:3], sys.argv[3:])
