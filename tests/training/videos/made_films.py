"""Twenty films of moving shapes as people have films, and the recipe of a LoRA of `mini` on them.

``python -m tests.training.videos.made_films FOLDER`` makes the films and prints the command.
"""

import sys
from fractions import Fraction
from itertools import pairwise
from pathlib import Path

import numpy as np
from tests.media.films import write_film

from skyreels_jax.moving_shapes.captions import plain_caption
from skyreels_jax.moving_shapes.render import render
from skyreels_jax.moving_shapes.scene import draw_scene

FILMS = 20
# Height and width, rate, whether times are uneven, degrees turned, sound.
_SIZES = ((64, 64), (58, 86), (90, 62), (72, 128), (98, 98))
_RATES = (Fraction(30000, 1001), Fraction(16), Fraction(24), Fraction(25))
_TURNS = (0, 0, 90, 0, 270, 180)

RECIPE = """
train = "video"
output = "{folder}/out"
[run]
steps = 30
log_every = 1
checkpoint_every = 3
sample_every = 15
sample_prompts = "{folder}/prompts.txt"
[optimizer]
learning_rate = 1e-3
warmup = 5
[model]
start = "mini"
[lora]
rank = 4
targets = "attention"
[objective]
shift = 4.0
frames = 0.2
[data]
source = "folder"
vae = "mini"
text = "mini"
encoded = "{folder}/encoded"
resolution = 64
fps = 16
batch = 2
validation_split = 0.1
[[data.datasets]]
video_directory = "{films}"
target_frames = [5]
"""
PROMPTS = """# two looks at what it learns
A red star moves slowly up, on a black background. --w 64 --h 64 --f 5 --s 4 --d 1
A blue circle stands, on a white background. --w 96 --h 48 --f 5 --s 4 --d 2 --l 3 --n green
"""


def make_films(folder: Path) -> Path:
    """Films and captions: odd sizes, 29.97 and uneven times, turned, with sound."""
    folder.mkdir(parents=True)
    for number in range(FILMS):
        rng = np.random.default_rng([20, number])
        size, rate = _SIZES[number % len(_SIZES)], _RATES[number % len(_RATES)]
        count = round(0.8 * rate)
        scene = draw_scene(rng, 1.0)
        times = None
        if number % 6 == 5:
            # As of a phone: each frame up to a third of its time late.
            times = [(n + rng.random() / 3) / float(rate) for n in range(count)]
            assert all(a < b for a, b in pairwise(times))
        name = folder / f"{number:02d}.{'mkv' if times else 'mp4'}"
        write_film(
            name,
            render(scene, frames=count, fps=float(rate), size=size),
            rate=rate,
            times=times,
            turned=0 if times else _TURNS[number % len(_TURNS)],
            sound="aac" if number % 3 == 0 and not times else None,
        )
        name.with_suffix(".txt").write_text(plain_caption(scene) + "\n")
    return folder


def write_lora_recipe(folder: Path, films: Path) -> Path:
    """The recipe and its prompts in a folder of their own."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "prompts.txt").write_text(PROMPTS)
    file = folder / "lora.toml"
    file.write_text(RECIPE.format(folder=folder, films=films))
    return file


if __name__ == "__main__":
    made = Path(sys.argv[1])
    print(f"skyreels-jax train {write_lora_recipe(made, make_films(made / 'films'))}")
