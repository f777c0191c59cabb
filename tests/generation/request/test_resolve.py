"""Requests: what is filled in, and everything that is refused before a weight is read."""

import json
import re
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from safetensors.numpy import save_file
from tests import standins

from skyreels_jax.checkpoints import Checkpoint, Default
from skyreels_jax.errors import RequestError
from skyreels_jax.generation.request.resolve import resolve, usual_overlap
from skyreels_jax.generation.request.resolved import ResolvedRequest
from skyreels_jax.generation.request.settings import Request
from skyreels_jax.presets import PRESETS
from skyreels_jax.prompts import NEGATIVE_PROMPT_EN, NEGATIVE_PROMPT_ZH
from skyreels_jax.weights.lora.binding import Lora

PLENTY = 2**40


def picture(height: int = 30, width: int = 40) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (height, width, 3)).astype(np.uint8)


def resolved(task: str = "t2v", memory: int = PLENTY, **wishes) -> ResolvedRequest:
    wishes = {"prompt": "a fox"} | wishes
    return resolve(Request(**wishes), standins.checkpoint(task), memory=memory)


def refusal(task: str = "t2v", **wishes) -> str:
    with pytest.raises(RequestError) as caught:
        resolved(task, **wishes)
    return str(caught.value)


def test_what_nobody_said_comes_from_the_checkpoint_and_says_so():
    request = resolved()
    assert (request.height, request.width, request.num_frames) == (32, 48, 9)
    assert (request.steps, request.guidance_scale, request.shift, request.fps) == (3, 6.0, 8.0, 24)
    for name in ("height", "width", "num_frames", "steps", "guidance_scale", "shift", "fps"):
        assert request.sources[name] == "preset tiny"
    assert request.sources["seed"] == "drawn at random"
    assert request.latent_shape == (3, 4, 6)
    assert request.model == "model"


def test_what_was_said_is_kept():
    wishes = {"height": 64, "width": 16, "num_frames": 5, "steps": 7, "guidance_scale": 1.5}
    wishes |= {"shift": 2.0, "fps": 16, "seed": 0, "negative_prompt": ""}
    request = resolved(**wishes)
    assert {name: getattr(request, name) for name in wishes} == wishes
    assert all(request.sources[name] == "given" for name in wishes)


def test_seeds_are_drawn_anew():
    assert resolved().seed != resolved().seed
    assert resolved(seed=-1).seed != resolved(seed=-1).seed
    assert resolved(seed=-1).sources["seed"] == "drawn at random"


def test_seeds_of_64_bits_go_with_the_noise_of_pytorch():
    assert resolved(seed=804822466654819, noise="torch").seed == 804822466654819
    assert resolved(seed=2**64 - 1, noise="torch").seed == 2**64 - 1
    assert "more takes `noise` torch" in refusal(seed=804822466654819)
    assert "must be between" in refusal(seed=2**64, noise="torch")


@pytest.mark.parametrize(
    ("task", "expected"), [("t2v", NEGATIVE_PROMPT_EN), ("df", NEGATIVE_PROMPT_ZH)]
)
def test_the_negative_prompt_is_the_originals(task: str, expected: str):
    assert resolved(task).negative_prompt == expected


def test_frames_run_behind_each_other_as_the_checkpoint_wants():
    made = standins.checkpoint("df", ar_step=Default(5, "preset tiny"))
    found = resolve(Request(prompt="a fox"), made, memory=PLENTY)
    assert found.forcing is not None and found.forcing.ar_step == 5
    assert found.sources["ar_step"] == "preset tiny"
    found = resolve(Request(prompt="a fox", ar_step=0), made, memory=PLENTY)
    assert found.forcing is not None and found.forcing.ar_step == 0
    other = resolved("df")
    assert other.forcing is not None and other.forcing.ar_step == 0


def test_words_for_sizes_and_lengths():
    request = resolved(resolution="540P", aspect="9:16", seconds=1.0, fps=16)
    assert (request.height, request.width, request.num_frames) == (960, 544, 17)
    assert request.sources["num_frames"] == "1 seconds at 16 frames a second"
    assert (resolved(aspect="1:1").height, resolved(aspect="1:1").width) == (32, 32)


def test_a_portrait_image_turns_a_default_or_named_size_and_is_told():
    request = resolved("i2v", image=picture(40, 30))
    assert (request.height, request.width) == (48, 32)
    assert "upright" in request.warnings[0]
    named = resolved("i2v", image=picture(40, 30), resolution="540P")
    assert (named.height, named.width) == (960, 544)


def test_a_portrait_image_turns_nothing_that_was_asked_for():
    for wishes in ({"height": 32, "width": 48}, {"aspect": "3:2"}):
        request = resolved("i2v", image=picture(40, 30), **wishes)
        assert request.height < request.width
        (said,) = request.warnings
        assert "shows 50% of its height" in said


def test_a_square_photograph_is_cropped_and_that_is_said():
    (said,) = resolved("i2v", image=picture(32, 32)).warnings
    assert said == (
        "the image is 32 x 32: a video of 48 x 32 shows 67% of its height; `aspect` image keeps all"
    )
    (said,) = resolved("i2v", image=picture(20, 100)).warnings
    assert "30% of its width" in said
    assert resolved("i2v", image=picture(32, 44)).warnings == ()
    whole = resolved("i2v", image=picture(30, 30), aspect="image")
    assert (whole.height, whole.width, whole.warnings) == (32, 32, ())


@pytest.mark.parametrize("fps", [29.97, "29.97", "30000/1001", Fraction(30000, 1001)])
def test_rates_of_television_are_taken_and_kept(fps):
    request = resolved(fps=fps)
    assert request.fps == Fraction(30000, 1001)
    assert json.loads(json.dumps(request.settings()))["fps"] == "30000/1001"


def test_images_are_read_whatever_they_were_given_as(tmp_path: Path):
    Image.fromarray(picture()).save(tmp_path / "in.png")
    for given in (tmp_path / "in.png", Image.fromarray(picture()), picture()):
        np.testing.assert_array_equal(resolved("i2v", image=given).image, picture())


def test_settings_are_json_and_rebuild_the_request():
    request = resolved("i2v", image=picture(), seed=5)
    settings = json.loads(json.dumps(request.settings()))
    assert settings["image"] == "40 x 30"
    names = ("prompt", "negative_prompt", "height", "width", "num_frames", "steps", "shift")
    names += ("guidance_scale", "fps", "seed", "dtype", "attention", "batched_guidance")
    again = resolved("i2v", image=picture(), **{name: settings[name] for name in names})
    assert again.settings() == request.settings()


BAD = {
    "empty prompt": ({"prompt": ""}, "`prompt` is empty"),
    "blank prompt": ({"prompt": " \n\t"}, "`prompt` is empty"),
    "prompt of an entity": ({"prompt": "&nbsp; &amp;#8203;"}, "`prompt` is empty"),
    "prompt without width": ({"prompt": "\u200b\ufeff"}, "`prompt` is empty"),
    "second prompt blank": ({"prompt": ["a fox", "&nbsp;"]}, "`prompt` is empty"),
    "no prompts": ({"prompt": []}, "`prompt` is empty"),
    "odd height": ({"height": 541, "width": 960}, "`height` 541 .* 528 or 544"),
    "zero height": ({"height": 0, "width": 960}, "`height` 0 .* 16"),
    "negative width": ({"height": 544, "width": -16}, "`width` -16 .* 16"),
    "height alone": ({"height": 544}, "`height` was given without `width`"),
    "width alone": ({"width": 544}, "`width` was given without `height`"),
    "two sizes": ({"height": 544, "width": 960, "resolution": "540P"}, "exclude `resolution`"),
    "size and aspect": ({"height": 544, "width": 960, "aspect": "1:1"}, "exclude `resolution`"),
    "unknown resolution": ({"resolution": "1080P"}, "'1080P' is unknown; there are 540P, 720P"),
    "bad aspect": ({"aspect": "wide"}, "16:9 or 9:16"),
    "frames not 4k+1": (
        {"num_frames": 98},
        r"`num_frames` 98 must be 4 k \+ 1; nearest: 97 or 101",
    ),
    "no frames": ({"num_frames": 0}, "`num_frames` 0 .* nearest: 1$"),
    "negative frames": ({"num_frames": -3}, "`num_frames` -3 .* nearest: 1$"),
    "frames and seconds": ({"num_frames": 9, "seconds": 1.0}, "exclude each other"),
    "no seconds": ({"seconds": 0.0}, "`seconds` 0.0 must be a number above 0"),
    "endless seconds": ({"seconds": float("inf")}, "`seconds` inf must be a number"),
    "no steps": ({"steps": 0}, "`steps` 0 must be between 1 and 1000"),
    "too many steps": ({"steps": 1001}, "`steps` 1001 must be between 1 and 1000"),
    "guidance nan": ({"guidance_scale": float("nan")}, "`guidance_scale` nan must be a number"),
    "negative guidance": ({"guidance_scale": -1.0}, "`guidance_scale` -1.0 .* from 0 to 100"),
    "no shift": ({"shift": 0.0}, "`shift` 0.0 must be a number above 0"),
    "infinite shift": ({"shift": float("inf")}, "`shift` inf must be a number above 0"),
    "extreme shift": ({"shift": 1e6}, "`shift` 1000000.0 must be .* at most 1000"),
    "extreme guidance": ({"guidance_scale": 1e30}, r"`guidance_scale` 1e\+30 .* 1 turns it off"),
    "extreme frames": ({"num_frames": 10**9 + 1}, "`num_frames` 1000000001 must be at most"),
    "extreme seconds": ({"seconds": 1e9}, "`seconds` 1000000000.0 .* at most 86400"),
    "a day at 240": ({"seconds": 80000.0, "fps": 240}, "`seconds` 80000: `num_frames` .* at most"),
    "extreme height": ({"height": 160000, "width": 16}, "`height` 160000 must be at most 8192"),
    "no fps": ({"fps": 0}, "`fps` 0 must be a number from 1 to 240"),
    "negative seed": ({"seed": -2}, "`seed` -2 must be between -1 and 18446744073709551615"),
    "long seed": ({"seed": 2**32}, "`seed` 4294967296 must be between"),
    "unknown dtype": ({"dtype": "float16"}, "`dtype` 'float16' .* bfloat16, float32"),
    "unknown attention": ({"attention": "flash"}, "`attention` 'flash' .* xla"),
    "output suffix": ({"output": "out.gif"}, r"out\.gif: the name must end in \.mp4"),
    "output nowhere": ({"output": "no/such/out.mp4"}, "folder no/such does not exist"),
    "image for text": ({"image": picture()}, "`image`: T2V checkpoints take none"),
    "last image for text": ({"last_image": picture()}, "`last_image`: T2V .* FLF2V"),
}


@pytest.mark.parametrize("kind", BAD)
def test_what_is_illegal_is_refused_with_the_rule(kind: str):
    wishes, message = BAD[kind]
    assert re.search(message, refusal(**wishes))
    assert len(refusal(**wishes).splitlines()) == 1


def test_everything_that_is_wrong_is_said_at_once():
    message = refusal(prompt="", height=541, width=961, num_frames=98, steps=0, fps=0)
    assert len(message.splitlines()) == 6


def test_image_checkpoints_need_their_images():
    assert "I2V checkpoints need one" in refusal("i2v")
    assert "I2V checkpoints take none" in refusal("i2v", image=picture(), last_image=picture())
    assert len(refusal("flf2v").splitlines()) == 2
    assert resolved("flf2v", image=picture(), last_image=picture()).last_image is not None


@pytest.mark.parametrize("content", [None, b"", b"no image"])
def test_an_image_that_cannot_be_read_is_named(tmp_path: Path, content: bytes | None):
    path = tmp_path / "in.png"
    if content is not None:
        path.write_bytes(content)
    message = refusal("i2v", image=path, steps=0)
    assert "in.png" in message
    assert "`steps`" in message


def test_an_image_as_the_wrong_kind_of_array_is_refused():
    assert "must be uint8" in refusal("i2v", image=picture().astype(np.float32))
    assert "must be uint8" in refusal("i2v", image=picture()[:, :, 0])


def test_too_little_memory_is_said_before_anything_is_loaded():
    message = refusal(memory=1000)
    assert "not enough memory: 9 frames of 32 x 48 in bfloat16 take at least" in message
    assert "float32" not in message
    assert "`dtype` bfloat16" in refusal(memory=1000, dtype="float32")


def test_a_default_that_is_illegal_is_found_too():
    checkpoint = standins.checkpoint(num_frames=Default(10, "preset broken"))
    with pytest.raises(RequestError, match="`num_frames` 10"):
        resolve(Request(prompt="a fox"), checkpoint, memory=PLENTY)


def test_a_plain_setting_is_told_where_it_was_given():
    assert resolved(dtype="float32").sources["dtype"] == "given"
    assert not {"dtype", "attention", "batched_guidance"} & resolved().sources.keys()


def said_by(model: str, prompt, **wishes) -> tuple[ResolvedRequest, str]:
    """A request to a model of the package, and all its warnings."""
    wishes = {"prompt": prompt, "image": picture(64, 64)} | wishes
    request = resolve(Request(**wishes), Checkpoint.open(model), memory=PLENTY)
    return request, "\n".join(request.warnings)


@pytest.mark.parametrize("model", ["mini", "mini-i2v"])
def test_the_small_models_are_given_lower_case_and_unknown_words_are_named(model: str):
    request, warned = said_by(model, "A CAT on a pink Hexagon", negative_prompt="Ugly")
    assert (request.prompt, request.negative_prompt) == ("a cat on a pink hexagon", "ugly")
    assert "never learned 'cat', 'pink', 'hexagon', 'ugly'" in warned
    assert "star" in warned and "purple" in warned and "gradient" in warned
    # What it knows, however it is written, goes without a word.
    request, warned = said_by(model, "A Red STAR moves slowly to the right.")
    assert request.prompt == "a red star moves slowly to the right."
    assert "never learned" not in warned


def test_words_that_a_lora_was_trained_on_are_known(tmp_path: Path):
    request = Request(prompt="a zorp stands still on a pink background")
    for about, known in (("A Zorp", True), ("a cat", False)):
        file = tmp_path / "lora.safetensors"
        tensors = {"a.lora_A.weight": np.zeros((1, 1), np.float32)}
        save_file(tensors, file, {"modelspec.trigger_phrase": about})
        made = resolve(request, Checkpoint.open("mini"), memory=PLENTY, loras=[Lora(file)])
        (warning,) = [warning for warning in made.warnings if "never learned" in warning]
        assert ("'zorp'" in warning) is not known
        assert "'pink'" in warning


def test_every_prompt_of_a_long_video_is_looked_at():
    prompts = {0: "A red star", 25: "a Zebra"}
    wishes = {"num_frames": 49, "base_num_frames": 17, "overlap_history": 9}
    request, warned = said_by("mini", prompts, **wishes)
    assert set(request.prompts) == {"a red star", "a zebra"}
    assert "'zebra'" in warned and "'red'" not in warned


def test_other_checkpoints_are_given_what_was_written():
    request = resolved(prompt="A Cat on a pink hexagon")
    assert request.prompt == "A Cat on a pink hexagon"
    assert not any("never learned" in warning for warning in request.warnings)


LONG = PRESETS["mini"].long_video
WITHOUT_NOISE = "follow each other without noise"


def asked_of_mini(**wishes) -> tuple[ResolvedRequest, str]:
    return said_by("mini", "a red star stands still", **({"image": None} | wishes))


def test_long_videos_of_mini_have_defaults_of_their_own():
    assert LONG is not None
    request, warned = asked_of_mini(seconds=4.0)
    assert request.forcing is not None
    assert len(request.windows) > 1
    assert request.forcing.overlap_history == LONG.overlap_history
    assert request.forcing.addnoise_condition == LONG.addnoise_condition
    assert request.guidance_scale == LONG.guidance_scale
    assert request.forcing.ar_step == LONG.ar_step
    names = ("overlap_history", "addnoise_condition", "guidance_scale", "ar_step")
    assert {request.sources[name] for name in names} == {"preset mini, long videos"}
    # Nobody asked for so much noise, so nobody is warned of it.
    assert WITHOUT_NOISE not in warned and "is much" not in warned


def test_what_is_given_for_a_long_video_of_mini_holds():
    wishes = {"overlap_history": 5, "addnoise_condition": 70, "guidance_scale": 3.0, "ar_step": 2}
    request, warned = asked_of_mini(seconds=4.0, **wishes)
    assert {name: request.value_of(name) for name in wishes} == wishes
    assert "`addnoise_condition` 70 is much" in warned
    # Windows as short as the usual overlap still make a new frame.
    request, _ = asked_of_mini(seconds=4.0, base_num_frames=9)
    assert request.value_of("overlap_history") == 5


@pytest.mark.parametrize(
    "wishes",
    [
        {},
        {"num_frames": 33, "base_num_frames": 33},
        {"num_frames": 33, "reference_exact": True},
    ],
    ids=["short", "at once", "reference_exact"],
)
def test_other_videos_of_mini_are_as_they_were(wishes):
    request, warned = asked_of_mini(**wishes)
    assert request.guidance_scale == PRESETS["mini"].guidance_scale
    assert request.value_of("addnoise_condition") == 0
    assert request.value_of("ar_step") == PRESETS["mini"].ar_step == 5
    assert WITHOUT_NOISE not in warned


def test_released_checkpoints_keep_the_originals_defaults_for_long_videos():
    request = resolved("df", num_frames=29, base_num_frames=17)
    assert request.value_of("addnoise_condition") == 0
    assert request.guidance_scale == 6.0
    assert request.value_of("overlap_history") == usual_overlap(17) == 5


@pytest.mark.parametrize(
    ("wishes", "noticed"),
    [
        ({"num_frames": 29}, True),
        ({"num_frames": 29, "addnoise_condition": 20}, False),
        ({"num_frames": 17}, False),
        ({"num_frames": 29, "reference_exact": True}, False),
    ],
)
def test_windows_without_noise_are_noticed(wishes, noticed: bool):
    request = resolved("df", base_num_frames=17, **wishes)
    assert any(WITHOUT_NOISE in warning for warning in request.warnings) == noticed


def test_a_last_image_alone_is_nothing_that_mini_has_learned():
    asked = "instead of ending with it"
    last = picture(64, 64)
    assert asked in asked_of_mini(last_image=last)[1]
    assert asked not in asked_of_mini(last_image=last, image=last)[1]
    assert asked not in asked_of_mini(image=last)[1]
    assert asked not in "\n".join(resolved("df", last_image=last).warnings)
    with pytest.raises(RequestError, match="`last_image`: I2V checkpoints take none"):
        said_by("mini-i2v", "a red star moves up", last_image=last)
