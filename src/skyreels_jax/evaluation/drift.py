"""Whether a video drifts: likeness over distances in time, brightness, colour and sharpness.

Everything is measured while frames pass, in memory that does not grow with their number, from the
pixels alone. It tells that something changes and what, not whether it should: a sunset drifts too.

- Similarity of frames ``d`` apart: Pearson's correlation of the luma of both, averaged over squares
  to at most 64 pixels a side (normalised cross-correlation without a shift: Lewis, "Fast Normalized
  Cross-Correlation", 1995). Brightness and contrast leave it as it is.
- Brightness and colour: the means of luma, Cb and Cr of BT.709 over those squares, of values from 0
  to 1; saturation is the mean length of (Cb, Cr).
- Sharpness: the root mean square of second differences along 64 rows and 64 columns, over the
  standard deviation there, both of green; a sum of modified Laplacians (Nayar and Nakagawa, "Shape
  from Focus", 1994) that contrast leaves as it is.
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from fractions import Fraction
from typing import Final

import numpy as np
from jaxtyping import Float, Float32

from skyreels_jax.shapes import Frames

DISTANCES: Final = (2, 5, 10, 20, 50)
_SIDE: Final = 64
# Spans of a report: their seconds double before there are more.
_MOST_SPANS: Final = 3600
# Of values from 0 to 1: a frame that spreads less is flat, and correlates with none but a flat one.
_FLAT: Final = 1 / 255
# BT.709: luma's parts of red, green and blue, and the ranges of its two differences.
_LUMA: Final = np.array([0.2126, 0.7152, 0.0722], np.float32)
_CB, _CR = 1.8556, 1.5748
_MEASURES: Final = ("brightness", "cb", "cr", "saturation", "sharpness")
# The shares of spans at both ends of a video that are held against each other.
_END: Final = 5
# What is worth a word. Brightness: 13 of 255 levels; colour: 5; sharpness: by a quarter; a jump:
# the least similarity of frames `DISTANCES[0]` apart below a half, and so far below the mean one.
_BRIGHTER, _OTHER_COLOUR, _BLURRED, _UNLIKE, _LESS_LIKE = 0.05, 0.02, 0.25, 0.5, 0.3

_Series = tuple[float | None, ...]


@dataclass(frozen=True)
class Drift:
    """What a meter has seen of a video.

    Attributes:
        frames: how many.
        fps: frames a second.
        span: seconds that each value of ``series`` is the mean of.
        series: brightness, cb, cr, saturation, sharpness, and ``similarity_D`` of frames D apart;
            None where there is no such pair.
        least: the least similarity at each distance, and the second of the later frame.
    """

    frames: int
    fps: float
    span: float
    series: dict[str, _Series]
    least: dict[int, tuple[float, float]]

    def ends(self, name: str) -> tuple[float, float]:
        """The means of a series over its first and its last fifth."""
        found = [value for value in self.series[name] if value is not None]
        count = max(1, len(found) // _END)
        return float(np.mean(found[:count])), float(np.mean(found[-count:]))

    @property
    def changes(self) -> dict[str, float]:
        """From the first fifth to the last: of brightness, colour and sharpness.

        Colour is how far the mean of (Cb, Cr) has moved, sharpness a share of the first.
        """
        first, last = self.ends("brightness")
        (cb, later_cb), (cr, later_cr) = self.ends("cb"), self.ends("cr")
        was, is_now = self.ends("sharpness")
        return {
            "brightness": last - first,
            "colour": float(np.hypot(later_cb - cb, later_cr - cr)),
            "sharpness": is_now / was - 1 if was > 0 else 0.0,
        }

    @property
    def seen(self) -> tuple[str, ...]:
        """Which of brightness, colour and sharpness drift, and whether there is a jump."""
        limits = {"brightness": _BRIGHTER, "colour": _OTHER_COLOUR, "sharpness": _BLURRED}
        found = [name for name, change in self.changes.items() if abs(change) > limits[name]]
        nearest = DISTANCES[0]
        if nearest in self.least:
            least = self.least[nearest][0]
            if least < _UNLIKE and self.mean(nearest) - least > _LESS_LIKE:
                found.append("jump")
        return tuple(found)

    def mean(self, distance: int) -> float:
        """The mean similarity of frames so far apart."""
        values = [v for v in self.series[f"similarity_{distance}"] if v is not None]
        return float(np.mean(values))

    def as_json(self) -> dict[str, object]:
        """All of it as JSON values, to four decimals."""
        return {
            "frames": self.frames,
            "fps": self.fps,
            "seen": list(self.seen),
            "changes": {name: round(value, 4) for name, value in self.changes.items()},
            "similarity": {
                str(distance): {
                    "mean": round(self.mean(distance), 4),
                    "least": round(least, 4),
                    "least_at_second": round(at, 2),
                }
                for distance, (least, at) in self.least.items()
            },
            "seconds_a_value": self.span,
            "series": {
                name: [None if value is None else round(value, 4) for value in values]
                for name, values in self.series.items()
            },
        }

    def lines(self) -> Iterator[str]:
        """What people read."""
        yield f"{self.frames} frames, {self.fps:g} a second, {self.frames / self.fps:.1f} s"
        for distance, (least, at) in self.least.items():
            yield (
                f"similarity {distance:>2} frames apart: {self.mean(distance):.3f} in the mean, "
                f"at least {least:.3f} (at {at:.1f} s)"
            )
        for name in ("brightness", "saturation", "sharpness"):
            first, last = self.ends(name)
            yield f"{name:<10} {first:.3f} at first, {last:.3f} at last"
        yield f"colour     moved by {self.changes['colour']:.3f}"
        yield f"drift      {', '.join(self.seen) or 'none seen'}"


class DriftMeter:
    """Measures frames as they pass; holds the last 50 small ones and sums of each second."""

    def __init__(self, fps: int | float | Fraction):
        self._fps = float(fps)
        self._frames = 0
        self._span = 1
        self._sums: list[np.ndarray] = []
        self._counts: list[np.ndarray] = []
        self._least: dict[int, tuple[float, float]] = {}
        # Luma of earlier small frames, each of mean 0 and length 1; zeros where it is flat.
        self._earlier: Float32[np.ndarray, "E pixels"] | None = None

    def passing(self, frames: Iterable[Frames]) -> Iterator[Frames]:
        """The same frames, measured."""
        for some in frames:
            self.add(some)
            yield some

    def add(self, frames: Frames) -> None:
        """Measure frames that follow those before.

        Args:
            frames: of one size, at least 3 x 3 pixels.
        """
        count = len(frames)
        if not count:
            return
        small = _averaged(frames)
        luma = small @ _LUMA
        cb, cr = (small[..., 2] - luma) / _CB, (small[..., 0] - luma) / _CR
        axes = (1, 2)
        measured = (
            *(luma.mean(axes), cb.mean(axes), cr.mean(axes)),
            *(np.hypot(cb, cr).mean(axes), _sharpness(frames)),
        )
        likeness = self._likeness(luma.reshape(count, -1))
        self._sum_up(np.concatenate([np.stack(measured, 1), likeness], axis=1))
        self._frames += count

    def _likeness(self, luma: Float32[np.ndarray, "T pixels"]) -> Float[np.ndarray, "T D"]:
        """The similarity of each frame to those before it; NaN where there is none so far back."""
        centred = luma - luma.mean(axis=1, keepdims=True)
        length = np.linalg.norm(centred, axis=1, keepdims=True)
        flat = length <= _FLAT * luma.shape[1] ** 0.5
        units = np.where(flat, np.float32(0), centred / np.where(flat, np.float32(1), length))
        before = self._earlier if self._earlier is not None else units[:0]
        both, known = np.concatenate([before, units]), len(before)
        found = np.full((len(units), len(DISTANCES)), np.nan)
        for column, distance in enumerate(DISTANCES):
            first = max(0, distance - known)
            new = both[known + first :]
            old = both[known + first - distance :][: len(new)]
            if not len(new):
                continue
            products = np.einsum("tp,tp->t", new, old)
            both_flat = ~new.any(axis=1) & ~old.any(axis=1)
            found[first:, column] = np.where(both_flat, 1, products)
            at = int(np.argmin(found[first:, column])) + first
            value = float(found[at, column])
            if value < self._least.get(distance, (np.inf, 0))[0]:
                self._least[distance] = value, (self._frames + at) / self._fps
        self._earlier = both[-DISTANCES[-1] :].copy()
        return found

    def _sum_up(self, values: Float[np.ndarray, "T measures"]) -> None:
        spans = ((self._frames + np.arange(len(values))) / (self._fps * self._span)).astype(int)
        for span in np.unique(spans):
            rows = values[spans == span]
            while len(self._sums) <= span:
                self._sums.append(np.zeros(rows.shape[1]))
                self._counts.append(np.zeros(rows.shape[1], int))
            self._sums[span] += np.nansum(rows, axis=0)
            self._counts[span] += np.sum(~np.isnan(rows), axis=0)
        while len(self._sums) > _MOST_SPANS:
            self._sums = _in_pairs(self._sums)
            self._counts = _in_pairs(self._counts)
            self._span *= 2

    def report(self) -> Drift:
        """What was seen so far.

        Raises:
            ValueError: there was no frame.
        """
        if not self._frames:
            raise ValueError("no frame has passed: nothing is known of drift")
        names = [*_MEASURES, *(f"similarity_{distance}" for distance in DISTANCES)]
        series: dict[str, _Series] = {
            name: tuple(
                float(sums[k] / counts[k]) if counts[k] else None
                for sums, counts in zip(self._sums, self._counts, strict=True)
            )
            for k, name in enumerate(names)
        }
        return Drift(self._frames, self._fps, float(self._span), series, dict(self._least))


def _in_pairs(values: list[np.ndarray]) -> list[np.ndarray]:
    return [sum(values[k + 1 : k + 2], values[k]) for k in range(0, len(values), 2)]


def _averaged(frames: Frames) -> Float32[np.ndarray, "T rows columns 3"]:
    """Frames averaged over squares, to at most 64 of them a side; values from 0 to 1."""
    count, height, width = frames.shape[:3]
    size = max(1, -(-max(height, width) // _SIDE))
    rows, columns = max(1, height // size), max(1, width // size)
    tall, wide = min(size, height), min(size, width)
    cut = np.ascontiguousarray(frames[:, : rows * tall, : columns * wide])
    lines = cut.reshape(count, rows, tall, columns * wide * 3).sum(axis=2, dtype=np.uint32)
    squares = lines.reshape(count, rows, columns, wide, 3).sum(axis=3, dtype=np.uint32)
    return squares.astype(np.float32) / np.float32(255 * tall * wide)


def _sharpness(frames: Frames) -> Float32[np.ndarray, " T"]:
    """Second differences over the spread, along rows and columns of green; 0 where flat."""
    count, height, width = frames.shape[:3]
    rows = np.linspace(0, height - 1, min(_SIDE, height)).astype(int)
    columns = np.linspace(0, width - 1, min(_SIDE, width)).astype(int)
    green = frames[..., 1]
    lines = (green[:, rows], green[:, :, columns].swapaxes(1, 2))
    bent = np.zeros(count, np.float32)
    spread = np.zeros(count, np.float32)
    for line in lines:
        values = line.astype(np.float32)
        second = values[..., 2:] - 2 * values[..., 1:-1] + values[..., :-2]
        bent += np.square(second).mean(axis=(1, 2))
        spread += values.reshape(count, -1).var(axis=1)
    is_flat = spread <= 2  # A variance of one squared level in each.
    return np.where(is_flat, 0, np.sqrt(bent / np.where(is_flat, 1, spread))).astype(np.float32)
