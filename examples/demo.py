"""A first run: a prompt in, a video out; then a picture in, and the same.

``make demo`` runs this, with the small trained models that come with the package: they know moving
shapes, and nothing else. Their videos are 64 pixels wide, so each has an enlarged GIF beside it.
"""

import argparse
import time
from pathlib import Path

from skyreels_jax import Pipeline, Video
from skyreels_jax.cli.report import console_progress
from skyreels_jax.hub import enable_compilation_cache
from skyreels_jax.media import contact_sheet, write_gif, write_image

PROMPT = "a red star moves slowly to the right on a black background"
IMAGE = Path(__file__).with_name("star.png")
IMAGE_PROMPT = "a red star moves slowly to the right"
# Times as wide as the video.
ENLARGE = 6


def save(video: Video, output: Path) -> None:
    """Write the MP4, and an enlarged GIF beside it."""
    video.save(output)
    write_gif(output.with_suffix(".gif"), video.frames, fps=float(video.fps), enlarge=ENLARGE)


def main() -> None:
    """Make the videos."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--prompt", default=PROMPT)
    parser.add_argument("--image-prompt", default=IMAGE_PROMPT, help="what the picture's star does")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", type=Path, default=Path("out/demo.mp4"))
    args = parser.parse_args()

    started = time.perf_counter()
    enable_compilation_cache()
    args.output.parent.mkdir(parents=True, exist_ok=True)
    moved = args.output.with_stem(f"{args.output.stem}-from-image")

    print(f"1 of 2: {args.prompt!r}", flush=True)
    with console_progress() as progress:
        pipeline = Pipeline.from_pretrained("mini", dtype="float32")
        video = pipeline(args.prompt, seed=args.seed, progress=progress)
    save(video, args.output)
    sheet = args.output.with_suffix(".png")
    write_image(sheet, contact_sheet(video.frames))

    print(f"2 of 2: {IMAGE.name}, {args.image_prompt!r}", flush=True)
    with console_progress() as progress:
        pipeline = Pipeline.from_pretrained("mini-i2v", dtype="float32")
        second = pipeline(args.image_prompt, image=IMAGE, seed=args.seed, progress=progress)
    save(second, moved)

    seconds = time.perf_counter() - started
    frames, height, width, _ = video.frames.shape
    print(
        f"Two videos of {frames} frames, {width} x {height}, in {seconds:.0f} seconds:\n\n"
        f"  {args.output}  from the prompt alone; {sheet} shows its frames side by side\n"
        f"  {moved}  from {IMAGE.name} and a prompt\n\n"
        f"Look at the GIFs, {ENLARGE} times as wide:\n\n"
        f"  {args.output.with_suffix('.gif')}\n"
        f"  {moved.with_suffix('.gif')}\n\n"
        "Try `--prompt` with other shapes (circle, square, triangle, star), colours and\n"
        "directions. With the published weights (tens of GB, and a GPU or TPU) the same is:\n\n"
        "  skyreels-jax generate --model Skywork/SkyReels-V2-DF-1.3B-540P \\\n"
        '      --prompt "a sailing boat on a lake" --output boat.mp4'
    )


if __name__ == "__main__":
    main()
