"""A validation's report as one HTML file that opens anywhere, with nothing beside it.

The page needs no script and asks for no other file, so it can be sent by mail and read offline.
"""

import base64
import json
import math
from collections.abc import Iterator, Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any, Final
from urllib.parse import quote

from skyreels_jax.files import whole_file

# Browsers grow slow with larger videos in a page; base64 makes them a third larger still.
EMBEDDED_BYTES: Final = 20_000_000
# Tables of layers with more rows are folded until they are asked for or a row has failed.
UNFOLDED_ROWS: Final = 60

SIDES: Final = (("torch", "PyTorch"), ("jax", "JAX"))
# What each drawing shows, in words for those who cannot see it.
DRAWINGS: Final = {
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
# Heading, key in `frames` and `yardstick`, digits after the point.
MEASURES: Final = (
    ("PSNR (dB)", "psnr", 2),
    ("SSIM", "ssim", 5),
    ("Largest difference", "max_difference", 1),
    ("95th percentile", "p95", 1),
    ("99th percentile", "p99", 1),
)
STYLE: Final = """
:root { color-scheme: light dark; --text: #1b1f24; --page: #fff; --soft: #f3f5f7; --line: #d0d7de;
  --dim: #57606a; --good: #00664a; --good-page: #e3f5ee; --bad: #a33b00; --bad-page: #fdeee4; }
@media (prefers-color-scheme: dark) { :root { --text: #e6edf3; --page: #0f1318; --soft: #1a2027;
  --line: #39424c; --dim: #9aa6b2; --good: #56d3a8; --good-page: #10291f; --bad: #ff9c66;
  --bad-page: #34190b; } }
* { box-sizing: border-box; }
body { margin: 0 auto; max-width: 70rem; padding: 1rem; background: var(--page);
  color: var(--text); font: 1rem/1.5 system-ui, sans-serif; overflow-wrap: anywhere; }
h1 { font-size: 1.5rem; line-height: 1.25; margin: .5rem 0 .25rem; }
h2 { font-size: 1.2rem; margin: 2.2rem 0 .6rem; }
h3 { font-size: 1rem; margin: 1.4rem 0 .4rem; }
p { margin: .4rem 0; }
.dim, figcaption { color: var(--dim); font-size: .9rem; }
.box { border-left: .4rem solid; border-radius: .3rem; padding: .7rem 1rem; margin: 1rem 0; }
.box p, .box ul, .box dl { color: var(--text); }
.box ul { margin: .4rem 0; padding-left: 1.2rem; }
.verdict { font-size: 1.2rem; font-weight: 700; margin: 0; }
.box .verdict, .box h2 { color: inherit; margin-top: 0; }
.pass { border-color: var(--good); color: var(--good); background: var(--good-page); }
.none { border-color: var(--dim); background: var(--soft); }
.fail { border-color: var(--bad); color: var(--bad); background: var(--bad-page); }
.scroll { overflow-x: auto; border: 1px solid var(--line); border-radius: .3rem; }
.tall { max-height: 34rem; overflow-y: auto; }
table { border-collapse: collapse; width: 100%; font-size: .9rem; overflow-wrap: normal; }
th, td { padding: .3rem .7rem; text-align: right; white-space: nowrap;
  font-variant-numeric: tabular-nums; border-top: 1px solid var(--line); vertical-align: top; }
thead th { background: var(--soft); }
.tall thead th { position: sticky; top: 0; }
.tall tr { scroll-margin-top: 6rem; }
thead th { white-space: normal; vertical-align: bottom; }
tbody th { font-weight: 400; }
tbody th, th.text, td.text { text-align: left; }
tr.fail td, tr.fail th { color: var(--bad); background: var(--bad-page); font-weight: 600; }
dl { display: grid; grid-template-columns: fit-content(40%) 1fr; gap: .2rem 1rem; margin: 0; }
dt { color: var(--dim); }
dd { margin: 0; white-space: pre-wrap; }
figure { margin: 1.2rem 0; }
.wide { overflow-x: auto; }
.wide img { width: 100%; min-width: 36rem; }
img, video { display: block; height: auto; border-radius: .3rem; }
video { width: 100%; background: #000; }
.films { display: grid; gap: 1rem;
  grid-template-columns: repeat(auto-fit, minmax(min(100%, 20rem), 1fr)); }
.films figure { margin: 0; }
summary { cursor: pointer; padding: .3rem 0; }
a { color: inherit; }
"""

Row = Mapping[str, Any]


def write_html(path: Path, report: Row, plots: Mapping[str, Path], videos: Sequence[Path]) -> None:
    """Write the report as one self-contained HTML file.

    Args:
        path: of the file.
        report: what ``report.json`` holds, of schema ``skyreels-jax-validation/1``.
        plots: PNG files by their captions. Those in :data:`DRAWINGS`, and the same with more after
            a comma (``"Error by layer, test 1"``), are described to those who cannot see them.
        videos: MP4 files. Those above 20 MB are linked by name and must stay beside the report.
    """
    parts = [
        *_head(report),
        *_verdict(report),
        *_findings(report["tests"]),
        *_headline(report["tests"]),
        *_films(report["tests"], videos),
        *_drawings(plots),
        *_layers(report["tests"]),
        *_timings(report["timings"]),
        *_pairs("Settings", report["settings"]),
        *_pairs("Environment", report["environment"]),
        f'<p class="dim">{escape(report["schema"])}</p>\n</main>\n</body>\n</html>',
    ]
    with whole_file(path) as partial:
        # What a terminal passed as broken text has no UTF-8.
        partial.write_text("\n".join(parts) + "\n", "utf-8", errors="replace")


def _head(report: Row) -> Iterator[str]:
    model = report["model"]
    name = escape(model["name"])
    yield '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">'
    yield '<meta name="viewport" content="width=device-width, initial-scale=1">'
    yield f"<title>{name}: validation, {escape(report['verdict'])}</title>"
    yield f"<style>{STYLE}</style>\n</head>\n<body>\n<main>"
    yield f"<h1>{name}: JAX against PyTorch</h1>"
    facts = (f"{key} {model[key]}" for key in ("task", "dtype", "reference"))
    yield f'<p class="dim">{escape(" · ".join(facts))}</p>'


def _verdict(report: Row) -> Iterator[str]:
    failures = report["failures"]
    if report["verdict"] == "fail":
        kind = "fail"
        words = "Fail" + (f": {_count(len(failures), 'check')} did not hold" if failures else "")
    elif any(test["frames"] or test["layers"] for test in report["tests"]):
        kind, words = "pass", "Pass: everything that was compared is within its tolerance"
    else:
        kind, words = "none", "Nothing was compared"
    yield f'<div class="box {kind}">\n<p class="verdict">{words}</p>'
    if failures:
        yield f"<ul>{''.join(f'<li>{escape(failure)}</li>' for failure in failures)}</ul>"
    yield "</div>"


def _findings(tests: Sequence[Row]) -> Iterator[str]:
    for number, test in enumerate(tests):
        finding = test["finding"]
        if finding is None:
            continue
        step = "" if finding["step"] is None else f", step {finding['step']}"
        yield f'<section class="box fail">\n<h2>Where test {number} departs from PyTorch</h2>\n<dl>'
        yield f"<dt>place</dt><dd><strong>{escape(finding['place'])}</strong>{step}</dd>"
        yield f"<dt>kind</dt><dd>{escape(finding['kind'])}</dd>"
        yield f"<dt>detail</dt><dd>{escape(finding['detail'])}</dd>\n</dl>\n</section>"


def _headline(tests: Sequence[Row]) -> Iterator[str]:
    yield "<h2>Videos in numbers</h2>"
    if not tests:
        yield '<p class="dim">No test was run.</p>'
        return
    yield '<p class="dim">Beside each number of JAX against PyTorch stands its yardstick: what'
    yield "rounding to bfloat16 alone changes in PyTorch. Differences are in levels of 8-bit"
    yield "colours, 0 to 255; a dash is what was not compared.</p>"
    yield f"{_region('Videos in numbers')}\n<table>\n<thead><tr>"
    yield '<th scope="col" class="text">Test</th><th scope="col">Seed</th>'
    for heading, _, _ in MEASURES:
        yield f'<th scope="col">{heading}</th><th scope="col" class="dim">yardstick</th>'
    yield "</tr></thead>\n<tbody>"
    for number, test in enumerate(tests):
        yield f'<tr><th scope="row">{number}</th><td>{test["seed"]}</td>'
        for _, key, digits in MEASURES:
            yield f"<td>{_measure(test['frames'], key, digits)}</td>"
            yield f'<td class="dim">{_measure(test["yardstick"], key, digits)}</td>'
        yield "</tr>"
    yield "</tbody>\n</table>\n</div>\n<h3>Prompts</h3>\n<dl>"
    for number, test in enumerate(tests):
        yield f"<dt>test {number}</dt><dd>{escape(test['prompt'])}</dd>"
    yield "</dl>"


def _films(tests: Sequence[Row], videos: Sequence[Path]) -> Iterator[str]:
    if not videos:
        return
    owners = {test["video"]: f"test {n}, seed {test['seed']}" for n, test in enumerate(tests)}
    yield '<h2>Videos</h2>\n<div class="films">'
    for video in videos:
        name, size = escape(video.name), video.stat().st_size
        owner = owners.get(video.name)
        caption = name if owner is None else f"{name}: {owner}"
        if size > EMBEDDED_BYTES:
            yield f'<p><a href="{quote(video.name)}">{caption}</a> ({size / 1e6:.1f} MB) is too'
            yield "large to be part of this page; the link works while the video lies beside it."
            yield "</p>"
        else:
            source = _data("video/mp4", video)
            yield f'<figure><video controls loop muted playsinline src="{source}"'
            yield f' aria-label="{caption}"></video><figcaption>{caption}</figcaption></figure>'
    yield "</div>"


def _drawings(plots: Mapping[str, Path]) -> Iterator[str]:
    if plots:
        yield "<h2>Drawings</h2>"
    for key, path in plots.items():
        caption, words = escape(key), DRAWINGS.get(key.partition(",")[0], key)
        yield f'<figure><div class="wide" tabindex="0" role="region" aria-label="{caption}">'
        yield f'<img src="{_data("image/png", path)}" alt="{escape(words)}"></div>'
        yield f"<figcaption>{caption}</figcaption></figure>"


def _layers(tests: Sequence[Row]) -> Iterator[str]:
    yield "<h2>Layers</h2>"
    for number, test in enumerate(tests):
        layers = test["layers"]
        failed = sum(not layer["passed"] for layer in layers)
        yield f"<h3>Test {number}</h3>"
        if not layers:
            yield '<p class="dim">No layer was compared.</p>'
            continue
        is_open = " open" if failed or len(layers) <= UNFOLDED_ROWS else ""
        yield f"<details{is_open}><summary>{_count(len(layers), 'comparison')}, {failed} failed"
        if failed:
            yield f' (<a href="#failed-{number}">the first of them</a>)'
        yield f"</summary>\n{_region(f'Layers of test {number}', 'scroll tall')}"
        yield from _layer_table(number, layers)
        yield "</div>\n</details>"


def _layer_table(number: int, layers: Sequence[Row]) -> Iterator[str]:
    yield '<table>\n<thead><tr><th scope="col" class="text">Layer</th><th scope="col">Step</th>'
    yield '<th scope="col" class="text">Result</th>'
    headings = ("Relative L2", "Tolerance", "Yardstick", "Largest", "Normalised", "Cosine")
    yield "".join(f'<th scope="col">{heading}</th>' for heading in headings) + "</tr></thead>"
    yield "<tbody>"
    keys = ("relative_l2", "budget", "yardstick", "max_abs", "normalised")
    first = True
    for layer in layers:
        mark = ""
        if not layer["passed"]:
            mark = f' class="fail" id="failed-{number}"' if first else ' class="fail"'
            first = False
        step = "–" if layer["step"] is None else layer["step"]
        result = "passed" if layer["passed"] else "FAILED"
        yield f'<tr{mark}><th scope="row">{escape(layer["name"])}</th><td>{step}</td>'
        yield f'<td class="text">{result}</td>'
        yield "".join(f"<td>{_scientific(layer[key])}</td>" for key in keys)
        yield f"<td>{_fixed(layer['cosine'], 8)}</td></tr>"
    yield "</tbody>\n</table>"


def _timings(timings: Row | None) -> Iterator[str]:
    yield "<h2>Time and memory</h2>"
    if timings is None:
        yield '<p class="dim">Not measured.</p>'
        return
    sides = [timings[key] for key, _ in SIDES]
    yield _region("Time and memory")
    yield '<table>\n<thead><tr><th class="text" scope="col">Measure</th>'
    yield "".join(f'<th scope="col">{label}</th>' for _, label in SIDES) + "</tr></thead>\n<tbody>"
    rows = (
        *(("Load (s)", "load", 2), ("Compile (s)", "compile", 2)),
        *(("Run, median (s)", "median", 3), ("Peak memory (MiB)", "peak_mib", 0)),
    )
    for heading, key, digits in rows:
        cells = (_fixed(None if side is None else side[key], digits) for side in sides)
        yield f'<tr><th scope="row">{heading}</th>'
        yield "".join(f"<td>{cell}</td>" for cell in cells) + "</tr>"
    runs = (", ".join(_fixed(run, 3) for run in side["runs"]) if side else "–" for side in sides)
    yield '<tr><th scope="row">Every run (s)</th>'
    yield "".join(f"<td>{run}</td>" for run in runs) + "</tr>\n</tbody>\n</table>\n</div>"
    medians = [side["median"] for side in sides if side and side["median"]]
    if len(medians) == len(SIDES):
        times = medians[1] / medians[0]
        yield f"<p>A run of JAX takes {times:.2f} times as long as one of PyTorch.</p>"


def _pairs(heading: str, values: Row) -> Iterator[str]:
    yield f"<h2>{heading}</h2>\n<dl>"
    for key, value in values.items():
        text = (
            value if isinstance(value, str) else json.dumps(value, ensure_ascii=False, default=str)
        )
        yield f"<dt>{escape(key)}</dt><dd>{escape(text)}</dd>"
    yield "</dl>"


def _region(label: str, kind: str = "scroll") -> str:
    """The start of a part that scrolls by itself, which the keyboard must be able to reach."""
    return f'<div class="{kind}" tabindex="0" role="region" aria-label="{label}">'


def _data(kind: str, path: Path) -> str:
    return f"data:{kind};base64,{base64.b64encode(path.read_bytes()).decode('ascii')}"


def _measure(values: Row | None, key: str, digits: int) -> str:
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
