"""Training of a small transformer on 8 virtual devices, against the same on one.

A program of its own, as :mod:`tests.parallel.on_devices` is. Each word of its command line is a
call of a function below, ``name:argument:argument``, answered by a line of JSON.
"""

import dataclasses
import functools
import json
import shutil
import sys
import tempfile
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import NamedSharding, PartitionSpec
from tests.parallel.collectives import counted

from skyreels_jax.generation.dry_run.meshes import ACCELERATORS
from skyreels_jax.generation.dry_run.training import TrainingJob, training_forecast
from skyreels_jax.models.parallelism import Remat
from skyreels_jax.models.transformer import WanModel
from skyreels_jax.models.transformer_config import TransformerConfig
from skyreels_jax.training.footprint import ClipShape
from skyreels_jax.training.layers_in_parts import LayersInParts
from skyreels_jax.training.loop import DivergedError, RunConfig, train
from skyreels_jax.training.lora import LoraModel, LoraTraining
from skyreels_jax.training.mesh import TrainingMesh
from skyreels_jax.training.objective import Batch, velocity_loss
from skyreels_jax.training.optimizer import OptimizerConfig, make_optimizer
from skyreels_jax.training.step import init_state, make_step
from skyreels_jax.training.task import Template
from skyreels_jax.training.transformer_recipe import TransformerShape, VideoTraining
from skyreels_jax.training.videos.recipe import VideoData

CONFIG = TransformerConfig(
    model_type="t2v",
    inject_sample_info=True,
    dim=32,
    ffn_dim=40,
    num_heads=4,
    num_layers=3,
    text_dim=8,
    text_len=6,
    in_dim=16,
    freq_dim=16,
)


class VideoToy:
    """A transformer that learns from noise: a task of the loop."""

    def __init__(self, rows: int = 8, remat: Remat | bool = False, size: tuple[int, int] = (6, 6)):
        self.config, self.rows, self.size = CONFIG, rows, size
        model = WanModel(
            self.config,
            rngs=nnx.Rngs(0),
            dtype=jnp.float32,
            param_dtype=jnp.float32,
            remat=remat,
        )
        self.template, self.first = Template.of(model)
        # The head begins at zero, and what is before it would learn nothing in the first step.
        head = 0.1 * jax.random.normal(jax.random.key(7), self.first["head.linear.kernel"].shape)
        self.first["head.linear.kernel"] = head

        self._held = jax.jit(lambda *a: self._loss(*a, None))

    @property
    def layered(self) -> TransformerConfig | None:
        return self.config

    def init(self):
        return jax.tree.map(jnp.copy, self.first)

    def fingerprint(self):
        return {}

    def batch(self, index: int) -> Batch:
        rng = np.random.default_rng([3, index])
        draw = lambda *shape: rng.standard_normal(shape).astype(np.float32)  # noqa: E731
        latents, context = draw(self.rows, 16, 3, *self.size), draw(self.rows, 6, 8)
        return Batch(latents, context, fps=np.arange(self.rows, dtype=np.int32) % 2)

    def draw(self, batch: Batch, key):
        noise_key, sigma_key = jax.random.split(key)
        shape = batch.latents.shape
        sigma = jax.random.uniform(sigma_key, (shape[0], shape[2]))
        known = jnp.zeros(sigma.shape, bool).at[:, 0].set(sigma[:, 0] < 0.3)
        return jax.random.normal(noise_key, shape), sigma, known

    def loss(self, params, batch, noise):
        return self._loss(params, batch, noise, None), {}

    def loss_in_parts(self, layers: LayersInParts, params, batch, noise):
        return self._loss(params, batch, noise, layers), {}

    def _loss(self, params, batch, drawn, layers: LayersInParts | None):
        model = self.template.model(params)
        if layers is not None:
            layers.adopt(model)
        noise, sigma, known = drawn
        context = model.prepare_context(batch.context, None)
        return velocity_loss(model, batch._replace(context=context), noise, sigma, known=known)

    def evaluate(self, params):
        batch, noise = self.batch(99), self.draw(self.batch(99), jax.random.key(5))
        return {"held": float(self._held(params, batch, noise))}

    def on_mesh(self, mesh: TrainingMesh):
        self._held = mesh.evaluation_of(self.first, lambda layers, *a: self._loss(*a, layers))

    def export(self, params, folder: Path):
        np.savez(folder / "params.npz", **{n: np.asarray(x) for n, x in params.items()})

    def sample(self, params, folder: Path):
        (folder / "sum").write_text(str(float(jnp.sum(params["head.linear.kernel"]))))


class LoraToy(VideoToy):
    """A LoRA of the transformer, whose own parameters stay: kernels of 8 bits if that is asked."""

    def __init__(self, base: str, remat: Remat | bool = False):
        super().__init__(remat=remat)
        kernels = {"float32": None, "int8": jnp.int8}[base]
        kinds = {"dtype": jnp.float32, "param_dtype": jnp.float32, "kernel_dtype": kernels}
        model = WanModel(self.config, rngs=nnx.Rngs(0), remat=remat, **kinds)
        self.lora = LoraModel.of(model, LoraTraining(rank=4, targets="attention+ffn"))
        rng = np.random.default_rng(5)
        # After some training: neither matrix is zero.
        self.first = {
            name: jnp.asarray(0.05 * rng.standard_normal(x.shape), jnp.float32)
            for name, x in self.lora.init(0).items()
        }
        for name, value in self.lora.frozen.items():
            if value.dtype == jnp.int8:
                self.lora.frozen[name] = jnp.asarray(rng.integers(-99, 99, value.shape), jnp.int8)
            if name.endswith("kernel_scale"):
                self.lora.frozen[name] = 3e-3 * value
        head = 0.1 * jax.random.normal(jax.random.key(7), (32, 64))
        self.lora.frozen["head.linear.kernel"] = head

    def frozen(self):
        return self.lora.frozen

    def _loss(self, params, batch, drawn, layers: LayersInParts | None):
        model = self.lora.model(params)
        if layers is not None:
            layers.adopt(model)
        noise, sigma, known = drawn
        context = model.prepare_context(batch.context, None)
        return velocity_loss(model, batch._replace(context=context), noise, sigma, known=known)


def remat_of(word: str) -> Remat | bool:
    return {"none": False, "full": True, "dots": "dots"}[word]  # pyright: ignore[reportReturnType]


def stepping(
    mesh: str | None, optimizer: str, accumulate: int = 1, remat: str = "none", base: str = ""
):
    """A task, its mesh, its step and its first state; with ``base``, of a LoRA."""
    task = LoraToy(base, remat_of(remat)) if base else VideoToy(remat=remat_of(remat))
    frozen = task.frozen() if isinstance(task, LoraToy) else {}
    on = None if mesh is None else TrainingMesh.of(mesh, task.rows // accumulate, task)
    config = OptimizerConfig(name=optimizer, warmup=0, schedule="constant")  # pyright: ignore[reportArgumentType]
    params = task.init()
    chain = make_optimizer(config, 10, params)
    loss = task.loss if on is None else on.loss_of({**frozen, **params}, task.loss)
    if on is not None:
        frozen = on.place(frozen, on.weight_shardings(frozen))
    made = {"draw": task.draw, "accumulate": accumulate, "ema": 0.9, "frozen": frozen}
    step = make_step(loss, chain, mesh=on, **made)
    return task, on, step, init_state(params, chain, 0.9, on)


@functools.cache
def descended(mesh: str | None, accumulate: int = 1, remat: str = "none", base: str = ""):
    """Loss, norm and the gradients of all parameters, of one step of plain descent."""
    task, on, step, state = stepping(mesh, "sgd", accumulate, remat, base)
    batch = task.batch(0)
    state, report = step(state, batch if on is None else on.place_batch(batch), jax.random.key(1))
    # The momentum after one step is the gradient, which is not cut: its norm is below 1.
    found = {
        path[-1].key: np.asarray(leaf)
        for path, leaf in jax.tree_util.tree_leaves_with_path(state.optimizer)
        if isinstance(path[-1], jax.tree_util.DictKey)
    }
    assert found.keys() == state.params.keys()
    metrics = {name: float(value) for name, value in report.metrics.items()}
    assert metrics["grad_norm"] < 1
    return metrics, found


def gradients(
    mesh: str, accumulate: str, remat: str, fault: str = "-", base: str = ""
) -> list[float]:
    """Largest differences to one device: of the loss, and of a gradient, of its own largest."""
    metrics, expected = descended(None, base=base)
    if fault != "-":
        FAULTS[fault]()
    found, grads = descended(mesh, int(accumulate), remat, base)
    apart = [
        np.max(np.abs(grads[name] - expected[name])) / np.max(np.abs(expected[name]))
        for name in expected
        if np.any(expected[name])
    ]
    return [abs(found["loss"] / metrics["loss"] - 1), float(np.max(apart))]


def unsummed() -> None:
    """Gradients of what is whole on every device stay each device's own."""
    jax.lax.psum = lambda x, *_, **__: x


def other_rows() -> None:
    """The batch is in another order, and noise is not."""
    VideoToy.batch = lambda self, index, true=VideoToy.batch: jax.tree.map(
        lambda x: x[::-1], true(self, index)
    )


def other_parts() -> None:
    """Each device has another's part of what is not trained."""
    true = TrainingMesh.place

    def turned(self: TrainingMesh, tree, shardings):
        if isinstance(tree, dict) and "blocks.ffn.fc1.kernel" in tree:
            name = "blocks.ffn.fc1.kernel"
            tree = {**tree, name: jnp.roll(tree[name], tree[name].shape[1] // 2, axis=1)}
        return true(self, tree, shardings)

    TrainingMesh.place = turned


FAULTS = {"other parts": other_parts, "unsummed": unsummed, "other rows": other_rows}


def places(mesh: str, optimizer: str, base: str = "") -> dict[str, object]:
    """How much of the state each device has, and which collectives its compiled step has."""
    task, on, step, state = stepping(mesh, optimizer, base=base)
    assert on is not None
    large = {n for n, x in state.params.items() if n.startswith("blocks.") and x.ndim == 3}
    share = lambda x: x.addressable_shards[0].data.nbytes / x.nbytes  # noqa: E731
    moments = [
        share(leaf)
        for path, leaf in jax.tree_util.tree_leaves_with_path(state.optimizer)
        if any(getattr(key, "key", None) in large for key in path) and leaf.ndim == 3
    ]
    batch = on.place_batch(task.batch(0))
    given = step.keywords["frozen"]
    text = step.func.lower(state, batch, jax.random.key(1), frozen=given).compile().as_text()  # pyright: ignore
    is_whole = lambda n, x: n in (cut or large) and held_whole(text, x)  # noqa: E731
    cut = {n for n, x in given.items() if n.startswith("blocks.") and x.ndim == 3}
    return {
        "frozen": sorted({share(given[name]) for name in cut}),
        "params": sorted({share(state.params[name]) for name in large}),
        "average": sorted({share(state.average[name]) for name in large}),
        "moments": sorted(set(moments)),
        "collectives": counted(text),
        "whole": sorted(n for n, x in {**given, **state.params}.items() if is_whole(n, x)),
    }


WIDER = dataclasses.replace(CONFIG, dim=128, ffn_dim=256, text_dim=64)


def planned(mesh: str, base: str, optimizer: str, remat: str, fault: str = "-") -> dict[str, list]:
    """What ``plan --training`` says of a step on a mesh, and what the compiler does."""
    if fault == "whole moments":
        true = TrainingMesh.state_shardings
        whole = lambda place: NamedSharding(place.mesh, PartitionSpec())  # noqa: E731
        TrainingMesh.state_shardings = lambda self, state: true(self, state)._replace(
            optimizer=jax.tree.map(whole, true(self, state).optimizer)
        )
    lora = None if base == "whole" else LoraTraining(rank=4, base=base)  # pyright: ignore[reportArgumentType]
    shape = TransformerShape(start="x", dtype="bfloat16", remat=remat_of(remat))
    data = VideoData(vae="", text="", encoded="")
    chosen = OptimizerConfig(name=optimizer)  # pyright: ignore[reportArgumentType]
    training = VideoTraining(data, shape, lora=lora)
    job = TrainingJob(WIDER, ClipShape(8, 9, 64, 64), training, chosen, ema=0.9)
    step = job.step()
    on = TrainingMesh.of(mesh, 8, step)
    program = step.traced(mesh=on).lower().compile()
    memory = program.memory_analysis()
    assert memory is not None
    seen = counted(program.as_text() or "")
    if fault == "whole moments":
        TrainingMesh.state_shardings = true
    said = training_forecast(step, on.plan, ACCELERATORS["v5e"])
    counts = {one.kind: one.count for one in said.traffic}
    layers = WIDER.num_layers
    return {
        "arguments": [said.arguments, memory.argument_size_in_bytes],
        **{
            kind: [
                counts.get(kind, 0),
                layers * seen["layers"].get(kind, 0) + seen["around"].get(kind, 0),
            ]
            for kind in ("all-gather", "reduce-scatter")
        },
    }


def held_whole(module: str, value: jax.Array) -> bool:
    """Whether an array of the whole stack's shape is anywhere in a compiled program."""
    # Of any type: what an 8-bit kernel becomes before its product is as large as any.
    return f"[{','.join(map(str, value.shape))}]" in module


def run_of(folder: Path, steps: int, mesh: str | None, optimizer: str, accumulate: int = 1) -> Path:
    """Train in a folder, as far as a step; the rate is the same whatever the last one."""
    run = RunConfig(
        steps=steps, accumulate=accumulate, ema=0.9, log_every=1, evaluate_every=4, mesh=mesh
    )
    config = OptimizerConfig(
        name=optimizer,  # pyright: ignore[reportArgumentType]
        learning_rate=RATE,
        warmup=0,
        schedule="constant",
    )
    train(VideoToy(), run, config, folder)
    return folder


def exported(folder: Path) -> dict[str, np.ndarray]:
    with np.load(folder / "model" / "params.npz") as stored:
        return dict(stored)


RATE = 1e-3


def restored(optimizer: str, *meshes: str) -> list[float]:
    """Two steps on one device and three further ones on meshes, against five on one."""
    with tempfile.TemporaryDirectory() as temporary:
        begun = run_of(Path(temporary) / "begun", 2, None, optimizer)
        found = []
        for mesh in (None, *meshes):
            folder = Path(temporary) / f"on {mesh}"
            shutil.copytree(begun, folder)
            found.append(exported(run_of(folder, 5, mesh, optimizer)))
    expected, *others = found
    return [
        float(max(np.max(np.abs(other[n] - expected[n])) for n in expected)) for other in others
    ]


def resumed(mesh: str, optimizer: str, accumulate: str) -> dict[str, object]:
    """Five steps at once and in two goes: whether all bytes are the same, and what is logged."""
    with tempfile.TemporaryDirectory() as temporary:
        parts = int(accumulate)
        once = run_of(Path(temporary) / "once", 5, mesh, optimizer, parts)
        twice = run_of(Path(temporary) / "twice", 2, mesh, optimizer, parts)
        run_of(twice, 5, mesh, optimizer, parts)
        one = run_of(Path(temporary) / "one", 5, None, optimizer, parts)
        logs = [[json.loads(x) for x in (f / "log.jsonl").open()] for f in (once, twice, one)]
        a, b = exported(once), exported(twice)
        # The first two steps are a whole run, with an evaluation at its end.
        same = [[(x["loss"], x["grad_norm"]) for x in log if "loss" in x] for log in logs]
        figures = [
            [(x["step"], x[k]) for x in log for k in ("loss", "held", "grad_norm") if k in x]
            for log in (logs[0], logs[2])
        ]
        return {
            "equal": all(np.array_equal(a[n], b[n]) for n in a) and same[0] == same[1],
            "figures": figures[0],
            "of one device": figures[1],
            "keys": sorted({key for line in logs[0] for key in line}),
            "sampled": (once / "samples" / "0000005" / "sum").is_file(),
        }


def diverged(mesh: str) -> str:
    """What a run says whose batch is no number."""
    VideoToy.batch = lambda self, index, true=VideoToy.batch: jax.tree.map(
        lambda x: x * np.float32("nan") if x.dtype == np.float32 and index == 2 else x,
        true(self, index),
    )
    with tempfile.TemporaryDirectory() as temporary:
        try:
            run_of(Path(temporary), 5, mesh, "adamw")
        except DivergedError as error:
            return str(error)
    return "went on"


CALLS = {f.__name__: f for f in (gradients, places, restored, resumed, diverged, planned)}


def main(words: list[str]) -> None:
    for word in words:
        name, *arguments = word.split(":")
        print(json.dumps([word, CALLS[name](*arguments)]), flush=True)


if __name__ == "__main__":
    main(sys.argv[1:])
