"""Train the bundled demo: a small GPT-NeoX and its byte-level BPE tokenizer, from plain text, in one command.

The defaults are the recipe of the model under `experiments/assets/demo_model`. The run can be interrupted at
any time; the same command goes on where it was.
"""

from __future__ import annotations

import json
import platform
import signal
import sys
import time
from dataclasses import asdict, dataclass

import tokenizers
import torch
import transformers
from demo_training import byte_bpe, corpus, held_out
from demo_training.batches import Batches
from demo_training.checkpoint import load_checkpoint
from demo_training.command_line import Job, build_parser, make_job
from demo_training.loop import Trainer, TrainingInterruptedError
from demo_training.recipe import export_model

EXIT_OK, EXIT_FAILED, EXIT_USAGE = 0, 1, 2
EXIT_SIGNAL = 128  # plus the signal's number: 130 for Ctrl-C
REPORT_SCHEMA_VERSION = 1
# Documents get at least this many characters per token of context: several training sequences each.
DOCUMENT_CHARACTERS_PER_CONTEXT_TOKEN = 16


@dataclass(frozen=True)
class Prepared:
    """What the text became: a tokenizer, tokens to train on, streams to report on, and a run to start or resume."""

    text: corpus.Corpus
    tokens: int
    tokenizer: tokenizers.Tokenizer
    held_out: list[held_out.HeldOutText]
    batches: Batches
    trainer: Trainer


def prepare(job: Job) -> Prepared:
    """Everything that can go wrong before training: texts, checkpoint, tokenizer, encoding.

    Raises:
        ValueError, OSError: something is wrong with an argument or a file; the output folder is as it was.
    """
    recipe = job.recipe
    unseen = {path.name: corpus.read_text(path) for path in job.held_out}
    if len(unseen) < len(job.held_out):
        raise ValueError("--held-out: two texts have the same file name")
    text = corpus.read_corpus(job.data, DOCUMENT_CHARACTERS_PER_CONTEXT_TOKEN * recipe.context_length)
    start = job.held_out_start
    if not unseen:
        text, tail = corpus.split_tail(text)
        unseen, start = {f"{text.name} (end)": tail}, 0
    say(f"{text.name}: {len(text.documents)} documents, {text.characters:,} characters")
    identity = {**recipe.as_dict(), "data_sha256": text.sha256}
    state = find_checkpoint(job, identity)
    for folder in (job.output_dir, job.work_dir):
        folder.mkdir(parents=True, exist_ok=True)
    tokenizer = byte_bpe.cached_tokenizer(text.documents, text.sha256, recipe.vocab_size, job.work_dir)
    encode = byte_bpe.as_transformers(tokenizer)
    limits = {"max_tokens": job.held_out_tokens, "min_tokens": 2 * recipe.context_length}
    streams = [
        held_out.make_held_out_text(encode, name, content, start_character=start, **limits)
        for name, content in unseen.items()
    ]
    ids, lengths = byte_bpe.cached_encoding(tokenizer, text.documents, text.sha256, job.work_dir)
    batches = Batches(
        ids,
        lengths,
        context_length=recipe.context_length,
        batch_size=recipe.batch_size,
        seed=recipe.seed,
        device=job.device,
    )
    trainer = Trainer(
        recipe,
        batches,
        device=job.device,
        checkpoint_path=job.checkpoint_path,
        checkpoint_every_sec=job.checkpoint_every_sec,
        identity=identity,
        compile_model=job.compile_model,
        say=say,
    )
    if state is not None:
        trainer.restore(state)
    return Prepared(text, len(ids), tokenizer, streams, batches, trainer)


def find_checkpoint(job: Job, identity: dict[str, object]) -> dict[str, object] | None:
    """The checkpoint to go on from, or None; never lets a run overwrite another one's model.

    Raises:
        ValueError: the folder holds something else, and --force was not given.
    """
    if job.force:
        job.checkpoint_path.unlink(missing_ok=True)
        return None
    if job.checkpoint_path.exists():
        return load_checkpoint(job.checkpoint_path, identity)
    if (job.output_dir / "model.safetensors").exists():
        raise ValueError(
            f"--output-dir {job.output_dir}: holds a model, and {job.checkpoint_path} does not exist; "
            "choose another folder, or --force to replace the model"
        )
    return None


def train(job: Job, prepared: Prepared) -> None:
    """Train to the end of the recipe and write model and tokenizer into the output folder."""
    recipe, trainer = job.recipe, prepared.trainer
    say(
        f"{trainer.parameters:,} parameters, {prepared.tokens:,} tokens of text, {recipe.steps} steps of "
        f"{recipe.tokens_per_step:,} tokens: {prepared.batches.epochs(recipe.steps):.1f} epochs, on {job.device}"
    )
    weights = trainer.run()
    byte_bpe.save_tokenizer(prepared.tokenizer, job.output_dir)
    export_model(recipe, weights, job.output_dir)


def describe(job: Job, prepared: Prepared) -> dict[str, object]:
    """Everything of report.json that is known once training is over."""
    recipe, trainer = job.recipe, prepared.trainer
    progress = trainer.progress
    tokens = progress.step * recipe.tokens_per_step
    on_cuda = job.device.type == "cuda"
    return {
        "schema_version": REPORT_SCHEMA_VERSION,
        "recipe": recipe.as_dict(),
        "parameters": trainer.parameters,
        "data": {
            "source": prepared.text.name,
            "sha256": prepared.text.sha256,
            "documents": len(prepared.text.documents),
            "characters": prepared.text.characters,
            "tokens": prepared.tokens,
            "characters_per_token": prepared.text.characters / prepared.tokens,
        },
        "training": {
            "steps": progress.step,
            "tokens": tokens,
            "epochs": prepared.batches.epochs(progress.step),
            "train_sec": progress.train_sec,
            "toks_per_sec": tokens / progress.train_sec,
            "final_loss": progress.curve[-1][1],
            "loss_curve": [[step, round(loss, 4)] for step, loss in progress.curve],
        },
        "environment": {
            "device": torch.cuda.get_device_name(job.device) if on_cuda else platform.machine(),
            "autocast": "bfloat16" if on_cuda else None,
            "compiled": trainer.compiled,
            "python": platform.python_version(),
            "torch": torch.__version__,
            "transformers": transformers.__version__,
            "tokenizers": tokenizers.__version__,
        },
    }


def report(job: Job, prepared: Prepared) -> int:
    """Measure the written model on the held-out texts; report.json is written even where that fails."""
    facts = describe(job, prepared)
    context_length = job.recipe.context_length
    cache_size = context_length // 2
    status = EXIT_OK
    try:
        results = held_out.measure(job.output_dir, prepared.held_out, cache_size, job.device)
        shares = held_out.sink_shares(job.output_dir, prepared.held_out, context_length, job.device)
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
        complain(
            f"the model is trained and written, but its report failed ({facts['held_out_error']}); "
            "the same command writes the report anew"
        )
        status = EXIT_FAILED
    with byte_bpe.atomic_path(job.output_dir / "report.json") as temporary:
        temporary.write_text(json.dumps(facts, indent=1) + "\n", encoding="utf-8")
    say(f"wrote {job.output_dir}")
    return status


def say(line: str) -> None:
    print(line, flush=True)


def complain(line: str) -> None:
    print(f"error: {line}", file=sys.stderr, flush=True)


def run(argv: list[str] | None) -> int:
    args = build_parser(__doc__).parse_args(argv)
    begin = time.monotonic()
    transformers.utils.logging.disable_progress_bar()  # they count tensors, in milliseconds
    try:
        job = make_job(args)
        prepared = prepare(job)
    except (ValueError, OSError) as error:
        complain(str(error))
        return EXIT_USAGE
    say(f"text and tokenizer ready after {time.monotonic() - begin:.0f} s")
    try:
        train(job, prepared)
        return report(job, prepared)
    except (FloatingPointError, OSError, torch.cuda.OutOfMemoryError) as error:
        complain(str(error))
        return EXIT_FAILED


def main(argv: list[str] | None = None) -> int:
    try:
        return run(argv)
    except TrainingInterruptedError as stopped:
        complain(f"{stopped}; the same command goes on from there")
        return EXIT_SIGNAL + stopped.signal_number
    except KeyboardInterrupt:
        complain("interrupted; the same command goes on")
        return EXIT_SIGNAL + signal.SIGINT


if __name__ == "__main__":
    sys.exit(main())
