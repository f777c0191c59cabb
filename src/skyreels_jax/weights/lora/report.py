"""What a LoRA file is, for people: who wrote it, its kinds, ranks and scales, what is not used."""

from collections import Counter
from typing import Any

from skyreels_jax.weights.lora.binding import BoundLora
from skyreels_jax.weights.lora.names import prefix_of


def describe_lora(lora: BoundLora) -> dict[str, Any]:
    """The report on a bound LoRA, as JSON values; of its values only alphas are read."""
    tensors = lora.file.tensors()
    prefixes = Counter(prefix_of(name) or "none" for name in tensors)
    dtypes = Counter(info.dtype.name for info in tensors.values())
    factors = Counter(f"{a.factor:g}" for a in lora.adapters if a.rank is not None)
    return {
        "file": str(lora.file.path),
        "size_mb": round(sum(info.nbytes for info in tensors.values()) / 1e6, 3),
        "prefixes": dict(prefixes.most_common()),
        "dtypes": dict(dtypes.most_common()),
        "kinds": dict(lora.kinds),
        "ranks": list(lora.ranks),
        "alphas": sorted({a.stated for a in lora.adapters if a.stated is not None}),
        "scales": dict(factors.most_common()),
        "scaled_by": "the header" if lora.file.scaling is not None else "alpha / rank, or 1",
        "keys": len(tensors),
        "used": lora.used,
        "tensors": len(lora.by_tensor),
        "without_place": list(lora.elsewhere),
        "without_effect": list(lora.without_effect),
        "header": sorted(lora.file.metadata),
    }
