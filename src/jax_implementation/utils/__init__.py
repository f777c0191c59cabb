"""The hybrid pipeline and the weights it runs with."""

from jax_implementation.utils.pipeline import HybridPipeline
from jax_implementation.utils.weight_converter import (
    create_jax_model_from_config,
    load_torch_weights,
)

__all__ = ["HybridPipeline", "create_jax_model_from_config", "load_torch_weights"]
