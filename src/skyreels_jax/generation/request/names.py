"""How settings are called: here, on the command line, and in other tools.

Messages name a setting by its keyword in backticks; the command line shows the flag instead.
"""

import re
from collections.abc import Iterable
from typing import Any, Final

# What other tools call our settings, or what to do where there is none: diffusers, the original,
# Wan 2.1, ComfyUI. Names without underscores and dashes.
ELSEWHERE: Final = {
    **dict.fromkeys(
        ("numinferencesteps", "inferencesteps", "samplesteps", "samplingsteps", "numsteps"), "steps"
    ),
    **dict.fromkeys(("generator", "manualseed", "baseseed", "noiseseed", "randomseed"), "seed"),
    **dict.fromkeys(("callbackonstepend", "callback", "callbacks", "onprogress"), "progress"),
    **dict.fromkeys(
        ("cfg", "cfgscale", "guidance", "guidescale", "sampleguidescale", "truecfgscale"),
        "guidance_scale",
    ),
    **dict.fromkeys(("flowshift", "sampleshift", "timestepshift"), "shift"),
    **dict.fromkeys(
        ("frames", "framenum", "numframe", "videolength", "length", "framecount"), "num_frames"
    ),
    **dict.fromkeys(("duration", "videoseconds"), "seconds"),
    **dict.fromkeys(("framerate", "rate"), "fps"),
    **dict.fromkeys(("aspectratio", "ratio"), "aspect"),
    **dict.fromkeys(("inputimage", "firstframe", "firstimage", "startimage"), "image"),
    **dict.fromkeys(("endimage", "lastframe", "endframe"), "last_image"),
    **dict.fromkeys(("videopath", "inputvideo", "prefixvideo"), "video"),
    **dict.fromkeys(("nprompt", "negative", "negprompt"), "negative_prompt"),
    **dict.fromkeys(("text", "prompts", "caption"), "prompt"),
    **dict.fromkeys(("teacachethresh", "threshold"), "cache_threshold"),
    **dict.fromkeys(("teacache", "easycache"), "cache"),
    **dict.fromkeys(("retsteps",), "use_ret_steps"),
    **dict.fromkeys(("out", "outputpath", "savefile", "savepath", "outputfile"), "output"),
    **dict.fromkeys(("torchdtype", "precision"), "dtype"),
    **dict.fromkeys(("ckptdir", "checkpoint", "modelid", "modelpath", "ckpt"), "model"),
    **dict.fromkeys(("overlap",), "overlap_history"),
    **dict.fromkeys(("windowsize", "contextlength"), "base_num_frames"),
}
# Names with an answer that is no name.
ANSWERS: Final = {
    **dict.fromkeys(("size", "imagesize"), "give `height` and `width`, or `resolution`"),
    **dict.fromkeys(("outputtype", "returndict"), "a Video is what is returned: see its frames"),
    **dict.fromkeys(
        ("promptembeds", "negativepromptembeds", "latents"), "text is encoded here: give `prompt`"
    ),
    **dict.fromkeys(
        ("scheduler", "sampler", "samplesolver", "solver"), "the solver is always UniPC"
    ),
    **dict.fromkeys(("batchsize", "numvideosperprompt"), "a call makes one video"),
    **dict.fromkeys(("device", "vaetiling", "vaedtype", "backend", "keep"), "it is the pipeline's"),
    **dict.fromkeys(
        ("offload", "offloadmodel", "enablemodelcpuoffload", "t5cpu"),
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
