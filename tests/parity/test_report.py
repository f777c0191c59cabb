"""One file that opens anywhere: escaped, self-contained, valid, and plain about the verdict."""

import base64
import math
from html.parser import HTMLParser
from pathlib import Path

import pytest

from skyreels_jax.parity import report as html

EVIL = '<script>alert("1")</script> & "fox" \'狐狸\''
VOID = {"meta", "img"}


class Page(HTMLParser):
    """Checks that elements are closed in order, and collects what tests ask about."""

    def __init__(self, text: str):
        super().__init__()
        self.open: list[str] = []
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        assert len(dict(attrs)) == len(attrs)
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text += " " + data

    def all(self, tag: str) -> list[dict[str, str | None]]:
        return [attributes for name, attributes in self.tags if name == tag]


def distance(psnr: float | None) -> dict:
    return {
        "psnr": psnr,
        "ssim": 0.98765,
        "psnr_by_frame": [psnr],
        "ssim_by_frame": [0.98765],
        "max_difference": 3.0,
        "p95": 1.0,
        "p99": 2.0,
    }


def layer(name: str, passed: bool = True) -> dict:
    return {
        "name": name,
        "step": None,
        "max_abs": 1e-3,
        "normalised": 1e-4,
        "passed": passed,
        "relative_l2": 0.0,
        "cosine": 0.99999999,
        "budget": 1e-3,
        "bf16_baseline": None,
    }


def report(**changed: object) -> dict:
    side = {"load": 1.0, "compile": 2.0, "runs": [3.0, 4.0], "median": 3.5, "peak_mib": 5000.0}
    test = {
        "seed": 7,
        "prompt": "a fox",
        "frames": distance(41.256),
        "bf16_baseline": distance(None),
        "layers": [layer("blocks.0.ffn")],
        "finding": None,
        "video": "test_0.mp4",
    }
    return {
        "schema": "skyreels-jax-validation/2",
        "verdict": "pass",
        "failures": [],
        "settings": {"steps": 2, "size": [32, 48], "none": None},
        "environment": {"jax": "0.1"},
        "model": {"name": "T2V", "task": "t2v", "dtype": "float32", "reference": "diffusers"},
        "tests": [test],
        "timings": {"torch": side, "jax": None, "ratio": None},
    } | changed


def page(tmp_path: Path, given: dict, plots=None, videos=()) -> tuple[str, Page]:
    html.write_html(tmp_path / "report.html", given, plots or {}, list(videos))
    text = (tmp_path / "report.html").read_text("utf-8")
    return text, Page(text)


def first_test(**changed: object) -> dict:
    given = report()
    return report(tests=[given["tests"][0] | changed])


def test_a_pass_and_a_failure_say_so_in_words_and_colour(tmp_path: Path):
    _, passed = page(tmp_path, report())
    assert "Pass: everything that was compared is within its tolerance" in passed.text
    assert {"class": "box pass"} in passed.all("div")
    failures = ["test 0: PSNR 20 dB < 30 dB", "one more"]
    _, failed = page(tmp_path, report(verdict="fail", failures=failures))
    assert "Fail: 2 checks did not hold" in failed.text
    assert {"class": "box fail"} in failed.all("div")
    assert all(failure in failed.text for failure in failures)
    assert "Pass" not in failed.text


def test_a_run_of_one_side_alone_is_no_pass(tmp_path: Path):
    _, parsed = page(tmp_path, first_test(frames=None, bf16_baseline=None, layers=[]))
    assert "Nothing was compared" in parsed.text
    assert "Pass" not in parsed.text
    assert {"class": "box none"} in parsed.all("div")


def test_everything_that_is_text_is_escaped(tmp_path: Path):
    finding = {"name": EVIL, "step": 3, "kind": EVIL, "detail": EVIL}
    evil = first_test(prompt=EVIL, finding=finding, layers=[layer(EVIL, passed=False)])
    evil |= {"verdict": "fail", "failures": [EVIL], "environment": {EVIL: EVIL}, "schema": EVIL}
    evil["settings"] = {EVIL: {EVIL: [EVIL]}}
    evil["model"] = dict.fromkeys(("name", "task", "dtype", "reference"), EVIL)
    drawing = tmp_path / "drawing.png"
    drawing.write_bytes(b"png")
    video = tmp_path / 'x"><script>.mp4'
    video.write_bytes(b"mp4")
    text, parsed = page(tmp_path, evil, {EVIL: drawing}, [video])
    assert "<script" not in text
    assert parsed.text.count(EVIL) >= 10
    assert parsed.all("script") == []


def test_the_page_asks_for_nothing_outside_itself(tmp_path: Path):
    drawing, video = tmp_path / "drawing.png", tmp_path / "test_0.mp4"
    drawing.write_bytes(b"a drawing")
    video.write_bytes(b"a video")
    given = first_test(prompt="see http://example.org/a.png")
    text, parsed = page(tmp_path, given, {"Error by layer, test 0": drawing}, [video])
    for _, attributes in parsed.tags:
        for name in ("src", "href"):
            assert (attributes.get(name) or "data:").startswith(("data:", "#"))
    assert "url(" not in text
    assert "@import" not in text
    assert parsed.all("link") == []
    image, film = parsed.all("img")[0], parsed.all("video")[0]
    assert image["src"] == "data:image/png;base64," + base64.b64encode(b"a drawing").decode()
    assert film["src"] == "data:video/mp4;base64," + base64.b64encode(b"a video").decode()
    assert "relative L2 error" in (image["alt"] or "")
    assert "Error by layer, test 0" in parsed.text
    assert "test_0.mp4: test 0, seed 7" in parsed.text


def test_large_videos_are_linked_and_said_to_be(tmp_path: Path):
    video = tmp_path / "test 0&1.mp4"
    with video.open("wb") as file:
        file.truncate(html.EMBEDDED_BYTES + 1)
    text, parsed = page(tmp_path, report(), videos=[video])
    assert {"href": "test%200%261.mp4"} in parsed.all("a")
    assert "(20.0 MB) is too\nlarge to be part of this page" in parsed.text
    assert parsed.all("video") == []
    assert len(text) < 30_000
    with video.open("wb") as file:
        file.truncate(html.EMBEDDED_BYTES)
    assert len(page(tmp_path, report(), videos=[video])[1].all("video")) == 1


def test_numbers_and_equality_stand_beside_their_baselines(tmp_path: Path):
    text, _ = page(tmp_path, report())
    assert '<td>41.26</td>\n<td class="dim">equal</td>' in text
    text, _ = page(tmp_path, first_test(frames=distance(math.inf), bf16_baseline=None))
    assert '<td>equal</td>\n<td class="dim">–</td>' in text
    text, _ = page(tmp_path, first_test(frames=None, bf16_baseline=None))
    assert "equal</td>" not in text


def test_failed_layers_are_marked_in_words_and_reachable(tmp_path: Path):
    layers = [layer("a"), layer("b", passed=False), layer("c", passed=False)]
    text, parsed = page(tmp_path, first_test(layers=layers))
    assert parsed.text.count("FAILED") == 2
    assert {"class": "fail", "id": "failed-0"} in parsed.all("tr")
    assert {"href": "#failed-0"} in parsed.all("a")
    assert parsed.all("details") == [{"open": None}]
    _, parsed = page(tmp_path, first_test(layers=[layer("a")] * (html.UNFOLDED_ROWS + 1)))
    assert parsed.all("details") == [{}]
    assert "FAILED" not in parsed.text


def test_a_finding_comes_before_everything_else(tmp_path: Path):
    finding = {"name": "blocks.3.ffn", "step": 1, "kind": "wrong order", "detail": "line\ntwo"}
    text, parsed = page(tmp_path, first_test(finding=finding))
    assert text.index("blocks.3.ffn") < text.index("Videos in numbers")
    assert "Where test 0 diverges from PyTorch" in parsed.text
    assert ", step 1" in parsed.text
    assert "Where test" not in page(tmp_path, report())[1].text


@pytest.mark.parametrize(
    "timings", [None, {"torch": None, "jax": None, "ratio": None}], ids=["none", "neither"]
)
def test_what_was_not_measured_is_no_error(tmp_path: Path, timings: dict | None):
    _, parsed = page(tmp_path, report(timings=timings, tests=[]))
    assert "No test was run." in parsed.text


def test_layers_without_numbers_and_broken_text_are_written(tmp_path: Path):
    broken = layer("a") | {"relative_l2": math.nan, "max_abs": math.inf, "cosine": None}
    _, parsed = page(tmp_path, first_test(layers=[broken], prompt="\udcff"))
    assert "nan" in parsed.text
    assert "inf" in parsed.text


def test_nothing_but_the_page_is_left(tmp_path: Path):
    page(tmp_path, report())
    with pytest.raises(FileNotFoundError):
        page(tmp_path, report(), videos=[tmp_path / "missing.mp4"])
    assert [file.name for file in tmp_path.iterdir()] == ["report.html"]
