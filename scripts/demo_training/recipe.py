"""What is trained and how: a frozen recipe whose defaults are the shipped model's, and the model itself."""

from __future__ import annotations

import json
import math
import re
from dataclasses import asdict, dataclass
from pathlib import Path

import safetensors.torch
import torch
from torch import nn
from transformers import AttentionInterface, AttentionMaskInterface, GPTNeoXConfig, GPTNeoXForCausalLM

from .byte_bpe import END_OF_TEXT_ID, MAX_VOCAB_SIZE, MIN_VOCAB_SIZE, atomic_path

ROPE_THETA = 10_000.0
SAVED_OUTPUT_LAYER = "embed_out."
_RENAMED = re.compile(r"^lm_head\.")
TRAINING_ATTENTION = "demo_training_causal_sdpa"
# Steps over which --max-minutes measures the speed, the first of them not counted (they compile and warm up).
PROBE_STEPS, PROBE_SKIP = 80, 30


@dataclass(frozen=True)
class Recipe:
    """Everything that decides which weights come out, the text aside.

    `steps` are optimiser steps of `batch_size` sequences of `context_length` tokens each. `max_minutes`
    (None: no limit) lowers the number of steps once, from the speed measured during warm-up, so that the
    learning rate still ends at zero. `rotary_pct` is the rotated share of each head's dimensions.
    """

    vocab_size: int = 4096
    hidden_size: int = 256
    num_layers: int = 6
    num_heads: int = 8
    intermediate_size: int = 1024
    context_length: int = 512
    rotary_pct: float = 0.25
    steps: int = 12_000
    max_minutes: float | None = None
    batch_size: int = 128
    learning_rate: float = 2e-3
    warmup_steps: int = 300
    weight_decay: float = 0.1
    grad_clip: float = 1.0
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("hidden_size", "num_layers", "num_heads", "intermediate_size", "steps", "batch_size"):
            self._require(name, getattr(self, name) >= 1, "must be at least 1")
        for name in ("warmup_steps", "weight_decay", "seed"):
            self._require(name, getattr(self, name) >= 0, "must be at least 0")
        for name in ("learning_rate", "grad_clip"):
            self._require(name, 0 < getattr(self, name) < math.inf, "must be positive")
        limits = f"must lie between {MIN_VOCAB_SIZE} and {MAX_VOCAB_SIZE}"
        self._require("vocab_size", MIN_VOCAB_SIZE <= self.vocab_size <= MAX_VOCAB_SIZE, limits)
        self._require("context_length", self.context_length >= 16, "must be at least 16")
        self._require("hidden_size", self.hidden_size % self.num_heads == 0, "must be a multiple of num_heads")
        rotary = self.hidden_size // self.num_heads * self.rotary_pct
        self._require(
            "rotary_pct", rotary >= 2 and rotary % 2 == 0, "must give an even number of dimensions, 2 or more"
        )
        self._require("warmup_steps", self.warmup_steps < self.steps, f"must be below steps ({self.steps})")
        if self.max_minutes is not None:
            self._require("max_minutes", 0 < self.max_minutes < math.inf, "must be positive")
            enough = self.warmup_steps >= PROBE_STEPS
            self._require("warmup_steps", enough, f"must be at least {PROBE_STEPS} where max_minutes is given")

    def _require(self, name: str, holds: bool, rule: str) -> None:
        if not holds:
            raise ValueError(f"{name} = {getattr(self, name)}: {rule}")

    @property
    def tokens_per_step(self) -> int:
        return self.batch_size * self.context_length

    def learning_rate_at(self, step: int, total_steps: int) -> float:
        """Linear warm-up, which does not depend on the total, then a cosine to zero at `total_steps`."""
        if step < self.warmup_steps:
            return self.learning_rate * (step + 1) / self.warmup_steps
        progress = (step - self.warmup_steps) / max(1, total_steps - self.warmup_steps)
        return self.learning_rate * 0.5 * (1 + math.cos(math.pi * progress))

    def as_dict(self) -> dict[str, object]:
        return asdict(self)


def model_config(recipe: Recipe) -> dict[str, object]:
    """The content of config.json, written out in full: defaults differ between versions of Transformers."""
    return {
        "architectures": ["GPTNeoXForCausalLM"],
        "attention_bias": True,
        "attention_dropout": 0.0,
        "bos_token_id": END_OF_TEXT_ID,
        "dtype": "float32",
        "eos_token_id": END_OF_TEXT_ID,
        "hidden_act": "gelu",
        "hidden_dropout": 0.0,
        "hidden_size": recipe.hidden_size,
        "initializer_range": 0.02,
        "intermediate_size": recipe.intermediate_size,
        "layer_norm_eps": 1e-5,
        "max_position_embeddings": recipe.context_length,
        "model_type": "gpt_neox",
        "num_attention_heads": recipe.num_heads,
        "num_hidden_layers": recipe.num_layers,
        # Transformers 5 reads the first of these three, 4.x the other two.
        "rope_parameters": {
            "rope_type": "default",
            "rope_theta": ROPE_THETA,
            "partial_rotary_factor": recipe.rotary_pct,
        },
        "rotary_emb_base": ROPE_THETA,
        "rotary_pct": recipe.rotary_pct,
        "tie_word_embeddings": False,
        "use_cache": True,
        "use_parallel_residual": True,
        "vocab_size": recipe.vocab_size,
    }


def build_model(recipe: Recipe) -> GPTNeoXForCausalLM:
    """A freshly initialised float32 model on the CPU; the same seed gives the same weights."""
    torch.manual_seed(recipe.seed)
    return GPTNeoXForCausalLM(GPTNeoXConfig.from_dict(model_config(recipe))).float()


def named_weights(model: GPTNeoXForCausalLM) -> dict[str, torch.Tensor]:
    """The state dict under the names that every version of Transformers loads.

    GPT-NeoX's output layer is `embed_out` in files and in the models of Transformers up to 5.2 at least, and
    `lm_head` in the models of later ones, which rename it on loading.
    """
    return {_RENAMED.sub(SAVED_OUTPUT_LAYER, name): weight for name, weight in model.state_dict().items()}


def load_named_weights(model: GPTNeoXForCausalLM, weights: dict[str, torch.Tensor]) -> None:
    """The inverse of `named_weights`, whatever version of Transformers wrote the weights."""
    own = [_RENAMED.sub(SAVED_OUTPUT_LAYER, name) for name in model.state_dict()]
    model.load_state_dict({name: weights[saved] for name, saved in zip(model.state_dict(), own, strict=True)})


def _causal_sdpa(
    module: nn.Module, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, *_: object, **__: object
) -> tuple[torch.Tensor, None]:
    # [batch, num_heads, length, head_dim] in, [batch, length, num_heads, head_dim] out
    out = nn.functional.scaled_dot_product_attention(query, key, value, is_causal=True, scale=module.scaling)
    return out.transpose(1, 2), None


def use_training_attention(model: GPTNeoXForCausalLM) -> None:
    """Make the model's attention plain causal SDPA without a mask.

    Transformers builds a 4-D mask as soon as a forward is traced, and with one the flash kernel cannot run.
    Training sequences are never padded, so none is needed.
    """
    AttentionInterface.register(TRAINING_ATTENTION, _causal_sdpa)
    AttentionMaskInterface.register(TRAINING_ATTENTION, lambda *_, **__: None)
    model.config._attn_implementation = TRAINING_ATTENTION


def export_model(recipe: Recipe, weights: dict[str, torch.Tensor], folder: Path) -> None:
    """Write the weights in float16 and a configuration that Transformers 4.56 to 5.x load, atomically.

    The configuration names float32, so that the model loads in float32 by default: half precision halves the
    file, and is no way to run the model.
    """
    generation = {"bos_token_id": END_OF_TEXT_ID, "eos_token_id": END_OF_TEXT_ID}
    for name, content in (("config.json", model_config(recipe)), ("generation_config.json", generation)):
        with atomic_path(folder / name) as temporary:
            temporary.write_text(json.dumps(content, indent=2, sort_keys=True) + "\n", encoding="utf-8")
    half = {name: tensor.half().contiguous() for name, tensor in weights.items()}
    # The weights last: where they are, everything is.
    with atomic_path(folder / "model.safetensors") as temporary:
        temporary.write_bytes(safetensors.torch.save(half, metadata={"format": "pt"}))
