"""The report as one HTML file that opens anywhere, with nothing beside it.

The page is ``report.html.jinja``; this module formats the numbers in it and embeds the files.
"""

import base64
import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Final
from urllib.parse import quote

from skyreels_jax.files import write_text
from skyreels_jax.parity.recording import JsonObject

# Browsers grow slow with larger videos in a page; base64 makes them a third larger still.
EMBEDDED_BYTES: Final = 20_000_000
# Tables of layers with more rows are folded until they are asked for or a row has failed.
UNFOLDED_ROWS: Final = 60

# What each drawing shows, in words for those who cannot see it.
_DRAWINGS: Final = {
    "Error by layer": "Line chart: relative L2 error of every layer in the order of execution, on "
    "a logarithmic axis, with the tolerance. The numbers stand in the table of layers.",
    "Error over steps": "Line chart: relative L2 error of the velocity and of the latents at every "
    "denoising step, on a logarithmic axis. The numbers stand in the table of layers.",
    "Quality by frame": "Two line charts: PSNR in dB and SSIM of every frame, one line for each "
    "test. The numbers of whole videos stand in the table at the top.",
    "Times": "Bar charts: seconds of PyTorch and of JAX to load and compile once, and for every "
    "run. The numbers stand in the table of times.",
    "Memory": "Bar chart: peak memory of PyTorch and of JAX in MiB. The numbers stand in the table "
    "of times.",
}
# Heading, key, and digits after the point: of videos, and of a side's times.
_MEASURES: Final = (
    ("PSNR (dB)", "psnr", 2),
    ("SSIM", "ssim", 5),
    ("Largest difference", "max_difference", 1),
    ("95th percentile", "p95", 1),
    ("99th percentile", "p99", 1),
)
_TIMES: Final = (
    ("Load (s)", "load", 2),
    ("Compile (s)", "compile", 2),
    ("Run, median (s)", "median", 3),
    ("Peak memory (MiB)", "peak_mib", 0),
)


def write_html(
    path: Path, report: JsonObject, plots: Mapping[str, Path], videos: Sequence[Path]
) -> None:
    """Write the report as one self-contained HTML file. It needs jinja2 (``validation`` extra).

    Args:
        path: of the file.
        report: what ``report.json`` holds.
        plots: PNG files by their captions. Those that are known, and the same with more after a
            comma (``"Error by layer, test 1"``), are described to those who cannot see them.
        videos: MP4 files. Those above 20 MB are linked by name and must stay beside the report.
    """
    from jinja2 import Environment, PackageLoader, StrictUndefined

    environment = Environment(
        loader=PackageLoader("skyreels_jax.parity", ""), autoescape=True, undefined=StrictUndefined
    )
    formats = (_as_text, _count, _fixed, _measure, _scientific)
    environment.filters |= {function.__name__.lstrip("_"): function for function in formats}
    page = environment.get_template("report.html.jinja").render(
        report=report,
        videos=[_video(video, report["tests"]) for video in videos],
        drawings=[
            (caption, _DRAWINGS.get(caption.partition(",")[0], caption), _data("image/png", plot))
            for caption, plot in plots.items()
        ],
        measures=_MEASURES,
        times=_TIMES,
        unfolded_rows=UNFOLDED_ROWS,
    )
    # What a terminal passed as broken text has no UTF-8.
    write_text(path, page.encode("utf-8", "replace").decode("utf-8") + "\n")


def _video(video: Path, tests: Sequence[JsonObject]) -> JsonObject:
    owners = {test["video"]: f": test {n}, seed {test['seed']}" for n, test in enumerate(tests)}
    size = video.stat().st_size
    return {
        "caption": video.name + owners.get(video.name, ""),
        "link": quote(video.name),
        "size": f"{size / 1e6:.1f}",
        "source": None if size > EMBEDDED_BYTES else _data("video/mp4", video),
    }


def _data(kind: str, path: Path) -> str:
    return f"data:{kind};base64,{base64.b64encode(path.read_bytes()).decode('ascii')}"


def _as_text(value: object) -> str:
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False, default=str)


def _measure(values: JsonObject | None, key: str, digits: int) -> str:
    if values is None:
        return "–"
    if key == "psnr" and values[key] in (None, math.inf):
        return "equal"
    return _fixed(values[key], digits)


def _fixed(value: float | int | None, digits: int) -> str:
    return "–" if value is None else f"{value:.{digits}f}"


def _scientific(value: float | int | None) -> str:
    return "–" if value is None else "0" if value == 0 else f"{value:.2e}"


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"
