"""PyTorch's VAE and encoders around the JAX transformer, and the described ways to build one."""

from dataclasses import dataclass
from pathlib import Path
from typing import Unpack

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike

from skyreels_jax.checkpoints import Checkpoint
from skyreels_jax.components.clip_preprocessing import ClipPreprocessing
from skyreels_jax.errors import RequestError, WeightsError
from skyreels_jax.generation.request.keywords import VideoSettings
from skyreels_jax.generation.request.resolve import resolve
from skyreels_jax.generation.request.settings import Request
from skyreels_jax.generation.video import Video, generate
from skyreels_jax.models.transformer import WanModel
from skyreels_jax.models.transformer_config import TransformerConfig
from skyreels_jax.sampling.denoiser import Denoiser
from skyreels_jax.sampling.progress import Progress
from skyreels_jax.torch_side.components import torch_components
from skyreels_jax.weights.components.transformer import TRANSFORMER, stored_transformer


@dataclass(frozen=True)
class StoredWeights:
    """A transformer's weights, proved complete and left on disk until a model takes them."""

    checkpoint: Checkpoint

    def load(self, dtype: DTypeLike = jnp.bfloat16) -> nnx.State:
        """All parameters, rounded to ``dtype``.

        Raises:
            WeightsError: a value is not finite.
        """
        return stored_transformer(self.checkpoint.layout).load_state(dtype)


def load_torch_weights(
    model_id: str | Path, *, revision: str | None = None
) -> tuple[StoredWeights, TransformerConfig]:
    """The transformer's weights of a checkpoint in either layout, and its configuration.

    Args:
        model_id: a folder or a Hugging Face id.
        revision: branch, tag or commit of an id.

    Raises:
        RequestError: there is no such folder or id.
        WeightsError: the folder is incomplete or contradicts itself.
    """
    checkpoint = Checkpoint.open(model_id, revision=revision)
    stored_transformer(checkpoint.layout).verify()
    return StoredWeights(checkpoint), checkpoint.config


def create_jax_model_from_config(
    config: TransformerConfig,
    weights: StoredWeights | None = None,
    *,
    dtype: DTypeLike = jnp.bfloat16,
) -> WanModel:
    """A transformer, with its weights or still without any.

    Args:
        config: of the model.
        weights: to fill it with; without them the model has shapes only, takes no memory and
            cannot run until :class:`HybridPipeline` has filled it from its checkpoint.
        dtype: to store and to compute in.

    Raises:
        WeightsError: the weights are of another configuration, or a value is not finite.
    """
    model = TRANSFORMER.abstract(config, dtype)
    if weights is not None:
        _fill(model, weights)
    return model


def _fill(model: WanModel, weights: StoredWeights) -> None:
    _check_config(model, weights.checkpoint)
    nnx.update(model, weights.load(model.numerics.params))


def _check_config(model: WanModel, checkpoint: Checkpoint) -> None:
    if model.config != checkpoint.config:
        raise WeightsError(
            f"{checkpoint.folder} holds the weights of another transformer than the one given:\n"
            f"  in the folder: {checkpoint.config}\n  given: {model.config}"
        )


def _is_empty(model: WanModel) -> bool:
    return any(isinstance(leaf, jax.ShapeDtypeStruct) for leaf in jax.tree.leaves(nnx.state(model)))


class HybridPipeline:
    """Makes videos with the transformer in JAX and everything else in PyTorch.

    Attributes:
        checkpoint: the folder it was made from.
        components: encoders and VAE.
        transformer: in JAX.
        denoiser: the same with its compiled steps.
    """

    def __init__(
        self,
        model_path: str | Path,
        jax_model: WanModel | None = None,
        device: str = "auto",
        dtype: DTypeLike | None = None,
        *,
        preprocessing: ClipPreprocessing = "original",
    ):
        """Load all parts of a checkpoint.

        Args:
            model_path: a folder in either layout, or a Hugging Face id.
            jax_model: the transformer. One made without weights is given those of ``model_path``;
                one that has weights keeps them. ``None`` loads it.
            device: of the PyTorch parts: ``cpu``, ``cuda``, or ``auto`` for what there is.
            dtype: of the text and image encoders, and of a transformer that is loaded here;
                ``None`` for that of ``jax_model``, or bfloat16. The VAE runs in float32.
            preprocessing: how an image is brought to CLIP's 224 x 224 (see
                :class:`~skyreels_jax.torch_side.components.TorchImageEncoder`).

        Raises:
            WeightsError: a part is missing, unsound or incomplete, or ``jax_model`` has another
                configuration than the transformer of ``model_path``.
            UnsupportedError: a GPU is asked for and PyTorch sees none.
        """
        self.checkpoint = Checkpoint.open(model_path)
        weights = StoredWeights(self.checkpoint)
        if jax_model is None:
            compute = jnp.bfloat16 if dtype is None else dtype
            jax_model = create_jax_model_from_config(self.checkpoint.config, dtype=compute)
        if _is_empty(jax_model):
            _fill(jax_model, weights)
        else:
            _check_config(jax_model, self.checkpoint)
        self.transformer = jax_model
        encoders = jax_model.numerics.compute if dtype is None else dtype
        self.components = torch_components(self.checkpoint, device, encoders, preprocessing)
        self.denoiser = Denoiser(jax_model, block_length=self.checkpoint.block_length)

    def generate(
        self,
        prompt: str,
        *,
        num_inference_steps: int | None = None,
        progress: Progress | None = None,
        **settings: Unpack[VideoSettings],
    ) -> Video:
        """Make a video.

        Args:
            prompt: what to show.
            num_inference_steps: ``steps`` by diffusers' name; one of the two.
            progress: called with every stage.
            **settings: of the video, as :class:`~skyreels_jax.pipeline.Pipeline` takes them
                (``docs/settings.md``): ``image``, ``height``, ...; what is left out is the
                checkpoint's.

        Raises:
            RequestError: with everything about the request that is wrong.
            NumericsError: something was not finite; says what and where.
        """
        if num_inference_steps is not None:
            if settings.get("steps") is not None:
                raise RequestError("`steps` and `num_inference_steps` are the same: give one")
            settings["steps"] = num_inference_steps
        request = Request.of(
            {"prompt": prompt, **settings},
            dtype=jnp.dtype(self.transformer.numerics.compute).name,
        )
        resolved = resolve(request, self.checkpoint)
        return generate(self.components, lambda: self.denoiser, resolved, progress=progress)
