"""Distillation by recipes: what is refused, who learns when, and runs that go on bit for bit."""

import os
import random
import subprocess
import sys
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file
from tests.killing import kill_after, logged_step

from skyreels_jax.errors import RequestError
from skyreels_jax.mini.recipe import Recipe, read_recipe
from skyreels_jax.training.distillation import guidance_scales
from skyreels_jax.training.distillation_recipe import Distillation
from skyreels_jax.training.distillation_task import DistillTask
from skyreels_jax.training.loop import train
from skyreels_jax.training.optimizer import OptimizerConfig

# A longer clip may begin with another scene.
CHANGES = {"frames = 5": "frames = 9\nchanges = 1.0"}
RECIPE = """
train = "distill"
output = "OUTPUT"
[run]
steps = 3
log_every = 1
checkpoint_every = 2
ema = 0.9
[optimizer]
learning_rate = 1e-3
warmup = 0
schedule = "constant"
[model]
model_type = "t2v"
start = "mini"
export_dtype = "float32"
[objective]
text_dropout = 0.0
[distill]
stage = "guidance"
block = 1
[data]
vae = "mini"
text = "mini"
encoded = "ENCODED"
batch = 2
clips = 2
frames = 5
size = 32
"""
STEPS = "timesteps = [1000, 625]\ncritic_steps = 1"


def recipe(tmp_path: Path, name: str = "run", **changes: str) -> Recipe:
    text = RECIPE.replace("OUTPUT", str(tmp_path / name))
    text = text.replace("ENCODED", str(tmp_path / "encoded"))
    for old, new in changes.items():
        assert old in text
        text = text.replace(old, new)
    file = tmp_path / f"{name}.toml"
    file.write_text(text)
    return read_recipe(file)


def of_stage(tmp_path: Path, name: str, stage: str) -> Recipe:
    block = f"block = 1\n{STEPS}" if stage == "dmd" else "block = 1"
    return recipe(tmp_path, name, **{'"guidance"': f'"{stage}"', "block = 1": block})


@pytest.mark.parametrize(
    ("before", "after", "message"),
    [
        ('"guidance"', '"guided"', "'guided' should be one of guidance, teacher-forcing"),
        ('stage = "guidance"', "", "distill: stage must be given"),
        ("block = 1", "block = 0", "block = 0 should be at least 1"),
        ("block = 1", "blocks = 1", "blocks is unknown; did you mean block"),
        ("block = 1", "sigmas = 12", "sigmas = 12 is of stage 'consistency', not of 'guidance'"),
        ("block = 1", "critic_steps = 3", "is of stage 'dmd', not of 'guidance'; leave it out"),
        ("block = 1", "guidance = 0.5", "at least 1, which is the teacher without"),
        ("block = 1", "timesteps = [625, 1000]", "should fall, from at most 1000 to above 0"),
        ('"guidance"', '"dmd"', "timesteps must be given for stage 'dmd'"),
        ('"guidance"', '"teacher-forcing"\nguidance = 3.0', "not of 'teacher-forcing'"),
        ("block = 1", "learn_context_noise = true", "needs a context_noise, such as"),
        ('"guidance"', '"dmd"\nlearn_context_noise = true', "not of 'dmd'; leave it out"),
        ('start = "mini"', "", "model.start must name what the student begins as"),
        ("[distill]", "[lora]\n[distill]", "lora: a distilled student's own parameters"),
        ('"t2v"', '"i2v"\nimage_dim = 160', "students of text to video alone"),
        ("steps = 3", 'steps = 3\nmesh = "auto"', "a student is distilled on one device so far"),
        ("ema = 0.9\n", "", None),
    ],
)
def test_what_is_wrong_is_said(tmp_path: Path, before: str, after: str, message: str | None):
    if message is None:
        # Legal of all stages but the one that needs an average.
        assert recipe(tmp_path, **{before: after}).run.ema == 0
        before, after, message = '"guidance"', '"consistency"', "run.ema must be above 0"
        with pytest.raises(RequestError, match=message):
            recipe(tmp_path, **{"ema = 0.9\n": "", before: after})
        return
    with pytest.raises(RequestError, match=message):
        recipe(tmp_path, **{before: after})


def test_clips_that_change_are_not_of_a_student_of_its_own_videos(tmp_path: Path):
    assert recipe(tmp_path, **CHANGES).tables.data.changes == 1
    steps = {'"guidance"': f'"dmd"\n{STEPS}'}
    with pytest.raises(RequestError, match="changes = 1.0 is not of distill.stage = 'dmd'"):
        recipe(tmp_path, **CHANGES, **steps)


def test_critic_and_student_take_turns_each_with_its_own_moments():
    first = {"head.kernel": jnp.ones((2, 2)), "critic.head.kernel": jnp.ones((2, 2))}
    distill = Distillation(stage="dmd", timesteps=(1000.0,), critic_steps=2, critic_rate=0.5)
    task = SimpleNamespace(distill=distill, first=first)
    config = OptimizerConfig(learning_rate=0.1, warmup=0, schedule="constant", weight_decay=0.0)
    chain = DistillTask.optimizer(task, config, 60)
    state, params, moved = chain.init(first), first, []
    # Gradients of both each time, as no step of the loop has: those out of turn leave no trace.
    for _ in range(6):
        # As the loop's step: optax mixes dtypes and ranks.
        with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
            updates, state = chain.update(jax.tree.map(jnp.ones_like, params), state, params)
        moved.append({n: float(jnp.abs(u).max()) for n, u in updates.items()})
        params = jax.tree.map(jnp.add, params, updates)
    critics = [step["critic.head.kernel"] for step in moved]
    students = [step["head.kernel"] for step in moved]
    # Adam's steps are the rate's, the critic's half of it.
    assert critics == pytest.approx([0.05, 0.05, 0, 0.05, 0.05, 0], abs=1e-4)
    assert students == pytest.approx([0, 0, 0.1, 0, 0, 0.1], abs=1e-4)


@pytest.mark.parametrize(
    "stage",
    [
        "guidance",
        *(
            pytest.param(stage, marks=pytest.mark.slow)
            for stage in ("teacher-forcing", "consistency")
        ),
    ],
)
def test_given_frames_are_not_learned_and_fades_are_not_guided(tmp_path: Path, stage: str):
    learned = "context_noise = 400.0\nlearn_context_noise = true"
    noised = {"block = 1": f"block = 1\n{learned}", '"guidance"': f'"{stage}"'}
    with jax.numpy_rank_promotion("allow"):
        task = recipe(tmp_path, **CHANGES, **noised).task()
        assert isinstance(task, DistillTask)
        batch = task.batch(0)
        assert batch.clips.given is not None
        # Only where nothing is before does the text tell of all.
        first = np.asarray(batch.clips.given).sum(axis=1)
        assert set(first) <= {1, 2}
        drawn = task.draw(batch, jax.random.key(3))
        assert drawn.context is not None
        params = {**task.init(), **task.frozen()}
        if stage == "consistency":
            params |= {f"average.{n}": v for n, v in task.init().items()}
        loss = jax.jit(task.loss)

        def changed(frame: int, by: float) -> float:
            noise = drawn.noise.at[:, :, frame].add(by)
            return float(loss(params, batch, drawn._replace(noise=noise))[0])

        right = changed(0, 0.0)
        # The first frame's noise is of its own target alone; the last one's counts.
        assert changed(0, 1.0) == right
        assert changed(2, 1.0) != right
        # What is before is seen: under its noise.
        other = drawn._replace(context=drawn.context + 1)
        assert float(loss(params, batch, other)[0]) != right
        if stage == "guidance":
            scale = guidance_scales(batch.clips.given, 4.0)
            rows = np.arange(len(first))
            expected = np.full((len(first), 3), 4.0)
            expected[rows, first] = 1
            np.testing.assert_array_equal(np.asarray(scale), expected)


def trained(made: Recipe, steps: int | None = None) -> DistillTask:
    run = made.run if steps is None else replace(made.run, steps=steps)
    # As on a command line: the tests' own rules on shapes are not those of training.
    with jax.numpy_rank_promotion("allow"):
        task = made.task()
        assert isinstance(task, DistillTask)
        train(task, run, made.optimizer, made.output, settings=made.settings())
    return task


@pytest.mark.slow
@pytest.mark.parametrize(
    "stage", ["guidance", "teacher-forcing", "consistency", "continuous", "dmd"]
)
def test_a_stopped_run_goes_on_bit_for_bit(tmp_path: Path, stage: str):
    whole, stopped = of_stage(tmp_path, "whole", stage), of_stage(tmp_path, "stopped", stage)
    task = trained(whole)
    trained(stopped, steps=2)
    trained(stopped)
    found = []
    for name in ("whole", "stopped"):
        files = sorted((tmp_path / name / "model" / "transformer").glob("*.safetensors"))
        found.append([file.read_bytes() for file in files])
    assert found[0] == found[1]
    assert len(found[0]) == 1
    # The student alone is exported, and has moved.
    begun = load_file(Path(task._sources.start.transformer) / "diffusion_pytorch_model.safetensors")
    file = tmp_path / "whole" / "model" / "transformer" / "diffusion_pytorch_model.safetensors"
    own = load_file(file)
    assert set(own) == set(begun)
    assert any((own[name] != np.asarray(begun[name], np.float32)).any() for name in own)
    # The teacher is held once, and is in no checkpoint.
    held = {name.removeprefix("teacher.") for name in task.frozen()}
    assert held == (set() if stage == "teacher-forcing" else set(task.template.variables))
    critic = {name for name in task.init() if name.startswith("critic.")}
    assert bool(critic) == (stage == "dmd")


@pytest.mark.slow
def test_another_teacher_is_refused_by_a_run_that_goes_on(tmp_path: Path):
    made = recipe(tmp_path)
    trained(made, steps=2)
    own = tmp_path / "run" / "model"
    other = recipe(tmp_path, **{"block = 1": f'block = 1\nteacher = "{own}"'})
    with pytest.raises(RequestError, match="distill.teacher"):
        trained(other)


def _is_at(folder: Path, step: int) -> bool:
    return logged_step(folder) >= step


@pytest.mark.slow
def test_killed_at_any_moment_it_ends_the_same(tmp_path: Path):
    longer = {"steps = 3": "steps = 24", '"guidance"': '"consistency"'}
    environment = os.environ | {"SKYREELS_JAX_CACHE": str(tmp_path / "cache")}
    found = []
    for name in ("whole", "killed"):
        made, chance, kills = recipe(tmp_path, name, **longer), random.Random(5), 0
        file = tmp_path / f"{name}.toml"
        command = [sys.executable, "-m", "skyreels_jax.cli.main", "train", str(file)]
        for moment in (3, 10, 11, 19) if name == "killed" else ():
            process = subprocess.Popen(command, env=environment, stderr=subprocess.DEVNULL)
            reached = partial(_is_at, made.output, moment)
            kills += kill_after(process, reached, chance, within=0.2, seconds=600)
        assert kills == (4 if name == "killed" else 0)
        subprocess.run(command, env=environment, check=True, capture_output=True)
        found.append(made.output / "model/transformer/diffusion_pytorch_model.safetensors")
    assert found[0].read_bytes() == found[1].read_bytes()
    # Another seed is another student.
    other = recipe(tmp_path, "other", **longer, log_every="seed = 1\nlog_every")
    trained(other)
    file = other.output / "model/transformer/diffusion_pytorch_model.safetensors"
    assert file.read_bytes() != found[0].read_bytes()
