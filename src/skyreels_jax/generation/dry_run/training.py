"""What a training step would take on each legal mesh of an accelerator: traced, never compiled.

The trainer's own step is traced from shapes for a mesh that nobody has. Its state's bytes, what it
keeps for the backward pass, its collectives and its products are counted there. What a layer takes
while it runs is a formula, and seconds follow from makers' rates, as for one video
(:mod:`.meshes`).
"""

import math
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Final

import jax
from jax.core import ShapedArray
from jax.extend.core import Jaxpr, JaxprEqn, Literal, Var
from jax.sharding import AbstractMesh, AxisType
from jaxtyping import PyTree

from skyreels_jax.generation.dry_run.compiled import (
    Compiled,
    compile_traced,
    described_tpus,
    grid_of,
)
from skyreels_jax.generation.dry_run.meshes import (
    ASSUMED_SHARE,
    USABLE_SHARE,
    Accelerator,
    Traffic,
)
from skyreels_jax.generation.dry_run.operations import bodies, operations
from skyreels_jax.models.transformer_config import TransformerConfig
from skyreels_jax.ops.target import Device, compiled_for, device_of
from skyreels_jax.parallel.plan import MESH_AXES, MeshPlan, all_plans
from skyreels_jax.training.footprint import AbstractStep, ClipShape
from skyreels_jax.training.layers_in_parts import STACKED
from skyreels_jax.training.mesh import TRAINING_RULES, TrainingMesh
from skyreels_jax.training.optimizer import OptimizerConfig, make_optimizer
from skyreels_jax.training.task import Params
from skyreels_jax.training.transformer_recipe import VideoTraining

if TYPE_CHECKING:
    import optax

# Of one layer at work forwards and backwards, by token: bytes per feature of the model and of its
# hidden layer. With them all bytes are within 5 % of what the TPU's compiler said of 1.3B and 14B
# on eight devices, and 10 to 25 % below the CUDA compiler's.
_BYTES_PER_FEATURE: Final = 32
_BYTES_PER_HIDDEN: Final = 10
# What attention's products are is seen where no kernel computes them; what is kept of it, where one
# does, as on every accelerator.
_COUNTED_ON: Final = Device("cpu")
_KEPT_ON: Final = Device("tpu")
# What a run is long; it decides nothing that is counted.
_STEPS: Final = 1000
# Of a collective's result (of a scatter, its operand), the share that comes from elsewhere is
# counted so often: a sum is scattered and gathered.
_TIMES: Final[Mapping[str, int]] = {
    "all_gather": 1,
    "reduce_scatter": 1,
    "psum": 2,
    "all_to_all": 1,
    "ppermute": 1,
}
_NAMES: Final[Mapping[str, str]] = {
    "all_gather": "all-gather",
    "reduce_scatter": "reduce-scatter",
    "psum": "all-reduce",
    "all_to_all": "all-to-all",
    "ppermute": "collective-permute",
}


@dataclass(frozen=True)
class TrainingJob:
    """What is to be trained.

    Attributes:
        config: of the transformer.
        clips: of a batch.
        training: of which the tables ``model`` and ``lora`` are taken.
        optimizer: of the parameters.
        ema: of the parameters; 0 keeps no average.
    """

    config: TransformerConfig
    clips: ClipShape
    training: VideoTraining
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    ema: float = 0.0

    def step(self) -> AbstractStep:
        """The trainer's step, of shapes."""

        def chain(params: Params) -> "optax.GradientTransformation":
            return make_optimizer(self.optimizer, _STEPS, params)

        return AbstractStep.of(self.training, self.config, chain, clips=self.clips, ema=self.ema)


@dataclass(frozen=True)
class TrainingForecast:
    """One mesh: bytes by kind on the fullest device, work and seconds of a step.

    Attributes:
        plan: of the mesh.
        bytes: by kind (``kept`` is for the backward pass, ``at work`` what one layer takes while it
            runs); all are there at once when most memory is taken.
        traffic: in one step.
        operations: of one step, on each device.
        seconds: of one step, computing and waiting for links one after the other.
        fits: whether all bytes do.
    """

    plan: MeshPlan
    bytes: Mapping[str, int]
    traffic: tuple[Traffic, ...]
    operations: int
    seconds: float
    fits: bool

    @property
    def arguments(self) -> int:
        """Bytes that are there before a step."""
        return sum(self.bytes[kind] for kind in _ARGUMENTS)

    @property
    def total(self) -> int:
        """All bytes."""
        return sum(self.bytes.values())


_ARGUMENTS: Final = ("weights", "frozen weights", "optimiser", "average", "batch")


def legal_plans(config: TransformerConfig, rows: int, devices: int) -> list[MeshPlan]:
    """The meshes of so many devices on which a batch of so many rows is trained.

    Patches of frames are cut where rows do not suffice alone, and then as little as may be. There
    is always one: a ring of all.
    """
    found = [
        plan
        for plan in all_plans(devices)
        if rows % TRAINING_RULES.parts("rows", plan) == 0 and config.num_heads % plan.ulysses == 0
    ]
    least = min(plan.ring * plan.ulysses for plan in found)
    return [plan for plan in found if plan.ring * plan.ulysses == least]


def training_forecasts(job: TrainingJob, devices: int, kind: Accelerator) -> list[TrainingForecast]:
    """All legal meshes of so many devices, those that fit first, the fastest of them first."""
    step = job.step()
    found = [
        training_forecast(step, plan, kind)
        for plan in legal_plans(job.config, job.clips.batch, devices)
    ]
    return sorted(found, key=lambda one: (not one.fits, one.seconds, one.total))


def training_forecast(step: AbstractStep, plan: MeshPlan, kind: Accelerator) -> TrainingForecast:
    """What one mesh takes."""
    sizes = tuple(plan.size(axis) for axis in MESH_AXES)
    abstract = AbstractMesh(sizes, MESH_AXES, axis_types=(AxisType.Auto,) * len(sizes))
    mesh = TrainingMesh(abstract, plan, layered=step)
    with compiled_for(_COUNTED_ON):
        jaxpr = step.traced(mesh=mesh).jaxpr.jaxpr
    with compiled_for(_KEPT_ON):
        kept = _kept(_manual(step.traced(mesh=mesh).jaxpr.jaxpr))
    on_device = _manual(jaxpr)
    # What is around the part of each device is divided, as the compiler does.
    inside = operations(on_device)
    work = inside + (operations(jaxpr) - inside) // plan.devices
    traffic = tuple(_traffic(on_device, plan))
    found = _state_bytes(step, mesh) | {
        "kept": kept,
        "at work": _at_work(step, mesh),
    }
    computing = work / (ASSUMED_SHARE * kind.operations)
    waiting = sum(one.received for one in traffic) / kind.link
    fits = sum(found.values()) <= USABLE_SHARE * kind.memory
    return TrainingForecast(plan, found, traffic, work, computing + waiting, fits)


def compile_training(job: TrainingJob, plan: MeshPlan, kind: str) -> Compiled:
    """What the compiler for a kind of TPU says of a step on a mesh.

    Raises:
        UnsupportedError: it cannot be asked, or the step does not fit.
    """
    devices, step = described_tpus(grid_of(kind, plan.devices)), job.step()
    with compiled_for(device_of(devices[0])):
        mesh = TrainingMesh.of(str(plan), job.clips.batch, step, devices)
        traced = step.traced(mesh=mesh)
    return compile_traced(traced, device_of(devices[0]))


def _state_bytes(step: AbstractStep, mesh: TrainingMesh) -> dict[str, int]:
    frozen, state, batch = step.placed(mesh)
    weights = _on_device(state.params)
    return {
        "weights": weights,
        "frozen weights": _on_device(frozen),
        "gradients": weights,
        "optimiser": _on_device(state.optimizer),
        "average": _on_device(state.average),
        "batch": _on_device(batch),
    }


def _on_device(tree: PyTree) -> int:
    """Bytes of a tree of placed shapes on each device."""
    return sum(
        math.prod(leaf.sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize
        for leaf in jax.tree.leaves(tree)
    )


def _manual(jaxpr: Jaxpr) -> Jaxpr:
    """What each device computes by itself: the body of the first ``shard_map``."""
    for equation in _all_equations(jaxpr):
        if equation.primitive.name == "shard_map":
            return next(bodies(equation.params))
    raise AssertionError("a step on a mesh has a shard_map")


def _all_equations(jaxpr: Jaxpr) -> Iterator[JaxprEqn]:
    for equation in jaxpr.eqns:
        yield equation
        for body in bodies(equation.params):
            yield from _all_equations(body)


def _kept(jaxpr: Jaxpr) -> int:
    """Bytes that loops over layers keep for those that go backwards: what they stack."""
    total = 0
    for equation in jaxpr.eqns:
        if equation.primitive.name != "scan":
            total += sum(map(_kept, bodies(equation.params)))
        elif not equation.params["reverse"]:
            # JAX 0.10 and 0.11 count carries differently; what is stacked has an axis more outside.
            (body,) = bodies(equation.params)
            pairs = zip(equation.outvars, body.outvars, strict=True)
            total += sum(_bytes(out) for out, of in pairs if _value(out).ndim > _value(of).ndim)
    return total


def _at_work(step: AbstractStep, mesh: TrainingMesh) -> int:
    """Bytes of a layer at work: its matrices, their gradient, and what its tokens become.

    What is put together for the whole step, of time and text, is with them.
    """
    config, rows, plan = step.config, step.batch.latents.shape, mesh.plan
    patches = config.patches(*rows[3:])
    slab = math.ceil(patches / (plan.ring * plan.ulysses))
    tokens = rows[0] // TRAINING_RULES.parts("rows", plan) * rows[2] * slab
    together = 0.0
    for given, times in ((step.state.params, 2), (step.frozen, 1)):
        for name, place in mesh.weight_shardings(given).items():
            leaf = given[name]
            if place.shard_shape(leaf.shape) != leaf.shape:
                size = leaf.size * leaf.dtype.itemsize
                is_layers = name.startswith(STACKED)
                together += times * size / config.num_layers if is_layers else size
    by_token = _BYTES_PER_FEATURE * config.dim + _BYTES_PER_HIDDEN * config.ffn_dim
    return round(together) + tokens * by_token


def _traffic(jaxpr: Jaxpr, plan: MeshPlan) -> Iterator[Traffic]:
    counts, received = Counter[str](), Counter[str]()
    for equation, times in _collectives(jaxpr):
        name, parameters = equation.primitive.name, equation.params
        axes = parameters["axes" if name == "psum" else "axis_name"]
        axes = axes if isinstance(axes, tuple) else (axes,)
        size = math.prod(plan.size(axis) for axis in axes)
        values = equation.invars if name == "reduce_scatter" else equation.outvars
        share = 1.0 if name == "ppermute" else (size - 1) / size
        counts[name] += times
        for value in values:
            received[name] += times * round(_TIMES[name] * share * _bytes(value))
    for name in _NAMES:
        if received[name]:
            yield Traffic(_NAMES[name], counts[name], received[name])


def _collectives(jaxpr: Jaxpr, times: int = 1) -> Iterator[tuple[JaxprEqn, int]]:
    """Collectives, and how often each is met."""
    for equation in jaxpr.eqns:
        if equation.primitive.name in _TIMES:
            yield equation, times
        inner = times * equation.params.get("length", 1)
        for body in bodies(equation.params):
            yield from _collectives(body, inner)


def _bytes(variable: Var | Literal) -> int:
    value = _value(variable)
    return math.prod(value.shape) * value.dtype.itemsize


def _value(variable: Var | Literal) -> ShapedArray:
    assert isinstance(variable.aval, ShapedArray)
    return variable.aval
