"""Batches of one's own videos, each of one bucket; all order follows from seed and step alone."""

import threading
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Final

import jax.numpy as jnp
import numpy as np

from skyreels_jax.models.vae_runs import WHOLE
from skyreels_jax.training.batches import HELD_CLIPS, TRAINING_STREAM, Example, Tags
from skyreels_jax.training.dataset import OnEncoded
from skyreels_jax.training.objective import Batch
from skyreels_jax.training.sources import TrainingSources
from skyreels_jax.training.videos.buckets import Bucket
from skyreels_jax.training.videos.encode import EncodedFiles, encode_videos, read_encoded
from skyreels_jax.training.videos.plan import DataPlan, PlannedClip, plan_clips, require_sound
from skyreels_jax.training.videos.recipe import FolderData
from skyreels_jax.weights.tokenizer_file import open_tokenizer

# A stream of random numbers that no other use shares.
_ORDER_STREAM: Final = 2
# Bytes of encoded clips that stay in memory; the others are read each time.
_MEMORY: Final = 2 * 2**30
_SHOWN: Final = 4
# Of a folder, in the header of a LoRA.
_MOST_TAGS: Final = 1000

_Step = tuple[Bucket, tuple[int, ...]]


class BatchOrder:
    """Which clips each step takes.

    In an epoch every clip comes as often as it is repeated, in batches of its bucket, the batches
    in random order. Where a bucket's last batch is not full, clips from its beginning fill it up.
    The order of an epoch follows from seed and epoch: there is no state to be saved.
    """

    def __init__(self, plan: DataPlan, seed: int):
        """``seed`` decides the order."""
        self._seed = seed
        self._entries = {
            bucket: np.repeat(indices, [plan.clips[index].repeats for index in indices])
            for bucket, indices in plan.buckets.items()
        }
        self.steps = sum(-(-len(e) // bucket.batch) for bucket, e in self._entries.items())
        self._epoch: tuple[int, list[_Step]] = (-1, [])

    def step(self, index: int) -> _Step:
        """The bucket of a step and its clips."""
        epoch, number = divmod(index, self.steps)
        known, steps = self._epoch
        if known != epoch:
            steps = self._drawn(epoch)
            self._epoch = epoch, steps
        return steps[number]

    def _drawn(self, epoch: int) -> list[_Step]:
        rng = np.random.default_rng([self._seed, _ORDER_STREAM, epoch])
        steps: list[_Step] = []
        for bucket, entries in self._entries.items():
            shuffled = rng.permutation(entries)
            count = -(-len(shuffled) // bucket.batch)
            filled = np.resize(shuffled, (count, bucket.batch))
            steps += [(bucket, tuple(map(int, row))) for row in filled]
        return [steps[number] for number in rng.permutation(len(steps))]


class Videos:
    """One's own videos and images: see :class:`~skyreels_jax.training.batches.ClipBatches`."""

    def __init__(
        self,
        data: FolderData,
        sources: TrainingSources,
        seed: int,
        text_dropout: float,
        on_encoded: OnEncoded,
    ):
        """Cut clips, and encode what is not there yet.

        Args:
            data: which clips.
            sources: the folders of the encoders.
            seed: of the order, and of which caption is taken.
            text_dropout: share of clips without text.
            on_encoded: called as clips and captions are encoded.

        Raises:
            RequestError: something is wrong with the data; `skyreels-jax data check` says all.
            WeightsError: an encoder cannot be loaded, or what is encoded not be written.
        """
        tokenizer = open_tokenizer(sources.text.component("tokenizer"))
        self.plan = plan_clips(data, tokenizer)
        require_sound(self.plan, data.skip_broken)
        self.text_length = self.plan.text_length
        self._files = EncodedFiles.of(data, sources)
        encode_videos(self.plan, self._files, on_encoded=on_encoded)
        self._datasets = data.datasets
        self._seed, self._text_dropout = seed, text_dropout
        self._order = BatchOrder(self.plan, seed)
        self._is_i2v = sources.config.model_type == "i2v"
        self._read: dict[Path, Mapping[str, np.ndarray]] = {}
        self._bytes, self._lock = 0, threading.Lock()

    def fingerprint(self) -> Mapping[str, str]:
        """Digests of the encoders, of which clips there are, and of their captions."""
        encoders = {f"data.{name} digest": d[:12] for name, d in self._files.digests.items()}
        cut = {c.bucket for c in self.plan.clips if self._files.tiling(c) is not WHOLE}
        tiled = ", ".join(sorted({f"{bucket.width} x {bucket.height}" for bucket in cut}))
        return {**encoders, **self.plan.digests(), "data.sizes in tiles": tiled or "none"}

    def batch(self, index: int) -> Batch:
        """Clips of one bucket with one of their captions each, or none."""
        _, rows = self._order.step(index)
        rng = np.random.default_rng([self._seed, TRAINING_STREAM, index])
        clips = [self.plan.clips[row] for row in rows]
        texts = [clip.file.captions[int(rng.integers(len(clip.file.captions)))] for clip in clips]
        empty = rng.random(len(rows)) < self._text_dropout
        return self._batch(clips, ["" if e else t for e, t in zip(empty, texts, strict=True)])

    def held(self) -> Sequence[Batch]:
        """Clips of files that are never trained on, one a batch."""
        held = [clip for clip in self.plan.clips if clip.held][:HELD_CLIPS]
        return [self._batch([clip], [clip.file.captions[0]]) for clip in held]

    def examples(self) -> Sequence[Example]:
        """First captions of a few files in their own size: of those held out, if there are."""
        held = [clip for clip in self.plan.clips if clip.held]
        by_file = {clip.file.path: clip for clip in held or self.plan.clips}
        return [self._example(clip) for clip in list(by_file.values())[:_SHOWN]]

    def tags(self) -> Tags:
        """Count the pieces between commas of the captions of clips that are trained on."""
        found: dict[str, Counter[str]] = {}
        for clip in (clip for clip in self.plan.clips if not clip.held):
            folder = Path(self._datasets[clip.file.dataset].source).name
            pieces = ",".join(clip.file.captions).lower().split(",")
            found.setdefault(folder, Counter()).update(p.strip() for p in pieces if p.strip())
        return {folder: dict(count.most_common(_MOST_TAGS)) for folder, count in found.items()}

    def _example(self, clip: PlannedClip) -> Example:
        first = self._arrays(self._files.clip(clip))["first"] if self._is_i2v else None
        size = (clip.bucket.height, clip.bucket.width, clip.bucket.frames)
        return Example(clip.file.captions[0], *size, clip.fps, first)

    def _batch(self, clips: Sequence[PlannedClip], texts: Sequence[str]) -> Batch:
        latents = [self._arrays(self._files.clip(clip))["latents"] for clip in clips]
        given = [self._arrays(self._files.first(clip)) for clip in clips if self._is_i2v]
        states = [self._padded(self._arrays(self._files.text(text))["rows"]) for text in texts]
        return Batch(
            latents=jnp.asarray(np.stack(latents)),
            context=jnp.asarray(np.stack(states)),
            clip_fea=jnp.asarray(np.stack([g["image"] for g in given])) if given else None,
            y=jnp.asarray(np.stack([g["known"] for g in given])) if given else None,
            fps=jnp.asarray([clip.fps != 16 for clip in clips], jnp.int32),
        )

    def _padded(self, rows: np.ndarray) -> np.ndarray:
        states = np.zeros((self.text_length, rows.shape[1]), np.float32)
        states[: len(rows)] = rows
        return states

    def _arrays(self, file: Path) -> Mapping[str, np.ndarray]:
        with self._lock:
            if file in self._read:
                return self._read[file]
        arrays = read_encoded(file)
        size = sum(array.nbytes for array in arrays.values())
        with self._lock:
            if self._bytes + size <= _MEMORY and file not in self._read:
                self._read[file] = arrays
                self._bytes += size
        return arrays
