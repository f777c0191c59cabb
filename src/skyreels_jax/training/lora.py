"""What of a transformer a LoRA is trained of: the recipe's table, the linears, initial values."""

import difflib
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from operator import attrgetter
from typing import Final, Literal

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, UInt32

from skyreels_jax.errors import RequestError
from skyreels_jax.models.layers import Linear
from skyreels_jax.models.transformer import WanModel
from skyreels_jax.models.transformer_config import TransformerConfig
from skyreels_jax.training.config import check_at_least
from skyreels_jax.training.task import Params, Template
from skyreels_jax.weights.components.transformer import transformer_rules
from skyreels_jax.weights.plan import FORMATS, LINEAR, Format

# By the original's names of modules.
_PRESETS: Final[Mapping[str, str]] = {
    "attention": r"blocks\.\d+\.(self|cross)_attn\..+",
    "attention+ffn": r"blocks\..+",
    "all linear": r".+",
}
# The most that files are read with: `weights.lora.adapters`.
_MAX_RANK: Final = 1 << 14


@dataclass(frozen=True)
class LoraTraining:
    """The table ``lora``: the transformer's parameters stay, and matrices beside them are trained.

    A pattern is the end of a module's name, in diffusers' words (``attn1.to_q``) or the original's
    (``self_attn.q``), as in PEFT's ``target_modules``, or a regular expression of all of it.

    Attributes:
        rank: of each product of two matrices.
        alpha: a product is multiplied by ``alpha / rank``; the rank unless given.
        rslora: divide by the root of the rank instead (arXiv 2312.03732).
        dropout: share of what enters a product that is dropped in a step.
        targets: ``attention``, ``attention+ffn``, ``all linear`` (of embedders and head too), or
            patterns.
        exclude: patterns of modules that are left out of ``targets``.
        include: patterns of modules that are trained whatever ``exclude`` says.
        base: what the transformer's own parameters are kept in; ``int8`` is of the blocks' kernels
            alone, beside bfloat16.
        dora: not trained here; files that have it are read.
        title: of the files, for people.
        trigger: the words that call what was learned, for people.
    """

    rank: int = 16
    alpha: float | None = None
    rslora: bool = False
    dropout: float = 0.0
    targets: str | tuple[str, ...] = "attention+ffn"
    exclude: tuple[str, ...] = ()
    include: tuple[str, ...] = ()
    base: Literal["float32", "bfloat16", "int8"] = "bfloat16"
    dora: bool = False
    title: str | None = None
    trigger: str | None = None

    def __post_init__(self):
        check_at_least(self, 1, "rank", most=_MAX_RANK)
        if self.alpha is not None and not 0 < self.alpha <= 1e6:
            raise ValueError(f"alpha = {self.alpha} should be above 0; nearest: {self.rank}")
        if not 0 <= self.dropout < 1:
            raise ValueError(f"dropout = {self.dropout} should be at least 0 and below 1")
        if self.dora:
            raise ValueError("dora = true: DoRA is read from files, but not trained; leave it out")
        if isinstance(self.targets, str) and self.targets not in _PRESETS:
            legal = ", ".join(map(repr, _PRESETS))
            raise ValueError(f"targets = {self.targets!r:.60} should be {legal} or a list")
        if not self.targets and not self.include:
            raise ValueError("targets = [] leaves nothing to train; give 'attention+ffn'")
        for pattern in (*self._listed(), *self.exclude, *self.include):
            try:
                re.compile(pattern)
            except re.error as error:
                raise ValueError(f"{pattern!r:.60} is no regular expression: {error}") from error
            if not pattern:
                raise ValueError("an empty pattern names no module")

    def _listed(self) -> tuple[str, ...]:
        return () if isinstance(self.targets, str) else self.targets

    @property
    def scale(self) -> float:
        """What a product is multiplied by."""
        return self.stated_alpha / (math.sqrt(self.rank) if self.rslora else self.rank)

    @property
    def stated_alpha(self) -> float:
        """The alpha, which is the rank unless given."""
        return float(self.rank) if self.alpha is None else self.alpha


@dataclass(frozen=True)
class LoraTarget:
    """A linear that gets a product, or a stack of linears, of which some blocks' do.

    Attributes:
        path: of the linear in the model.
        layers: the blocks that have one, of ``depth``; ``None`` where the linear is in no block.
        depth: how many blocks there are.
        names: of the modules in the files of a format, one for each of ``layers``.
    """

    path: str
    layers: tuple[int, ...] | None
    depth: int
    names: Mapping[Format, tuple[str, ...]]

    @property
    def down(self) -> str:
        """The name of the first matrix among the parameters: ``[layers, in, rank]``."""
        return f"{self.path}.lora_down"

    @property
    def up(self) -> str:
        """The name of the second: ``[layers, rank, out]``."""
        return f"{self.path}.lora_up"

    def spread(self, stack: Float[Array, "some *shape"]) -> Float[Array, "depth *shape"]:
        """A stack of the trained blocks' matrices as one of all blocks', zero for the others."""
        if self.layers is None or len(self.layers) == self.depth:
            return stack
        whole = jnp.zeros((self.depth, *stack.shape[1:]), stack.dtype)
        return whole.at[jnp.asarray(self.layers)].set(stack)


def lora_targets(config: TransformerConfig, lora: LoraTraining) -> tuple[LoraTarget, ...]:
    """The linears of a transformer that a recipe's patterns choose.

    Raises:
        RequestError: a pattern matches none, or none is left.
    """
    every = _every_linear(config)
    names = [of[k] for t in every for of in t.names.values() for k in range(len(of))]
    for pattern in (*lora._listed(), *lora.exclude, *lora.include):
        if not any(_is_named(name, pattern) for name in names):
            ends = sorted({re.sub(r"^blocks\.\d+\.", "", name) for name in names})
            near = difflib.get_close_matches(pattern, ends, n=3, cutoff=0.3) or ends[:3]
            raise RequestError(
                f"lora: no linear of this model is named {pattern!r:.60}; there are "
                f"{', '.join(near)}"
            )
    found = []
    for target in every:
        count = len(target.names["original"])
        chosen = [k for k in range(count) if _is_chosen(target, k, lora)]
        if chosen:
            names_of: dict[Format, tuple[str, ...]] = {
                f: tuple(target.names[f][k] for k in chosen) for f in FORMATS
            }
            layers = None if target.layers is None else tuple(target.layers[k] for k in chosen)
            found.append(LoraTarget(target.path, layers, target.depth, names_of))
    if not found:
        raise RequestError("lora: targets without exclude leave no linear to train")
    return tuple(found)


def _every_linear(config: TransformerConfig) -> Sequence[LoraTarget]:
    found = []
    for rule in transformer_rules(config):
        layers, names = None, dict[Format, tuple[str, ...]]()
        for format in FORMATS:
            source = rule.source(format)
            if source is not None and source.transform is LINEAR:
                module = source.name.removesuffix(".weight")
                layers = tuple(range(config.num_layers)) if "{i}" in module else None
                names[format] = tuple(module.replace("{i}", str(i)) for i in layers or (0,))
        if len(names) < len(FORMATS):
            continue
        path = rule.target.removesuffix(".kernel")
        found.append(LoraTarget(path, layers, config.num_layers, names))
    return found


def _is_named(name: str, pattern: str) -> bool:
    is_end = name == pattern or name.endswith("." + pattern)
    return is_end or re.fullmatch(pattern, name) is not None


def _is_chosen(target: LoraTarget, k: int, lora: LoraTraining) -> bool:
    names = [of[k] for of in target.names.values()]

    def any_of(patterns: Sequence[str]) -> bool:
        return any(_is_named(name, pattern) for name in names for pattern in patterns)

    if any_of(lora.include):
        return True
    if isinstance(lora.targets, str):
        is_target = re.fullmatch(_PRESETS[lora.targets], target.names["original"][k]) is not None
    else:
        is_target = any_of(lora.targets)
    return is_target and not any_of(lora.exclude)


@dataclass(frozen=True, eq=False)
class LoraModel:
    """A transformer whose parameters stay, and a LoRA of it to be trained.

    Attributes:
        template: of the transformer with the LoRA's matrices beside its kernels.
        frozen: its own parameters, by dotted path.
        targets: the linears that have matrices.
        lora: the recipe's table.
        sizes: inputs and outputs of each target's linear.
    """

    template: Template[WanModel]
    frozen: Params
    targets: Sequence[LoraTarget]
    lora: LoraTraining
    sizes: Mapping[str, tuple[int, int]]

    @classmethod
    def of(cls, model: WanModel, lora: LoraTraining) -> "LoraModel":
        """Give a transformer's linears places for matrices; ``model`` is changed.

        Raises:
            RequestError: as :func:`lora_targets`.
        """
        targets, sizes = lora_targets(model.config, lora), {}
        for target in targets:
            linear = attrgetter(target.path)(model)
            assert isinstance(linear, Linear)
            sizes[target.path] = linear.kernel.get_value().shape[-2:]
            # Of no size: the values come with every call.
            linear.lora_down = nnx.data(nnx.Param(jnp.zeros(())))
            linear.lora_up = nnx.data(nnx.Param(jnp.zeros(())))
        template, params = Template.of(model)
        own = {name for target in targets for name in (target.down, target.up)}
        frozen = {name: value for name, value in params.items() if name not in own}
        return cls(template, frozen, targets, lora, sizes)

    def init(self, seed: int) -> Params:
        """The matrices before the first step, float32: together they add nothing.

        The first is Kaiming-uniform of slope root 5, ``U(-1 / sqrt(in), 1 / sqrt(in))``, and the
        second zero, as PEFT's ``reset_lora_parameters`` has them.
        """
        found: dict[str, Array] = {}
        for number, target in enumerate(self.targets):
            width, out = self.sizes[target.path]
            key = jax.random.fold_in(jax.random.key(seed), number)
            stack = () if target.layers is None else (len(target.layers),)
            shape, bound = (*stack, width, self.lora.rank), width**-0.5
            found[target.down] = jax.random.uniform(key, shape, jnp.float32, -bound, bound)
            found[target.up] = jnp.zeros((*stack, self.lora.rank, out), jnp.float32)
        return found

    def model(self, params: Params, dropout: UInt32[Array, "B 2"] | None = None) -> WanModel:
        """The transformer with a LoRA's matrices beside its kernels.

        Args:
            params: the frozen parameters and the matrices.
            dropout: data of a random key for each video, by which the matrices' inputs are dropped;
                ``None`` drops none.
        """
        scale, whole = jnp.float32(self.lora.scale), dict(params)
        for target in self.targets:
            whole[target.down] = target.spread(params[target.down])
            whole[target.up] = target.spread(scale * params[target.up])
        model = self.template.model(whole)
        if dropout is None:
            return model
        for number, target in enumerate(self.targets):
            linear = attrgetter(target.path)(model)
            depth = None if target.layers is None else target.depth
            linear.lora_keys = nnx.data(nnx.Variable(_keys_of(dropout, number, depth)))
            linear.lora_dropout = self.lora.dropout
        return model


def _keys_of(keys: Array, number: int, depth: int | None) -> Array:
    """Data of keys ``[depth, B, 2]`` of a target's blocks, or ``[B, 2]``, out of the videos'."""

    def by_layer(layer: Array) -> Array:
        def by_video(key: Array) -> Array:
            own = jax.random.fold_in(jax.random.wrap_key_data(key), number)
            return jax.random.key_data(jax.random.fold_in(own, layer))

        return jax.vmap(by_video)(keys)

    return by_layer(jnp.uint32(0)) if depth is None else jax.vmap(by_layer)(jnp.arange(depth))
