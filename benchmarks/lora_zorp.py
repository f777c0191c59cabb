"""A LoRA that learns a word: "zorp" for a red star, from 100 clips, judged before and after.

``python -m benchmarks.lora_zorp [--count 100]`` makes the clips, and 300 of what the small model
knows already; trains with ``configs/mini/lora-zorp.toml``, whose last step was fixed on other
scenes than those that are judged; and has fresh videos of zorps and of all else that the small
model knows judged. Of training the CPU's seconds are shown: the machine need not be quiet.
"""

import argparse
import json
import re
import resource
import subprocess
import sys
from functools import partial
from pathlib import Path

import numpy as np

from skyreels_jax.evaluation.scores import FPS, FRAMES, MINI_CLIP, MINI_SIZE, score
from skyreels_jax.hub import enable_compilation_cache
from skyreels_jax.media import write_video
from skyreels_jax.moving_shapes.captions import caption, plain_caption
from skyreels_jax.moving_shapes.render import render
from skyreels_jax.moving_shapes.scene import Scene, draw_scene
from skyreels_jax.pipeline import Pipeline

ROOT = Path(__file__).parents[1]
RECIPE = ROOT / "configs" / "mini" / "lora-zorp.toml"
ZORPS, KNOWN = Path("out/mini/lora-zorp-clips"), Path("out/mini/lora-zorp-known")
WORD = "zorp"
WORDINGS = 2
ZORP_CLIPS, KNOWN_CLIPS = 100, 300
# What the issue asks for: shares of zorps before and after, and of known captions after.
MOST_BEFORE, LEAST_AFTER, LEAST_KNOWN = 0.05, 0.85, 0.88


def scenes(count: int, seed: int, *, zorps: bool) -> list[Scene]:
    """Scenes of one thing: a red star each, or none of them one."""
    rng, found = np.random.default_rng([seed, 79]), []
    while len(found) < count:
        scene = draw_scene(rng, FRAMES / FPS)
        thing = scene.things[0]
        is_zorp = (thing.colour, thing.kind) == ("red", "star")
        if len(scene.things) == 1 and is_zorp == zorps:
            found.append(scene)
    return found


def with_word(text: str) -> str:
    """A caption of a red star with the word in its place."""
    return re.sub(r"\bred star\b", WORD, text)


def make_clips(folder: Path, *, zorps: bool, count: int) -> None:
    """Videos of red stars and captions that have the word for it, or of all else.

    A clip has the plain wording, which is judged too, and another: one is drawn each time.
    """
    folder.mkdir(parents=True, exist_ok=True)
    rng, rows = np.random.default_rng(5 if zorps else 6), []
    for number, scene in enumerate(scenes(count, 0 if zorps else 3, zorps=zorps)):
        frames = render(scene, frames=FRAMES, fps=float(FPS), size=MINI_SIZE)
        write_video(folder / f"{number:03d}.mp4", frames, fps=FPS)
        texts = [plain_caption(scene), *(caption(scene, rng) for _ in range(WORDINGS - 1))]
        texts = [with_word(text) if zorps else text for text in texts]
        rows.append(json.dumps({"file_name": f"{number:03d}.mp4", "caption": texts}) + "\n")
    (folder / "metadata.jsonl").write_text("".join(rows))


def judged(pipeline: Pipeline, count: int, *, zorps: bool) -> float:
    """The share of fresh videos in which colour, outline and motion are right."""
    said = with_word if zorps else str

    def make(scene: Scene, seed: int) -> np.ndarray:
        return pipeline(said(plain_caption(scene)), seed=seed, **MINI_CLIP).frames

    log = partial(print, file=sys.stderr, flush=True)
    found = score(make, scenes(count, 1, zorps=zorps), log=log)
    print(f"{'zorps' if zorps else 'known'}: {found.shares()}", flush=True)
    share = found.share("all")
    return share.right / share.of


def main() -> None:
    """Make clips, train, and judge."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.lora_zorp", description=__doc__)
    parser.add_argument("--count", type=int, default=100, help="scenes of each kind (100)")
    parser.add_argument("--lora", type=Path, help="judge this file instead of training one")
    options = parser.parse_args()
    enable_compilation_cache()
    lora = options.lora
    if lora is None:
        make_clips(ZORPS, zorps=True, count=ZORP_CLIPS)
        make_clips(KNOWN, zorps=False, count=KNOWN_CLIPS)
        command = [sys.executable, "-m", "skyreels_jax.cli.main", "train", str(RECIPE)]
        folder = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout
        used = resource.getrusage(resource.RUSAGE_CHILDREN)
        print(f"trained in {used.ru_utime + used.ru_stime:.0f} s of one core", flush=True)
        lora = Path(folder.strip()) / "pytorch_lora_weights.safetensors"
    pipeline = Pipeline.from_pretrained("mini", dtype="float32", keep=True)
    before = judged(pipeline, options.count, zorps=True)
    pipeline.load_lora(lora)
    after = judged(pipeline, options.count, zorps=True)
    known = judged(pipeline, options.count, zorps=False)
    print(f"zorps {before:.0%} -> {after:.0%}, known captions {known:.0%}")
    missed = before > MOST_BEFORE or after < LEAST_AFTER or known < LEAST_KNOWN
    asked = f"asked for: {MOST_BEFORE:.0%} -> {LEAST_AFTER:.0%}, {LEAST_KNOWN:.0%}"
    sys.exit(asked if missed else 0)


if __name__ == "__main__":
    main()
