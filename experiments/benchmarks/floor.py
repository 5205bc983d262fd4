"""The least time that a decode step can take: the bytes it has to read, at the speed at which memory is copied here.

A step reads every weight once, but for the table of input embeddings, of which it reads a row, and the keys and
values of every token that is attended to. Activations and what is written are left out: the floor is a bound.
"""

import statistics

import torch
from transformers import DynamicCache

from experiments.costs import seconds
from streaming_llm.placement import stored_nbytes

_COPIES = 10
_CUDA_NBYTES, _CPU_NBYTES = 2**30, 2**28


def weight_nbytes(model) -> int:
    """Bytes of weights that a step reads, as they are stored: quantised or not.

    A table that is input and output embedding in one counts once.
    """
    table = model.get_input_embeddings().weight
    tied = table is model.get_output_embeddings().weight
    total = sum(map(stored_nbytes, model.parameters()))
    return total if tied else total - stored_nbytes(table)


@torch.inference_mode()
def kv_token_nbytes(model) -> int:
    """Bytes of the keys and values of one token in all layers, as the model hands them to a cache.

    Configurations do not say: Falcon stores its shared heads once or repeated, by version.
    """
    cache = DynamicCache(config=model.config)
    model(
        torch.zeros(1, 1, dtype=torch.int64, device=model.get_input_embeddings().weight.device),
        past_key_values=cache,
        use_cache=True,
    )
    return sum(x.numel() * x.element_size() for layer in cache.layers for x in (layer.keys, layer.values))


def step_nbytes(weights: int, token: int, cache_size: int, batch_size: int) -> int:
    """Bytes that a step reads: weights, and the keys and values of a full cache and the new token.

    Args:
        weights, token: bytes, see :func:`weight_nbytes` and :func:`kv_token_nbytes`.
    """
    return weights + batch_size * (cache_size + 1) * token


def copy_bytes_per_sec(device: torch.device, repeats: int = 5) -> float:
    """Bytes read and written per second by a large copy within the device's memory; the median of `repeats`."""
    nbytes = _CUDA_NBYTES if device.type == "cuda" else _CPU_NBYTES
    source = torch.ones(nbytes // 4, dtype=torch.float32, device=device)
    target = torch.empty_like(source)
    target.copy_(source)
    times = [seconds(lambda: [target.copy_(source) for _ in range(_COPIES)], device) for _ in range(repeats)]
    return 2 * nbytes * _COPIES / statistics.median(times)
