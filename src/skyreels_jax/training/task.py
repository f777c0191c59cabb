"""What a training run asks of whatever is trained, and a model's parameters by dotted path."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, Generic, Protocol, TypeVar, runtime_checkable

import jax
from flax import nnx
from jaxtyping import Array, Float, PyTree

Params = Mapping[str, jax.Array]
ShapesOfParams = Mapping[str, jax.Array | jax.ShapeDtypeStruct]
# The loss and other metrics by name.
LossAndMetrics = tuple[Float[Array, ""], dict[str, Array]]
# Begins the names of parameters' moving averages, which a loss is given too on one device.
AVERAGE: Final = "average."
_ModelT = TypeVar("_ModelT", bound=nnx.Module)


@runtime_checkable
class TrainingTask(Protocol):
    """A model, its data and its loss. All that is random follows from a seed and a step."""

    def init(self) -> Params:
        """Parameters before the first step, float32."""
        ...

    def fingerprint(self) -> Mapping[str, str]:
        """Digests of the data that a recipe only names, by what they are called in messages."""
        ...

    def draw(self, batch: PyTree, key: Array) -> PyTree:
        """All that is random in a step, with the batch's leading axis; pure, to be compiled."""
        ...

    def loss(self, params: Params, batch: PyTree, noise: PyTree) -> LossAndMetrics:
        """The loss, a mean over the batch, and other metrics by name; ``noise`` was drawn."""
        ...

    def batch(self, index: int) -> PyTree:
        """The data of one step, a pytree of host arrays; the same for the same index."""
        ...

    def evaluate(self, params: Params) -> dict[str, float]:
        """Metrics on data that is not trained on, always the same."""
        ...

    def export(self, params: Params, folder: Path) -> None:
        """Write the model into an empty folder, to be used."""
        ...

    def sample(self, params: Params, folder: Path) -> None:
        """Write something to look at into an empty folder."""
        ...


@runtime_checkable
class FrozenBase(Protocol):
    """A task whose model has parameters that are not trained, and are in no state."""

    def frozen(self) -> Params:
        """These, by other names than those of :meth:`TrainingTask.init`; the loss has both."""
        ...


@dataclass(frozen=True, eq=False)
class Template(Generic[_ModelT]):
    """A model without its parameters.

    Attributes:
        graph: its structure.
        variables: path and type of each parameter, by dotted path.
    """

    graph: nnx.GraphDef[_ModelT]
    variables: Mapping[str, tuple[tuple[Any, ...], nnx.Variable]]

    @staticmethod
    def of(model: _ModelT) -> "tuple[Template[_ModelT], dict[str, jax.Array]]":
        """The template of a model, and its parameters."""
        graph, state = nnx.split(model)
        params, variables = {}, {}
        for path, leaf in nnx.to_flat_state(state):
            name, value = ".".join(map(str, path)), leaf.get_value()
            params[name] = value
            variables[name] = path, leaf.replace(jax.ShapeDtypeStruct(value.shape, value.dtype))
        return Template(graph, variables), params

    def model(self, params: Params) -> _ModelT:
        """The model with these parameters."""
        flat = [(path, leaf.replace(params[n])) for n, (path, leaf) in self.variables.items()]
        return nnx.merge(self.graph, nnx.from_flat_state(flat))
