"""The ``sora`` console script."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from sora_models.layers import BACKENDS


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command. Exit status: 0 done, 1 the builds disagree, 2 bad input."""
    arguments = _parser().parse_args(argv)
    try:
        return arguments.command(arguments)
    except (ValueError, ImportError, NotImplementedError, RuntimeError, OSError) as error:
        print(f"sora: error: {error}", file=sys.stderr)
        return 2


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="sora", description="The reference Sora video models.")
    commands = parser.add_subparsers(required=True, metavar="command")

    formats = argparse.ArgumentDefaultsHelpFormatter
    demo = commands.add_parser(
        "demo",
        help="run real clips through two builds of crnn and compare them",
        description="Decodes clips, runs crnn in two builds with the same weights, checks them "
        "against each other, prints one table and writes a picture.",
        formatter_class=formats,
    )
    from sora_models.data import SAMPLE_CLIPS

    demo.add_argument(
        "clips", nargs="*", default=list(SAMPLE_CLIPS), metavar="CLIP",
        help="paths of videos, or names of the sample clips",
    )  # fmt: skip
    demo.add_argument("--frames", type=_positive, default=32, help="most frames of a clip")
    demo.add_argument("--stride", type=_positive, default=3, help="takes every n-th frame")
    demo.add_argument("--size", type=_size, default="64x64", metavar="HxW", help="frame size")
    demo.add_argument("--backend-a", choices=BACKENDS, default="torch", help="first build")
    demo.add_argument("--backend-b", choices=BACKENDS, default="sora", help="second build")
    demo.add_argument("--out", type=Path, default=Path("out"), help="folder of the picture")
    demo.add_argument("--device", default="cpu", help="torch device")
    demo.add_argument("--seed", type=int, default=0, help="of the weights")
    demo.add_argument("--rounds", type=_positive, default=5, help="timed runs")
    demo.set_defaults(command=_demo)

    models = commands.add_parser("models", help="list the models")
    models.set_defaults(command=_models)
    return parser


def _demo(arguments: argparse.Namespace) -> int:
    from sora_models.demo.run import DemoOptions, run

    options = DemoOptions(
        clips=arguments.clips,
        frames=arguments.frames,
        stride=arguments.stride,
        size=arguments.size,
        backends=(arguments.backend_a, arguments.backend_b),
        out=arguments.out,
        device=arguments.device,
        seed=arguments.seed,
        rounds=arguments.rounds,
    )
    return 0 if run(options) else 1


def _models(arguments: argparse.Namespace) -> int:
    from sora_models._text import table
    from sora_models.layers import load, missing
    from sora_models.registry import list_models, model_class, parameter_count

    rows = []
    for name in list_models():
        model = model_class(name)
        needed = model.layers_used(model.config_class())
        builds = [backend for backend in BACKENDS if not missing(load(backend), needed)]
        rows.append([name, f"{parameter_count(name):,}", ", ".join(builds), ", ".join(needed)])
    print(table(["model", "parameters", "builds", "layers"], rows, left=(0, 2, 3)))
    return 0


def _positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"expected at least 1; got {text}")
    return value


def _size(text: str) -> tuple[int, int]:
    height, _, width = text.lower().partition("x")
    if not (height.isdecimal() and width.isdecimal() and int(height) and int(width)):
        raise argparse.ArgumentTypeError(f"expected HxW, such as 64x64; got {text!r}")
    return int(height), int(width)


if __name__ == "__main__":
    sys.exit(main())
