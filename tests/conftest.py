"""Tiny random models, made anew for each test."""

from __future__ import annotations

import os
import signal
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from transformers import GPTNeoXConfig, GPTNeoXForCausalLM

torch.set_num_threads(1)  # tiny tensors: more threads only wait for each other

GPU = os.environ.get("STREAMING_LLM_TEST_DEVICE", "cuda")
"""The device of the GPU tests: `cuda:1` tries the second one while the first is the current device."""

SHARED = Path(__file__).resolve().parents[2] / "shared"


def pytest_runtest_setup(item: pytest.Item) -> None:
    if item.get_closest_marker("gpu") and not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")


def make_neox(dtype: torch.dtype = torch.float32, attention: str = "sdpa", seed: int = 0, **changes):
    """A random GPT-NeoX with logits of a standard deviation near 1."""
    torch.manual_seed(seed)
    config = GPTNeoXConfig(
        **{
            "vocab_size": 101, "hidden_size": 64, "num_hidden_layers": 4, "num_attention_heads": 4,
            "intermediate_size": 128, "max_position_embeddings": 128, "rotary_pct": 0.5, "initializer_range": 0.12,
            "use_parallel_residual": True, "bos_token_id": 0, "eos_token_id": None, "pad_token_id": None,
            **changes,
        }
    )  # fmt: skip
    config._attn_implementation = attention
    model = GPTNeoXForCausalLM(config).eval()
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            torch.nn.init.normal_(parameter, std=0.1)
    return model.to(dtype)


def make_rounded(dtype: torch.dtype, **changes):
    """A GPT-NeoX as loaded in a dtype, with float32 frequencies, and its float64 twin of the same weights."""
    model, exact = make_neox(dtype, **changes), make_neox(torch.float64, **changes)
    exact.load_state_dict(model.state_dict())
    model.gpt_neox.rotary_emb = make_neox(**changes).gpt_neox.rotary_emb
    return model, exact


def make_ids(length: int, batch: int = 1, vocab: int = 101, seed: int = 1) -> torch.Tensor:
    """Random token ids ``[batch, length]``."""
    return torch.randint(vocab, (batch, length), generator=torch.Generator().manual_seed(seed))


@pytest.fixture
def shared_data() -> Path:
    """The folder of real texts beside the checkout; skips where there is none."""
    if not (SHARED / "data").is_dir():
        pytest.skip("the shared data folder is not there")
    return SHARED / "data"


@pytest.fixture
def world(tmp_path):
    """A model folder, texts and an output folder, for tests of the evaluation."""
    from evaluation_support import World

    return World(tmp_path)


@pytest.fixture
def ctrl_c():
    """SIGINT interrupts this process and those that it starts, also where the shell that started pytest ignores it."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.fixture
def no_collection(monkeypatch):
    """No garbage is collected around cells: on a tiny model that takes longer than all the rest."""
    for module in ("costs", "measuring"):
        monkeypatch.setattr(f"experiments.{module}.gc", SimpleNamespace(collect=lambda: 0))
