"""What the tests of the evaluation share: a tiny model in a folder, with a tokenizer, and texts."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

from conftest import make_neox

from experiments.config import ExperimentConfig
from experiments.runner import ExperimentRunner

TEXT = " ".join(f"word{n % 37} goes {n % 11} times round the {'hill' if n % 3 else 'lake'}." for n in range(400))
END = "<|endoftext|>"


def make_tokenizer():
    """A byte-level tokenizer without merges (a token for each byte) that puts <|endoftext|> in front by itself."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE({END: 0} | {letter: n for n, letter in enumerate(letters, start=1)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([END])
    tokenizer.post_processor = processors.TemplateProcessing(single=f"{END} $A", special_tokens=[(END, 0)])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token=END, eos_token=END)


def make_model_folder(folder: Path, **changes) -> Path:
    """A folder with a tiny random GPT-NeoX and its tokenizer."""
    options = {"vocab_size": 260, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2} | changes
    make_neox(max_position_embeddings=64, **options).save_pretrained(folder)
    make_tokenizer().save_pretrained(folder)
    return folder


def make_text(path: Path, text: str = TEXT) -> Path:
    path.write_text(text, encoding="utf-8")
    return path


def error_line(call: Callable[[], int], capsys) -> str:
    """What a command line says that ends with exit code 2: one line, which begins with ``error: ``."""
    capsys.readouterr()
    try:
        code = call()
    except SystemExit as stopped:
        code = stopped.code
    message = capsys.readouterr().err
    assert (code, message.count("\n"), message[:7]) == (2, 1, "error: "), message
    return message


class World:
    """A model folder, two texts and an output folder; runs configurations and keeps what was said."""

    def __init__(self, base: Path):
        self.base = base
        self.model = make_model_folder(base / "tiny")
        self.texts = (make_text(base / "one.txt"), make_text(base / "two.txt", TEXT[1000:]))
        self.output = base / "out"
        self.said: list[str] = []

    def config(self, **changes) -> ExperimentConfig:
        options = {
            "model": str(self.model), "datasets": [str(self.texts[0])], "methods": ["baseline", "streaming"],
            "attn_backend_list": ["math"], "n_sink": 2, "window_size": 14, "max_eval_tokens": 40,
            "ablation_tokens": 60, "ablation_window_sizes": [8, 80], "ablation_n_sinks": [0, 2],
            "decode_sample": 4, "warmup_steps": 1, "only": "main", "output_dir": self.output, "device": "cpu",
        }  # fmt: skip
        return ExperimentConfig(**{**options, **changes})

    def run(self, **changes):
        self.said = []
        return ExperimentRunner(self.config(**changes), say=self.said.append).run()

    @property
    def root(self) -> Path:
        return self.output / "tiny"

    def lines(self, start: str) -> list[str]:
        return [line for line in self.said if line.startswith(start)]

    def result(self, name: str = "final/one_main_backend-math.json") -> dict:
        return json.loads((self.root / name).read_text())

    def files(self, pattern: str = "**/*.json") -> list[str]:
        return sorted(p.relative_to(self.root).as_posix() for p in self.root.glob(pattern))
