"""What the tests of the demo model's trainer share: the scripts on the module path, a tiny recipe, a text."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("datasets", reason="the trainer encodes its texts by the package datasets")

ROOT = Path(__file__).resolve().parent.parent
SCRIPT = ROOT / "scripts" / "train_demo_model.py"
sys.path.insert(0, str(SCRIPT.parent))  # as Python does when the script is run

TINY = {
    "vocab_size": 300, "hidden_size": 32, "num_layers": 2, "num_heads": 2, "intermediate_size": 64,
    "context_length": 32, "batch_size": 4, "steps": 40,
}  # fmt: skip


def make_text(words: int, seed: int = 0) -> str:
    """Text with some structure: words drawn from a small vocabulary, in lines."""
    random = np.random.default_rng(seed)
    vocabulary = ["".join(random.choice(list("abcdefghij"), random.integers(2, 7))) for _ in range(80)]
    chosen = [vocabulary[i] for i in random.zipf(1.3, words) % 80]
    return "\n".join(" ".join(chosen[i : i + 9]) for i in range(0, words, 9)) + "\n"
