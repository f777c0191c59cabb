"""One naming for the activations of both transformers, in the order they are computed.

An activation is named after our modules. ``blocks.0.norm1`` and ``.norm2`` are the modulated inputs
of self-attention and of the feed-forward; ``heads`` are the attention's outputs before the last
projection.
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Final, Literal, get_args

# What is recorded: every activation, only outputs of blocks and what lies around them, or nothing.
Layers = Literal["all", "blocks", "none"]
LAYERS: Final[tuple[Layers, ...]] = get_args(Layers)


@dataclass(frozen=True)
class ActivationSite:
    """A module of either transformer, and the names its input and output are recorded under.

    Attributes:
        module: path in our transformer, or in one of its blocks.
        torch_module: path of the same in diffusers' transformer.
        input_name: None where the input is not recorded.
        output_name: None where the output is not recorded.
    """

    module: str
    torch_module: str
    input_name: str | None
    output_name: str | None


_EMBEDDER: Final = "condition_embedder"
_IMAGE_KEYS: Final = (
    ("k_img", "add_k_proj"),
    ("v_img", "add_v_proj"),
    ("norm_k_img", "norm_added_k"),
)

ENTRY_SITES: Final = tuple(
    ActivationSite(*paths_and_names)
    for paths_and_names in (
        ("time_embedding.fc1", f"{_EMBEDDER}.time_embedder.linear_1", "sinusoid", None),
        ("time_embedding.fc2", f"{_EMBEDDER}.time_embedder.linear_2", None, "time_embedding"),
        ("time_projection", f"{_EMBEDDER}.time_proj", None, "time_projection"),
        ("fps_projection.fc2", "fps_projection.net.2", None, "fps_projection"),
        ("text_embedding.fc2", f"{_EMBEDDER}.text_embedder.linear_2", None, "text_embedding"),
        ("img_emb.norm1", f"{_EMBEDDER}.image_embedder.norm1", None, "img_emb.norm1"),
        ("img_emb.norm2", f"{_EMBEDDER}.image_embedder.norm2", None, "img_emb"),
        ("patch_embedding", "patch_embedding", None, "patch_embedding"),
    )
)
HEAD_SITES: Final = (ActivationSite("head.linear", "proj_out", "head.norm", "head"),)


def _attention_sites(
    name: str, torch_name: str, input_name: str | None, *, image: bool
) -> Iterator[ActivationSite]:
    yield ActivationSite(f"{name}.q", f"{torch_name}.to_q", input_name, f"{name}.q")
    modules = (("k", "to_k"), ("v", "to_v"), ("norm_q", "norm_q"), ("norm_k", "norm_k"))
    for module, torch_module in (*modules, *(_IMAGE_KEYS if image else ())):
        path = f"{name}.{module}"
        yield ActivationSite(path, f"{torch_name}.{torch_module}", None, path)
    yield ActivationSite(f"{name}.o", f"{torch_name}.to_out.0", f"{name}.heads", f"{name}.o")


def block_sites(*, image: bool) -> tuple[ActivationSite, ...]:
    """Return the sites of one block, with paths and names within it."""
    return (
        *_attention_sites("self_attn", "attn1", "norm1", image=False),
        ActivationSite("norm3", "norm2", "after_self_attn", "norm3"),
        *_attention_sites("cross_attn", "attn2", None, image=image),
        ActivationSite("ffn.fc1", "ffn.net.0.proj", "norm2", "ffn.fc1"),
        ActivationSite("ffn.fc2", "ffn.net.2", "ffn.activation", "ffn.fc2"),
    )


def recorded_names(sites: Iterable[ActivationSite]) -> list[str]:
    """Return the names that ``sites`` are recorded under, inputs before outputs."""
    return [name for site in sites for name in (site.input_name, site.output_name) if name]


def activation_names(num_layers: int, *, image: bool, fps: bool, layers: Layers) -> list[str]:
    """Return the names of all activations of one call of the transformer, in order.

    Args:
        num_layers: number of blocks.
        image: whether the transformer attends to an image.
        fps: whether it embeds the frame rate.
        layers: what is recorded.
    """
    if layers == "none":
        return []
    absent = () if image else ("img_emb.norm1", "img_emb")
    skipped = absent if fps else (*absent, "fps_projection")
    names = [name for name in recorded_names(ENTRY_SITES) if name not in skipped]
    names.append("modulation")
    inside = recorded_names(block_sites(image=image)) if layers == "all" else []
    for number in range(num_layers):
        names += [f"blocks.{number}.{name}" for name in inside]
        names.append(f"blocks.{number}")
    return [*names, *recorded_names(HEAD_SITES), "velocity"]
