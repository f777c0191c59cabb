"""One declaration: what follows from it is current, and every value is converted or refused."""

import io
import os
import re
import subprocess
import sys
from decimal import Decimal
from fractions import Fraction
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest
import torch

from skyreels_jax.backends import BACKENDS
from skyreels_jax.cli import flags
from skyreels_jax.cli.main import build_parser
from skyreels_jax.components.encoders import VAE_TILINGS
from skyreels_jax.diffusion.unipc import NUM_TRAIN_TIMESTEPS
from skyreels_jax.errors import RequestError
from skyreels_jax.generation.request import documentation, settings
from skyreels_jax.generation.request.keywords import VideoSettings
from skyreels_jax.generation.request.settings import Request, declared
from skyreels_jax.ops.attention import ATTENTION_PATHS

ROOT = Path(__file__).parents[3]


def request(**values: Any) -> Request:
    return Request.of({"prompt": "a fox"} | values)


def refusal(**values: Any) -> str:
    with pytest.raises(RequestError) as caught:
        request(**values)
    return str(caught.value)


def test_keywords_and_page_are_current():
    assert documentation.KEYWORDS.read_text() == documentation.keywords_module()
    assert documentation.PAGE.read_text() == documentation.settings_page()


def test_a_setting_that_is_added_is_missed_in_both(monkeypatch):
    """Negative twin: what was written before knows nothing of it."""
    one = declared()["steps"]
    more = {**declared(), "mood": type(one)(name="mood", kind=one.kind, help="x", group=one.group)}
    monkeypatch.setattr(documentation, "declared", lambda: more)
    monkeypatch.setattr(documentation, "keywords", lambda: more)
    assert documentation.KEYWORDS.read_text() != documentation.keywords_module()
    assert documentation.PAGE.read_text() != documentation.settings_page()


def test_every_setting_has_a_flag_and_every_keyword_a_type():
    parser = build_parser("generate")
    known = parser.flags()
    for name, setting in declared().items():
        assert setting.flag in known, name
        assert set(setting.aliases) <= set(known)
    typed = VideoSettings.__annotations__.keys()
    assert typed == {n for n, s in declared().items() if s.keyword and n != "prompt"}


def test_names_that_help_knows_without_the_modules_are_theirs():
    assert tuple(ATTENTION_PATHS) == settings.ATTENTION_NAMES
    assert BACKENDS == flags.BACKEND_NAMES
    assert VAE_TILINGS == flags.VAE_TILING_NAMES
    assert NUM_TRAIN_TIMESTEPS == settings.MAX_STEPS


WHOLE = [4, 4.0, "4", " 4 ", "4.0", Fraction(4), Decimal(4), np.int64(4), np.uint8(4)]
WHOLE += [np.float32(4), np.array(4), jnp.int32(4), jnp.float32(4), torch.tensor(4)]


@pytest.mark.parametrize("value", WHOLE, ids=lambda value: f"{type(value).__name__} {value!r}")
def test_whatever_means_a_whole_number_is_one(value):
    made = request(steps=value, seed=value, num_frames=value, height=value)
    for found in (made.steps, made.seed, made.num_frames, made.height):
        assert type(found) is int
        assert found == 4


@pytest.mark.parametrize("value", [6, 6.0, "6", "12/2", Fraction(6), np.float32(6), jnp.int32(6)])
def test_whatever_means_a_number_is_one(value):
    made = request(guidance_scale=value, shift=value, seconds=value)
    for found in (made.guidance_scale, made.shift, made.seconds):
        assert type(found) is float
        assert found == 6.0


def test_large_seeds_stay_exact():
    for value in (804822466654819, "804822466654819", np.uint64(804822466654819)):
        assert request(seed=value).seed == 804822466654819


def test_truth_values_of_numpy_are_taken_as_switches():
    assert request(reference_exact=np.True_).reference_exact is True


@pytest.mark.parametrize(
    ("name", "value", "says"),
    [
        ("seed", True, "`seed` True must be a number, not True or False"),
        ("steps", np.True_, "`steps`"),
        ("shift", False, "`shift` False must be a number, not"),
        ("steps", "four", "`steps` 'four' must be a whole number"),
        ("steps", 4.5, "`steps` 4.5 must be a whole number"),
        ("steps", float("nan"), "`steps` nan must be a whole number"),
        ("steps", float("inf"), "`steps` inf must be a whole number"),
        ("steps", [4], "`steps` of type list must be a whole number"),
        ("seed", torch.Generator(), "`seed` of type Generator must be a whole number"),
        ("num_frames", np.array([9, 9]), "`num_frames` of type ndarray must be a whole number"),
        ("guidance_scale", "much", "`guidance_scale` 'much' must be a number from 0 to 100"),
        ("fps", "fast", "`fps` 'fast' must be a number from 1 to 240, for example 24, 29.97"),
        ("reference_exact", "yes", "`reference_exact` 'yes' must be True or False"),
        ("batched_guidance", 1, "`batched_guidance` 1 must be True or False"),
        ("attention", 3, "`attention` 3 must be one of xla"),
        ("negative_prompt", b"x", "`negative_prompt` of type bytes must be text"),
        ("prompt", 3, "`prompt` 3 must be text, a list of texts or a mapping"),
        ("prompt", ["a", 3], "`prompt` of type list must be text"),
        ("prompt", {"soon": "a"}, "`prompt` of type dict must be text"),
        ("prompt", None, "`prompt` None must be text"),
        ("video", io.BytesIO(), "`video` of type BytesIO must be the path of a file"),
        ("image", io.BytesIO(), "`image` of type BytesIO must be one path, one PIL image or"),
        ("image", b"png", "`image` of type bytes must be one path"),
        ("image", ["a.png"], "`image` of type list must be one path"),
        ("image", torch.zeros(3, 4, 4), "`image` of type Tensor must be one path"),
        ("image", jnp.zeros((4, 4, 3)), "must be one path"),
    ],
)
def test_what_is_of_the_wrong_kind_is_refused_by_its_name(name: str, value, says: str):
    message = refusal(**{name: value})
    assert says in message
    assert len(message.splitlines()) == 1


def test_all_wrong_kinds_are_said_at_once():
    assert len(refusal(steps="x", seed=True, image=b"").splitlines()) == 3


def test_prompts_by_frame_are_converted():
    assert request(prompt={np.int64(0): "a", "9": "b"}).prompt == {0: "a", 9: "b"}
    assert request(prompt=["a", "b"]).prompt == ("a", "b")


def test_the_old_name_of_a_setting_is_understood():
    assert request(hand_over="pixels").continuation == "pixels"


MEANT = {
    "num_inference_steps": "steps",
    "generator": "seed",
    "callback_on_step_end": "progress",
    "cfg": "guidance_scale",
    "guidance": "guidance_scale",
    "frames": "num_frames",
    "frame_num": "num_frames",
    "flow_shift": "shift",
    "end_image": "last_image",
    "guidence_scale": "guidance_scale",
    "Seed": "seed",
    "hieght": "height",
}


@pytest.mark.parametrize("name", MEANT)
def test_the_name_that_was_meant_is_said(name: str):
    assert refusal(**{name: 3}) == f"`{name}` does not exist; did you mean `{MEANT[name]}`?"


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("output_type", "a Video is what is returned"),
        ("negative_prompt_embeds", "text is encoded here"),
        ("size", "give `height` and `width`"),
        ("scheduler", "always UniPC"),
        ("lora", "LoRA files are the pipeline's"),
        ("video_size", "give `height` and `width`"),
    ],
)
def test_what_has_no_counterpart_is_explained(name: str, says: str):
    assert says in refusal(**{name: 3})


@pytest.mark.parametrize("name", ["zzz", "xyzzy", "loudness", "crf"])
def test_no_nonsense_is_suggested(name: str):
    assert refusal(**{name: 3}) == f"`{name}` does not exist"


WRONG = ("stepz=4", "steps='4'", "noise='white'", "seed=1.5")
TYPED = """
from skyreels_jax import Pipeline
def f(pipe: Pipeline) -> None:
    pipe("a fox", steps=4, image="a.png", noise="torch", fps=29.97)
"""


def test_a_misspelt_or_mistyped_keyword_is_a_type_error(tmp_path: Path):
    """And what is right is none: of the last lines alone, each has one."""
    file = tmp_path / "snippet.py"
    file.write_text(TYPED + "".join(f'    pipe("a fox", {wrong})\n' for wrong in WRONG))
    checker = Path(sys.executable).with_name("basedpyright")
    environment = os.environ | {"PYTHONPATH": str(ROOT / "src")}
    words = [str(checker), "--pythonpath", sys.executable, "--level", "error", str(file)]
    done = subprocess.run(
        words, capture_output=True, text=True, check=False, env=environment, cwd=tmp_path
    )
    lines = re.findall(r"snippet\.py:(\d+):\d+ - error", done.stdout)
    assert done.returncode != 0
    assert set(lines) == {"5", "6", "7", "8"}, done.stdout
