"""Sixty bad data sets and recipes: a line or a report before anything is loaded."""

import json
import os
import re
from collections.abc import Callable
from pathlib import Path

import pytest
from tests.media.films import colours, write_film
from tests.training.videos.small_films import noise_film, write_picture, write_recipe

from skyreels_jax.cli.main import main
from skyreels_jax.errors import RequestError
from skyreels_jax.mini.recipe import read_recipe
from skyreels_jax.models.umt5 import Umt5Encoder
from skyreels_jax.models.vae import WanVae
from skyreels_jax.prompts import Tokenizer
from skyreels_jax.training.sources import layout_of
from skyreels_jax.training.videos.plan import DataPlan, plan_clips, require_sound

I2V = {"model__model_type": '"i2v"', "model__image_dim": "160", "data__image": '"mini-i2v"'}
# What is changed in the recipe, and what the refusal says.
RECIPES: list[tuple[dict[str, str], str]] = [
    ({"data__source": '"folders"'}, "data.source = 'folders' should be one of shapes, folder"),
    ({"data__source": "3"}, "data.source = 3 should be one of"),
    ({"data__resolution": "60"}, "resolution = 60.*nearest: 64"),
    ({"data__resolution": "0"}, "resolution = 0.*nearest: 16"),
    ({"data__resolution": "[960, 540]"}, "540 should be a multiple of 16.*nearest: 544"),
    ({"data__resolution": "[960]"}, "resolution"),
    ({"data__resolution": '"540P"'}, "resolution"),
    ({"data__resolution": "99999"}, "nearest: 4096"),
    ({"data__resolution": ""}, "resolution must be given"),
    ({"data__fps": "25"}, "fps = 25 should be 16 or 24; nearest: 24"),
    ({"data__fps": "0"}, "fps = 0 should be 16 or 24"),
    ({"data__fps": '"24"'}, "data.fps = '24' should be of type int"),
    ({"data__batch": "0"}, "batch = 0.*nearest: 1"),
    ({"data__caption_extension": '"txt"'}, "caption_extension = 'txt' should be like"),
    ({"data__caption_extension": '"../x"'}, "caption_extension"),
    ({"data__validation_split": "0.9"}, "validation_split = 0.9"),
    ({"data__validation_split": "-0.1"}, "validation_split = -0.1"),
    ({"data__enable_bucket": "1"}, "enable_bucket = 1 should be of type bool"),
    ({"data__video_directory": '"x"'}, "video_directory is unknown"),
    ({"data__bucket_no_upscal": "true"}, "did you mean bucket_no_upscale"),
    ({"data__text_dtype": '"int8"'}, "should be one of float32, bfloat16"),
    ({"data__cache_directory": '"x"'}, "encoded is given twice"),
    ({"run__accumulate": "4"}, "accumulate = 4 should divide data.batch = 2; nearest: 2"),
    ({"datasets__target_frames": ""}, r"datasets\[0\]: target_frames must be given"),
    ({"datasets__target_frames": "[16]"}, "16 should be 4 k \\+ 1.*nearest: 13 or 17"),
    ({"datasets__target_frames": "[5, 5]"}, "names a length twice"),
    ({"datasets__target_frames": "[-3]"}, "-3 should be 4 k"),
    ({"datasets__target_frames": "[100001]"}, "from 1 to 2001"),
    ({"datasets__target_frames": "5"}, "target_frames = 5 should be a list"),
    ({"datasets__target_frame": "[5]"}, r"datasets\[0\]: target_frame is unknown.*target_frames"),
    ({"datasets__frame_extraction": '"tail"'}, "should be one of head, chunk, slide, uniform"),
    ({"datasets__frame_extraction": '"full"'}, "target_frames does not go with"),
    ({"datasets__frame_stride": "0"}, "frame_stride = 0.*nearest: 1"),
    ({"datasets__frame_sample": "-1"}, "frame_sample = -1.*nearest: 1"),
    ({"datasets__source_fps": "-1.0"}, "source_fps -1.0 must be from 1 to 240"),
    ({"datasets__source_fps": "nan"}, "source_fps = nan should be a finite number"),
    ({"datasets__num_repeats": "0"}, "num_repeats = 0.*nearest: 1"),
    ({"datasets__batch_size": "0"}, "batch_size = 0.*nearest: 1"),
    ({"datasets__image_directory": '"x"'}, "not video_directory and image_directory"),
    ({"datasets__video_directory": ""}, "should be given, not none"),
    ({"datasets__video_directory": '""'}, "should be a path"),
    ({"datasets__video_directory": "3"}, "video_directory = 3 should be of type str"),
    ({"datasets__control_directory": '"x"'}, "control_directory is unknown"),
    (
        {"datasets__video_directory": "", "datasets__image_directory": '"x"'},
        r"target_frames = \(5,\) is of videos, not of images",
    ),
    ({**I2V, "datasets__target_frames": "[1, 5]"}, "i2v has nothing to learn"),
    ({**I2V, "data__image": ""}, "data.image must name"),
    ({"datasets__video_directory": '"nowhere"'}, "nowhere is not there; name a folder"),
    ({"datasets__video_directory": f"'{__file__}'"}, "is a file; name a folder"),
    (
        {"datasets__video_directory": "", "datasets__video_jsonl_file": '"nowhere.jsonl"'},
        "nowhere.jsonl: there is no such file",
    ),
    ({"data__text": '"no such"'}, "data.text: no such is neither"),
]


@pytest.fixture(autouse=True)
def nothing_is_loaded(monkeypatch: pytest.MonkeyPatch):
    def refuse(*args: object, **kwargs: object):
        raise AssertionError("a model is made")

    monkeypatch.setattr(WanVae, "__init__", refuse)
    monkeypatch.setattr(Umt5Encoder, "__init__", refuse)


def planned(recipe: Path) -> DataPlan:
    data = read_recipe(recipe).tables.data
    folder = layout_of("data.text", data.text).component("tokenizer")
    return plan_clips(data, Tokenizer.from_folder(folder))


@pytest.mark.parametrize(("changes", "says"), RECIPES, ids=lambda value: str(value)[:50])
def test_a_bad_recipe_is_refused_in_a_line(tmp_path: Path, changes: dict[str, str], says: str):
    recipe = write_recipe(tmp_path, **changes)
    with pytest.raises(RequestError, match=says) as refusal:
        planned(recipe)
    assert "\n" not in str(refusal.value)
    assert len(str(refusal.value)) < 400


def broken(films: Path) -> None:
    (films / "a.mp4").write_bytes((films / "good.mp4").read_bytes()[:300])
    (films / "a.txt").write_text("A film.")


def no_film(films: Path) -> None:
    (films / "a.mp4").write_text("<!doctype html><html>Not found</html>")
    (films / "a.txt").write_text("A film.")


def a_folder(films: Path) -> None:
    (films / "a.mp4").mkdir()
    (films / "a.txt").write_text("A film.")


def a_pipe(films: Path) -> None:
    os.mkfifo(films / "a.mp4")
    (films / "a.txt").write_text("A film.")


def uncaptioned(films: Path) -> None:
    noise_film(films / "a.mp4")
    (films / "a.txt").unlink()


def empty_caption(films: Path) -> None:
    noise_film(films / "a.mp4")
    (films / "a.txt").write_text(" \n")


def no_text(films: Path) -> None:
    noise_film(films / "a.mp4")
    (films / "a.txt").write_bytes(b"\xff\xfe\x00A")


def long_caption(films: Path) -> None:
    noise_film(films / "a.mp4")
    (films / "a.txt").write_text("star " * 600)


def missing_film(films: Path) -> None:
    (films / "metadata.csv").write_text("video,prompt\na.mp4,A film\n")


def no_columns(films: Path) -> None:
    (films / "metadata.csv").write_text("name,words\na.mp4,A film\n")


def bad_line(films: Path) -> None:
    (films / "metadata.jsonl").write_text('{"file": "a.mp4", "caption"\n')


def a_list(films: Path) -> None:
    (films / "metadata.jsonl").write_text("[1, 2]\n")


def sound_alone(films: Path) -> None:
    (films / "a.mp4").write_bytes(b"\0" * 5000)
    (films / "a.txt").write_text("Nothing.")


def all_short(films: Path) -> None:
    (films / "good.mp4").unlink()
    write_film(films / "good.mp4", colours(3))


def nothing(films: Path) -> None:
    for file in films.iterdir():
        file.unlink()


def images_alone(films: Path) -> None:
    nothing(films)
    write_picture(films / "a.png")


DATA_SETS: list[tuple[Callable[[Path], None], str]] = [
    (broken, "a.mp4: cannot be read .*is it whole"),
    (no_film, "a.mp4: is a web page"),
    (a_folder, "a.mp4.* is a folder, not a regular file"),
    (a_pipe, "a.mp4.* is a pipe, not a regular file"),
    (uncaptioned, "a.mp4: has no caption: a.txt is not there"),
    (empty_caption, "a.mp4: its caption is empty"),
    (no_text, "a.mp4: caption .* is no text in UTF-8"),
    (long_caption, r"a.mp4: its caption has \d+ tokens; at most 512 are used"),
    (missing_film, "a.mp4: is named with a caption and not there"),
    (no_columns, "line 2 has no video_path"),
    (bad_line, "metadata.jsonl: line 1 is no JSON"),
    (a_list, "line 1 is no JSON object"),
    (sound_alone, "a.mp4"),
    (all_short, "films: no clip is left"),
    (nothing, "films: gives no video that can be used"),
    (images_alone, "films: gives no video that can be used"),
]


@pytest.mark.parametrize(
    ("spoil", "says"), DATA_SETS, ids=lambda value: getattr(value, "__name__", str(value)[:40])
)
def test_a_bad_data_set_is_reported(
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    spoil: Callable[[Path], None],
    says: str,
):
    films = tmp_path / "films"
    films.mkdir()
    noise_film(films / "good.mp4")
    recipe = write_recipe(tmp_path)
    assert main(["data", "check", str(recipe)]) == 0
    spoil(films)
    capsys.readouterr()
    assert main(["data", "check", str(recipe), "--json"]) == 1
    found = json.loads(capsys.readouterr().out)
    said = "\n".join(f"{row['path']}: {row['reason']}" for row in found["problems"])
    assert re.search(says, said), said
    # And training on it is refused in a line.
    with pytest.raises(RequestError, match="`skyreels-jax data check` lists all") as refusal:
        require_sound(planned(recipe), skip_broken=False)
    assert "\n" not in str(refusal.value)


@pytest.mark.parametrize("shard", ["4/3", "1", "-1/2", "one/two", "1/0"])
def test_a_bad_shard_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str], shard: str):
    assert main(["data", "encode", str(write_recipe(tmp_path)), f"--shard={shard}"]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "--shard" in line


def test_data_of_another_kind_has_no_check(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    recipe = write_recipe(tmp_path)
    text = recipe.read_text().partition("[data]")[0]
    recipe.write_text(f"{text}[data]\nvae = 'mini'\ntext = 'mini'\nencoded = 'x'\n")
    assert main(["data", "check", str(recipe)]) == 2
    assert 'has no [data] with source = "folder"' in capsys.readouterr().err
