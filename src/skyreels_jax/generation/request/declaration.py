"""What is declared of a setting, and how settings are called: here and in other tools.

A declaration is the metadata of a dataclass field. Messages name a setting by its keyword in
backticks; the command line shows the flag instead.
"""

import dataclasses
import re
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any, Final

from skyreels_jax import geometry
from skyreels_jax.errors import RequestError
from skyreels_jax.generation.request.kinds import Picture, SettingKind, Stepped, WholeNumber

# Groups of flags, in their order.
SHOWN: Final = "what to show"
DIMENSIONS: Final = "size and length"
SAMPLING: Final = "sampling"
FORCING: Final = "long video and diffusion forcing"
RUNNING: Final = "running"
OUTPUT: Final = "output"
# Of videos that are made while they play; those above are of all.
LIVE: Final = "live"
GROUPS: Final = (SHOWN, DIMENSIONS, SAMPLING, FORCING, RUNNING, OUTPUT)

# Steps that the noise schedule was trained with, of which a solver takes some.
MAX_STEPS: Final = 1000
# A side of a frame in pixels, and half a day of frames at 24 a second.
_MAX_SIDE: Final = 8192
_MAX_FRAMES: Final = 2**20 + 1
MAX_SECONDS: Final = 86400.0
SIDE_LENGTH: Final = Stepped(
    geometry.SIZE_MULTIPLE, 0, f"a multiple of {geometry.SIZE_MULTIPLE}", _MAX_SIDE
)
LATENT_COUNT: Final = WholeNumber(1, geometry.latent_frames(_MAX_FRAMES))
FRAME_COUNT: Final = Stepped(geometry.FRAMES_PER_LATENT, 1, "4 k + 1", _MAX_FRAMES)


@dataclass(frozen=True, kw_only=True)
class Setting:
    """What is known of a setting beside its type.

    Attributes:
        name: of the field and the keyword.
        kind: what it takes.
        help: one line, for the command line and the documentation.
        group: of flags.
        metavar: stands for the value in help; empty for the kind's.
        unset: in words, what holds where nobody gives it.
        flags: more names on the command line: the original's, diffusers', old ones of ours.
        former: a keyword of ours that it had before.
        tasks: only checkpoints of these take it; empty for all.
        keyword: whether a call of a pipeline takes it.
    """

    name: str = ""
    kind: SettingKind
    help: str
    group: str
    metavar: str = ""
    unset: str = ""
    flags: tuple[str, ...] = ()
    former: str | None = None
    tasks: tuple[str, ...] = ()
    keyword: bool = True

    @property
    def flag(self) -> str:
        """The command line's name."""
        return f"--{self.name.replace('_', '-')}"

    @property
    def no_flag(self) -> str:
        """The command line's name that turns a switch off."""
        return f"--no-{self.name.replace('_', '-')}"

    @property
    def aliases(self) -> tuple[str, ...]:
        """Its other names there; with underscores, as the original writes flags, all have one."""
        return (*((f"--{self.name}",) if "_" in self.name else ()), *self.flags)


def setting(kind: SettingKind, text: str, group: str, *, default: Any = None, **more: Any) -> Any:
    """A field of a request."""
    metadata = {"setting": Setting(kind=kind, help=text, group=group, **more)}
    # Images compare as arrays do, element by element.
    compare = not isinstance(kind, Picture)
    if default is dataclasses.MISSING:
        return field(compare=compare, metadata=metadata)
    return field(default=default, compare=compare, metadata=metadata)


# What other tools call our settings, or what to do where there is none: diffusers, the original,
# Wan 2.1, ComfyUI, musubi-tuner, WanGP. Names without underscores and dashes.
ELSEWHERE: Final = {
    **dict.fromkeys(
        (
            *("numinferencesteps", "inferencesteps", "samplesteps", "samplingsteps", "numsteps"),
            *("infersteps", "step", "iterations"),
        ),
        "steps",
    ),
    **dict.fromkeys(("generator", "manualseed", "baseseed", "noiseseed", "randomseed"), "seed"),
    **dict.fromkeys(("callbackonstepend", "callback", "callbacks", "onprogress"), "progress"),
    **dict.fromkeys(
        (
            *("cfg", "cfgscale", "guidance", "guidescale", "sampleguidescale", "truecfgscale"),
            *("embeddedcfgscale", "embeddedguidancescale", "textguidance", "scale"),
        ),
        "guidance_scale",
    ),
    **dict.fromkeys(("flowshift", "sampleshift", "timestepshift", "discreteflowshift"), "shift"),
    **dict.fromkeys(
        (
            *("frames", "framenum", "numframe", "videolength", "length", "framecount"),
            *("targetframes", "nframes"),
        ),
        "num_frames",
    ),
    **dict.fromkeys(("duration", "videoseconds"), "seconds"),
    **dict.fromkeys(("framerate", "rate"), "fps"),
    **dict.fromkeys(("aspectratio", "ratio"), "aspect"),
    **dict.fromkeys(
        ("inputimage", "firstframe", "firstimage", "startimage", "imagepath", "img"), "image"
    ),
    **dict.fromkeys(("endimage", "lastframe", "endframe", "endimagepath"), "last_image"),
    **dict.fromkeys(("videopath", "inputvideo", "prefixvideo"), "video"),
    **dict.fromkeys(("nprompt", "negative", "negprompt", "uncondprompt"), "negative_prompt"),
    **dict.fromkeys(("text", "prompts", "caption"), "prompt"),
    **dict.fromkeys(("teacachethresh", "threshold"), "cache_threshold"),
    **dict.fromkeys(("teacache", "easycache"), "cache"),
    **dict.fromkeys(("retsteps",), "use_ret_steps"),
    **dict.fromkeys(
        ("out", "outputpath", "savefile", "savepath", "outputfile", "saveto"), "output"
    ),
    **dict.fromkeys(("torchdtype", "precision", "weightdtype", "ditdtype"), "dtype"),
    **dict.fromkeys(("ckptdir", "checkpoint", "modelid", "modelpath", "ckpt", "dit"), "model"),
    **dict.fromkeys(
        ("overlap", "contextoverlap", "overlapsize", "slidingwindowoverlap"), "overlap_history"
    ),
    **dict.fromkeys(
        ("windowsize", "contextlength", "contextframes", "slidingwindowsize"), "base_num_frames"
    ),
    **dict.fromkeys(("attnmode", "attentionmode", "attnbackend"), "attention"),
    **dict.fromkeys(("blocksize", "numframeperblock"), "causal_block_size"),
    **dict.fromkeys(("silent", "noprogress"), "quiet"),
}
# Names with an answer that is no name.
ANSWERS: Final = {
    **dict.fromkeys(
        ("size", "imagesize", "videosize", "dimensions", "wh"),
        "give `height` and `width`, or `resolution`",
    ),
    **dict.fromkeys(("outputtype", "returndict"), "a Video is what is returned: see its frames"),
    **dict.fromkeys(
        ("promptembeds", "negativepromptembeds", "latents"), "text is encoded here: give `prompt`"
    ),
    **dict.fromkeys(
        ("scheduler", "sampler", "samplesolver", "solver"), "the solver is always UniPC"
    ),
    **dict.fromkeys(("batchsize", "numvideosperprompt"), "a call makes one video"),
    **dict.fromkeys(
        ("device", "vaetiling", "vaedtype", "backend", "keep", "weights", "offload"),
        "it is the pipeline's",
    ),
    **dict.fromkeys(
        ("lora", "loras", "lorapath", "loraweight", "loramultiplier", "lorascale"),
        "LoRA files are the pipeline's: `lora` FILE[:SCALE], or loras= in Python",
    ),
    **dict.fromkeys(
        ("offloadmodel", "enablemodelcpuoffload", "t5cpu"),
        "not needed: each part leaves memory before the next one comes",
    ),
    "outdir": "name the file with `output`",
    "useusp": "not needed to run on one device",
}
# What another name must have in common with ours to be taken for a slip.
_ALIKE: Final = 0.72
_LONGEST: Final = 60


def hint(name: str, known: Iterable[str]) -> str:
    """What was probably meant by ``name``, to follow "does not exist"; nothing if nobody knows."""
    names: dict[str, str] = {}
    for one in known:
        names.setdefault(_bare(one), one)
    bare = _bare(name)
    meant = ELSEWHERE.get(bare)
    if meant is not None and _bare(meant) in names:
        return f"; did you mean `{names[_bare(meant)]}`?"
    if bare in ANSWERS:
        return f": {ANSWERS[bare]}"
    import difflib

    near = difflib.get_close_matches(bare, names, n=1, cutoff=_ALIKE)
    return f"; did you mean `{names[near[0]]}`?" if near else ""


def refuse_unknown(given: Iterable[str], known: Iterable[str], *others: str) -> None:
    """Refuse names that are not ``known``.

    Raises:
        RequestError: says which was probably meant, of those known and of ``others``.
    """
    known = list(known)
    if unknown := [name for name in given if name not in known]:
        names = [*known, *others]
        raise RequestError("\n".join(f"`{n}` does not exist{hint(n, names)}" for n in unknown))


def one_line(message: str) -> str:
    """A message of several lines as one, with a separator where a line ended without one."""
    lines = [line.strip() for line in message.splitlines() if line.strip()]
    return "".join(
        line if not rest else f"{line} " if line[-1] in ":;,." else f"{line}; "
        for line, rest in zip(lines, [*lines[1:], ""], strict=True)
    )


def in_flags(message: str) -> str:
    """A message as the command line shows it: a keyword in backticks becomes a flag."""
    return re.sub(r"`-*([a-z][a-z_-]*)`", lambda name: f"--{name[1].replace('_', '-')}", message)


def described(value: Any) -> str:
    """A value in a message, if it is short, else what it is."""
    if isinstance(value, str | int | float | None):
        text = repr(value) if isinstance(value, str) else str(value)
        return text if len(text) <= _LONGEST else f"{text[:_LONGEST]}..."
    kind = type(value)
    if getattr(value, "shape", None) == () or kind.__module__ in ("fractions", "decimal"):
        return str(value)
    return f"of type {kind.__name__}"


def _bare(name: str) -> str:
    return name.replace("-", "").replace("_", "").lower()
