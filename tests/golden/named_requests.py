"""The requests whose videos must stay, as data, and how one is run.

Only what users of the package may rely on is used here, so that this file runs unchanged before and
after the inside of the package is rebuilt: ``Pipeline.from_pretrained``, calls of a pipeline, the
latents and frames of a video, and the command line.

The module is not called ``requests``: pytest puts this folder on the path, and other packages
import a library of that name.
"""

import os
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from fractions import Fraction
from functools import cache
from pathlib import Path
from typing import Any, Final, NamedTuple

# As in the tests' conftest; the order of PyTorch's sums, too, must not depend on the cores.
os.environ.setdefault("OMP_NUM_THREADS", "1")

import av
import numpy as np
from PIL import Image
from safetensors.numpy import load_file, save_file

import skyreels_jax
from skyreels_jax import Pipeline

STAR: Final = "a red star moves slowly to the right on a light grey background"
SQUARE: Final = "a blue square moves up on a white background"
CAT: Final = "A cat on the lake, at sun"
BUILT_IN: Final = ("mini", "mini-i2v")
# Files that :func:`write_inputs` makes; in settings, a name of one stands for its path.
FIRST, LAST, CLIP = "first.png", "last.png", "clip.mp4"
INPUTS: Final = ("image", "last_image", "video")


@dataclass(frozen=True, kw_only=True)
class NamedRequest:
    """A request whose video is in the table.

    Attributes:
        name: in the table.
        model: a model of the package, or ``KIND-LAYOUT`` for a small random checkpoint.
        prompt: what to show.
        settings: of the call.
        options: of ``Pipeline.from_pretrained``.
        latents_within: how far, in shares of their root mean square, another machine may be off.
        frames_within: the same of the frames.
        file: whether the frames are those of an MP4 that the command line writes.
        needs: a package without which the request cannot be run.
    """

    name: str
    model: str
    prompt: str | Sequence[str] | Mapping[int, str] = STAR
    settings: Mapping[str, Any] = field(default_factory=dict)
    options: Mapping[str, Any] = field(default_factory=dict)
    latents_within: float = 1e-3
    frames_within: float = 3e-3
    file: bool = False
    needs: str | None = None


class Made(NamedTuple):
    """What a request gave; latents are not in the file that the command line leaves."""

    latents: np.ndarray | None
    frames: np.ndarray


_SIZE: Final = {"height": 48, "width": 64, "steps": 4, "seed": 7}
_DF: Final = {**_SIZE, "num_frames": 17, "ar_step": 0}
_LONG: Final = {**_DF, "num_frames": 29, "base_num_frames": 17, "overlap_history": 5}
_SHORT: Final = {**_SIZE, "num_frames": 9}
# Finished blocks are kept: they are seen with the same noise in every step.
_CAUSAL: Final = {
    "image": FIRST,
    "ar_step": 2,
    "causal_attention": 1,
    "addnoise_condition": 20,
    "addnoise_once": True,
}


def _df(name: str, prompt: Any = STAR, **settings: Any) -> NamedRequest:
    return NamedRequest(name=name, model="mini", prompt=prompt, settings={**_DF, **settings})


def _long(name: str, prompt: Any = STAR, **settings: Any) -> NamedRequest:
    return NamedRequest(name=name, model="mini", prompt=prompt, settings={**_LONG, **settings})


def _random(name: str, model: str, **settings: Any) -> NamedRequest:
    return NamedRequest(name=name, model=model, prompt=CAT, settings={**_SHORT, **settings})


# Where the bits are others, a request's numbers may be off by `latents_within` and `frames_within`.
# XLA without fused multiply-add (XLA_FLAGS=--xla_cpu_max_isa=SSE4_2) stood in for another machine:
#
#     latents of float32     7e-7 to 1.8e-5; 4.3e-5 and 8.7e-5 where finished blocks are kept
#     frames of those        9e-5 to 1.1e-3: single values that round to the next of 256 levels
#     frames of files        0 and 1.6e-3
#     bfloat16               6.9e-2, frames 4.8e-2
#     reference-exact        0.15, frames 8.1e-2: latents, too, are rounded to bfloat16
#
# One core instead of two (taskset -c 0) changes no bit of any request; nor does AVX2 instead of
# AVX-512, which is why it says nothing about another machine.
REQUESTS: Final = (
    # Diffusion forcing.
    _df("synchronous"),
    _df("asynchronous", ar_step=2, causal_block_size=2),
    _df("asynchronous-frame-by-frame", ar_step=1, fps=24),
    _df(
        "block-causal",
        **{**_CAUSAL, "addnoise_once": False, "causal_block_size": 2, "causal_attention": 2},
    ),
    _df("block-causal-kept", **_CAUSAL),
    _df("start-image", image=FIRST),
    _df("start-image-noised", image=FIRST, ar_step=1, addnoise_condition=20),
    _df("end-frame", last_image=LAST),
    _df("start-and-end", image=FIRST, last_image=LAST),
    _long("long-by-latents"),
    _long("long-by-pixels", continuation="pixels"),
    _long("long-block-causal-kept", **_CAUSAL),
    _df("extended-video", video=CLIP, overlap_history=5),
    _long("prompts-in-turn", (STAR, SQUARE), ar_step=1),
    _long("prompts-by-frame", {0: STAR, 15: SQUARE}),
    # Leaving calls out.
    _df("teacache", cache="teacache", cache_threshold=0.4, steps=8),
    _df("easycache", cache="easycache", cache_threshold=0.4, steps=8, ar_step=1),
    # How it is computed.
    _df("noise-of-torch", noise="torch"),
    _df("batched-guidance", batched_guidance=True),
    _df("guidance-off", guidance_scale=1.0),
    _df("shift-and-negative", negative_prompt=SQUARE, shift=2.5, guidance_scale=6.0),
    NamedRequest(
        name="bfloat16",
        model="mini",
        settings=_DF,
        options={"dtype": "bfloat16"},
        latents_within=0.2,
        frames_within=0.15,
    ),
    NamedRequest(
        name="reference-exact",
        model="mini",
        settings={**_LONG, "reference_exact": True},
        options={"dtype": "bfloat16"},
        latents_within=0.4,
        frames_within=0.25,
    ),
    _long("reference-exact-float32", reference_exact=True),
    # The other tasks, on the model of the package and on random checkpoints in both layouts.
    NamedRequest(
        name="mini-i2v",
        model="mini-i2v",
        settings={**_SIZE, "num_frames": 17, "image": FIRST},
    ),
    _random("t2v", "t2v-diffusers"),
    _random("i2v", "i2v-diffusers", image=FIRST),
    _random("flf2v", "flf2v-diffusers", image=FIRST, last_image=LAST),
    _random("i2v-reference-exact", "i2v-diffusers", image=FIRST, reference_exact=True),
    NamedRequest(
        name="hybrid",
        model="i2v-diffusers",
        prompt=CAT,
        settings={**_SHORT, "image": FIRST},
        options={"backend": "hybrid", "device": "cpu"},
        needs="diffusers",
    ),
    NamedRequest(
        name="original-layout-vae-tiling-bfloat16",
        model="t2v-original",
        prompt=CAT,
        # Two tiles of 256 pixels, the second from pixel 192 on.
        settings={**_SHORT, "num_frames": 5, "height": 16, "width": 448},
        options={"vae_tiling": "on", "vae_dtype": "bfloat16"},
        needs="torch",
    ),
    # The command line.
    NamedRequest(name="file", model="mini", settings=_DF, file=True, frames_within=5e-3),
    NamedRequest(name="file-long", model="mini", prompt=(STAR, SQUARE), settings=_LONG, file=True),
)
BY_NAME: Final = {request.name: request for request in REQUESTS}


class Studio:
    """A folder with inputs and random checkpoints, and the pipelines that were opened."""

    def __init__(self, folder: Path):
        """Write the inputs; checkpoints are made when a request asks for one.

        Args:
            folder: empty, and not cleared up here.
        """
        self.folder = folder
        write_inputs(folder)
        # Kept so that programs are compiled once; every request would have the same video alone.
        self._pipelines: dict[Any, Pipeline] = {}
        self._checkpoint = cache(self._make)

    def run(self, request: NamedRequest, **changes: Any) -> Made:
        """The latents and frames of a request, with ``changes`` of its settings."""
        settings = {
            name: self.folder / value if name in INPUTS else value
            for name, value in {**request.settings, **changes}.items()
        }
        options = {"dtype": "float32", **request.options}
        if request.file:
            return Made(None, self._by_command(request, settings, options))
        # The call takes several prompts, too, and its annotation says that it takes one.
        prompt: Any = request.prompt
        video = self._pipeline(request.model, options)(prompt, **settings)
        return Made(np.asarray(video.latents), np.asarray(video.frames))

    def _pipeline(self, model: str, options: Mapping[str, Any]) -> Pipeline:
        key = (model, *sorted(options.items()))
        if key not in self._pipelines:
            self._pipelines[key] = Pipeline.from_pretrained(
                self._checkpoint(model), keep=True, **options
            )
        return self._pipelines[key]

    def _by_command(
        self, request: NamedRequest, settings: Mapping[str, Any], options: Mapping[str, Any]
    ) -> np.ndarray:
        """The frames of the file that ``skyreels-jax generate`` writes, in a process of its own."""
        output = self.folder / f"{request.name}.mp4"
        prompts = [request.prompt] if isinstance(request.prompt, str) else request.prompt
        given = [("prompt", prompt) for prompt in prompts]
        given += [*settings.items(), *options.items(), ("output", output)]
        words = ["generate", "--model", str(self._checkpoint(request.model)), "--overwrite"]
        for name, value in given:
            words += [f"--{name.replace('_', '-')}", str(value)]
        # The package that is imported here, and caches of nobody else.
        source = str(Path(skyreels_jax.__file__).parent.parent)
        path = os.pathsep.join([source, os.environ.get("PYTHONPATH", "")]).rstrip(os.pathsep)
        caches = {"SKYREELS_JAX_CACHE": str(self.folder / "caches"), "PYTHONPATH": path}
        run = subprocess.run(
            [sys.executable, "-m", "skyreels_jax", *words],
            env=os.environ | caches,
            capture_output=True,
            text=True,
            timeout=300,
        )
        if run.returncode:
            raise RuntimeError(f"{request.name}: {run.stderr}")
        return read_frames(output)

    def _make(self, model: str) -> str | Path:
        """The name of a model of the package, or the folder of a random checkpoint."""
        if model in BUILT_IN:
            return model
        kind, layout = model.split("-")
        folder = self.folder / model
        if kind == "flf2v":
            return with_second_image(random_checkpoint(folder, "i2v", layout))
        return random_checkpoint(folder, kind, layout)


def random_checkpoint(folder: Path, kind: str, layout: str) -> Path:
    """Make a small random checkpoint; the one place that knows where the package has them."""
    try:
        from skyreels_jax.testing.random_checkpoint import make_checkpoint
    except ModuleNotFoundError:
        from skyreels_jax.reference.random_checkpoint import make_checkpoint
    arguments: Any = (folder, kind, layout)
    return make_checkpoint(*arguments)


def with_second_image(folder: Path) -> Path:
    """Make a first-last-frame checkpoint of an image-to-video one in diffusers' layout.

    It has a learned position for each of the 257 tokens of two images besides.
    """
    import json

    config = folder / "transformer" / "config.json"
    values = json.loads(config.read_text())
    values["pos_embed_seq_len"] = 2 * 257
    config.write_text(json.dumps(values, indent=2) + "\n")
    (weights,) = (folder / "transformer").glob("*.safetensors")
    tensors = load_file(weights)
    shape = (1, values["pos_embed_seq_len"], values["image_dim"])
    positions = 0.2 * np.random.default_rng(514).standard_normal(shape)
    tensors["condition_embedder.image_embedder.pos_embed"] = positions.astype(np.float32)
    save_file(tensors, weights, metadata={"format": "pt"})
    return folder


def picture(at: int, *, height: int = 48, width: int = 72) -> np.ndarray:
    """A red square on a grey slope, ``at`` pixels from the left."""
    rows, columns = np.mgrid[:height, :width]
    image = np.stack([60 + rows, 60 + columns, 120 + rows - columns // 2], -1).astype(np.uint8)
    image[height // 4 : height // 2, at : at + width // 4] = (210, 30, 40)
    return image


def write_inputs(folder: Path) -> None:
    """Write two pictures and a clip of 13 frames, all without loss: any decoder reads the same."""
    Image.fromarray(picture(6)).save(folder / FIRST)
    Image.fromarray(picture(40)).save(folder / LAST)
    with av.open(str(folder / CLIP), "w") as container:
        stream = container.add_stream("libx264rgb", rate=Fraction(16), options={"qp": "0"})
        stream.height, stream.width, stream.pix_fmt = 48, 72, "rgb24"
        for number in range(13):
            frame = av.VideoFrame.from_ndarray(picture(4 + 2 * number), format="rgb24")
            frame.pts, frame.time_base = number, Fraction(1, 16)
            container.mux(stream.encode(frame))
        container.mux(stream.encode())


def read_frames(path: Path) -> np.ndarray:
    """The decoded frames of a video file, 8-bit RGB."""
    with av.open(str(path)) as container:
        return np.stack([frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)])
