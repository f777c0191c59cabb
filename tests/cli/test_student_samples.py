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
from skyreels_jax.media import VideoWriter, read_video
from skyreels_jax.pipeline import Pipeline

VIDEO: VideoSettings = {"num_frames": 17, "fps": 16, "height": 64, "width": 64, "seed": 3}
VIDEO |= {"steps": 20, "guidance_scale": 4.0, "shift": 4.0, "image": None}


def test_what_is_shown_is_kept_and_how_it_is_made_is_the_students():
    found = stream_settings(VIDEO)
    # 17 frames of 16 a second.
    assert found == {"seconds": 17 / 16, "seed": 3, "height": 64, "width": 64, "fps": 16}
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
        own = {"height": 32, "width": 32, "seconds": 5 / 16, "seed": 0, "fps": 16}
        prompt = (folder / "0.txt").read_text().strip()
        for name, change in {"own": {}, "other": {"timesteps": (1000,)}}.items():
            stream = pipe.stream(prompt, **own | change)
            frames = np.concatenate(list(stream))
            with VideoWriter(tmp_path / f"{name}.mp4", fps=16, size=(32, 32)) as writer:
                writer.append(frames)
            if name == "own":
                assert stream.request.schedule.timesteps == pytest.approx((1000, 625), rel=1e-5)
    shown, own_frames, other = (
        read_video(file)[0]
        for file in (folder / "0.mp4", tmp_path / "own.mp4", tmp_path / "other.mp4")
    )
    np.testing.assert_array_equal(shown, own_frames)
    assert np.any(shown != other)  # Twin.


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
    write = write_samples_of([("a star", VIDEO)], streamed)
    with pytest.raises(RuntimeError, match="no memory for a stream"):
        write(tmp_path, tmp_path)
    (request,) = pipeline.asked
    assert (request.seconds, request.steps, request.timesteps) == (17 / 16, None, None)
    assert request.video.dtype == "float32"
