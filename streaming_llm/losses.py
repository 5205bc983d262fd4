"""Losses of tokens, in nats, summed in float32 or better."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from .families import lm_head, transformers_model

try:
    from .fused import elementwise
except ImportError:  # no Triton: PyTorch's own operators do the same
    elementwise = None

LOGITS_BYTES = 1 << 28
"""Logits, counted in float32, that are held at a time."""


def cross_entropy(logits: Tensor, targets: Tensor) -> Tensor:
    """Negative log-likelihood ``[n]`` of ``targets`` ``[n]`` under ``logits`` ``[n, vocab]``.

    In float32, or float64 for float64 logits.
    """
    if elementwise is not None and logits.device.type == "cuda" and logits.dtype != torch.float64:
        return elementwise.cross_entropy(logits.contiguous(), targets)
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    return nn.functional.cross_entropy(logits, targets, reduction="none")


def token_nll(model: nn.Module, hidden_states: Tensor, targets: Tensor) -> Tensor:
    """Negative log-likelihood of ``targets``, without ever holding the logits of all of them.

    Args:
        hidden_states: final hidden states ``[batch, length, hidden]``.
        targets: token ids ``[batch, length]``.

    Returns:
        ``[batch, length]``, in nats, float32 (float64 for a float64 model).
    """
    model = transformers_model(model)
    batch, length = targets.shape
    vocab = model.get_output_embeddings().weight.shape[0]
    step = max(1, LOGITS_BYTES // (4 * vocab * batch))
    out = []
    for start in range(0, length, step):
        logits = lm_head(model, hidden_states[:, start : start + step]).flatten(0, 1)
        out.append(cross_entropy(logits, targets[:, start : start + step].flatten().to(logits.device)))
    return torch.cat([x.view(batch, -1) for x in out], dim=1)
