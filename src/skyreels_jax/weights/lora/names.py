"""Names in LoRA files: which tensor of a transformer a key is for, and what part of an adapter.

A key is ``[prefixes] module part [adapter] [weight|bias]``. Trainers put different prefixes before
the module, name it as the original or as diffusers does, and some join its name by underscores;
that is undone by comparing names with all dots as underscores. The parts are told by their names
alone, which differ from trainer to trainer and never mean two things.
"""

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Final, Literal

from skyreels_jax.models.transformer_config import FLF2V_1_3B, TransformerConfig
from skyreels_jax.weights.components.transformer import transformer_rules
from skyreels_jax.weights.plan import FORMATS, Format, Rule, layers_in_file, make_plan
from skyreels_jax.weights.repackaged import without_wrappers
from skyreels_jax.weights.safetensors_file import TensorSpec

# Taken off as often as one of them stands in front.
_PREFIXES: Final = (
    *("base_model.model.", "model.diffusion_model.", "diffusion_model.", "transformer."),
    *("pipe.dit.", "dit.", "model.", "module.", "_orig_mod.", "unet."),
    *("lora_unet_", "lora_transformer_", "lycoris_"),
)
# What other models than the transformer are called in LoRA files.
_TEXT_ENCODERS: Final = (
    *("lora_te_", "lora_te1_", "lora_te2_", "lora_te3_", "text_encoder.", "text_encoder_2."),
    *("text_encoder_3.", "cond_stage_model.", "text_model.", "te.", "clip.", "t5.", "umt5."),
)
_SECOND_EXPERTS: Final = ("transformer_2.", "diffusion_model_2.", "lora_unet_2_", "pipe.dit2.")

# Names of parts, and what they are here. The last of a key's words that is one tells the part.
PARTS: Final[Mapping[str, str]] = {
    **dict.fromkeys(("lora_A", "lora_down", "lora.down", "lora_linear_layer.down"), "down"),
    **dict.fromkeys(("lora_B", "lora_up", "lora.up", "lora_linear_layer.up"), "up"),
    "lora_mid": "mid",
    "lora_embedding_A": "rows_down",
    "lora_embedding_B": "rows_up",
    "alpha": "alpha",
    "dora_scale": "magnitude",
    "lora_magnitude_vector": "magnitude",
    **{f"lokr_{name}": f"lokr_{name}" for name in ("w1", "w2", "w1_a", "w1_b", "w2_a", "w2_b")},
    "lokr_t2": "lokr_t2",
    **{f"hada_{name}": f"hada_{name}" for name in ("w1_a", "w1_b", "w2_a", "w2_b", "t1", "t2")},
    "diff": "diff",
    "w_norm": "diff",
    "diff_b": "diff_b",
    "b_norm": "diff_b",
    "diff_m": "diff_m",
    "set_weight": "set_weight",
    "reshape_weight": "reshape_weight",
}
# Kinds of adapters that are not added, by a part's name.
UNSUPPORTED: Final[Mapping[str, str]] = {
    **dict.fromkeys(("oft_blocks", "oft_diag", "oft_R", "oft_r", "oft_s"), "OFT"),
    **dict.fromkeys(("boft_R", "boft_s", "boft_blocks"), "BOFT"),
    **dict.fromkeys(("a1", "a2", "b1", "b2", "bm1", "bm2"), "GLoRA"),
    **dict.fromkeys(("vera_lambda_b", "vera_lambda_d", "vera_A", "vera_B"), "VeRA"),
    **dict.fromkeys(("ia3_l", "on_input"), "IA3"),
    "scalar": "an adapter with a learnt scale that was not folded in",
    "hra_u": "HRA",
}
# Of a block in a key; no model has a thousand.
_BLOCK: Final = re.compile(r"(?:^|[._])blocks[._](\d{1,3})[._]")
# No name of a tensor is longer; what is cannot be one, and is not searched.
_MAX_NAME: Final = 512

# The rules of all parameters that any transformer of the family has.
_EVERYTHING: Final = transformer_rules(
    TransformerConfig(**{**vars(FLF2V_1_3B), "inject_sample_info": True})
)

Belonging = Literal["transformer", "text encoder", "second expert"]


@dataclass(frozen=True)
class Key:
    """A key of a LoRA file, taken apart.

    Attributes:
        name: the key, whole.
        module: whose adapter it is of, without prefixes.
        part: what it is there (a value of ``PARTS``); ``None`` where no word of it tells.
        leaf: ``weight`` or ``bias`` where the key ends so, else empty.
        unsupported: the kind of adapter, where it is one that is not added.
    """

    name: str
    module: str
    part: str | None
    leaf: str = ""
    unsupported: str | None = None


def taken_apart(name: str) -> Key:
    """The key of this name; nothing of it need be known."""
    if len(name) > _MAX_NAME:
        return Key(name, name, None)
    words = _without_prefixes(without_wrappers(name)).split(".")
    leaf = words[-1] if len(words) > 1 and words[-1] in ("weight", "bias") else ""
    for i in range(len(words) - 1, 0, -1):
        for count in (2, 1):
            part = ".".join(words[i : i + count])
            if part in PARTS and i + count <= len(words):
                return Key(name, ".".join(words[:i]), PARTS[part], leaf)
        if words[i] in UNSUPPORTED:
            return Key(name, ".".join(words[:i]), None, leaf, UNSUPPORTED[words[i]])
    return Key(name, ".".join(words), None, leaf)


def belongs_to(name: str) -> Belonging:
    """Which of a pipeline's models a key is for, by the words it begins with."""
    for prefix in ("base_model.model.", ""):
        own = name.removeprefix(prefix)
        if own.startswith(_TEXT_ENCODERS):
            return "text encoder"
        if own.startswith(_SECOND_EXPERTS):
            return "second expert"
    return "transformer"


def _without_prefixes(name: str) -> str:
    while prefix := next((p for p in _PREFIXES if name.startswith(p)), None):
        name = name.removeprefix(prefix)
    return name.lstrip("_")


@dataclass(frozen=True)
class Place:
    """Where an adapter goes: a tensor of the files, or a slice of the rows of a fused one's.

    ``rows = (k, n)``: the adapter is of ``n`` tensors one below the other, and this is the k-th.
    """

    tensor: str
    rows: tuple[int, int] = (0, 1)


# Linears that diffusers and others fuse, and the parts in their order.
_FUSED: Final[Mapping[str, tuple[str, ...]]] = {
    "attn1.to_qkv": ("attn1.to_q", "attn1.to_k", "attn1.to_v"),
    "attn2.to_kv": ("attn2.to_k", "attn2.to_v"),
    "attn2.to_added_kv": ("attn2.add_k_proj", "attn2.add_v_proj"),
    "self_attn.qkv": ("self_attn.q", "self_attn.k", "self_attn.v"),
    "cross_attn.kv": ("cross_attn.k", "cross_attn.v"),
    "cross_attn.kv_img": ("cross_attn.k_img", "cross_attn.v_img"),
}


@dataclass(frozen=True)
class ModelNames:
    """The names of a transformer's tensors in both formats, dots as underscores.

    Attributes:
        tensors: name in either format -> name in the files.
        elsewhere: names that other transformers of the family have: image attention, the embedding
            of images and of the frame rate.
        shapes: of the tensors in the files.
        format: of the files.
    """

    tensors: Mapping[str, str]
    elsewhere: frozenset[str]
    shapes: Mapping[str, tuple[int, ...]]
    format: Format
    _aliases: Mapping[str, Mapping[Format, str]] = field(default_factory=dict, repr=False)

    @classmethod
    def of(
        cls, rules: Sequence[Rule], tensors: Mapping[str, TensorSpec], format: Format
    ) -> "ModelNames":
        """The names of the transformer that ``tensors``, under ``format``'s names, are.

        Args:
            rules: its weight table.
            tensors: of its files.
            format: of the files.
        """
        layers = layers_in_file(tensors, format)
        plans = {f: make_plan(rules, f, layers) for f in FORMATS}
        found: dict[str, str] = {}
        aliases: dict[str, Mapping[Format, str]] = {}
        for slot, source in plans[format].items():
            aliases[source.name] = {f: plans[f][slot].name for f in FORMATS}
            for alias in aliases[source.name].values():
                found[joined(alias)] = source.name
        known = {
            joined(source.name)
            for f in FORMATS
            for source in make_plan(_EVERYTHING, f, layers).values()
        }
        shapes = {name: info.shape for name, info in tensors.items()}
        return cls(found, frozenset(known - found.keys()), shapes, format, aliases)

    @classmethod
    def any(cls, depth: int) -> "ModelNames":
        """The names of every transformer of the family with so many blocks; no shapes are known."""
        plans = {f: make_plan(_EVERYTHING, f, lambda rule: depth) for f in FORMATS}
        found: dict[str, str] = {}
        aliases: dict[str, Mapping[Format, str]] = {}
        for slot, source in plans["original"].items():
            aliases[source.name] = {f: plans[f][slot].name for f in FORMATS}
            for alias in aliases[source.name].values():
                found[joined(alias)] = source.name
        return cls(found, frozenset(), {}, "original", aliases)

    def places(self, module: str, what: str) -> tuple[Place, ...]:
        """Where the ``weight``, ``bias`` or ``modulation`` of a module is; empty for nowhere.

        With nothing for ``what`` it is where the tensor of the whole name is.
        """
        for name in _candidates(module, what):
            if (tensor := self.tensors.get(joined(name))) is not None:
                return (Place(tensor),)
        for fused, parts in _FUSED.items():
            if joined(module).endswith("_" + joined(fused)):
                stem = joined(module).removesuffix(joined(fused))
                names = [self.tensors.get(f"{stem}{joined(part)}_{what}") for part in parts]
                if None not in names:
                    count = len(names)
                    return tuple(Place(str(n), (k, count)) for k, n in enumerate(names))
        return ()

    def is_elsewhere(self, module: str, what: str) -> bool:
        """Whether another transformer of the family has the tensor that is asked for."""
        whole = joined(module)
        modules = [whole]
        for fused, parts in _FUSED.items():
            if whole.endswith("_" + joined(fused)):
                modules.append(whole.removesuffix(joined(fused)) + parts[0])
        names = (name for one in modules for name in _candidates(one, what))
        return any(joined(name) in self.elsewhere for name in names)

    def module_in(self, format: Format, tensor: str) -> str:
        """The module of a tensor of the files, by the names of ``format``; ends before its leaf."""
        name = self._aliases[tensor][format]
        return name.removesuffix(".weight").removesuffix(".bias")


def joined(name: str) -> str:
    """A name with underscores for dots, as some trainers write it."""
    return name.replace(".", "_")


def _candidates(module: str, what: str) -> Sequence[str]:
    if what == "modulation":
        return (f"{module}.modulation", f"{module}.scale_shift_table", module)
    if what == "bias":
        return (f"{module}.bias",)
    return (f"{module}.weight", module) if what else (module,)


def prefix_of(name: str) -> str:
    """What stands before the module in a key."""
    return name[: len(name) - len(_without_prefixes(name))]


def depth_of(names: Iterable[str]) -> int:
    """How many blocks a model has at least, whose LoRA has these keys."""
    found = (_BLOCK.search(name) for name in names if len(name) <= _MAX_NAME)
    return max((int(match[1]) + 1 for match in found if match), default=0)
