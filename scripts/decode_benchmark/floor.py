"""The least time that a decode step can take: the bytes it has to read, at the speed at which memory is copied here.

A step reads every weight once, but for the table of input embeddings, of which it reads a row, and the keys and
values of every token that is attended to. Activations and what is written are left out: the floor is a bound.
"""

from __future__ import annotations

import statistics
import time

import torch

from experiments.device import synchronise
from experiments.methods import kv_token_nbytes

_COPIES = 10
_CUDA_NBYTES, _CPU_NBYTES = 2**30, 2**28


def weight_nbytes(model) -> int:
    """Bytes of weights that a step reads. A table that is input and output embedding in one counts once."""
    table = model.get_input_embeddings().weight
    tied = table is model.get_output_embeddings().weight
    total = sum(p.numel() * p.element_size() for p in model.parameters())
    return total if tied else total - table.numel() * table.element_size()


def step_nbytes(model, cache_size: int, batch_size: int) -> int:
    """Bytes that a step reads: weights, and the keys and values of a full cache and the new token."""
    return weight_nbytes(model) + batch_size * (cache_size + 1) * kv_token_nbytes(model)


def copy_bytes_per_sec(device: torch.device, repeats: int = 5) -> float:
    """Bytes read and written per second by a large copy within the device's memory; the median of `repeats`."""
    nbytes = _CUDA_NBYTES if device.type == "cuda" else _CPU_NBYTES
    source = torch.ones(nbytes // 4, dtype=torch.float32, device=device)
    target = torch.empty_like(source)
    target.copy_(source)
    speeds = []
    for _ in range(repeats):
        synchronise(device)
        start = time.perf_counter()
        for _ in range(_COPIES):
            target.copy_(source)
        synchronise(device)
        speeds.append(2 * nbytes * _COPIES / (time.perf_counter() - start))
    return statistics.median(speeds)
