"""What the scripts do with a model before they run it."""

from __future__ import annotations

import hashlib

import torch
from torch import nn

from experiments.config import SetupError
from experiments.methods import head_dim
from experiments.models import LoadedModel, ModelSource
from experiments.session import Machine
from personal_adapters.neox_flash import wrap_attention
from personal_adapters.sdpa import check_backend_available
from streaming_llm import StreamingConfig, StreamingDecoder


def load_wrapped(source: ModelSource, machine: Machine) -> LoadedModel:
    """Load a model, with its attention wrapped for the machine's first backend.

    Raises:
        SetupError: it cannot be loaded, or the backend cannot run it.
    """
    loaded, backend = source.load(machine.dtype, machine.device), machine.backends[0]
    available = check_backend_available(backend, machine.dtype, machine.device, head_dim(loaded.model.config))
    if not available:
        raise SetupError(f"attention backend {backend!r} cannot run {source.name!r}: {available.reason}")
    try:
        wrap_attention(loaded.model, backend)
    except ValueError as error:
        raise SetupError(f"model {source.name!r} cannot be used: {error}") from None
    return loaded


def make_decoder(
    loaded: LoadedModel, config: StreamingConfig, engine: str, attention: str = "sdpa"
) -> StreamingDecoder:
    """A decoder of a loaded model.

    Raises:
        SetupError: the model cannot stream so, or the engine cannot run it.
    """
    try:
        return StreamingDecoder(loaded.model, config.n_sink, config.window_size, engine, attention=attention)
    except ValueError as error:
        raise SetupError(str(error)) from None


def weights_fingerprint(model: nn.Module) -> str:
    """Tells models of the same sizes apart, wherever they were loaded from: a hash of the first numbers of each
    parameter, in the dtype that it has."""
    heads = [parameter.detach().flatten()[:16].to("cpu", torch.float64) for parameter in model.parameters()]
    return hashlib.sha256(torch.cat(heads).numpy().tobytes()).hexdigest()
