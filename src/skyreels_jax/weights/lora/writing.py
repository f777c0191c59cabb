"""Writes LoRA files: what another one holds in PEFT's or ComfyUI's words, or what models differ by.

PEFT's form is diffusers' names under ``transformer.`` with the configuration in the header, and
holds products of two matrices alone. ComfyUI's is the original's names under ``diffusion_model.``
with an alpha beside each product, and holds every kind.
"""

import json
import math
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Final, Literal

import numpy as np

from skyreels_jax.errors import WeightsError
from skyreels_jax.weights.engine import TensorStream
from skyreels_jax.weights.lora.adapters import LORA, UP_BIAS, Adapter
from skyreels_jax.weights.lora.binding import BoundLora
from skyreels_jax.weights.lora.file import ADAPTER_METADATA
from skyreels_jax.weights.lora.names import ModelNames
from skyreels_jax.weights.plan import Format, Problems
from skyreels_jax.weights.safetensors_file import TensorSpec

LoraForm = Literal["peft", "comfyui"]
LORA_FORMS: Final[tuple[LoraForm, ...]] = ("peft", "comfyui")
_COMFY: Final = "diffusion_model."
_PEFT: Final = "transformer."
_FLOAT32: Final = np.dtype(np.float32)
# What ComfyUI calls the parts of a module; others have the names that they have here.
_COMFY_PARTS: Final[Mapping[str, str]] = {
    "down": "lora_down.weight",
    "up": "lora_up.weight",
    "mid": "lora_mid.weight",
    "magnitude": "dora_scale",
    # A parameter that is no weight of a module is named itself, and the change of it is a diff.
    "diff_m": "diff",
    "up_bias": "diff_b",
    "rows_down": "lora_up.weight",
    "rows_up": "lora_down.weight",
}


@dataclass
class LoraWriter:
    """A LoRA file under construction: what each tensor will be, and how its values come about.

    Attributes:
        specs: shapes and dtypes by name.
        metadata: texts for the header.
    """

    specs: dict[str, TensorSpec] = field(default_factory=dict)
    metadata: dict[str, str] = field(default_factory=dict)
    _values: dict[str, Callable[[], np.ndarray]] = field(default_factory=dict)

    def add(self, name: str, spec: TensorSpec, values: Callable[[], np.ndarray]) -> None:
        """Announce a tensor; ``values`` is called when it is written.

        Raises:
            WeightsError: there is one of this name.
        """
        if name in self.specs:
            raise WeightsError(f"two adapters would be written as {name}")
        self.specs[name], self._values[name] = spec, values

    def add_number(self, name: str, value: float) -> None:
        """Announce a float32 scalar."""
        self.add(name, TensorSpec((), _FLOAT32), lambda: np.asarray(value, np.float32))

    def stream(self) -> TensorStream:
        """The tensors, one in memory at a time."""

        def values() -> Iterator[tuple[str, np.ndarray]]:
            for name in self.specs:
                yield name, self._values[name]()

        return TensorStream(self.specs, values(), self.metadata)


def in_form(lora: BoundLora, names: ModelNames, form: LoraForm) -> TensorStream:
    """The adapters of a LoRA file in the words of PEFT or of ComfyUI.

    Args:
        lora: the file, bound.
        names: of the model that it was bound to.
        form: to write.

    Raises:
        WeightsError: the form has no words for a kind of adapter; names them.
    """
    return _in_comfyui(lora, names) if form == "comfyui" else _in_peft(lora, names)


@dataclass(frozen=True)
class TrainedProduct:
    """A product that was trained: ``up @ down``, to be scaled by alpha.

    Attributes:
        names: of its module, in each format.
        down: ``[rank, in]``.
        up: ``[out, rank]``.
    """

    names: Mapping[Format, str]
    down: np.ndarray
    up: np.ndarray


def lora_of_products(
    products: Sequence[TrainedProduct],
    form: LoraForm,
    *,
    alpha: float,
    rslora: bool = False,
    dropout: float = 0.0,
) -> TensorStream:
    """A LoRA file of products that were trained with one alpha.

    Args:
        products: of one rank.
        form: to write.
        alpha: they are scaled by it over the rank.
        rslora: over the rank's root; ComfyUI, which knows none of that, is given the alpha that
            comes to the same.
        dropout: that they were trained with, for PEFT's configuration.

    Raises:
        WeightsError: two are of one module.
    """
    written, rank = LoraWriter(), products[0].down.shape[0]
    words = ("lora_A", "lora_B") if form == "peft" else ("lora_down", "lora_up")
    format: Format = "diffusers" if form == "peft" else "original"
    for product in products:
        stem = (_PEFT if form == "peft" else _COMFY) + product.names[format]
        for word, values in zip(words, (product.down, product.up), strict=True):
            spec = TensorSpec(values.shape, values.dtype)
            written.add(f"{stem}.{word}.weight", spec, partial(np.asarray, values))
        if form == "comfyui":
            written.add_number(f"{stem}.alpha", alpha * math.sqrt(rank) if rslora else alpha)
    if form == "peft":
        configuration = {
            "r": rank,
            "lora_alpha": int(alpha) if alpha == int(alpha) else alpha,
            "target_modules": sorted(product.names[format] for product in products),
            "use_rslora": rslora,
            "lora_dropout": dropout,
            "use_dora": False,
            "lora_bias": False,
            "bias": "none",
            "peft_type": "LORA",
        }
        _add_configuration(written, configuration)
    return written.stream()


def _in_comfyui(lora: BoundLora, names: ModelNames) -> TensorStream:
    written = LoraWriter()
    for adapter in lora.adapters:
        stem = _COMFY + names.module_in("original", adapter.place.tensor)
        for part, key in adapter.keys.items():
            if part == "alpha":
                continue
            name = f"{stem}.{_COMFY_PARTS.get(part, part)}"
            _add_part(written, name, lora, adapter, (part, key))
        if adapter.rank is not None and adapter.kind is not UP_BIAS:
            written.add_number(f"{stem}.alpha", adapter.factor * adapter.rank)
    return written.stream()


def _add_part(
    written: LoraWriter, name: str, lora: BoundLora, adapter: Adapter, of: tuple[str, str]
) -> None:
    """One tensor of an adapter as another file has it."""
    part, key = of
    info, source = lora.file.tensors()[key], lora.file.source
    shape, dtype = info.shape, info.dtype
    k, n = adapter.place.rows
    if part == "up" and n > 1:
        rows = shape[0] // n
        shape = (rows, *shape[1:])
        written.add(
            name,
            TensorSpec(shape, dtype),
            lambda: np.asarray(source.read(key))[k * rows : (k + 1) * rows],
        )
    elif part in ("rows_down", "rows_up"):
        spec = TensorSpec(shape[::-1], dtype)
        written.add(name, spec, lambda: np.asarray(source.read(key)).T)
    elif part == "up_bias" and adapter.factor != 1:
        factor = np.float32(adapter.factor)
        written.add(name, TensorSpec(shape, _FLOAT32), lambda: lora.file.read(key) * factor)
    elif part == "magnitude" and len(shape) == 1:
        spec = TensorSpec((*shape, 1), dtype)
        written.add(name, spec, lambda: np.asarray(source.read(key))[:, None])
    else:
        written.add(name, TensorSpec(shape, dtype), lambda: np.asarray(source.read(key)))


def _in_peft(lora: BoundLora, names: ModelNames) -> TensorStream:
    products = {a.place.tensor: a for a in lora.adapters if a.kind is LORA}
    biases = {
        names.module_in("diffusers", a.place.tensor): a
        for a in lora.adapters
        if a.kind.what == "bias"
    }
    modules = {names.module_in("diffusers", tensor): a for tensor, a in products.items()}
    _check_peft(lora, modules, biases)
    written = LoraWriter()
    for module, adapter in modules.items():
        stem = _PEFT + module
        for part, key in adapter.keys.items():
            words = {"down": "lora_A.weight", "up": "lora_B.weight"}
            if part in words:
                _add_part(written, f"{stem}.{words[part]}", lora, adapter, (part, key))
            elif part == "magnitude":
                _add_magnitude(written, f"{stem}.lora_magnitude_vector", lora, key)
        if biases:
            _add_bias(written, f"{stem}.lora_B.bias", lora, adapter, biases.get(module))
    configuration = _configuration(modules, has_bias=bool(biases))
    _add_configuration(written, configuration)
    return written.stream()


def _add_configuration(written: LoraWriter, configuration: Mapping[str, object]) -> None:
    text = {f"{_PEFT}{name}": value for name, value in configuration.items()}
    written.metadata[ADAPTER_METADATA] = json.dumps(text, sort_keys=True)


def _check_peft(
    lora: BoundLora, modules: Mapping[str, Adapter], biases: Mapping[str, Adapter]
) -> None:
    """Refuse what PEFT's form has no words for."""
    problems = Problems()
    for adapter in lora.adapters:
        if not (adapter.kind is LORA or adapter.kind.what == "bias") or "mid" in adapter.keys:
            problems.add(f"adapters of the kind {adapter.label}", adapter.place.tensor)
    for module in biases.keys() - modules.keys():
        problems.add("changes of a bias beside no product", module)
    decomposed = [module for module, a in modules.items() if "magnitude" in a.keys]
    if decomposed and len(decomposed) < len(modules):
        problems.add("DoRA of some modules and not of all", decomposed[0])
    if decomposed and biases:
        problems.add("DoRA with changes of biases", decomposed[0])
    try:
        problems.raise_for(str(lora.file.path))
    except WeightsError as error:
        raise WeightsError(f"{error}\nPEFT's form has no words for these: write comfyui") from error


def _add_magnitude(written: LoraWriter, name: str, lora: BoundLora, key: str) -> None:
    info = lora.file.tensors()[key]
    if len(info.shape) == 2 and info.shape[0] == 1 and info.shape[1] != 1:
        raise WeightsError(f"{lora.file.path}: {key}: PEFT has no magnitudes of inputs")
    size = math.prod(info.shape)
    spec = TensorSpec((size,), info.dtype)
    written.add(name, spec, lambda: np.asarray(lora.file.source.read(key)).reshape(size))


def _add_bias(
    written: LoraWriter, name: str, lora: BoundLora, product: Adapter, bias: Adapter | None
) -> None:
    """PEFT scales the bias as the product, and has one for every module or for none."""
    up = lora.file.tensors()[product.keys["up"]]
    size = up.shape[0] // product.place.rows[1]

    def values() -> np.ndarray:
        if bias is None:
            return np.zeros(size, np.float32)
        key = next(key for part, key in bias.keys.items() if part != "alpha")
        own = np.float32(bias.factor if bias.kind is UP_BIAS else 1.0)
        return lora.file.read(key).reshape(-1) * own / np.float32(product.factor)

    if bias is not None and product.factor == 0:
        raise WeightsError(f"{name}: a change of a bias beside a product of scale 0")
    written.add(name, TensorSpec((size,), _FLOAT32), values)


def _configuration(modules: Mapping[str, Adapter], *, has_bias: bool) -> dict[str, object]:
    """PEFT's ``LoraConfig`` of these adapters: patterns for what is not the most usual."""
    ranks = {module: adapter.rank or 1 for module, adapter in modules.items()}
    alphas = {module: modules[module].factor * rank for module, rank in ranks.items()}
    rank = int(_most_usual(list(ranks.values())))
    alpha = _most_usual(list(alphas.values()))
    return {
        "r": rank,
        "lora_alpha": int(alpha) if alpha == int(alpha) else alpha,
        "rank_pattern": {m: r for m, r in ranks.items() if r != rank},
        "alpha_pattern": {m: a for m, a in alphas.items() if a != alpha},
        "target_modules": sorted(modules),
        "use_dora": any("magnitude" in adapter.keys for adapter in modules.values()),
        "lora_bias": has_bias,
        "bias": "none",
        "peft_type": "LORA",
    }


def _most_usual(values: Sequence[int | float]) -> int | float:
    return Counter(values).most_common(1)[0][0]
