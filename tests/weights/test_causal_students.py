"""Files of the causal students of Wan 2.1 as their authors write them, and what they are named.

Sources of the layouts: the trainers and loaders of guandeh17/Self-Forcing, thu-ml/Causal-Forcing,
NVlabs/LongLive (v1.0), TencentARC/RollingForcing, tianweiy/CausVid and krea-ai/realtime-video.
"""

import dataclasses
import json
from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file, save_file
from tests.cli.commands import Command
from tests.weights.lora.files import random
from tests.weights.tiny import DF, T2V, save

from skyreels_jax.causal_presets import CAUSAL_PRESETS, NAMES_OF_STUDENTS
from skyreels_jax.checkpoints import Checkpoint, load_transformer
from skyreels_jax.errors import RequestError, WeightsError
from skyreels_jax.models.transformer_config import DF_1_3B, T2V_1_3B, T2V_14B
from skyreels_jax.presets import PRESETS
from skyreels_jax.recognition import guess_preset, guess_student
from skyreels_jax.weights.components.transformer import stored_transformer
from skyreels_jax.weights.engine import parameters
from skyreels_jax.weights.layout import Layout
from skyreels_jax.weights.lora.binding import Lora
from skyreels_jax.weights.lora.source import touched, with_loras
from skyreels_jax.weights.model_file import read_file
from skyreels_jax.weights.open_file import open_tensors
from skyreels_jax.weights.repackaged import UnpackedSource

F = np.float32
Tensors = dict[str, np.ndarray]
# One head of 128, which a file without config.json tells.
TINY = dataclasses.replace(T2V, dim=128, num_heads=1, num_layers=1)
BASE = "Wan2.1-T2V-1.3B"


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Tensors:
    """A tiny Wan transformer under the original's names."""
    folder = save(tmp_path_factory.mktemp("wan") / "m", TINY)
    return load_file(folder / "model.safetensors")


@pytest.fixture
def wan_is_tiny(monkeypatch: pytest.MonkeyPatch) -> None:
    """The shape of Wan 2.1 1.3B is that of the tiny files."""
    monkeypatch.setitem(PRESETS, BASE, dataclasses.replace(PRESETS[BASE], config=TINY))  # pyright: ignore


def as_torch(values: Mapping[str, np.ndarray]) -> dict[str, torch.Tensor]:
    return {name: torch.from_numpy(np.array(value)) for name, value in values.items()}


def named(values: Tensors, prefix: str) -> Tensors:
    return {prefix + name: value for name, value in values.items()}


def others(values: Tensors) -> Tensors:
    """Weights of the same shapes, which must not be taken."""
    return {name: value + F(1) for name, value in values.items()}


def wrapped(values: Tensors) -> Tensors:
    """FSDP around the model and each block, checkpointing inside."""
    found = {}
    for name, value in named(values, "model._fsdp_wrapped_module.").items():
        block = "blocks.0."
        inner = f"{block}_fsdp_wrapped_module._checkpoint_wrapped_module."
        found[name.replace(block, inner)] = value
    return found


Write = Callable[[Path, Tensors], object]


def archive(**mappings: Callable[[Tensors], object]) -> Write:
    return lambda path, values: torch.save({k: of(values) for k, of in mappings.items()}, path)


def under_model(values: Tensors) -> object:
    return as_torch(named(values, "model."))


def wrong(values: Tensors) -> object:
    return under_model(others(values))


def under_fsdp(values: Tensors) -> object:
    return as_torch(wrapped(values))


def step(values: Tensors) -> object:
    return 600


# Preset -> the path of its file, and how it is written.
FILES: dict[str, tuple[str, Write]] = {
    "self-forcing": (
        "self_forcing_dmd.pt",
        archive(generator=wrong, critic=wrong, generator_ema=under_model),
    ),
    "causal-forcing-chunk": ("chunkwise/causal_forcing.pt", archive(generator=under_model)),
    "causal-forcing-frame": (
        "framewise/causal_forcing.pt",
        archive(generator=wrong, critic=wrong, generator_ema=under_fsdp),
    ),
    "causal-forcing++-2step": (
        "causal-forcing++/framewise-2step.pt",
        archive(generator_ema=under_fsdp),
    ),
    "causal-forcing++-1step": (
        "causal-forcing++/framewise-1step.pt",
        archive(generator_ema=under_model, step=step),
    ),
    "longlive": ("models/longlive_base.pt", archive(generator=under_model, step=step)),
    "rolling-forcing": (
        "checkpoints/rolling_forcing_dmd.pt",
        archive(generator=wrong, generator_ema=under_fsdp),
    ),
    "causal-forcing-long": (
        "chunkwise/longvideo.pt",
        archive(generator=wrong, generator_ema=under_model),
    ),
    "causvid": ("autoregressive_checkpoint/model.pt", archive(generator=under_model)),
    "krea-realtime": (
        "krea-realtime-video-14b.safetensors",
        lambda path, values: save_file(named(values, "model."), path),
    ),
}


def written(folder: Path, name: str, values: Tensors) -> Path:
    path, write = FILES[name]
    (folder / path).parent.mkdir(parents=True, exist_ok=True)
    write(folder / path, values)
    return folder / path


def read(path: Path, key: str | None = None) -> Tensors:
    """All tensors of a transformer."""
    source = read_file(path, key=key).tensors()
    return {name: np.asarray(source.read(name)) for name in source.tensors()}


def verify(path: Path) -> None:
    stored_transformer(Checkpoint.open(path).layout).verify()


@pytest.mark.parametrize("name", FILES)
def test_each_file_is_the_same_transformer_to_the_last_bit(
    tmp_path: Path, weights: Tensors, name: str
):
    found = read(written(tmp_path, name, weights))
    assert found.keys() == weights.keys()
    for at, value in weights.items():
        np.testing.assert_array_equal(found[at], value, at)


def test_the_parameters_are_those_of_the_plain_file(tmp_path: Path, weights: Tensors):
    file = tmp_path / "wan.safetensors"
    save_file(weights, file)
    plain, other = (
        parameters(load_transformer(Checkpoint.open(path), dtype=F))
        for path in (file, written(tmp_path, "causal-forcing-frame", weights))
    )
    assert plain.keys() == other.keys()
    for at, value in plain.items():
        np.testing.assert_array_equal(value.get_value(), other[at].get_value(), str(at))


def test_the_average_is_taken_and_the_key_takes_another(tmp_path: Path, weights: Tensors):
    file = written(tmp_path, "self-forcing", weights)
    notes = Checkpoint.open(file).notes
    assert "took generator_ema of the file, and left generator, critic" in notes
    last = read(file, "generator")
    assert all((last[at] != value).all() for at, value in weights.items())


@pytest.mark.parametrize("name", ["causal-forcing-frame", "krea-realtime"])
def test_a_twin_that_lacks_a_tensor_or_has_one_too_many_is_refused(
    tmp_path: Path, weights: Tensors, name: str
):
    short = {k: v for k, v in weights.items() if k != "blocks.0.ffn.2.bias"}
    with pytest.raises(WeightsError, match=r"ffn\.2\.bias"):
        verify(written(tmp_path / "short", name, short))
    with pytest.raises(WeightsError, match=r"blocks\.0\.extra"):
        verify(written(tmp_path / "long", name, weights | {"blocks.0.extra": np.ones(3, F)}))


def lora_of(weights: Tensors, seed: int = 0) -> tuple[Tensors, Tensors]:
    """PEFT's names of a LoRA of rank 8 on all linears of the blocks, and the merged weights."""
    parts, merged = {}, dict(weights)
    for i, (name, value) in enumerate(sorted(weights.items())):
        module = name.removesuffix(".weight")
        if not name.startswith("blocks.") or value.ndim != 2 or module == name:
            continue
        down = random(8, value.shape[1], seed=seed + 2 * i)
        up = random(value.shape[0], 8, seed=seed + 2 * i + 1)
        parts[f"base_model.model.{module}.lora_A.weight"] = down
        parts[f"base_model.model.{module}.lora_B.weight"] = up
        merged[name] = value + up @ down
    return parts, merged


@pytest.mark.parametrize("inside", ["", "_fsdp_wrapped_module._checkpoint_wrapped_module."])
def test_longlive_is_its_base_with_the_generators_lora(
    tmp_path: Path, weights: Tensors, inside: str
):
    parts, merged = lora_of(weights)
    parts = {k.replace("blocks.0.", f"blocks.0.{inside}"): v for k, v in parts.items()}
    base = written(tmp_path, "longlive", weights)
    file = tmp_path / "models" / "lora.pt"
    critic, _ = lora_of(weights, seed=999)
    torch.save(
        {"generator_lora": as_torch(parts), "critic_lora": as_torch(critic), "step": 3000}, file
    )
    stored = with_loras(stored_transformer(Checkpoint.open(base).layout), [Lora(file)])
    assert touched(stored) == {name for name in merged if merged[name] is not weights[name]}
    for name, value in merged.items():
        # Both are one float32 sum of one product.
        np.testing.assert_array_equal(stored.source.read(name), value, name)


def test_a_lora_of_longlive_with_a_strange_key_is_refused_and_is_no_model(
    tmp_path: Path, weights: Tensors
):
    parts, _ = lora_of(weights)
    base, file = written(tmp_path, "longlive", weights), tmp_path / "lora.pt"
    torch.save({"generator_lora": as_torch(parts | {"blocks.0.what": np.ones(2, F)})}, file)
    with pytest.raises(WeightsError, match=r"blocks\.0\.what"):
        with_loras(stored_transformer(Checkpoint.open(base).layout), [Lora(file)])
    with pytest.raises(WeightsError, match=r"generator_lora, as LongLive's.*longlive_base\.pt"):
        Checkpoint.open(file)


def guess(path: Path, config=T2V_1_3B, repo: str | None = None):
    source = UnpackedSource(open_tensors(path))
    return guess_student(Layout(path, "original", path, {}), config, source, repo)


@pytest.mark.parametrize("name", FILES)
def test_a_file_under_its_authors_name_is_known(tmp_path: Path, name: str):
    config = T2V_14B if name == "krea-realtime" else T2V_1_3B
    path = written(tmp_path, name, {"blocks.0.self_attn.q.weight": np.zeros((2, 2), F)})
    found = guess(path, config)
    assert found is not None and found.preset is CAUSAL_PRESETS[name]
    assert not found.is_assumed
    assert (
        guess_preset(Layout(path, "original", path, {}), config, causal=found).preset
        is (PRESETS[CAUSAL_PRESETS[name].base])
    )


# What a file is called -> preset, and whether that is a guess.
CALLED: dict[str, tuple[str | None, bool]] = {
    "Wan2_1-T2V-1_3B-Self-Forcing-DMD-FP16.pt": ("self-forcing", False),
    "causal_forcing.pt": ("causal-forcing-chunk", True),
    "my_model.pt": ("self-forcing", True),
    "ode_init.pt": (None, False),
    "framewise/ar_diffusion.pt": (None, False),
}


@pytest.mark.parametrize("name", CALLED)
def test_what_a_name_does_not_tell_is_a_guess(tmp_path: Path, name: str):
    (tmp_path / name).parent.mkdir(exist_ok=True)
    value = {"model.blocks.0.self_attn.q.weight": torch.zeros(2, 2)}
    torch.save({"generator": value}, tmp_path / name)
    found = guess(tmp_path / name)
    assert found is not None
    student, is_assumed = CALLED[name]
    assert (found.preset and found.preset.name, found.is_assumed) == (student, is_assumed)
    assert ("assumed" in found.words()) == is_assumed


def test_what_is_none_of_them_is_not_taken_for_one(tmp_path: Path):
    value = {"model.blocks.0.self_attn.q.weight": np.zeros((2, 2), F)}
    plain = tmp_path / "wan.pt"
    torch.save(as_torch(value), plain)
    assert guess(plain) is None
    student = tmp_path / "self_forcing_dmd.pt"
    torch.save({"generator": as_torch(value)}, student)
    assert guess(student) is not None
    # Another network, which no causal student has: SkyReels' with frame rates, Wan of 14B.
    assert guess(student, DF_1_3B) is None
    found = guess(student, T2V_14B)
    assert found is not None and found.is_assumed
    both = tmp_path / "bidirectional_checkpoint2" / "causvid.pt"
    both.parent.mkdir()
    torch.save({"generator": as_torch(value)}, both)
    assert guess(both) is None


def test_a_header_or_an_id_names_it_too(tmp_path: Path):
    value = {"blocks.0.self_attn.q.weight": np.zeros((2, 2), F)}
    save_file(value, tmp_path / "a.safetensors", metadata={"modelspec.title": "Rolling Forcing"})
    found = guess(tmp_path / "a.safetensors")
    assert found is not None and found.preset is CAUSAL_PRESETS["rolling-forcing"]
    save_file(value, tmp_path / "b.safetensors")
    assert guess(tmp_path / "b.safetensors") is None
    found = guess(tmp_path / "b.safetensors", T2V_14B, "krea/krea-realtime-video")
    assert found is not None and found.preset is CAUSAL_PRESETS["krea-realtime"]


def test_info_names_it_and_the_preset(
    tmp_path: Path, weights: Tensors, wan_is_tiny: None, capfd: pytest.CaptureFixture[str]
):
    command = Command(capfd)
    file = written(tmp_path, "rolling-forcing", weights)
    outcome = command("info", file)
    assert outcome.code == 0, outcome.err
    assert "Rolling Forcing (the file's name (rolling_forcing_dmd.pt))" in outcome.out
    assert "live --preset rolling-forcing" in outcome.out
    assert "default fps             16 (preset Wan2.1-T2V-1.3B)" in outcome.out
    report = json.loads(command("info", file, "--json").out)["causal"]
    assert (report["preset"], report["assumed"]) == ("rolling-forcing", False)
    assert report["settings"]["timesteps"] == [1000, 800, 600, 400, 200]
    renamed = file.rename(tmp_path / "mine.pt")
    assert (
        "Self-Forcing (assumed: its tensors are under generator_ema" in command("info", renamed).out
    )
    report = json.loads(command("info", renamed, "--preset", "causvid", "--json").out)["causal"]
    assert (report["preset"], report["reason"]) == ("causvid", "given")


def test_a_preset_of_another_network_is_refused(tmp_path: Path, weights: Tensors):
    file = written(tmp_path, "self-forcing", weights)
    with pytest.raises(RequestError, match="self-forcing is another model"):
        Checkpoint.open(file, preset="self-forcing")
    with pytest.raises(RequestError, match="self-forcin' is unknown.*self-forcing, causal-forcing"):
        Checkpoint.open(file, preset="self-forcin")


def test_the_table_is_sound():
    assert set(NAMES_OF_STUDENTS.values()) <= CAUSAL_PRESETS.keys()
    assert not CAUSAL_PRESETS.keys() & PRESETS.keys()
    for one in CAUSAL_PRESETS.values():
        for steps in (one.timesteps, one.first_timesteps or one.timesteps):
            assert steps[0] == 1000 and list(steps) == sorted(set(steps), reverse=True)
            assert steps[-1] > 0
        assert one.sink + one.block <= one.window
        assert one.fps == 16 and one.model.config.model_type == "t2v"
        schedule, window = one.schedule(), one.attention_window()
        assert window.slots(schedule.at_once) == one.window - schedule.at_once
        # What they agree on with the authors' samplers is all but this.
        assert (one.caveat is not None) == (one.recompute == "block")
    warped = CAUSAL_PRESETS["self-forcing"].schedule().timesteps
    assert warped == pytest.approx((1000, 937.5, 833.3333, 625), abs=1e-3)
    rolling = CAUSAL_PRESETS["rolling-forcing"].schedule().timesteps
    assert rolling == pytest.approx((1000, 952.381, 882.353, 769.231, 555.556), abs=1e-3)
    assert CAUSAL_PRESETS["causvid"].schedule().timesteps == (1000, 757, 522)
    first = CAUSAL_PRESETS["causal-forcing++-1step"].schedule()
    assert first.block_at(0) == (1, warped) and first.block_at(1) == (1, (1000.0,))
    assert DF.inject_sample_info  # The twin of `TINY`, which no student has.


def table_rows() -> list[str]:
    """The rows of the table in docs/live.md."""

    def steps(timesteps: tuple[float, ...] | None) -> str:
        return " ".join(f"{t:.4g}" for t in timesteps or ())

    rows = []
    for one in CAUSAL_PRESETS.values():
        schedule = one.schedule()
        first = schedule.first_timesteps and f" ({steps(schedule.first_timesteps)})"
        lora = f" and `{one.lora.rpartition('/')[2]}`" if one.lora else ""
        again = {"never": "-", "prompt": "with a prompt", "block": "before each block"}
        cells = (
            *(f"`{one.name}`", f"`{one.weights}`{lora}", str(one.block)),
            *(steps(schedule.timesteps) + (first or ""), str(one.window), str(one.sink)),
            *(one.positions, again[one.recompute], "yes" if one.is_rolling else "-"),
            f"`{one.key}`" if one.key else "-",
        )
        rows.append(f"| {' | '.join(cells)} |")
    return rows


def test_the_page_has_the_table():
    page = (Path(__file__).parents[2] / "docs" / "live.md").read_text()
    begin = page.index("| preset | weights |")
    assert page[begin:].split("\n\n")[0].splitlines()[2:] == table_rows()
