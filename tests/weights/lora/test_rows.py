"""Every kind of LoRA file against float64 formulas, and diffusers + peft where these take it.

``python -m tests.weights.lora.test_rows`` writes the table of docs/lora.md anew.
"""

import logging
import re
from functools import cache
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import SkyReelsV2Transformer3DModel
from diffusers.loaders import SkyReelsV2LoraLoaderMixin
from tests.fabricate import Checkpoints
from tests.weights.lora.files import Tensors, distance, names_in, weights, with_file, write
from tests.weights.lora.rows import ROWS, Row

from skyreels_jax.errors import WeightsError

PAGE = Path(__file__).parents[3] / "docs" / "lora.md"
# The largest difference relative to a tensor's largest value; measured below 2e-7 for every row.
EXACT = 1e-5
BY_NAME = {row.name: row for row in ROWS}


def expected_with(folder: Path, row: Row) -> tuple[Tensors, Tensors]:
    """What the row's file holds, and the weights with it by the names in the folder's files."""
    there = weights(folder)
    originals = names_in(folder, "original")
    by_original = {originals[name]: value for name, value in there.items()}
    file = row.tensors(by_original)
    changed = row.expected(by_original, file)
    return file, {name: changed.get(originals[name], w) for name, w in there.items()}


# The two formats in turn: names of both lead to the same tensors.
@pytest.mark.parametrize(
    ("name", "format"), [(n, ("original", "diffusers")[i % 2]) for i, n in enumerate(BY_NAME)]
)
def test_every_kind_of_file_is_exact(
    checkpoints: Checkpoints, tmp_path: Path, name: str, format: str
):
    row = BY_NAME[name]
    folder = checkpoints(row.kind, format)
    tensors, expected = expected_with(folder, row)
    file = write(tmp_path / "x.safetensors", tensors, row.metadata)
    assert distance(with_file(folder, file), expected) < EXACT
    base = weights(folder)
    half = {n: base[n] + 0.5 * (e - base[n]) for n, e in expected.items()}
    assert distance(with_file(folder, file, 0.5), half) < EXACT
    minus = {n: 2 * base[n] - e for n, e in expected.items()}
    assert distance(with_file(folder, file, -1.0), minus) < EXACT
    assert distance(with_file(folder, file, 0.0), base) == 0


def spoiled(tensors: Tensors, how: str) -> Tensors:
    if how == "alpha dropped":
        return {k: v for k, v in tensors.items() if not k.endswith("alpha")}
    names = {"lora_up": "lora_down", "lora_down": "lora_up"}
    pattern = re.compile("lora_up|lora_down")
    return {pattern.sub(lambda m: names[m[0]], k): v for k, v in tensors.items()}


@pytest.mark.parametrize("how", ["alpha dropped", "pairs swapped"])
def test_a_spoiled_file_is_caught(checkpoints: Checkpoints, tmp_path: Path, how: str):
    """Negative twins."""
    folder = checkpoints("df", "original")
    tensors, expected = expected_with(folder, BY_NAME["`diffusion_model.` with alpha"])
    file = write(tmp_path / "x.safetensors", spoiled(tensors, how))
    if how == "alpha dropped":
        assert distance(with_file(folder, file), expected) > 0.05  # measured 0.55
    else:
        with pytest.raises(WeightsError, match="adapters that do not fit"):
            with_file(folder, file)


# diffusers and peft


def torch_model(folder: Path) -> SkyReelsV2Transformer3DModel:
    return SkyReelsV2Transformer3DModel.from_pretrained(folder / "transformer").eval()


def loaded_by_diffusers(folder: Path, file: Path) -> SkyReelsV2Transformer3DModel:
    """A transformer of diffusers with the LoRA, as its pipelines load it."""
    model = torch_model(folder)
    loader = SkyReelsV2LoraLoaderMixin
    state, metadata = loader.lora_state_dict(str(file), return_lora_metadata=True)
    if not all("lora" in key for key in state):
        raise ValueError("Invalid LoRA checkpoint")
    loader.load_lora_into_transformer(
        state, transformer=model, adapter_name="x", metadata=metadata, _pipeline=None
    )
    return model


def fused_weights(model: SkyReelsV2Transformer3DModel) -> Tensors:
    if getattr(model, "peft_config", None):
        model.fuse_lora(adapter_names=["x"])
    state = {k.replace(".base_layer", ""): v.numpy() for k, v in model.state_dict().items()}
    return {k: v for k, v in state.items() if ".lora_" not in k}


def outcome_in_diffusers(folder: Path, row: Row, file: Path) -> str:
    """What diffusers + peft make of a row's file, in a word or two."""
    logging.disable(logging.CRITICAL)
    tensors, expected = expected_with(folder, row)
    write(file, tensors, row.metadata)
    try:
        model = loaded_by_diffusers(folder, file)
    except Exception as error:  # whatever it is: the table names it
        return f"refused ({type(error).__name__})"
    finally:
        logging.disable(logging.NOTSET)
    if not getattr(model, "peft_config", None):
        return "nothing loaded"
    merged = fused_weights(model)
    difference = distance({name: merged[name] for name in expected}, expected)
    return "exact" if difference < EXACT else "a part dropped"


def outcome_here(folder: Path, row: Row, file: Path) -> str:
    """What ours are, in the same words."""
    tensors, expected = expected_with(folder, row)
    ours = with_file(folder, write(file, tensors, row.metadata))
    return "exact" if distance(ours, expected) < EXACT else "differs"


@cache
def outcomes(root: Path, checkpoints: Checkpoints) -> list[str]:
    lines = []
    for row in ROWS:
        folder, file = checkpoints(row.kind, "diffusers"), root / "x.safetensors"
        ours, theirs = (f(folder, row, file) for f in (outcome_here, outcome_in_diffusers))
        lines.append(f"| {row.name} | {ours} | {theirs} |")
    return lines


@pytest.mark.slow
def test_the_table_of_the_documentation_is_what_is_measured(
    checkpoints: Checkpoints, tmp_path: Path
):
    stated = [line for line in PAGE.read_text().splitlines() if line.startswith("| ")][1:]
    assert stated == outcomes(tmp_path, checkpoints)


def test_the_output_is_that_of_diffusers(checkpoints: Checkpoints, tmp_path: Path):
    """A forward pass with peft's adapters beside the weights, and one with ours merged."""
    folder = checkpoints("df", "diffusers")
    row = BY_NAME["PEFT, DoRA"]
    file = write(tmp_path / "x.safetensors", row.tensors(by_original(folder)), row.metadata)
    theirs, ours, plain = (
        loaded_by_diffusers(folder, file),
        torch_model(folder),
        torch_model(folder),
    )
    ours.load_state_dict({k: torch.tensor(v) for k, v in with_file(folder, file).items()})
    expected = forward(theirs)
    assert np.abs(forward(ours) - expected).max() < 1e-5 * np.abs(expected).max()  # measured 6e-7
    assert np.abs(forward(plain) - expected).max() > 0.1 * np.abs(expected).max()


def by_original(folder: Path) -> Tensors:
    names = names_in(folder, "original")
    return {names[name]: value for name, value in weights(folder).items()}


@torch.no_grad()
def forward(model: SkyReelsV2Transformer3DModel) -> np.ndarray:
    generator = torch.Generator().manual_seed(0)
    latents = torch.randn(1, 16, 2, 4, 4, generator=generator)
    text = torch.randn(1, 8, 32, generator=generator)
    fps = torch.tensor([1]) if model.config.inject_sample_info else None
    made = model(latents, torch.tensor([500]), text, fps=fps, return_dict=False)
    return made[0].numpy()


def main() -> None:
    """Write the table anew."""
    import tempfile

    from skyreels_jax.testing.random_checkpoint import make_checkpoint

    with tempfile.TemporaryDirectory() as temporary:
        root = Path(temporary)
        made = cache(lambda kind, format: make_checkpoint(root / f"{kind}-{format}", kind, format))
        lines = ["| file | here | diffusers 0.42.1 + peft 0.21.2 |", "|---|---|---|"]
        table = "\n".join([*lines, *outcomes(root, made)])
    pattern = re.compile(r"^\| file \|.*?\n(?!\|)", re.MULTILINE | re.DOTALL)
    PAGE.write_text(pattern.sub(lambda _: f"{table}\n", PAGE.read_text()))


if __name__ == "__main__":
    main()
