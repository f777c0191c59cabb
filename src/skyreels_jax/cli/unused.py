"""Flags that do nothing in a run of ``generate``: said before it starts."""

import argparse
from collections.abc import Iterator
from typing import Final

from skyreels_jax.errors import RequestError
from skyreels_jax.generation.request.settings import declared

# What decides how a video is made; with finished latents nothing is.
_MAKING: Final = (
    "prompt_file",
    "job",
    "keep_job",
    "keep_latents",
    "preview",
    "no_prompt_cache",
    "lora",
    "mesh",
)


def check_prompt(args: argparse.Namespace) -> None:
    """Refuse a run without a prompt, unless finished latents are decoded.

    Raises:
        RequestError: there is none.
    """
    if not (args.prompt or args.prompt_file or args.resume_latents):
        raise RequestError(
            "`prompt` is missing: say what the video should show, or give `prompt_file`"
        )


def unused_flags(args: argparse.Namespace, windows: int = 1) -> Iterator[str]:
    """A note for the flags that do nothing; ``windows`` is the number of the video's windows."""
    if args.resume_latents:
        names = [*(name for name in declared() if name not in ("dtype", "output")), *_MAKING]
        given = [f"`{name}`" for name in names if getattr(args, name) not in (None, False, [])]
        if given:
            verb = "does" if len(given) == 1 else "do"
            yield f"`resume_latents` decodes what is finished: {', '.join(given)} {verb} nothing"
    elif windows == 1 and args.preview:
        yield "`preview`: the video has one window, whose strip is written at the end"
    elif windows > 1 and args.keep_latents:
        yield (
            f"`keep_latents` does nothing: the video has {windows} windows; `keep_job` keeps their "
            "latents"
        )
