"""The VAE with the rows of each frame cut over the devices of a mesh.

Every device has a slab of rows of what is computed and of what is kept for later chunks, at every
resolution the same share; convolutions exchange the rows at its edges. Where rows do not divide,
the last devices have fewer, and what fills up their slabs is zero for every convolution and no key
of attention.
"""

import json
from dataclasses import dataclass
from functools import lru_cache, partial

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array, Float, PyTree

from skyreels_jax.models.vae import WanVae
from skyreels_jax.models.vae_layers import PIXEL_STRIDE, Cache
from skyreels_jax.models.vae_runs import Chunk, ChunkStep, KeptFrames
from skyreels_jax.ops.target import compiled_for, cut_in_rows, device_of
from skyreels_jax.parallel.encoders import LINE
from skyreels_jax.parallel.placing import gather_parts, send_parts
from skyreels_jax.parallel.processes import current_processes

_Rows = Float[Array, "*frames height width C"]


@dataclass(frozen=True)
class _Slabs:
    """How devices exchange rows: a :class:`~skyreels_jax.ops.target.RowExchange`.

    Attributes:
        devices: in the line.
        slab: rows of latents on each.
        count: rows of latents of a frame.
    """

    devices: int
    slab: int
    count: int

    def with_neighbours(self, x: _Rows, above: int, below: int) -> _Rows:
        """The last rows of the device before, this one's, the first of the one after."""
        axis = x.ndim - 3
        x = self._without_filling(x)
        rows, others = x.shape[axis], range(self.devices - 1)
        parts = [x]
        if above:
            last = jax.lax.slice_in_dim(x, rows - above, rows, axis=axis)
            # A device that nothing is sent to receives zeros.
            parts.insert(0, jax.lax.ppermute(last, LINE, [(n, n + 1) for n in others]))
        if below:
            first = jax.lax.slice_in_dim(x, 0, below, axis=axis)
            parts.append(jax.lax.ppermute(first, LINE, [(n + 1, n) for n in others]))
        return jnp.concatenate(parts, axis)

    def gathered(self, x: _Rows) -> _Rows:
        """All rows, without those that fill up."""
        axis = x.ndim - 3
        whole = jax.lax.all_gather(x, LINE, axis=axis, tiled=True)
        return jax.lax.slice_in_dim(whole, 0, self._counted(x.shape[axis]), axis=axis)

    def _counted(self, rows: int) -> int:
        """Rows of a frame at the resolution at which each device has ``rows``."""
        return rows // self.slab * self.count

    def _without_filling(self, x: _Rows) -> _Rows:
        """Zeros where a slab reaches past the frame."""
        if self.slab * self.devices == self.count:
            return x
        rows = x.shape[x.ndim - 3]
        row = jax.lax.axis_index(LINE) * rows + jnp.arange(rows)
        return jnp.where((row < self._counted(rows))[:, None, None], x, jnp.zeros((), x.dtype))


@dataclass(frozen=True)
class MeshFrames:
    """Where rows of frames are: a :class:`~skyreels_jax.models.vae_runs.FrameDevices`.

    Attributes:
        mesh: along one axis; :func:`.encoders.in_a_line`.
    """

    mesh: Mesh

    def run(
        self,
        step: ChunkStep,
        graph: nnx.GraphDef[WanVae],
        parameters: nnx.State,
        chunk: Chunk,
        cache: KeptFrames,
        unit: int,
    ) -> tuple[Chunk, Cache]:
        """Every device its rows; the result is in the host's memory, what is kept is not."""
        whole, chunk = chunk.shape[3], np.asarray(chunk)
        count = whole * unit // PIXEL_STRIDE
        slab = -(-count // self.mesh.size)
        filling = slab * self.mesh.size * (PIXEL_STRIDE // unit) - whole
        chunk = np.pad(chunk, ((0, 0), (0, 0), (0, 0), (0, filling), (0, 0)))
        program = self.program(step, graph, slab=slab, count=count)
        chunk = send_parts(chunk, NamedSharding(self.mesh, _spec(chunk)))
        cache = jax.tree.map(
            lambda leaf: send_parts(leaf, NamedSharding(self.mesh, _spec_kept(leaf))), cache
        )
        out, cache = program(parameters, chunk, cache)
        rows = out.shape[3] // (slab * self.mesh.size) * count
        return gather_parts(out)[:, :, :, :rows], cache

    def program(
        self, step: ChunkStep, graph: nnx.GraphDef[WanVae], *, slab: int, count: int
    ) -> "jax.stages.Wrapped":
        """The compiled function of parameters, chunk and what was kept.

        Args:
            step: of the VAE.
            graph: of the model.
            slab: rows of latents on each device.
            count: rows of latents of a frame.
        """
        return _program(self.mesh, step, graph, _Slabs(self.mesh.size, slab, count))

    def free(self, of_one: int | None) -> int | None:
        """Bytes free on all devices, of those on one; a CPU's devices share them.

        Several processes take process 0's number: they cut frames into the same tiles.
        """
        if (processes := current_processes()) is not None:
            of_one = json.loads(processes.share(lambda: json.dumps(of_one).encode()))
        if of_one is None or device_of(self.mesh.devices.flat[0]).platform == "cpu":
            return of_one
        return of_one * self.mesh.size

    def placement(self, path: str, value: np.ndarray) -> Array:
        """Put a loaded parameter on every device: they are few and small."""
        del path
        return send_parts(value, NamedSharding(self.mesh, PartitionSpec()))


@lru_cache(maxsize=16)
def _program(
    mesh: Mesh, step: ChunkStep, graph: nnx.GraphDef[WanVae], slabs: _Slabs
) -> "jax.stages.Wrapped":
    def on_device(parameters: nnx.State, chunk: Array, cache: Cache) -> tuple[Array, Cache]:
        with cut_in_rows(slabs):
            return step(graph, parameters, chunk, cache)

    def kept_by(parameters: nnx.State, chunk: Array, cache: Cache) -> Cache:
        """Shapes of what each device keeps."""

        def own(leaf: Array, spec: PartitionSpec) -> jax.ShapeDtypeStruct:
            shape = NamedSharding(mesh, spec).shard_shape(leaf.shape)
            return jax.ShapeDtypeStruct(shape, leaf.dtype)

        given = own(chunk, _spec(chunk)), jax.tree.map(lambda x: own(x, _spec_kept(x)), cache)
        with cut_in_rows(_Alone()):
            return jax.eval_shape(partial(step, graph), parameters, *given)[1]

    def call(parameters: nnx.State, chunk: Array, cache: Cache) -> tuple[Array, Cache]:
        before, after = (
            jax.tree.map(_spec_kept, kept) for kept in (cache, kept_by(parameters, chunk, cache))
        )
        mapped = jax.shard_map(
            on_device,
            mesh=mesh,
            in_specs=(PartitionSpec(), _spec(chunk), before),
            out_specs=(_spec(chunk), after),
            check_vma=False,
        )
        with compiled_for(device_of(mesh.devices.flat[0])):
            return mapped(parameters, chunk, cache)

    return jax.jit(call, donate_argnums=2)


class _Alone:
    """Has rows of zeros for neighbours: enough to find out shapes without a mesh."""

    def with_neighbours(self, x: _Rows, above: int, below: int) -> _Rows:
        """As high as with neighbours."""
        return jnp.pad(x, (*[(0, 0)] * (x.ndim - 3), (above, below), (0, 0), (0, 0)))

    def gathered(self, x: _Rows) -> _Rows:
        """As they are."""
        return x


def _spec(chunk: Chunk) -> PartitionSpec:
    """Rows of ``[B, C, T, height, width]``."""
    return PartitionSpec(None, None, None, LINE)


def _spec_kept(leaf: PyTree) -> PartitionSpec:
    """Rows of ``[..., height, width, C]``."""
    return PartitionSpec(*[None] * (leaf.ndim - 3), LINE)
