"""Encoded clips that begin with another scene."""

from dataclasses import replace
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from skyreels_jax.hub import locate
from skyreels_jax.training.batches import MovingShapes
from skyreels_jax.training.clip_source import ClipSource
from skyreels_jax.training.dataset import (
    EncodedClips,
    _encoder,
    clips_fingerprint,
    encode_clips,
    pixels_of,
)
from skyreels_jax.training.distillation_recipe import Distillation, DistillShapes
from skyreels_jax.training.sources import find_sources
from skyreels_jax.training.transformer_recipe import ClipsData, TransformerShape
from skyreels_jax.weights.components.vae import stored_vae
from skyreels_jax.weights.layout import read_layout

COUNT = 12


@pytest.fixture(autouse=True, scope="module")
def _as_on_a_command_line():
    with jax.numpy_rank_promotion("allow"):
        yield


PLAIN = ClipSource(seed=0, frames=13, size=32)
CHANGED = replace(PLAIN, changes=0.8)


@pytest.fixture(scope="module")
def vae():
    return stored_vae(read_layout(locate("mini").folder)).load(jnp.float32)


@pytest.fixture(scope="module")
def encoded(vae, tmp_path_factory) -> tuple[EncodedClips, EncodedClips]:
    folder = tmp_path_factory.mktemp("encoded")
    plain, changed = (encode_clips(folder, vae, source, COUNT) for source in (PLAIN, CHANGED))
    return plain, changed


def test_scenes_and_captions_stay_and_only_what_is_before_differs(encoded):
    plain, changed = encoded
    assert plain.captions == changed.captions
    assert not plain.learned_from.any()
    for row, first in enumerate(changed.learned_from):
        scene, fps, _ = CHANGED.scene(row)
        change = CHANGED.change(row, scene, fps)
        assert first == (0 if change is None else change.first_learned)
        gaps = np.abs(plain.latents[row] - changed.latents[row]).max(axis=(0, 2, 3))
        if change is None:
            assert not gaps.any()
        elif change.at is None:
            # The first frame alone is old.
            assert gaps[0] > 0 and not gaps[1:].any()
        else:
            assert all(gaps[: change.at + 1] > 0)
    kinds = {CHANGED.change(n, *CHANGED.scene(n)[:2]) is None for n in range(COUNT)}
    assert kinds == {True, False}


def test_a_lone_old_frame_is_the_encoders(encoded, vae, tmp_path: Path):
    changed = encoded[1]
    rows = []
    for row in range(COUNT):
        scene, fps, _ = CHANGED.scene(row)
        change = CHANGED.change(row, scene, fps)
        if change is not None and change.at is None:
            rows.append((row, change.before, fps))
    assert rows
    for row, before, fps in rows:
        # Of the whole old clip the first latent is the same: the encoder is causal.
        whole = _encoder(vae)(pixels_of(CHANGED.render(before, 13, fps)[None]))[0]
        gap = np.abs(whole[:, 0] - changed.latents[row][:, 0]).max()
        assert gap < 2e-5  # measured 1e-6
        assert np.abs(whole[:, 1] - changed.latents[row][:, 1]).max() > 0.1


def test_folders_are_apart_and_held_out_clips_do_not_change(vae):
    assert clips_fingerprint(vae, PLAIN) != clips_fingerprint(vae, CHANGED)
    held = replace(CHANGED, held=True, changes=1.0)
    assert held.change(0, *held.scene(0)[:2]) is None


def test_text_of_a_clip_that_changes_is_never_left_out(tmp_path: Path):
    data = ClipsData(
        **dict.fromkeys(("vae", "text"), "mini"),
        encoded=str(tmp_path),
        batch=16,
        clips=COUNT,
        frames=13,
        size=32,
        changes=0.8,
    )
    training = DistillShapes(
        data=data,
        model=TransformerShape(start="mini"),
        distill=Distillation(stage="guidance", block=1),
    )
    clips = MovingShapes(data, find_sources(training), 0, 0.9, lambda what, done, total: None)
    empty = np.asarray(clips._captions([""]))[0]
    dropped = []
    for number in range(3):
        batch = clips.batch(number)
        assert batch.given is not None
        is_empty = np.array([np.array_equal(text, empty) for text in np.asarray(batch.context)])
        changes = np.asarray(batch.given).any(axis=1)
        assert not (is_empty & changes).any()
        dropped += is_empty[~changes].tolist()
    assert np.mean(dropped) > 0.5
    (held,) = clips.held()
    assert not np.asarray(held.given).any()
