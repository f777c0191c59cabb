"""Drawings of a validation's numbers, as PNG files that are legible 900 pixels wide.

Layers, tests and timings are the mappings of the same names in ``report.json``. The colours are
those of Okabe and Ito (2008), which people with any common colour blindness can tell apart.
"""

import math
import re
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, Literal

from skyreels_jax.files import whole_file
from skyreels_jax.parity.recording import JsonObject

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_BLUE: Final = "#0072B2"
_ORANGE: Final = "#E69F00"
_GREEN: Final = "#009E73"
_VERMILLION: Final = "#D55E00"
_PURPLE: Final = "#CC79A7"
_SKY: Final = "#56B4E9"
_BLACK: Final = "#000000"
_SERIES: Final = (_BLUE, _ORANGE, _GREEN, _PURPLE, _SKY, _BLACK)
_MARKERS: Final = "os^DvP"
_GREY: Final = "#767676"
# More names than this along one axis run into each other at 900 pixels.
_MOST_TICKS: Final = 26
# More signs than this in one drawing hide each other; lines alone remain.
_MOST_SIGNS: Final = 1000
# Longer legends cover what they explain.
_MOST_ENTRIES: Final = 6
_SIDES: Final = (("torch", "PyTorch"), ("jax", "JAX"))
_ERROR_LABEL: Final = "relative L2 error"

_Number = float | int


def layer_errors(path: Path, layers: Sequence[JsonObject], title: str) -> None:
    """Draw the relative L2 error of every layer in the order of execution, one series a step.

    Where a layer has several tolerances the smallest is drawn, and of its bf16 baselines the
    largest. Errors of exactly zero stand at the lower edge of the logarithmic axis and those that
    are not finite at the upper edge, each with a sign of its own.
    """
    names = list(dict.fromkeys(layer["name"] for layer in layers))
    index_of = {name: index for index, name in enumerate(names)}
    figure = _figure(5.6)
    axes = figure.subplots()
    _log_axis(axes, [layer[key] for layer in layers for key in ("relative_l2", "budget")])
    steps = list(dict.fromkeys(layer["step"] for layer in layers))
    for number, step in enumerate(steps):
        here = [layer for layer in layers if layer["step"] == step]
        label = "error" if step is None else f"error, step {step}"
        axes.plot(
            [index_of[layer["name"]] for layer in here],
            [_or_gap(layer["relative_l2"]) for layer in here],
            color=_step_colour(number, len(steps)),
            marker="o" if len(layers) <= _MOST_SIGNS else "",
            markersize=3,
            linewidth=1,
            label=label if _is_named(number, len(steps)) else None,
        )
    _draw_limits(axes, layers, names)
    _edge_marks(axes, [(index_of[layer["name"]], layer["relative_l2"]) for layer in layers])
    failed = [layer for layer in layers if not layer["passed"]]
    if failed:
        positions = [index_of[layer["name"]] for layer in failed]
        errors = [_or_gap(layer["relative_l2"]) for layer in failed]
        axes.plot(positions, errors, "o", color=_VERMILLION, mfc="none", ms=9, label="failed")
    ticks = _ticks(names)
    axes.set_xticks([index for index, _ in ticks], [label for _, label in ticks])
    axes.tick_params(axis="x", labelrotation=90, labelsize=8)
    axes.set(title=title, xlabel="layer, in order of execution", ylabel=_ERROR_LABEL)
    _legend(axes)
    _save(figure, path)


def errors_over_steps(path: Path, layers: Sequence[JsonObject]) -> None:
    """Draw the relative L2 error of what a step ends with, and of the latents, over the steps.

    What a step ends with is the layer ``velocity``, or else the last layer other than ``latents``.
    """
    stepped = [layer for layer in layers if layer["step"] is not None]
    names = list(dict.fromkeys(layer["name"] for layer in stepped))
    others = [name for name in names if name != "latents"]
    last = "velocity" if "velocity" in names else (others[-1] if others else None)
    figure = _figure(4)
    axes = figure.subplots()
    shown = [layer for layer in stepped if layer["name"] in (last, "latents")]
    _log_axis(axes, [layer[key] for layer in shown for key in ("relative_l2", "budget")])
    for name, colour, marker in ((last, _BLUE, "o"), ("latents", _ORANGE, "s")):
        here = sorted((x for x in shown if x["name"] == name), key=lambda x: x["step"])
        if not here:
            continue
        steps = [layer["step"] for layer in here]
        errors = [_or_gap(layer["relative_l2"]) for layer in here]
        axes.plot(steps, errors, color=colour, marker=marker, label=name)
        budgets = [_or_gap(layer["budget"]) for layer in here]
        # A line through one point is not seen.
        dash = "_--" if len(here) == 1 else "--"
        axes.plot(steps, budgets, dash, color=colour, markersize=14, label=f"tolerance of {name}")
    _edge_marks(axes, [(layer["step"], layer["relative_l2"]) for layer in shown])
    _count_along(axes)
    axes.set(title="Error over the denoising steps", xlabel="step", ylabel=_ERROR_LABEL)
    _legend(axes)
    if not shown:
        _write(axes, "no step was recorded")
    _save(figure, path)


def frame_quality(path: Path, tests: Sequence[JsonObject]) -> None:
    """Draw PSNR and SSIM of every frame, one line a test and a dashed one for its bf16 baseline.

    Frames that are equal (a PSNR of None or infinity) lie on a marked line at the top.
    """
    figure = _figure(6)
    above, below = figure.subplots(2, sharex=True)
    lines = [
        (number, kind, test[kind])
        for number, test in enumerate(tests)
        for kind in ("frames", "bf16_baseline")
        if test[kind] is not None
    ]
    finite = [x for *_, values in lines for x in values["psnr_by_frame"] if _is_finite(x)]
    low, high = (min(finite), max(finite)) if finite else (30.0, 60.0)
    equal = high + max(3.0, 0.15 * (high - low))
    some_equal = False
    for number, kind, values in lines:
        decibels = [_or_equal(value, equal) for value in values["psnr_by_frame"]]
        is_own = kind == "frames"
        style: dict[str, Any] = {
            "color": _SERIES[number % len(_SERIES)],
            "linestyle": "-" if is_own else "--",
            "marker": _MARKERS[number % len(_MARKERS)] if is_own else "x",
            "markersize": 4,
            "markevery": max(1, len(decibels) // 25),
        }
        above.plot(decibels, **style, label=f"test {number}{'' if is_own else ', bf16 baseline'}")
        below.plot(values["ssim_by_frame"], **style)
        some_equal |= equal in decibels
    if some_equal:
        above.axhline(equal, color=_GREY, linewidth=2)
        where = above.get_yaxis_transform()
        above.text(1.005, equal, "equal", transform=where, va="center", fontsize=10)
    above.set(title="Frames of JAX against those of PyTorch", ylabel="PSNR (dB)")
    below.set(xlabel="frame", ylabel="SSIM (1 = equal)")
    _count_along(below)
    below.ticklabel_format(axis="y", useOffset=False)
    for axes in (above, below):
        axes.grid(alpha=0.3)
    _legend(above)
    if not lines:
        _write(above, "no frames were compared")
    _save(figure, path)


def timings(path: Path, timings: JsonObject | None) -> None:
    """Draw seconds of PyTorch beside those of JAX: what comes once, and apart from it every run."""
    figure = _figure(4)
    once, run = figure.subplots(1, 2)
    for index, (key, _) in enumerate(_SIDES):
        side = (timings or {}).get(key)
        if side is None:
            for axes in (once, run):
                _not_measured(axes, index)
            continue
        load, compilation = side["load"] or 0.0, side["compile"] or 0.0
        once.bar(index, load, color=_SKY, label="load")
        once.bar(index, compilation, bottom=load, color=_ORANGE, label="compile", hatch="//")
        _number(once, index, load + compilation, f"{load + compilation:.4g} s")
        median, dots = side["median"] or 0.0, side["runs"]
        run.bar(index, median, color=_BLUE, label="median")
        run.plot([index] * len(dots), dots, "o", color=_BLACK, markersize=4, label="one run")
        _number(run, index, max([median, *dots]), f"{median:.4g} s")
    once.set(title="Once: load and compile", ylabel="seconds")
    run.set(title="Every run", ylabel="seconds")
    for axes in (once, run):
        _finish_bars(axes)
    _save(figure, path)


def memory(path: Path, timings: JsonObject | None) -> None:
    """Draw the most memory PyTorch and JAX held at a time, in MiB."""
    figure = _figure(3.6)
    axes = figure.subplots()
    for index, (key, _) in enumerate(_SIDES):
        side = (timings or {}).get(key)
        if side is None or side["peak_mib"] is None:
            _not_measured(axes, index)
            continue
        axes.bar(index, side["peak_mib"], color=(_ORANGE, _BLUE)[index], width=0.5)
        _number(axes, index, side["peak_mib"], f"{side['peak_mib']:,.0f} MiB")
    axes.set(title="Peak memory", ylabel="MiB")
    _finish_bars(axes)
    _save(figure, path)


def _figure(height: float | int) -> "Figure":
    """Make a figure 1350 pixels wide; ``height`` is in inches of 150 pixels, the width is 9."""
    from matplotlib.figure import Figure

    return Figure(figsize=(9, height), dpi=150, layout="constrained")


def _save(figure: "Figure", path: Path) -> None:
    with whole_file(path) as partial:
        figure.savefig(partial, format="png")


def _log_axis(axes: "Axes", values: Sequence[_Number | None]) -> None:
    """Make the axis logarithmic, over the values that it can show, with room at both edges."""
    shown = [value for value in values if value is not None and _is_drawable(value)]
    low, high = (min(shown), max(shown)) if shown else (1e-8, 1.0)
    axes.set_yscale("log")
    axes.set_ylim(low / 5, high * 5)
    axes.grid(axis="y", alpha=0.3)


def _draw_limits(axes: "Axes", layers: Sequence[JsonObject], names: Sequence[str]) -> None:
    """Draw the tolerances, and the bf16 baselines if there are any."""
    budgets: dict[str, float] = {}
    baselines: dict[str, float] = {}
    for layer in layers:
        name, baseline = layer["name"], layer["bf16_baseline"]
        budgets[name] = min(budgets.get(name, math.inf), layer["budget"])
        if baseline is not None:
            baselines[name] = max(baselines.get(name, 0.0), baseline)
    if baselines:
        values = [_or_gap(baselines.get(name)) for name in names]
        line = "x:" if len(names) <= _MOST_TICKS else ":"
        axes.plot(values, line, color=_GREY, ms=4, lw=1.5, label="PyTorch in bfloat16")
    values = [_or_gap(budgets[name]) for name in names]
    axes.plot(values, "--", color=_VERMILLION, drawstyle="steps-mid", label="tolerance")


def _edge_marks(axes: "Axes", points: Sequence[tuple[int, _Number | None]]) -> None:
    """Draw signs at the edges of a logarithmic axis for errors that it cannot show."""
    zero = [x for x, value in points if value == 0]
    broken = [x for x, value in points if not _is_finite(value)]
    signs = (
        (zero, 0.0, "v", _GREEN, "exactly equal"),
        (broken, 1.0, "X", _VERMILLION, "not finite"),
    )
    style: dict[str, Any] = {"transform": axes.get_xaxis_transform(), "clip_on": False}
    for positions, edge, sign, colour, label in signs:
        if positions:
            axes.plot(positions, [edge] * len(positions), sign, color=colour, **style, label=label)


def _ticks(names: Sequence[str]) -> list[tuple[int, str]]:
    """Return positions and labels along an axis: all names, or starts of blocks."""
    if len(names) <= _MOST_TICKS:
        return list(enumerate(names))
    starts: dict[str, int] = {}
    for index, name in enumerate(names):
        block = re.match(r"(.*?blocks?\.\d+)\.", name)
        starts.setdefault(block[1] if block else name, index)
    if len(starts) < _MOST_TICKS / 3:
        starts = {name: index for index, name in enumerate(names)}
    apart = len(names) / _MOST_TICKS
    kept: list[tuple[int, str]] = []
    for label, index in starts.items():
        if not kept or index - kept[-1][0] >= apart:
            kept.append((index, label))
    return kept


def _count_along(axes: "Axes") -> None:
    from matplotlib.ticker import MaxNLocator

    axes.xaxis.set_major_locator(MaxNLocator(integer=True))


def _step_colour(number: int, count: int) -> Any:
    if count <= len(_SERIES):
        return _SERIES[number]
    import matplotlib

    # Ordered like the steps, and made for colour-blind readers; its yellow end is too pale.
    return matplotlib.colormaps["cividis"](0.9 * number / (count - 1))


def _is_named(number: int, count: int) -> bool:
    """Whether a series has an entry in the legend: all, or a few evenly spread ones."""
    if count <= _MOST_ENTRIES:
        return True
    return number in {round(i * (count - 1) / (_MOST_ENTRIES - 1)) for i in range(_MOST_ENTRIES)}


def _legend(axes: "Axes", below: Literal["figure", "axes"] = "figure") -> None:
    """Explain each label once, below the figure or the axes, so that no point is hidden."""
    handles, labels = axes.get_legend_handles_labels()
    unique = dict(zip(labels, handles, strict=True))
    if not unique:
        return
    entries = {"handles": unique.values(), "labels": unique.keys(), "frameon": False}
    if below == "axes":
        axes.legend(**entries, loc="upper center", bbox_to_anchor=(0.5, -0.1), ncols=2)
    else:
        axes.figure.legend(**entries, loc="outside lower center", ncols=4)


def _finish_bars(axes: "Axes") -> None:
    axes.set_xticks(range(len(_SIDES)), [label for _, label in _SIDES])
    axes.set_xlim(-0.6, len(_SIDES) - 0.4)
    axes.use_sticky_edges = False  # a bar of no height would hold the axis' end at its own
    axes.margins(y=0.15)
    axes.set_ylim(bottom=0)
    axes.grid(axis="y", alpha=0.3)
    axes.set_axisbelow(True)
    _legend(axes, "axes")


def _number(axes: "Axes", x: int, y: _Number, text: str) -> None:
    """Write the number of a bar above it."""
    axes.annotate(text, (x, y), (0, 6), textcoords="offset points", ha="center", fontsize=10)


def _not_measured(axes: "Axes", x: int) -> None:
    where = axes.get_xaxis_transform()
    axes.text(x, 0.02, "not measured", transform=where, ha="center", color=_GREY)


def _write(axes: "Axes", text: str) -> None:
    axes.text(0.5, 0.5, text, transform=axes.transAxes, ha="center", va="center", color=_GREY)


def _is_finite(value: _Number | None) -> bool:
    return value is not None and math.isfinite(value)


def _is_drawable(value: _Number | None) -> bool:
    """Whether a logarithmic axis can show the value."""
    return value is not None and math.isfinite(value) and value > 0


def _or_gap(value: _Number | None) -> _Number:
    """Return the value, or what leaves a gap in a line on a logarithmic axis."""
    return value if value is not None and _is_drawable(value) else math.nan


def _or_equal(value: _Number | None, equal: _Number) -> _Number:
    return equal if value is None or value == math.inf else value
