"""How many devices a mesh has along each axis: parsed, proved legal, or chosen with a reason."""

import math
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Final

from skyreels_jax.errors import RequestError
from skyreels_jax.models.transformer_config import TransformerConfig

AUTO: Final = "auto"
MESH_AXES: Final = ("data", "fsdp", "ring", "ulysses")
_USAGE: Final = "a mesh is `auto`, or axes and sizes such as `fsdp=4,ulysses=2`"
# Plans that a refusal names.
_SHOWN: Final = 3


@dataclass(frozen=True)
class MeshPlan:
    """Devices along each axis of a mesh; their product is the number of devices.

    Along every axis the weights of the blocks are cut. The axes differ in what else is:

    Attributes:
        data: the rows of a batch: videos, and the two prompts of batched guidance.
        fsdp: the patches of each frame; keys and values are gathered, as the weights are.
        ring: the patches of each frame; keys and values go round, a device's at a time.
        ulysses: the patches of each frame; in attention, the heads instead (DeepSpeed-Ulysses).
    """

    data: int = 1
    fsdp: int = 1
    ring: int = 1
    ulysses: int = 1

    def __post_init__(self) -> None:
        for axis, size in asdict(self).items():
            if size < 1:
                raise RequestError(f"`mesh` {axis}={size}: an axis has at least one device")

    @classmethod
    def parse(cls, text: str) -> "MeshPlan":
        """The plan that ``fsdp=4,ulysses=2`` spells; axes that are left out have one device.

        Raises:
            RequestError: it spells none; says what does.
        """
        sizes: dict[str, int] = {}
        for part in text.split(","):
            axis, equals, size = (word.strip() for word in part.partition("="))
            if axis == "tensor":
                raise RequestError(
                    f"`mesh` {text!r}: the axis tensor is not supported: with sequences cut too, "
                    "the compiler gathers whole activations; cut patches by `ulysses`, `ring` or "
                    "`fsdp`, which cut the weights as well"
                )
            if axis not in MESH_AXES:
                raise RequestError(
                    f"`mesh` {text!r}: there is no axis {axis!r}, only {', '.join(MESH_AXES)}; "
                    f"{_USAGE}"
                )
            if not equals or not (size.isascii() and size.isdecimal()) or len(size) > 6:
                raise RequestError(f"`mesh` {text!r}: {part.strip()!r} has no size; {_USAGE}")
            if axis in sizes:
                raise RequestError(f"`mesh` {text!r}: {axis} stands there twice")
            sizes[axis] = int(size)
        return cls(**sizes)

    @property
    def devices(self) -> int:
        """How many devices the mesh has."""
        return self.data * self.sequence

    @property
    def sequence(self) -> int:
        """Into how many parts the patches of a frame are cut."""
        return self.fsdp * self.ring * self.ulysses

    def size(self, axis: str) -> int:
        """Devices along an axis."""
        return getattr(self, axis)

    def problems(self, config: TransformerConfig, rows: int | None = None) -> Iterator[str]:
        """Why a transformer cannot run on the mesh; nothing if it can.

        Args:
            config: of the transformer.
            rows: of a batch: videos, twice that under batched guidance; ``None`` if not known yet.
        """
        if config.num_heads % self.ulysses:
            yield (
                f"ulysses={self.ulysses} cuts the heads of attention, and {config.num_heads} heads "
                f"do not divide by {self.ulysses}"
            )
        if rows is not None and rows % self.data:
            yield (
                f"data={self.data} cuts the rows of a batch, and this one has {rows}: one a video, "
                "two with `batched_guidance`"
            )

    def require(
        self, config: TransformerConfig, *, devices: int | None = None, rows: int | None = None
    ) -> None:
        """Refuse a plan that a transformer cannot run by.

        Args:
            config: of the transformer.
            devices: that there are.
            rows: as of :meth:`problems`.

        Raises:
            RequestError: says why, and the nearest plans that are legal.
        """
        if devices is not None and self.devices > devices:
            found = "1 device" if devices == 1 else f"{devices} devices"
            raise RequestError(
                f"`mesh` {self} has {self.devices} devices, and JAX finds {found}; legal are "
                f"{_listed(self.nearest(config, rows, devices))}"
            )
        if problems := list(self.problems(config, rows)):
            raise RequestError(
                f"`mesh` {self}: {'; '.join(problems)}; legal with as many devices are "
                f"{_listed(self.nearest(config, rows))}"
            )

    def nearest(
        self, config: TransformerConfig, rows: int | None = None, devices: int | None = None
    ) -> list["MeshPlan"]:
        """The legal plans with as many devices (or ``devices``) that differ the least."""

        def distance(other: MeshPlan) -> tuple[float, int, int]:
            ratios = (math.log2(other.size(axis) / self.size(axis)) for axis in MESH_AXES)
            return sum(map(abs, ratios)), other.data, other.ring

        legal = [
            plan
            for plan in all_plans(devices or self.devices)
            if not list(plan.problems(config, 1 if rows is None else rows))
        ]
        return sorted(legal, key=distance)[:_SHOWN]

    def __str__(self) -> str:
        sizes = [f"{axis}={size}" for axis, size in asdict(self).items() if size > 1]
        return ",".join(sizes) or "data=1"


def all_plans(devices: int) -> list[MeshPlan]:
    """Every plan with so many devices, legal or not."""
    divisors = [size for size in range(1, devices + 1) if devices % size == 0]
    return [
        MeshPlan(devices // (fsdp * ring * ulysses), fsdp, ring, ulysses)
        for fsdp in divisors
        for ring in divisors
        for ulysses in divisors
        if devices % (fsdp * ring * ulysses) == 0
    ]


def choose_plan(devices: int, config: TransformerConfig) -> tuple[MeshPlan, str]:
    """The plan that communicates least for one video, and why.

    Exchanging heads moves each token twice a layer, however many devices there are; so as many as
    the heads allow are in ``ulysses``. The rest gather keys and values (``fsdp``).
    """
    ulysses = max(n for n in range(1, devices + 1) if devices % n == config.num_heads % n == 0)
    plan = MeshPlan(fsdp=devices // ulysses, ulysses=ulysses)
    reason = f"auto: {devices} devices, of which {config.num_heads} heads divide by {ulysses}"
    return plan, reason


def _listed(plans: list[MeshPlan]) -> str:
    return ", ".join(map(str, plans)) or "none"
