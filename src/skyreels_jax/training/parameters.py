"""A model's parameters as a flat dictionary by dotted path: what is trained, averaged and saved."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

import jax
from flax import nnx

Params = Mapping[str, jax.Array]
ModelT = TypeVar("ModelT", bound=nnx.Module)


@dataclass(frozen=True, eq=False)
class Template(Generic[ModelT]):
    """A model without its parameters.

    Attributes:
        graph: its structure.
        variables: by dotted path, with path and type.
    """

    graph: nnx.GraphDef[ModelT]
    variables: Mapping[str, tuple[tuple[Any, ...], nnx.Variable]]

    @staticmethod
    def of(model: ModelT) -> "tuple[Template[ModelT], dict[str, jax.Array]]":
        """The template of a model, and its parameters."""
        graph, state = nnx.split(model)
        params, variables = {}, {}
        for path, leaf in nnx.to_flat_state(state):
            name, value = ".".join(map(str, path)), leaf.get_value()
            params[name] = value
            variables[name] = path, leaf.replace(jax.ShapeDtypeStruct(value.shape, value.dtype))
        return Template(graph, variables), params

    def model(self, params: Params) -> ModelT:
        """The model with these parameters."""
        flat = [(path, leaf.replace(params[n])) for n, (path, leaf) in self.variables.items()]
        return nnx.merge(self.graph, nnx.from_flat_state(flat))
