"""A limit on the memory that reading a file's own description may take."""

from dataclasses import dataclass

from skyreels_jax.errors import WeightsError


@dataclass
class Allowance:
    """Bytes of Python objects that may still be made while ``file`` is being read.

    Descriptions are small beside the tensors they describe. A hostile file can be nothing but
    description, one byte of it making an object of a hundred; this is where that ends.
    """

    file: str
    left: int

    def spend(self, nbytes: int) -> None:
        """Take ``nbytes`` off.

        Raises:
            WeightsError: if fewer are left.
        """
        self.left -= nbytes
        if self.left < 0:
            raise WeightsError(
                f"{self.file} is corrupt or hostile: describing its tensors takes several times "
                "the memory of the file itself"
            )
