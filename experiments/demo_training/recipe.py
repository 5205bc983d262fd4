"""What is trained and how, and the options of a run."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from pathlib import Path

from transformers import TrainingArguments

from experiments.config import SetupError

from .sequences import END_OF_TEXT_ID


@dataclass(frozen=True)
class Recipe:
    """What decides which weights come out, the text aside. The defaults are the shipped model's."""

    vocab_size: int = 4096
    hidden_size: int = 256
    num_layers: int = 6
    num_heads: int = 8
    intermediate_size: int = 1024
    context_length: int = 512
    rotary_pct: float = 0.25
    steps: int = 12_000
    batch_size: int = 128
    learning_rate: float = 2e-3
    warmup_steps: int = field(default=300, metadata={"help": "at most a tenth of the steps"})
    weight_decay: float = 0.1
    grad_clip: float = 1.0
    seed: int = 0

    def __post_init__(self) -> None:
        rotary = self.hidden_size // self.num_heads * self.rotary_pct if self.num_heads else 0
        for name, holds, rule in (
            *((name, getattr(self, name) >= 1, "at least 1") for name in ("steps", "batch_size", "num_layers")),
            *((name, 0 < getattr(self, name) < math.inf, "positive") for name in ("learning_rate", "grad_clip")),
            ("vocab_size", 257 <= self.vocab_size <= 65_536, "from 257 (the first token and every byte) to 65536"),
            ("context_length", self.context_length >= 16, "at least 16"),
            ("num_heads", self.num_heads and self.hidden_size % self.num_heads == 0, "a divisor of hidden_size"),
            ("rotary_pct", rotary >= 2 and rotary % 2 == 0, "such that an even number of dimensions is rotated"),
        ):
            if not holds:
                raise SetupError(f"{name} = {getattr(self, name)}: must be {rule}")

    def config(self) -> dict[str, object]:
        """The content of config.json, written out in full: defaults differ between versions of Transformers."""
        return {
            "architectures": ["GPTNeoXForCausalLM"],
            "attention_bias": True,
            "attention_dropout": 0.0,
            "bos_token_id": END_OF_TEXT_ID,
            "dtype": "float32",  # in which the half-precision weights load
            "eos_token_id": END_OF_TEXT_ID,
            "hidden_act": "gelu",
            "hidden_dropout": 0.0,
            "hidden_size": self.hidden_size,
            "initializer_range": 0.02,
            "intermediate_size": self.intermediate_size,
            "layer_norm_eps": 1e-5,
            "max_position_embeddings": self.context_length,
            "model_type": "gpt_neox",
            "num_attention_heads": self.num_heads,
            "num_hidden_layers": self.num_layers,
            # Transformers 5 reads the first of these three, 4.x the other two.
            "rope_parameters": {
                "rope_type": "default",
                "rope_theta": 10_000.0,
                "partial_rotary_factor": self.rotary_pct,
            },
            "rotary_emb_base": 10_000.0,
            "rotary_pct": self.rotary_pct,
            "tie_word_embeddings": False,
            "use_cache": True,
            "use_parallel_residual": True,
            "vocab_size": self.vocab_size,
        }

    def training(self, options: Options) -> TrainingArguments:
        """AdamW that decays matrices only, linear warm-up, cosine to zero, bfloat16 autocast on CUDA."""
        log_every = max(1, min(50, self.steps // 20))
        return TrainingArguments(
            output_dir=str(options.work_dir),
            max_steps=self.steps,
            per_device_train_batch_size=self.batch_size,
            learning_rate=self.learning_rate,
            lr_scheduler_type="cosine",
            warmup_steps=min(self.warmup_steps, self.steps // 10),
            adam_beta1=0.9,
            adam_beta2=0.95,
            weight_decay=self.weight_decay,
            max_grad_norm=self.grad_clip,
            seed=self.seed,
            bf16=options.on_cuda,
            use_cpu=not options.on_cuda,
            torch_compile=options.compile,
            logging_steps=log_every,
            logging_nan_inf_filter=False,
            save_steps=log_every * -(-options.checkpoint_every // log_every),  # cuts no entry of the loss curve in two
            save_total_limit=2,  # a kill while one is being written leaves the one before
            remove_unused_columns=False,
            report_to="none",
        )


@dataclass
class Options:
    """Files, and how to run."""

    data: str = field(metadata={"help": "a .txt, a folder of .txt, a .txt.xz, or hf:NAME[:CONFIG[:SPLIT[:COLUMN]]]"})
    output_dir: Path = field(metadata={"help": "receives model, tokenizer and report.json"})
    held_out: list[Path] = field(
        default_factory=list, metadata={"help": "texts for the report (default: the end of the last document)"}
    )
    held_out_start: int = field(default=20_000, metadata={"help": "character of each held-out text to start at"})
    held_out_tokens: int = field(default=4096, metadata={"help": "length of the streams of the report"})
    device: str = field(default="", metadata={"help": "cpu or cuda[:N] (default: cuda where there is one)"})
    compile: bool = field(default=False, metadata={"help": "torch.compile the model"})
    checkpoint_every: int = field(default=500, metadata={"help": "steps between checkpoints"})
    force: bool = field(default=False, metadata={"help": "start anew where another run lies"})

    @property
    def work_dir(self) -> Path:
        return self.output_dir / "work"

    @property
    def on_cuda(self) -> bool:
        return self.device != "cpu"

    def __post_init__(self) -> None:
        for name, least in (("held_out_start", 0), ("checkpoint_every", 1)):
            if getattr(self, name) < least:
                raise SetupError(f"--{name.replace('_', '-')} {getattr(self, name)}: must be at least {least}")
