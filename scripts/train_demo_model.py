"""Train the bundled demo: a small GPT-NeoX and its byte-level BPE tokenizer, from plain text, in one command.

    python scripts/train_demo_model.py --data books.txt.xz --output-dir runs/demo --held-out unseen.txt

The defaults are the recipe of the model under experiments/assets/demo_model. A run that was interrupted or killed goes
on from its last checkpoint with the same command, and gives the same losses.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import shutil
import sys
from dataclasses import asdict
from pathlib import Path

if __name__ == "__main__":  # perhaps in a checkout that is not installed
    sys.path[0] = str(Path(__file__).resolve().parents[1])

import tokenizers
import torch
import transformers
from torch.utils.data import SequentialSampler
from transformers import GPTNeoXConfig, GPTNeoXForCausalLM, HfArgumentParser, ProgressCallback, Trainer

from experiments.cli import EXIT_FAILED, guarded
from experiments.config import SetupError
from experiments.demo_training import held_out
from experiments.demo_training.recipe import Options, Recipe
from experiments.demo_training.sequences import (
    Windows,
    encode,
    read_documents,
    read_text,
    save_tokenizer,
    train_tokenizer,
)
from experiments.environment import environment
from experiments.storage import differences, write_json
from experiments.texts import DOCUMENT_SEPARATOR

DOCUMENT_CHARACTERS = 16  # per token of context: several sequences of each document
TAIL_SHARE, TAIL_CHARACTERS = 0.1, 100_000  # of the last document, held out where no other text is


class DemoTrainer(Trainer):
    """Transformers' trainer; the sequences come in their order, so that a step sees what its number says."""

    def _get_train_sampler(self, *_: object) -> SequentialSampler:
        return SequentialSampler(self.train_dataset)


class LossOnBar(ProgressCallback):
    """Shows the loss beside the progress bar, and ends a run whose loss is no longer finite before it is saved."""

    def on_log(self, args, state, control, logs=None, **kwargs):
        loss = (logs or {}).get("loss")
        if loss is not None and not math.isfinite(loss):
            raise FloatingPointError(
                f"the loss is no longer finite at step {state.global_step}; lower --learning-rate"
            )
        if loss is not None and self.training_bar is not None:
            self.training_bar.set_postfix_str(f"loss {loss:.3f}")


def choose_device(requested: str) -> str:
    """-> "cpu" or "cuda", with one GPU visible: Trainer would take all. Raises SetupError where it cannot be used."""
    kind, _, index = requested.partition(":")
    if kind not in ("", "cpu", "cuda"):
        raise SetupError(f"--device {requested}: cannot be used here; cpu or cuda[:N]")
    visible = os.environ.get("CUDA_VISIBLE_DEVICES", "0").split(",")
    os.environ["CUDA_VISIBLE_DEVICES"] = index or visible[0]
    if kind == "cuda" and not torch.cuda.is_available():
        raise SetupError(f"--device {requested}: cannot be used here; there is no such CUDA device")
    return "cuda" if kind != "cpu" and torch.cuda.is_available() else "cpu"


def claim_folder(options: Options, identity: dict[str, object]) -> bool:
    """Note in the output folder which run it belongs to; -> whether that run's model is there already.

    Raises:
        SetupError: it belongs to another run, and --force was not given.
    """
    model, note = options.output_dir / "model.safetensors", options.output_dir / "run.json"
    if options.force:
        shutil.rmtree(options.work_dir, ignore_errors=True)
        for path in (model, note):
            path.unlink(missing_ok=True)
    if note.exists():
        theirs = json.loads(note.read_text(encoding="utf-8"))
        if differing := differences(theirs, identity):
            raise SetupError(
                f"--output-dir {options.output_dir}: belongs to a run of another configuration ({differing}); "
                "choose another folder, or --force to start anew"
            )
    elif model.exists():
        raise SetupError(f"--output-dir {options.output_dir}: holds a model; choose another folder, or --force")
    try:
        options.output_dir.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise SetupError(f"--output-dir {options.output_dir}: cannot be made ({error.strerror})") from None
    note.write_text(json.dumps(identity, indent=1) + "\n", encoding="utf-8")
    return model.exists()


def last_checkpoint(folder: Path) -> str | None:
    """The newest checkpoint that was written whole: its state is written last."""
    whole = []
    for path in folder.glob("checkpoint-*/trainer_state.json"):
        try:
            whole.append((json.loads(path.read_text(encoding="utf-8"))["global_step"], str(path.parent)))
        except ValueError:  # cut off in writing
            continue
    return max(whole, default=(0, None))[1]


def train(recipe: Recipe, options: Options, sequences: Windows) -> tuple[GPTNeoXForCausalLM, dict[str, object]]:
    """Train to the end of the recipe; -> the model, and what the report says of its training."""
    transformers.set_seed(recipe.seed)
    model = GPTNeoXForCausalLM(GPTNeoXConfig.from_dict(recipe.config())).float()
    trainer = DemoTrainer(model, recipe.training(options), data_collator=lambda batch: batch, train_dataset=sequences)
    trainer.remove_callback(ProgressCallback)
    trainer.add_callback(LossOnBar())
    if checkpoint := last_checkpoint(options.work_dir):
        print(f"resuming from {checkpoint}", flush=True)
    metrics = trainer.train(resume_from_checkpoint=checkpoint).metrics
    curve = [(entry["step"], round(entry["loss"], 4)) for entry in trainer.state.log_history if "loss" in entry]
    sequences_seen = recipe.steps * recipe.batch_size
    return model, {
        "steps": recipe.steps,
        "tokens": sequences_seen * recipe.context_length,
        "epochs": sequences_seen / sequences.per_epoch,
        "last_session_sec": metrics["train_runtime"],
        "final_loss": curve[-1][1],
        "loss_curve": curve,
    }


def write_model(model: GPTNeoXForCausalLM, recipe: Recipe, options: Options) -> None:
    """Write the weights in float16, and a configuration with which Transformers 4.56 to 5.x load them in float32."""
    folder = options.work_dir / "model"
    model.half().save_pretrained(folder)
    (folder / "config.json").write_text(json.dumps(recipe.config(), indent=2, sort_keys=True) + "\n", encoding="utf-8")
    # The weights last: where they are, everything is.
    for path in sorted(folder.iterdir(), key=lambda path: path.suffix == ".safetensors"):
        os.replace(path, options.output_dir / path.name)
    shutil.rmtree(options.work_dir)


def measure(
    recipe: Recipe, options: Options, tokenizer: object, streams: dict[str, torch.Tensor]
) -> dict[str, object]:
    """What the report says of the written model on the held-out streams; printed too."""
    cache_size = recipe.context_length // 2
    results = held_out.measure(options.output_dir, tokenizer, streams, cache_size, options.device)
    shares = held_out.sink_shares(options.output_dir, streams.values(), recipe.context_length, options.device)
    print(held_out.format_table(results, shares, cache_size), flush=True)
    return {
        "n_sink": held_out.N_SINK,
        "cache_size": cache_size,
        "dtype": "float32",
        "start_character": options.held_out_start if options.held_out else 0,
        "results": results,
        "attention_on_token_0_by_layer": shares,
    }


def run(recipe: Recipe, options: Options) -> int:
    """Train, write, report. Raises SetupError where something is wrong that is found before training."""
    texts = {path.name: read_text(path)[options.held_out_start :] for path in options.held_out}
    if len(texts) < len(options.held_out):
        raise SetupError("--held-out: two texts have the same file name")
    name = options.data if options.data.startswith("hf:") else Path(options.data).name
    documents = read_documents(options.data, DOCUMENT_CHARACTERS * recipe.context_length)
    if not texts:
        cut = len(documents[-1]) - min(int(TAIL_SHARE * len(documents[-1])), TAIL_CHARACTERS)
        texts, documents[-1] = {f"{name} (end)": documents[-1][cut:]}, documents[-1][:cut]
    tokenizer = train_tokenizer(documents, recipe.vocab_size)
    limits = {"max_tokens": options.held_out_tokens, "min_tokens": 2 * recipe.context_length}
    streams = {text: held_out.make_stream(tokenizer, text, content, **limits) for text, content in texts.items()}
    ids = encode(tokenizer, documents)
    sequences = Windows(ids, recipe.context_length, recipe.steps * recipe.batch_size, recipe.seed)
    characters, tokens = sum(map(len, documents)), sum(map(len, ids))
    data = {
        "source": name,
        "sha256": hashlib.sha256(DOCUMENT_SEPARATOR.join(documents).encode()).hexdigest(),
        "documents": len(documents),
        "characters": characters,
        "tokens": tokens,
        "characters_per_token": characters / tokens,
    }
    report = options.output_dir / "report.json"
    if not claim_folder(options, {**asdict(recipe), "data_sha256": data["sha256"]}):
        model, training = train(recipe, options, sequences)
        where = environment(torch.device(options.device), " ".join(sys.argv), recipe.seed)
        where |= {"autocast": "bfloat16" if options.on_cuda else None, "compiled": options.compile}
        where |= {"tokenizers": tokenizers.__version__}
        facts = {"schema_version": 1, "recipe": asdict(recipe), "parameters": model.num_parameters(), "data": data}
        facts |= {"training": training, "environment": where, "held_out": None}
        write_json(report, facts)
        save_tokenizer(tokenizer, options.output_dir)
        write_model(model, recipe, options)
    facts = json.loads(report.read_text(encoding="utf-8"))
    try:
        write_json(report, {**facts, "held_out": measure(recipe, options, tokenizer, streams)})
    except Exception as error:  # whatever it is, a trained model must not be lost to its report
        failed = f"the model is written, but its report failed ({type(error).__name__}: {error}); run this again"
        print(f"error: {failed}", file=sys.stderr, flush=True)
        return EXIT_FAILED
    print(f"wrote {options.output_dir}", flush=True)
    return 0


def main(argv: list[str] | None = None) -> int:
    parser = HfArgumentParser((Options, Recipe), description=__doc__, allow_abbrev=False)
    transformers.utils.logging.disable_progress_bar()  # of tensors, which take milliseconds

    def command() -> int:
        try:
            options, recipe = parser.parse_args_into_dataclasses(argv)
        except ValueError as error:  # options that there are not
            raise SetupError(str(error)) from None
        options.device = choose_device(options.device)
        return run(recipe, options)

    later = "the same command goes on from the last checkpoint"
    return guarded(command, OSError, FloatingPointError, torch.cuda.OutOfMemoryError, later=later)


if __name__ == "__main__":
    sys.exit(main())
