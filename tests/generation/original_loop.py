"""The original's diffusion forcing, transcribed in PyTorch: solver, timestep matrix and loop.

Written from a description of what it does. PyTorch, because it matters which tensors share memory:
the loop hands its solver a view of the latents, the solver remembers that view as the sample its
first step started from, and the loop then overwrites it.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

Pixels = np.ndarray  # [3, T, height, width] in [-1, 1]


class Network(Protocol):
    """The transformer as the loop sees it."""

    # That stands before it, if one does; the loop sets its counter's end.
    cache: "TeaCache | None"

    def __call__(self, x: Tensor, t: Tensor, *, positive: bool) -> Tensor:
        """The velocity of latents ``[1, 16, F, H, W]`` at timesteps ``[1, F]``."""
        ...


@dataclass
class TeaCache:
    """The original's TeaCache: what it counts and remembers, and which calls it lets run.

    Attributes:
        threshold: of the sum of estimates.
        coefficients: highest power first.
        projected: whether it looks at the projected embedding, and keeps ten calls in place of two.
        ran: of each call, whether the blocks ran.
    """

    threshold: float
    coefficients: Sequence[float]
    projected: bool
    num_steps: int = 0
    cutoff: int = 0
    count: int = 0
    sums: list[float] = field(default_factory=lambda: [0.0, 0.0])
    before: list[np.ndarray | None] = field(default_factory=lambda: [None, None])
    residuals: list[np.ndarray | None] = field(default_factory=lambda: [None, None])
    ran: list[bool] = field(default_factory=list)

    def begin(self, num_steps: int) -> None:
        """Set up by the script, for a number of steps that it works out."""
        self.num_steps = num_steps
        self.cutoff = 2 * num_steps - (0 if self.projected else 2)

    def blocks(
        self,
        embedding: np.ndarray,
        tokens: np.ndarray,
        run: Callable[[], np.ndarray],
    ) -> np.ndarray:
        """The tokens behind the blocks, which ``run`` if the decision is so."""
        parity = self.count % 2
        if self.count < (10 if self.projected else 2) or self.count >= self.cutoff:
            computes = True
        else:
            last = self.before[parity]
            assert last is not None
            if last.shape != embedding.shape:
                raise ValueError("windows of different lengths")
            ratio = float(np.abs(embedding - last).mean() / np.abs(last).mean())
            self.sums[parity] += float(np.poly1d(self.coefficients)(ratio))
            computes = not self.sums[parity] < self.threshold
        if computes:
            self.sums[parity] = 0.0
        self.before[parity] = embedding
        self.count = 0 if self.count + 1 >= self.num_steps else self.count + 1
        self.ran.append(computes)
        if not computes:
            residual = self.residuals[parity]
            assert residual is not None
            return tokens + residual
        made = run()
        self.residuals[parity] = made - tokens
        return made


@dataclass(frozen=True)
class Given:
    """What the original's pipeline is asked for.

    ``image``, ``end_image`` and ``video`` are pixels at the size of the video. ``copied`` is not
    the original's: the solver is given a copy of the sample.
    """

    num_frames: int
    size: tuple[int, int]
    steps: int
    shift: float
    guidance_scale: float
    seed: int
    base_num_frames: int = 97
    overlap_history: int | None = None
    ar_step: int = 0
    causal_block_size: int = 1
    image: Pixels | None = None
    end_image: Pixels | None = None
    video: Pixels | None = None
    copied: bool = False

    @property
    def latents(self) -> int:
        """Latent frames of the video that is made."""
        return _latents(self.num_frames)


@dataclass(frozen=True)
class Models:
    """The network and the two directions of the VAE."""

    network: Network
    encode: Callable[[Pixels], np.ndarray]
    decode: Callable[[np.ndarray], Pixels]

    def encoded(self, pixels: Pixels) -> Tensor:
        """Latents ``[16, F, H, W]`` of pixels."""
        return torch.tensor(self.encode(pixels))


class UniPC:
    """The solver of one latent frame, order 2, with its corrector; float32 throughout."""

    def __init__(self, steps: int, shift: float, *, copied: bool):
        line = np.linspace(float(np.float32(0.999)), 0.0, steps + 1)[:-1]
        sigmas = shift * line / (1 + (shift - 1) * line)
        self.timesteps = torch.tensor((1000 * sigmas).astype(np.int64))
        self.sigmas = torch.tensor(np.append(sigmas, 0.0).astype(np.float32))
        self.steps, self.copied = steps, copied
        self.index: int | None = None
        self.order = 0
        self.last: Tensor | None = None
        self.estimates: list[Tensor] = []

    def step(self, velocity: Tensor, timestep: Tensor, sample: Tensor) -> Tensor:
        """The sample after a step; what is given is remembered as it is, view or not."""
        if self.index is None:
            self.index = int((self.timesteps == timestep).nonzero()[0])
        estimate = sample - self.sigmas[self.index] * velocity
        if self.last is not None:
            sample = self.corrected(self.index, self.last, estimate)
        self.estimates = [*self.estimates[-1:], estimate]
        self.order = min(2, self.index + 1, self.steps - self.index)
        self.last = sample.clone() if self.copied else sample
        self.index += 1
        return self.predicted(self.index, sample)

    def log_snr(self, index: int) -> Tensor:
        """Half the logarithm of the ratio of signal to noise, up to a factor."""
        return torch.log(1 - self.sigmas[index]) - torch.log(self.sigmas[index])

    def corrected(self, i: int, last: Tensor, estimate: Tensor) -> Tensor:
        """The sample at ``i`` anew from the one before, now that its own estimate is known."""
        h = self.log_snr(i) - self.log_snr(i - 1)
        b = torch.expm1(-h)
        weight = (1 - self.sigmas[i]) * b
        before = self.estimates[-1]
        base = self.sigmas[i] / self.sigmas[i - 1] * last - weight * before
        if self.order == 1:
            return base - weight * 0.5 * (estimate - before)
        r = (self.log_snr(i - 2) - self.log_snr(i - 1)) / h
        first = b / -h - 1
        second = first / -h - 0.5
        system = torch.stack([torch.ones(2), torch.stack([r, torch.tensor(1.0)])])
        rho = torch.linalg.solve(system, torch.stack([first / b, 2 * second / b]))
        change = (self.estimates[-2] - before) / r
        return base - weight * (rho[0] * change + rho[1] * (estimate - before))

    def predicted(self, i: int, sample: Tensor) -> Tensor:
        """The sample at ``i`` from the one before."""
        now = self.estimates[-1]
        if i == self.steps:
            return now.clone()
        h = self.log_snr(i) - self.log_snr(i - 1)
        weight = (1 - self.sigmas[i]) * torch.expm1(-h)
        following = self.sigmas[i] / self.sigmas[i - 1] * sample - weight * now
        if self.order == 2:
            r = (self.log_snr(i - 2) - self.log_snr(i - 1)) / h
            following = following - weight * 0.5 * (self.estimates[-2] - now) / r
        return following


def timestep_matrix(
    frames: int, timesteps: Tensor, *, ar_step: int, ready: int, block: int
) -> tuple[Tensor, Tensor]:
    """Timesteps and what is updated, ``[rows, frames]`` each; frames behind a whole block lack."""
    blocks, done = frames // block, len(timesteps) + 1
    template = torch.cat([torch.tensor([999]), timesteps, torch.tensor([0])])
    state = [done if i < ready // block else 0 for i in range(blocks)]
    told, moved = [], []
    while min(state) < done - 1:
        following: list[int] = []
        for i, index in enumerate(state):
            leads = i == 0 or state[i - 1] >= done - 1
            following.append(index + 1 if leads else following[i - 1] - ar_step)
        following = [min(max(index, 0), done) for index in following]
        moved.append([new not in (old, done) for new, old in zip(following, state, strict=True)])
        told.append(template[torch.tensor(following)])
        state = following
    repeated = (torch.stack(told), torch.tensor(moved))
    return tuple(table.repeat_interleave(block, dim=1) for table in repeated)  # pyright: ignore


def make(models: Models, given: Given) -> Pixels:
    """The whole video: short, in windows, or the continuation of another."""
    generator = torch.Generator().manual_seed(given.seed)
    network, overlap = models.network, given.overlap_history
    if network.cache is not None:
        blocks = _latents(given.base_num_frames) // given.causal_block_size
        network.cache.begin(given.steps + (blocks - 1) * given.ar_step * (given.ar_step > 0))
    prefix = None if given.image is None else models.encoded(given.image)
    if given.video is None and (overlap is None or given.num_frames <= given.base_num_frames):
        end = None if given.end_image is None else models.encoded(given.end_image)
        return models.decode(_window(network, given, given.latents, generator, prefix, end).numpy())
    assert overlap is not None
    size, shared = _latents(given.base_num_frames), _latents(overlap)
    windows = 1 + (given.latents - size - 1) // (size - shared) + 1
    output = given.video
    for number in range(windows):
        frames = size
        if output is not None:
            prefix = models.encoded(output[:, -overlap:])
            left = given.latents - number * (size - shared) - shared
            frames = min(left + shared, size)
            if network.cache is not None and given.ar_step > 0:
                blocks = (frames - shared) // given.causal_block_size
                network.cache.num_steps = given.steps + (blocks - 1) * given.ar_step
        made = models.decode(_window(network, given, frames, generator, prefix, None).numpy())
        made = np.clip(made, -1, 1)
        output = made if output is None else np.concatenate([output, made[:, overlap:]], axis=1)
    assert output is not None
    return output


def _window(
    network: Network,
    given: Given,
    frames: int,
    generator: torch.Generator,
    prefix: Tensor | None,
    end: Tensor | None,
) -> Tensor:
    """The latents of one window, ``[16, frames, H, W]``."""
    height, width = given.size
    latents = torch.randn((16, frames, height // 8, width // 8), generator=generator)
    ready = 0
    if prefix is not None:
        ready = prefix.shape[1]
        latents[:, :ready] = prefix
    if end is not None:
        latents = torch.cat([latents, end], dim=1)
    block, columns = given.causal_block_size, latents.shape[1]
    timesteps = UniPC(given.steps, given.shift, copied=False).timesteps
    told, moved = timestep_matrix(
        columns, timesteps, ar_step=given.ar_step, ready=ready, block=block
    )
    if end is not None:
        told[:, -1], moved[:, -1] = 0, False
    solvers = [UniPC(given.steps, given.shift, copied=given.copied) for _ in range(columns)]
    for t, moves in zip(told, moved, strict=True):
        x = latents[None].clone()
        velocity = network(x, t[None], positive=True)
        if given.guidance_scale > 1:
            negative = network(x, t[None], positive=False)
            velocity = negative + given.guidance_scale * (velocity - negative)
        for frame in range(columns):
            if moves[frame]:
                # A view goes in; what comes out is written over it.
                latents[:, frame] = solvers[frame].step(
                    velocity[0, :, frame], t[frame], latents[:, frame]
                )
    return latents[:, :frames]


def _latents(frames: int) -> int:
    return (frames - 1) // 4 + 1
