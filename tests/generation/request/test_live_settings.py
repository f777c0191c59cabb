"""Settings of a stream: what is taken, from where, and what is refused in which words."""

from dataclasses import replace
from pathlib import Path
from typing import Any, get_args

import numpy as np
import pytest
from safetensors.numpy import save_file
from tests import standins

from skyreels_jax.causal_presets import CAUSAL_PRESETS
from skyreels_jax.checkpoints import Checkpoint
from skyreels_jax.diffusion.few_steps import Recomputation, StepRule, WindowPositions
from skyreels_jax.errors import RequestError
from skyreels_jax.generation.request import live
from skyreels_jax.generation.request.live import LiveRequest, live_declared
from skyreels_jax.generation.request.resolve_live import ResolvedLive, resolve_live
from skyreels_jax.generation.streaming import in_known_words
from skyreels_jax.media import VideoWriter
from skyreels_jax.recognition import CausalGuess
from skyreels_jax.weights.lora.binding import Lora

IMAGE = np.zeros((32, 48, 3), np.uint8)


def resolved(
    task: str = "df", memory: int = 2**40, student: str | None = None, **settings: Any
) -> ResolvedLive:
    settings = {"prompt": "a fox", "height": 32, "width": 48} | settings
    checkpoint = standins.checkpoint(task)
    if student is not None:
        causal = CausalGuess(CAUSAL_PRESETS[student], "made for a test")
        checkpoint = replace(checkpoint, guess=replace(checkpoint.guess, causal=causal))
    return resolve_live(LiveRequest.of(settings), checkpoint, memory=memory)


def test_names_are_those_of_the_sampler():
    assert get_args(StepRule) == live.RULES
    assert get_args(WindowPositions) == live.POSITIONS
    assert get_args(Recomputation) == live.RECOMPUTATIONS


def test_a_model_that_learned_nothing_of_it_is_streamed_with_a_warning():
    stream = resolved()
    assert (stream.schedule.block, stream.schedule.rule) == (1, "euler")
    assert stream.schedule.timesteps == pytest.approx((1000, 960, 8000 / 9, 2000 / 2.75), abs=0.1)
    assert (stream.window.frames, stream.window.sink) == (3, 0)
    assert stream.video.guidance_scale == 6.0
    assert stream.frames is None
    assert stream.window.positions == "relative"
    assert len([w for w in stream.warnings if "has not learned" in w]) == 1


def test_a_model_that_learned_it_is_sampled_as_it_learned():
    stream = resolved("t2v", student="self-forcing", seconds=5, image=IMAGE)
    assert (stream.schedule.block, stream.schedule.rule) == (3, "renoise")
    assert stream.schedule.timesteps == pytest.approx((1000, 937.5, 833.33, 625), abs=0.01)
    assert (stream.window.frames, stream.window.sink, stream.window.recompute) == (21, 0, "never")
    assert stream.window.positions == "absolute"
    assert stream.video.guidance_scale == 1
    assert stream.sources["guidance_scale"] == "preset self-forcing"
    assert [w for w in stream.warnings if "learned" in w] == []
    assert resolved("t2v", student="self-forcing").window.positions == "relative"


def test_what_a_student_learned_that_streams_do_not_do_is_said():
    said = {name: resolved(student=name).warnings for name in ("krea-realtime", "self-forcing")}
    counts = {n: len([w for w in all_ if "from pixels" in w]) for n, all_ in said.items()}
    assert counts == {"krea-realtime": 1, "self-forcing": 0}


@pytest.mark.parametrize("name", ["rolling-forcing", "causal-forcing-long"])
def test_students_that_learned_to_roll_do(name: str):
    stream = resolved("t2v", student=name, seconds=5)
    steps = len(stream.schedule.timesteps)
    assert stream.schedule.rolling and stream.schedule.at_once == 3 * steps
    assert stream.schedule == CAUSAL_PRESETS[name].schedule()
    assert stream.sources["rolling"] == f"preset {name}"
    assert stream.values()["rolling"] is True
    assert not [warning for warning in stream.warnings if name in warning]
    apart = resolved("t2v", student=name, rolling=False)
    assert not apart.schedule.rolling and apart.sources["rolling"] == "given"
    assert apart.work < stream.work  # Of 3 frames in a call, not of all under way.


def test_any_other_rolls_if_asked_to():
    assert not resolved("t2v", student="self-forcing").schedule.rolling
    assert resolved("t2v", student="self-forcing", rolling=True).schedule.at_once == 12
    # What it learned of its first block is not asked of one that is as the others.
    plus = resolved("t2v", student="causal-forcing++-2step", rolling=True).schedule
    assert plus.rolling and plus.first_timesteps is None


def test_a_window_too_small_for_all_under_way_says_what_is_enough():
    ask = {"student": "rolling-forcing", "window": 17}
    with pytest.raises(RequestError, match=r"`window` 17: .* with 15 made at once .* least 18$"):
        resolved(**ask)
    assert resolved(**ask | {"window": 18}).window.frames == 18
    assert resolved(**ask, rolling=False).window.frames == 17  # Twin: 3 at once have room.


def test_a_video_that_is_continued_fits_beside_all_under_way(tmp_path: Path):
    with VideoWriter(tmp_path / "given.mp4", fps=16, size=(32, 48)) as writer:
        writer.append(np.zeros((33, 32, 48, 3), np.uint8))
    ask = {"student": "rolling-forcing", "video": tmp_path / "given.mp4"}
    with pytest.raises(RequestError, match="`overlap_history` 25 .* 15 made at once .* most 21"):
        resolved(**ask, overlap_history=25)
    assert resolved(**ask, overlap_history=21).video.forcing.overlap_history == 21
    assert resolved(**ask, overlap_history=25, rolling=False)


def test_of_a_window_nothing_is_said_that_is_true_of_whole_videos(tmp_path: Path):
    """How many frames there are is no matter of a stream, in whatever words it is said."""
    with VideoWriter(tmp_path / "follow, in all.mp4", fps=16, size=(32, 48)) as writer:
        writer.append(np.zeros((33, 32, 48, 3), np.uint8))
    stream = resolved(video=tmp_path / "follow, in all.mp4", window=20, overlap_history=9)
    # Its rate is still said, though its file is called as the sentence that is not.
    assert [w for w in stream.warnings if "16 frames a second and is written at 24" in w]
    assert len(stream.video.length_warnings) == 2
    assert not set(stream.video.length_warnings) & set(stream.warnings)
    assert set(stream.video.length_warnings) < set(stream.video.warnings)
    assert [
        w for w in stream.warnings if w.startswith("`window` 20: the checkpoint was made for 3")
    ]
    assert not [w for w in resolved(window=4).warnings if "`window`" in w]
    (said,) = [w for w in resolved(overlap_history=9).warnings if "overlap" in w]
    assert said == "`overlap_history` does nothing: there is no `video` to go on from"


def test_absolute_positions_hold_what_is_made_after_the_end():
    """1020 latent frames at 24 a second; 4 blocks of 1 are under way at their end."""
    ask = {"seconds": (4 * 1019 + 1) / 24, "window": 6}
    assert resolved(**ask).window.positions == "absolute"
    assert resolved(**ask, steps=5, rolling=True).window.positions == "absolute"
    assert resolved(**ask | {"window": 8}, steps=6, rolling=True).window.positions == "relative"


def test_settings_of_students():
    live = resolved(student="longlive")
    assert (live.window.frames, live.window.sink, live.window.recompute) == (12, 3, "prompt")
    assert resolved(student="krea-realtime").window.recompute == "block"
    assert resolved(student="krea-realtime", recompute="never").window.recompute == "never"
    assert resolved(student="causvid").schedule.timesteps == (1000.0, 757.0, 522.0)
    # As many steps as it learned are those that it learned; another number's are even ones.
    assert resolved(student="causvid", steps=3).schedule.timesteps == (1000.0, 757.0, 522.0)
    assert resolved(student="krea-realtime", steps=4).schedule.timesteps[1:] == (937, 833, 625)
    assert resolved(student="causvid", steps=2).schedule.timesteps == (1000.0, 500.0)
    two = resolved(student="causal-forcing++-2step").schedule
    assert (len(two.timesteps), len(two.first_timesteps or ())) == (2, 4)
    # Steps that somebody asks for are those of the first block too.
    assert resolved(student="causal-forcing++-2step", steps=3).schedule.first_timesteps is None
    assert resolved(student="self-forcing", guidance_scale=3).video.guidance_scale == 3


def test_positions_end_unless_they_are_relative():
    assert resolved(seconds=10).window.positions == "absolute"
    assert resolved(seconds=600).window.positions == "relative"
    with pytest.raises(RequestError, match="absolute` *end after 1024|absolute end after 1024"):
        resolved(positions="absolute")


def test_timesteps_stand_as_they_are_unless_a_shift_is_given():
    assert resolved(timesteps="1000, 500").schedule.timesteps == (1000.0, 500.0)
    warped = resolved(timesteps=[1000, 750, 500, 250], shift=5).schedule.timesteps
    assert warped == pytest.approx((1000, 937.5, 833.33, 625), abs=0.01)
    assert len(resolved(steps=2).schedule.timesteps) == 2
    first = resolved(first_block=1, first_timesteps=(1000, 500, 250))
    assert (first.schedule.first_block, len(first.schedule.first_timesteps)) == (1, 3)


REFUSED = {
    "too many steps": ({"steps": 9}, "`steps` 9 must be between 1 and 8"),
    "no step": ({"steps": 0}, "`steps` 0 must be between 1 and 8"),
    "both": ({"steps": 2, "timesteps": "1000"}, "exclude each other"),
    "rising": ({"timesteps": "500,1000"}, "`timesteps` 500, 1000 must be 1 to 8 numbers"),
    "no numbers": ({"timesteps": "many"}, "`timesteps` 'many' must be 1 to 8 numbers"),
    "beyond": ({"timesteps": (2000,)}, "at most 1000"),
    "a rule": ({"rule": "unipc"}, "`rule` unipc does not exist; there are renoise, euler"),
    "no room": ({"window": 3, "causal_block_size": 3}, "`window` 3: "),
    "first of those that roll": (
        {"rolling": True, "first_block": 1, "first_timesteps": "1000"},
        "`first_block` and `first_timesteps` with `rolling`: blocks that roll are all alike",
    ),
    "rolling": ({"rolling": "yes"}, "`rolling` 'yes' must be True or False"),
    "sink": ({"window": 3, "sink": 3}, "`window` 3: "),
    "prompts": ({"prompt": ["a", "b"]}, "`prompt` of type list must be one text"),
    "misspelt": ({"windows": 3}, "did you mean `window`?"),
    "of others": ({"cache": "teacache"}, "`cache` does not exist"),
    "no block": ({"causal_block_size": 0}, "`causal_block_size` 0 must be"),
    "length": ({"seconds": -1}, "seconds"),
    "two at once": ({"height": 30, "steps": 9}, "`height` 30"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_is_refused(case: str):
    settings, says = REFUSED[case]
    with pytest.raises(RequestError) as caught:
        resolved(**settings)
    assert says in str(caught.value)


def test_all_that_is_wrong_is_said_at_once():
    with pytest.raises(RequestError) as caught:
        resolved(height=30, steps=9, sink=-1)
    assert all(name in str(caught.value) for name in ("`height`", "`steps`", "`sink`"))


@pytest.mark.parametrize("task", ["i2v", "flf2v"])
def test_models_of_one_length_are_not_streamed(task: str):
    with pytest.raises(RequestError, match="cannot be streamed"):
        resolved(task)


def test_what_does_not_fit_is_refused():
    with pytest.raises(RequestError, match="not enough memory: a stream of 32 x 48"):
        resolved(memory=1000)


def test_every_setting_has_help_and_shared_ones_mean_the_same():
    for name, one in live_declared().items():
        assert one.name == name
        assert one.help
    assert live_declared()["seed"] == replace(live.declared()["seed"])


def test_settings_are_json_values():
    import json

    text = json.dumps(resolved(seconds=2, seed=1).settings())
    assert '"window": 3' in text
    assert '"seed": 1' in text


@pytest.mark.parametrize(("about", "known"), [("A Zorp", True), ("a cat", False)])
def test_words_that_a_lora_was_trained_on_are_known(about, known, tmp_path, caplog):
    """Those of the prompt that it begins with, and of one that is given while it runs."""
    file, checkpoint = tmp_path / "lora.safetensors", Checkpoint.open("mini")
    tensors = {"a.lora_A.weight": np.zeros((1, 1), np.float32)}
    save_file(tensors, file, {"modelspec.trigger_phrase": about})
    request = LiveRequest.of({"prompt": "a zorp on a pink background"})
    made = resolve_live(request, checkpoint, memory=2**40, loras=[Lora(file)])
    assert in_known_words(checkpoint, "a pink Zorp", [Lora(file)]) == "a pink zorp"
    (first,) = [warning for warning in made.warnings if "never learned" in warning]
    for warning in (first, caplog.text):
        assert ("'zorp'" in warning) is not known
        assert "'pink'" in warning
