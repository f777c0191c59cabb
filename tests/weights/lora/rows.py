"""LoRA files as other programs write them, each with what a transformer's weights are with it.

The formulas stand here, in float64; nothing of the package is used for them. Weights go by the
original's names.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np
from tests.weights.lora.files import Tensors, low_rank, merged_low_rank, random

from skyreels_jax.testing.random_checkpoint import Kind

RANK = 4
# The linears of a block, by the original's names and by diffusers'.
ATTENTION = {
    **{
        f"self_attn.{a}": f"attn1.{b}"
        for a, b in zip("qkvo", ("to_q", "to_k", "to_v", "to_out.0"), strict=True)
    },
    **{
        f"cross_attn.{a}": f"attn2.{b}"
        for a, b in zip("qkvo", ("to_q", "to_k", "to_v", "to_out.0"), strict=True)
    },
}
LINEARS = ATTENTION | {"ffn.0": "ffn.net.0.proj", "ffn.2": "ffn.net.2"}
TOPS = ("text_embedding.0", "text_embedding.2", "time_embedding.0", "time_embedding.2")
TOPS += ("time_projection.1", "head.head")


@dataclass(frozen=True)
class Row:
    """A kind of file.

    Attributes:
        name: of it, as the documentation's table has it.
        tensors: what the file holds, for weights by the original's names.
        expected: the changed weights.
        kind: of checkpoint.
        metadata: PEFT's configuration in the header.
    """

    name: str
    tensors: Callable[[Tensors], Tensors]
    expected: Callable[[Tensors, Tensors], Tensors]
    kind: Kind = "df"
    metadata: Mapping[str, object] | None = None


def blocks(parts: Mapping[str, str], *, diffusers: bool = False) -> dict[str, str]:
    """Modules of both blocks: the name in a file -> the original's."""
    return {
        f"blocks.{i}.{theirs if diffusers else ours}": f"blocks.{i}.{ours}"
        for i in range(2)
        for ours, theirs in parts.items()
    }


def products(
    modules: Mapping[str, str], scale: float | Callable[[str], float] = 1.0, **how: object
) -> dict[str, Callable]:
    """The ``tensors`` and ``expected`` of products of two matrices."""
    underscores, prefix = how.get("underscores", False), how.get("prefix", "")
    down, up = (
        ("lora_A", "lora_B") if how.get("pair", "peft") == "peft" else ("lora_down", "lora_up")
    )

    def tensors(weights: Tensors) -> Tensors:
        shapes = {name: weights[f"{ours}.weight"].shape for name, ours in modules.items()}
        return low_rank(shapes, **how)

    def expected(weights: Tensors, file: Tensors) -> Tensors:
        changed = {}
        for name, ours in modules.items():
            stem = f"{prefix}{name.replace('.', '_') if underscores else name}"
            pair = file[f"{stem}.{down}.weight"], file[f"{stem}.{up}.weight"]
            factor = scale(name) if callable(scale) else scale
            changed[f"{ours}.weight"] = merged_low_rank(weights[f"{ours}.weight"], *pair, factor)
        return changed

    return {"tensors": tensors, "expected": expected}


def added(changes: Mapping[str, tuple[str, tuple[int, ...]]]) -> dict[str, Callable]:
    """Whole differences: the original's name -> the key and the shape of what is added to it."""

    def tensors(weights: Tensors) -> Tensors:
        del weights
        return {key: random(*shape, seed=i) for i, (key, shape) in enumerate(changes.values())}

    def expected(weights: Tensors, file: Tensors) -> Tensors:
        return {
            name: weights[name].astype(np.float64) + file[key].reshape(weights[name].shape)
            for name, (key, _) in changes.items()
        }

    return {"tensors": tensors, "expected": expected}


def one(
    module: str,
    make: Callable[[np.ndarray], Tensors],
    formula: Callable[[np.ndarray, Tensors], np.ndarray],
    prefix: str = "diffusion_model.",
) -> dict[str, Callable]:
    """Adapters of one module: the parts, and the weight made of them in float64."""
    stem = prefix + (module.replace(".", "_") if prefix.endswith("_") else module)

    def tensors(weights: Tensors) -> Tensors:
        return {f"{stem}.{part}": v for part, v in make(weights[f"{module}.weight"]).items()}

    def expected(weights: Tensors, file: Tensors) -> Tensors:
        parts = {k.removeprefix(f"{stem}."): v.astype(np.float64) for k, v in file.items()}
        weight = weights[f"{module}.weight"].astype(np.float64)
        return {f"{module}.weight": formula(weight, parts)}

    return {"tensors": tensors, "expected": expected}


def both(*parts: dict[str, Callable]) -> dict[str, Callable]:
    """One file with the keys of several."""
    return {
        "tensors": lambda weights: {k: v for p in parts for k, v in p["tensors"](weights).items()},
        "expected": lambda weights, file: {
            k: v for p in parts for k, v in p["expected"](weights, file).items()
        },
    }


def norm_of(total: np.ndarray, axis: int) -> np.ndarray:
    others = tuple(i for i in range(total.ndim) if i != axis)
    return np.sqrt((total**2).sum(others, keepdims=True))


def dora(axis: int, scale: float) -> Callable[[np.ndarray, Tensors], np.ndarray]:
    def formula(weight: np.ndarray, p: Tensors) -> np.ndarray:
        total = merged_low_rank(weight, p["lora_down.weight"], p["lora_up.weight"], scale)
        norm = norm_of(total, axis)
        return p["dora_scale"].reshape(norm.shape) * total / norm

    return formula


def dora_parts(axis: int) -> Callable[[np.ndarray], Tensors]:
    def make(w: np.ndarray) -> Tensors:
        shape = (len(w), 1) if axis == 0 else (1, w.shape[1])
        return {
            "lora_down.weight": random(RANK, w.shape[1]),
            "lora_up.weight": random(len(w), RANK, seed=1),
            "alpha": np.float32(2),
            "dora_scale": 1 + random(*shape, seed=2),
        }

    return make


def dora_of_peft() -> dict[str, Callable]:
    modules = blocks(LINEARS, diffusers=True)
    plain = products(modules, 2.0, prefix="transformer.")

    def tensors(weights: Tensors) -> Tensors:
        magnitudes = {
            f"transformer.{name}.lora_magnitude_vector": 1
            + random(len(weights[f"{ours}.weight"]), seed=i)
            for i, (name, ours) in enumerate(modules.items())
        }
        return plain["tensors"](weights) | magnitudes

    def expected(weights: Tensors, file: Tensors) -> Tensors:
        merged = plain["expected"](weights, file)
        for name, ours in modules.items():
            total = merged[f"{ours}.weight"]
            magnitude = file[f"transformer.{name}.lora_magnitude_vector"][:, None]
            merged[f"{ours}.weight"] = magnitude * total / norm_of(total, 0)
        return merged

    return {"tensors": tensors, "expected": expected}


def fused() -> dict[str, Callable]:
    """Queries, keys and values as one linear, as diffusers fuses them."""
    stem = "transformer.blocks.0.attn1.to_qkv"

    def tensors(weights: Tensors) -> Tensors:
        width = len(weights["blocks.0.self_attn.q.weight"])
        return low_rank({stem: (3 * width, width)})

    def expected(weights: Tensors, file: Tensors) -> Tensors:
        down, up = file[f"{stem}.lora_A.weight"], file[f"{stem}.lora_B.weight"]
        names = [f"blocks.0.self_attn.{x}.weight" for x in "qkv"]
        pieces = zip(names, np.split(up, 3), strict=True)
        return {name: merged_low_rank(weights[name], down, piece, 1) for name, piece in pieces}

    return {"tensors": tensors, "expected": expected}


def table() -> dict[str, Callable]:
    stem = "base_model.model.fps_embedding"

    def tensors(weights: Tensors) -> Tensors:
        rows, width = weights["fps_embedding.weight"].shape
        return {
            f"{stem}.lora_embedding_A": random(RANK, rows),
            f"{stem}.lora_embedding_B": random(width, RANK, seed=1),
        }

    def expected(weights: Tensors, file: Tensors) -> Tensors:
        a, b = file[f"{stem}.lora_embedding_A"], file[f"{stem}.lora_embedding_B"]
        change = (b.astype(np.float64) @ a).T
        return {"fps_embedding.weight": weights["fps_embedding.weight"] + change}

    return {"tensors": tensors, "expected": expected}


def configuration(modules: Mapping[str, str], **values: object) -> dict[str, object]:
    given = {"r": RANK, "lora_alpha": RANK, "target_modules": list(modules), **values}
    return {f"transformer.{name}": value for name, value in given.items()}


def kron(weight: np.ndarray, p: Tensors, scale: float = 1.0) -> np.ndarray:
    first = p["lokr_w1"] if "lokr_w1" in p else p["lokr_w1_a"] @ p["lokr_w1_b"]
    if "lokr_t2" in p:
        second = np.einsum("ijklm,ip,jr->prklm", p["lokr_t2"], p["lokr_w2_a"], p["lokr_w2_b"])
    else:
        second = p["lokr_w2"] if "lokr_w2" in p else p["lokr_w2_a"] @ p["lokr_w2_b"]
    change = np.zeros_like(weight)
    a, b = first.shape
    c, d = second.shape[:2]
    for i in range(a):
        for j in range(b):
            change[i * c : (i + 1) * c, j * d : (j + 1) * d] = first[i, j] * second
    return weight + scale * change


def hada(weight: np.ndarray, p: Tensors, scale: float) -> np.ndarray:
    def factor(n: int) -> np.ndarray:
        a, b = p[f"hada_w{n}_a"], p[f"hada_w{n}_b"]
        if f"hada_t{n}" in p:
            return np.einsum("ijklm,ip,jr->prklm", p[f"hada_t{n}"], a, b)
        return (a @ b).reshape(weight.shape)

    return weight + scale * factor(1) * factor(2)


PEFT = blocks(LINEARS, diffusers=True)
IMAGE = {"cross_attn.k_img": "attn2.add_k_proj", "cross_attn.v_img": "attn2.add_v_proj"}
Q, FF, PATCH = "blocks.0.self_attn.q", "blocks.1.ffn.0", "patch_embedding"
COMFY = {"prefix": "diffusion_model."}
KOHYA = {"prefix": "lora_unet_", "underscores": True, "pair": "kohya"}


def factored_lokr(w: np.ndarray) -> Tensors:
    return {
        "lokr_w1_a": random(4, 2),
        "lokr_w1_b": random(2, 4, seed=1),
        "lokr_w2_a": random(len(w) // 4, 2, seed=2),
        "lokr_w2_b": random(2, w.shape[1] // 4, seed=3),
        "alpha": np.float32(3),
    }


def whole_lokr(w: np.ndarray) -> Tensors:
    # With two whole factors alpha means nothing; LyCORIS writes it all the same.
    whole = {"lokr_w1": random(4, 2), "lokr_w2": random(len(w) // 4, w.shape[1] // 2, seed=1)}
    return whole | {"alpha": np.float32(9)}


ROWS = (
    Row("PEFT: `transformer.*.lora_A/B`", **products(PEFT, prefix="transformer.")),
    Row(
        "PEFT, alpha by the header",
        **products(PEFT, 2.0, prefix="transformer."),
        metadata=configuration(PEFT, lora_alpha=2 * RANK),
    ),
    Row(
        "PEFT, rsLoRA by the header",
        **products(PEFT, 8 / RANK**0.5, prefix="transformer."),
        metadata=configuration(PEFT, lora_alpha=8, use_rslora=True),
    ),
    Row(
        "PEFT, an alpha by pattern",
        **products(
            PEFT, lambda name: 3.0 if name == "blocks.1.attn1.to_q" else 1.0, prefix="transformer."
        ),
        metadata=configuration(PEFT, alpha_pattern={"blocks.1.attn1.to_q": 3 * RANK}),
    ),
    Row("PEFT, DoRA", **dora_of_peft(), metadata=configuration(PEFT, lora_alpha=8, use_dora=True)),
    Row("without a prefix (`save_lora_adapter`)", **products(PEFT)),
    Row("`base_model.model.`", **products(PEFT, prefix="base_model.model.")),
    Row("`pipe.dit.` and the original's names", **products(blocks(LINEARS), prefix="pipe.dit.")),
    Row("`diffusion_model.` without alpha", **products(blocks(LINEARS), **COMFY)),
    Row(
        "`diffusion_model.` with alpha",
        **products(blocks(LINEARS), 0.5, **COMFY, alpha=2.0, pair="kohya"),
    ),
    Row(
        "with `diff_b` of linears",
        **both(
            products(blocks(LINEARS), **COMFY),
            added({f"{Q}.bias": (f"diffusion_model.{Q}.diff_b", (32,))}),
        ),
    ),
    Row(
        "with `diff` of norms and of the patch embedding",
        **both(
            products(blocks(LINEARS), **COMFY),
            added(
                {
                    "blocks.0.norm3.weight": ("diffusion_model.blocks.0.norm3.diff", (32,)),
                    "blocks.0.norm3.bias": ("diffusion_model.blocks.0.norm3.diff_b", (32,)),
                    f"{Q[:-1]}norm_q.weight": (f"diffusion_model.{Q[:-1]}norm_q.diff", (32,)),
                    f"{PATCH}.weight": (f"diffusion_model.{PATCH}.diff", (32, 16, 1, 2, 2)),
                }
            ),
        ),
    ),
    Row(
        "with `diff_m` of modulations",
        **both(
            products(blocks(LINEARS), **COMFY),
            added(
                {
                    "blocks.0.modulation": ("diffusion_model.blocks.0.diff_m", (1, 6, 32)),
                    "blocks.1.modulation": ("diffusion_model.blocks.1.modulation.diff", (1, 6, 32)),
                    "head.modulation": ("diffusion_model.head.diff_m", (1, 2, 32)),
                }
            ),
        ),
    ),
    Row("LoRA of the patch embedding", **products({PATCH: PATCH}, **COMFY)),
    Row(
        "embeddings, head and time projection with alpha",
        **products({t: t for t in TOPS}, 0.5, **COMFY, alpha=2.0, pair="kohya"),
    ),
    Row("the head alone", **products({"head.head": "head.head"}, **COMFY)),
    Row(
        "`fps_projection`, SkyReels' own",
        **products({f"fps_projection.{i}": f"fps_projection.{i}" for i in (0, 2)}, **COMFY),
    ),
    Row("a table's LoRA (`fps_embedding`)", **table()),
    Row(
        "`lora_unet_`, all linears of the blocks",
        **products(blocks(LINEARS), 0.5, **KOHYA, alpha=2.0),
    ),
    Row("`lora_unet_`, attention alone", **products(blocks(ATTENTION), 0.5, **KOHYA, alpha=2.0)),
    Row("`lora_unet_` without alpha", **products(blocks(LINEARS), **KOHYA)),
    Row(
        "`lora_unet__`",
        **products(blocks(LINEARS), 0.5, **{**KOHYA, "prefix": "lora_unet__"}, alpha=2.0),
    ),
    Row("`lora_unet_`, top modules", **products({t: t for t in TOPS}, 0.5, **KOHYA, alpha=2.0)),
    Row(
        "LoCon with `lora_mid`",
        **one(
            PATCH,
            lambda w: {
                "lora_mid.weight": random(3, RANK, *w.shape[2:]),
                "lora_down.weight": random(RANK, w.shape[1], 1, 1, 1, seed=1),
                "lora_up.weight": random(len(w), 3, 1, 1, 1, seed=2),
                "alpha": np.float32(2),
            },
            lambda w, p: (
                w
                + 0.5
                * np.einsum(
                    "pqklm,op,qi->oiklm",
                    p["lora_mid.weight"],
                    p["lora_up.weight"][..., 0, 0, 0],
                    p["lora_down.weight"][..., 0, 0, 0],
                )
            ),
            "lycoris_",
        ),
    ),
    Row("DoRA by outputs (`dora_scale`)", **one(FF, dora_parts(0), dora(0, 0.5))),
    Row("DoRA by inputs", **one(FF, dora_parts(1), dora(1, 0.5))),
    Row("LoKr of two whole factors", **one(FF, whole_lokr, kron, "lycoris_")),
    Row("LoKr of products", **one(FF, factored_lokr, lambda w, p: kron(w, p, 1.5), "lycoris_")),
    Row(
        "LoKr of a convolution",
        **one(
            PATCH,
            lambda w: {
                "lokr_w1": random(4, 2),
                "lokr_t2": random(3, 3, *w.shape[2:], seed=1),
                "lokr_w2_a": random(3, len(w) // 4, seed=2),
                "lokr_w2_b": random(3, w.shape[1] // 2, seed=3),
                "alpha": np.float32(3),
            },
            kron,
        ),
    ),
    Row(
        "LoKr with DoRA",
        **one(
            FF,
            lambda w: factored_lokr(w) | {"dora_scale": 1 + random(len(w), 1, seed=5)},
            lambda w, p: p["dora_scale"] * kron(w, p, 1.5) / norm_of(kron(w, p, 1.5), 0),
        ),
    ),
    Row(
        "LoHa",
        **one(
            Q,
            lambda w: (
                {f"hada_w{n}_a": random(len(w), RANK, seed=n) for n in (1, 2)}
                | {f"hada_w{n}_b": random(RANK, w.shape[1], seed=5 + n) for n in (1, 2)}
                | {"alpha": np.float32(2)}
            ),
            lambda w, p: hada(w, p, 0.5),
            "lycoris_",
        ),
    ),
    Row(
        "LoHa of a convolution",
        **one(
            PATCH,
            lambda w: (
                {f"hada_w{n}_a": random(3, len(w), seed=n) for n in (1, 2)}
                | {f"hada_w{n}_b": random(3, w.shape[1], seed=5 + n) for n in (1, 2)}
                | {f"hada_t{n}": random(3, 3, *w.shape[2:], seed=9 + n) for n in (1, 2)}
            ),
            lambda w, p: hada(w, p, 1.0),
        ),
    ),
    Row(
        "`w_norm` and `b_norm`",
        **added(
            {
                "blocks.1.norm3.weight": ("diffusion_model.blocks.1.norm3.w_norm", (32,)),
                "blocks.1.norm3.bias": ("diffusion_model.blocks.1.norm3.b_norm", (32,)),
            }
        ),
    ),
    Row(
        "`set_weight`",
        **one(Q, lambda w: {"set_weight": random(*w.shape)}, lambda w, p: p["set_weight"]),
    ),
    Row("queries, keys and values fused", **fused()),
    Row(
        "`k_img`, `v_img` and `img_emb` of an image model",
        **products(
            blocks(LINEARS | IMAGE) | {f"img_emb.proj.{i}": f"img_emb.proj.{i}" for i in (1, 3)},
            0.5,
            **COMFY,
            alpha=2.0,
        ),
        kind="i2v",
    ),
    Row("a text model's LoRA in an image model", **products(blocks(LINEARS), **COMFY), kind="i2v"),
)
