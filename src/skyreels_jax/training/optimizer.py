"""What turns gradients into updates: optax's optimisers, by name and numbers."""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Final, Literal, Protocol, runtime_checkable

from skyreels_jax.training.task import Params

if TYPE_CHECKING:
    import optax
    from optax.contrib import MuonDimensionNumbers


# Ends of the names of what multiplies.
MATRICES: Final = ("kernel", "lora_down", "lora_up")


@dataclass(frozen=True)
class OptimizerConfig:
    """An optimiser and the course of its rate.

    Attributes:
        name: ``adamw``; ``muon`` (orthogonalised momentum for the matrices, Adam for the rest),
            which learns more in a step; ``adafactor``, which keeps least; or ``sgd``.
        learning_rate: the highest rate.
        schedule: falls to zero as a cosine or a line after the warm-up, or stays.
        warmup: steps over which the rate rises from zero.
        weight_decay: of matrices and convolutions, as a share of the rate.
        beta1: decay of the first moment, and of momentum.
        beta2: decay of the second moment.
        clip: largest norm of the gradient of all parameters together.
    """

    name: Literal["adamw", "muon", "adafactor", "sgd"] = "adamw"
    learning_rate: float = 1e-4
    schedule: Literal["constant", "cosine", "linear"] = "cosine"
    warmup: int = 100
    weight_decay: float = 0.01
    beta1: float = 0.9
    beta2: float = 0.99
    clip: float = 1.0

    def __post_init__(self):
        if not (self.learning_rate > 0 and self.clip > 0):
            raise ValueError(f"{self.learning_rate=} and {self.clip=} should be positive")
        if not (0 <= self.beta1 < 1 and 0 <= self.beta2 < 1):
            raise ValueError(f"{self.beta1=} and {self.beta2=} should be at least 0 and below 1")
        if self.warmup < 0 or self.weight_decay < 0:
            raise ValueError(f"{self.warmup=} and {self.weight_decay=} should not be negative")


@runtime_checkable
class OwnOptimizer(Protocol):
    """A task whose parameters are not all updated alike."""

    def optimizer(self, config: OptimizerConfig, steps: int) -> "optax.GradientTransformation":
        """What a recipe's optimiser becomes over a run of so many steps."""
        ...


def learning_rate(config: OptimizerConfig, steps: int) -> "optax.Schedule":
    """The rate by step, over a run of ``steps``; it rises over ``config.warmup`` of them."""
    import optax

    peak, after = config.learning_rate, max(steps - config.warmup, 1)
    course = {
        "constant": optax.constant_schedule(peak),
        "cosine": optax.cosine_decay_schedule(peak, after),
        "linear": optax.linear_schedule(peak, 0.0, after),
    }[config.schedule]
    # optax.warmup_constant_schedule would stay at zero without a warm-up.
    rise = optax.linear_schedule(0.0, peak, max(config.warmup, 1))
    return optax.join_schedules([rise, course], [config.warmup])


def make_optimizer(
    config: OptimizerConfig, steps: int, params: Params
) -> "optax.GradientTransformation":
    """The optimiser of a run of ``steps``, gradients cut to ``config.clip`` first.

    Names and shapes of ``params`` decide what Muon and weight decay apply to.
    """
    import optax
    from optax.contrib import muon

    rate = learning_rate(config, steps)
    matrices, axes = _is_matrix(params), _muon_axes(params)
    if config.name == "adamw":
        chosen = optax.adamw(
            rate, b1=config.beta1, b2=config.beta2, mask=matrices, weight_decay=config.weight_decay
        )
    elif config.name == "muon":
        chosen = muon(
            rate,
            beta=config.beta1,
            adam_b1=config.beta1,
            adam_b2=config.beta2,
            # By name: within optax some leaves are stand-ins without a shape.
            muon_weight_dimension_numbers=lambda _: axes,  # pyright: ignore[reportArgumentType]
            # Updates of a matrix as large as Adam's would be, so that one rate serves both.
            consistent_rms=0.2,
            weight_decay=config.weight_decay,
        )
    elif config.name == "adafactor":
        chosen = optax.adafactor(
            rate, weight_decay_rate=config.weight_decay or None, weight_decay_mask=matrices
        )
    else:
        chosen = optax.chain(
            optax.add_decayed_weights(config.weight_decay, matrices),
            optax.sgd(rate, momentum=config.beta1 or None),
        )
    return optax.chain(optax.clip_by_global_norm(config.clip), chosen)


def _is_matrix(params: Params) -> dict[str, bool]:
    """Which parameters multiply what passes through: kernels, not norms, biases and tables."""
    return {name: name.endswith(MATRICES) for name in params}


def _muon_axes(params: Params) -> "dict[str, MuonDimensionNumbers | None]":
    """Which axes of a kernel are its rows and columns; those of layers are apart. None for Adam."""
    from optax.contrib import MuonDimensionNumbers

    def axes(name: str, ndim: int) -> MuonDimensionNumbers | None:
        if not name.endswith(MATRICES):
            return None
        first = 1 if name.startswith("blocks.") else 0
        return MuonDimensionNumbers(tuple(range(first, ndim - 1)), ndim - 1)

    return {name: axes(name, value.ndim) for name, value in params.items()}


def optimizer_of(
    task: object, config: OptimizerConfig, steps: int, params: Params
) -> "optax.GradientTransformation":
    """A task's own optimiser, or else the recipe's for all parameters alike."""
    if isinstance(task, OwnOptimizer):
        return task.optimizer(config, steps)
    return make_optimizer(config, steps, params)
