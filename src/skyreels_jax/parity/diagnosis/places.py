"""One naming for the activations of both transformers, in the order they are computed.

A place is named after our modules. ``blocks.0.norm1`` and ``.norm2`` are what goes into
self-attention and into the feed-forward, modulated; ``heads`` are the attention's answers before
the last projection.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Final, Literal, get_args

# What is recorded: every place, only whole blocks and what lies around them, or nothing.
Layers = Literal["all", "blocks", "none"]
LAYERS: Final[tuple[Layers, ...]] = get_args(Layers)


@dataclass(frozen=True)
class Site:
    """A module on either side, and what its input and its output are called (if recorded)."""

    ours: str
    theirs: str
    before: str | None
    after: str | None


_ATTENTION: Final = (("q", "to_q"), ("k", "to_k"), ("v", "to_v"), ("norm_q", "norm_q"))
_IMAGE_KEYS: Final = (
    *(("k_img", "add_k_proj"), ("v_img", "add_v_proj"), ("norm_k_img", "norm_added_k")),
)
_EMBEDDER: Final = "condition_embedder"

AROUND: Final = (
    Site("time_embedding.fc1", f"{_EMBEDDER}.time_embedder.linear_1", "sinusoid", None),
    Site("time_embedding.fc2", f"{_EMBEDDER}.time_embedder.linear_2", None, "time_embedding"),
    Site("time_projection", f"{_EMBEDDER}.time_proj", None, "time_projection"),
    Site("fps_projection.fc2", "fps_projection.net.2", None, "fps_projection"),
    Site("text_embedding.fc2", f"{_EMBEDDER}.text_embedder.linear_2", None, "text_embedding"),
    Site("img_emb.norm1", f"{_EMBEDDER}.image_embedder.norm1", None, "img_emb.norm1"),
    Site("img_emb.norm2", f"{_EMBEDDER}.image_embedder.norm2", None, "img_emb"),
    Site("patch_embedding", "patch_embedding", None, "patch_embedding"),
)
HEAD: Final = (Site("head.linear", "proj_out", "head.norm", "head"),)


def _attention(ours: str, theirs: str, entry: str | None, *, image: bool) -> Iterator[Site]:
    yield Site(f"{ours}.q", f"{theirs}.to_q", entry, f"{ours}.q")
    names = [*_ATTENTION[1:], ("norm_k", "norm_k"), *(_IMAGE_KEYS if image else ())]
    for name, torch_name in names:
        yield Site(f"{ours}.{name}", f"{theirs}.{torch_name}", None, f"{ours}.{name}")
    yield Site(f"{ours}.o", f"{theirs}.to_out.0", f"{ours}.heads", f"{ours}.o")


def block_sites(*, image: bool) -> tuple[Site, ...]:
    """Of one block, by names within it."""
    return (
        *_attention("self_attn", "attn1", "norm1", image=False),
        Site("norm3", "norm2", "after_self_attn", "norm3"),
        *_attention("cross_attn", "attn2", None, image=image),
        Site("ffn.fc1", "ffn.net.0.proj", "norm2", "ffn.fc1"),
        Site("ffn.fc2", "ffn.net.2", "ffn.activation", "ffn.fc2"),
    )


def places(num_layers: int, *, image: bool, fps: bool, layers: Layers) -> list[str]:
    """All names of one call of the transformer, in order."""
    if layers == "none":
        return []
    around = [name for site in AROUND for name in (site.before, site.after) if name]
    skipped = () if image else ("img_emb.norm1", "img_emb")
    around = [n for n in around if n not in skipped and (fps or n != "fps_projection")]
    inside = [name for site in block_sites(image=image) for name in (site.before, site.after)]
    found = [*around, "modulation"]
    for number in range(num_layers):
        if layers == "all":
            found += [f"blocks.{number}.{name}" for name in inside if name]
        found.append(f"blocks.{number}")
    ends = [name for site in HEAD for name in (site.before, site.after) if name]
    return [*found, *ends, "velocity"]
