"""What several processes tell each other: keys and values that process 0 keeps."""

from typing import Final

import jax

_KEYS: Final = "skyreels_jax"


class CoordinatorStore:
    """The keys and values that all processes share, kept by process 0."""

    def __init__(self) -> None:
        """Take the client of the run that this process has joined."""
        from jax._src.distributed import global_state  # No public name has the client.

        assert global_state.client is not None
        self._client = global_state.client

    def put(self, key: str, value: bytes) -> None:
        """Set a value, in place of another."""
        self._client.key_value_set_bytes(f"{_KEYS}/{key}", value, allow_overwrite=True)

    def wait(self, key: str) -> bytes:
        """A value, once it is there; who sets it no more is for the watch to notice."""
        while True:
            try:
                return self._client.blocking_key_value_get_bytes(f"{_KEYS}/{key}", 10_000)
            except jax.errors.JaxRuntimeError as error:
                if "DEADLINE_EXCEEDED" not in str(error):
                    raise

    def all(self, folder: str) -> dict[int, bytes]:
        """What each process that did set for itself."""
        pairs = self._client.key_value_dir_get_bytes(f"{_KEYS}/{folder}/")
        return {int(key.rpartition("/")[2]): value for key, value in pairs}

    def remove(self, key: str) -> None:
        """Forget a value, and those below it."""
        self._client.key_value_delete(f"{_KEYS}/{key}")
