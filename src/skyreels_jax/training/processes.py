"""What several processes that train one model do together; one process alone does nothing here."""

import jax
import numpy as np

from skyreels_jax.parallel.placing import gather_parts
from skyreels_jax.training.task import Params


def is_first() -> bool:
    """Whether this process writes."""
    return jax.process_index() == 0


def agreed(value: bool) -> bool:
    """What the first process says, in all of them: they must take the same way."""
    if jax.process_count() == 1:
        return value
    from jax.experimental.multihost_utils import broadcast_one_to_all

    return bool(broadcast_one_to_all(np.array(value)))


def any_says(value: bool) -> bool:
    """Whether it is so in any process."""
    if jax.process_count() == 1:
        return value
    from jax.experimental.multihost_utils import process_allgather

    return bool(np.any(process_allgather(np.array(value))))


def whole(params: Params) -> Params:
    """Parameters that every process can read: in the host's memory where they are not now."""
    if jax.process_count() == 1:
        return params
    return {name: jax.numpy.asarray(gather_parts(value)) for name, value in params.items()}
