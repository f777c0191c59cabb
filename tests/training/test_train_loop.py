"""Interrupted runs go on as if nothing had been; what diverges says where."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from skyreels_jax.errors import RequestError, WeightsError
from skyreels_jax.training.loop import DivergedError, RunConfig, train
from skyreels_jax.training.optimizer import OptimizerConfig

CONFIG = """
train = "text"
output = "unused"
[run]
steps = 20
log_every = 1
checkpoint_every = 10
ema = 0.9
[optimizer]
name = "muon"
learning_rate = 2e-3
warmup = 2
[model]
dim = 16
ffn_dim = 16
num_heads = 2
num_layers = 1
[data]
batch = 4
"""


@pytest.fixture(scope="module")
def config(tmp_path_factory) -> Path:
    file = tmp_path_factory.mktemp("train") / "run.toml"
    file.write_text(CONFIG)
    return file


def started(config: Path, output: Path) -> subprocess.Popen:
    command = [sys.executable, "-m", "skyreels_jax.cli.main", "train", str(config)]
    environment = os.environ | {"SKYREELS_JAX_CACHE": str(config.parent / "cache")}
    return subprocess.Popen(
        [*command, "--output", str(output)], env=environment, stderr=subprocess.DEVNULL
    )


def lines(output: Path) -> list[dict]:
    file = output / "log.jsonl"
    return [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []


def interrupted(config: Path, output: Path, step: int, number: signal.Signals) -> int:
    """Run until the log has reached ``step``, then send the signal; the exit code."""
    process = started(config, output)
    deadline = time.monotonic() + 120
    while not any(line["step"] >= step for line in lines(output)):
        assert process.poll() is None, "ended too early"
        assert time.monotonic() < deadline, "hangs"
        time.sleep(0.005)
    process.send_signal(number)
    return process.wait(60)


def weights(output: Path) -> bytes:
    return (output / "model" / "text_encoder" / "model.safetensors").read_bytes()


@pytest.fixture(scope="module")
def whole(config, tmp_path_factory) -> Path:
    output = tmp_path_factory.mktemp("whole") / "run"
    assert started(config, output).wait(120) == 0
    return output


def test_a_killed_run_goes_on_bit_for_bit(config, whole, tmp_path):
    output = tmp_path / "run"
    assert interrupted(config, output, 12, signal.SIGKILL) == -signal.SIGKILL
    assert not (output / "model").exists()
    assert started(config, output).wait(120) == 0
    assert weights(output) == weights(whole)
    keys = ("step", "loss", "grad_norm")
    logged = [[tuple(x.get(k) for k in keys) for x in lines(o)] for o in (output, whole)]
    assert logged[0] == logged[1]
    assert [line[0] for line in logged[0] if line[1] is not None] == list(range(1, 21))


@pytest.mark.slow
def test_another_seed_is_another_run(config, whole, tmp_path):
    other = tmp_path / "run.toml"
    other.write_text(CONFIG.replace("steps = 20", "steps = 20\nseed = 1"))
    output = tmp_path / "run"
    assert started(other, output).wait(120) == 0
    assert weights(output) != weights(whole)


@pytest.mark.slow
def test_a_terminated_run_saves_and_goes_on(config, whole, tmp_path):
    output = tmp_path / "run"
    code = interrupted(config, output, 3, signal.SIGTERM)
    assert code == 143
    saved = max(int(p.name) for p in (output / "checkpoints").iterdir() if p.name.isdigit())
    assert saved == max(line["step"] for line in lines(output))
    assert saved not in (10, 20)
    assert started(config, output).wait(120) == 0
    assert weights(output) == weights(whole)


def test_metrics_for_tensorboard(tmp_path):
    pytest.importorskip("tensorboardX")
    run = RunConfig(steps=4, log_every=1, tensorboard=True)
    train(Toy(99), run, OptimizerConfig(), tmp_path)
    (file,) = (tmp_path / "tensorboard").iterdir()
    written = file.read_bytes()
    assert written.count(b"loss") == 4
    assert b"grad_norm" in written


class Toy:
    """A line through points; the batch after ``broken`` holds a value that is no number."""

    def __init__(self, broken: int):
        self.broken = broken

    def init(self):
        return {"a.kernel": jnp.zeros((2, 2))}

    def fingerprint(self):
        return {}

    def draw(self, batch, key):
        return ()

    def loss(self, params, batch, noise):
        return jnp.mean(jnp.square(batch @ params["a.kernel"] - 1)), {}

    def batch(self, index):
        if index == self.broken + 1000:
            raise OSError("the disk is gone")
        x = np.random.default_rng(index).standard_normal((4, 2)).astype(np.float32)
        return x * (np.nan if index == self.broken else 1)

    def evaluate(self, params):
        return {"norm": float(jnp.sum(params["a.kernel"]))}

    def export(self, params, folder):
        np.save(folder / "a.npy", params["a.kernel"])

    def sample(self, params, folder):
        (folder / "seen").touch()


def test_what_diverges_says_where(tmp_path):
    run = RunConfig(steps=20, checkpoint_every=4, log_every=7)
    with pytest.raises(DivergedError, match=r"step 11 .* batch 10; last good checkpoint: step 8"):
        train(Toy(10), run, OptimizerConfig(), tmp_path / "run")
    fine = train(Toy(99), run, OptimizerConfig(), tmp_path / "fine")
    assert fine.finished


def test_an_error_while_data_is_made_is_not_lost(tmp_path):
    with pytest.raises(OSError, match="disk"):
        train(Toy(-995), RunConfig(steps=20), OptimizerConfig(), tmp_path / "run")


def test_what_is_written_when(tmp_path):
    run = RunConfig(steps=9, log_every=2, evaluate_every=4, sample_every=3, checkpoint_every=3)
    result = train(Toy(99), run, OptimizerConfig(), tmp_path)
    assert result.step == 9
    assert sorted(p.name for p in (tmp_path / "samples").iterdir()) == [
        "0000003",
        "0000006",
        "0000009",
    ]
    logged = lines(tmp_path)
    assert [line["step"] for line in logged if "loss" in line] == [2, 4, 6, 8, 9]
    assert [line["step"] for line in logged if "norm" in line] == [4, 8, 9]
    kept = sorted(int(p.name) for p in (tmp_path / "checkpoints").iterdir() if p.name.isdigit())
    # One is written before each look, whatever that does: at 8 for an evaluation.
    assert kept == [8, 9]
    assert (tmp_path / "model" / "a.npy").is_file()


def test_other_settings_are_named_and_refused(tmp_path, caplog):
    run, made = RunConfig(steps=4), {"run.seed": 0, "data.batch": 4, "run.steps": 4}
    train(Toy(99), run, OptimizerConfig(), tmp_path, settings=made)
    others = {**made, "run.seed": 1, "data.batch": 8}
    with pytest.raises(RequestError, match="run.seed 0 -> 1, data.batch 4 -> 8; set them back"):
        train(Toy(99), run, OptimizerConfig(), tmp_path, settings=others)
    # What decides nothing, and more steps, may change; the latter is said.
    longer, watched = {**made, "run.steps": 6}, {**made, "run.log_every": 3, "data.vae": "moved"}
    assert train(Toy(99), run, OptimizerConfig(), tmp_path, settings=watched).step == 4
    assert "goes on" not in caplog.text
    result = train(Toy(99), RunConfig(steps=6), OptimizerConfig(), tmp_path, settings=longer)
    assert (result.started, result.step, result.finished) == (4, 6, True)
    assert "run.steps 4 -> 6" in caplog.text


def test_done_is_done(tmp_path):
    train(Toy(99), RunConfig(steps=6), OptimizerConfig(), tmp_path)
    result = train(Toy(99), RunConfig(steps=3), OptimizerConfig(), tmp_path)
    assert (result.started, result.step, result.finished) == (6, 6, True)


def test_a_torn_line_is_cut_off(tmp_path, caplog):
    run = RunConfig(steps=4, log_every=1)
    train(Toy(99), run, OptimizerConfig(), tmp_path)
    with (tmp_path / "log.jsonl").open("a") as stream:
        stream.write('{"step": 5, "sec')
    train(Toy(99), RunConfig(steps=6, log_every=1), OptimizerConfig(), tmp_path)
    assert [line["step"] for line in lines(tmp_path) if "loss" in line] == [1, 2, 3, 4, 5, 6]
    assert "cut off" in caplog.text


def test_a_sampler_that_fails_loses_nothing(tmp_path, caplog):
    class Failing(Toy):
        def sample(self, params, folder):
            assert (tmp_path / "model" / "a.npy").is_file() or not sampled
            sampled.append(folder)
            raise RuntimeError("no such size")

    sampled: list[Path] = []
    run = RunConfig(steps=4, sample_every=2)
    assert train(Failing(99), run, OptimizerConfig(), tmp_path).finished
    assert len(sampled) == 2
    assert "no sample was made (no such size)" in caplog.text
    assert (tmp_path / "model" / "a.npy").is_file()
    assert not list((tmp_path / "samples").iterdir())


def test_another_model_in_an_old_folder_is_one_line(tmp_path):
    class Wider(Toy):
        def init(self):
            return {"a.kernel": jnp.zeros((2, 3))}

    train(Toy(99), RunConfig(steps=2), OptimizerConfig(), tmp_path)
    with pytest.raises(WeightsError, match=r"another model: a.kernel is \(2, 2\)") as refusal:
        train(Wider(99), RunConfig(steps=4), OptimizerConfig(), tmp_path)
    assert "\n" not in str(refusal.value)


def test_rate_and_speed_are_logged_and_raw_weights_exported(tmp_path):
    run = RunConfig(steps=4, log_every=2, ema=0.9, export_raw=True)
    train(Toy(99), run, OptimizerConfig(learning_rate=0.5, warmup=2), tmp_path)
    last = [line for line in lines(tmp_path) if "loss" in line][0]
    assert last["learning_rate"] == pytest.approx(0.25)
    assert last["steps_per_second"] > 0
    raw, average = (np.load(tmp_path / n / "a.npy") for n in ("model-raw", "model"))
    assert np.abs(raw - average).max() > 1e-3


def test_what_is_offloaded_or_rounded_goes_on_bit_for_bit(tmp_path):
    changes = {"kernels": "bfloat16", "offload": True, "ema": 0.9}
    constant = OptimizerConfig(schedule="constant", warmup=0)

    class Rounded(Toy):
        def loss(self, params, batch, noise):
            assert params["a.kernel"].dtype == jnp.bfloat16
            return super().loss({"a.kernel": params["a.kernel"].astype(jnp.float32)}, batch, noise)

        def evaluate(self, params):
            # What waits in the host's memory cannot be multiplied there.
            return {"held": float(jax.jit(jnp.dot)(params["a.kernel"], jnp.ones(2))[0])}

    def ran(name: str, *steps: int, **changes) -> np.ndarray:
        for count in steps:
            made = Rounded if changes.get("kernels") else Toy
            train(made(99), RunConfig(steps=count, **changes), constant, tmp_path / name)
        return np.load(tmp_path / name / "model" / "a.npy")

    whole = ran("whole", 4, **changes)
    np.testing.assert_array_equal(ran("again", 2, 4, **changes), whole)
    # A run may be given its memory of the host, or lose it, when it goes on.
    np.testing.assert_array_equal(
        ran("moved", 2, **{**changes, "offload": False}), ran("x", 2, **changes)
    )
    np.testing.assert_array_equal(ran("moved", 4, **changes), whole)
    assert np.abs(ran("plain", 4, ema=0.9) - whole).max() > 0
