"""The flags of every verb, built from the declared settings where there are some.

A verb's module is imported only when it runs: its help, and what is misspelt, need nothing of it.
"""

import argparse
import math
import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, redirect_stdout
from contextvars import ContextVar
from pathlib import Path
from typing import Any, Final

from skyreels_jax.built_in import BUILT_IN
from skyreels_jax.files import LATENTS_SUFFIX
from skyreels_jax.generation.request.declaration import GROUPS
from skyreels_jax.generation.request.kinds import Prompts, SettingKind, Switch
from skyreels_jax.generation.request.settings import (
    COMPUTE_DTYPES,
    OUTPUT,
    RUNNING,
    SHOWN,
    Setting,
    declared,
)

QUIET: Final = ContextVar("quiet", default=False)  # Only errors are shown, by ``--quiet``.
DEFAULT_OUTPUT: Final = Path("out.mp4")
# Names of `backends.BACKENDS` and `components.encoders.VAE_TILINGS`, which a test holds equal.
BACKEND_NAMES: Final = ("jax", "hybrid")
VAE_TILING_NAMES: Final = ("auto", "on", "off")
_EXAMPLES: Final = """examples:
  skyreels-jax generate --prompt "a red star grows on a black background" --output star.mp4
  skyreels-jax generate --model mini-i2v --image examples/star.png --prompt "a red star moves right"
  skyreels-jax generate --model Skywork/SkyReels-V2-DF-1.3B-540P --prompt "a fox in the snow" \\
      --seconds 30 --base-num-frames 97 --overlap-history 17 --output fox.mp4

Every setting with its range and default: docs/settings.md. The original's names of flags
(--num_frames, --inference_steps, ...) work too.
"""


def add_generate_flags(parser: argparse.ArgumentParser) -> None:
    """Those of ``generate``, in groups."""
    parser.description = (
        "Make a video. Settings that are not given come from the checkpoint's preset and\n"
        "are printed with their source."
    )
    parser.usage = "%(prog)s --prompt TEXT [--model DIR_OR_ID] [--output FILE.mp4] [flags below]"
    parser.epilog = _EXAMPLES
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    _add_output(add_video_flags(parser, prompted=True)[OUTPUT])
    add_process_flags(parser)


def add_video_flags(parser: argparse.ArgumentParser, *, prompted: bool) -> Mapping[str, Any]:
    """What decides a video: checkpoint, settings, how to compute; gives the groups of flags."""
    add_checkpoint_flags(parser.add_argument_group("checkpoint"))
    groups = {name: parser.add_argument_group(name) for name in GROUPS}
    if prompted:
        _add_prompts(groups[SHOWN].add_mutually_exclusive_group())
    for setting in declared().values():
        if setting.name in ("dtype", "output", "prompt"):
            continue
        add_setting(groups[setting.group], setting)
        if setting.name == "cache":
            groups[RUNNING].add_argument(
                "--teacache",
                dest="cache",
                action="store_const",
                const="teacache",
                help="the same as --cache teacache",
            )
    add_running_flags(groups[RUNNING])
    groups[RUNNING].add_argument(
        "--dry-run",
        action="store_true",
        help="say what each stage will take, and whether that is there; read no weight",
    )
    return groups


def _add_prompts(group: Any) -> None:
    add_setting(group, declared()["prompt"])
    group.add_argument(
        "--prompt-file",
        type=Path,
        metavar="FILE",
        help="lines of `frame: prompt`: each holds from the first window that begins there",
    )


def add_setting(group: Any, setting: Setting) -> None:
    """The flag of a declared setting; its values are converted as those of Python's callers."""
    options: dict[str, Any] = {"dest": setting.name, "help": _help(setting)}
    if isinstance(setting.kind, Switch):
        both = argparse.BooleanOptionalAction
        options |= {"action": both if setting.kind.has_off else "store_true", "default": None}
    else:
        options["metavar"] = setting.metavar or setting.kind.metavar
        options["type"] = _Converter(setting.kind)
        if isinstance(setting.kind, Prompts):
            options["action"] = "append"
    group.add_argument(setting.flag, *setting.aliases, **options)


class _Converter:
    """A kind as argparse calls it: what it refuses is an error of the command line."""

    def __init__(self, kind: SettingKind):
        self.kind = kind

    def __call__(self, text: str) -> Any:
        try:
            return self.kind.convert(text)
        except ValueError as error:
            raise argparse.ArgumentTypeError(f"{text!r} {error}") from error


def _help(setting: Setting) -> str:
    tasks = f" ({', '.join(map(str.upper, setting.tasks))})" if setting.tasks else ""
    default = "" if not setting.unset else f" (default: {setting.unset})"
    if setting.name == "prompt":
        return "what the video shows; repeated, each window of a long video takes the next"
    # argparse takes % for a format.
    return f"{setting.help}{tasks}{default}".replace("%", "%%")


def add_checkpoint_flags(group: Any, default: str = "mini") -> None:
    """Which checkpoint it is; ``default`` where none is named."""
    group.add_argument(
        "--model",
        "--model_id",
        default=default,
        metavar="DIR_OR_ID",
        help="checkpoint folder (original or diffusers format), a transformer's file, Hugging Face "
        f"id, or one made by `make mini`: {', '.join(BUILT_IN)} (default: {default})",
    )
    group.add_argument(
        "--lora",
        action="append",
        default=[],
        type=lora_of,
        metavar="FILE[:SCALE]",
        help="a LoRA that is added to the transformer, at scale 1 if none is given; repeated, "
        "several add up (docs/lora.md)",
    )
    _add_naming_flags(group)


def add_opening_flags(parser: argparse.ArgumentParser) -> None:
    """How a checkpoint that a verb describes or translates is opened."""
    _add_naming_flags(parser)


def _add_naming_flags(group: Any) -> None:
    """Which checkpoint it is, and where components come from that it lacks or others replace."""
    group.add_argument("--revision", help="branch, tag or commit of a Hugging Face id")
    group.add_argument("--preset", help="which released checkpoint it is, if that is not plain")
    group.add_argument(
        "--components",
        metavar="DIR_OR_ID",
        help="a checkpoint whose VAE, encoders and tokenizer are taken (docs/files.md)",
    )
    for name in ("vae", "text-encoder", "image-encoder"):
        words = name.replace("-", " ").replace("vae", "VAE")
        group.add_argument(
            f"--{name}", metavar="FILE_OR_DIR", help=f"the {words}, before all others"
        )
    group.add_argument(
        "--weights-key", metavar="NAME", help="which mapping of a file with several is the model"
    )


def lora_of(text: str) -> list[Any]:
    """A LoRA as the command line spells it: the absolute path of its file, and its scale.

    What is the name of a file is that, colons and all; else the scale stands after the last colon.
    """
    name, colon, scale = text.rpartition(":")
    if colon and name and not os.path.exists(text):
        try:
            number = float(scale)
        except ValueError:
            pass
        else:
            if not math.isfinite(number):
                raise argparse.ArgumentTypeError(f"{text!r}: the scale {scale} is not finite")
            return [os.path.abspath(name), number]
    return [os.path.abspath(text), 1.0]


def add_running_flags(group: Any) -> None:
    """How a pipeline computes."""
    group.add_argument(
        "--dtype",
        default="bfloat16",
        metavar="|".join(COMPUTE_DTYPES),
        help="of the transformer and the encoders (default: bfloat16)",
    )
    group.add_argument(
        "--backend",
        default="jax",
        choices=BACKEND_NAMES,
        help="who runs the encoders and the VAE: JAX, or PyTorch (hybrid; default: jax)",
    )
    group.add_argument(
        "--vae-tiling",
        default="auto",
        choices=VAE_TILING_NAMES,
        help="let the VAE cut frames into tiles, for less memory and faint seams (default: auto, "
        "where a whole frame would not fit)",
    )
    group.add_argument(
        "--vae-dtype",
        default="float32",
        metavar="|".join(COMPUTE_DTYPES),
        help="of the VAE; bfloat16 saves memory and costs quality (default: float32)",
    )
    group.add_argument(
        "--mesh",
        metavar="auto|AXIS=N,...",
        help="run the transformer on several devices, along the axes data, fsdp, ring and ulysses: "
        "fsdp=4,ulysses=2 (docs/devices.md; default: one device)",
    )
    group.add_argument(
        "--no-prompt-cache",
        action="store_true",
        help="neither look up nor keep encoded prompts on disk",
    )


def _add_output(group: Any) -> None:
    group.add_argument(
        "--output",
        type=Path,
        default=DEFAULT_OUTPUT,
        metavar="FILE.mp4",
        help=f"the file to write (default: {DEFAULT_OUTPUT})",
    )
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


def add_resume_flags(parser: argparse.ArgumentParser) -> None:
    """Those of ``resume``."""
    parser.add_argument("job", type=Path, help="the job folder, by default the output's name.job")
    parser.add_argument(
        "--output",
        type=Path,
        metavar="FILE.mp4",
        help="write the video there, and not where the job was begun for",
    )
    parser.add_argument(
        "--overwrite",
        action="store_true",
        help="replace a file that has come to the output's place since the job was begun",
    )
    add_process_flags(parser)


def add_process_flags(parser: argparse.ArgumentParser) -> None:
    """How this process joins others, for one video or one training run on all their devices."""
    group = parser.add_argument_group("several processes (docs/clusters.md)")
    group.add_argument(
        "--distributed",
        action="store_true",
        help="join the processes that Slurm, Kubernetes, a TPU slice or MPI started",
    )
    group.add_argument(
        "--coordinator", metavar="HOST:PORT", help="join others: where process 0 is reached"
    )
    group.add_argument("--num-processes", type=int, metavar="N", help="how many there are")
    group.add_argument(
        "--process-id", type=int, metavar="I", help="which one this is; 0 writes files and prints"
    )
    group.add_argument(
        "--stall-limit",
        type=float,
        metavar="SECONDS",
        help="end when one stands still for so long while others go on; 0 for never (default: 45)",
    )


def add_info_flags(parser: argparse.ArgumentParser) -> None:
    """Those of ``info``."""
    parser.add_argument("source", metavar="SRC", help="checkpoint folder, file or Hugging Face id")
    add_opening_flags(parser)
    parser.add_argument("--json", action="store_true", help="print JSON instead of lines")


def add_doctor_flags(parser: argparse.ArgumentParser) -> None:
    """Those of ``doctor``."""
    parser.add_argument("--json", action="store_true", help="print JSON instead of lines")


# With something to be silent about.
QUIET_VERBS: Final = ("generate", "live", "resume", "batch", "convert", "data", "train")


@contextmanager
def quietly() -> Iterator[None]:
    """Nothing on standard output in the body, and no progress."""
    token = QUIET.set(True)
    try:
        with Path(os.devnull).open("w") as nowhere, redirect_stdout(nowhere):
            yield
    finally:
        QUIET.reset(token)


# Verbs whose flags stand here; the others' modules have an `add_parser`.
FLAGS: Final[Mapping[str, Callable[[argparse.ArgumentParser], None]]] = {
    "generate": add_generate_flags,
    "resume": add_resume_flags,
    "info": add_info_flags,
    "doctor": add_doctor_flags,
}
