"""A stream delivers before it goes on, never runs ahead, and takes another prompt while it runs."""

import ctypes
import itertools
import platform
import resource
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest
from tests import standins
from tests.fabricate import Checkpoints

from skyreels_jax.components.encoders import padding_rows, to_frames
from skyreels_jax.components.protocols import Components
from skyreels_jax.diffusion.few_steps import CausalSchedule
from skyreels_jax.errors import NumericsError, RequestError
from skyreels_jax.generation import live
from skyreels_jax.generation.live import LiveStream
from skyreels_jax.generation.request.live import LiveRequest
from skyreels_jax.generation.request.resolve_live import ResolvedLive, resolve_live
from skyreels_jax.generation.streaming import in_known_words
from skyreels_jax.media import VideoWriter
from skyreels_jax.models import transformer
from skyreels_jax.pipeline import Pipeline
from skyreels_jax.sampling.denoiser import Denoiser
from skyreels_jax.sampling.step import Conditioning
from skyreels_jax.shapes import Latents

HEIGHT, WIDTH = 32, 48


@dataclass
class Maker:
    """A sampler whose blocks show their number, and the prompt that they were made by."""

    schedule: CausalSchedule
    events: list[str] = field(default_factory=list)
    wrong: Callable[[int, Latents], Latents] = lambda number, latents: latents
    prompt: float = 0.0
    known: int = 0
    begun: int = 0

    def given(self, latents: Latents) -> None:
        self.known = latents.shape[2]

    def change(self, conditioning: Conditioning) -> None:
        self.prompt = float(jnp.mean(conditioning.contexts[0]))
        self.events.append("prompt")

    def next(self) -> Latents:
        self.events.append(f"begin {self.begun}")
        size = (self.schedule.first_block or self.schedule.block) if not self.begun else None
        value = jnp.full((1, 16, size or self.schedule.block, HEIGHT // 8, WIDTH // 8), 0.01)
        latents = value * self.begun
        latents = latents.at[:, 1].set(self.prompt)
        self.begun += 1
        return self.wrong(self.begun - 1, latents)


class Decoder(standins.Blocks):
    """A VAE that writes down what it is given."""

    def __init__(self, events: list[str]):
        self.events = events

    def decode_pieces(self, pieces):
        def seen() -> Iterator[np.ndarray]:
            for piece in pieces:
                self.events.append(f"decode {round(float(piece[0, -1, 0, 0]) * 100)}")
                yield piece

        return super().decode_pieces(seen())


def resolved(**settings: Any) -> ResolvedLive:
    checkpoint = standins.checkpoint("df")
    settings = {"prompt": "a fox", "height": HEIGHT, "width": WIDTH, "seed": 1} | settings
    return resolve_live(LiveRequest.of(settings, dtype="float32"), checkpoint, memory=2**40)


@dataclass
class Run:
    stream: LiveStream
    maker: Maker
    events: list[str]


def started(**settings: Any) -> Run:
    wrong = settings.pop("wrong", lambda number, latents: latents)
    request = resolved(**{"causal_block_size": 2, "window": 6} | settings)
    events: list[str] = []
    maker = Maker(request.schedule, events, wrong)
    stream = LiveStream(
        Components(standins.Words(), Decoder(events)),
        lambda: Denoiser(standins.Linear()),
        request,
        known=lambda prompt: in_known_words(standins.checkpoint("df"), prompt),
        sampler=lambda *_: maker,
    )
    return Run(stream, maker, events)


def test_the_first_block_is_delivered_before_the_second_is_begun():
    run = started()
    first = next(run.stream)
    assert run.events == ["prompt", "begin 0", "decode 0"]
    assert first.shape == (5, HEIGHT, WIDTH, 3)
    assert first.dtype == np.uint8


def test_a_cpu_begins_a_block_when_it_is_asked_for():
    run = started()
    next(run.stream)
    second = next(run.stream)
    assert run.events[3:] == ["begin 1", "decode 1"]
    assert second.shape[0] == 8
    next(run.stream)
    assert run.events[5:] == ["begin 2", "decode 2"]


def test_an_accelerator_has_the_frames_before_the_next_block(monkeypatch):
    monkeypatch.setattr("jax.default_backend", lambda: "gpu")
    run = started()
    next(run.stream)
    next(run.stream)
    assert run.events[3:] == ["begin 1", "decode 1", "begin 2"]


@pytest.mark.parametrize(("backend", "most"), [("cpu", 0), ("gpu", 1)])
def test_it_is_never_more_than_a_block_ahead(backend: str, most: int, monkeypatch):
    """However slow the consumer: what is not asked for is not made."""
    monkeypatch.setattr("jax.default_backend", lambda: backend)
    run, ahead = started(), []
    for delivered, _ in enumerate(itertools.islice(run.stream, 20), 1):
        ahead.append(run.maker.begun - delivered)
    assert (ahead[0], max(ahead)) == (0, most)


def test_no_stream_is_begun_before_somebody_asks():
    assert started().events == []


def shown(frames: np.ndarray) -> float:
    """What a block's frames say of the prompt: their second colour."""
    return float(frames[-1, 0, 0, 1])


def expected(prompt: str) -> int:
    states = standins.Words().encode([prompt])
    return int(np.rint((np.tanh(np.float32(states.mean())) / 2 + 0.5) * 255))


@pytest.mark.parametrize("backend", ["cpu", "gpu"])
@pytest.mark.parametrize("by", ["change", "assignment"])
def test_another_prompt_shows_in_at_most_two_blocks(by: str, backend: str, monkeypatch):
    monkeypatch.setattr("jax.default_backend", lambda: backend)
    run = started()
    for _ in range(3):
        before = next(run.stream)
    assert shown(before) == pytest.approx(expected("a fox"), abs=1)
    assert expected("a whale") != pytest.approx(expected("a fox"), abs=3)
    if by == "change":
        run.stream.change("a whale")
    else:
        run.stream.prompt = "a whale"
    assert run.stream.prompt == "a whale"
    after = [shown(next(run.stream)) for _ in range(2)]
    under_way = {"cpu": "a whale", "gpu": "a fox"}[backend]
    assert after[0] == pytest.approx(expected(under_way), abs=1)
    assert after[1] == pytest.approx(expected("a whale"), abs=1)


def test_prompts_hold_from_their_second_on():
    """Blocks of 8 frames, 24 a second: from frames 5, 13, 21 and 29 on."""
    run = started(fps=24)
    run.stream.change("a hare", at=29 / 24)
    run.stream.change("a whale", at=0.5)  # Frame 12.
    told = [shown(frames) for frames in itertools.islice(run.stream, 6)]
    wanted = ["a fox", "a fox", "a whale", "a whale", "a hare", "a hare"]
    assert told == pytest.approx([expected(prompt) for prompt in wanted], abs=1)


def test_a_prompt_that_comes_while_the_models_are_loaded_is_not_lost():
    run = started()
    load = run.stream._load

    def load_and_change() -> Denoiser:
        run.stream.change("a whale")
        return load()

    run.stream._load = load_and_change
    assert shown(next(run.stream)) == pytest.approx(expected("a whale"), abs=1)


def test_a_prompt_that_is_none_is_refused_and_the_stream_goes_on():
    run = started()
    next(run.stream)
    with pytest.raises(RequestError, match="`prompt` is empty"):
        run.stream.change("  ")
    assert len(next(run.stream)) == 8


def test_stop_and_close_end_it():
    run = started()
    next(run.stream)
    next(run.stream)
    run.stream.stop()
    assert list(run.stream) == []
    assert run.maker.begun == 2
    with started().stream as stream:
        next(stream)
    assert list(stream) == []
    assert stream._begun is None  # Models are let go of.


def nothing(number: int, latents: Latents) -> Latents:
    return latents.at[0, 0, 0, 0, 0].set(jnp.nan) if number == 2 else latents


def failing(number: int, latents: Latents) -> Latents:
    if number == 2:
        raise RuntimeError("the device is gone")
    return latents


@pytest.mark.parametrize(
    ("wrong", "kind", "says"),
    [(nothing, NumericsError, "second 0.5 on"), (failing, RuntimeError, "the device is gone")],
    ids=["nan", "failure"],
)
def test_what_fails_is_raised_where_frames_are_taken_and_ends_it(wrong, kind, says):
    run = started(wrong=wrong)
    with pytest.raises(kind, match=says):
        for _ in range(4):
            next(run.stream)
    assert list(run.stream) == []
    assert run.stream._begun is None


@pytest.mark.parametrize(("seconds", "frames"), [(1, 25), (0.3, 9), (0.2, 5), (0.01, 1)])
def test_it_has_as_many_frames_as_were_asked_for(seconds: float, frames: int):
    run = started(seconds=seconds)
    pieces = list(run.stream)
    assert sum(map(len, pieces)) == run.stream.request.frames == frames
    assert run.maker.begun == len(pieces)  # No block was made for nothing.


def test_an_image_is_the_first_frame(tmp_path: Path):
    image = np.random.default_rng(0).integers(0, 256, (HEIGHT, WIDTH, 3), np.uint8)
    run = started(image=image, seconds=1)
    pieces = list(run.stream)
    assert run.maker.known == 1
    assert [len(piece) for piece in pieces] == [9, 8, 8]
    assert run.stream.begun_seconds == pytest.approx(25 / 24)


def test_a_video_goes_on_and_is_not_shown_again(tmp_path: Path):
    frames = np.random.default_rng(0).integers(0, 256, (13, HEIGHT, WIDTH, 3), np.uint8)
    with VideoWriter(tmp_path / "given.mp4", fps=24, size=(HEIGHT, WIDTH)) as writer:
        writer.append(frames)
    run = started(video=tmp_path / "given.mp4", overlap_history=9, seconds=1)
    pieces = list(run.stream)
    assert run.maker.known == 3
    assert [len(piece) for piece in pieces] == [8, 8, 8, 1]
    assert not [warning for warning in run.stream.request.warnings if "in all" in warning]


def test_times_are_those_of_somebody_who_plays(monkeypatch):
    now = iter([10.0, 13.0, 13.5, 14.0, 14.0, 15.0])
    monkeypatch.setattr("time.perf_counter", lambda: next(now))
    from skyreels_jax.generation.live_times import Pacemaker

    pace = Pacemaker(16)
    for count in (5, 8, 8):
        pace.asked()
        pace.delivered(count)
    times = pace.times
    assert (times.frames, times.first_frame, times.held) == (21, 3.0, 0.5)
    assert times.rate == 16 / 2.0
    assert times.lag == pytest.approx(2.0 - 13 / 16)
    assert times.largest_lag == pytest.approx(2.0 - 13 / 16)


def test_its_programs_are_compiled_once_whatever_its_length():
    """With the sampler that pipelines use, on a tiny transformer."""
    request = resolved(causal_block_size=2, window=6, steps=2, sink=1)
    denoiser = Denoiser(standins.transformer(standins.config()))
    parts = Components(standins.Words(), standins.Blocks())
    stream = LiveStream(parts, lambda: denoiser, request)
    first = [next(stream) for _ in range(3)]
    programs = len(denoiser._executables)
    stream.change("a whale")
    assert [len(frames) for frames in itertools.islice(stream, 6)] == [8] * 6
    assert len(denoiser._executables) == programs
    again = LiveStream(parts, lambda: denoiser, request)
    np.testing.assert_array_equal([*again_of(again, 3)], [*map(np.sum, first)])
    assert len(denoiser._executables) == programs


def again_of(stream: LiveStream, count: int) -> Iterator[int]:
    return (np.sum(frames) for frames in itertools.islice(stream, count))


@pytest.mark.slow
def test_a_stream_of_a_checkpoint_is_its_latents_decoded_at_once(checkpoints: Checkpoints):
    """Bit for bit, in blocks; and a second stream compiles nothing."""
    pipe = Pipeline.from_pretrained(checkpoints("df", "original"), dtype="float32")
    settings = {"height": 32, "width": 48, "seed": 3, "steps": 2, "guidance_scale": 1.0}
    settings |= {"causal_block_size": 2, "window": 4, "seconds": 0.7}
    stream = pipe.stream("a fox", **settings)
    latents: list[np.ndarray] = []
    begin = stream._begin

    def watched():
        begun = begin()
        make = begun.sampler.next

        def keep() -> Latents:
            latents.append(np.asarray(made := make())[0])
            return made

        begun.sampler.next = keep
        return begun

    stream._begin = watched
    pieces = list(stream)
    assert [len(piece) for piece in pieces] == [5, 8, 4]
    whole = np.concatenate(latents, axis=1)
    at_once = np.concatenate(list(pipe.components.vae.decode_pieces([whole])), axis=1)
    np.testing.assert_array_equal(np.concatenate(pieces), to_frames(at_once)[:17])
    programs = len(pipe._programs)
    again = np.concatenate(list(pipe.stream("a fox", **settings)))
    np.testing.assert_array_equal(again, np.concatenate(pieces))
    assert len(pipe._programs) == programs
    other = np.concatenate(list(pipe.stream("a fox", **settings | {"seed": 4})))
    assert not np.array_equal(again, other)  # Negative twin.


def resident() -> float:
    """MiB of this process's memory, without what is freed and kept for later.

    In that whatever is kept would find room unseen.
    """
    if platform.libc_ver()[0] == "glibc":
        ctypes.CDLL(None).malloc_trim(0)
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * resource.getpagesize() / 2**20


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="needs Linux's /proc")
def test_memory_does_not_grow_over_2000_frames(checkpoints: Checkpoints):
    """By at most 3 MiB; frames that somebody keeps are caught (7 MiB)."""
    pipe = Pipeline.from_pretrained(checkpoints("df", "original"), dtype="float32")
    settings = {"height": 32, "width": 48, "seed": 3, "steps": 1, "guidance_scale": 1.0}
    growth: list[float] = []
    for keeps in (False, True):
        kept: list[np.ndarray] = []
        with pipe.stream("a fox", **settings, causal_block_size=2, window=4, sink=1) as stream:
            for frames in stream:
                if keeps:
                    kept.append(frames)
                if stream.times.frames == 405:
                    before = resident()
                if stream.times.frames >= 2000:
                    break
            growth.append(resident() - before)
    assert growth[0] < 3, growth
    assert growth[1] > 3, growth


def test_padding_of_a_text_is_counted_where_a_block_is_small(monkeypatch: pytest.MonkeyPatch):
    """Sixteen tokens a block attend to 65 rows, not to 512; frames are those of all rows."""

    def frames() -> np.ndarray:
        # Programs of its own: what is planted would not be in those of another.
        pipe = Pipeline.from_pretrained("mini-live", dtype="float32")
        with pipe.stream("a red star moves left", seed=1, seconds=0.5) as stream:
            return np.concatenate(list(stream)).astype(np.int32)

    counts: list[int] = []
    condition = Denoiser.condition

    def counted(self: Denoiser, *texts: Any, padding: int = 0, **how: Any) -> Conditioning:
        counts.append(padding)
        return condition(self, *texts, padding=padding, **how)

    monkeypatch.setattr(Denoiser, "condition", counted)
    got = frames()
    monkeypatch.setattr(live, "padding_rows", lambda texts, tokens: 0)
    whole = frames()
    assert counts == [448, 0]
    # Of 255; measured 1, and 2.7e-5 in the mean: a value between two is rounded otherwise.
    assert np.max(np.abs(got - whole)) <= 1
    monkeypatch.setattr(transformer, "last_counts", lambda states, count: states)
    monkeypatch.setattr(live, "padding_rows", padding_rows)
    assert np.mean(np.abs(frames() - whole)) > 10  # Counted as one: measured 65.
