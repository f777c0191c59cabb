"""The flags of ``skyreels-jax generate``: ours, and those of the original's scripts beside them."""

import argparse
from pathlib import Path
from typing import Any, Final

from skyreels_jax.backends import BACKENDS
from skyreels_jax.components.autoencoder import VAE_TILINGS
from skyreels_jax.generation.caching import CACHES
from skyreels_jax.generation.request import HAND_OVERS
from skyreels_jax.generation.resolve import DTYPES
from skyreels_jax.geometry import RESOLUTIONS
from skyreels_jax.ops.attention import ATTENTION_PATHS
from skyreels_jax.sampling.noise import NOISES

DEFAULT_OUTPUT: Final = Path("out.mp4")
LATENTS_SUFFIX: Final = ".latents.safetensors"


def add_flags(parser: argparse.ArgumentParser) -> None:
    """Add them all, in groups."""
    _add_checkpoint(parser.add_argument_group("checkpoint"))
    _add_content(parser.add_argument_group("what to show"))
    _add_size(parser.add_argument_group("size and length"))
    _add_sampling(parser.add_argument_group("sampling"))
    _add_forcing(parser.add_argument_group("long video and diffusion forcing"))
    _add_running(parser.add_argument_group("running"))
    _add_output(parser.add_argument_group("output"))


def _add_checkpoint(group: Any) -> None:
    group.add_argument(
        "--model",
        "--model_id",
        default="mini",
        metavar="DIR_OR_ID",
        help="checkpoint folder (original or diffusers layout), Hugging Face id, or one made by "
        "`make mini`: mini (the default), mini-i2v",
    )
    group.add_argument("--revision", help="branch, tag or commit of a Hugging Face id")
    group.add_argument("--preset", help="which released checkpoint it is, if that is not plain")


def _add_content(group: Any) -> None:
    prompt = group.add_mutually_exclusive_group(required=True)
    prompt.add_argument(
        "--prompt",
        action="append",
        metavar="TEXT",
        help="what the video shows; repeated, each window of a long video takes the next",
    )
    prompt.add_argument(
        "--prompt-file",
        type=Path,
        metavar="FILE",
        help="lines of `frame: prompt`: each holds from the first window that begins there",
    )
    group.add_argument("--negative-prompt", "--negative_prompt", metavar="TEXT")
    group.add_argument("--image", metavar="FILE", help="the first frame")
    group.add_argument(
        "--last-image",
        "--end_image",
        metavar="FILE",
        help="the last frame (FLF2V), or what comes right after it (DF)",
    )
    group.add_argument("--video", "--video_path", metavar="FILE", help="a video to continue (DF)")


def _add_size(group: Any) -> None:
    group.add_argument("--resolution", metavar="|".join(RESOLUTIONS))
    group.add_argument(
        "--aspect",
        metavar="W:H",
        help="for example 9:16, or `image` for that of the image; keeps the area",
    )
    group.add_argument("--height", type=int, metavar="PIXELS", help="a multiple of 16")
    group.add_argument("--width", type=int, metavar="PIXELS", help="a multiple of 16")
    group.add_argument("--num-frames", "--num_frames", type=int, metavar="N", help="4 k + 1")
    group.add_argument("--seconds", type=float, help="in place of --num-frames")
    group.add_argument("--fps", metavar="RATE", help="such as 24, 29.97 or 30000/1001")


def _add_forcing(group: Any) -> None:
    for flag, old, metavar, text in (
        ("--base-num-frames", "--base_num_frames", "N", "most frames made at once, 4 k + 1"),
        ("--overlap-history", "--overlap_history", "N", "frames each window takes over, 4 k + 1"),
        ("--ar-step", "--ar_step", "N", "steps each block runs behind the one before; 0: together"),
        ("--causal-block-size", "--causal_block_size", "N", "latent frames in a block"),
        (
            "--addnoise-condition",
            "--addnoise_condition",
            "N",
            "noise over given frames: 0 or 20",
        ),
    ):
        group.add_argument(flag, old, type=int, metavar=metavar, help=text)
    group.add_argument(
        "--addnoise-once",
        action="store_true",
        default=None,
        help="the same such noise in every step: finished blocks are then not computed anew",
    )
    group.add_argument(
        "--hand-over",
        metavar="|".join(HAND_OVERS),
        help="what a window is given of the one before: its latents, or its frames encoded anew",
    )
    group.add_argument(
        "--causal-attention",
        "--causal_attention",
        type=int,
        metavar="N",
        help="latent frames a block of block-causal attention, for models that learned with it",
    )


def _add_sampling(group: Any) -> None:
    group.add_argument("--steps", "--inference_steps", "--num_inference_steps", type=int)
    group.add_argument("--guidance-scale", "--guidance_scale", type=float, metavar="X")
    group.add_argument("--shift", type=float, help="of the noise levels")
    group.add_argument("--seed", type=int)
    group.add_argument(
        "--noise",
        metavar="|".join(NOISES),
        help="whose numbers a seed means; torch: those of PyTorch's CPU generator (default: jax)",
    )
    group.add_argument(
        "--reference-exact",
        action="store_true",
        help="round and hand over as the original does, and refuse what it gets wrong",
    )


def _add_running(group: Any) -> None:
    group.add_argument("--dtype", default="bfloat16", metavar="|".join(DTYPES))
    group.add_argument(
        "--attention",
        metavar="PATH",
        help=f"{', '.join(ATTENTION_PATHS)}; chosen by device and shape if not given",
    )
    group.add_argument(
        "--cache",
        metavar="|".join(CACHES),
        help="leave calls of the transformer out where little changes (default: none)",
    )
    group.add_argument(
        "--teacache",
        dest="cache",
        action="store_const",
        const="teacache",
        help="the same as --cache teacache",
    )
    group.add_argument(
        "--cache-threshold",
        "--teacache_thresh",
        type=float,
        metavar="X",
        help="how much change may go by; 0.2 for teacache, 0.05 for easycache",
    )
    group.add_argument(
        "--use-ret-steps",
        "--use_ret_steps",
        action="store_true",
        help="teacache looks at the time embedding that the blocks take",
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
    group.add_argument(
        "--job",
        type=Path,
        metavar="DIR",
        help="where a long video keeps its finished windows (default: the output's name with .job)",
    )
    group.add_argument("--keep-job", action="store_true", help="do not remove it at the end")
    group.add_argument(
        "--preview", action="store_true", help="write a strip of pictures after each window"
    )
    group.add_argument("--sidecar", action="store_true", help="write the settings as .json too")
    group.add_argument(
        "--no-metadata", action="store_true", help="leave the settings out of the video file"
    )
