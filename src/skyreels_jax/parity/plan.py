"""What is run on both sides: decided before anything is loaded, and written beside the results."""

import dataclasses
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, cast

import numpy as np

from skyreels_jax.checkpoints import Checkpoint
from skyreels_jax.errors import RequestError
from skyreels_jax.generation.request.resolve import resolve
from skyreels_jax.generation.request.resolved import ResolvedRequest
from skyreels_jax.generation.request.settings import Request
from skyreels_jax.media import RgbImage
from skyreels_jax.parity.activation_sites import LAYERS, Layers

# In the order of their work.
SIDE_NAMES: Final = ("reference", "bf16_baseline", "jax")
_REFERENCES: Final = ("diffusers", "original-numerics", "hybrid")
_DTYPES: Final = ("float32", "bfloat16")


@dataclass(frozen=True, kw_only=True)
class ParityPlan:
    """The settings of all tests; each has its own seed, and an image where the task takes one.

    Attributes:
        model: folder of the checkpoint.
        preset: name of the released checkpoint, where its files do not say.
        reference: the other side: ``diffusers``, ``original-numerics`` or ``hybrid``.
        dtype: to compute in; in bfloat16 the reference is still PyTorch in float32, and PyTorch in
            bfloat16 is the bf16 baseline.
        device: of PyTorch.
        layers: what is recorded.
        traced: steps at which the transformers' activations are compared.
    """

    model: str
    preset: str | None
    task: str
    prompts: tuple[str, ...]
    negative_prompt: str
    seeds: tuple[int, ...]
    height: int
    width: int
    num_frames: int
    steps: int
    guidance_scale: float
    shift: float
    fps: int
    reference: str = "diffusers"
    dtype: str = "float32"
    device: str = "cpu"
    layers: Layers = "all"
    traced: tuple[int, ...] = (0,)

    @property
    def tests(self) -> range:
        """The numbers of the tests."""
        return range(len(self.seeds))

    def checkpoint(self) -> Checkpoint:
        """Open the checkpoint."""
        return Checkpoint.open(self.model, preset=self.preset)

    def request(self, test: int, image: RgbImage | None) -> ResolvedRequest:
        """Resolve the request for a test's video."""
        asked = Request(
            prompt=self.prompts[test],
            negative_prompt=self.negative_prompt,
            image=image,
            height=self.height,
            width=self.width,
            num_frames=self.num_frames,
            steps=self.steps,
            guidance_scale=self.guidance_scale,
            shift=self.shift,
            fps=self.fps,
            seed=self.seeds[test],
            dtype=self.dtype,
            base_num_frames=self.num_frames if self.task == "df" else None,
        )
        return resolve(asked, self.checkpoint())

    def save(self, path: Path) -> None:
        """Write the plan as JSON."""
        path.write_text(json.dumps(dataclasses.asdict(self), indent=2, ensure_ascii=False), "utf-8")

    @classmethod
    def load(cls, path: Path) -> "ParityPlan":
        """Read what :meth:`save` has written."""
        values = json.loads(path.read_text("utf-8"))
        lists = {name: tuple(values[name]) for name in ("prompts", "seeds", "traced")}
        return cls(**(values | lists))


def plan_comparison(
    model: Path,
    *,
    num_tests: int = 1,
    seed: int = 0,
    reference: str = "diffusers",
    dtype: str = "float32",
    layers: str = "all",
    device: str = "cpu",
    preset: str | None = None,
    **settings: Any,
) -> ParityPlan:
    """Make a plan from flags; what is not given comes from the checkpoint.

    Args:
        model: folder of the checkpoint.
        num_tests: each has the next seed.
        seed: of the first test.
        reference: the other side, as of :class:`ParityPlan`.
        dtype: ``float32`` or ``bfloat16``.
        layers: what is recorded.
        device: of PyTorch.
        preset: as of :meth:`Checkpoint.open`.
        **settings: settings of a :class:`Request`. The prompt is that of all tests; so is the
            image, and otherwise one is drawn for each, where the task takes one.

    Raises:
        RequestError: with everything that is wrong.
        WeightsError: there is no checkpoint.
    """
    prompt: str = settings.pop("prompt", "a red ball rolls over green grass")
    image: RgbImage | None = settings.pop("image", None)
    for name, value, known in (
        ("reference", reference, _REFERENCES),
        ("dtype", dtype, _DTYPES),
        ("layers", layers, LAYERS),
    ):
        if value not in known:
            raise RequestError(f"--{name} {value!r} does not exist; there are {', '.join(known)}")
    if (reference, dtype) == ("hybrid", "bfloat16"):
        raise RequestError(
            "--reference hybrid has no bf16 baseline: compare it with --dtype float32"
        )
    if num_tests < 1:
        raise RequestError(f"--num_tests {num_tests} must be at least 1")
    checkpoint = Checkpoint.open(model, preset=preset)
    if checkpoint.task == "flf2v":
        raise RequestError("first-last-frame checkpoints cannot be compared: diffusers has none")
    stand_in = image
    if image is None and checkpoint.task == "i2v":
        stand_in = np.zeros((64, 64, 3), np.uint8)
    frames = settings.get("num_frames") or checkpoint.defaults.num_frames.value
    at_once = frames if checkpoint.task == "df" else None
    request = Request(
        prompt=prompt, image=stand_in, seed=seed, dtype=dtype, base_num_frames=at_once, **settings
    )
    asked = resolve(request, checkpoint)
    names = ("height", "width", "num_frames", "steps", "guidance_scale", "shift", "fps")
    return ParityPlan(
        model=str(model),
        preset=preset,
        task=checkpoint.task,
        prompts=(prompt,) * num_tests,
        negative_prompt=asked.negative_prompt,
        seeds=tuple(range(seed, seed + num_tests)),
        reference=reference,
        dtype=dtype,
        device=device,
        layers=cast(Layers, layers),
        traced=tuple(sorted({0, asked.steps // 2, asked.steps - 1})),
        **{name: getattr(asked, name) for name in names},
    )


def side_names(plan: ParityPlan, only: str | None = None) -> list[str]:
    """Return the sides that a plan takes, in order; ``only`` is ``jax`` or ``torch``."""
    if only is not None:
        return ["reference"] if only == "torch" else ["jax"]
    has_baseline = plan.dtype == "bfloat16" and plan.reference != "hybrid"
    return [side for side in SIDE_NAMES if has_baseline or side != "bf16_baseline"]


def synthetic_image(seed: int, height: int, width: int) -> RgbImage:
    """Draw a smooth picture with one disc in it, decided by the seed."""
    rng = np.random.default_rng([seed, 1])
    y, x = np.mgrid[0 : 1 : 1j * height, 0 : 1 : 1j * width]
    corners = rng.uniform(0, 255, (2, 2, 3))
    weights = np.stack([(1 - y) * (1 - x), (1 - y) * x, y * (1 - x), y * x])
    picture = np.einsum("khw,kc->hwc", weights, corners.reshape(4, 3))
    centre, radius = rng.uniform(0.3, 0.7, 2), rng.uniform(0.15, 0.25)
    inside = (y - centre[0]) ** 2 + (x - centre[1]) ** 2 < radius**2
    picture[inside] = rng.uniform(0, 255, 3)
    return np.rint(picture).astype(np.uint8)
