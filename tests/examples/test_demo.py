import os
import subprocess
import sys
from pathlib import Path

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
    frames, rate = read_video(tmp_path / "demo.mp4")
    assert frames.shape == (17, 64, 64, 3)
    assert rate == 16
    (seen,) = detect_things(frames, float(rate))
    assert (seen.colour, seen.kind) == ("red", "star")
    assert (seen.motion, seen.direction, seen.speed) == ("move", "right", "slow")
    assert (tmp_path / "demo.png").is_file()
    assert read_settings(tmp_path / "demo.mp4")["seed"] == 0
