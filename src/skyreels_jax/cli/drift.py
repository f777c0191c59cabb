"""``skyreels-jax drift VIDEO``: whether its brightness, colour, sharpness or content drifts."""

import argparse
import json
from pathlib import Path


def add_parser(subparsers: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Add the ``drift`` verb."""
    summary = "whether a video's likeness, brightness, colour or sharpness drifts over time"
    parser = subparsers.add_parser("drift", help=summary, description=f"{summary}.")
    parser.add_argument("video", metavar="VIDEO", type=Path)
    parser.add_argument("--json", action="store_true", help="print JSON instead of lines")
    parser.add_argument("--plot", metavar="FILE.svg", type=Path, help="draw it, too")
    parser.add_argument("--overwrite", action="store_true", help="replace FILE if it is there")


def run(args: argparse.Namespace) -> int:
    """Measure every frame and print what was seen; 0 whatever that is."""
    from skyreels_jax.errors import RequestError
    from skyreels_jax.evaluation.drift import DriftMeter
    from skyreels_jax.evaluation.drift_plot import write_drift_plot
    from skyreels_jax.media import stream_video, survey_video
    from skyreels_jax.outputs import check_place

    if args.plot is not None:
        if args.plot.suffix != ".svg":
            raise RequestError(f"--plot {args.plot}: drawings are SVG files, name it .svg")
        if args.plot.exists() and not args.overwrite:
            raise RequestError(f"{args.plot} exists: give another name, or --overwrite")
        check_place(args.plot, "plot")
    meter = DriftMeter(survey_video(args.video).rate)
    for frame in stream_video(args.video):
        if min(frame.shape[:2]) < 3:
            raise RequestError(f"video {args.video} is smaller than 3 x 3 pixels")
        meter.add(frame[None])
    drift = meter.report()
    if args.plot is not None:
        write_drift_plot(args.plot, drift, args.video.name)
    if args.json:
        print(json.dumps(drift.as_json(), indent=2))
    else:
        for line in drift.lines():
            print(line)
    return 0
