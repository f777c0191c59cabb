"""The activations of diffusers' transformer, recorded under the names of our modules."""

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    import torch

    _Tensors = tuple[torch.Tensor, ...]

# Arguments of a call of diffusers' transformer, arrays on the host.
TransformerCall = dict[str, Any]
# A module's path, and the names its input and output are recorded under (if they are).
HookedModule = tuple[str, str | None, str | None]
_Record = Callable[[str, np.ndarray], None]


def capture_torch_activations(
    model: "torch.nn.Module",
    call: TransformerCall,
    around: Sequence[HookedModule],
    inside: Sequence[HookedModule],
    record: _Record,
) -> None:
    """Call the transformer as it was called before, and record its activations.

    Args:
        model: diffusers' transformer.
        call: its arguments.
        around: modules outside the blocks.
        inside: modules of a block, by paths within it; may be empty.
        record: takes names and float32 values as they are computed; tokens are ``[B, L, D]``.
    """
    import torch

    modules = dict(model.named_modules())
    handles = []

    def hook_module(path: str, input_name: str | None, output_name: str | None) -> None:
        def hook(_: torch.nn.Module, args: "_Tensors", output: torch.Tensor) -> None:
            if input_name is not None:
                record(input_name, to_host(args[0]))
            if output_name is not None:
                record(output_name, _as_tokens(output))

        handles.append(modules[path].register_forward_hook(hook))

    for path, *names in around:
        if path in modules:
            hook_module(path, *names)
    for number, block in enumerate(model.get_submodule("blocks").children()):
        name = f"blocks.{number}"
        for path, *names in inside:
            hook_module(f"{name}.{path}", *(one and f"{name}.{one}" for one in names))
        if number == 0:
            frames = np.asarray(call["timestep"]).shape[-1]
            handles.append(block.register_forward_pre_hook(_modulation_hook(frames, record)))
        hook_module(name, None, name)
    weight = model.get_parameter("patch_embedding.weight")
    arguments = {
        name: torch.from_numpy(value).to(
            weight.device, torch.int64 if name == "timestep" else weight.dtype
        )
        if isinstance(value, np.ndarray)
        else value
        for name, value in call.items()
    }
    try:
        with torch.inference_mode():
            record("velocity", to_host(model(**arguments)[0]))
    finally:
        for handle in handles:
            handle.remove()


def _modulation_hook(frames: int, record: _Record) -> "Callable[[torch.nn.Module, _Tensors], None]":
    """Record a block's third argument, once a frame where diffusers has it once a token."""

    def hook(_: "torch.nn.Module", args: "_Tensors") -> None:
        e0 = to_host(args[2])
        if e0.ndim == 4:  # [B, 6, L, D]
            e0 = e0.reshape(*e0.shape[:2], frames, -1, e0.shape[-1])[:, :, :, 0].swapaxes(1, 2)
        else:
            e0 = e0[:, None]
        record("modulation", e0)

    return hook


def to_host(value: "torch.Tensor") -> np.ndarray:
    """Copy to a float32 array on the host."""
    return value.detach().float().cpu().numpy().copy()


def _as_tokens(value: "torch.Tensor") -> np.ndarray:
    """Return ``[B, L, D]``, also of a convolution's ``[B, D, F, rows, columns]``."""
    array = to_host(value)
    return array.reshape(*array.shape[:2], -1).swapaxes(1, 2) if array.ndim == 5 else array
