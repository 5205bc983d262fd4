"""The command line of `train_demo_model.py`, and what it checks before anything is read."""

from __future__ import annotations

import argparse
from dataclasses import dataclass, fields
from pathlib import Path

import torch

from .corpus import HF_FORM
from .recipe import Recipe

MAX_WARMUP_STEPS = 300

EPILOG = """examples:
  python scripts/train_demo_model.py --data books.txt.xz --output-dir runs/demo --held-out anne.txt summer.txt
  python scripts/train_demo_model.py --data texts/ --output-dir runs/mine --max-minutes 6
  python scripts/train_demo_model.py --data hf:roneneldan/TinyStories --output-dir runs/stories --steps 4000

exit codes: 0 trained and reported; 1 failed while running (a trained model is kept); 2 wrong arguments or
data; 130 interrupted, the same command goes on."""


@dataclass(frozen=True)
class Job:
    """One command line, checked."""

    recipe: Recipe
    data: str
    output_dir: Path
    work_dir: Path
    held_out: tuple[Path, ...]
    held_out_start: int
    held_out_tokens: int
    device: torch.device
    compile_model: bool | None
    checkpoint_every_sec: float
    force: bool

    @property
    def checkpoint_path(self) -> Path:
        return self.work_dir / "checkpoint.pt"


def build_parser(description: str) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=description,
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    files = parser.add_argument_group("data and output")
    files.add_argument("--data", required=True, help=f"text: a .txt, a folder of .txt, an .xz of text, or {HF_FORM}")
    files.add_argument("--output-dir", required=True, type=Path, help="receives model, tokenizer and report.json")
    files.add_argument("--work-dir", type=Path, help="checkpoint and token cache (default: OUTPUT_DIR/work)")
    files.add_argument(
        "--held-out",
        nargs="+",
        type=Path,
        default=[],
        help="texts for the report (default: the end of the last document, left out of training)",
    )
    files.add_argument(
        "--held-out-start", type=int, default=20_000, help="character to start at (default: %(default)s)"
    )
    files.add_argument(
        "--held-out-tokens", type=int, default=4096, help="length of the streams (default: %(default)s)"
    )
    recipe = parser.add_argument_group("recipe (defaults: the shipped model's)")
    for field in fields(Recipe):
        name = f"--{field.name.replace('_', '-')}"
        kind = int if isinstance(field.default, int) else float
        default = "min(300, a tenth of the steps)" if field.name == "warmup_steps" else field.default
        value = None if field.name == "warmup_steps" else field.default
        recipe.add_argument(
            name, type=kind, default=value, metavar=kind.__name__.upper(), help=f"(default: {default})"
        )
    running = parser.add_argument_group("running")
    running.add_argument("--device", help="cpu, cuda, cuda:1, ... (default: cuda where there is one)")
    running.add_argument(
        "--compile",
        action=argparse.BooleanOptionalAction,
        default=None,
        dest="compile_model",
        help="torch.compile the model (default: on CUDA)",
    )
    running.add_argument("--checkpoint-every-sec", type=float, default=60.0, help="(default: %(default)s)")
    running.add_argument("--force", action="store_true", help="start anew where a checkpoint of any run lies")
    return parser


def make_job(args: argparse.Namespace) -> Job:
    """Check the arguments.

    Raises:
        ValueError: names the argument, its value and what is allowed.
    """
    chosen = {field.name: getattr(args, field.name) for field in fields(Recipe)}
    if chosen["warmup_steps"] is None:
        chosen["warmup_steps"] = min(MAX_WARMUP_STEPS, chosen["steps"] // 10)
    if args.held_out_start < 0:
        raise ValueError(f"--held-out-start {args.held_out_start}: must be at least 0")
    if not args.checkpoint_every_sec > 0:
        raise ValueError(f"--checkpoint-every-sec {args.checkpoint_every_sec}: must be positive")
    recipe = Recipe(**chosen)
    if args.held_out_tokens < 2 * recipe.context_length:
        raise ValueError(f"--held-out-tokens {args.held_out_tokens}: must be at least {2 * recipe.context_length}")
    return Job(
        recipe=recipe,
        data=args.data,
        output_dir=args.output_dir,
        work_dir=args.work_dir or args.output_dir / "work",
        held_out=tuple(args.held_out),
        held_out_start=args.held_out_start,
        held_out_tokens=args.held_out_tokens,
        device=_device(args.device),
        compile_model=args.compile_model,
        checkpoint_every_sec=args.checkpoint_every_sec,
        force=args.force,
    )


def _device(requested: str | None) -> torch.device:
    if requested is None:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(requested)
        torch.zeros(1, device=device)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise ValueError(f"--device {requested}: cannot be used here ({str(error).splitlines()[0]})") from error
    return device
