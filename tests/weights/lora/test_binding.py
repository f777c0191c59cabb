"""What of a LoRA file is used, what is said, and what is refused: by name, all at once."""

import logging
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.numpy import save_file
from tests.fabricate import Checkpoints
from tests.weights.lora.files import (
    Tensors,
    distance,
    low_rank,
    merged_low_rank,
    random,
    stored,
    weights,
    with_file,
    write,
)

from skyreels_jax.errors import WeightsError
from skyreels_jax.weights.lora import source
from skyreels_jax.weights.lora.binding import BoundLora, Lora
from skyreels_jax.weights.lora.file import open_lora
from skyreels_jax.weights.lora.source import bound_to

Q = "diffusion_model.blocks.0.self_attn.q"
GOOD = low_rank({Q: (32, 32)}, alpha=2.0)


@pytest.fixture
def folder(checkpoints: Checkpoints) -> Path:
    return checkpoints("t2v", "original")


def bound(folder: Path, file: Path) -> BoundLora:
    return bound_to(stored(folder), file)


def test_every_key_is_accounted_for(folder: Path, tmp_path: Path):
    tensors = GOOD | low_rank({Q.replace("q", "k_img").replace("self", "cross"): (32, 32)})
    tensors |= {f"{Q}.diff_b": random(32), "diffusion_model.fps_projection.0.diff_b": random(32)}
    tensors |= {"diffusion_model.blocks.0.norm3.alpha": np.float32(1)}
    tensors |= {f"{Q}.reshape_weight": np.array([32, 32], np.int64)}
    lora = bound(folder, write(tmp_path / "x.safetensors", tensors))
    assert lora.used == 4
    assert lora.kinds == {"LoRA": 1, "bias": 1}
    assert lora.ranks == [4]
    assert len(lora.elsewhere) == 3
    assert len(lora.without_effect) == 2
    assert lora.used + 5 == len(tensors)
    assert lora.summary() == "4 of 9 keys used, on 2 tensors (1 LoRA, 1 bias, rank 4)"


def test_what_has_no_place_here_is_a_warning_with_its_number(
    folder: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
):
    source._warn_once.cache_clear()
    image = low_rank({f"diffusion_model.blocks.{i}.cross_attn.k_img": (32, 32) for i in (0, 1)})
    file = write(tmp_path / "image.safetensors", GOOD | image)
    with caplog.at_level(logging.WARNING):
        merged = with_file(folder, file)
    assert [record.message for record in caplog.records] == [
        "LoRA image.safetensors: 4 keys have no place in this model (others of its family have "
        "one): diffusion_model.blocks.0.cross_attn.k_img.lora_A.weight, "
        "diffusion_model.blocks.0.cross_attn.k_img.lora_B.weight, "
        "diffusion_model.blocks.1.cross_attn.k_img.lora_A.weight and 1 more"
    ]
    assert distance(merged, weights(folder)) > 0.1
    with pytest.raises(WeightsError, match="none of its 4 keys is for this transformer"):
        bound(folder, write(tmp_path / "y.safetensors", image))


def without(tensors: Tensors, *endings: str) -> Tensors:
    return {k: v for k, v in tensors.items() if not k.endswith(endings)}


def refused() -> dict[str, tuple[Tensors, str]]:
    up, down = f"{Q}.lora_B.weight", f"{Q}.lora_A.weight"
    return {
        "an unknown module": (low_rank({"blocks.0.attn.q": (32, 32)}), "that this model lacks"),
        "a block too many": (low_rank({Q.replace("0", "7"): (32, 32)}), "that this model lacks"),
        "an unknown part": (GOOD | {f"{Q}.lora_C.weight": random(2)}, "keys that are unknown"),
        "a text encoder": (GOOD | {"lora_te_x.alpha": random(1)}, "keys of a text encoder"),
        "text_encoder.": (GOOD | {"text_encoder.a.lora_A.weight": random(1)}, "a text encoder"),
        "a second expert": (GOOD | low_rank({"transformer_2.x": (2, 2)}), "only Wan 2.2 has"),
        "half a pair": (without(GOOD, "lora_B.weight"), r"lack what belongs to them:\n.*\(down\)"),
        "a magnitude alone": ({f"{Q}.dora_scale": random(32, 1)}, "lack what belongs to them"),
        "another width": (low_rank({Q: (64, 64)}), r"do not fit:\n.*\[64, 4\] for a weight"),
        "other ranks": (GOOD | {up: random(32, 5)}, r"rank 4, up \[32, 5\] has 5"),
        "no matrices": (GOOD | {up: random(128), down: random(128)}, "are no matrices"),
        "a number": (GOOD | {up: np.float32(1), down: np.float32(1)}, "are no matrices"),
        "a norm's product": (low_rank({Q[:-1] + "norm_q": (32, 32)}), "no matrices for a weight"),
        "a magnitude": (GOOD | {f"{Q}.dora_scale": random(31, 1)}, r"magnitude \[31, 1\]"),
        "two alphas": (GOOD | {f"{Q}.alpha": random(2)}, "2.* values, one expected"),
        "a diff": ({f"{Q}.diff": random(32, 31)}, r"\[32, 31\] for a tensor \[32, 32\]"),
        "a bias that is none": (
            {Q[:-1] + "norm_q.diff_b": random(32)},
            "that this model lacks",
        ),
        "OFT": ({f"{Q}.oft_blocks": random(4, 8, 8)}, "keys of OFT, which is not supported"),
        "GLoRA": ({f"{Q}.a1.weight": random(4, 8)}, "keys of GLoRA"),
        "a whole weight": (GOOD | {f"{Q}.weight": random(32, 32)}, "whole tensors of a model"),
        "another shape": (
            GOOD | {f"{Q}.reshape_weight": np.array([32, 64], np.int64)},
            "reshape_weight",
        ),
        "one tensor twice": (
            GOOD | low_rank({"transformer.blocks.0.attn1.to_q": (32, 32)}),
            r"several adapters of a kind:\n.*self_attn\.q\.weight: LoRA",
        ),
        "one key twice": (
            GOOD | {f"{Q}.lora_down.weight": random(4, 32)},
            "say the same of one module",
        ),
        "LoKr": ({f"{Q}.lokr_w1": random(4, 4), f"{Q}.lokr_w2": random(8, 9)}, "factors"),
        "half a LoKr": ({f"{Q}.lokr_w1": random(4, 4)}, r"\(lokr_w1\)"),
        "LoHa": (
            {f"{Q}.hada_w{n}_{x}": random(32, 32) for n in (1, 2) for x in "ab"}
            | {f"{Q}.hada_w2_b": random(32, 31)},
            "factors",
        ),
        "integers": (GOOD | {up: np.ones((32, 4), np.int32)}, "is int32, no floating point"),
        "fused and no product": (
            {"blocks.0.attn1.to_qkv.diff": random(96, 32)},
            "only a plain LoRA can be taken apart",
        ),
    }


REFUSED = refused()


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_refused_is_named(folder: Path, tmp_path: Path, name: str):
    tensors, says = REFUSED[name]
    with pytest.raises(WeightsError, match=says) as caught:
        bound(folder, write(tmp_path / "x.safetensors", tensors))
    assert "x.safetensors" in str(caught.value)


HEADERS = {
    "no JSON": ("{", "is no JSON"),
    "a list": ("[]", "is no JSON object"),
    "a rank": ('{"r": 0, "lora_alpha": 1}', "r = 0 must be a positive integer"),
    "another rank": ('{"r": 8, "lora_alpha": 8}', r"says rank 8 of .*, whose tensors have rank 4"),
    "no alpha": ('{"r": 4}', "lora_alpha = None must be a number"),
    "a regular expression": (
        '{"r": 4, "lora_alpha": 4, "rank_pattern": {"(a+)+": 2}}',
        "is no plain name of a module",
    ),
    "another alpha": ('{"r": 4, "lora_alpha": 4}', "the header and the tensors differ"),
}


@pytest.mark.parametrize("name", HEADERS)
def test_a_header_that_is_wrong_is_refused(folder: Path, tmp_path: Path, name: str):
    text, says = HEADERS[name]
    file = write(tmp_path / "x.safetensors", GOOD, text)
    with pytest.raises(WeightsError, match=says):
        bound(folder, file)


def test_everything_wrong_is_said_at_once(folder: Path, tmp_path: Path):
    wrong = [tensors for tensors, _ in (REFUSED[n] for n in ("OFT", "a text encoder"))]
    wrong.append({"x.lora_C": random(1)})
    file = write(tmp_path / "x.safetensors", {k: v for t in wrong for k, v in t.items()})
    with pytest.raises(WeightsError, match=r"(?s)OFT.*text encoder.*unknown"):
        bound(folder, file)


@pytest.mark.parametrize("value", [np.nan, np.inf])
@pytest.mark.parametrize("part", ["lora_A.weight", "alpha"])
def test_values_that_are_not_finite_are_refused(
    folder: Path, tmp_path: Path, value: float, part: str
):
    tensors = {k: v.copy() for k, v in GOOD.items()}
    tensors[f"{Q}.{part}"].reshape(-1)[:1] = value
    if part == "alpha":
        tensors[f"{Q}.alpha"] = np.float32(value)
    file = write(tmp_path / "x.safetensors", tensors)
    with pytest.raises(WeightsError, match="NaN or infinite"):
        with_file(folder, file)


def test_a_scale_must_be_finite(tmp_path: Path):
    with pytest.raises(WeightsError, match="a scale of nan"):
        Lora(tmp_path / "x.safetensors", float("nan"))


@pytest.mark.parametrize("name", ["x.pt", "x.safetensors"])
def test_an_archive_of_pytorch_is_read_whatever_its_name(folder: Path, tmp_path: Path, name: str):
    file = tmp_path / name
    torch.save({k: torch.tensor(v).bfloat16() for k, v in GOOD.items()}, file)
    assert distance(with_file(folder, file), weights(folder)) > 0.1


def test_two_loras_add_up_in_any_order(folder: Path, tmp_path: Path):
    first = write(tmp_path / "a.safetensors", GOOD)
    tensors = low_rank({Q: (32, 32)}, rank=2, pair="kohya")
    second = write(tmp_path / "b.safetensors", tensors)
    expected = weights(folder)
    name = "blocks.0.self_attn.q.weight"
    pair = GOOD[f"{Q}.lora_A.weight"], GOOD[f"{Q}.lora_B.weight"]
    expected[name] = merged_low_rank(expected[name], *pair, 0.5 * 0.7)
    pair = tensors[f"{Q}.lora_down.weight"], tensors[f"{Q}.lora_up.weight"]
    expected[name] = merged_low_rank(expected[name], *pair, -0.3)
    ours = with_file(folder, first, 0.7, Lora(second, -0.3))
    assert distance(ours, expected) < 1e-5  # measured 1e-7
    turned = with_file(folder, second, -0.3, Lora(first, 0.7))
    assert distance(turned, expected) < 1e-5


def test_no_file_is_no_lora(folder: Path, tmp_path: Path):
    with pytest.raises(WeightsError, match="there is no such file"):
        bound(folder, tmp_path / "x.safetensors")
    with pytest.raises(WeightsError, match="holds no tensors"):
        bound(folder, write(tmp_path / "x.safetensors", {}))


@pytest.mark.parametrize(
    ("metadata", "texts"),
    [
        ({"modelspec.title": "zorp"}, ()),
        ({"modelspec.trigger_phrase": "A zorp"}, ("A zorp",)),
        (
            {"modelspec.tags": "a, b", "ss_tag_frequency": '{"1_x": {"a zorp": 3}, "y": {"b": 1}}'},
            ("a, b", "a zorp", "b"),
        ),
        # What nobody wrote so says nothing, and the LoRA is used all the same.
        ({"ss_tag_frequency": '{"zorp": 3'}, ()),
        ({"ss_tag_frequency": '["zorp"]'}, ()),
        ({"ss_tag_frequency": '{"clips": ["zorp"]}'}, ()),
        ({"ss_tag_frequency": "[" * 100_000}, ()),
    ],
)
def test_what_a_header_says_it_was_trained_on(
    tmp_path: Path, metadata: dict[str, str], texts: tuple[str, ...]
):
    file = tmp_path / "lora.safetensors"
    save_file({"a.lora_A.weight": np.zeros((1, 1), np.float32)}, file, metadata)
    assert open_lora(file).trained_on() == texts
