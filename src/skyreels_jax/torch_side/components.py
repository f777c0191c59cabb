"""What generation needs besides the transformer, run by PyTorch."""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from jax.typing import DTypeLike
from jaxtyping import Float

from skyreels_jax.checkpoints import Checkpoint
from skyreels_jax.components.clip_preprocessing import ClipPreprocessing
from skyreels_jax.components.protocols import Components, ImageCondition
from skyreels_jax.models.clip_vision import PIXEL_MEAN, PIXEL_STD
from skyreels_jax.prompts import Tokenizer
from skyreels_jax.shapes import HostLatents, Pixels
from skyreels_jax.torch_side.modules import (
    load_clip,
    load_umt5,
    load_vae,
    torch_device,
    torch_dtype,
)
from skyreels_jax.weights.tokenizer_file import open_tokenizer

if TYPE_CHECKING:
    import torch
    from diffusers import AutoencoderKLWan
    from transformers import CLIPImageProcessor, UMT5EncoderModel


@dataclass(frozen=True, eq=False)
class TorchTextEncoder:
    """UMT5 as transformers has it."""

    tokenizer: Tokenizer
    model: "UMT5EncoderModel"

    @classmethod
    def load(cls, checkpoint: Checkpoint, device: str, dtype: DTypeLike) -> "TorchTextEncoder":
        """Read the weights of either format, to compute in ``dtype`` on ``device``.

        Raises:
            WeightsError: the component is missing, unsound or incomplete.
            UnsupportedError: there is no such device here.
        """
        model = load_umt5(checkpoint, torch_device(device), torch_dtype(dtype))
        return cls(open_tokenizer(checkpoint.tokenizer), model)

    def encode(self, prompts: Sequence[str]) -> Float[np.ndarray, "B S text_dim"]:
        """Clean, tokenize to 512 and encode; rows past a prompt's end are exactly zero."""
        import torch

        batch = self.tokenizer.encode(prompts)
        ids = torch.from_numpy(batch.ids).to(self.model.device)
        mask = torch.from_numpy(batch.mask).to(self.model.device)
        with torch.inference_mode():
            states = self.model(input_ids=ids, attention_mask=mask).last_hidden_state
            return (states.float() * mask[..., None]).cpu().numpy()


@dataclass(frozen=True, eq=False)
class TorchImageEncoder:
    """CLIP's vision encoder as transformers has it."""

    model: "torch.nn.Module"
    processor: "CLIPImageProcessor | None"

    @classmethod
    def load(
        cls,
        checkpoint: Checkpoint,
        device: str,
        dtype: DTypeLike,
        preprocessing: ClipPreprocessing = "original",
    ) -> "TorchImageEncoder":
        """Read the weights of either format, to compute in ``dtype`` on ``device``.

        Args:
            checkpoint: to read from.
            device: of PyTorch.
            dtype: of weights and activations.
            preprocessing: ``original`` squashes the frame at video resolution to a square, as the
                models were trained; ``diffusers`` cuts the centre out of the image as given.

        Raises:
            WeightsError: the component is missing, unsound or incomplete.
            UnsupportedError: there is no such device here.
        """
        model = load_clip(checkpoint, torch_device(device), torch_dtype(dtype))
        return cls(model, _processor(checkpoint) if preprocessing == "diffusers" else None)

    def encode(self, image: ImageCondition) -> Float[np.ndarray, "S image_dim"]:
        """Return the features of all tokens (class token first) of the last block but one."""
        import torch

        if self.processor is None:
            config: Any = self.model.config
            pixels = squash_torch(torch.from_numpy(image.pixels), config.image_size)
        else:
            pixels = self.processor(images=image.source, return_tensors="pt")["pixel_values"]
        weight = next(self.model.parameters())
        with torch.inference_mode():
            states = self.model(
                pixel_values=pixels.to(weight.device, weight.dtype), output_hidden_states=True
            )
            return states.hidden_states[-2][0].float().cpu().numpy()


def _processor(checkpoint: Checkpoint) -> "CLIPImageProcessor":
    """Read that of the folder; the original format has none, and every release the defaults."""
    from transformers import CLIPImageProcessor

    folder = checkpoint.layout.components.get("image_processor")
    return CLIPImageProcessor() if folder is None else CLIPImageProcessor.from_pretrained(folder)


def squash_torch(pixels: "torch.Tensor", side: int = 224) -> "torch.Tensor":
    """Resize a frame in [-1, 1] to a square whatever its shape, and normalise it for CLIP.

    As Wan 2.1's ``CLIPModel.visual``, but in float32 (there the resize runs in half precision).
    """
    import torch

    small = torch.nn.functional.interpolate(
        pixels[None].float(), size=(side, side), mode="bicubic", align_corners=False
    )
    mean, std = (torch.from_numpy(v).reshape(1, 3, 1, 1) for v in (PIXEL_MEAN, PIXEL_STD))
    return (small * 0.5 + 0.5 - mean) / std


@dataclass(frozen=True, eq=False)
class TorchAutoencoder:
    """The Wan VAE as diffusers has it, in float32 unless told otherwise."""

    model: "AutoencoderKLWan"

    @classmethod
    def load(
        cls, checkpoint: Checkpoint, device: str, dtype: DTypeLike = np.float32
    ) -> "TorchAutoencoder":
        """Read the weights of either format, to compute in ``dtype`` on ``device``.

        Raises:
            WeightsError: the component is missing, unsound or incomplete.
            UnsupportedError: there is no such device here.
        """
        return cls(load_vae(checkpoint, torch_device(device), torch_dtype(dtype)))

    def encode(self, pixels: Pixels) -> HostLatents:
        """Encode ``4k + 1`` frames in [-1, 1] to posterior means, normalised by mean and std."""
        import torch

        with torch.inference_mode():
            video = torch.from_numpy(pixels)[None].to(self.model.device, self.model.dtype)
            mode = self.model.encode(video, return_dict=False)[0].mode()[0].float().cpu().numpy()
        mean, std = self._statistics()
        return (mode - mean) / std

    def decode_pieces(self, pieces: Iterable[HostLatents]) -> Iterator[Pixels]:
        """Yield frames in [-1, 1] as they are ready; memory does not grow with their number.

        The loop is that of ``AutoencoderKLWan.decode``, which keeps every frame until the last.
        """
        import torch
        from diffusers.models.autoencoders.autoencoder_kl_wan import WanCausalConv3d

        decoder = self.model.decoder
        # What each causal convolution keeps of the frames before, in the order they are called.
        cache = [None] * sum(isinstance(layer, WanCausalConv3d) for layer in decoder.modules())
        mean, std = self._statistics()
        frames = (piece[:, i : i + 1] for piece in pieces for i in range(piece.shape[1]))
        for number, latents in enumerate(frames):
            # Entered for each frame: who consumes the pixels is not to be in it.
            with torch.inference_mode():
                z = torch.from_numpy(latents * std + mean)[None]
                z = self.model.post_quant_conv(z.to(self.model.device, self.model.dtype))
                out = decoder(z, feat_cache=cache, feat_idx=[0], first_chunk=number == 0)
                pixels = out.clamp(-1, 1)[0].float().cpu().numpy()
            yield pixels

    def _statistics(self) -> tuple[np.ndarray, np.ndarray]:
        config = self.model.config
        mean, std = (
            np.asarray(v, np.float32).reshape(-1, 1, 1, 1)
            for v in (config["latents_mean"], config["latents_std"])
        )
        return mean, std


def torch_components(
    checkpoint: Checkpoint,
    device: str,
    dtype: DTypeLike,
    preprocessing: ClipPreprocessing = "original",
) -> Components:
    """Load all components but the transformer; the VAE in float32, the encoders in ``dtype``.

    Raises:
        WeightsError: a component is missing, unsound or incomplete.
        UnsupportedError: there is no such device here.
    """
    takes_image = checkpoint.config.model_type == "i2v"
    return Components(
        text_encoder=TorchTextEncoder.load(checkpoint, device, dtype),
        vae=TorchAutoencoder.load(checkpoint, device),
        image_encoder=TorchImageEncoder.load(checkpoint, device, dtype, preprocessing)
        if takes_image
        else None,
    )
