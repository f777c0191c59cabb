"""Settings that do nothing in a video, or are far from what is usual, are said; others are not."""

import dataclasses
import logging

import numpy as np
import pytest
from tests import standins

from skyreels_jax.backends import check_options
from skyreels_jax.checkpoints import Checkpoint, Default
from skyreels_jax.errors import RequestError
from skyreels_jax.generation.request.declaration import in_flags, one_line
from skyreels_jax.generation.request.resolve import resolve
from skyreels_jax.generation.request.settings import Request
from skyreels_jax.pipeline import Pipeline

PICTURE = np.zeros((32, 48, 3), np.uint8)


def said(made: Checkpoint, **wishes) -> list[str]:
    """All notes; sizes that the wishes leave out are the checkpoint's."""
    return list(resolve(Request.of({"prompt": "a fox"} | wishes), made, memory=2**40).warnings)


def learned(block: int) -> Checkpoint:
    made = standins.checkpoint("df")
    layout = dataclasses.replace(made.layout, config={"num_frame_per_block": block})
    return dataclasses.replace(made, layout=layout)


def knows_rates() -> Checkpoint:
    return dataclasses.replace(
        standins.checkpoint("df"), config=standins.config(inject_sample_info=True)
    )


# The checkpoint makes 9 frames of 32 x 48 in 3 steps, 24 a second: 3 latent frames.
CASES = {
    "guidance": ("t2v", {"guidance_scale": 30}, "`guidance_scale` 30.0 is unusual: 5 and 6"),
    "guidance against": ("t2v", {"guidance_scale": 0}, "`prompt` does nothing, only `negative_"),
    "guidance below 1": ("t2v", {"guidance_scale": 0.5}, "`guidance_scale` 0.5: below 1"),
    "shift": ("t2v", {"shift": 40}, "`shift` 40.0 is unusual: 3 to 8"),
    "negative without guidance": (
        "t2v",
        {"guidance_scale": 1, "negative_prompt": "blur"},
        "`negative_prompt` does nothing: guidance is off at `guidance_scale` 1",
    ),
    "batched without guidance": (
        "df",
        {"guidance_scale": 1.0, "batched_guidance": True},
        "`batched_guidance` does nothing: guidance is off",
    ),
    "the same prompts": ("t2v", {"negative_prompt": "a fox"}, "are the same: guidance does"),
    "large": ("t2v", {"height": 96, "width": 96}, "made for 32 x 48 (`height` x `width`); 96 x 96"),
    "small": ("df", {"height": 16, "width": 16}, "16 x 16 has 16.7% of its area"),
    "named size": ("t2v", {"resolution": "720P"}, "720 x 1280 has"),
    "slender": ("t2v", {"aspect": "5:1"}, "is far from its shape"),
    "long": (
        "t2v",
        {"num_frames": 17},
        "17 frames are made at once; the checkpoint was made for 9",
    ),
    "long window": ("df", {"num_frames": 21, "base_num_frames": 21}, "21 frames are made at once"),
    "rate": ("t2v", {"fps": 30}, "`fps` 30: the checkpoint was made for 24 frames a second; this"),
    "slow rate": ("df", {"fps": 12}, "this video plays 0.5 times as fast"),
    "threshold of nothing": (
        "t2v",
        {"cache": "easycache", "cache_threshold": 0},
        "`cache` easycache does nothing: `cache_threshold` 0",
    ),
    "high threshold": ("t2v", {"cache": "easycache", "cache_threshold": 0.9}, "0.9 is unusual"),
    "cache in few steps": (
        "t2v",
        {"cache": "easycache", "steps": 3},
        "`cache` easycache does nothing in 3 `steps`: it computes 3 in full",
    ),
    "overlap alone": ("df", {"overlap_history": 5}, "`overlap_history` does nothing: the 9 frames"),
    "continuation alone": ("df", {"continuation": "pixels"}, "`continuation` does nothing: the 9"),
    "window longer than all": ("df", {"num_frames": 5, "base_num_frames": 9}, "9 does nothing"),
    "noise on nothing": ("df", {"addnoise_condition": 20}, "`addnoise_condition` does nothing"),
    "far behind": (
        "df",
        {"ar_step": 1000},
        "`ar_step` 1000 is more than the 3 steps: it does the same as 3",
    ),
    "behind nobody": ("df", {"ar_step": 1, "causal_block_size": 3}, "`ar_step` 1 does nothing: a"),
    "long block": ("df", {"causal_block_size": 50, "ar_step": 1}, "50 is longer than the 3 latent"),
    "block alone": ("df", {"causal_block_size": 2}, "does nothing with `ar_step` 0"),
    "attention": ("df", {"causal_attention": 1}, "the checkpoint has not learned it"),
    "attention of all": ("df", {"causal_attention": 7}, "`causal_attention` 7 does nothing"),
    "windows without noise": (
        "df",
        {"num_frames": 17, "overlap_history": 5},
        "`addnoise_condition` 0: windows follow each other without noise",
    ),
    "prompts": (
        "df",
        {"prompt": ["a", "b"], "num_frames": 17, "overlap_history": 1},
        "2 prompts are for the 2 windows of one video, in turn; for a video of each, call once",
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_what_does_nothing_or_is_unusual_is_said_in_one_line(case: str):
    task, wishes, words = CASES[case]
    notes = said(standins.checkpoint(task), **wishes)
    assert [words in note for note in notes].count(True) == 1, notes
    assert all("\n" not in note for note in notes)


# What does something, or is as it was: each a twin of some of the above.
QUIET = {
    "defaults": ("t2v", {}),
    "defaults of forcing": ("df", {}),
    "usual numbers": ("t2v", {"guidance_scale": 4, "shift": 5, "steps": 30, "seed": 1}),
    "no guidance": ("t2v", {"guidance_scale": 1}),
    "negative with guidance": ("t2v", {"negative_prompt": "blur", "batched_guidance": True}),
    "a size near it": ("t2v", {"height": 48, "width": 48}),
    "upright": ("t2v", {"aspect": "2:3"}),
    "its rate": ("t2v", {"fps": 24}),
    "its rate on television": ("t2v", {"fps": 23.976}),
    "cache": ("t2v", {"cache": "easycache", "steps": 20}),
    "windows": (
        "df",
        {
            "num_frames": 17,
            "overlap_history": 5,
            "continuation": "pixels",
            "addnoise_condition": 20,
        },
    ),
    "noise on given frames": ("df", {"image": PICTURE, "addnoise_condition": 20}),
    "noise between windows": (
        "df",
        {"num_frames": 17, "overlap_history": 5, "addnoise_condition": 20},
    ),
    "behind": ("df", {"ar_step": 2}),
    "one after the other": ("df", {"ar_step": 3}),
    "blocks behind": ("df", {"ar_step": 2, "causal_block_size": 2}),
}


@pytest.mark.parametrize("case", QUIET)
def test_nothing_is_said_of_what_does_something(case: str):
    task, wishes = QUIET[case]
    assert said(standins.checkpoint(task), **wishes) == []


def test_block_causal_attention_that_was_learned_is_right():
    assert said(learned(2), causal_attention=2) == []
    assert said(learned(2)) == []
    assert "learned it with blocks of 2" in said(learned(2), causal_attention=1)[0]


def test_models_with_two_frame_rates_know_both():
    assert said(knows_rates(), fps=16) == said(knows_rates(), fps=24) == []
    assert "knows 16 and 24 frames a second" in said(knows_rates(), fps=30)[0]
    assert "1.2 times as fast" in said(knows_rates(), fps=30)[0]
    assert "made for 24" in said(standins.checkpoint("df"), fps=16)[0]


def test_a_checkpoints_own_numbers_are_its_business():
    made = standins.checkpoint("df", ar_step=Default(1000, "preset odd"))
    assert said(made) == []


def test_several_prompts_for_one_window_are_refused_and_what_they_mean_is_said():
    with pytest.raises(RequestError, match=r"2 prompts for 1 windows: .* call once for each"):
        said(standins.checkpoint("df"), prompt=["a", "b"])


def test_notes_are_logged_in_python(caplog: pytest.LogCaptureFixture):
    pipe = Pipeline(standins.checkpoint("df"))
    with caplog.at_level(logging.WARNING):
        pipe.resolve("a fox", overlap_history=5)
        assert [record.message for record in caplog.records] == [
            "`overlap_history` does nothing: the 9 frames are made at once (`base_num_frames` "
            "makes windows)"
        ]
        caplog.clear()
        pipe.resolve("a fox")
        assert not caplog.records


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"device": "gpu"}, "`device` 'gpu' is unknown; there are auto, cpu, cuda; did you mean"),
        ({"device": "tpu"}, "`device` 'tpu' is unknown"),
        ({"device": "cpu"}, "`device` 'cpu' is of the hybrid backend's parts"),
        ({"backend": "hybrid", "device": "cuda:x"}, "`device` 'cuda:x' is unknown"),
        ({"backend": "hybrid", "vae_tiling": "on"}, "leave `vae_tiling` out"),
        ({"dtype": "float16"}, "`dtype` 'float16' is unknown; there are bfloat16, float32"),
    ],
)
def test_options_of_a_pipeline_that_do_nothing_are_refused(options: dict[str, str], says: str):
    usual = {"dtype": "bfloat16", "backend": "jax", "device": "auto", "keep": "auto"}
    usual |= {"vae_tiling": "auto", "vae_dtype": "float32"}
    check_options(**usual)
    check_options(**(usual | {"backend": "hybrid", "device": "cuda:1"}))
    with pytest.raises(RequestError) as caught:
        check_options(**(usual | options))
    assert says in str(caught.value)


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("torch_dtype", "`torch_dtype` does not exist; did you mean `dtype`?"),
        ("vae_tilling", "did you mean `vae_tiling`?"),
        ("zzz", "`zzz` does not exist"),
    ],
)
def test_options_that_do_not_exist_are_named(name: str, says: str):
    with pytest.raises(RequestError) as caught:
        Pipeline.from_pretrained("mini", **{name: 3})
    assert says in str(caught.value)


@pytest.mark.parametrize(
    ("message", "line"),
    [
        ("`a` is wrong\n`b_c` is too", "--a is wrong; --b-c is too"),
        (
            "the weights do not fit:\n  1 lacks:\n    x\n    y",
            "the weights do not fit: 1 lacks: x; y",
        ),
        ("one", "one"),
        ("ends.\n\nand more\n", "ends. and more"),
    ],
)
def test_messages_of_several_lines_are_one_with_separators(message: str, line: str):
    assert in_flags(one_line(message)) == line
