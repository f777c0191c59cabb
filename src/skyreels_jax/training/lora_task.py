"""Training a LoRA of the transformer: its own parameters stay, and matrices beside them learn."""

import dataclasses
import hashlib
import json
import os
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Final

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike
from jaxtyping import Array

from skyreels_jax.errors import RequestError
from skyreels_jax.models.transformer import WanModel
from skyreels_jax.training.dataset import OnEncoded
from skyreels_jax.training.lora import LoraModel, LoraTarget
from skyreels_jax.training.objective import Batch
from skyreels_jax.training.task import Params, Template
from skyreels_jax.training.transformer_recipe import VideoTraining
from skyreels_jax.training.transformer_task import VideoNoise, VideoTask, symlink_to
from skyreels_jax.weights.components.transformer import stored_transformer
from skyreels_jax.weights.filling import rounded
from skyreels_jax.weights.lora.file import TAGS_METADATA
from skyreels_jax.weights.lora.writing import LoraForm, TrainedProduct, lora_of_products
from skyreels_jax.weights.plan import Format
from skyreels_jax.weights.writer import write_tensor_file

if TYPE_CHECKING:
    from skyreels_jax.training.mesh import TrainingMesh

# The file that diffusers' ``load_lora_weights`` looks for in a folder, and that for ComfyUI.
PEFT_FILE: Final = "pytorch_lora_weights.safetensors"
COMFYUI_FILE: Final = "comfyui.safetensors"
_FILES: Final[Mapping[LoraForm, str]] = {"peft": PEFT_FILE, "comfyui": COMFYUI_FILE}


def make_video_task(
    training: VideoTraining,
    seed: int,
    on_encoded: OnEncoded = lambda what, done, total: None,
) -> VideoTask:
    """Load what trains the transformer itself or, where the recipe says so, a LoRA of it.

    Raises:
        RequestError: as :class:`.VideoTask`.
    """
    kind = VideoTask if training.lora is None else LoraTask
    return kind(training, seed, on_encoded)


class LoraTask(VideoTask):
    """A LoRA of the transformer as a :class:`~skyreels_jax.training.task.TrainingTask`.

    Its parameters are the LoRA's matrices alone; :meth:`frozen` has the transformer's.
    """

    _lora: LoraModel

    def _begun(self) -> tuple[Template[WanModel], Params]:
        lora, shape, start = self.training.lora, self.training.model, self._sources.start
        assert lora is not None and start is not None
        is_int8 = lora.base == "int8"
        model = stored_transformer(start).load(
            jnp.dtype(shape.dtype),
            param_dtype=jnp.bfloat16 if is_int8 else jnp.dtype(lora.base),
            kernel_dtype=jnp.int8 if is_int8 else None,
        )
        model.remat = "full" if shape.remat is True else shape.remat or None
        self._lora = LoraModel.of(model, lora)
        return self._lora.template, self._lora.init(self.seed)

    def frozen(self) -> Params:
        """The transformer's own parameters, which the loss is given too."""
        return self._lora.frozen

    def on_mesh(self, mesh: "TrainingMesh") -> None:
        """Cut the transformer's own parameters over the mesh, and evaluate there from now on.

        Raises:
            RequestError: inputs are dropped, and the mesh cuts the tokens of a video.
        """
        lora, frozen = self._lora.lora, self._lora.frozen
        if lora.dropout and mesh.plan.ring * mesh.plan.ulysses > 1:
            raise RequestError(
                f"run.mesh = '{mesh.plan}' cuts the tokens of a video, of which lora.dropout = "
                f"{lora.dropout} would drop the same in each part; nearest: "
                f"'data={mesh.plan.data},fsdp={mesh.plan.sequence}', or dropout = 0"
            )
        placed = mesh.place(frozen, mesh.weight_shardings(frozen))
        self._lora = dataclasses.replace(self._lora, frozen=placed)
        super().on_mesh(mesh)

    def fingerprint(self) -> Mapping[str, str]:
        """Digests of the data and of the transformer's own parameters."""
        digest = hashlib.sha256()
        for name, value in sorted(self._lora.frozen.items()):
            digest.update(f"{name} {value.dtype} {value.shape}".encode())
            digest.update(np.ascontiguousarray(value).view(np.uint8).data)
        return {**super().fingerprint(), "model.start digest": digest.hexdigest()[:12]}

    def draw(self, batch: Batch, key: Array) -> VideoNoise:
        """What is random in a step; for dropout a key for each video."""
        drawn = super().draw(batch, key)
        if not self._lora.lora.dropout:
            return drawn
        keys = jax.random.split(jax.random.fold_in(key, 1), batch.latents.shape[0])
        return drawn._replace(dropout=jax.random.key_data(keys))

    def _all_parameters(self) -> Params:
        return {**self._lora.frozen, **self.first}

    def _model(self, params: Params, drawn: VideoNoise) -> WanModel:
        return self._lora.model(params, drawn.dropout)

    def evaluate(self, params: Params) -> dict[str, float]:
        """As :meth:`.VideoTask.evaluate`."""
        return super().evaluate({**self._lora.frozen, **params})

    def export(self, params: Params, folder: Path) -> None:
        """The LoRA in PEFT's form, by the name that diffusers looks for, and in ComfyUI's."""
        dtype = np.dtype(jnp.dtype(self.training.model.export_dtype))
        products = [
            TrainedProduct(
                {form: target.names[form][k] for form in target.names},
                *(_matrix(params[name], target, k, dtype) for name in (target.down, target.up)),
            )
            for target in self._lora.targets
            for k in range(len(target.names["original"]))
        ]
        lora = self._lora.lora
        for form, name in _FILES.items():
            stream = lora_of_products(
                products, form, alpha=lora.stated_alpha, rslora=lora.rslora, dropout=lora.dropout
            )
            about = {**stream.metadata, **self._about()}
            write_tensor_file(folder / name, dataclasses.replace(stream, metadata=about))

    def _about(self) -> Mapping[str, str]:
        """What the header says for people: https://github.com/Stability-AI/ModelSpec, kohya's tags.

        No date: the same run makes the same file.
        """
        lora, sizes = self._lora.lora, [(e.width, e.height) for e in self.examples()]
        width, height = max(sizes, default=(0, 0))
        found = {
            "sai_model_spec": "1.0.1",
            "architecture": "wan2.1/lora",
            "implementation": "https://github.com/Wan-Video/Wan2.1",
            "title": lora.title or f"LoRA of {Path(str(self.training.model.start)).name}",
            "resolution": f"{width}x{height}" if width else "",
            "description": f"rank {lora.rank}, alpha {lora.stated_alpha:g}"
            + (", rsLoRA" if lora.rslora else ""),
            "trigger_phrase": lora.trigger or "",
        }
        about = {f"modelspec.{name}": text for name, text in found.items() if text}
        if tags := self._clips.tags():
            about[TAGS_METADATA] = json.dumps(tags, ensure_ascii=False)
        return about

    def sample(self, params: Params, folder: Path) -> None:
        """The LoRA's files, and what the sample writer makes with them, if there is one."""
        self.export(params, folder)
        if self.sample_writer is not None:
            with tempfile.TemporaryDirectory() as temporary:
                self._write_pipeline(Path(temporary), params, jnp.float32, symlink_to)
                self.sample_writer(Path(temporary), folder, [folder / PEFT_FILE])

    def _save(self, folder: Path, params: Params, format: Format, dtype: DTypeLike) -> None:
        """The transformer as it was: its own folder where that has the format."""
        del params, dtype
        start = self._sources.start
        assert start is not None
        if start.format == format and start.transformer.is_dir():
            os.symlink(start.transformer.resolve(), folder)
        else:
            stored_transformer(start).write(folder, format)


def _matrix(stack: Array, target: LoraTarget, k: int, dtype: np.dtype) -> np.ndarray:
    """One layer's matrix in PyTorch's layout."""
    one = np.asarray(stack if target.layers is None else stack[k])
    return rounded(np.ascontiguousarray(one.T), dtype, target.path)
