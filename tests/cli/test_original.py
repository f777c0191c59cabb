"""The original's command lines, as they are."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from tests.fabricate import Checkpoints

from skyreels_jax import media
from skyreels_jax.cli.original import translate

ROOT = Path(__file__).parents[2]
SIZE = ("--height", "32", "--width", "48", "--dtype", "float32", "--no-prompt-cache")


@pytest.fixture(autouse=True)
def elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)


@pytest.mark.parametrize("script", ["generate_video_df", "generate_video"])
def test_a_video_is_where_the_original_writes_it(
    checkpoints: Checkpoints, tmp_path: Path, script: str
):
    df = script == "generate_video_df"
    words = ["--model_id", str(checkpoints("df" if df else "t2v", "original")), *SIZE]
    words += ["--prompt", "a fox / a hen", "--seed", "7", "--num_frames", "9", "--outdir", "mine/x"]
    words += ["--inference_steps", "2", "--guidance_scale", "2.0", "--shift", "5.0", "--offload"]
    words += ["--ar_step", "1", "--causal_block_size", "2", "--overlap_history", "1"] if df else []
    environment = os.environ | {"PYTHONPATH": str(ROOT / "src")}
    done = subprocess.run(
        [sys.executable, str(ROOT / f"{script}.py"), *words],
        capture_output=True,
        text=True,
        env=environment,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert "--offload is not needed" in done.stderr
    (file,) = (tmp_path / "result" / "mine" / "x").iterdir()
    assert file.name.startswith("a fox  a hen_7_20")
    assert media.read_video(file)[0].shape == (9, 32, 48, 3)


def test_what_is_translated():
    words = ["--prompt", "x", "--causal_attention", "--causal_block_size=5", "--output=o.mp4"]
    given = translate("generate_video_df", [*words, "--seed", "1", "--ar_step", "5"])
    assert given == [
        *("generate", "--model", "Skywork/SkyReels-V2-DF-1.3B-540P", "--prompt", "x"),
        *("--seed", "1", "--causal-block-size", "5", "--causal-attention", "5"),
        *("--output=o.mp4", "--ar_step", "5"),
    ]
    assert not Path("result").exists()


def test_seeds_are_drawn_and_said_in_the_name():
    first, second = (translate("generate_video", ["--prompt", "x" * 200]) for _ in range(2))
    seed = first[first.index("--seed") + 1]
    assert seed != second[second.index("--seed") + 1]
    name = Path(first[-1])
    assert name.parent == Path("result/video_out")
    assert name.name.startswith("x" * 100 + f"_{seed}_")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--seed", "1"], "--prompt"),
        (["--prompt", "x", "--prompt_enhancer"], "language model"),
    ],
)
def test_what_is_refused_is_said(capsys: pytest.CaptureFixture[str], words, message: str):
    with pytest.raises(SystemExit) as stop:
        translate("generate_video", words)
    assert stop.value.code == 2
    assert message in capsys.readouterr().err
    assert not Path("result").exists()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--use_usp"], "--use_usp is about speed alone"),
        (["--prompt_enhancer", "--image", "x.png"], "--prompt_enhancer is without effect"),
        (["--offload"], "--offload is not needed"),
    ],
)
def test_what_makes_no_difference_is_said_and_left_out(capsys, words, message: str):
    given = translate("generate_video", ["--prompt", "x", *words])
    assert given[0] == "generate"
    assert words[0] not in given
    assert message in capsys.readouterr().err
