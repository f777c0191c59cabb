"""What a distillation shows of its student while it trains: streams in its own few steps."""

from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from tests.cli.test_sample_prompts import Planted
from tests.training.test_distillation_runs import STEPS, recipe

from skyreels_jax.cli import training_samples
from skyreels_jax.cli.main import main
from skyreels_jax.cli.training_samples import stream_settings, streamed, write_samples_of
from skyreels_jax.generation.request.keywords import VideoSettings
from skyreels_jax.generation.request.live import LiveRequest
from skyreels_jax.media import read_video
from skyreels_jax.pipeline import Pipeline
from skyreels_jax.training.distillation_recipe import Distillation

VIDEO: VideoSettings = {"num_frames": 17, "fps": 16, "height": 64, "width": 64, "seed": 3}
VIDEO |= {"steps": 20, "guidance_scale": 4.0, "shift": 4.0, "image": None}
# Stage -> what its student is made by.
STUDENTS: dict[str, tuple[Distillation, dict[str, Any]]] = {
    "dmd": (
        Distillation(stage="dmd", block=3, timesteps=(1000.0, 625.0), first_block=1),
        {"timesteps": (1000.0, 625.0), "rule": "renoise", "first_block": 1, "window": 9},
    ),
    "consistency": (
        Distillation(stage="consistency", block=1, shift=7.0),
        {"steps": 4, "rule": "renoise", "shift": 7.0, "window": 6},
    ),
    "continuous": (
        Distillation(stage="continuous", block=2),
        {"steps": 4, "rule": "renoise", "shift": 5.0, "window": 7},
    ),
    "guidance": (
        Distillation(stage="guidance", block=1, timesteps=(1000.0, 625.0)),
        {"timesteps": (1000.0, 625.0), "rule": "euler", "guidance_scale": 1.0},
    ),
    "guidance at all timesteps": (
        Distillation(stage="guidance", block=1),
        {"steps": 8, "rule": "euler", "shift": 4.0},
    ),
    "more timesteps than a stream has": (
        Distillation(stage="guidance", timesteps=tuple(1000.0 - 50 * n for n in range(16))),
        {"timesteps": tuple(1000.0 - 100 * n for n in range(8))},
    ),
    "teacher-forcing": (
        Distillation(stage="teacher-forcing", block=1),
        {"steps": 8, "rule": "euler", "guidance_scale": 4.0},
    ),
}


@pytest.mark.parametrize("name", STUDENTS)
def test_a_student_is_shown_in_its_own_blocks_and_steps(name: str):
    distill, expected = STUDENTS[name]
    found = stream_settings(distill, VIDEO)
    # Seconds, that is: 17 frames of 16 a second.
    own = {"causal_block_size": distill.block, "seconds": 17 / 16, "guidance_scale": 1.0}
    own |= {"seed": 3, "height": 64, "width": 64, "fps": 16} | expected
    assert {key: found.get(key) for key in own} == own
    assert not {"num_frames", "image"} & found.keys()
    assert ("steps" in found) != ("timesteps" in found)
    LiveRequest.of({"prompt": "a star", **found})  # A stream takes them.


@pytest.mark.slow
def test_samples_of_a_distillation_are_streams_of_its_student(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """Files that the run writes show what `pipe.stream` makes of the model it leaves."""
    block = f"block = 1\n{STEPS}"
    changes = {"steps = 3": "steps = 2\nsample_every = 2", "ema = 0.9\n": "", "block = 1": block}
    made = recipe(tmp_path, **changes, **{'"guidance"': '"dmd"'})
    with jax.numpy_rank_promotion("allow"), jax.numpy_dtype_promotion("standard"):
        assert main(["train", str(tmp_path / "run.toml")]) == 0
        folder = made.output / "samples" / "0000002"
        pipe = Pipeline.from_pretrained(made.output / "model", dtype="float32")
        own: dict[str, Any] = {"causal_block_size": 1, "timesteps": (1000, 625), "window": 3}
        own |= {"height": 32, "width": 32, "seconds": 5 / 16, "seed": 0, "fps": 16}
        own |= {"rule": "renoise", "guidance_scale": 1.0, "positions": "absolute"}
        prompt = (folder / "0.txt").read_text().strip()
        stream, other = (
            np.concatenate(list(pipe.stream(prompt, **own | change)))
            for change in ({}, {"timesteps": (1000,)})
        )
    shown = read_video(folder / "0.mp4")[0] * 1.0
    # H.264 alone is between them.
    assert np.abs(shown - stream).mean() < 4
    assert np.abs(shown - other).mean() > 2 * np.abs(shown - stream).mean()  # Twin.


class Streaming(Planted):
    """A pipeline that notes what is asked of it."""

    dtype = "float32"

    def __init__(self):
        self.asked: list[LiveRequest] = []

    def stream_request(self, request: LiveRequest) -> Any:
        self.asked.append(request)
        raise RuntimeError("no memory for a stream")


def test_a_student_is_not_made_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    pipeline = Streaming()
    monkeypatch.setattr(
        training_samples.Pipeline, "from_pretrained", lambda *args, **kwargs: pipeline
    )
    write = write_samples_of([("a star", VIDEO)], streamed(STUDENTS["dmd"][0]))
    with pytest.raises(RuntimeError, match="no memory for a stream"):
        write(tmp_path, tmp_path)
    (request,) = pipeline.asked
    assert (request.causal_block_size, request.timesteps) == (3, (1000.0, 625.0))
    assert request.video.dtype == "float32"
