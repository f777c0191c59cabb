import os
import subprocess
import sys
from pathlib import Path

import numpy as np
from PIL import Image, ImageSequence

from skyreels_jax.media import read_settings, read_video
from skyreels_jax.moving_shapes.judge import detect_things

DEMO = Path(__file__).parents[2] / "examples" / "demo.py"


def test_the_demo_makes_a_video_without_pytorch(tmp_path: Path):
    # A module that is None cannot be imported: as if it were not installed.
    code = (
        "import runpy, sys\n"
        "sys.modules |= {'torch': None, 'diffusers': None, 'transformers': None}\n"
        f"sys.argv = ['demo.py', '--output', {str(tmp_path / 'demo.mp4')!r}]\n"
        f"runpy.run_path({str(DEMO)!r}, run_name='__main__')\n"
    )
    caches = {"SKYREELS_JAX_CACHE": str(tmp_path / "caches")}
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env=os.environ | caches
    )
    assert done.returncode == 0, done.stderr
    assert str(tmp_path / "demo.mp4") in done.stdout
    for name in ("demo", "demo-from-image"):
        frames, rate = read_video(tmp_path / f"{name}.mp4")
        assert frames.shape == (17, 64, 64, 3)
        assert rate == 16
        assert shows_the_star(frames)
        assert not shows_the_star(frames[::-1])
        # What is enlarged is the same video.
        with Image.open(tmp_path / f"{name}.gif") as gif:
            assert (gif.size, gif.n_frames) == ((384, 384), 17)
            pictures = [frame.convert("RGB") for frame in ImageSequence.Iterator(gif)]
            shown = [np.asarray(picture.resize((64, 64))) for picture in pictures]
        assert shows_the_star(np.stack(shown))
        assert f"{name}.gif" in done.stdout
        assert read_settings(tmp_path / f"{name}.mp4")["seed"] == 0
    assert (tmp_path / "demo.png").is_file()
    # Not silent while it works.
    assert done.stderr.count("denoise: done") == 2


def shows_the_star(frames: np.ndarray) -> bool:
    seen = detect_things(frames, 16)
    whole = [(one.colour, one.kind, one.motion, one.direction, one.speed) for one in seen]
    return whole == [("red", "star", "move", "right", "slow")]
