"""The peer that runs in a Python of its own: attention_sinks, which needs transformers 4.34."""

import json
import subprocess
from pathlib import Path

from experiments.benchmarks.decode import DECODE, Cell, Timing
from experiments.models import LoadedModel

_SCRIPT = Path(__file__).with_name("peer_attention_sinks.py")
_CONFIG_KEYS = ("hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size", "vocab_size")


def run_peer(python: Path, dtype_name: str, timing: Timing, cell: Cell, loaded: LoadedModel) -> dict:
    """One run of a cell by the peer, with random weights of the model's sizes; figures as of the other contenders.

    Raises ValueError where it cannot run, with the end of what it said.
    """
    config = loaded.config
    if config.model_type != "gpt_neox" or cell.kind != DECODE:
        raise ValueError("attention_sinks is measured on GPT-NeoX and its decode steps alone")
    if cell.backend != "math":
        raise ValueError("its attention is its own: transformers 4.34 has no SDPA; measured once, under math")
    order = {name: getattr(config, name) for name in _CONFIG_KEYS}
    rope = getattr(config, "rope_parameters", None) or {}
    order["rotary_pct"] = rope.get("partial_rotary_factor", getattr(config, "rotary_pct", 0.25))
    request = {
        "config": order, "dtype": dtype_name, "device": str(loaded.device), "n_sink": cell.n_sink,
        "window_size": cell.cache_size - cell.n_sink, "batch_size": cell.batch_size, "steps": timing.steps,
        "warmup_steps": timing.warmup, "max_run_sec": timing.max_sec, "seed": timing.seed,
    }  # fmt: skip
    done = subprocess.run(
        [str(python), str(_SCRIPT), json.dumps(request)], capture_output=True, text=True, check=False
    )
    if done.returncode:
        lines = [line for line in done.stderr.splitlines() if line.strip()]
        raise ValueError(f"its Python ended with {done.returncode}: {lines[-1] if lines else 'no message'}")
    answer = json.loads(done.stdout.splitlines()[-1])
    return {**answer, "engine": "eager", "check": None}
