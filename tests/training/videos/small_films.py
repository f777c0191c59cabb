"""Six tiny films as people have them, with captions, and a recipe on the parts of `mini`."""

from fractions import Fraction
from pathlib import Path

import numpy as np
from PIL import Image
from tests.media.films import colours, write_film

RECIPE = """
train = "video"
output = "{folder}/out"
[run]
steps = 4
log_every = 1
checkpoint_every = 2
[optimizer]
name = "sgd"
learning_rate = 1e-3
warmup = 0
[model]
dim = 24
ffn_dim = 32
num_heads = 2
num_layers = 1
[objective]
frames = 0.3
continued = 0.3
[data]
source = "folder"
vae = "mini"
text = "mini"
encoded = "{folder}/encoded"
resolution = 32
fps = 16
batch = 2
[[data.datasets]]
video_directory = "{folder}/films"
target_frames = [5]
"""
CAPTIONS = {
    "plain": "Four quarters of colour, and a line that moves.",
    "ntsc": "The same at 29.97 frames a second.",
    "uneven": "The same at uneven times.",
    "turned": "The same, held upright.",
    "sound": "The same with silence.",
    "wide": "The same in a wide frame.",
}


def make_films(folder: Path) -> Path:
    """``films`` in ``folder``: odd sizes, 29.97, uneven times, turned, sound, wide."""
    films = folder / "films"
    films.mkdir(parents=True)
    write_film(films / "plain.mp4", colours(9, 48, 64))
    write_film(films / "ntsc.mp4", colours(15, 46, 62), rate=Fraction(30000, 1001))
    times = [0, 0.05, 0.2, 0.25, 0.3, 0.45, 0.5, 0.55]
    write_film(films / "uneven.mkv", colours(8, 48, 64), rate=20, times=times)
    write_film(films / "turned.mp4", colours(8, 48, 64), turned=90)
    write_film(films / "sound.mp4", colours(8, 48, 48), sound="aac")
    write_film(films / "wide.mp4", colours(10, 32, 128), rate=24)
    for name, caption in CAPTIONS.items():
        (films / f"{name}.txt").write_text(caption + "\n")
    return films


def write_recipe(folder: Path, **changes: str) -> Path:
    """The recipe with some of its lines others: ``data__batch = "4"`` is of the table ``data``."""
    text = RECIPE.format(folder=folder)
    for name, value in changes.items():
        table, _, key = name.rpartition("__")
        head = {"datasets": "[[data.datasets]]"}.get(table, f"[{table}]")
        before, middle, after = text.partition(f"{head}\n")
        lines = [line for line in after.splitlines() if line.strip()]
        end = next((i for i, line in enumerate(lines) if line.startswith("[")), len(lines))
        kept = [line for line in lines[:end] if line.split(" = ")[0] != key]
        kept += [f"{key} = {value}"] if value else []
        text = before + middle + "\n".join([*kept, *lines[end:]]) + "\n"
    file = folder / "recipe.toml"
    file.write_text(text)
    return file


def write_picture(path: Path, height: int = 48, width: int = 64) -> None:
    """An image with its caption."""
    Image.fromarray(colours(1, height, width)[0]).save(path)
    path.with_suffix(".txt").write_text("Four quarters of colour.")


def noise_film(path: Path, frames: int = 8) -> None:
    """A film that no other is like."""
    rng = np.random.default_rng(len(path.name))
    write_film(path, rng.integers(0, 255, (frames, 32, 32, 3)).astype(np.uint8))
    path.with_suffix(".txt").write_text("Noise.")
