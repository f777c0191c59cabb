"""The original's command lines, as they are."""

import os
import subprocess
import sys
from collections.abc import Sequence
from itertools import pairwise
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


@pytest.mark.parametrize(
    "script", ["generate_video_df", pytest.param("generate_video", marks=pytest.mark.slow)]
)
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


@pytest.mark.parametrize(
    ("outdir", "says"), [("a" * 300, "File name too long"), ("file", "is a file; name a folder")]
)
def test_a_folder_that_cannot_be_made_is_said_in_a_line(
    outdir: str, says: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    (tmp_path / "result").mkdir()
    (tmp_path / "result" / "file").touch()
    with pytest.raises(SystemExit) as stop:
        translate("generate_video", ["--prompt", "a", "--outdir", outdir])
    (line,) = capsys.readouterr().err.splitlines()
    assert (stop.value.code, says in line) == (2, True)


DF_DEFAULTS = {
    "--num_frames": "97",
    "--guidance_scale": "6.0",
    "--shift": "8.0",
    "--inference_steps": "30",
    "--fps": "24",
    "--ar_step": "0",
    "--causal_block_size": "1",
    "--base_num_frames": "97",
    "--addnoise_condition": "0",
}


def flags(words: Sequence[str]) -> dict[str, str]:
    """Flags that have a value, with it; the verb and switches are left out."""
    pairs = pairwise([*words, "--"])
    return {a: b for a, b in pairs if a.startswith("--") and not b.startswith("--")}


def test_what_is_translated():
    words = ["--prompt", "x", "--causal_attention", "--causal_block_size=5", "--output=o.mp4"]
    given = translate("generate_video_df", [*words, "--seed", "1", "--ar_step", "5"])
    assert given[0] == "generate"
    assert given[-1] == "--output=o.mp4"
    assert flags(given) == {
        "--model": "Skywork/SkyReels-V2-DF-1.3B-540P",
        "--prompt": "x",
        "--seed": "1",
        **DF_DEFAULTS,
        "--causal_block_size": "5",
        "--causal_attention": "5",
        "--ar_step": "5",
    }
    assert not Path("result").exists()


@pytest.mark.parametrize("model", ["T2V-14B-540P", "I2V-14B-720P"])
def test_what_is_left_out_has_the_originals_default_whatever_the_checkpoint(model: str):
    given = flags(translate("generate_video", ["--model_id", model]))
    known = ("--num_frames", "--guidance_scale", "--shift", "--inference_steps", "--fps")
    assert {name: given[name] for name in known} == {name: DF_DEFAULTS[name] for name in known}
    assert not {"--ar_step", "--base_num_frames", "--cache", "--image", "--video_path"} & set(given)
    assert given["--prompt"].startswith("A serene lake")
    assert "motorcycle" in flags(translate("generate_video_df", []))["--prompt"]


README = [
    *("--resolution", "540P", "--ar_step", "0", "--base_num_frames", "97", "--num_frames", "120"),
    *("--overlap_history", "17", "--prompt", "x", "--addnoise_condition", "20", "--offload"),
    *("--use_ret_steps", "--teacache", "--teacache_thresh", "0.3", "--video_path", "c.mp4"),
]


def test_the_readmes_extension_is_taken_and_its_length_said(capsys):
    given = translate("generate_video_df", README)
    assert (
        flags(given).items()
        >= {
            "--num_frames": "117",
            "--overlap_history": "17",
            "--addnoise_condition": "20",
            "--cache": "teacache",
            "--cache-threshold": "0.3",
            "--video_path": "c.mp4",
        }.items()
    )
    assert "--use-ret-steps" in given
    assert "--num_frames 120 is taken as 117" in capsys.readouterr().err


def test_what_the_originals_parser_takes_is_taken(capsys):
    """Abbreviations, an empty path, a threshold without its cache, an overlap between two."""
    words = ["--num_f", "33", "--infer", "4", "--model", "m", "--video_path", "", "--image", ""]
    words += ["--teacache_thresh", "0.3", "--use_ret", "--overlap_history", "20"]
    given = translate("generate_video_df", [*words, "--vae-dtype", "bfloat16", "--num-frames=17"])
    known = flags(given)
    assert (known["--num_frames"], known["--inference_steps"], known["--model"]) == ("33", "4", "m")
    assert known["--overlap_history"] == "17"
    assert not {"--cache", "--use-ret-steps", "--video_path", "--image"} & set(given)
    # Flags of ours come last, and so have the last word.
    assert given[-3:] == ["--vae-dtype", "bfloat16", "--num-frames=17"]
    said = capsys.readouterr().err
    assert "--overlap_history 20 is taken as 17" in said
    assert "loses 3 frames at each join" in said
    assert "--use_ret_steps is for --teacache" in said


def test_seconds_take_the_place_of_the_default_number_of_frames():
    assert "--num_frames" not in translate("generate_video", ["--seconds", "2"])


def test_images_beside_a_video_are_without_effect_as_they_were(capsys):
    given = translate("generate_video_df", ["--video_path", "c.mp4", "--image", "x.png"])
    assert "--image" not in given
    assert "without effect beside --video_path" in capsys.readouterr().err


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
        (["--seed", "x"], "--seed"),
        (["--resolution", "480P"], "540P"),
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
