"""Which models are in memory when the next one is loaded, and how often each is."""

import weakref
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
import pytest
from flax import nnx
from tests.fabricate import Checkpoints

from skyreels_jax.checkpoints import Checkpoint
from skyreels_jax.components import lazy
from skyreels_jax.memory import estimate
from skyreels_jax.pipeline import Pipeline
from skyreels_jax.weights.components.stored import StoredComponent

SMALL = {"height": 32, "width": 48, "num_frames": 5, "steps": 2, "seed": 1}
IMAGE = np.random.default_rng(0).integers(0, 256, (32, 48, 3), np.uint8)


class Watch:
    """Follows the parameters of each model that is loaded."""

    def __init__(self):
        self.parameters: dict[str, list[weakref.ref[jax.Array]]] = {}
        self.loads: list[tuple[str, set[str]]] = []

    def load(self, name: str, load: Callable[[], nnx.Module]) -> nnx.Module:
        """``load()``, with what was in memory before noted."""
        self.loads.append((name, self.resident()))
        model = load()
        leaves = jax.tree.leaves(nnx.state(model, nnx.Param))
        self.parameters[name] = [weakref.ref(leaf) for leaf in leaves]
        return model

    def resident(self) -> set[str]:
        """Models of which any parameter is in memory."""
        return {
            name
            for name, references in self.parameters.items()
            if any(reference() is not None for reference in references)
        }


@pytest.fixture
def watch(monkeypatch: pytest.MonkeyPatch) -> Watch:
    watch, load = Watch(), StoredComponent.load

    def load_watched(self: StoredComponent, *given: Any, **settings: Any) -> nnx.Module:
        return watch.load(self.spec.model.__name__, lambda: load(self, *given, **settings))

    monkeypatch.setattr(StoredComponent, "load", load_watched)
    return watch


IN_TURN = ["Umt5Encoder", "ClipVision", "WanVae", "WanModel", "WanVae"]


def test_every_model_is_gone_before_the_next_one_comes(checkpoints: Checkpoints, watch: Watch):
    pipe = Pipeline.from_pretrained(checkpoints("i2v", "original"), keep=False)
    pipe("a fox", image=IMAGE, **SMALL)
    # Where parts are kept (below), they are seen to be there.
    assert watch.loads == [(name, set()) for name in IN_TURN]


def test_the_transformer_is_gone_before_a_file_is_decoded(
    checkpoints: Checkpoints, watch: Watch, tmp_path
):
    pipe = Pipeline.from_pretrained(checkpoints("t2v", "diffusers"), keep=False)
    pipe.write(pipe.resolve("a fox", **SMALL), tmp_path / "x.mp4")
    assert watch.loads == [(name, set()) for name in ("Umt5Encoder", "WanModel", "WanVae")]


@pytest.mark.slow
def test_two_windows_keep_the_transformer_beside_the_vae_which_is_loaded_once(
    checkpoints: Checkpoints, watch: Watch
):
    pipe = Pipeline.from_pretrained(checkpoints("df", "diffusers"), keep=False)
    long = SMALL | {"num_frames": 9, "base_num_frames": 5, "overlap_history": 1}
    for continuation in ("latents", "pixels"):
        watch.loads.clear()
        pipe("a fox", **long, hand_over=continuation)
        assert watch.loads == [
            ("Umt5Encoder", set()),
            ("WanModel", set()),
            ("WanVae", {"WanModel"}),
        ]


def test_what_is_kept_is_loaded_once(checkpoints: Checkpoints, watch: Watch):
    pipe = Pipeline.from_pretrained(checkpoints("i2v", "original"), keep=True)
    first, again = (pipe(prompt, image=IMAGE, **SMALL) for prompt in ("a fox", "a fox"))
    assert [name for name, _ in watch.loads] == IN_TURN[:-1]
    assert watch.loads[-1][1] == watch.resident() - {"WanModel"} == set(IN_TURN[:3])
    np.testing.assert_array_equal(first.frames, again.frames)


@pytest.mark.slow
def test_without_keeping_a_second_video_loads_again_and_compiles_nothing(
    checkpoints: Checkpoints, watch: Watch
):
    pipe = Pipeline.from_pretrained(checkpoints("t2v", "diffusers"), keep=False)
    first, again = (pipe("a fox", **SMALL) for _ in range(2))
    assert [name for name, _ in watch.loads] == 2 * ["Umt5Encoder", "WanModel", "WanVae"]
    assert "compile" in first.timings.stages
    assert "compile" not in again.timings.stages
    np.testing.assert_array_equal(first.frames, again.frames)
    # Of another size it does.
    assert "compile" in pipe("a fox", **SMALL | {"num_frames": 9}).timings.stages


@pytest.mark.parametrize("free", [None, 10**6, 2**40])
def test_by_default_components_stay_where_there_is_room(
    checkpoints: Checkpoints, watch: Watch, monkeypatch, caplog, free: int | None
):
    monkeypatch.setattr(lazy, "available_memory", lambda: free)
    pipe = Pipeline.from_pretrained(checkpoints("t2v", "diffusers"))
    with caplog.at_level("INFO", "skyreels_jax.components.lazy"):
        first, again = (pipe("a fox", **SMALL) for _ in range(2))
    names = ["Umt5Encoder", "WanModel", "WanVae"]
    kept = free == 2**40
    assert [name for name, _ in watch.loads] == names * (1 if kept else 2)
    assert ("components stay in memory between calls" in caplog.text) is kept
    np.testing.assert_array_equal(first.frames, again.frames)


@pytest.mark.slow
def test_what_was_kept_makes_room_for_a_video_that_takes_it(
    checkpoints: Checkpoints, watch: Watch, monkeypatch, caplog
):
    pipe = Pipeline.from_pretrained(checkpoints("t2v", "diffusers"))
    pipe("a fox", **SMALL)
    assert watch.resident() == {"Umt5Encoder", "WanModel", "WanVae"}
    # Kept components count as free: the larger video fits, but not beside all of them.
    larger = SMALL | {"num_frames": 33, "height": 64, "width": 96}
    request = pipe.resolve("a fox", **larger)
    least = estimate(pipe.checkpoint.config, request.window_shape, dtype=pipe.dtype)
    free = least.total - least.weights
    monkeypatch.setattr(lazy, "available_memory", lambda: free)
    watch.loads.clear()
    with caplog.at_level("INFO", "skyreels_jax.components.lazy"):
        pipe("a fox", **larger)
    assert watch.loads == [(name, set()) for name in ("Umt5Encoder", "WanModel", "WanVae")]
    assert "components are loaded anew between calls" in caplog.text
    assert watch.resident() == set()


def test_a_checkpoint_is_proved_complete_once_and_before_anything_is_loaded(
    checkpoints: Checkpoints, watch: Watch, monkeypatch: pytest.MonkeyPatch
):
    proved: list[int] = []
    verify = Checkpoint.verify

    def counted(self: Checkpoint) -> None:
        proved.append(len(watch.loads))
        verify(self)

    monkeypatch.setattr(Checkpoint, "verify", counted)
    pipe = Pipeline.from_pretrained(checkpoints("t2v", "diffusers"))
    for _ in range(2):
        pipe("a fox", **SMALL)
    assert proved == [0]
