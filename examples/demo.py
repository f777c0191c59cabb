"""A first run: an image and a prompt in, an MP4 out.

``make demo`` runs this. The model is made on the spot: it has the architecture and the files of
SkyReels-V2-I2V, but small and with random weights. The video shows that everything works; it does
not show what the prompt says.
"""

import argparse
import time
from os.path import relpath
from pathlib import Path

from skyreels_jax import Pipeline
from skyreels_jax.caches import enable_compilation_cache
from skyreels_jax.reference.random_checkpoint import make_checkpoint

IMAGE = Path(__file__).with_name("first_frame.png")
PROMPT = "A sailing boat on a lake, the sun sinks behind the mountains"


def main() -> None:
    """Make the video."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, default=Path("out/demo.mp4"))
    output: Path = parser.parse_args().output

    started = time.perf_counter()
    enable_compilation_cache()
    checkpoint = output.parent / "demo-checkpoint"
    if not checkpoint.is_dir():
        print(f"Making a small model with random weights: {checkpoint}")
        make_checkpoint(checkpoint, "i2v")
    pipeline = Pipeline.from_pretrained(checkpoint)
    print(f"Making a video from {IMAGE.name}: {PROMPT!r}")
    video = pipeline(
        PROMPT, image=IMAGE, height=96, width=160, num_frames=33, fps=16, steps=10, seed=0
    )
    video.save(output)
    seconds = time.perf_counter() - started
    frames, height, width, _ = video.frames.shape
    print(f"Wrote {output}: {frames} frames of {width} x {height}, in {seconds:.0f} seconds.")
    print(
        "Its weights are random numbers, so it is noise that follows neither image nor prompt. With"
        "\nthe published weights (tens of GB, and a GPU or TPU) the same steps are:\n\n"
        "  skyreels-jax generate --model Skywork/SkyReels-V2-I2V-1.3B-540P \\\n"
        f'      --image {relpath(IMAGE)} --prompt "{PROMPT}" --output boat.mp4'
    )


if __name__ == "__main__":
    main()
