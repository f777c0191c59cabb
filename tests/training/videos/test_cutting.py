"""Which frames become which clips, of which size, in which order; no model is made."""

from collections import Counter
from dataclasses import replace
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from tests.media.films import colours, write_film
from tests.training.videos.small_films import CAPTIONS, make_films, write_picture, write_recipe

from skyreels_jax.components.encoders import prepare_image
from skyreels_jax.media import fit_image, read_video
from skyreels_jax.mini.recipe import read_recipe
from skyreels_jax.prompts import Tokenizer
from skyreels_jax.training.sources import layout_of
from skyreels_jax.training.videos.buckets import bucket_size, extractions
from skyreels_jax.training.videos.clips import BatchOrder
from skyreels_jax.training.videos.encode import cut_frames
from skyreels_jax.training.videos.plan import DataPlan, plan_clips
from skyreels_jax.training.videos.recipe import FolderDataset
from skyreels_jax.training.videos.survey import MediaSurvey, frames_of, survey_media

PLAIN = FolderDataset(
    video_directory="x", target_frames=(5,), resolution=64, enable_bucket=True, batch_size=1, fps=16
)


def planned(recipe: Path) -> DataPlan:
    data = read_recipe(recipe).tables.data
    folder = layout_of("data.text", data.text).component("tokenizer")
    return plan_clips(data, Tokenizer.from_folder(folder))


@pytest.fixture(scope="module")
def films(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("films")
    make_films(folder)
    return folder


@pytest.mark.parametrize(
    ("picture", "changes", "size"),
    [
        ((64, 64), {}, (64, 64)),
        ((480, 640), {"resolution": (960, 544)}, (624, 832)),
        ((1080, 1920), {"resolution": (960, 544)}, (544, 960)),
        ((1920, 1080), {"resolution": (960, 544)}, (960, 544)),
        ((1920, 1080), {"resolution": (960, 544), "enable_bucket": False}, (544, 960)),
        ((40, 50), {"bucket_no_upscale": True}, (32, 48)),
        ((9, 9), {"bucket_no_upscale": True}, (16, 16)),
        ((40, 50), {}, (64, 64)),
        ((40, 60), {}, (48, 80)),
        ((10, 5000), {}, (16, 256)),
    ],
)
def test_sizes_keep_area_and_nearly_the_aspect(picture, changes, size):
    assert bucket_size(*picture, replace(PLAIN, **changes)) == size


@pytest.mark.parametrize(
    ("total", "changes", "cuts"),
    [
        (12, {}, [(0, 5)]),
        (12, {"target_frames": (9, 5)}, [(0, 5), (0, 9)]),
        (4, {}, []),
        (7, {"target_frames": (9, 5)}, [(0, 5)]),
        (14, {"frame_extraction": "chunk"}, [(0, 5), (5, 5)]),
        (15, {"frame_extraction": "chunk"}, [(0, 5), (5, 5), (10, 5)]),
        (12, {"frame_extraction": "slide", "frame_stride": 3}, [(0, 5), (3, 5), (6, 5)]),
        (13, {"frame_extraction": "uniform", "frame_sample": 3}, [(0, 5), (4, 5), (8, 5)]),
        (13, {"frame_extraction": "uniform"}, [(0, 5)]),
        (6, {"frame_extraction": "uniform", "frame_sample": 9}, [(0, 5), (1, 5)]),
        (12, {"frame_extraction": "full", "target_frames": ()}, [(0, 9)]),
        (90, {"frame_extraction": "full", "target_frames": (), "max_frames": 20}, [(0, 17)]),
        (3, {"frame_extraction": "full", "target_frames": ()}, [(0, 1)]),
    ],
)
def test_where_clips_are_cut(total, changes, cuts):
    assert extractions(total, replace(PLAIN, **changes)) == cuts


def survey_of(path: Path, tmp_path: Path) -> MediaSurvey:
    survey = survey_media([path], tmp_path / "surveys")[path]
    assert isinstance(survey, MediaSurvey)
    return survey


@pytest.mark.parametrize("name", ["plain.mp4", "ntsc.mp4", "uneven.mkv", "turned.mp4", "wide.mp4"])
@pytest.mark.parametrize("source_fps", [None, Fraction(10), Fraction(30000, 1001)])
@pytest.mark.parametrize("fps", [16, 24])
def test_as_many_frames_come_as_were_counted(films: Path, tmp_path: Path, name, source_fps, fps):
    path = films / "films" / name
    counted = survey_of(path, tmp_path).frames_at(fps, source_fps)
    assert sum(1 for _ in frames_of(path, fps, source_fps)) == counted


def test_frames_are_taken_by_time(films: Path):
    frames, rate = read_video(films / "films" / "ntsc.mp4")
    found = np.stack(list(frames_of(films / "films" / "ntsc.mp4", 16, None)))
    # The frame that is shown at each sixteenth of a second, or begins within a quarter of one.
    shown = [int((Fraction(n, 16) + Fraction(1, 64)) * rate) for n in range(len(found))]
    np.testing.assert_array_equal(found, frames[shown])
    uneven, _ = read_video(films / "films" / "uneven.mkv")
    found = np.stack(list(frames_of(films / "films" / "uneven.mkv", 16, None)))
    # Frames begin at 0, 0.05, 0.2, 0.25, 0.3, 0.45, 0.5 and 0.55.
    np.testing.assert_array_equal(found[:8], uneven[[0, 1, 1, 2, 3, 4, 4, 5]])
    # The file's own times aside, as if 32 a second had been taken.
    halved = np.stack(list(frames_of(films / "films" / "plain.mp4", 16, Fraction(32))))
    np.testing.assert_array_equal(halved, read_video(films / "films" / "plain.mp4")[0][::2])


def test_a_turned_film_is_upright_and_sound_is_known(films: Path, tmp_path: Path):
    turned = survey_of(films / "films" / "turned.mp4", tmp_path)
    assert (turned.height, turned.width) == (64, 48)
    assert survey_of(films / "films" / "sound.mp4", tmp_path).sound
    assert not survey_of(films / "films" / "plain.mp4", tmp_path).sound


def test_a_survey_is_kept_until_the_file_changes(tmp_path: Path):
    film = write_film(tmp_path / "a.mp4", colours(5))
    first = survey_of(film, tmp_path)
    (kept,) = (tmp_path / "surveys").iterdir()
    kept.write_text(kept.read_text().replace('"frames": 5', '"frames": 77'))
    assert survey_of(film, tmp_path).frames == 77
    kept.write_text("{")
    assert survey_of(film, tmp_path) == first
    write_film(film, colours(6))
    assert survey_of(film, tmp_path).frames == 6


def test_pictures_are_fitted_as_those_of_a_generation():
    picture = colours(1, 50, 90)[0]
    prepared = prepare_image(picture, 32, 32, Image.Resampling.BICUBIC).pixels
    fitted = fit_image(picture, 32, 32, Image.Resampling.BICUBIC)
    pixels = np.moveaxis(2 * (fitted.astype(np.float32) / 255) - 1, -1, 0)
    np.testing.assert_array_equal(prepared, pixels)


def test_clips_hold_the_frames_of_their_times(films: Path):
    recipe = write_recipe(
        films, datasets__frame_extraction='"slide"', datasets__frame_stride="2", data__fps="24"
    )
    clips = [clip for clip in planned(recipe).clips if clip.file.path.name == "plain.mp4"]
    frames = list(frames_of(clips[0].file.path, 24, None))
    found = dict(cut_frames(clips))
    assert [clip.start for clip in clips] == [0, 2, 4, 6, 8]
    for clip in clips:
        size = (clip.bucket.height, clip.bucket.width)
        wanted = [
            fit_image(frame, *size, Image.Resampling.BICUBIC)
            for frame in frames[clip.start : clip.start + 5]
        ]
        np.testing.assert_array_equal(found[clip], np.stack(wanted))
    assert np.any(found[clips[0]] != found[clips[1]])


def test_captions_come_from_text_csv_and_json_lines(tmp_path: Path):
    films = make_films(tmp_path)
    for name in CAPTIONS:
        if name not in ("plain", "ntsc"):
            (films / f"{name}.txt").unlink()
    (films / "metadata.csv").write_text(
        'video,prompt\nuneven.mkv,"One, of a table."\nturned.mp4,Two.\nplain.mp4,Not this.\n'
    )
    (films / "metadata.jsonl").write_text(
        '{"file_name": "sound.mp4", "text": "Three."}\n\n'
        '{"file": "wide.mp4", "caption": ["Four.", "Quatre."]}\n'
    )
    plan = planned(write_recipe(tmp_path))
    found = {clip.file.path.stem: clip.file.captions for clip in plan.clips}
    assert found == {
        "plain": (CAPTIONS["plain"],),
        "ntsc": (CAPTIONS["ntsc"],),
        "uneven": ("One, of a table.",),
        "turned": ("Two.",),
        "sound": ("Three.",),
        "wide": ("Four.", "Quatre."),
    }
    listed = tmp_path / "list.jsonl"
    listed.write_text('{"video_path": "films/plain.mp4", "caption": "Listed."}\n')
    changes = {"datasets__video_directory": "", "datasets__video_jsonl_file": f'"{listed}"'}
    (clip,) = planned(write_recipe(tmp_path, **changes)).clips
    assert clip.file.captions == ("Listed.",)


def test_images_and_several_datasets(tmp_path: Path):
    make_films(tmp_path)
    (tmp_path / "images").mkdir()
    write_picture(tmp_path / "images" / "a.png")
    write_picture(tmp_path / "images" / "b.png", 64, 48)
    recipe = write_recipe(tmp_path)
    recipe.write_text(
        recipe.read_text()
        + f'[[data.datasets]]\nimage_directory = "{tmp_path}/images"\nnum_repeats = 3\n'
        + "batch_size = 4\nresolution = [48, 32]\n"
    )
    plan = planned(recipe)
    assert {str(bucket): bucket.batch for bucket in plan.buckets} == {
        "32 x 48 x 1": 4,
        "48 x 32 x 1": 4,
        "64 x 16 x 5": 2,
        "32 x 32 x 5": 2,
    }
    order = BatchOrder(plan, seed=1)
    # Of each image bucket one clip, three times: a batch of 4. One wide film, five others.
    assert order.steps == 1 + 1 + 1 + 3
    for epoch in range(3):
        steps = [order.step(order.steps * epoch + number) for number in range(order.steps)]
        seen = Counter(row for _, rows in steps for row in rows)
        for index, clip in enumerate(plan.clips):
            assert seen[index] >= clip.repeats
        for bucket, rows in steps:
            assert len(rows) == bucket.batch
            assert {plan.clips[row].bucket for row in rows} == {bucket}
    # The same again whatever was asked for before; another seed is another order.
    again, other = BatchOrder(plan, seed=1), BatchOrder(plan, seed=2)
    assert again.step(13) == order.step(13)
    assert [again.step(n) for n in range(18)] != [other.step(n) for n in range(18)]


def test_held_out_files_stay_held_out_and_digests_see_every_change(tmp_path: Path):
    films = make_films(tmp_path)
    plan = planned(write_recipe(tmp_path, data__validation_split="0.3"))
    held = {clip.file.path for clip in plan.clips if clip.held}
    assert len(held) == 2
    assert not held & {plan.clips[i].file.path for rows in plan.buckets.values() for i in rows}
    # Wherever it lies, it is the same data.
    films.rename(tmp_path / "elsewhere")
    moved = {"datasets__video_directory": f'"{tmp_path}/elsewhere"'}
    recipe = write_recipe(tmp_path, data__validation_split="0.3", **moved)
    same = planned(recipe)
    assert same.digests() == plan.digests()
    assert planned(write_recipe(tmp_path, **moved)).digests() != plan.digests()
    (tmp_path / "elsewhere" / "plain.txt").write_text("Another caption.")
    changed = planned(write_recipe(tmp_path, data__validation_split="0.3", **moved)).digests()
    differing = {name for name, value in changed.items() if value != plan.digests()[name]}
    assert differing == {"data.captions digest"}


def test_broken_files_are_left_out_only_if_asked_for(tmp_path: Path):
    films = make_films(tmp_path)
    (films / "plain.txt").unlink()
    plan = planned(write_recipe(tmp_path))
    assert [note.path.name for note in plan.problems] == ["plain.mp4"]
    assert len(plan.clips) == 5
