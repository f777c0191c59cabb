"""Prompts of a run's samples: lines of a file, refused by number; what fails is left out."""

from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from tests.training.videos.small_films import write_recipe

from skyreels_jax.cli import training_samples
from skyreels_jax.cli.main import main
from skyreels_jax.cli.sample_prompts import read_sample_prompts
from skyreels_jax.cli.training_samples import write_samples_of
from skyreels_jax.errors import RequestError
from skyreels_jax.generation.video import Video
from skyreels_jax.mini.recipe import read_recipe
from skyreels_jax.models.vae import WanVae
from skyreels_jax.pipeline import Pipeline
from skyreels_jax.sampling.progress import Timings

I2V = {"model__model_type": '"i2v"', "model__image_dim": "160", "data__image": '"mini-i2v"'}
LINES = """
# to look at
A star --w 544 --h 320 --f 17 --d 42 --s 7 --l 6.0 --fs 3 --n blurry -- dark --i first.png
A dog barks

  A cat, well--fed --g 1
"""


def prompts(folder: Path, text: str, **changes: str):
    file = folder / "prompts.txt"
    file.write_text(text)
    tables = read_recipe(write_recipe(folder, **changes)).tables
    return read_sample_prompts(file, tables)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    Image.new("RGB", (32, 32), "red").save(tmp_path / "first.png")
    (tmp_path / "text.png").write_text("no picture")
    return tmp_path


def test_lines_are_those_of_musubi(folder: Path):
    star, dog, cat = [(text, dict(settings)) for text, settings in prompts(folder, LINES)]
    assert star[0] == "A star"
    assert star[1] == {
        "width": 544,
        "height": 320,
        "num_frames": 17,
        "seed": 42,
        "steps": 7,
        "guidance_scale": 6.0,
        "shift": 3.0,
        "negative_prompt": "blurry -- dark",
        "image": folder / "first.png",
        "fps": 16,
    }
    # What is left out is the data's, and the seed the line's number among prompts.
    assert dog[0] == "A dog barks"
    size = {name: dog[1][name] for name in ("width", "height", "num_frames", "seed")}
    assert size == {"width": 32, "height": 32, "num_frames": 5, "seed": 1}
    assert cat[0] == "A cat, well--fed"
    assert (cat[1]["guidance_scale"], cat[1]["seed"]) == (1.0, 2)


BAD = [
    ("--w 60 --h 64", "line 2: --w 60 must be a multiple of 16; nearest: 48 or 64"),
    ("--w 64", "line 2: --w and --h go together"),
    ("--f 16", "--f 16 must be 4 k \\+ 1; nearest: 13 or 17"),
    ("--f many", "--f 'many' must be"),
    ("--s 0", "--s 0 must be"),
    ("--s 2000", "--s 2000 must be"),
    ("--d -1", "--d -1 must be from 0 to 4294967295; nearest: 0"),
    ("--d 4294967296", "nearest: 4294967295"),
    ("--l nan", "--l nan must be"),
    ("--fs 0", "--fs 0.0 must be"),
    ("--l 5 --g 5", "--g gives guidance_scale a second time"),
    ("--d", "--d has no value"),
    ("--seed 5", "--seed is unknown; did you mean --ei|--seed is unknown; there are --w"),
    ("--i nowhere.png", "nowhere.png"),
    ("--i text.png", "text.png"),
]


@pytest.mark.parametrize(("options", "says"), BAD)
def test_a_bad_line_is_refused_by_its_number(folder: Path, options: str, says: str):
    with pytest.raises(RequestError, match=says) as refusal:
        prompts(folder, f"# one\nA star {options}\nA dog --f 18\n")
    assert "prompts.txt, line 2: " in str(refusal.value)
    assert "(and 1 more lines)" in str(refusal.value)
    assert "\n" not in str(refusal.value)


@pytest.mark.parametrize(
    ("text", "changes", "says"),
    [
        ("", {}, "has 0 prompts"),
        ("# nothing\n", {}, "has 0 prompts"),
        ("--w 64 --h 64", {}, "line 1: there is no prompt before"),
        ("A star", I2V, "line 1: the model is i2v and takes a first frame: --i FILE"),
    ],
    ids=["empty", "comments", "no prompt", "no image"],
)
def test_what_else_is_refused(folder: Path, text: str, changes: dict[str, str], says: str):
    with pytest.raises(RequestError, match=says):
        prompts(folder, text, **changes)


def test_they_are_read_before_anything_is_loaded(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    def refuse(*args: object, **kwargs: object):
        raise AssertionError("a model is made")

    monkeypatch.setattr(WanVae, "__init__", refuse)
    (folder / "lines.txt").write_text("A star --f 16")
    recipe = write_recipe(folder, run__sample_prompts=f'"{folder}/lines.txt"')
    assert main(["train", str(recipe)]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "lines.txt, line 1: --f 16" in line
    assert not (folder / "out").exists()


class Planted(Pipeline):
    """A pipeline that cannot make what begins with `bad`."""

    def __init__(self):
        pass

    def __call__(self, prompt: str, **settings: object) -> Video:
        if prompt.startswith("bad"):
            raise RuntimeError(f"no memory for {prompt}")
        frames = np.full((5, 16, 16, 3), 100, np.uint8)
        return Video(frames, 16, {}, np.zeros((16, 2, 2, 2)), Timings(stages={}, steps=()))


def test_a_sample_that_fails_is_left_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
):
    monkeypatch.setattr(
        training_samples.Pipeline, "from_pretrained", lambda *args, **kwargs: Planted()
    )
    write_samples_of([("bad one", {}), ("good", {}), ("bad two", {})])(tmp_path, tmp_path)
    assert sorted(file.name for file in tmp_path.iterdir()) == ["1.mp4", "1.txt", "sheet.png"]
    assert "sample 0 (bad one) was not made: no memory for bad one" in caplog.text
    assert "sample 2 (bad two)" in caplog.text
    # The loop says so where there is none at all, and goes on.
    with pytest.raises(RuntimeError, match="bad two"):
        write_samples_of([("bad one", {}), ("bad two", {})])(tmp_path, tmp_path)
