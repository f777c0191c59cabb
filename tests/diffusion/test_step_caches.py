"""Decisions of the step caches over whole runs, against plain transcriptions of their rules."""

from dataclasses import dataclass
from functools import partial
from typing import Any, cast

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from skyreels_jax.diffusion.cache_settings import CallCounter
from skyreels_jax.diffusion.easycache import EasyCache
from skyreels_jax.diffusion.frame_schedule import plan_blocks, schedule_frames
from skyreels_jax.diffusion.step_cache import NoCache, Position, StagedForward, StepCache
from skyreels_jax.diffusion.teacache import OriginalTeaCache, TeaCache
from skyreels_jax.diffusion.unipc import flow_sigmas
from skyreels_jax.presets import PRESETS

FRAMES, PATCHES, DIM = 5, 2, 8
RNG = np.random.default_rng(0)
TABLE = RNG.standard_normal((DIM, 32)).astype(np.float32)


@dataclass
class Call:
    """One evaluation of a small model, whose blocks and head can be told apart."""

    latents: Any
    e: Any
    e0: Any
    tokens: Any

    def blocks(self, tokens):
        return tokens * 1.5 + jnp.tanh(self.e[..., None, :])

    def head(self, tokens):
        return jnp.moveaxis(tokens.sum(-1), -1, 1)[..., None, None] - self.e.mean()

    def staged(self) -> StagedForward:
        """As a cache is given it; none looks at keys and values."""
        return StagedForward(
            self.latents,
            self.e,
            self.e0,
            self.tokens,
            self.blocks,
            self.head,
            lambda: (self.e, self.e),
        )


def embedded(timesteps: np.ndarray) -> np.ndarray:
    """A smooth function of the timestep, ``[1, F, D]``."""
    angle = timesteps.reshape(1, -1, 1) / 1000 * np.arange(1, 33)
    return (np.cos(angle) @ TABLE.T + 12).astype(np.float32)


def call_at(timesteps: np.ndarray, x: np.ndarray) -> Call:
    e = jnp.asarray(embedded(timesteps))
    e0 = jnp.asarray(np.repeat(embedded(timesteps)[:, :, None] ** 2, 6, axis=2))
    tokens = jnp.broadcast_to(
        jnp.asarray(x.mean((1, 3, 4)))[:, :, None, None], (1, FRAMES, PATCHES, DIM)
    )
    return Call(jnp.asarray(x), e, e0, tokens)


def rows(steps: int, ar_step: int) -> np.ndarray:
    """Timesteps of every row, with a given first frame."""
    plan = plan_blocks(FRAMES, 1, prefix=1)
    return schedule_frames(plan, flow_sigmas(steps, 8.0).timesteps, ar_step=ar_step).timesteps


def inputs(count: int) -> list[np.ndarray]:
    """What a solver might show the model: a walk that slows down."""
    rng = np.random.default_rng(1)
    x = rng.standard_normal((1, 2, FRAMES, 3, 3)).astype(np.float32)
    found = []
    for i in range(count):
        x = x + (rng.standard_normal(x.shape) / (i + 1)).astype(np.float32)
        x[:, :, 0] = 1  # the given frame
        found.append(x)
    return found


@partial(jax.jit, static_argnums=0)
def step(head, cache, state, position, e, e0, x, tokens):
    """One call; ``head`` says which of the two small models it is of."""
    del head
    return cache.call(state, position, Call(x, e, e0, tokens).staged())


def run(cache: StepCache, table: np.ndarray, calls: int = 2) -> tuple[list[list[bool]], list]:
    """Which calls of each row ran, and all predictions; each call of a row has its own state."""
    xs = inputs(len(table))
    first = call_at(table[0], xs[0])
    states = [cache.init(first.staged()) for _ in range(calls)]
    ran, answers = [], []
    for row, (timesteps, x) in enumerate(zip(table, xs, strict=True)):
        ran.append([])
        for c in range(calls):
            call = call_at(timesteps, x * (1 + c))
            where = Position(*(np.array(n, np.int32) for n in (row, len(table), c)))
            answer, states[c], done = step(
                Call.head, cache, states[c], where, call.e, call.e0, call.latents, call.tokens
            )
            ran[-1].append(bool(done))
            answers.append(np.asarray(answer))
    return ran, answers


def tea(
    threshold: float, name: str = "T2V-14B-540P", *, ret: bool, wrap: int = 0, **changes
) -> TeaCache | OriginalTeaCache:
    table = PRESETS[f"SkyReels-V2-{name}"].cache
    first, last = (5, 0) if ret else (1, 1)
    numbers = {"first": first, "last": last} | changes
    settings = (
        np.array(threshold, np.float32),
        np.array(table.retained if ret else table.plain, np.float32),
    )
    if wrap:
        counts = (np.array(n, np.int32) for n in (2 * first, 0, wrap, 2))
        return OriginalTeaCache(*settings, *counts, ret, alternating=False)
    counts = (np.array(numbers[name], np.int32) for name in ("first", "last"))
    return TeaCache(*settings, *counts, ret)


def transcribed(
    cache: TeaCache | OriginalTeaCache, table: np.ndarray, *, original: bool
) -> list[list[bool]]:
    """The original's forward, call by call: even and odd calls apart, a counter of calls."""
    num_steps = len(table)
    ret_calls = 10 if cache.projected else 2
    cutoff = 2 * num_steps if cache.projected else 2 * num_steps - 2
    cnt = 0
    kept: dict[int, tuple[float, np.ndarray]] = {}
    ran: list[list[bool]] = []
    for timesteps in table:
        ran.append([])
        e = embedded(timesteps)
        u = e**2 if cache.projected else e
        for _ in range(2):
            even = cnt % 2
            total, before = kept.get(even, (0.0, u))
            if cnt < ret_calls or cnt >= cutoff:
                compute, total = True, 0.0
            else:
                ratio = np.abs(u - before).mean() / np.abs(before).mean()
                total += float(np.polyval(np.asarray(cache.coefficients, np.float64), ratio))
                compute = total >= float(cache.threshold)
                total = 0.0 if compute else total
            kept[even] = (total, u)
            ran[-1].append(compute)
            cnt += 1
            if original and cnt >= num_steps:
                cnt = 0
    return ran


NAMES = ("I2V-14B-540P", "I2V-14B-720P", "DF-1.3B-540P", "T2V-14B-540P")


@pytest.mark.parametrize("original", [False, True], ids=["whole run", "half run"])
@pytest.mark.parametrize("ret", [False, True], ids=["plain", "retained"])
@pytest.mark.parametrize("name", NAMES)
def test_teacache_decides_as_the_transcription(name: str, ret: bool, original: bool):
    skipped = 0
    for steps, ar_step in ((20, 0), (13, 3)):
        table = rows(steps, ar_step)
        for threshold in (0.05, 0.2, 0.3, 1.0):
            cache = tea(threshold, name, ret=ret, wrap=len(table) if original else 0)
            ran, _ = run(cache, table)
            assert ran == transcribed(cache, table, original=original), (steps, threshold)
            skipped += sum(not done for row in ran for done in row)
    assert skipped > 10  # it is not that all run


def test_the_trace_recorded_of_the_original():
    """30 steps, retained: of 60 calls those that run whatever happens are 0-9 and, again, 30-39."""
    ran, _ = run(tea(1e9, ret=True, wrap=30), rows(30, 0))
    flat = [done for row in ran for done in row]
    assert [i for i, done in enumerate(flat) if done] == [*range(10), *range(30, 40)]
    ran, _ = run(tea(1e9, ret=True), rows(30, 0))
    assert [i for i, row in enumerate(ran) if any(row)] == list(range(5))


@pytest.mark.parametrize(
    "change", [{"first": 2}, {"last": 2}, {"wrap": 40}, {"name": "I2V-14B-540P"}], ids=str
)
def test_a_wrong_rule_is_caught(change: dict[str, Any]):
    table = rows(20, 0)
    right = transcribed(tea(0.2, ret=False), table, original=False)
    assert run(tea(0.2, ret=False), table)[0] == right
    assert run(tea(0.2, **{"ret": False, **change}), table)[0] != right


def plainly(threshold: float, table: np.ndarray, first: int) -> list[list[bool]]:
    """EasyCache by its formulas, in float64, for calls whose states do not meet."""
    xs = inputs(len(table))
    ran: list[list[bool]] = [[] for _ in table]
    for c in range(2):
        total = rate = 0.0
        before = answer_before = shift = np.zeros(xs[0].shape)
        for row, (timesteps, x) in enumerate(zip(table, xs, strict=True)):
            call = call_at(timesteps, x * (1 + c))
            now = np.asarray(call.latents, np.float64)
            moved = (now != before).any((0, 1, 3, 4))
            change = np.abs(now - before)[:, :, moved].mean() if moved.any() else 0.0
            always = row < first or row == len(table) - 1
            if not always:
                total += rate * change / np.abs(answer_before[:, :, moved]).mean()
            runs = always or total >= threshold
            true = np.asarray(call.head(call.blocks(call.tokens)), np.float64)
            answer = np.broadcast_to(true, now.shape) if runs else now + shift
            if runs:
                total = 0.0
                if change > 0:
                    rate = np.abs(answer - answer_before)[:, :, moved].mean() / change
                shift = answer - now
            before, answer_before = now, answer
            ran[row].append(runs)
    return ran


def easy(threshold: float, first: int = 2) -> EasyCache:
    return EasyCache(
        np.array(threshold, np.float32), np.array(first, np.int32), np.array(1, np.int32)
    )


@pytest.mark.parametrize("ar_step", [0, 3])
@pytest.mark.parametrize("threshold", [0.02, 0.1, 0.3, 1.0])
def test_easycache_decides_by_its_formulas(monkeypatch, threshold: float, ar_step: int):
    shaped(monkeypatch)
    table = rows(15, ar_step)
    ran, _ = run(easy(threshold), table)
    assert ran == plainly(threshold, table, first=2)
    if threshold == 1.0:
        assert sum(done for row in ran for done in row) < len(table)
        assert ran != plainly(0.5, table, first=2)
        assert ran != plainly(threshold, table, first=3)


def shaped(monkeypatch) -> None:
    """Let the small model's head give the latents' shape."""
    head = Call.head
    monkeypatch.setattr(
        Call, "head", lambda self, tokens: jnp.broadcast_to(head(self, tokens), self.latents.shape)
    )


@pytest.mark.parametrize("name", ["tea", "easy"])
def test_nothing_is_left_out_at_threshold_zero_and_answers_are_those_without(monkeypatch, name):
    shaped(monkeypatch)
    table = rows(10, 2)
    cache = tea(0.0, ret=False) if name == "tea" else easy(0.0)
    ran, answers = run(cast(StepCache, cache), table)
    _, plain = run(NoCache(), table)
    assert all(done for row in ran for done in row)
    for with_cache, without in zip(answers, plain, strict=True):
        np.testing.assert_array_equal(with_cache, without)


def test_a_call_that_is_left_out_adds_the_last_residual():
    table = rows(8, 0)
    _, answers = run(tea(1e9, ret=True), table, calls=1)
    xs = inputs(len(table))
    last = call_at(table[4], xs[4])
    residual = last.blocks(last.tokens) - last.tokens
    later = call_at(table[6], xs[6])
    np.testing.assert_allclose(answers[6], later.head(later.tokens + residual), atol=1e-5)
    assert not np.allclose(answers[6], later.head(later.blocks(later.tokens)), atol=1e-2)


def test_what_is_remembered_has_the_size_that_is_said():
    call = call_at(rows(8, 0)[0], inputs(1)[0]).staged()
    state = tea(0.2, ret=True).init(call)
    assert state.residual.size == FRAMES * PATCHES * DIM
    assert state.embedding.size == FRAMES * 6 * DIM
    assert (
        sum(leaf.size for leaf in jax.tree.leaves(easy(0.2).init(call))) == 2 + 3 * 2 * FRAMES * 9
    )


def test_the_originals_counter_is_carried_from_window_to_window():
    """Against counting by ones, with ends of the count and lengths of windows at random."""
    rng = np.random.default_rng(5)
    beyond = 0
    for _ in range(300):
        count, start, per_step = 0, 0, int(rng.integers(1, 3))
        for _ in range(4):
            wrap, iterations = (int(n) for n in rng.integers(1, 30, 2))
            counter = CallCounter(start, wrap, per_step)
            beyond += start >= wrap > 1
            for call in range(iterations * per_step):
                assert counter.at(call) == count
                count = 0 if count + 1 >= wrap else count + 1
            start = counter.after(iterations)
            assert start == count
    assert beyond > 100


@pytest.mark.parametrize("start", [0, 3, 40])
def test_the_count_on_the_device_is_that_of_the_host(start: int):
    counter = CallCounter(start, 7, 2)
    numbers = (np.array(n, np.int32) for n in (10, start, 7, 2))
    cache = OriginalTeaCache(1.0, (), *numbers, False, alternating=False)
    for call in range(20):
        where = Position(*(np.array(n, np.int32) for n in (call // 2, 10, call % 2)))
        assert int(cache._count(where)) == counter.at(call)
