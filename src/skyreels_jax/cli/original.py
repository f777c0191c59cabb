"""The original's two scripts, with its own flags: translated into ``skyreels-jax generate``.

Most of the original's flags are flags of ``generate`` already. What is left are its defaults, the
place it writes to (``result/OUTDIR/PROMPT_SEED_TIME.mp4``), and switches without a meaning here.
"""

import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Final

import numpy as np

from skyreels_jax.cli.main import Parser

# Default checkpoint and folder below `result` of each script.
SCRIPTS: Final = {
    "generate_video": ("Skywork/SkyReels-V2-T2V-14B-540P", "video_out"),
    "generate_video_df": ("Skywork/SkyReels-V2-DF-1.3B-540P", "diffusion_forcing"),
}
PROMPT_LETTERS: Final = 100
_NOT_NEEDED: Final = "not needed: each part leaves memory before the next one comes"


def translate(script: str, argv: Sequence[str]) -> list[str]:
    """What ``skyreels-jax`` is given for an original's command line.

    Args:
        script: a key of :data:`SCRIPTS`.
        argv: the original's arguments; flags that it does not have are handed on as they are.

    Returns:
        arguments of :func:`skyreels_jax.cli.main.main`. Exits with 2 after one line where the
        original did something that this package does not do.
    """
    if {"-h", "--help"} & set(argv):
        return ["generate", "--help"]
    parser = _parser(script)
    known, rest = parser.parse_known_args(argv)
    given_image = any(word.partition("=")[0] == "--image" for word in rest)
    if known.prompt_enhancer and not given_image:
        parser.error("--prompt_enhancer rewrites the prompt with a language model; none is here")
    for is_given, flag, why in (
        (known.prompt_enhancer, "--prompt_enhancer", "without effect beside --image, as it was"),
        (known.use_usp, "--use_usp", "about speed alone: one device makes the same video here"),
        (known.offload, "--offload", _NOT_NEEDED),
    ):
        if is_given:
            print(f"{script}.py: {flag} is {why}", file=sys.stderr)
    # The original draws one too; the file's name says it.
    seed = int(np.random.SeedSequence().generate_state(1)[0]) if known.seed is None else known.seed
    words = ["generate", "--model", known.model_id, "--prompt", known.prompt, "--seed", str(seed)]
    if known.causal_block_size is not None:
        words += ["--causal-block-size", str(known.causal_block_size)]
    if known.causal_attention:
        words += ["--causal-attention", str(known.causal_block_size or 1)]
    if not any(word.partition("=")[0] == "--output" for word in rest):
        words += ["--output", str(_output(known.outdir, known.prompt, seed))]
    return [*words, *rest]


def _parser(script: str) -> Parser:
    """The flags that are not handed on as they are."""
    model, outdir = SCRIPTS[script]
    parser = Parser(prog=f"{script}.py", add_help=False)
    parser.add_argument("--model_id", default=model)
    parser.add_argument("--prompt", required=True)
    parser.add_argument("--seed", type=int)
    parser.add_argument("--outdir", default=outdir)
    for switch in ("--offload", "--use_usp", "--prompt_enhancer"):
        parser.add_argument(switch, action="store_true")
    # In the original attention's blocks are as long as those of the frame schedule.
    parser.add_argument("--causal_attention", action="store_true")
    parser.add_argument("--causal_block_size", type=int)
    return parser


def _output(outdir: str, prompt: str, seed: int) -> Path:
    """The original's name, in a folder that is there afterwards."""
    folder = Path("result") / outdir
    folder.mkdir(parents=True, exist_ok=True)
    stamp = time.strftime("%Y-%m-%d_%H-%M-%S")
    return folder / f"{prompt[:PROMPT_LETTERS].replace('/', '')}_{seed}_{stamp}.mp4"
