"""The original's two scripts, with its own flags: translated into ``skyreels-jax generate``.

Every flag of theirs is taken, abbreviated too, and one that is left out has their default, which is
not always that of the checkpoint. What they round off silently is said. Flags that they do not have
are handed on as they are.
"""

import argparse
import secrets
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from skyreels_jax.cli.main import Parser
from skyreels_jax.errors import RequestError
from skyreels_jax.geometry import FRAMES_PER_LATENT
from skyreels_jax.outputs import make_folder

PROMPT_LETTERS: Final = 100
_NOT_NEEDED: Final = "not needed: each part leaves memory before the next one comes"


@dataclass(frozen=True)
class _Script:
    """What one of the scripts does with flags that are left out."""

    model: str
    outdir: str
    prompt: str
    forcing: bool


SCRIPTS: Final = {
    "generate_video": _Script(
        "Skywork/SkyReels-V2-T2V-14B-540P",
        "video_out",
        "A serene lake surrounded by towering mountains, with a few swans gracefully gliding "
        "across the water and sunlight dancing on the surface.",
        forcing=False,
    ),
    "generate_video_df": _Script(
        "Skywork/SkyReels-V2-DF-1.3B-540P",
        "diffusion_forcing",
        "A woman in a leather jacket and sunglasses riding a vintage motorcycle through a desert "
        "highway at sunset, her hair blowing wildly in the wind as the motorcycle kicks up dust, "
        "with the golden sun casting long shadows across the barren landscape.",
        forcing=True,
    ),
}
# What is handed on under the same name; a flag that is `None` is not.
_NUMBERS: Final = (
    ("num_frames", int, 97),
    ("guidance_scale", float, 6.0),
    ("shift", float, 8.0),
    ("inference_steps", int, 30),
    ("fps", int, 24),
)
_FORCING_NUMBERS: Final = (
    ("ar_step", int, 0),
    ("causal_block_size", int, 1),
    ("base_num_frames", int, 97),
    ("overlap_history", int, None),
    ("addnoise_condition", int, 0),
)
_FLOORED: Final = ("num_frames", "base_num_frames", "overlap_history")


def translate(script: str, argv: Sequence[str]) -> list[str]:
    """What ``skyreels-jax`` is given for an original's command line.

    Args:
        script: a key of :data:`SCRIPTS`.
        argv: the original's arguments; flags that it does not have are handed on as they are.

    Returns:
        arguments of :func:`skyreels_jax.cli.main.main`. Exits with 2 after one line where the
        original did something that this package does not do, or its folder cannot be made.
    """
    if {"-h", "--help"} & set(argv):
        return ["generate", "--help"]
    parser = _OriginalParser(SCRIPTS[script], prog=f"{script}.py")
    known, rest = parser.parse_known_args(argv)
    if known.prompt_enhancer and not known.image:
        parser.error("--prompt_enhancer rewrites the prompt with a language model; none is here")
    for note in _notes(known):
        print(f"{script}.py: {note}", file=sys.stderr)
    # The original draws one too; the file's name says it.
    seed = secrets.randbits(32) if known.seed is None else known.seed
    words = ["generate", "--model", known.model_id, "--prompt", known.prompt, "--seed", str(seed)]
    words += _settings(known, rest)
    if not _names(rest, "--output"):
        try:
            words += ["--output", str(_output(known.outdir, known.prompt, seed))]
        except RequestError as error:
            parser.error(str(error))
    return [*words, *rest]


class _OriginalParser(Parser):
    """The flags of a script with its defaults, which may be abbreviated."""

    def __init__(self, script: _Script, prog: str):
        super().__init__(prog=prog, add_help=False)
        self.allow_abbrev = True
        self.add_argument("--model_id", default=script.model)
        self.add_argument("--prompt", default=script.prompt)
        self.add_argument("--outdir", default=script.outdir)
        self.add_argument("--seed", type=int)
        self.add_argument("--resolution", choices=["540P", "720P"])
        self.add_argument("--image")
        self.add_argument("--teacache_thresh", type=float, default=0.2)
        for switch in ("use_usp", "offload", "prompt_enhancer", "teacache", "use_ret_steps"):
            self.add_argument(f"--{switch}", action="store_true")
        numbers = (*_NUMBERS, *_FORCING_NUMBERS) if script.forcing else _NUMBERS
        for name, kind, default in numbers:
            self.add_argument(f"--{name}", type=kind, default=default)
        self.set_defaults(end_image=None, video_path="", causal_attention=False)
        if script.forcing:
            self.add_argument("--end_image")
            self.add_argument("--video_path")
            self.add_argument("--causal_attention", action="store_true")


def _settings(known: argparse.Namespace, rest: Sequence[str]) -> Iterator[str]:
    """Flags of ``generate`` for those of a script, but what names the model and the output."""
    for name, *_ in (*_NUMBERS, *_FORCING_NUMBERS):
        value = getattr(known, name, None)
        if value is None or (name == "num_frames" and _names(rest, "--seconds")):
            continue
        yield from (f"--{name}", str(_floored(name, value)))
    # A video is continued whatever images are given.
    given = ("video_path",) if known.video_path else ("image", "end_image")
    for name in ("resolution", *given):
        if value := getattr(known, name):
            yield from (f"--{name}", value)
    if known.causal_attention:
        # In the original attention's blocks are as long as those of the frame schedule.
        yield from ("--causal_attention", str(known.causal_block_size))
    if known.teacache:
        yield from ("--cache", "teacache", "--cache-threshold", str(known.teacache_thresh))
        if known.use_ret_steps:
            yield "--use-ret-steps"


def _notes(known: argparse.Namespace) -> Iterator[str]:
    """A line for each flag that is without effect, as it was or is, or is rounded off."""
    images = known.video_path and (known.image or known.end_image)
    retained = known.use_ret_steps and not known.teacache
    for is_given, flag, why in (
        (known.prompt_enhancer, "--prompt_enhancer", "without effect beside --image, as it was"),
        (known.use_usp, "--use_usp", "about speed alone: one device makes the same video here"),
        (known.offload, "--offload", _NOT_NEEDED),
        (
            retained,
            "--use_ret_steps",
            "for --teacache, as it was",
        ),
        (images, "--image", "without effect beside --video_path, as it was"),
    ):
        if is_given:
            yield f"{flag} is {why}"
    for name in _FLOORED:
        value = getattr(known, name, None)
        if value is not None and (floor := _floored(name, value)) != value:
            lost = f"; the original loses {value - floor} frames at each join besides"
            yield (
                f"--{name} {value} is taken as {floor}, 4 k + 1, as the original does"
                f"{lost if name == 'overlap_history' else ''}"
            )


def _floored(name: str, value: Any) -> Any:
    """A number of frames as the VAE has it: the original drops what is left over."""
    if name not in _FLOORED or value < 1:
        return value
    return (value - 1) // FRAMES_PER_LATENT * FRAMES_PER_LATENT + 1


def _names(words: Sequence[str], flag: str) -> bool:
    """Whether a flag is among the words."""
    return any(word.partition("=")[0] == flag for word in words)


def _output(outdir: str, prompt: str, seed: int) -> Path:
    """The original's name, in a folder that is there afterwards."""
    folder = make_folder(Path("result") / outdir, "--outdir")
    stamp = time.strftime("%Y-%m-%d_%H-%M-%S")
    return folder / f"{prompt[:PROMPT_LETTERS].replace('/', '')}_{seed}_{stamp}.mp4"
