"""SkyReels-V2 video diffusion in JAX / Flax NNX.

::

    from skyreels_jax import Pipeline

    pipe = Pipeline.from_pretrained("Skywork/SkyReels-V2-T2V-14B-540P")
    pipe("a cat walks through wet grass").save("cat.mp4")
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from skyreels_jax.checkpoints import Checkpoint as Checkpoint
    from skyreels_jax.errors import NumericsError as NumericsError
    from skyreels_jax.errors import RequestError as RequestError
    from skyreels_jax.errors import SkyReelsError as SkyReelsError
    from skyreels_jax.errors import UnsupportedError as UnsupportedError
    from skyreels_jax.errors import WeightsError as WeightsError
    from skyreels_jax.generation.video import Video as Video
    from skyreels_jax.models.transformer import WanModel as WanModel
    from skyreels_jax.models.transformer_config import TransformerConfig as TransformerConfig
    from skyreels_jax.pipeline import Pipeline as Pipeline

__version__ = "0.1.0"

# Loaded when first asked for: importing one small module must not cost the import of all.
_HOMES = {
    "Checkpoint": "checkpoints",
    "NumericsError": "errors",
    "Pipeline": "pipeline",
    "Request": "generation.request.settings",
    "RequestError": "errors",
    "SkyReelsError": "errors",
    "TransformerConfig": "models.transformer_config",
    "UnsupportedError": "errors",
    "Video": "generation.video",
    "WanModel": "models.transformer",
    "WeightsError": "errors",
}
__all__ = list(_HOMES)  # pyright: ignore[reportUnsupportedDunderAll]


def __getattr__(name: str) -> Any:
    """A public name, from the module it lives in."""
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)


def __dir__() -> list[str]:
    """The public names."""
    return sorted(_HOMES)
