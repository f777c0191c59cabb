"""A causal student says itself how it is sampled, and is streamed so without a flag."""

import importlib
import json
import shutil
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import jax.numpy as jnp
import pytest
from tests.documents import ROOT
from tests.fabricate import Checkpoints
from tests.weights.tiny import DF, T2V, edit_json, random_state, save

from skyreels_jax.causal_settings import CausalSettings, read_streaming, write_streaming
from skyreels_jax.checkpoints import Checkpoint
from skyreels_jax.cli.main import build_parser
from skyreels_jax.diffusion.few_steps import warp
from skyreels_jax.errors import RequestError, WeightsError
from skyreels_jax.generation.request.live import LiveRequest
from skyreels_jax.generation.request.resolve_live import ResolvedLive, resolve_live
from skyreels_jax.hub import ASSETS
from skyreels_jax.mini.recipe import read_recipe
from skyreels_jax.models.transformer_config import TransformerConfig
from skyreels_jax.training.distillation_recipe import (
    Distillation,
    DistillShapes,
    learned_settings,
)
from skyreels_jax.training.distillation_task import DistillTask
from skyreels_jax.training.transformer_recipe import ClipsData, TransformerShape
from skyreels_jax.weights.layout import STREAMING
from skyreels_jax.weights.model_file import read_file
from skyreels_jax.weights.plan import Format

LEARNED = CausalSettings(
    block=2, timesteps=(1000.0, 500.0), window=7, sink=1, positions="relative", recompute="prompt"
)
NAMED = f"it says so in {STREAMING}"


def student(
    folder: Path,
    config: TransformerConfig = DF,
    format: Format = "diffusers",
    learned: CausalSettings = LEARNED,
) -> Path:
    write_streaming(save(folder, config, format), learned)
    return folder


def run(*words: object) -> int:
    arguments = build_parser(str(words[0])).parse_args([*map(str, words)])
    return importlib.import_module(f"skyreels_jax.cli.{words[0]}").run(arguments)


def resolved(folder: Path, **settings: Any) -> ResolvedLive:
    settings = {"prompt": "a fox", "height": 32, "width": 48, "seconds": 2} | settings
    return resolve_live(LiveRequest.of(settings), Checkpoint.open(folder), memory=2**40)


@pytest.mark.parametrize(
    "learned",
    [
        LEARNED,
        CausalSettings(shift=None, first_block=1, rule="euler", guidance_scale=None),
        CausalSettings(block=1, window=21, is_rolling=True, first_timesteps=None),
        replace(LEARNED, context_noise=400.0, change_noise=950.0),
        replace(LEARNED, schedules=((1000.0,), (1000.0, 300.0, 40.0))),
    ],
    ids=["renoise", "euler", "rolling", "noise", "schedules"],
)
def test_what_is_written_is_read(learned: CausalSettings, tmp_path: Path):
    assert read_streaming(write_streaming(tmp_path, learned)) == learned


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"block": None}, "has no block"),
        ({"timesteps": None, "window": None}, "has no timesteps and no window"),
        ({"blocks": 3}, "blocks is unknown; there are block"),
        ({"block": 1.5}, "block = 1.5 should be a whole number"),
        ({"block": True}, "block = True should be a whole number"),
        ({"timesteps": "1000"}, "should be a list of numbers"),
        ({"timesteps": [1000, "500"]}, "should be a list of numbers"),
        ({"timesteps": [500, 1000]}, "falling, each above 0"),
        ({"timesteps": []}, "at least one"),
        ({"schedules": [1000, 500]}, "should be a list of lists of numbers"),
        ({"schedules": [[1000, "500"]]}, "should be a list of lists of numbers"),
        ({"schedules": [[500, 700, 600]]}, "falling, each above 0"),
        ({"schedules": [[]]}, "at least one"),
        ({"schedules": [[1000], [900]]}, "schedules: 1 steps have two lists"),
        ({"schedules": [[900, 800]]}, "schedules: 2 steps have two lists"),
        ({"shift": -1}, "must be positive"),
        ({"rule": "heun"}, "rule = 'heun' should be one of renoise, euler"),
        ({"positions": "none"}, "positions = 'none' should be one of absolute, relative"),
        ({"recompute": "always"}, "recompute = 'always' should be one of never, prompt, block"),
        ({"window": 2}, "it needs at least 3"),
        ({"sink": -1}, "a sink of at least 0"),
        ({"is_rolling": 1}, "is_rolling = 1 should be true or false"),
        ({"guidance_scale": 0}, "guidance_scale = 0.0 should be from 1 to 100"),
    ],
    ids=lambda value: value if isinstance(value, str) else json.dumps(value),
)
def test_what_is_not_legal_is_said(changes: dict[str, object], words: str, tmp_path: Path):
    folder = student(tmp_path / "student")
    edit_json(folder / STREAMING, **changes)
    with pytest.raises(WeightsError, match=words) as refusal:
        Checkpoint.open(folder)
    assert str(folder / STREAMING) in str(refusal.value)


@pytest.mark.parametrize("format", ["diffusers", "original"])
@pytest.mark.parametrize("config", [DF, T2V], ids=["df", "t2v"])
def test_a_student_is_known_by_what_it_says(
    config: TransformerConfig, format: Format, tmp_path: Path
):
    checkpoint = Checkpoint.open(student(tmp_path / "student", config, format))
    causal = checkpoint.guess.causal
    assert causal is not None and causal.settings == LEARNED
    assert (causal.preset, causal.origin) == (None, NAMED)
    assert "a causal student of 2 steps" in checkpoint.notes[-1]
    (checkpoint.layout.transformer / STREAMING).unlink()
    plain = Checkpoint.open(checkpoint.folder)
    assert plain.guess.causal is None
    # What else it is taken for does not depend on it.
    assert plain.guess.reason == checkpoint.guess.reason
    assert plain.defaults.guidance_scale.value > 1 == checkpoint.defaults.guidance_scale.value


def test_it_is_streamed_as_it_learned(tmp_path: Path):
    folder = student(tmp_path / "student")
    stream = resolved(folder)
    assert stream.schedule == LEARNED.schedule()
    # Not that of videos which are made at once.
    assert (
        stream.settings()["shift"] == LEARNED.shift != Checkpoint.open(folder).defaults.shift.value
    )
    assert stream.window == LEARNED.attention_window()
    assert stream.video.guidance_scale == 1
    names = ("causal_block_size", "timesteps", "rule", "window", "sink", "positions", "recompute")
    assert {stream.sources[name] for name in (*names, "shift", "guidance_scale")} == {NAMED}
    assert not [warning for warning in stream.warnings if "learned" in warning]


def test_a_flag_goes_before_what_it_learned(tmp_path: Path):
    folder = student(tmp_path / "student")
    stream = resolved(folder, steps=4, window=5, guidance_scale=3.0, rule="euler")
    # Of even steps, warped as its own are.
    assert stream.schedule.timesteps == pytest.approx((1000, 937.5, 833.33, 625), abs=0.01)
    assert (stream.window.frames, stream.schedule.rule) == (5, "euler")
    assert stream.video.guidance_scale == 3
    assert stream.sources["window"] == "given"


def test_noise_before_another_prompt_is_left_out_where_nothing_is_computed_again(tmp_path: Path):
    folder = student(tmp_path / "student", learned=replace(LEARNED, change_noise=950.0))
    learned = resolved(folder)
    assert (learned.window.change_noise, learned.sources["change_noise"]) == (950, NAMED)
    assert learned.settings()["live"]["change_noise"] == 950  # pyright: ignore
    assert resolved(folder, recompute="never").window.change_noise is None
    assert resolved(folder, change_noise=800).window.change_noise == 800
    with pytest.raises(RequestError, match="change_noise 800 with recompute block"):
        resolved(folder, change_noise=800, recompute="block")


def test_guidance_that_it_did_not_learn_is_the_checkpoints(tmp_path: Path):
    folder = student(tmp_path / "student", learned=CausalSettings(block=1, guidance_scale=None))
    stream = resolved(folder)
    assert stream.video.guidance_scale > 1
    assert stream.sources["guidance_scale"] != NAMED


def test_info_shows_it(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    folder = student(tmp_path / "student")
    assert run("info", folder) == 0
    text = capsys.readouterr().out
    assert "streams block           2\n" in text
    assert "streams window          7\n" in text
    assert "streams timesteps       (1000.0, 500.0)\n" in text
    assert run("info", folder, "--json") == 0
    said = json.loads(capsys.readouterr().out)["causal"]
    assert (said["preset"], said["reason"], said["settings"]["sink"]) == (None, NAMED, 1)


@pytest.mark.parametrize("format", ["diffusers", "original"])
def test_a_converted_student_is_one(format: Format, checkpoints: Checkpoints, tmp_path: Path):
    folder = tmp_path / "student"
    shutil.copytree(checkpoints("df", "diffusers"), folder)
    write_streaming(folder / "transformer", LEARNED)
    assert run("convert", folder, tmp_path / "copy", "--format", format) == 0
    causal = Checkpoint.open(tmp_path / "copy").guess.causal
    assert causal is not None and causal.settings == LEARNED
    # What lies beside a file without a config of its own may be another's.
    where = tmp_path / "copy" / ("transformer" if format == "diffusers" else "")
    (where / "config.json").unlink()
    (file,) = where.glob("*.safetensors")
    assert read_file(file).streaming_file is None


def training(frames: int = 17, **distill: Any) -> DistillShapes:
    return DistillShapes(
        data=ClipsData(vae="mini", text="mini", encoded="encoded", frames=frames),
        model=TransformerShape(start="mini"),
        distill=Distillation(**{"stage": "guidance", "block": 1} | distill),
    )


@pytest.mark.parametrize(
    ("stage", "rule", "guidance"),
    [
        ("guidance", "euler", 1.0),
        ("teacher-forcing", "euler", None),
        ("consistency", "renoise", 1.0),
        ("continuous", "renoise", 1.0),
    ],
)
def test_what_a_recipe_teaches(stage: str, rule: str, guidance: float | None):
    found = learned_settings(training(stage=stage))
    assert found is not None
    assert (found.rule, found.guidance_scale) == (rule, guidance)
    assert (found.block, found.window, found.positions) == (1, 5, "relative")
    expected = (1000, 937.5, 2500 / 3, 625)
    assert found.schedule().timesteps == pytest.approx(expected, abs=1e-4)


def test_timesteps_of_a_recipe_are_taken_to_within_float32():
    given = (1000.0, 833.333, 123.456)
    found = learned_settings(training(stage="dmd", timesteps=given, block=2, first_block=1))
    assert found is not None and (found.block, found.first_block) == (2, 1)
    # Measured 1.2e-6, where float32's steps are 7.6e-6.
    assert found.schedule().timesteps == pytest.approx(given, abs=4e-6)
    assert found.schedule().timesteps != pytest.approx((*given[:2], 123.45601), abs=4e-6)
    assert found.rule == "renoise"


@pytest.mark.parametrize("stage", ["consistency", "continuous"])
def test_timesteps_of_a_student_that_learned_all_are_those_of_its_streams(stage: str):
    found = learned_settings(training(stage=stage, timesteps=(1000.0, 833.333333333)))
    assert found is not None and found.timesteps == (1000, 500)
    assert found.schedule().timesteps == pytest.approx((1000, 2500 / 3), abs=1e-4)


def test_other_numbers_of_steps_have_the_timesteps_that_a_student_says(tmp_path: Path):
    given = (1000.0, 750.0, 200.0, 100.0, 50.0)
    learned = learned_settings(training(schedules=(given,)))
    assert learned is not None
    folder = student(tmp_path / "student", learned=learned)
    five, even, usual = (resolved(folder, steps=n) for n in (5, 3, None))
    # Measured 6e-7.
    assert five.schedule.timesteps == pytest.approx(given, abs=4e-6)
    assert five.sources["timesteps"] == NAMED
    assert even.schedule.timesteps == pytest.approx(warp([1000, 2000 / 3, 1000 / 3], 5))
    assert usual.schedule.timesteps == learned.schedule().timesteps
    with pytest.raises(ValueError, match=r"schedules = \[100.0, 200.0\] should fall"):
        training(schedules=((100.0, 200.0),))
    with pytest.raises(ValueError, match=r"schedules = \[\] should fall"):
        training(schedules=((),))
    with pytest.raises(ValueError, match="schedules: 4 steps have two lists"):
        training(schedules=((1000.0, 750.0, 200.0, 100.0),))


def test_what_has_no_schedules_can_be_read_by_packages_before_them(tmp_path: Path):
    for schedules, stands in (((), False), (((1000.0, 500.0),), True)):
        file = write_streaming(tmp_path, replace(LEARNED, schedules=schedules))
        assert ("schedules" in json.loads(file.read_text())) is stands


def test_a_recipe_says_what_holds_its_streams():
    found = learned_settings(training(sink=1, context_noise=400.0))
    assert found is not None and (found.sink, found.context_noise) == (1, 400)
    assert found.attention_window().context_noise == 400
    assert (found.recompute, found.change_noise) == ("never", None)
    found = learned_settings(training(change_noise=900.0))
    assert found is not None and (found.recompute, found.change_noise) == ("prompt", 900)
    assert found.attention_window().change_noise == 900
    with pytest.raises(ValueError, match="change_noise = -1"):
        training(change_noise=-1.0)
    with pytest.raises(ValueError, match="at most 4"):
        training(sink=5)
    with pytest.raises(ValueError, match="context_noise = 1000"):
        training(context_noise=1000.0)


def test_the_packages_student_is_sampled_as_its_recipe_says():
    recipe: Any = read_recipe(ROOT / "configs" / "mini" / "live.toml")
    shipped = read_streaming(ASSETS / "mini-live" / "transformer" / STREAMING)
    assert shipped == learned_settings(recipe.tables)
    assert (len(shipped.timesteps), shipped.change_noise) == (2, 950)


def test_a_student_that_saw_other_scenes_before_computes_them_again_for_a_new_prompt():
    made = training()
    found = learned_settings(replace(made, data=replace(made.data, changes=0.5)))
    assert found is not None and found.recompute == "prompt"


@pytest.mark.parametrize("block", [5, 8])
def test_blocks_of_whole_videos_leave_nothing_to_stream(block: int):
    assert learned_settings(training(block=block)) is None


@pytest.mark.parametrize("format", ["diffusers", "original"])
def test_the_trainer_writes_it_beside_what_it_exports(format: Format, tmp_path: Path):
    task: Any = object.__new__(DistillTask)
    params = {"all": jnp.zeros(1)}
    task.template = SimpleNamespace(model=lambda values: random_state(DF))
    task.config, task.training = DF, training(stage="consistency")
    task._save(tmp_path / "model", params, format, jnp.float32)
    causal = Checkpoint.open(tmp_path / "model").guess.causal
    assert causal is not None and causal.settings == learned_settings(task.training)
