"""What a training run asks of whatever is trained."""

from pathlib import Path
from typing import Any, Protocol, runtime_checkable

from jaxtyping import Array, Float

from skyreels_jax.training.parameters import Params


@runtime_checkable
class Task(Protocol):
    """A model, its data and its loss. All that is random follows from a seed and a step."""

    def init(self) -> Params:
        """Parameters before the first step, float32."""
        ...

    def loss(
        self, params: Params, batch: Any, key: Array
    ) -> tuple[Float[Array, ""], dict[str, Array]]:
        """The loss and other figures by name; pure, to be compiled."""
        ...

    def batch(self, index: int) -> Any:
        """The data of one step, a pytree of host arrays; the same for the same index."""
        ...

    def evaluate(self, params: Params) -> dict[str, float]:
        """Figures on data that is not trained on, always the same."""
        ...

    def export(self, params: Params, folder: Path) -> None:
        """Write the model into an empty folder, to be used."""
        ...

    def sample(self, params: Params, folder: Path) -> None:
        """Write something to look at into an empty folder."""
        ...
