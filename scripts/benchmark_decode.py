#!/usr/bin/env python
"""How long a decoded token takes, and how far that is from what memory allows: all contenders side by side.

python scripts/benchmark_decode.py --output results/decode.json --figures figures/decode
"""

from __future__ import annotations

import argparse
import shlex
import sys
import time

from decode_benchmark.command_line import build_parser, check

from experiments.cli import guarded
from experiments.config import SetupError


def main(argv: list[str] | None = None) -> int:
    arguments = build_parser(__doc__.splitlines()[0]).parse_args(argv)
    given = sys.argv[1:] if argv is None else argv
    return guarded(lambda: _run(arguments, shlex.join(["python", "scripts/benchmark_decode.py", *given])))


def _run(arguments: argparse.Namespace, command: str) -> int:
    check(arguments)
    if arguments.plot_only:  # needs no torch
        return _draw(arguments, [_read(path) for path in arguments.plot_only])
    from decode_benchmark.prepare import prepare

    start = time.monotonic()
    benchmark = prepare(arguments, command, start, print)
    try:
        finished = benchmark.run()
    except KeyboardInterrupt:
        print("interrupted: what is finished is kept, the same command goes on from there", file=sys.stderr)
        raise
    if not finished:
        print(f"stopped after {time.monotonic() - start:.0f} s: {benchmark.left} runs left; the same command goes on")
    print(benchmark.file.table())
    if arguments.figures is not None:
        _draw(arguments, [benchmark.file.contents(finished)])
    for failure in benchmark.file.failures:
        print(f"FAILED: {failure}")
    return 1 if benchmark.file.failures else 0


def _read(path) -> dict:
    from experiments.storage import read_json

    try:
        value = read_json(path)
    except (OSError, ValueError) as error:
        raise SetupError(f"--plot-only {path}: {error}") from None
    if value.get("benchmark") != "decode":
        raise SetupError(f"--plot-only {path}: not a result of this program")
    return value


def _draw(arguments: argparse.Namespace, results: list[dict]) -> int:
    from decode_benchmark.figure import draw

    for path in draw(results, arguments.figures, tuple(arguments.format)):
        print(path)
    return 0


if __name__ == "__main__":
    sys.exit(main())
