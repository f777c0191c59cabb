"""What every part of diffusers' transformer takes and gives, under the names of our modules."""

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    import torch

# A module's path, and the names of its input and its output (if they are recorded).
Watch = tuple[str, str | None, str | None]


def observed_call(
    model: "torch.nn.Module",
    given: Mapping[str, Any],
    around: Sequence[Watch],
    inside: Sequence[Watch],
    note: Callable[[str, np.ndarray], None],
) -> None:
    """Call the transformer as it was called before, and tell ``note`` what is seen on the way.

    Args:
        model: diffusers' transformer.
        given: arguments of its call, arrays on the host.
        around: modules outside the blocks.
        inside: modules of a block, by paths within it; may be empty.
        note: told names and float32 values as they are computed; tokens are ``[B, L, D]``.
    """
    import torch

    handles = []

    def watch(path: str, before: str | None, after: str | None) -> None:
        module = model.get_submodule(path)

        def hook(_: Any, args: Any, output: Any) -> None:
            if before is not None:
                note(before, _host(args[0]))
            if after is not None:
                note(after, _tokens(output))

        handles.append(module.register_forward_hook(hook))

    for path, before, after in around:
        if _has(model, path):
            watch(path, before, after)
    blocks = model.get_submodule("blocks")
    for number, block in enumerate(blocks.children()):
        for path, before, after in inside:
            names = (None if n is None else f"blocks.{number}.{n}" for n in (before, after))
            watch(f"blocks.{number}.{path}", *names)
        if number == 0:
            handles.append(block.register_forward_pre_hook(_modulation(given, note)))
        handles.append(
            block.register_forward_hook(
                lambda _, __, output, number=number: note(f"blocks.{number}", _host(output))
            )
        )
    arguments = {
        name: torch.from_numpy(value) if isinstance(value, np.ndarray) else value
        for name, value in given.items()
    }
    device, dtype = _kind(model)
    for name, value in arguments.items():
        if isinstance(value, torch.Tensor):
            is_time = name == "timestep"
            arguments[name] = value.to(device, torch.int64 if is_time else dtype)
    try:
        with torch.inference_mode():
            note("velocity", _host(model(**arguments)[0]))
    finally:
        for handle in handles:
            handle.remove()


def _kind(model: "torch.nn.Module") -> "tuple[torch.device, torch.dtype]":
    weight: Any = model.get_submodule("patch_embedding").weight
    return weight.device, weight.dtype


def _modulation(
    given: Mapping[str, Any], note: Callable[[str, np.ndarray], None]
) -> Callable[[Any, Any], None]:
    """Of the first block's third argument, once a frame where diffusers has it once a token."""

    def hook(_: Any, args: Any) -> None:
        e0 = _host(args[2])
        if e0.ndim == 4:  # [B, 6, L, D]
            frames = np.asarray(given["timestep"]).shape[1]
            e0 = e0.reshape(*e0.shape[:2], frames, -1, e0.shape[-1])[:, :, :, 0].swapaxes(1, 2)
        else:
            e0 = e0[:, None]
        note("modulation", e0)

    return hook


def _has(model: Any, path: str) -> bool:
    for name in path.split("."):
        model = getattr(model, name, None)
        if model is None:
            return False
    return True


def _host(value: Any) -> np.ndarray:
    return value.detach().float().cpu().numpy().copy()


def _tokens(value: Any) -> np.ndarray:
    """``[B, L, D]``, also of a convolution's ``[B, D, F, rows, columns]``."""
    array = _host(value)
    return array.reshape(*array.shape[:2], -1).swapaxes(1, 2) if array.ndim == 5 else array
