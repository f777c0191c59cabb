"""Which released checkpoint a folder or file is, told by its configuration and its names."""

import os
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Final

from skyreels_jax.causal_presets import (
    CAUSAL_PRESETS,
    NAMES_OF_STUDENTS,
    STAGES,
    CausalPreset,
)
from skyreels_jax.causal_settings import CausalSettings, read_streaming
from skyreels_jax.errors import RequestError
from skyreels_jax.models.transformer_config import TransformerConfig
from skyreels_jax.presets import PRESETS, TASK_OF_PIPELINE, Family, Preset, Task
from skyreels_jax.weights.layout import STREAMING, Layout
from skyreels_jax.weights.repackaged import UnpackedSource

# What a checkpoint's name has in it.
_FAMILY_NAMES: Final[Mapping[str, Family]] = {
    "skyreels": "SkyReels-V2",
    "wan2.1": "Wan2.1",
    "wan2_1": "Wan2.1",
    "wan-2.1": "Wan2.1",
    "wan21": "Wan2.1",
}


# Mappings in PyTorch files that the trainings of causal students write.
_STUDENT_MAPPINGS: Final = ("generator", "generator_ema")


@dataclass(frozen=True)
class CausalGuess:
    """Which causal student a transformer was taken for (None: one in training), and why.

    ``is_assumed`` where nothing tells it from others of the family. ``own`` is what a student says
    of itself, which is no published one.
    """

    preset: CausalPreset | None
    reason: str
    is_assumed: bool = False
    own: CausalSettings | None = None

    @property
    def settings(self) -> CausalSettings | None:
        """How it is sampled; None for one in training."""
        return self.own or self.preset

    @property
    def own_guidance(self) -> float | None:
        """The scale that it says of itself, if it does."""
        return None if self.own is None else self.own.guidance_scale

    @property
    def origin(self) -> str:
        """Where settings are from."""
        return f"preset {self.preset.name}" if self.preset else self.reason

    def words(self) -> str:
        """One line: which it is, how that is known, and how it is sampled."""
        if self.own is not None:
            return (
                f"a causal student of {len(self.own.timesteps)} steps, made for `skyreels-jax "
                f"live`: blocks of {self.own.block} and a window of {self.own.window} latent "
                f"frames ({self.reason})"
            )
        if self.preset is None:
            return f"a stage of a causal student's training, no student yet ({self.reason})"
        assumed = "assumed: " if self.is_assumed else ""
        return (
            f"{self.preset.title} ({assumed}{self.reason}): a causal student of "
            f"{len(self.preset.timesteps)} steps, which "
            f"`skyreels-jax live --preset {self.preset.name}` is for"
            + (f"; {self.preset.caveat}" if self.preset.caveat else "")
        )


@dataclass(frozen=True)
class Guess:
    """Which released checkpoint a folder was taken for (None: none of them), and why.

    ``family`` is whose settings it has where it is none of them, and ``causal`` which causal
    student of the released one, or of the model, it is, if it is one.
    """

    preset: Preset | None
    reason: str
    family: Family = "SkyReels-V2"
    causal: CausalGuess | None = None


def guess_preset(
    layout: Layout,
    config: TransformerConfig,
    *,
    repo: str | None = None,
    preset: str | None = None,
    marker: str | None = None,
    causal: CausalGuess | None = None,
) -> Guess:
    """Which released checkpoint a folder is.

    By its configuration; where several share one, by whose it is and the pipeline that
    ``model_index.json`` names, then by a recorded name that is exactly a released one. If neither
    decides, the first is assumed and the reason says so.

    Raises:
        RequestError: if ``preset`` is unknown or has another configuration.
    """
    if preset is not None:
        given = _given_preset(preset, config)
        own = causal if causal is not None and causal.own is not None else None
        return replace(given, causal=given.causal or own)
    if causal is not None and causal.own is not None:
        # It says how it is sampled, not which model it was made of.
        found = guess_preset(layout, config, repo=repo, marker=marker)
        return replace(found, causal=causal)
    if causal is not None:
        base = causal.preset.base if causal.preset else _base_of(config)
        if base is not None:
            return Guess(PRESETS[base], f"its configuration and {causal.reason}", "Wan2.1", causal)
    family, by = _family(layout, repo, marker)
    alike = [p for p in PRESETS.values() if _same_shape(p.config, config)]
    candidates = alike
    if by or len({p.family for p in alike}) > 1:
        candidates = [p for p in alike if p.family in (family, "mini")]
    if not candidates:
        shape = f"{config.model_type}, width {config.dim}, {config.num_layers} layers"
        return Guess(None, f"no release of {family} has its shape ({shape})", family)
    if len(candidates) == 1:
        by = f" and {by}" if len(alike) > 1 and by else ""
        return Guess(candidates[0], f"its configuration{by}", family)
    pipeline = layout.model_index.get("_class_name")
    task = TASK_OF_PIPELINE.get(pipeline) if isinstance(pipeline, str) else None
    if task in {p.task for p in candidates}:
        candidates = [p for p in candidates if p.task == task]
    for source, name in names_of(layout, repo, marker):
        for candidate in candidates:
            if _bare(name) == _bare(candidate.name):
                return Guess(candidate, f"its configuration and {source}", family)
    if layout.is_file and (one := _by_resolution(layout, marker, candidates)):
        return one
    names = ", ".join(p.name for p in alike)
    said = f"assumed: {names} share its configuration; say which by `preset`"
    return Guess(candidates[0], said, family)


def _bare(name: str) -> str:
    """A name without what tools write differently: case, dots, dashes and underscores."""
    return re.sub(r"[^a-z0-9]", "", name.casefold())


def _by_resolution(layout: Layout, marker: str | None, candidates: list[Preset]) -> Guess | None:
    """The only candidate whose resolution the name of a single file has in it (720P)."""
    for source, name in names_of(layout, None, marker):
        size = re.search(r"(480|540|720)p", name.casefold())
        if size is None:
            continue
        found = [one for one in candidates if one.name.casefold().endswith(size[0])]
        if len(found) == 1:
            return Guess(found[0], f"its configuration and {source}", found[0].family)
    return None


def _family(layout: Layout, repo: str | None, marker: str | None) -> tuple[Family, str]:
    """Whose checkpoint it is, and what tells that; SkyReels-V2's, with no reason, if nothing does.

    What names the checkpoint goes before the classes of its files: who converts one keeps its name.
    """
    for source, name in names_of(layout, repo, marker):
        for pattern, family in _FAMILY_NAMES.items():
            if pattern in name.casefold():
                return family, source
    for where, classes in (
        ("model_index.json", layout.model_index),
        ("config.json", layout.config),
    ):
        name = classes.get("_class_name")
        if isinstance(name, str) and name.startswith(("SkyReelsV2", "WanPipe", "WanIm", "WanVid")):
            return ("SkyReels-V2" if name.startswith("Sky") else "Wan2.1"), f"{where} ({name})"
        if name == "WanTransformer3DModel":
            return "Wan2.1", f"{where} ({name})"
    # The original of SkyReels-V2 writes the switch of its frame-rate embedding beside the type.
    is_original = layout.format == "original" and "model_type" in layout.config
    if is_original and "inject_sample_info" not in layout.config:
        return "Wan2.1", "config.json, which has no inject_sample_info"
    return "SkyReels-V2", ""


def _given_preset(name: str, config: TransformerConfig) -> Guess:
    student = CAUSAL_PRESETS.get(name)
    found = student.model if student else PRESETS.get(name)
    if found is None:
        there = ", ".join([*PRESETS, *CAUSAL_PRESETS])
        raise RequestError(f"`preset` {name!r} is unknown; there are {there}")
    if not _same_shape(found.config, config):
        raise RequestError(f"`preset` {name} is another model: {found.config} is not {config}")
    causal = CausalGuess(student, "given") if student else None
    return Guess(found, "given", found.family, causal)


def with_heads(layout: Layout, preset: str | None) -> Layout:
    """A layout without ``config.json`` has as many heads as the preset that was given."""
    student = CAUSAL_PRESETS.get(preset or "")
    known = student.model if student else PRESETS.get(preset or "")
    if layout.config or known is None:
        return layout
    patch = layout.tensors().tensors().get("patch_embedding.weight")
    if patch is None or patch.shape[:1] != (known.config.dim,):
        return layout
    key = "num_heads" if layout.format == "original" else "num_attention_heads"
    return replace(layout, config={key: known.config.num_heads})


def guess_student(
    layout: Layout, config: TransformerConfig, source: UnpackedSource, repo: str | None = None
) -> CausalGuess | None:
    """Which causal student a transformer is; None where nothing says that it is one.

    By what it says of itself beside its ``config.json``. Else a student of Wan 2.1 by what its
    header, its file with the folder around it, or its repository is called; where these do not
    tell, a file with the mappings of such a training is taken for the commonest.

    Args:
        layout: of the checkpoint.
        config: of its transformer.
        source: its tensors.
        repo: the Hugging Face id it came from.

    Raises:
        WeightsError: what it says of itself is not legal.
    """
    if (file := layout.streaming_file) is not None:
        return CausalGuess(None, f"it says so in {STREAMING}", own=read_streaming(file))
    base = _base_of(config)
    if base is None:
        return None
    named = [(f"its header ({title})", title) for title in source.titles]
    for path in _paths(layout):
        named += [(f"the file's name ({path.name})", f"{path.parent.name}/{path.stem}")]
    named += [(f"its Hugging Face id ({repo})", repo)] if repo else []
    there = {name: one for name, one in CAUSAL_PRESETS.items() if one.base == base}
    for how, name in named:
        plain = re.sub(r"[_ .]", "-", name.casefold())
        if "bidirectional" in plain:
            return None
        if re.search(STAGES, plain):
            return CausalGuess(None, how)
        for pattern, student in NAMES_OF_STUDENTS.items():
            if student in there and re.search(pattern, plain):
                return CausalGuess(there[student], how)
        if re.search(r"causal-?forcing", plain) and "causal-forcing-chunk" in there:
            said = f"{how}, which is that of the model by frames too"
            return CausalGuess(there["causal-forcing-chunk"], said, is_assumed=True)
    if source.mapping not in _STUDENT_MAPPINGS:
        return None
    said = (
        f"its tensors are under {source.mapping}, as those of all causal students are; say which "
        f"by `preset`: {', '.join(there)}"
    )
    return CausalGuess(next(iter(there.values())), said, is_assumed=True)


def _base_of(config: TransformerConfig) -> str | None:
    """The preset of Wan 2.1 that causal students with a configuration are tuned from, or None."""
    bases = dict.fromkeys(one.base for one in CAUSAL_PRESETS.values())
    return next((name for name in bases if _same_shape(PRESETS[name].config, config)), None)


def _same_shape(a: TransformerConfig, b: TransformerConfig) -> bool:
    """Equal but for ``text_len``, which the original stores and never uses."""
    return replace(a, text_len=b.text_len) == b


def names_of(
    layout: Layout, repo: str | None, marker: str | None = None
) -> Iterable[tuple[str, str]]:
    """Names this folder goes by, most telling first, without owner and format suffix."""
    recorded: list[tuple[str, Any]] = [
        ("the marker tensor in its file", marker),
        ("its Hugging Face id", repo),
        ("_name_or_path in model_index.json", layout.model_index.get("_name_or_path")),
        ("_name_or_path in config.json", layout.config.get("_name_or_path")),
    ]
    kind = "the file's name" if layout.is_file else "the folder's name"
    recorded += [(kind, path.stem if layout.is_file else path.name) for path in _paths(layout)]
    for source, name in recorded:
        if isinstance(name, str) and name:
            last = name.rstrip("/").rpartition("/")[2]
            yield f"{source} ({last})", last.removesuffix("-Diffusers")


def _paths(layout: Layout) -> Iterable[Path]:
    """The path that was named, and what it links to: in the hub's cache links lead to digests."""
    return dict.fromkeys((Path(os.path.abspath(layout.folder)), layout.folder.resolve()))


def task_of(layout: Layout, config: TransformerConfig) -> Task:
    """The task of a model that is no released one."""
    if config.model_type == "i2v":
        return "i2v" if config.pos_embed_seq_len is None else "flf2v"
    pipeline = layout.model_index.get("_class_name")
    forcing = isinstance(pipeline, str) and TASK_OF_PIPELINE.get(pipeline) == "df"
    return "df" if forcing or config.inject_sample_info else "t2v"


def published_weights(preset: str | None) -> tuple[str, ...]:
    """Where weights of students are: of all, or of the one that a preset names, if it is one."""
    names = CAUSAL_PRESETS if preset is None else (preset,)
    return tuple(CAUSAL_PRESETS[name].weights for name in names if name in CAUSAL_PRESETS)
