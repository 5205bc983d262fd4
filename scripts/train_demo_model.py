"""Train the bundled demo: a small GPT-NeoX and its byte-level BPE tokenizer, from plain text, in one command.

The defaults are the recipe of the model under `experiments/assets/demo_model`. The run can be interrupted at
any time; the same command goes on where it was.
"""

from __future__ import annotations

import argparse
import json
import platform
import signal
import sys
import time
from dataclasses import asdict, dataclass, fields
from pathlib import Path

import numpy as np
import tokenizers
import torch
import transformers
from demo_training import byte_bpe, corpus, held_out
from demo_training.batches import Batches
from demo_training.loop import Trainer, TrainingInterruptedError
from demo_training.recipe import Recipe, export_model

EXIT_OK, EXIT_FAILED, EXIT_USAGE, EXIT_INTERRUPTED = 0, 1, 2, 130
REPORT_SCHEMA_VERSION = 1
# Documents get at least this many characters per token of context: several training sequences each.
DOCUMENT_CHARACTERS_PER_CONTEXT_TOKEN = 16
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


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__,
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    files = parser.add_argument_group("data and output")
    files.add_argument(
        "--data", required=True, help=f"text: a .txt, a folder of .txt, an .xz of text, or {corpus.HF_FORM}"
    )
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


@dataclass(frozen=True)
class Prepared:
    """What the text became: tokens to train on, streams to report on."""

    text: corpus.Corpus
    ids: np.ndarray
    lengths: np.ndarray
    batches: Batches
    held_out: list[held_out.HeldOutText]
    identity: dict[str, object]


def prepare(job: Job) -> Prepared:
    """Read the text, train or load the tokenizer, encode, and check the held-out texts."""
    recipe = job.recipe
    unseen = {path.name: corpus.read_text(path) for path in job.held_out}
    if len(unseen) < len(job.held_out):
        raise ValueError("--held-out: two texts have the same file name")
    for folder in (job.output_dir, job.work_dir):
        folder.mkdir(parents=True, exist_ok=True)
    text = corpus.read_corpus(job.data, DOCUMENT_CHARACTERS_PER_CONTEXT_TOKEN * recipe.context_length)
    start = job.held_out_start
    if not unseen:
        text, tail = corpus.split_tail(text)
        unseen, start = {f"{text.name} (end)": tail}, 0
    say(f"{text.name}: {len(text.documents)} documents, {text.characters:,} characters")
    bpe = byte_bpe.cached_tokenizer(text.documents, text.sha256, recipe.vocab_size, job.work_dir)
    byte_bpe.save_tokenizer(bpe, job.output_dir)
    tokenizer = transformers.AutoTokenizer.from_pretrained(job.output_dir)
    streams = [
        held_out.make_held_out_text(
            tokenizer,
            name,
            unseen_text,
            start_character=start,
            max_tokens=job.held_out_tokens,
            min_tokens=2 * recipe.context_length,
        )
        for name, unseen_text in unseen.items()
    ]
    ids, lengths = byte_bpe.cached_encoding(bpe, text.documents, text.sha256, job.work_dir)
    batches = Batches(
        ids,
        lengths,
        context_length=recipe.context_length,
        batch_size=recipe.batch_size,
        seed=recipe.seed,
        device=job.device,
    )
    identity = {**recipe.as_dict(), "data_sha256": text.sha256}
    return Prepared(text, ids, lengths, batches, streams, identity)


def train(job: Job, prepared: Prepared) -> Trainer:
    """Train to the end of the recipe and write the model into the output folder."""
    recipe, batches = job.recipe, prepared.batches
    trainer = Trainer(
        recipe,
        batches,
        device=job.device,
        checkpoint_path=job.work_dir / "checkpoint.pt",
        checkpoint_every_sec=job.checkpoint_every_sec,
        identity=prepared.identity,
        compile_model=job.compile_model,
        say=say,
    )
    parameters = sum(p.numel() for p in trainer.model.parameters())
    say(
        f"{parameters:,} parameters, {len(prepared.ids):,} tokens of text, {recipe.steps} steps of "
        f"{recipe.tokens_per_step:,} tokens: {batches.epochs(recipe.steps):.1f} epochs, on {job.device}"
    )
    export_model(recipe, trainer.run(), job.output_dir)
    return trainer


def describe(job: Job, prepared: Prepared, trainer: Trainer) -> dict[str, object]:
    """Everything of report.json that is known once training is over."""
    recipe, progress = job.recipe, trainer.progress
    device = torch.cuda.get_device_name(job.device) if job.device.type == "cuda" else platform.machine()
    return {
        "schema_version": REPORT_SCHEMA_VERSION,
        "recipe": recipe.as_dict(),
        "parameters": sum(p.numel() for p in trainer.model.parameters()),
        "data": {
            "source": prepared.text.name,
            "sha256": prepared.text.sha256,
            "documents": len(prepared.text.documents),
            "characters": prepared.text.characters,
            "tokens": len(prepared.ids),
            "characters_per_token": prepared.text.characters / len(prepared.ids),
        },
        "training": {
            "steps": progress.step,
            "tokens": progress.step * recipe.tokens_per_step,
            "epochs": prepared.batches.epochs(progress.step),
            "train_sec": progress.train_sec,
            "toks_per_sec": progress.step * recipe.tokens_per_step / progress.train_sec,
            "final_loss": progress.curve[-1][1],
            "loss_curve": [[step, round(loss, 4)] for step, loss in progress.curve],
        },
        "environment": {
            "device": device,
            "autocast": "bfloat16" if job.device.type == "cuda" else None,
            "compiled": trainer.compiled,
            "python": platform.python_version(),
            "torch": torch.__version__,
            "transformers": transformers.__version__,
            "tokenizers": tokenizers.__version__,
        },
    }


def report(job: Job, prepared: Prepared, facts: dict[str, object]) -> int:
    """Measure the written model on the held-out texts; report.json is written even where that fails."""
    cache_size = job.recipe.context_length // 2
    status = EXIT_OK
    try:
        results = held_out.measure(job.output_dir, prepared.held_out, cache_size, job.device)
        shares = held_out.sink_shares(job.output_dir, prepared.held_out, job.recipe.context_length, job.device)
        facts["held_out"] = {
            "n_sink": held_out.N_SINK,
            "cache_size": cache_size,
            "dtype": "float32",
            "start_character": prepared.held_out[0].start_character,
            "results": [asdict(result) for result in results],
            "attention_on_token_0_by_layer": shares,
        }
        say(held_out.format_table(results, shares, cache_size))
    except Exception as error:  # whatever it is, a trained model must not be lost to its report
        facts["held_out"] = None
        facts["held_out_error"] = f"{type(error).__name__}: {error}"
        print(
            f"error: the model is trained and written, its report failed: {facts['held_out_error']}",
            file=sys.stderr,
        )
        status = EXIT_FAILED
    with byte_bpe.atomic_path(job.output_dir / "report.json") as temporary:
        temporary.write_text(json.dumps(facts, indent=1) + "\n", encoding="utf-8")
    say(f"wrote {job.output_dir}")
    return status


def say(line: str) -> None:
    print(line, flush=True)


def main(argv: list[str] | None = None) -> int:
    args = build_parser().parse_args(argv)
    begin = time.monotonic()
    transformers.utils.logging.disable_progress_bar()  # they count tensors, in milliseconds
    try:
        job = make_job(args)
        if job.force:
            (job.work_dir / "checkpoint.pt").unlink(missing_ok=True)
        prepared = prepare(job)
        say(f"text and tokenizer ready after {time.monotonic() - begin:.0f} s")
        trainer = train(job, prepared)
        return report(job, prepared, describe(job, prepared, trainer))
    except TrainingInterruptedError as stopped:
        print(f"{stopped}; the same command goes on from there", file=sys.stderr)
        return 128 + stopped.signal_number
    except KeyboardInterrupt:
        print("interrupted; the same command goes on", file=sys.stderr)
        return 128 + signal.SIGINT
    except FloatingPointError as error:
        print(f"error: {error}", file=sys.stderr)
        return EXIT_FAILED
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return EXIT_USAGE


if __name__ == "__main__":
    sys.exit(main())
