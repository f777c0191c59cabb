"""The encoders as tasks: what they are asked, that they learn it, and what is left in use."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from skyreels_jax.components.encoders import ClipImageEncoder, Umt5TextEncoder
from skyreels_jax.components.protocols import ImageCondition
from skyreels_jax.mini.tasks import (
    EncoderData,
    EncoderShape,
    EncoderTask,
    EncoderTraining,
    ImageTask,
    TextTask,
    answers,
)
from skyreels_jax.moving_shapes.captions import plain_caption
from skyreels_jax.moving_shapes.render import render
from skyreels_jax.moving_shapes.scene import (
    BACKGROUNDS,
    COLOURS,
    DIRECTIONS,
    MOTIONS,
    SHAPE_KINDS,
    SPEEDS,
    Scene,
    Thing,
    draw_scene,
)
from skyreels_jax.prompts import Tokenizer
from skyreels_jax.training.optimizer import OptimizerConfig, make_optimizer
from skyreels_jax.training.step import init_state, make_step
from skyreels_jax.weights.components.clip import stored_image_encoder
from skyreels_jax.weights.components.umt5 import stored_text_encoder
from skyreels_jax.weights.layout import components_of

MOVES = Thing("star", "blue", "move", "up left", "fast", 0.3, 0.5, 0.2)
STILL = Thing("square", "red", "still", None, None, 0.7, 0.5, 0.2)
KEY = jax.random.key(0)
STEPS = 80


@pytest.fixture(scope="module")
def text() -> TextTask:
    shape = EncoderShape(dim=32, ffn_dim=32, num_heads=2, num_layers=1)
    return TextTask(EncoderTraining(shape, EncoderData(batch=32)), 0)


@pytest.fixture(scope="module")
def image() -> ImageTask:
    shape = EncoderShape(dim=32, ffn_dim=32, num_heads=2, num_layers=2, image_size=32, patch_size=4)
    return ImageTask(EncoderTraining(shape, EncoderData(batch=16, size=32)), 0)


def falls(task: EncoderTask) -> tuple[float, float]:
    """What is left of the loss after some steps, as a share: of its batches, and of such in which
    each input has the answers to another."""
    config = OptimizerConfig(name="muon", learning_rate=5e-3, warmup=0, weight_decay=0.0)
    optimizer = make_optimizer(config, 2 * STEPS, task.init())
    step = make_step(task.loss, optimizer)
    batches = [task.batch(number) for number in range(STEPS)]
    unrelated = [(inputs, np.roll(classes, 1, axis=0)) for inputs, classes in batches]

    def fall(batches: Sequence[tuple[Any, np.ndarray]]) -> float:
        # A step takes its state over.
        params = {name: jnp.array(value) for name, value in task.init().items()}
        state, losses = init_state(params, optimizer, 0.0), []
        for batch in batches:
            state, report = step(state, batch, KEY)
            losses.append(float(report.metrics["loss"]))
        return float(np.mean(losses[-5:])) / losses[0]

    return fall(batches), fall(unrelated)


@pytest.mark.slow
def test_the_text_encoder_learns_what_captions_say(text: TextTask):
    told, guessed = falls(text)
    # Measured: 0.36 of the first loss, and 0.73 where answers are to other captions.
    assert told < 0.45
    assert guessed > 0.6


@pytest.mark.slow
def test_the_image_encoder_learns_what_frames_show(image: ImageTask):
    told, guessed = falls(image)
    # Measured: 0.38 of the first loss, and 0.62 where answers are to other frames.
    assert told < 0.45
    assert guessed > 0.55


def test_answers_name_what_is_there():
    asked = ("kind", "colour", "motion", "direction", "speed")
    found = answers([MOVES, STILL], "white", asked)
    legal = (SHAPE_KINDS, COLOURS, MOTIONS, DIRECTIONS, SPEEDS)
    names = [
        values[i] if i < len(values) else None
        for values, i in zip(legal * 2, found[:-1], strict=True)
    ]
    assert names == [
        "star",
        "blue",
        "move",
        "up left",
        "fast",
        "square",
        "red",
        "still",
        None,
        None,
    ]
    assert BACKGROUNDS[found[-1]] == "white"
    # Where there is no second thing, every answer about it is a class of its own.
    assert answers([MOVES], "white", asked)[5:10] == [len(values) for values in legal]
    assert answers([STILL, MOVES], "white", asked) != found


def test_things_are_asked_for_in_the_order_of_mention_and_from_left_to_right(
    text: TextTask, image: ImageTask
):
    rng = np.random.default_rng(0)
    firsts = set()
    for _ in range(20):
        said, classes = text._example(Scene((MOVES, STILL), "white"), rng)
        first = "blue" if said.index("blue") < said.index("red") else "red"
        assert COLOURS[classes[1]] == first
        firsts.add(first)
    assert firsts == {"red", "blue"}
    for things in ((MOVES, STILL), (STILL, MOVES)):
        assert COLOURS[image._example(Scene(things, "white"), rng)[1][1]] == "blue"


def test_batches_follow_from_seed_and_step(text: TextTask):
    (ids, mask), classes = text.batch(3)
    (again, _), same = text.batch(3)
    np.testing.assert_array_equal(ids, again)
    np.testing.assert_array_equal(classes, same)
    assert not np.array_equal(ids, text.batch(4)[0][0])
    assert not np.array_equal(ids, TextTask(text.training, 1).batch(3)[0][0])
    assert ids.shape == mask.shape == (32, 48)
    assert classes.shape == (32, 11)


def test_padding_changes_nothing(text: TextTask):
    (ids, mask), classes = text.batch(0)
    params = text.init()
    further = [np.pad(part, ((0, 0), (0, 16))) for part in (ids, mask)]
    attended = [ids, np.ones_like(mask)]
    losses = [
        float(text.loss(params, (tuple(map(jnp.asarray, parts)), jnp.asarray(classes)), KEY)[0])
        for parts in ([ids, mask], further, attended)
    ]
    # Measured: 0 of 1.73; 0.18 where padding is attended and counted.
    assert abs(losses[1] - losses[0]) < 1e-5
    assert abs(losses[2] - losses[0]) > 0.05


def test_a_caption_longer_than_the_rows_is_refused(text: TextTask):
    with pytest.raises(ValueError, match="text_length = 8 should be at least 45; nearest: 45"):
        replace(text.training, data=EncoderData(batch=32, text_length=8))


def test_metrics_are_shares_of_right_answers(text: TextTask):
    metrics = text.evaluate(text.init())
    names = ("kind", "colour", "motion", "direction", "speed", "background")
    assert set(metrics) == {*names, *(f"held_{name}" for name in names)}
    assert all(0 <= value <= 1 for value in metrics.values())
    assert metrics == text.evaluate(text.init())
    # Untrained, colours are guessed.
    assert metrics["held_colour"] < 0.9


def relative(a: np.ndarray, b: np.ndarray) -> float:
    return float(np.max(np.abs(a - b)) / np.max(np.abs(b)))


def test_the_text_encoder_in_use_is_the_one_that_was_trained(text: TextTask, tmp_path: Path):
    params = text.init()
    text.export(params, tmp_path)
    layout = components_of(tmp_path)
    tokenizer = Tokenizer.from_folder(layout.component("tokenizer"))
    stored = stored_text_encoder(layout)
    assert stored.config == text.config
    encoder = Umt5TextEncoder(stored.load(jnp.float32), tokenizer)
    captions = [plain_caption(draw_scene(np.random.default_rng(i), 1.0)) for i in range(4)]
    used = encoder.encode(captions)
    ids, mask = text._together(captions)
    trained = np.asarray(text.encoder(params)(jnp.asarray(ids), jnp.asarray(mask)))
    # Measured: 2.1e-3, of weights rounded to bfloat16's 8 bits; 1.4 for another caption's states.
    assert relative(used[:, :48], trained) < 0.006
    assert not used[:, 48:].any()
    assert relative(used[::-1, :48], trained) > 0.2


def test_the_image_encoder_in_use_is_the_one_that_was_trained(image: ImageTask, tmp_path: Path):
    params = image.init()
    image.export(params, tmp_path)
    stored = stored_image_encoder(components_of(tmp_path))
    assert stored.config == image.config
    encoder = ClipImageEncoder(stored.load(jnp.float32))
    scenes = [Scene((MOVES, STILL), "white"), Scene((STILL,), "gradient")]
    frames = np.stack([render(s, frames=1, fps=16.0, size=(32, 32))[0] for s in scenes])
    pixels = np.moveaxis(frames, -1, 1) / np.float32(127.5) - np.float32(1)
    used = np.stack(
        [encoder.encode(ImageCondition(*pair)) for pair in zip(frames, pixels, strict=True)]
    )
    trained = np.asarray(image.encoder(params)(jnp.asarray(image._together(list(frames)))))
    # Measured: 3.6e-4, of weights rounded to float16's 11 bits; 1.6 for another frame's states.
    assert relative(used, trained) < 1e-3
    assert relative(used[::-1], trained) > 0.1
