"""A first run: a prompt in, an MP4 and a sheet of its frames out.

``make demo`` runs this, with the small trained model that comes with the package: it knows moving
shapes, and nothing else.
"""

import argparse
import time
from pathlib import Path

from skyreels_jax import Pipeline
from skyreels_jax.hub import enable_compilation_cache
from skyreels_jax.media import contact_sheet, write_image

PROMPT = "a red star moves slowly to the right on a black background"


def main() -> None:
    """Make the video."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--prompt", default=PROMPT)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", type=Path, default=Path("out/demo.mp4"))
    args = parser.parse_args()

    started = time.perf_counter()
    enable_compilation_cache()
    args.output.parent.mkdir(parents=True, exist_ok=True)
    pipeline = Pipeline.from_pretrained("mini", dtype="float32")
    print(f"Making a video: {args.prompt!r}")
    video = pipeline(args.prompt, seed=args.seed)
    video.save(args.output)
    sheet = args.output.with_suffix(".png")
    write_image(sheet, contact_sheet(video.frames))
    seconds = time.perf_counter() - started
    frames, height, width, _ = video.frames.shape
    print(
        f"Wrote {args.output}: {frames} frames of {width} x {height}, in {seconds:.0f} seconds;\n"
        f"{sheet} shows them side by side. Try `--prompt` with other shapes (circle, square,\n"
        "triangle, star), colours and directions. With the published weights (tens of GB, and a\n"
        "GPU or TPU) the same is:\n\n"
        "  skyreels-jax generate --model Skywork/SkyReels-V2-DF-1.3B-540P \\\n"
        '      --prompt "a sailing boat on a lake" --output boat.mp4'
    )


if __name__ == "__main__":
    main()
