"""Which logical axes of arrays are cut along which axes of a mesh: one table for all."""

from dataclasses import dataclass

from jax.sharding import PartitionSpec

from skyreels_jax.parallel.plan import MeshPlan

_Axes = tuple[str, ...]


@dataclass(frozen=True)
class Rules:
    """For each logical axis the axes of the mesh that cut it, the outermost first.

    Attributes:
        rows: of a batch.
        patches: of a frame, in tokens, rotary tables and kept keys and values. Devices along
            ``ring`` hold neighbouring patches after the others' are put together.
        weights: one axis of every matrix of a block, and of those around the blocks.
        states: of text and image, in the keys and values of cross-attention.
    """

    rows: _Axes = ("data",)
    patches: _Axes = ("ring", "fsdp", "ulysses")
    weights: _Axes = ("data", "fsdp", "ring", "ulysses")
    states: _Axes = ("ring", "fsdp", "ulysses")

    def axes(self, logical: str, plan: MeshPlan) -> _Axes:
        """The axes of the mesh for a logical one, without those of one device."""
        return tuple(axis for axis in getattr(self, logical) if plan.size(axis) > 1)

    def parts(self, logical: str, plan: MeshPlan) -> int:
        """Into how many parts an axis is cut."""
        count = 1
        for axis in self.axes(logical, plan):
            count *= plan.size(axis)
        return count

    def spec(self, plan: MeshPlan, *logical: str | None) -> PartitionSpec:
        """The cut of an array whose axes have these logical names; ``None`` is never cut."""
        return PartitionSpec(
            *(None if name is None else self.axes(name, plan) or None for name in logical)
        )


def weight_axis(path: str, shape: tuple[int, ...], parts: int) -> int | None:
    """The axis that a parameter of the transformer is cut along, or ``None`` if it is not.

    Args:
        path: dotted.
        shape: with the layers first, of the blocks' parameters.
        parts: to cut it into.
    """
    if parts == 1 or path.startswith(("head.", "patch_embedding.")):
        return None
    if path.startswith("blocks."):
        # Rows of a kernel: their parts are put together without rearranging anything. Vectors are
        # too small to be worth a collective each.
        axes = range(1, len(shape)) if len(shape) > 2 else ()
    else:
        # Columns: of the result each device computes some, and sums nothing.
        axes = [1] if len(shape) == 2 and path.endswith(".kernel") else ()
    return next((axis for axis in axes if shape[axis] % parts == 0), None)


def encoder_axis(path: str, shape: tuple[int, ...], parts: int) -> int | None:
    """The same of a parameter of the text or image encoder."""
    if path == "token_embedding.embedding":
        # Of each row that is looked up, every device has some columns.
        return 1 if parts > 1 and shape[1] % parts == 0 else None
    return weight_axis(path, shape, parts) if path.startswith("blocks.") else None
